"""The pilot: from an evaluation to a recommendation, and the comparison of two evaluations on their shared tasks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ec_agents.errors import ConfigError
from ec_agents.evaluation.settings import ALWAYS
from ec_agents.evaluation.stats import holm, paired_p
from ec_agents.evaluation.table import Difference, Evaluation, Row

Floats = NDArray[np.float64]

SINGLE = "avg@1"
"""The row of N = 1."""
MOST_OF_IT = 0.9
"""Share of the gain that the recommended N keeps."""
_POWER = 0.84  # normal quantile of a power of 80 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What a pilot found."""

    helps: bool
    """Whether a selector is better than N = 1, corrected for the number of selectors."""
    selector: str
    """The selector to use; ``first`` if none helps."""
    n: int
    """The fewest candidates that keep nine tenths of the gain; 1 if none helps."""
    gain: Difference
    """The best selector minus N = 1; interval and p-value are corrected for all selectors, and agree."""
    sentences: tuple[str, ...]
    """Five sentences."""


def simultaneous(
    differences: Floats, rng: np.random.Generator, *, level: float = 0.95, resamples: int = 4999
) -> tuple[list[Difference], float]:
    """Intervals and two-sided p-values of paired differences, corrected for all of them, and the critical value.

    An interval excludes 0 where its p-value is below 1 - level: both come from the largest of all statistics under
    random signs of the tasks.

    Args:
        differences: ``(T, M)``: a row per task, a column per comparison.
        rng: Random generator of the signs.
        level: Coverage of all intervals together.
        resamples: Random sign patterns.

    Source:
        Single-step max-T: Westfall & Young, Resampling-Based Multiple Testing, 1993.
    """
    size = np.sqrt((differences**2).sum(axis=0))
    unit = np.divide(differences, size, out=np.zeros_like(differences), where=size > 0)
    signs = rng.choice((-1.0, 1.0), size=(resamples, len(differences)))
    largest = np.sort(np.abs(signs @ unit).max(axis=1))
    critical = float(largest[min(resamples - 1, math.ceil(level * (resamples + 1)) - 1)])
    found: list[Difference] = []
    for i, statistic in enumerate(np.abs(unit.sum(axis=0)).tolist()):
        p = (1 + int((largest >= statistic - 1e-9).sum())) / (resamples + 1)
        mean, half = float(differences[:, i].mean()), critical * float(size[i]) / len(differences)
        found.append(Difference(value=mean, low=mean - half, high=mean + half, p=p, p_holm=p))
    return found, critical


def recommend(
    evaluation: Evaluation, *, seconds: Mapping[int, float] | None = None, prices: tuple[float, float] | None = None
) -> Recommendation:
    """Say whether selection pays, which selector and N to use, what it costs, and what would decide it.

    Args:
        evaluation: A table of one-step tasks.
        seconds: N → seconds per step.
        prices: Price per million input and output tokens, if the table has costs.

    Raises:
        ConfigError: The evaluation has no row of single calls, as that of whole runs.
    """
    single = evaluation.row(SINGLE)
    rows = [row for row in evaluation.rows if row.selector not in {*ALWAYS, "first"} and row.curve]
    if not rows:
        raise ConfigError("a recommendation needs selectors on one-step tasks; found none")
    differences = np.array([row.by_task for row in rows]).T - np.array(single.by_task)[:, None]
    gains, critical = simultaneous(differences, np.random.default_rng(evaluation.seed), level=evaluation.level)
    order = sorted(range(len(rows)), key=lambda i: -gains[i].value)
    sure = [i for i in order if gains[i].low > 0]
    best = (sure or order)[0]
    row, gain, helps = rows[best], gains[best], bool(sure)
    n = _fewest(row, single.accuracy.value) if helps else 1
    if helps:
        verdict = f"Use it: {row.selector} is better than N = 1 by {_points(gain)}"
    else:
        told = f"as far as {evaluation.n_tasks} tasks tell; the best selector gains {_points(gain)}"
        verdict = f"Do not use it: N = 1 is as good, {told}"
    sentences = (
        f"{verdict}, paired by task and corrected for {len(rows)} selectors.",
        f"Selector: {row.selector}, right in {100 * row.accuracy.value:.1f} %." if helps else "Selector: none needed.",
        f"Candidates: N = {n}, the fewest that keep {MOST_OF_IT:.0%} of the gain of {evaluation.n_candidates}."
        if helps
        else "Candidates: N = 1.",
        _cost(evaluation, row if helps else single, n, seconds or {}, prices),
        _next(differences[:, best], gain, critical, helps=helps),
    )
    return Recommendation(helps=helps, selector=row.selector if helps else "first", n=n, gain=gain, sentences=sentences)


def _points(gain: Difference) -> str:
    return f"{100 * gain.value:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def _fewest(row: Row, single: float) -> int:
    last = max(row.curve)
    enough = single + MOST_OF_IT * (row.curve[last].value - single)
    return next(n for n in sorted(row.curve) if row.curve[n].value >= enough or n == last)


def _cost(
    evaluation: Evaluation,
    row: Row,
    n: int,
    seconds: Mapping[int, float],
    prices: tuple[float, float] | None,
) -> str:
    """Tokens, money and seconds of a thousand steps, beside those of N = 1 and of a majority of all candidates."""
    single, total = evaluation.row(SINGLE), evaluation.n_candidates
    majority = evaluation.row("majority")

    def per_thousand(name: str, right: float, calls: int) -> str:
        parts = [] if single.tokens is None else [f"{1000 * calls * single.tokens:,.0f} tokens"]
        if prices is not None and single.cost_per_solved is not None:
            parts.append(f"{1000 * calls * single.cost_per_solved * single.accuracy.value:.2f} in money")
        if calls in seconds:
            parts.append(f"{1000 * seconds[calls]:,.0f} seconds")
        return f"{name} {', '.join(parts) or 'an unknown amount'} for {1000 * right:.0f} right"

    said = [per_thousand(f"N = {n}", (row.curve[n] if row.curve else row.accuracy).value, n)]
    if n > 1:
        said.append(per_thousand("N = 1", single.accuracy.value, 1))
    said.append(per_thousand(f"a majority of {total}", majority.accuracy.value, total))
    return f"Cost of a thousand steps: {'; '.join(said)}."


def _next(differences: Floats, gain: Difference, critical: float, *, helps: bool) -> str:
    if helps:
        return "Next: use it, and repeat the pilot when the model, its settings or the tasks change."
    if gain.value <= 0:
        return "Next: nothing; no selector gained anything, so more tasks of this kind are unlikely to help."
    needed = math.ceil(((critical + _POWER) * float(differences.std()) / gain.value) ** 2)
    if needed <= len(differences):
        return "Next: nothing; a gain of this size is smaller than what the correction for many selectors allows."
    return (
        f"Next: if the gain is really {100 * gain.value:+.1f} points, about {needed - len(differences)} more tasks "
        "would show it four times out of five."
    )


def compare(a: Evaluation, b: Evaluation) -> dict[str, Difference]:
    """Differences of the rows of two evaluations, b minus a, paired on the tasks that both have.

    Raises:
        ConfigError: They share no task or no row.
    """
    places = {name: i for i, name in enumerate(a.tasks)}
    shared = [(places[name], j) for j, name in enumerate(b.tasks) if name in places]
    rows = {row.selector: row for row in a.rows}
    both = [(rows[row.selector], row) for row in b.rows if row.selector in rows]
    if not shared or not both:
        raise ConfigError(f"nothing to compare: {len(shared)} shared tasks and {len(both)} shared selectors found")
    first, second = (list(part) for part in zip(*shared, strict=True))
    rng, found = np.random.default_rng(0), dict[str, Difference]()
    for one, other in both:
        differences = np.array(other.by_task)[second] - np.array(one.by_task)[first]
        found[other.selector] = _paired(differences, rng)
    corrected = holm([difference.p for difference in found.values()])
    return {name: _with(found[name], p) for name, p in zip(found, corrected, strict=True)}


def _paired(differences: Floats, rng: np.random.Generator) -> Difference:
    drawn = rng.integers(len(differences), size=(2000, len(differences)))
    low, high = np.quantile(differences[drawn].mean(axis=1), (0.025, 0.975)).tolist()
    return Difference(value=float(differences.mean()), low=low, high=high, p=paired_p(differences, rng))


def _with(one: Difference, p: float) -> Difference:
    return Difference(value=one.value, low=one.low, high=one.high, p=one.p, p_holm=p)


def step_seconds(calls: Sequence[Sequence[float]], n: int) -> dict[int, float]:
    """N → mean seconds of the slowest of N concurrent calls, from the seconds of the calls of each step."""
    found: dict[int, float] = {}
    for size in range(1, n + 1):
        expected = [
            sum(math.comb(i, size - 1) * s for i, s in enumerate(sorted(step))) / math.comb(len(step), size)
            for step in calls
            if len(step) >= size
        ]
        if expected:
            found[size] = float(np.mean(expected))
    return found
