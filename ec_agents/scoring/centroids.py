"""The entropy centroid, its standardized form, and its form without phases."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import Candidate, TokenSignals
from ec_agents.entropy import (
    PRESETS,
    PhaseConfig,
    entropy_centroid,
    high_entropy_phases,
    raw_entropy_centroid,
    standardized_centroid,
)
from ec_agents.errors import ConfigError
from ec_agents.scoring.base import Best, Scores


class CentroidScorer:
    """The entropy centroid, 0..1: where along the response its uncertainty lies. Low = resolved early = better.

    Args:
        phases: How phases are found: a ``PhaseConfig`` or the name of a preset, ``"paper"`` (1, 80, 2) or ``"short"``
            (5, 50, 3). ``"short"`` is the less noisy one on texts under some 300 tokens.

    Raises:
        ConfigError: There is no preset of that name.

    Source:
        arXiv 2604.26173; mass = tokens in the phase, position = middle of the phase, divided by the length.
    """

    name = "centroid"
    best: Best = "lowest"

    def __init__(self, phases: PhaseConfig | str = "paper") -> None:
        if isinstance(phases, str) and phases not in PRESETS:
            raise ConfigError(f"phases must be a PhaseConfig or one of {', '.join(PRESETS)}; found {phases!r}")
        self.config = PRESETS[phases] if isinstance(phases, str) else phases

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """Centroid of each candidate, ``(N,)``; NaN without signals or without a phase."""
        return np.array([self._score(candidate) for candidate in candidates], dtype=np.float64)

    def noise(self, candidates: Sequence[Candidate]) -> Scores:
        """Standard deviation of each centroid if the phases came in any order, anywhere, with equal chance, ``(N,)``.

        Source:
            (1 - Σd/L) √(Σd² / 12) / Σd for phases of d out of L tokens: phases do not overlap, so that the more of
            the text they fill, the less room they have.
        """
        return np.array([self._noise(candidate) for candidate in candidates], dtype=np.float64)

    def phases(self, candidate: Candidate) -> NDArray[np.int64]:
        """High-entropy phases of one candidate, ``(P, 2)``; none without signals or where every entropy is 0.

        One alternative a token, a grammar that allows one token, and servers that report the distribution after
        temperature 0 all give zeros: nothing was measured.
        """
        return _NONE if candidate.signals is None else _phases(candidate.signals, self.config)

    def _score(self, candidate: Candidate) -> float:
        n_tokens = 0 if candidate.signals is None else candidate.signals.n_tokens
        return self._centroid(self.phases(candidate), n_tokens)

    def _centroid(self, phases: NDArray[np.int64], n_tokens: int) -> float:
        return entropy_centroid(phases, n_tokens)

    def _noise(self, candidate: Candidate) -> float:
        durations = self.phases(candidate)[:, 1]
        total = int(durations.sum())
        if candidate.signals is None or not total:
            return math.nan
        return self._spread(durations) * (1 - total / candidate.signals.n_tokens)

    def _spread(self, durations: NDArray[np.int64]) -> float:
        return math.sqrt(float((durations**2).sum()) / 12) / float(durations.sum())


class StandardizedCentroidScorer(CentroidScorer):
    """The centroid in standard deviations of what signal-free phases of the same masses would give.

    The plain centroid favours short candidates, whose centroids scatter more; this one does not.

    Source:
        Phases placed uniformly have variance Σd² / (12 (Σd)²) around 1/2; d = tokens in a phase.
    """

    name = "standardized-centroid"

    def _centroid(self, phases: NDArray[np.int64], n_tokens: int) -> float:
        return standardized_centroid(phases, n_tokens)

    def _spread(self, durations: NDArray[np.int64]) -> float:  # noqa: ARG002 - the same for all
        return 1.0


_NONE = np.empty((0, 2), dtype=np.int64)


@lru_cache(maxsize=256)
def _phases(signals: TokenSignals, config: PhaseConfig) -> NDArray[np.int64]:
    """The phases, found once for the score, its noise and their count."""
    found = high_entropy_phases(signals.entropies, config) if measured(signals) else _NONE
    found.flags.writeable = False
    return found


def measured(signals: TokenSignals) -> bool:
    """Whether the entropies say anything: some token has one above 0."""
    return bool((signals.entropies > 0).any())


def raw_centroid(signals: TokenSignals) -> float:
    """Mean position of the tokens weighted by entropy, 0..1; NaN where nothing was measured."""
    return raw_entropy_centroid(signals.entropies)


def raw_centroid_noise(signals: TokenSignals) -> float:
    """Standard deviation of ``raw_centroid`` over all orders of the tokens.

    Source:
        √(Σ(e - ē)² (T + 1) / (12 T)) / Σe, the variance of a weighted mean of positions under permutation.
    """
    weights = np.nan_to_num(signals.entropies.astype(np.float64))
    total, n_tokens = float(weights.sum()), len(weights)
    if total <= 0:
        return math.nan
    return math.sqrt(float(((weights - weights.mean()) ** 2).sum()) * (n_tokens + 1) / (12 * n_tokens)) / total
