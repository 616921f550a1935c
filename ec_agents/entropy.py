"""Stage 3 - measure: log-probabilities → entropies → phases → centroid.

A token entropy says how uncertain the model was at one token. Where uncertainty stays high, tokens form a high-entropy
phase. The entropy centroid is the mean position of the phases along the text, 0 to 1: low = resolved early.

Example:
    >>> entropies = [0.1, 2.0, 1.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    >>> phases = high_entropy_phases(entropies, PhaseConfig(top_percent=10, bottom_percent=60))
    >>> phases.tolist(), entropy_centroid(phases, len(entropies))
    ([[1, 2]], 0.2)
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ec_agents.errors import ConfigError

Floats = NDArray[np.float64]
Position = Literal["center", "start", "moment"]

MASKED = -9999.0
"""Servers write this, or less, where they have no log-probability (vLLM, OpenAI: -9999.0; SGLang: -3.4e38)."""


@dataclass(frozen=True, slots=True)
class PhaseConfig:
    """Where a high-entropy phase begins and ends.

    Source: θ_high, θ_low and k of arXiv 2604.26173, with percentiles taken over the text itself.

    Raises:
        ConfigError: A percentage is outside 0..100, or ``patience`` is not a positive integer.
    """

    top_percent: float = 1.0
    """A token among the highest ``top_percent`` % of the entropies opens a phase."""
    bottom_percent: float = 80.0
    """A token among the lowest ``bottom_percent`` % counts as low."""
    patience: int = 2
    """Consecutive low tokens that close a phase."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, percent in (("top_percent", self.top_percent), ("bottom_percent", self.bottom_percent)):
            if not 0.0 <= percent <= 100.0:
                raise ConfigError(f"{name} must be a percentage between 0 and 100; found {percent!r}")
        if type(self.patience) is not int or self.patience < 1:
            raise ConfigError(f"patience must be an integer of at least 1; found {self.patience!r}")


PRESETS: Mapping[str, PhaseConfig] = MappingProxyType(
    {
        "paper": PhaseConfig(top_percent=1.0, bottom_percent=80.0, patience=2),
        "short": PhaseConfig(top_percent=5.0, bottom_percent=50.0, patience=3),
    }
)
"""``paper``: what the paper's evaluation command uses. ``short``: the reference library's default, less noisy on texts
under some 300 tokens."""


def keep_largest(top_logprobs: ArrayLike, top_k: int | None) -> Floats:
    """The ``top_k`` largest log-probabilities of each token; all of them for None.

    Args:
        top_logprobs: ``(T, K)``, nats, in any order.
        top_k: How many to keep.

    Returns:
        ``(T, min(K, top_k))``, in any order. NaN counts as largest, so a damaged row stays damaged.

    Raises:
        ConfigError: The array is not two-dimensional, or ``top_k`` is below 1.
    """
    rows = np.asarray(top_logprobs, dtype=np.float64)
    if rows.ndim != 2:
        raise ConfigError(f"log-probabilities of shape (T, K) are needed; found shape {rows.shape}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1; found {top_k}")
    surplus = 0 if top_k is None else rows.shape[1] - top_k
    return rows if surplus <= 0 else np.partition(rows, surplus, axis=1)[:, surplus:]


def token_entropies(top_logprobs: ArrayLike, *, top_k: int | None = None) -> Floats:
    """Shannon entropy of each token over its most probable alternatives, made to sum to one.

    Source: H = -Σ q ln q with q = p / Σ p over the ``top_k`` largest p, the token entropy of arXiv 2604.26173.

    Args:
        top_logprobs: ``(T, K)``, nats, in any order, padded with -inf. -9999.0 or less counts as absent.
        top_k: How many alternatives to keep; None = all.

    Returns:
        ``(T,)``, nats, 0 to ln K. NaN = missing: no alternative is present, or one of them is NaN or +inf.

    Raises:
        ConfigError: The array is not two-dimensional, or ``top_k`` is below 1.
    """
    return entropies_and_mass(keep_largest(top_logprobs, top_k))[0]


def entropies_and_mass(rows: Floats) -> tuple[Floats, Floats]:
    """``token_entropies``, and the probability that the alternatives of each token have together.

    Args:
        rows: ``(T, K)``, nats, as ``token_entropies`` takes them.

    Returns:
        Two times ``(T,)``: entropies in nats, and probabilities; NaN = missing.
    """
    largest = rows.max(axis=1, initial=-np.inf)
    present = (largest > MASKED) & (largest < np.inf)
    if np.count_nonzero(present) == len(rows):
        return _entropies_and_mass(rows, largest)
    found = np.full((2, len(rows)), np.nan)
    found[:, present] = _entropies_and_mass(rows[present], largest[present])
    return found[0], found[1]


def entropy_thresholds(entropies: ArrayLike, config: PhaseConfig) -> tuple[float, float]:
    """The entropies from which a phase opens and down to which a token counts as low.

    Source: percentiles 100 - ``top_percent`` and ``bottom_percent`` of one text, linear between neighbours
    (arXiv 2604.26173).

    Args:
        entropies: ``(T,)``, nats; NaN = missing.
        config: The percentages.

    Returns:
        (high, low), nats; (inf, -inf) if every entropy is missing.

    Raises:
        ConfigError: The array is not one-dimensional.
    """
    values = _sequence(entropies)
    missing = np.isnan(values)
    return _thresholds(values[~missing] if missing.any() else values, config)


def high_entropy_phases(entropies: ArrayLike, config: PhaseConfig) -> NDArray[np.int64]:
    """The stretches of text along which the model stays uncertain.

    A phase opens at a token of at least the high threshold and closes at the first ``patience`` consecutive low tokens
    after it, which do not belong to it. The last phase may stay open; it then reaches to the end of the text.
    Missing tokens have a position and nothing else: they neither open, prolong nor close a phase.

    Source: high-entropy phases of arXiv 2604.26173.

    Args:
        entropies: ``(T,)``, nats; NaN = missing.
        config: Where a phase begins and ends.

    Returns:
        ``(P, 2)``: position of the opening token among all tokens, duration in tokens that have an entropy (≥ 1).

    Raises:
        ConfigError: The array is not one-dimensional.
    """
    values = _sequence(entropies)
    missing = np.isnan(values)
    positions = np.flatnonzero(~missing) if np.count_nonzero(missing) else None
    if positions is not None:
        values = values[positions]
    high, low = _thresholds(values, config)
    # Searching bytes for the run of low tokens costs a fraction of what array operations on a short text do.
    calm, run = (values <= low).tobytes(), b"\1" * min(config.patience, len(values) + 1)
    starts, durations, following = list[int](), list[int](), 0
    for opening in (values >= high).nonzero()[0].tolist():
        if opening < following:
            continue
        found = calm.find(run, opening + 1)
        closing = len(values) if found < 0 else found
        starts.append(opening)
        durations.append(closing - opening)
        following = closing + config.patience
    phases = np.array((starts, durations), dtype=np.int64)
    if positions is not None:
        phases[0] = positions[phases[0]]
    return phases.T


def entropy_centroid(phases: ArrayLike, n_tokens: int, *, position: Position = "center") -> float:
    """Mean position of the phases, each weighted by its duration, as a fraction of the text.

    Source: Σ d (s + d/2) / (L Σ d) for starts s, durations d and L tokens, the centroid of arXiv 2604.26173
    (``center``). ``start`` has s in place of s + d/2. ``moment`` is Σ d s / L, which grows with the text.

    Args:
        phases: ``(P, 2)``: start and duration of each, tokens.
        n_tokens: L, missing tokens counted.
        position: What stands for the position of a phase.

    Returns:
        0 to 1, low = resolved early (``moment``: from 0 on); NaN if there is no phase or no token.

    Raises:
        ConfigError: ``position`` is unknown, or the phases are not ``(P, 2)``.
    """
    starts, durations = _columns(phases)
    total = durations.sum()
    if n_tokens <= 0 or total <= 0:
        return math.nan
    # Sums rather than dot products, whose last bits (and threads) would depend on the BLAS at hand.
    match position:
        case "center":
            return float((durations * (starts + durations / 2)).sum() / total / n_tokens)
        case "start":
            return float((durations * starts).sum() / total / n_tokens)
        case "moment":
            return float((durations * starts).sum() / n_tokens)
        case _:
            raise ConfigError(f"position must be 'center', 'start' or 'moment'; found {position!r}")


def standardized_centroid(phases: ArrayLike, n_tokens: int) -> float:
    """The centroid in standard deviations from where phases without any signal would put it.

    The fewer the phases, the further the centroid strays by chance, so that the lowest centroid is often just that of
    the shortest text. This score takes the advantage away.

    Source: (C - 1/2) / √(Σ d² / (12 (Σ d)²)), mean and variance being those of phases that lie uniformly.

    Args:
        phases: ``(P, 2)``: start and duration of each, tokens.
        n_tokens: L, missing tokens counted.

    Returns:
        Standard deviations, low = resolved early; NaN if there is no phase or no token.

    Raises:
        ConfigError: The phases are not ``(P, 2)``.
    """
    centroid = entropy_centroid(phases, n_tokens)
    if math.isnan(centroid):
        return math.nan
    _, durations = _columns(phases)
    return (centroid - 0.5) * float(durations.sum()) * math.sqrt(12.0 / float((durations**2).sum()))


def raw_entropy_centroid(entropies: ArrayLike) -> float:
    """Mean position of the tokens, each weighted by its entropy, as a fraction of the text; no phases.

    Source: (Σ e i / Σ e) / L over the tokens i with an entropy e ≥ 0, the baseline of arXiv 2604.26173.

    Args:
        entropies: ``(T,)``, nats; NaN = missing. Negative ones are left out; all count in L.

    Returns:
        0 to 1, low = resolved early; NaN if the entropies sum to 0.

    Raises:
        ConfigError: The array is not one-dimensional.
    """
    values = _sequence(entropies)
    weights = np.where(values >= 0.0, values, 0.0)
    total = weights.sum()
    return float((weights * np.arange(len(values))).sum() / total / len(values)) if total > 0.0 else math.nan


def concatenate_turns(turns: Iterable[ArrayLike]) -> Floats:
    """The turns of one agent run as one text, which is how the paper measures agents; empty turns vanish.

    Source: the agent setting of arXiv 2604.26173: thresholds and phases run across turns; only the agent's own tokens
    count.

    Args:
        turns: Entropies of each turn, ``(T_i,)``, nats; NaN = missing.

    Returns:
        ``(Σ T_i,)``, nats.

    Raises:
        ConfigError: A turn is not one-dimensional.
    """
    return np.concatenate([np.empty(0), *map(_sequence, turns)])


def _entropies_and_mass(rows: Floats, largest: Floats) -> tuple[Floats, Floats]:
    """``entropies_and_mass`` of tokens whose largest alternative is a number."""
    # Relative to the largest, exp(-1000) is exactly 0, and 0 * -1000 is 0 where 0 * -inf would be NaN.
    relative = np.maximum(rows - largest[:, None], -1000.0)
    weights = np.exp(relative)
    total = weights.sum(axis=1)
    # total >= 1 and relative <= 0, so that neither term is ever negative, not even by rounding.
    return np.log(total) - (weights * relative).sum(axis=1) / total, np.exp(largest) * total


def _sequence(entropies: ArrayLike) -> Floats:
    """The entropies as a float64 array; None becomes NaN."""
    values = np.asarray(entropies, dtype=np.float64)
    if values.ndim != 1:
        raise ConfigError(f"entropies of shape (T,) are needed; found shape {values.shape}")
    return values


def _columns(phases: ArrayLike) -> tuple[Floats, Floats]:
    """Starts and durations, ``(P,)`` each."""
    table = np.asarray(phases, dtype=np.float64)
    if table.shape == (0,):
        table = table.reshape(0, 2)
    if table.ndim != 2 or table.shape[1] != 2:
        raise ConfigError(f"phases of shape (P, 2) are needed; found shape {table.shape}")
    return table[:, 0], table[:, 1]


def _thresholds(present: Floats, config: PhaseConfig) -> tuple[float, float]:
    """``entropy_thresholds`` of entropies none of which is missing."""
    if not len(present):
        return math.inf, -math.inf
    ordered = np.sort(present)
    return _percentile(ordered, 100.0 - config.top_percent), _percentile(ordered, config.bottom_percent)


def _percentile(ordered: Floats, percent: float) -> float:
    """``numpy.percentile`` of a sorted array, bit for bit, without its overhead, which is that of the whole rest."""
    position = (len(ordered) - 1) * (percent / 100)
    below = int(position)
    part = position - below
    a, b = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return a + (b - a) * part if part < 0.5 else b - (b - a) * (1 - part)
