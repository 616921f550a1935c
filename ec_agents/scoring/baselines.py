"""The scores that the centroid is compared with: entropy, confidence, likelihood, length, order."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ec_agents.candidates import Candidate, TokenSignals
from ec_agents.errors import ConfigError
from ec_agents.scoring.base import Best, Scores
from ec_agents.scoring.centroids import measured
from ec_agents.scoring.noise import UNKNOWN, Chance, lowest_groups, maximum_chance, normal_chance

Floats = NDArray[np.float64]

GROUP_TOKENS = 2048
"""Width of DeepConf's groups and tail."""


def present(values: ArrayLike) -> Floats:
    """The values that are not missing, float64, ``(≤ T,)``."""
    numbers = np.asarray(values, dtype=np.float64)
    return numbers[~np.isnan(numbers)]


def mean(values: ArrayLike) -> float:
    """Mean of the values that are present; NaN if none is."""
    numbers = present(values)
    return float(numbers.mean()) if len(numbers) else math.nan


def standard_error(values: ArrayLike) -> float:
    """Standard deviation of ``mean`` if the tokens were independent draws; NaN for fewer than two."""
    numbers = present(values)
    return float(numbers.std(ddof=1)) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan


def group_means(confidences: ArrayLike, width: int = GROUP_TOKENS) -> Floats:
    """Mean of every ``width`` consecutive tokens, ``(max(1, T - width + 1),)``; of the whole where it is shorter.

    Source:
        The group confidence of DeepConf, arXiv 2508.15260. Missing tokens are left out; empty if all are.
    """
    numbers = present(confidences)
    if len(numbers) <= width:
        return np.array([numbers.mean()] if len(numbers) else [])
    sums = np.concatenate(([0.0], np.cumsum(numbers)))
    return (sums[width:] - sums[:-width]) / width


def lowest_group(confidences: ArrayLike, width: int = GROUP_TOKENS) -> float:
    """The least confident group of DeepConf; NaN if every token is missing."""
    return float(group_means(confidences, width).min(initial=math.inf)) if len(present(confidences)) else math.nan


def bottom_groups(confidences: ArrayLike, width: int = GROUP_TOKENS, share: float = 0.1) -> float:
    """Mean of the least confident ``share`` of DeepConf's groups, at least one; NaN if every token is missing."""
    groups = group_means(confidences, width)
    if not len(groups):
        return math.nan
    kept = max(1, int(len(groups) * share))
    return float(np.partition(groups, kept - 1)[:kept].mean())


def groups_odds(share: float = 0.0, width: int = GROUP_TOKENS) -> Callable[[Sequence[TokenSignals], float], Chance]:
    """What a margin of ``lowest_group``, or of ``bottom_groups`` with a ``share``, amounts to.

    More groups have a lower lowest one, so that a longer text has a lower mean without any signal.
    """

    def null(signals: TokenSignals) -> tuple[float, float]:
        numbers = present(signals.confidences)
        if len(numbers) <= width:
            return 0.0, standard_error(numbers)
        mean, sd = lowest_groups(round(8 * len(numbers) / width), share)
        of_one = float(numbers.std(ddof=1)) / math.sqrt(width)
        return mean * of_one, sd * of_one

    def odds(signals: Sequence[TokenSignals], margin: float) -> Chance:
        means, sds = np.array([null(one) for one in signals]).T
        return normal_chance(margin, sds, -means)

    return odds


def tail(values: ArrayLike, width: int = GROUP_TOKENS) -> Floats:
    """The last ``width`` values that are present, ``(≤ width,)``."""
    return present(values)[-width:]


def tail_mean(confidences: ArrayLike, width: int = GROUP_TOKENS) -> float:
    """Mean of the last ``width`` tokens that are present; NaN if none is."""
    return mean(tail(confidences, width))


def self_certainty(logprobs: ArrayLike) -> float:
    """How far the distributions of the tokens are from uniform, on average, over the whole vocabulary.

    Source:
        -(1/(T V)) Σ ln(V p), the mean Kullback-Leibler divergence of the uniform distribution from p; arXiv 2502.18581.

    Args:
        logprobs: ``(T, V)``, nats, one column for each word of the vocabulary; rows with NaN are left out.

    Returns:
        0 (uniform) to inf, nats, high = certain; NaN if no row is left.

    Raises:
        ConfigError: The array is not two-dimensional.
    """
    rows = np.asarray(logprobs, dtype=np.float64)
    if rows.ndim != 2:
        raise ConfigError(f"log-probabilities of shape (T, V) are needed; found shape {rows.shape}")
    return mean(-math.log(max(rows.shape[1], 1)) - rows.mean(axis=1)) if rows.size else math.nan


def mean_entropy(signals: TokenSignals) -> float:
    """Mean token entropy, nats; NaN where nothing was measured."""
    return mean(signals.entropies) if measured(signals) else math.nan


def max_entropy(signals: TokenSignals) -> float:
    """Highest token entropy, nats; NaN where nothing was measured."""
    return float(np.nanmax(signals.entropies)) if measured(signals) else math.nan


def top_k_certainty(signals: TokenSignals) -> float:
    """Self-Certainty over the K alternatives; exact if K is the whole vocabulary, nats."""
    return mean(signals.confidences) - math.log(max(signals.n_alternatives, 1))


def max_entropy_odds(signals: Sequence[TokenSignals], margin: float) -> Chance:
    """What a margin between the lowest two maxima of the entropy amounts to, by chance."""
    tokens = [present(one.entropies) for one in signals]
    return maximum_chance(margin, tokens) if all(map(len, tokens)) else UNKNOWN


def mean_logprob(signals: TokenSignals) -> float:
    """Mean log-probability of the drawn tokens, nats; exp of its negative is the perplexity.

    NaN where every one is 0: a server that reports the distribution after temperature 0 has measured nothing.
    """
    return mean(signals.logprobs) if (signals.logprobs < 0).any() else math.nan


def sum_logprob(signals: TokenSignals) -> float:
    """Log-probability of the whole response, nats; NaN where a token is missing or nothing was measured."""
    return float(signals.logprobs.sum(dtype=np.float64)) if (signals.logprobs < 0).any() else math.nan


def sum_logprob_odds(signals: Sequence[TokenSignals], margin: float) -> Chance:
    """What a margin between the highest two sums of log-probabilities amounts to, with these lengths.

    Tokens without signal are draws from those of all candidates, so that a short text leads by its length alone.
    """
    tokens = np.concatenate([present(one.logprobs) for one in signals])
    lengths = np.array([one.n_tokens for one in signals])
    return normal_chance(margin, tokens.std() * np.sqrt(lengths), -tokens.mean() * lengths)


def median_error(values: ArrayLike) -> float:
    """Standard deviation of the median if the tokens were independent draws; NaN for fewer than two.

    Source:
        Half the distance of the order statistics that lie one standard deviation, √T/2 ranks, from the median;
        McKean & Schrader, Communications in Statistics B13 (1984) 751-773.
    """
    numbers = np.sort(present(values))
    if len(numbers) < 2:
        return math.nan
    ranks = (len(numbers) - 1) / 2 + np.array((-0.5, 0.5)) * math.sqrt(len(numbers))
    return float(np.diff(np.interp(ranks, np.arange(len(numbers)), numbers))[0]) / 2


class TailEntropyScorer:
    """The median entropy of the last tokens, in a window as wide for all candidates of a step as their entropy asks.

    From 16 candidates on, the shortest and longest ``trim`` of them are left unscored.

    Args:
        aggregate: What is taken over the window.
        narrowest: Least width of the window, tokens.
        widest: Greatest width, tokens.
        trim: Share left out at each end of the lengths.

    Raises:
        ConfigError: An argument is out of range.

    Source:
        ``ConfidenceSelection`` of its_hub (main branch, pull request 274): width = √(mean length) / (mean entropy
        of the last ``widest`` tokens), between ``narrowest`` and ``widest``.
    """

    name = "tail-entropy"
    best: Best = "lowest"
    CROWD = 16
    """From so many candidates on, lengths are trimmed."""

    def __init__(
        self,
        aggregate: Literal["median", "mean"] = "median",
        *,
        narrowest: int = 64,
        widest: int = 2048,
        trim: float = 0.05,
    ) -> None:
        if aggregate not in {"median", "mean"}:
            raise ConfigError(f"aggregate must be 'median' or 'mean'; found {aggregate!r}")
        if not 1 <= narrowest <= widest:
            raise ConfigError(f"1 ≤ narrowest ≤ widest is needed; found {narrowest} and {widest}")
        if not 0 <= trim < 0.5:
            raise ConfigError(f"trim must be from 0 to below 0.5; found {trim}")
        self._aggregate: Callable[[Floats], float] = np.median if aggregate == "median" else np.mean
        self._error = median_error if aggregate == "median" else standard_error
        self._bounds = (narrowest, widest)
        self._trim = trim

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """Tail entropy of each candidate, ``(N,)``, nats; NaN without signals, or trimmed."""
        return self.scores(self._entropies(candidates))

    def scores(self, entropies: Sequence[ArrayLike]) -> Scores:
        """Tail entropy of each sequence of token entropies, ``(N,)``, nats; NaN for an empty or trimmed one."""
        return self._of_tails(self._aggregate, entropies)

    def noise(self, candidates: Sequence[Candidate]) -> Scores:
        """Standard deviation of each score if the tokens were independent draws, ``(N,)``; NaN as for the scores."""
        return self._of_tails(self._error, self._entropies(candidates))

    def _of_tails(self, measure: Callable[[Floats], float], entropies: Sequence[ArrayLike]) -> Scores:
        tokens = [present(values) for values in entropies]
        kept = self._kept(np.array([len(values) for values in tokens]))
        result = np.full(len(tokens), np.nan)
        if len(kept):
            usable = [tokens[i] for i in map(int, kept)]
            width = self.width(usable)
            result[kept] = [measure(values[-width:]) for values in usable]
        return result

    def _entropies(self, candidates: Sequence[Candidate]) -> list[ArrayLike]:
        found = (candidate.signals for candidate in candidates)
        return [() if signals is None or not measured(signals) else signals.entropies for signals in found]

    def width(self, tokens: Sequence[Floats]) -> int:
        """Width of the window for these candidates, tokens."""
        narrowest, widest = self._bounds
        mean_length = sum(map(len, tokens)) / len(tokens)
        mean_tail = sum(float(values[-widest:].mean()) for values in tokens) / len(tokens)
        wanted = math.sqrt(mean_length) / max(mean_tail, 1e-6)
        return int(np.clip(wanted, narrowest, widest)) if wanted == wanted else narrowest  # noqa: PLR0124 - NaN

    def _kept(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the candidates to score."""
        usable = np.flatnonzero(lengths)
        if len(usable) < self.CROWD:
            return usable
        low, high = np.percentile(lengths[usable], (100 * self._trim, 100 * (1 - self._trim)))
        return usable[(lengths[usable] >= low) & (lengths[usable] <= high)]


class FirstScorer:
    """The baseline that takes the first candidate; needs no signals."""

    name = "first"
    best: Best = "lowest"

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """Index of each candidate, ``(N,)``."""
        return np.array([candidate.index for candidate in candidates], dtype=np.float64)

    def chance(self, candidates: Sequence[Candidate], margin: float) -> Chance:
        """The lead of the first is there whatever the candidates are."""
        return margin / (float(self(candidates).std()) or math.nan), 1.0


class RandomScorer:
    """The baseline that takes any candidate; needs no signals.

    Args:
        seed: The same seed gives the same sequence of choices; None gives a fresh one.
    """

    name = "random"
    best: Best = "lowest"

    def __init__(self, seed: int | None = None) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """A uniform number for each candidate, ``(N,)``."""
        return self._rng.random(len(candidates))

    def chance(self, candidates: Sequence[Candidate], margin: float) -> Chance:
        """How often the lowest two of N uniform numbers are so far apart."""
        return margin * math.sqrt(12), (1 - margin) ** len(candidates)
