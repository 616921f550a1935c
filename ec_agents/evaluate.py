"""Stage 8 - evaluate: graded traces, replayed under every selector → a table with intervals and paired tests."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ec_agents.errors import ConfigError
from ec_agents.outcomes import Graded, RunOutcome
from ec_agents.replay import Policy, Replay, SelectorPolicy, curve_points, one_call, oracle, random_sound
from ec_agents.results import Difference, Distribution, Evaluation, MarginBin, Row
from ec_agents.scoring import FirstScorer, MajorityVote
from ec_agents.selection import Selector
from ec_agents.stats import Estimate, Resampling, all_right, auroc, cross_fit, holm, paired_p

Floats = NDArray[np.float64]

BASELINES = ("first", "random", "majority")
"""What every selector is compared with."""
ALWAYS = ("avg@1", "random", "oracle")
"""Rows of every table that are computed exactly and belong to no selector."""
_BINS = 20
_MARGIN_BINS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A setting chosen by cross-fitting: on every fold the one that was best on the others."""

    accuracy: float
    """On tasks that the setting was not chosen on."""
    picks: Sequence[str]
    """Which setting was chosen for each fold."""
    right: Floats
    """Outcome of each graded step."""


class _Column:
    """The replays of one way of choosing over all steps, as arrays."""

    def __init__(self, name: str, replays: Sequence[Replay], note: str = "") -> None:
        self.name = name
        self.note = note
        self.replays = replays
        self.right = np.array([replay.right for replay in replays])
        self.tokens = np.array([replay.tokens for replay in replays]).reshape(-1, 2).sum(axis=0)

    def of(self, measure: Callable[[Replay], float]) -> Floats:
        return np.array([measure(replay) for replay in self.replays])


def evaluate(
    graded: Iterable[Graded],
    selectors: Mapping[str, Selector],
    *,
    tuned: Mapping[str, Mapping[str, Selector]] | None = None,
    prices: tuple[float, float] | None = None,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    subsets: int = 2,
    folds: int = 5,
) -> Evaluation:
    """Replay every selector on the same candidates, and say how sure the numbers are.

    ``avg@1``, ``first``, ``random``, ``majority`` and ``oracle`` are always in the table. Steps are gone through once,
    so that a trace may be larger than memory.

    Args:
        graded: Steps with their outcomes.
        selectors: Name → selector.
        tuned: Name → settings (name → selector) of which the best is found by cross-fitting.
        prices: Of a million input and a million output tokens.
        seed: For resampling and subsets; the same one gives the same table.
        resamples: Bootstrap draws, over whole tasks.
        level: Coverage of the intervals.
        subsets: Random subsets for each point of a curve whose scores depend on the other candidates.
        folds: For ``tuned``.

    Raises:
        ConfigError: There is no step, or a name stands for something else.
    """
    rng = np.random.default_rng(seed)
    policies = _policies(selectors, rng, subsets)
    grids = {name: _only_outcomes(settings, rng) for name, settings in (tuned or {}).items()}
    tasks, lengths, n_failed, points, columns, tried = _replay_all(graded, policies, grids)
    resampling = Resampling(tasks, rng, resamples=resamples, level=level)
    for name, settings in tried.items():
        right, picks = cross_fit(settings, tasks, rng, folds=folds)
        note = f"tuned by {folds}-fold cross-fitting, never on the tasks it is judged on; chosen: {', '.join(picks)}"
        columns.insert(-1, _Column(name, [_bare(value) for value in right.tolist()], note))
    table = _Table(columns, tasks, resampling, rng, points=points, lengths=lengths, prices=prices)
    return Evaluation(
        rows=_corrected([table.row(column) for column in columns]),
        n_tasks=len(resampling.names),
        n_draws=len(tasks),
        n_candidates=points[-1],
        n_failed=n_failed,
        lengths=_cuts(lengths),
        level=level,
        resamples=resamples,
        seed=seed,
    )


def tune(graded: Iterable[Graded], settings: Mapping[str, Selector], *, folds: int = 5, seed: int = 0) -> Tuned:
    """Choose one of several settings without looking at the labels it is judged on.

    Raises:
        ConfigError: There is no setting, or there are fewer tasks than folds.
    """
    rng = np.random.default_rng(seed)
    tasks, *_, tried = _replay_all(graded, {}, {"": _only_outcomes(settings, rng)})
    right, picks = cross_fit(tried[""], tasks, rng, folds=folds)
    return Tuned(accuracy=float(right.mean()), picks=picks, right=right)


def evaluate_runs(
    runs: Iterable[RunOutcome],
    *,
    prices: tuple[float, float] | None = None,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Evaluation:
    """Compare whole runs of an agent under several selectors, on the same tasks and trials.

    A run that is missing or ended in an infrastructure error counts as not right. The baselines ``first``, ``random``
    and ``majority`` are compared with where there are runs of that name.

    Raises:
        ConfigError: There is no run.
    """
    rng = np.random.default_rng(seed)
    by_arm: dict[str, dict[tuple[str, int], RunOutcome]] = defaultdict(dict)
    for run in runs:
        by_arm[run.selector][run.task, run.trial] = run
    keys = sorted({key for arm in by_arm.values() for key in arm})
    tasks = [task for task, _ in keys]
    resampling = Resampling(tasks, rng, resamples=resamples, level=level)
    order = sorted(by_arm, key=lambda name: name not in BASELINES)
    columns = [_Column(name, [_run_replay(by_arm[name].get(key)) for key in keys]) for name in order]
    table = _Table(columns, tasks, resampling, rng, prices=prices)
    known = sum(run.right is not None for arm in by_arm.values() for run in arm.values())
    return Evaluation(
        rows=_corrected([table.row(column) for column in columns]),
        n_tasks=len(resampling.names),
        n_draws=len(keys),
        n_candidates=0,
        n_failed=len(keys) * len(by_arm) - known,
        lengths=(),
        level=level,
        resamples=resamples,
        seed=seed,
    )


def _policies(selectors: Mapping[str, Selector], rng: np.random.Generator, subsets: int) -> dict[str, Policy]:
    taken = sorted(set(selectors) & set(ALWAYS))
    if taken:
        raise ConfigError(f"{', '.join(taken)}: always in the table; give your selectors other names")
    policy = partial(SelectorPolicy, rng=rng, subsets=subsets)
    majority = Selector(scorer=MajorityVote())
    return {
        "avg@1": one_call,
        "first": policy(selectors.get("first", Selector(scorer=FirstScorer())), calls="until_chosen"),
        "random": random_sound,
        "majority": policy(selectors.get("majority", majority)),
        **{name: policy(selector) for name, selector in selectors.items() if name not in BASELINES},
        "oracle": oracle,
    }


def _only_outcomes(settings: Mapping[str, Selector], rng: np.random.Generator) -> dict[str, Policy]:
    return {name: SelectorPolicy(selector, rng) for name, selector in settings.items()}


def _replay_all(
    graded: Iterable[Graded], policies: Mapping[str, Policy], grids: Mapping[str, Mapping[str, Policy]]
) -> tuple[list[str], Floats, int, tuple[int, ...], list[_Column], dict[str, dict[str, Floats]]]:
    """Every step under every policy: tasks, lengths, failed calls, points of the curve, columns, tuning outcomes."""
    tasks, lengths, n_failed, widest = list[str](), list[float](), 0, 1
    replays: dict[str, list[Replay]] = {name: [] for name in policies}
    tried: dict[str, dict[str, list[float]]] = {name: {s: [] for s in grid} for name, grid in grids.items()}
    with _quiet():
        for one in graded:
            points = curve_points(one.n_drawn)
            tasks.append(one.task)
            lengths.append(_length(one))
            n_failed += len(one.step.failures)
            widest = max(widest, one.n_drawn)
            for name, policy in policies.items():
                replays[name].append(policy(one, points))
            for name, grid in grids.items():
                for setting, policy in grid.items():
                    tried[name][setting].append(policy(one, ()).right)
    columns = [_Column(name, of_policy) for name, of_policy in replays.items()]
    outcomes = {name: {s: np.array(right) for s, right in grid.items()} for name, grid in tried.items()}
    return tasks, np.array(lengths), n_failed, curve_points(widest), columns, outcomes


@contextmanager
def _quiet() -> Generator[None]:
    """Silence the warning of each fallback: the table counts them."""
    log = logging.getLogger("ec_agents.selection")

    def below_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    log.addFilter(below_error)
    try:
        yield
    finally:
        log.removeFilter(below_error)


class _Table:
    """What all rows of a table share."""

    def __init__(
        self,
        columns: Sequence[_Column],
        tasks: Sequence[str],
        resampling: Resampling,
        rng: np.random.Generator,
        *,
        points: Sequence[int] = (),
        lengths: Floats | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        self._outcomes = {column.name: column.right for column in columns}
        self._tasks = tasks
        self._resampling = resampling
        self._rng = rng
        self._points = points
        self._thirds = [] if lengths is None else _thirds(lengths)
        self._prices = prices

    def row(self, column: _Column) -> Row:
        """Everything about one way of choosing."""
        mean, right = self._resampling.mean, column.right
        accuracy = self._resampling.share(right)
        if accuracy is None:
            raise AssertionError("outcomes are never NaN")
        return replace(
            Row(selector=column.name, accuracy=accuracy, pass_hat=self._pass_hat(right), note=column.note),
            regret=mean(self._outcomes["oracle"] - right) if "oracle" in self._outcomes else None,
            versus=self._versus(column),
            curve=_curve(column, self._points),
            by_length=tuple(self._resampling.share(np.where(part, right, np.nan)) for part in self._thirds),
            **_costs(column, self._prices),
            **self._score_quality(column),
        )

    def _versus(self, column: _Column) -> dict[str, Difference]:
        if column.name in {*ALWAYS, *BASELINES}:
            return {}
        found: dict[str, Difference] = {}
        for baseline in (name for name in BASELINES if name in self._outcomes):
            differences = column.right - self._outcomes[baseline]
            p = paired_p(self._resampling.per_task(differences), self._rng)
            if (mean := self._resampling.mean(differences)) is not None:
                found[baseline] = Difference(value=mean.value, low=mean.low, high=mean.high, p=p)
        return found

    def _pass_hat(self, right: Floats) -> dict[int, Estimate]:
        trials: dict[str, list[float]] = defaultdict(list)
        for task, outcome in zip(self._tasks, right.tolist(), strict=True):
            trials[task].append(outcome)
        of_tasks = [trials[name] for name in self._resampling.names.tolist()]
        estimates = {
            k: self._resampling.share_of_tasks([all_right(chances, k) for chances in of_tasks])
            for k in range(1, max(map(len, of_tasks)) + 1)
        }
        return {k: estimate for k, estimate in estimates.items() if estimate is not None}

    def _score_quality(self, column: _Column) -> dict[str, Any]:
        """What the scores themselves are worth; nothing where there are none."""
        scores = np.concatenate([replay.scores for replay in column.replays])
        if not len(scores):
            return {}
        labels = np.concatenate([replay.labels for replay in column.replays])
        margins = column.of(lambda replay: replay.margin)
        mean = self._resampling.mean
        return {
            "auroc_within": mean(column.of(lambda replay: replay.auroc)),
            "auroc": _known(auroc(scores, labels)),
            "margin_auroc": _known(auroc(margins, column.right > 0.5)),
            "margins": _margin_bins(margins, column.right, self._outcomes.get("random", column.right)),
            "unscored": float(np.isnan(scores).mean()),
            "flawed": sum(replay.n_flawed for replay in column.replays) / len(scores),
            "fallback": _value(mean(column.of(lambda replay: replay.is_fallback))),
            "agreement": _value(mean(column.of(lambda replay: replay.agrees))),
            "scores": _distribution(scores, labels),
        }


def _corrected(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with p-values corrected for all comparisons of the table."""
    places = [(i, name) for i, row in enumerate(rows) for name in row.versus]
    p_values = holm([rows[i].versus[name].p for i, name in places])
    corrected: dict[int, dict[str, Difference]] = defaultdict(dict)
    for (i, name), p in zip(places, p_values, strict=True):
        corrected[i][name] = replace(rows[i].versus[name], p_holm=p)
    return tuple(replace(row, versus=corrected.get(i, {})) for i, row in enumerate(rows))


def _curve(column: _Column, points: Sequence[int]) -> dict[int, float]:
    """Mean outcome at each n; a step with fewer candidates than n counts with all it has."""
    curves = [replay.curve for replay in column.replays if replay.curve]
    if len(curves) < len(column.replays):
        return {}
    return {n: float(np.mean([curve[min(i, len(curve) - 1)] for curve in curves])) for i, n in enumerate(points)}


def _costs(column: _Column, prices: tuple[float, float] | None) -> dict[str, Any]:
    spent, solved = float(column.tokens.sum()), float(column.right.sum())
    if not math.isfinite(spent):
        return {}
    cost = None if prices is None else float(column.tokens @ np.array(prices)) / 1e6
    return {
        "tokens": spent / len(column.right),
        "tokens_per_solved": spent / solved if solved else None,
        "cost_per_solved": cost / solved if cost is not None and solved else None,
    }


def _margin_bins(margins: Floats, right: Floats, random: Floats) -> tuple[MarginBin, ...]:
    """Equally many steps in each bin, from small margins to large ones."""
    order = np.argsort(margins, kind="stable")[: int(np.isfinite(margins).sum())]
    return tuple(
        MarginBin(
            margin=float(margins[part].mean()),
            right=float(right[part].mean()),
            random=float(random[part].mean()),
            count=len(part),
        )
        for part in np.array_split(order, _MARGIN_BINS)
        if len(part)
    )


def _distribution(scores: Floats, labels: NDArray[np.bool_]) -> Distribution | None:
    known = np.isfinite(scores)
    if not known.any():
        return None
    low, high = np.quantile(scores[known], (0.005, 0.995)).tolist()
    edges: Floats = np.linspace(float(low), float(high if high > low else low + 1), _BINS + 1)
    clipped = np.clip(scores, edges[0], edges[-1])
    return Distribution(
        edges=tuple(edges.tolist()),
        right=tuple(np.histogram(clipped[known & labels], edges)[0].tolist()),
        wrong=tuple(np.histogram(clipped[known & ~labels], edges)[0].tolist()),
    )


def _length(one: Graded) -> float:
    """Mean tokens of a candidate; NaN where no candidate has signals."""
    counts = [c.signals.n_tokens for c in one.step.candidates if c.signals is not None]
    return sum(counts) / len(counts) if counts else math.nan


def _cuts(lengths: Floats) -> tuple[float, ...]:
    known = lengths[np.isfinite(lengths)]
    return tuple(np.quantile(known, (1 / 3, 2 / 3)).tolist()) if len(known) else ()


def _thirds(lengths: Floats) -> list[NDArray[np.bool_]]:
    """Which steps have short, middling and long candidates."""
    cuts = _cuts(lengths)
    if not cuts:
        return []
    return [lengths <= cuts[0], (lengths > cuts[0]) & (lengths <= cuts[1]), lengths > cuts[1]]


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bare(right: float, tokens: tuple[float, float] = (math.nan, math.nan)) -> Replay:
    return Replay(right=right, curve=(), tokens=tokens, scores=np.empty(0), labels=np.empty(0, dtype=bool))


def _run_replay(run: RunOutcome | None) -> Replay:
    usage: Mapping[str, float] = {} if run is None else run.usage
    tokens = (usage.get("input_tokens", math.nan), usage.get("output_tokens", math.nan))
    return _bare(float(run is not None and run.right is True), tokens)
