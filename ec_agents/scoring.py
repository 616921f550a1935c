"""Stage 4 - score: candidates → one number each, by the entropy centroid or a baseline."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import Candidate
from ec_agents.entropy import PRESETS, PhaseConfig, entropy_centroid, high_entropy_phases, standardized_centroid
from ec_agents.errors import ConfigError

Scores = NDArray[np.float64]


class Scorer(Protocol):
    """Anything that gives each candidate of a step a number."""

    @property
    def name(self) -> str:
        """Name in records and tables."""
        ...

    @property
    def best(self) -> Literal["lowest", "highest"]:
        """Which end wins."""
        ...

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores of the candidates, ``(N,)``; NaN = cannot be scored."""
        ...


@runtime_checkable
class FindsPhases(Protocol):
    """A scorer that works on high-entropy phases, so that their number can be reported."""

    def phases(self, candidate: Candidate) -> NDArray[np.int64]:
        """High-entropy phases of one candidate, ``(P, 2)``: start and duration in tokens."""
        ...


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
    best: Literal["lowest", "highest"] = "lowest"

    def __init__(self, phases: PhaseConfig | str = "paper") -> None:
        if isinstance(phases, str) and phases not in PRESETS:
            raise ConfigError(f"phases must be a PhaseConfig or one of {', '.join(PRESETS)}; found {phases!r}")
        self.config = PRESETS[phases] if isinstance(phases, str) else phases

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """Centroid of each candidate, ``(N,)``; NaN without signals or without a phase."""
        return np.array([self._score(candidate) for candidate in candidates], dtype=np.float64)

    def phases(self, candidate: Candidate) -> NDArray[np.int64]:
        """High-entropy phases of one candidate, ``(P, 2)``; none without signals or where every entropy is 0.

        One alternative a token, a grammar that allows one token, and servers that report the distribution after
        temperature 0 all give zeros: nothing was measured.
        """
        signals = candidate.signals
        if signals is None or not (signals.entropies > 0).any():
            return np.empty((0, 2), dtype=np.int64)
        return high_entropy_phases(signals.entropies, self.config)

    def _score(self, candidate: Candidate) -> float:
        n_tokens = 0 if candidate.signals is None else candidate.signals.n_tokens
        return self._centroid(self.phases(candidate), n_tokens)

    def _centroid(self, phases: NDArray[np.int64], n_tokens: int) -> float:
        return entropy_centroid(phases, n_tokens)


class StandardizedCentroidScorer(CentroidScorer):
    """The centroid in standard deviations of what signal-free phases of the same masses would give.

    The plain centroid favours short candidates, whose centroids scatter more; this one does not.

    Source:
        Phases placed uniformly have variance Σd² / (12 (Σd)²) around 1/2; d = tokens in a phase.
    """

    name = "standardized-centroid"

    def _centroid(self, phases: NDArray[np.int64], n_tokens: int) -> float:
        return standardized_centroid(phases, n_tokens)


class FirstScorer:
    """The baseline that takes the first candidate; needs no signals."""

    name = "first"
    best: Literal["lowest", "highest"] = "lowest"

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """Index of each candidate, ``(N,)``."""
        return np.array([candidate.index for candidate in candidates], dtype=np.float64)


class RandomScorer:
    """The baseline that takes any candidate; needs no signals.

    Args:
        seed: The same seed gives the same sequence of choices; None gives a fresh one.
    """

    name = "random"
    best: Literal["lowest", "highest"] = "lowest"

    def __init__(self, seed: int | None = None) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """A uniform number for each candidate, ``(N,)``."""
        return self._rng.random(len(candidates))


SCORERS: Mapping[str, Callable[[], Scorer]] = {
    "centroid": CentroidScorer,
    "centroid-short": lambda: CentroidScorer("short"),
    "standardized-centroid": StandardizedCentroidScorer,
    "first": FirstScorer,
    "random": RandomScorer,
}
"""The scorers by name, for command lines and configuration files."""
