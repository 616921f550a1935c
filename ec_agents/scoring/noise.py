"""How large a margin is by chance alone."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

Chance = tuple[float, float]
"""A margin in standard deviations of a score without signal, and how often candidates without signal have such a one.

NaN where that is unknown.
"""

UNKNOWN: Chance = (math.nan, math.nan)

_REACH = 8.0
"""Beyond so many standard deviations nothing is left of a normal distribution."""
_POINTS_PER_SD = 4
_MOST_POINTS = 4000
_BALLOTS = 4000
"""Votes at random that a lead is compared with."""
_WALKS = 2000
_STEPS_PER_GROUP = 64


def normal_chance(margin: float, deviations: ArrayLike, means: ArrayLike = 0.0) -> Chance:
    """What a margin amounts to where scores without signal are normal.

    Args:
        margin: Distance between the best two scores, 0 or more.
        deviations: ``(N,)``: standard deviation of each score without signal, that of the best two first.
        means: ``(N,)`` or one for all: mean of each score without signal, turned so that the lowest is best.
    """
    sds = np.asarray(deviations, dtype=np.float64)
    if len(sds) < 2 or not (np.isfinite(sds) & (sds > 0)).all():
        return UNKNOWN
    return margin / math.sqrt(float((sds[:2] ** 2).mean())), chance_of_margin(margin, sds, means)


def chance_of_margin(margin: float, deviations: ArrayLike, means: ArrayLike = 0.0) -> float:
    """How often the lowest of N scores that carry no signal leads the second by ``margin`` or more.

    Source:
        Σ_i ∫ f_i(x) Π_{j≠i} P(X_j > x + margin) dx for independent normal X_i, by the trapezoidal rule.

    Args:
        margin: Distance between the best two scores, 0 or more.
        deviations: ``(N,)``: standard deviation of each score without any signal, all above 0.
        means: ``(N,)`` or one for all: mean of each score without any signal.

    Returns:
        0 to 1; 1 for a single score, which leads whatever it is.
    """
    sds = np.asarray(deviations, dtype=np.float64)
    if len(sds) < 2 or margin <= 0:
        return 1.0
    middles = np.broadcast_to(np.asarray(means, dtype=np.float64), sds.shape)[:, None]
    low, high = float(middles.min() - _REACH * sds.max()), float(middles.max() + _REACH * sds.max())
    x = np.linspace(low, high, min(_MOST_POINTS, math.ceil(_POINTS_PER_SD * (high - low) / float(sds.min()))))
    z = (x - middles) / sds[:, None]
    density = np.exp(-0.5 * z**2) / (sds[:, None] * math.sqrt(2 * math.pi))
    above = np.log(np.maximum(_upper_tail(z + margin / sds[:, None]), 1e-300))
    others = np.exp(above.sum(axis=0) - above)
    return min(1.0, float((density * others).sum() * (x[1] - x[0])))


def maximum_chance(margin: float, tokens: Sequence[Floats]) -> Chance:
    """What a margin between the lowest two of N maxima amounts to, if all tokens come from one distribution.

    Source:
        P(max of T draws ≤ x) = F(x)^T, with F the distribution of all tokens of all candidates together.

    Args:
        margin: Distance between the lowest two maxima, 0 or more.
        tokens: Values of each candidate, none empty, those with the lowest two maxima first.
    """
    values = np.sort(np.concatenate(tokens))
    counts = np.array([len(numbers) for numbers in tokens])[:, None]
    mass = np.diff((np.arange(len(values) + 1) / len(values)) ** counts, axis=1)
    means = mass @ values
    sds = np.sqrt(np.maximum(mass @ values**2 - means**2, 0.0))[:2]
    if len(tokens) < 2 or not sds.all():
        return UNKNOWN
    if margin <= 0:
        return 0.0, 1.0
    below = np.searchsorted(values, values + margin * (1 - 1e-9)) / len(values)
    above = np.log(np.maximum(1 - below**counts, 1e-300))
    others = np.exp(above.sum(axis=0) - above)
    return margin / math.sqrt(float((sds**2).mean())), min(1.0, float((mass * others).sum()))


def vote_chance(margin: float, weights: ArrayLike, n_actions: int) -> Chance:
    """What a lead amounts to, if every voter had taken each of the actions with equal chance.

    Args:
        margin: Lead of the winning action over the strongest other one, 0 or more.
        weights: ``(V,)``: weight of each vote.
        n_actions: How many actions there are.
    """
    votes, share = np.asarray(weights, dtype=np.float64), 1 / n_actions
    sd = math.sqrt(float((votes**2).sum()) * share * (1 - share))
    if n_actions < 2 or sd == 0:
        return UNKNOWN
    totals = np.stack([(_ballots(len(votes), n_actions) == action) @ votes for action in range(n_actions)])
    second, first = np.partition(totals, n_actions - 2, axis=0)[-2:]
    return margin / sd, (1 + int((first - second >= margin - 1e-9).sum())) / (1 + _BALLOTS)


@cache
def lowest_groups(n_eighths: int, share: float) -> tuple[float, float]:
    """Mean and standard deviation of the mean over the lowest ``share`` of all groups of a long text, at least one.

    Args:
        n_eighths: Length of the text in eighths of a group, above 8.
        share: 0..1.

    Returns:
        Both in standard deviations of one group, for tokens that are independent draws around 0.

    Source:
        Increments of a random walk over one group, at 64 places a group; from 2,000 walks.
    """
    steps = np.random.default_rng(0).standard_normal((_WALKS, _STEPS_PER_GROUP * n_eighths // 8))
    walks = np.pad(steps.cumsum(axis=1), ((0, 0), (1, 0))) / math.sqrt(_STEPS_PER_GROUP)
    groups = walks[:, _STEPS_PER_GROUP:] - walks[:, :-_STEPS_PER_GROUP]
    kept = max(1, int(groups.shape[1] * share))
    lowest = np.partition(groups, kept - 1, axis=1)[:, :kept].mean(axis=1)
    return float(lowest.mean()), float(lowest.std())


@cache
def _ballots(n_voters: int, n_actions: int) -> NDArray[np.uint16]:
    """An action for each voter of each of many votes at random."""
    return np.random.default_rng(0).integers(n_actions, size=(_BALLOTS, n_voters), dtype=np.uint16)


def _upper_tail(z: Floats) -> Floats:
    """P(Z > z) of a standard normal variable."""
    grid, values = _table()
    return np.interp(z, grid, values)


@cache
def _table() -> tuple[Floats, Floats]:
    grid = np.linspace(-9.0, 9.0, 4501)
    return grid, np.array([0.5 * math.erfc(z / math.sqrt(2)) for z in grid.tolist()])
