"""Stage 8 - evaluate: replay every selector on graded traces → a table with intervals and paired tests."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import Candidate
from ec_agents.errors import ConfigError
from ec_agents.evaluation.checkers import name_of
from ec_agents.evaluation.learning import LEARNED, Learning
from ec_agents.evaluation.outcomes import Graded, RunOutcome
from ec_agents.evaluation.replay import (
    Replay,
    SelectorStrategy,
    Strategy,
    curve_points,
    one_call,
    oracle,
    outcome_only,
    random_sound,
)
from ec_agents.evaluation.settings import ALWAYS, BASELINES
from ec_agents.evaluation.stats import Resampling, cross_fit, scipy_stats
from ec_agents.evaluation.table import Evaluation, Replays, RowBuilder, corrected, length_cuts
from ec_agents.scoring import FirstScorer, MajorityVote, action_key
from ec_agents.scoring.answers import ANSWERS, Extract, answer_key, voting_on
from ec_agents.scoring.votes import Key
from ec_agents.selection import Selector

Floats = NDArray[np.float64]

scipy_stats()  # a missing extra is an error now, and not after the samples were paid for

_LEARNED_NOTE = "a logistic model of several scores, never fitted on the tasks it is judged on"

MOSTLY = 0.9
"""Share of the steps from which on a note speaks of all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A setting chosen by cross-fitting: for every fold, the one that was best on the others."""

    accuracy: float
    """Accuracy on tasks that the setting was not chosen on."""
    picks: Sequence[str]
    """The setting that was chosen for each fold."""
    right: Floats
    """``(G,)``: outcome of each graded step."""


def evaluate(
    graded: Iterable[Graded],
    selectors: Mapping[str, Selector],
    *,
    baselines: Sequence[str] = BASELINES,
    tuned: Mapping[str, Mapping[str, Selector]] | None = None,
    prices: tuple[float, float] | None = None,
    answer: Extract | None = None,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    subsets: int = 32,
    folds: int = 5,
) -> Evaluation:
    """Replay every selector on the same candidates, and compare their outcomes with the baselines.

    ``avg@1``, ``first``, ``random``, ``majority`` and ``oracle`` are always in the table. The steps are read once, so
    that a trace may be larger than memory.

    Args:
        graded: Steps with their outcomes.
        selectors: Name → selector.
        baselines: Rows that the others are compared with; a baseline is compared with those before it.
        tuned: Name → settings (name → selector), the best of which is found by cross-fitting.
        prices: Price per million input and output tokens.
        answer: Finds in a text the answer that votes compare; None compares whole texts.
        seed: For resampling and subsets; the same seed gives the same table.
        resamples: Bootstrap resamples over whole tasks.
        level: Coverage of the intervals.
        subsets: Random subsets per step and point of a curve, for scores that depend on the other candidates and have
            no faster way; few subsets are enumerated.
        folds: Folds of the cross-fitting.

    Raises:
        ConfigError: No step is given, or a selector has the name of a row that is always in the table.
    """
    rng = np.random.default_rng(seed)
    key = answer_key(answer)
    grids = {
        name: _without_curves({setting: voting(one, key) for setting, one in settings.items()}, rng)
        for name, settings in (tuned or {}).items()
    }
    selectors = {name: voting(selector, key) for name, selector in selectors.items()}
    replayed = _replay_all(graded, _strategies(selectors, rng, subsets, key), grids, key)
    resampling = Resampling(replayed.tasks, rng, resamples=resamples, level=level)
    rows = [Replays(name, replays) for name, replays in replayed.replays.items()]
    if (learned := replayed.learning.replays(replayed.tasks, rng, folds=folds)) is not None:
        rows.insert(-1, Replays(LEARNED, learned, f"{_LEARNED_NOTE}: {folds}-fold cross-fitting"))
    for name, outcomes in replayed.tuning.items():
        rows.insert(-1, _tuned_row(name, outcomes, replayed.tasks, rng, folds))
    builder = RowBuilder(
        rows,
        replayed.tasks,
        resampling,
        rng,
        baselines=baselines,
        points=replayed.points,
        lengths=np.array(replayed.lengths),
        prices=prices,
    )
    return Evaluation(
        rows=corrected(map(builder.row, rows)),
        n_tasks=len(resampling.names),
        n_draws=len(replayed.tasks),
        n_candidates=replayed.points[-1],
        n_failed=replayed.n_failed,
        lengths=length_cuts(np.array(replayed.lengths)),
        level=level,
        resamples=resamples,
        seed=seed,
        baselines=tuple(baselines),
        tasks=tuple(resampling.names.tolist()),
        equal=resampling.share(replayed.equal),
        effective_n=resampling.mean(replayed.effective_n),
        answer=_named(answer),
        notes=_notes(replayed),
    )


def tune(graded: Iterable[Graded], settings: Mapping[str, Selector], *, folds: int = 5, seed: int = 0) -> Tuned:
    """Choose one of several settings without looking at the labels that it is judged on.

    Raises:
        ConfigError: No setting is given, or there are fewer tasks than folds.
    """
    rng = np.random.default_rng(seed)
    replayed = _replay_all(graded, {}, {"": _without_curves(settings, rng)})
    right, picks = cross_fit(_arrays(replayed.tuning[""]), replayed.tasks, rng, folds=folds)
    return Tuned(accuracy=float(right.mean()), picks=picks, right=right)


def evaluate_runs(
    runs: Iterable[RunOutcome],
    *,
    baselines: Sequence[str] = BASELINES,
    prices: tuple[float, float] | None = None,
    answer: Extract | None = None,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Evaluation:
    """Compare whole runs of an agent under several selectors, on the same tasks and trials.

    A run that is missing or ended in an infrastructure error counts as not right. The arguments are those of
    ``evaluate``; baselines without runs are ignored.

    Raises:
        ConfigError: No run is given.
    """
    rng = np.random.default_rng(seed)
    by_selector: dict[str, dict[tuple[str, int], RunOutcome]] = defaultdict(dict)
    for run in runs:
        by_selector[run.selector][run.task, run.trial] = run
    keys = sorted({key for found in by_selector.values() for key in found})
    tasks = [task for task, _ in keys]
    resampling = Resampling(tasks, rng, resamples=resamples, level=level)
    order = sorted(by_selector, key=lambda name: name not in BASELINES)
    rows = [Replays(name, [_run_replay(by_selector[name].get(key)) for key in keys]) for name in order]
    compared = tuple(name for name in baselines if name in by_selector)
    lengths = np.mean([row.of(lambda replay: replay.tokens[1]) for row in rows], axis=0)
    builder = RowBuilder(rows, tasks, resampling, rng, baselines=compared, lengths=lengths, prices=prices)
    everything = [run for found in by_selector.values() for run in found.values()]
    known = [run.right for run in everything if run.right is not None]
    return Evaluation(
        rows=corrected(map(builder.row, rows)),
        n_tasks=len(resampling.names),
        n_draws=len(keys),
        n_candidates=0,
        n_failed=len(keys) * len(by_selector) - len(known),
        lengths=length_cuts(lengths),
        level=level,
        resamples=resamples,
        seed=seed,
        baselines=compared,
        tasks=tuple(resampling.names.tolist()),
        answer=_named(answer),
        n_restarted=sum(run.restarts for run in everything),
        n_repeated=sum(run.repeated for run in everything),
        notes=() if not known or any(known) else (NOTHING_RIGHT,),
    )


NOTHING_RIGHT = "Not one answer is right: look at your checker, and at an answer in the trace."


def voting(selector: Selector, key: Key) -> Selector:
    """The selector, with votes on whole actions turned into votes with this key."""
    tie_break = None if selector.tie_break is None else voting_on(selector.tie_break, key)
    return replace(selector, scorer=voting_on(selector.scorer, key), tie_break=tie_break)


def _named(answer: Extract | None) -> str:
    return "text" if answer is None else name_of(answer, ANSWERS)


@dataclass(slots=True, kw_only=True)
class _Replayed:
    """Every step under every strategy."""

    tasks: list[str] = field(default_factory=list[str])
    """``(G,)``: the task of each step."""
    lengths: list[float] = field(default_factory=list[float])
    """``(G,)``: median tokens of the candidates."""
    n_failed: int = 0
    """Failed calls of all steps."""
    widest: int = 1
    """The largest N."""
    replays: dict[str, list[Replay]]
    """Strategy → ``(G,)`` replays."""
    tuning: dict[str, dict[str, list[float]]]
    """Row to be tuned → setting → ``(G,)`` outcomes."""
    n_right: int = 0
    """Steps with a right candidate."""
    n_several: int = 0
    """Steps with two or more candidates."""
    n_equal: int = 0
    """Of those, the steps whose candidates are all equal, text and actions."""
    n_distinct: int = 0
    """Of those, the steps whose answers all differ, so that a vote is a draw by lot."""
    key: Key
    """What votes compare."""
    learning: Learning
    """What the learned selector needs of each step."""
    equal: list[float] = field(default_factory=list[float])
    """``(G,)``: share of pairs of candidates with the same answer; NaN with fewer than two."""
    effective_n: list[float] = field(default_factory=list[float])
    """``(G,)``: effective number of answers."""

    @property
    def points(self) -> tuple[int, ...]:
        """The n of each point of the curves."""
        return curve_points(self.widest)

    def count(self, one: Graded) -> None:
        """Take down what does not depend on the strategy."""
        candidates = one.step.candidates
        self.tasks.append(one.task)
        self.lengths.append(_length(one))
        self.n_failed += len(one.step.failures)
        self.widest = max(self.widest, one.n_drawn)
        self.n_right += any(one.right.values())
        if len(candidates) > 1:
            self.n_several += 1
            self.n_equal += len({(c.content, repr(c.tool_calls)) for c in candidates}) == 1
            votes = [key for key in map(self.key, candidates) if key is not None]
            self.n_distinct += len(set(votes)) == len(votes)
        equal, effective = _diversity(candidates, self.key)
        self.equal.append(equal)
        self.effective_n.append(effective)


def _replay_all(
    graded: Iterable[Graded],
    strategies: Mapping[str, Strategy],
    grids: Mapping[str, Mapping[str, Strategy]],
    key: Key = action_key,
) -> _Replayed:
    found = _Replayed(
        key=key,
        learning=Learning(key=key),
        replays={name: [] for name in strategies},
        tuning={name: {setting: [] for setting in grid} for name, grid in grids.items()},
    )
    with _quiet():
        for one in graded:
            found.count(one)
            points = curve_points(one.n_drawn)
            if strategies:
                found.learning.add(one, points)
            for name, strategy in strategies.items():
                found.replays[name].append(strategy(one, points))
            for name, grid in grids.items():
                for setting, strategy in grid.items():
                    found.tuning[name][setting].append(strategy(one, ()).right)
    return found


def _strategies(
    selectors: Mapping[str, Selector], rng: np.random.Generator, subsets: int, key: Key
) -> dict[str, Strategy]:
    taken = sorted(set(selectors) & set(ALWAYS))
    if taken:
        raise ConfigError(f"{', '.join(taken)}: always in the table; give your selectors other names")
    strategy = partial(SelectorStrategy, rng=rng, subsets=subsets)
    return {
        "avg@1": one_call,
        "first": strategy(selectors.get("first", Selector(scorer=FirstScorer())), calls="until_chosen"),
        "random": random_sound,
        "majority": strategy(selectors.get("majority", Selector(scorer=MajorityVote(key)))),
        **{name: strategy(selector) for name, selector in selectors.items() if name not in BASELINES},
        "oracle": oracle,
    }


def _without_curves(settings: Mapping[str, Selector], rng: np.random.Generator) -> dict[str, Strategy]:
    return {name: SelectorStrategy(selector, rng) for name, selector in settings.items()}


def _tuned_row(
    name: str, outcomes: Mapping[str, Sequence[float]], tasks: Sequence[str], rng: np.random.Generator, folds: int
) -> Replays:
    right, picks = cross_fit(_arrays(outcomes), tasks, rng, folds=folds)
    note = f"tuned by {folds}-fold cross-fitting, never on the tasks it is judged on; chosen: {', '.join(picks)}"
    return Replays(name, [outcome_only(value) for value in right.tolist()], note)


def _arrays(outcomes: Mapping[str, Sequence[float]]) -> dict[str, Floats]:
    return {setting: np.array(right) for setting, right in outcomes.items()}


def _notes(found: _Replayed) -> tuple[str, ...]:
    """Warnings about an evaluation that would mislead."""
    notes = [] if found.n_right else [NOTHING_RIGHT]
    if found.n_several and found.n_equal >= MOSTLY * found.n_several:
        notes.append(
            f"All answers to a task are equal in {found.n_equal} of {found.n_several} steps, so there is nothing to "
            "choose: set a temperature above 0, and switch off fixed seeds and response caches."
        )
    elif found.widest > 2 and found.n_distinct >= MOSTLY * found.n_several > 0:
        notes.append(
            f"All answers to a task differ in {found.n_distinct} of {found.n_several} steps, so votes such as "
            "majority mean nothing here: "
            + (
                "they compare whole texts. Say with --answer where in a text the answer is."
                if found.key is action_key
                else "check that --answer finds the answers."
            )
        )
    return tuple(notes)


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


def _diversity(candidates: Sequence[Candidate], key: Key) -> tuple[float, float]:
    """Share of pairs with the same answer, and effective number of answers; who abstains is unlike everyone."""
    n = len(candidates)
    counts = Counter(vote if (vote := key(c)) is not None else ("abstains", c.index) for c in candidates)
    squares = sum(count**2 for count in counts.values())
    return (squares - n) / (n * (n - 1)) if n > 1 else math.nan, n**2 / squares if n else math.nan


def _length(one: Graded) -> float:
    """Median tokens of the candidates; NaN if none has signals."""
    counts = [c.signals.n_tokens for c in one.step.candidates if c.signals is not None]
    return median(counts) if counts else math.nan


def _run_replay(run: RunOutcome | None) -> Replay:
    usage: Mapping[str, float] = {} if run is None else run.usage
    tokens = (usage.get("input_tokens", math.nan), usage.get("output_tokens", math.nan))
    return outcome_only(float(run is not None and run.right is True), tokens)
