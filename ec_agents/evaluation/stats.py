"""Intervals and tests that treat the runs of one task as dependent."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ec_agents.errors import ConfigError

Floats = NDArray[np.float64]

_EXACT_UP_TO = 2**13
"""Most sign patterns that a paired test enumerates; beyond that it samples them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""


def scipy_stats() -> Any:
    """Import ``scipy.stats``, which ships no types.

    Raises:
        ImportError: The extra ``eval`` is not installed.
    """
    try:
        from scipy import stats  # noqa: PLC0415 - an optional extra; reports of saved evaluations do without it
    except ImportError as error:
        raise ImportError(f"evaluations need the extra 'eval' ({error}): pip install 'ec-agents[eval]'") from error
    return stats


class Resampling:
    """Bootstrap over whole tasks: one set of resamples for every statistic, so that differences stay paired.

    Args:
        tasks: ``(G,)``: the task that each value belongs to.
        rng: Random generator.
        resamples: Number of bootstrap resamples.
        level: Coverage of the intervals.

    Raises:
        ConfigError: There is no value to resample, or a number is out of range.

    Source:
        Percentile bootstrap with clusters: Davison & Hinkley, Bootstrap Methods and their Application, 3.8.
    """

    def __init__(
        self, tasks: Sequence[str], rng: np.random.Generator, *, resamples: int = 2000, level: float = 0.95
    ) -> None:
        if not tasks:
            raise ConfigError("nothing to evaluate: no graded step or run was found")
        if resamples < 1 or not 0 < level < 1:
            raise ConfigError(f"resamples ≥ 1 and 0 < level < 1 are needed; found {resamples} and {level}")
        self.names, self.cluster = np.unique(np.asarray(tasks), return_inverse=True)
        count = len(self.names)
        self._weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
        self._level = level

    def mean(self, values: ArrayLike) -> Estimate | None:
        """Mean of ``(G,)`` values, ignoring NaN; None if no value remains."""
        array = np.asarray(values, dtype=np.float64)
        known = np.isfinite(array)
        return self._ratio(self._total(np.where(known, array, 0.0)), self._total(known))

    def share(self, outcomes: ArrayLike) -> Estimate | None:
        """Mean of ``(G,)`` outcomes in 0..1, with an exact interval over tasks if all are 0 or all are 1.

        The bootstrap interval of equal outcomes has zero width, although a handful of them proves little.
        """
        return self._exact_if_equal(self.mean(outcomes), outcomes, self.cluster)

    def share_of_tasks(self, values: ArrayLike) -> Estimate | None:
        """Like ``share``, with one value per task in the order of ``names``."""
        array = np.asarray(values, dtype=np.float64)
        known = np.isfinite(array)
        estimate = self._ratio(np.where(known, array, 0.0), known.astype(np.float64))
        return self._exact_if_equal(estimate, array, np.arange(len(array)))

    def per_task(self, values: ArrayLike) -> Floats:
        """Mean of each task's values, in the order of ``names``."""
        return self._total(np.asarray(values, dtype=np.float64)) / self._total(np.ones(len(self.cluster)))

    def _exact_if_equal(
        self, found: Estimate | None, outcomes: ArrayLike, cluster: NDArray[np.int64]
    ) -> Estimate | None:
        if found is None or found.value not in {0.0, 1.0}:
            return found
        count = len(np.unique(cluster[np.isfinite(np.asarray(outcomes, dtype=np.float64))]))
        ends = scipy_stats().binomtest(int(found.value) * count, count).proportion_ci(self._level, "exact")
        return Estimate(value=found.value, low=float(ends.low), high=float(ends.high))

    def _total(self, values: ArrayLike) -> Floats:
        totals = np.bincount(self.cluster, weights=np.asarray(values, dtype=np.float64), minlength=len(self.names))
        return totals.astype(np.float64)

    def _ratio(self, sums: Floats, counts: Floats) -> Estimate | None:
        if not counts.sum():
            return None
        value = float(sums.sum() / counts.sum())
        drawn = self._weights @ counts
        means = (self._weights @ sums)[drawn > 0] / drawn[drawn > 0]
        low, high = np.quantile(means, [(1 - self._level) / 2, (1 + self._level) / 2]).tolist()
        return Estimate(value=value, low=min(low, value), high=max(high, value))


def auroc(scores: ArrayLike, right: ArrayLike) -> float:
    """Share of pairs in which a right candidate scores above a wrong one, ties half; NaN without such a pair.

    Args:
        scores: ``(N,)``, high = better; NaN is ignored.
        right: ``(N,)`` bool.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool)
    values, labels = values[np.isfinite(values)], labels[np.isfinite(values)]
    right_ones, wrong_ones = values[labels], np.sort(values[~labels])
    if not len(right_ones) or not len(wrong_ones):
        return math.nan
    below = np.searchsorted(wrong_ones, right_ones, "left") + np.searchsorted(wrong_ones, right_ones, "right")
    return float(below.sum()) / (2 * len(right_ones) * len(wrong_ones))


def paired_p(differences: ArrayLike, rng: np.random.Generator, *, resamples: int = 9999) -> float:
    """Two-sided p-value of paired differences, one per task, under random signs.

    Exact if all differences have the same size (the sign test, McNemar's exact test) or at most 13 tasks differ;
    otherwise estimated from ``resamples`` random sign patterns and the observed one.

    Source:
        Sign-flip permutation test; Phipson & Smyth, 2010, for the count.
    """
    array = np.asarray(differences, dtype=np.float64)
    moved = array[np.abs(array) > 1e-12]
    if not len(moved):
        return 1.0
    if np.ptp(np.abs(moved)) < 1e-12:
        return float(scipy_stats().binomtest(int((moved > 0).sum()), len(moved)).pvalue)
    exact = 2 ** len(moved) <= _EXACT_UP_TO if len(moved) < 60 else False
    signs = _all_signs(len(moved)) if exact else rng.choice((-1.0, 1.0), size=(resamples, len(moved)))
    extreme = int((np.abs(signs @ moved) >= abs(float(moved.sum())) - 1e-9).sum())
    return extreme / len(signs) if exact else (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, so that the chance of any false alarm stays below the level.

    Source:
        S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        highest = max(highest, min(1.0, p_values[position] * (len(p_values) - rank)))
        corrected[position] = highest
    return corrected


def all_right(chances: Sequence[float], k: int) -> float:
    """pass^k of one task: chance that k of its trials, taken without replacement, are all right; NaN with fewer.

    Args:
        chances: Chance of each trial to be right; 0 or 1 where it is known.
        k: Number of trials.

    Source:
        C(c, k) / C(t, k) for c right ones of t (tau-bench, arXiv 2406.12045); here the mean over all k-subsets of the
        product of the chances.
    """
    if len(chances) < k:
        return math.nan
    sums = [1.0] + [0.0] * k
    for chance in chances:
        for size in range(k, 0, -1):
            sums[size] += sums[size - 1] * chance
    return sums[k] / math.comb(len(chances), k)


def best_of_subset(ranked: Sequence[float], n: int) -> float:
    """Exact expected outcome of the best-ranked of n candidates taken without replacement.

    Args:
        ranked: ``(N,)`` outcomes, best rank first.
        n: 1 to N.

    Source:
        The r-th of N (from 0) is the best of n with chance C(N - 1 - r, n - 1) / C(N, n).
    """
    total = len(ranked)
    ways = sum(math.comb(total - 1 - rank, n - 1) * outcome for rank, outcome in enumerate(ranked) if outcome)
    return ways / math.comb(total, n)


def folds_of(tasks: Sequence[str], rng: np.random.Generator, folds: int) -> NDArray[np.int64]:
    """The fold of each value, ``(G,)``; a task lies in one fold only."""
    names, cluster = np.unique(np.asarray(tasks), return_inverse=True)
    return rng.permutation(np.arange(len(names)) % folds)[cluster]


def cross_fit(
    outcomes: Mapping[str, Floats], tasks: Sequence[str], rng: np.random.Generator, *, folds: int = 5
) -> tuple[Floats, list[str]]:
    """For each fold, take the outcomes of the setting that is best on all *other* folds.

    Args:
        outcomes: Setting → ``(G,)`` outcomes.
        tasks: ``(G,)``: the task of each outcome; a task lies in one fold only.
        rng: Random generator that assigns tasks to folds.
        folds: Number of folds.

    Returns:
        ``(G,)`` outcomes, and the setting that was chosen for each fold.

    Raises:
        ConfigError: No setting is given, or there are fewer tasks than folds.
    """
    n_tasks = len(set(tasks))
    if not outcomes or not 2 <= folds <= n_tasks:
        raise ConfigError(
            f"tuning needs settings, and at least as many tasks as folds (2 or more); found {len(outcomes)} settings, "
            f"{n_tasks} tasks and {folds} folds"
        )
    fold = folds_of(tasks, rng, folds)
    settings = list(outcomes)
    table = np.stack([outcomes[name] for name in settings])
    result, picks = np.empty(table.shape[1]), list[str]()
    for k in range(folds):
        best = int(table[:, fold != k].mean(axis=1).argmax())
        result[fold == k] = table[best, fold == k]
        picks.append(settings[best])
    return result, picks


def brier(margins: ArrayLike, right: ArrayLike, fold: NDArray[np.int64]) -> tuple[float, float] | None:
    """Mean squared error of the chance that the margin gives a choice, and that of the share of right choices.

    The chance is the share of right choices at margins of the same fifth, counted on the other folds, with one right
    and one wrong choice added. Lower is better; a margin that tells nothing does not fall below the second number.

    Args:
        margins: ``(G,)``; NaN is ignored.
        right: ``(G,)`` outcomes, 0..1.
        fold: ``(G,)``.
    """
    x, y = np.asarray(margins, dtype=np.float64), np.asarray(right, dtype=np.float64)
    known = np.isfinite(x)
    x, y, fold = x[known], y[known], fold[known]
    if len(np.unique(fold)) < 2:
        return None
    chance, base = np.empty(len(x)), np.empty(len(x))
    for k in np.unique(fold).tolist():
        other, here = fold != k, fold == k
        edges = np.quantile(x[other], (0.2, 0.4, 0.6, 0.8))
        bins = np.searchsorted(edges, x, "right")
        hits = np.bincount(bins[other], weights=y[other], minlength=5) + 1
        chance[here] = (hits / (np.bincount(bins[other], minlength=5) + 2))[bins[here]]
        base[here] = (y[other].sum() + 1) / (other.sum() + 2)
    return float(np.mean((chance - y) ** 2)), float(np.mean((base - y) ** 2))


def _all_signs(count: int) -> Floats:
    return np.array(list(product((-1.0, 1.0), repeat=count)))
