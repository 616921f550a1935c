"""Stage 8 - evaluate: graded traces, replayed under every selector → a table with intervals and paired tests."""

import logging
import math
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
from numpy.typing import NDArray

from ec_agents.errors import ConfigError
from ec_agents.evaluation.outcomes import Graded, RunOutcome
from ec_agents.evaluation.replay import Policy, Replay, SelectorPolicy, curve_points, one_call, oracle, random_sound
from ec_agents.evaluation.stats import Resampling, cross_fit
from ec_agents.evaluation.table import ALWAYS, Column, Evaluation, Table, corrected, length_cuts
from ec_agents.scoring import FirstScorer, MajorityVote
from ec_agents.selection import Selector

Floats = NDArray[np.float64]

BASELINES = ("first", "random", "majority")
"""What every selector is compared with, unless told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A setting chosen by cross-fitting: on every fold the one that was best on the others."""

    accuracy: float
    """On tasks that the setting was not chosen on."""
    picks: Sequence[str]
    """Which setting was chosen for each fold."""
    right: Floats
    """Outcome of each graded step."""


def evaluate(
    graded: Iterable[Graded],
    selectors: Mapping[str, Selector],
    *,
    baselines: Sequence[str] = BASELINES,
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
        baselines: Rows that the others are compared with; one of these only with those before it.
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
        columns.insert(-1, Column(name, [_bare(value) for value in right.tolist()], note))
    table = Table(columns, tasks, resampling, rng, baselines=baselines, points=points, lengths=lengths, prices=prices)
    return Evaluation(
        rows=corrected([table.row(column) for column in columns]),
        n_tasks=len(resampling.names),
        n_draws=len(tasks),
        n_candidates=points[-1],
        n_failed=n_failed,
        lengths=length_cuts(lengths),
        level=level,
        resamples=resamples,
        seed=seed,
        baselines=tuple(baselines),
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
    baselines: Sequence[str] = BASELINES,
    prices: tuple[float, float] | None = None,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Evaluation:
    """Compare whole runs of an agent under several selectors, on the same tasks and trials.

    A run that is missing or ended in an infrastructure error counts as not right. The arguments are those of
    ``evaluate``; the selectors are compared with those baselines of which there are runs.

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
    columns = [Column(name, [_run_replay(by_arm[name].get(key)) for key in keys]) for name in order]
    compared = tuple(name for name in baselines if name in by_arm)
    lengths = np.mean([column.of(lambda replay: replay.tokens[1]) for column in columns], axis=0)
    table = Table(columns, tasks, resampling, rng, baselines=compared, lengths=lengths, prices=prices)
    everything = [run for arm in by_arm.values() for run in arm.values()]
    known = sum(run.right is not None for run in everything)
    return Evaluation(
        rows=corrected([table.row(column) for column in columns]),
        n_tasks=len(resampling.names),
        n_draws=len(keys),
        n_candidates=0,
        n_failed=len(keys) * len(by_arm) - known,
        lengths=length_cuts(lengths),
        level=level,
        resamples=resamples,
        seed=seed,
        baselines=compared,
        n_restarted=sum(run.restarts for run in everything),
        n_repeated=sum(run.repeated for run in everything),
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
) -> tuple[list[str], Floats, int, tuple[int, ...], list[Column], dict[str, dict[str, Floats]]]:
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
    columns = [Column(name, of_policy) for name, of_policy in replays.items()]
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


def _length(one: Graded) -> float:
    """Median tokens of a candidate; NaN where no candidate has signals."""
    counts = [c.signals.n_tokens for c in one.step.candidates if c.signals is not None]
    return median(counts) if counts else math.nan


def _bare(right: float, tokens: tuple[float, float] = (math.nan, math.nan)) -> Replay:
    return Replay(right=right, curve=(), tokens=tokens, scores=np.empty(0), labels=np.empty(0, dtype=bool))


def _run_replay(run: RunOutcome | None) -> Replay:
    usage: Mapping[str, float] = {} if run is None else run.usage
    tokens = (usage.get("input_tokens", math.nan), usage.get("output_tokens", math.nan))
    return _bare(float(run is not None and run.right is True), tokens)
