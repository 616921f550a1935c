"""The table of an evaluation, as plain data that is saved as JSON."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ec_agents.errors import ConfigError
from ec_agents.evaluation.replay import Replay
from ec_agents.evaluation.stats import Estimate, Resampling, all_right, auroc, holm, paired_p


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A selector minus a baseline, on the same tasks."""

    value: float
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    p: float
    """Paired, two-sided."""
    p_holm: float = 1.0
    """Corrected for all comparisons of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginBin:
    """Steps with margins of about one size: how often their choice was right."""

    margin: float
    """Mean margin."""
    right: float
    """Share of right choices."""
    random: float
    """Expected share of right choices of a random sound candidate on the same steps."""
    count: int
    """Steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Histogram of the scores of right and of wrong candidates; high = better."""

    edges: tuple[float, ...]
    """One more than there are bins."""
    right: tuple[int, ...]
    """Right candidates in each bin."""
    wrong: tuple[int, ...]
    """Wrong candidates in each bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way of choosing."""

    selector: str
    """Its name."""
    accuracy: Estimate
    """Share of right choices; errors and failures count as not right."""
    pass_hat: Mapping[int, Estimate]
    """k → chance that k trials of a task are all right."""
    regret: Estimate | None = None
    """Oracle minus accuracy."""
    versus: Mapping[str, Difference] = field(default_factory=dict[str, Difference])
    """Baseline → difference."""
    auroc_within: Estimate | None = None
    """How often a right candidate scores above a wrong one of the same step."""
    auroc: float | None = None
    """The same over all candidates of all steps."""
    margin_auroc: float | None = None
    """How often a right choice has a larger margin than a wrong one."""
    margins: tuple[MarginBin, ...] = ()
    """Reliability of the margin, from small to large."""
    unscored: float | None = None
    """Share of candidates without a score."""
    flawed: float | None = None
    """Share of candidates in which a guard found a flaw."""
    fallback: float | None = None
    """Share of steps with nothing to rank by."""
    agreement: float | None = None
    """Share of steps in which the recorded choice is this one."""
    tokens: float | None = None
    """Tokens a step or run, input and output; None where they are not reported."""
    tokens_per_solved: float | None = None
    """Tokens for each right outcome."""
    cost_per_solved: float | None = None
    """Price of them, in the currency of the prices."""
    curve: Mapping[int, float] = field(default_factory=dict[int, float])
    """n → expected accuracy if only n candidates had been drawn."""
    by_length: tuple[Estimate | None, ...] = ()
    """Accuracy in the thirds of steps, or of tasks, with short, middling and long candidates or runs."""
    scores: Distribution | None = None
    """Scores of right and wrong candidates."""
    note: str = ""
    """What a reader must know about this row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A table of results."""

    rows: tuple[Row, ...]
    n_tasks: int
    """Problems; intervals and tests treat whatever belongs to one as one."""
    n_draws: int
    """Graded steps, or runs of each selector."""
    n_candidates: int
    """The largest N; 0 for whole runs."""
    n_failed: int
    """Calls that failed, or runs that ended in an infrastructure error; they count as not right."""
    lengths: tuple[float, ...]
    """Median tokens of a candidate, or mean output tokens of a task's runs, that separate ``by_length``."""
    level: float
    """Coverage of the intervals."""
    resamples: int
    seed: int
    """Seed of resampling and subsets."""
    baselines: tuple[str, ...] = ()
    """Rows that the others are compared with."""
    n_restarted: int = 0
    """Of whole runs: how often one was cut off, could not go on, and was begun again."""
    n_repeated: int = 0
    """Calls that were made again because of that, as far as the trace tells."""

    def row(self, selector: str) -> Row:
        """The row of a selector.

        Raises:
            ConfigError: There is none of that name.
        """
        for row in self.rows:
            if row.selector == selector:
                return row
        raise ConfigError(f"no row is called {selector!r}; known: {', '.join(row.selector for row in self.rows)}")

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; ``load_evaluation`` reads it."""
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))


def load_evaluation(path: str | Path) -> Evaluation:
    """A saved evaluation.

    Raises:
        ConfigError: The file is not one.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Evaluation)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is not a saved evaluation: {error}") from error


Floats = NDArray[np.float64]

ALWAYS = ("avg@1", "random", "oracle")
"""Rows of every table that are computed exactly and belong to no selector."""
_BINS = 20
_MARGIN_BINS = 5


class Column:
    """The replays of one way of choosing over all steps, as arrays."""

    def __init__(self, name: str, replays: Sequence[Replay], note: str = "") -> None:
        self.name = name
        self.note = note
        self.replays = replays
        self.right = np.array([replay.right for replay in replays])
        self.tokens = np.array([replay.tokens for replay in replays]).reshape(-1, 2).sum(axis=0)

    def of(self, measure: Callable[[Replay], float]) -> Floats:
        """A measure of each step."""
        return np.array([measure(replay) for replay in self.replays])


class Table:
    """What all rows of a table share."""

    def __init__(
        self,
        columns: Sequence[Column],
        tasks: Sequence[str],
        resampling: Resampling,
        rng: np.random.Generator,
        *,
        baselines: Sequence[str],
        points: Sequence[int] = (),
        lengths: Floats | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        self._outcomes = {column.name: column.right for column in columns}
        unknown = [name for name in baselines if name not in self._outcomes]
        if unknown:
            known = ", ".join(self._outcomes)
            raise ConfigError(f"no row to compare with is called {', '.join(unknown)}; known: {known}")
        self._baselines = baselines
        self._tasks = tasks
        self._resampling = resampling
        self._rng = rng
        self._points = points
        self._thirds = [] if lengths is None else _thirds(lengths)
        self._prices = prices

    def row(self, column: Column) -> Row:
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

    def _versus(self, column: Column) -> dict[str, Difference]:
        if column.name in ALWAYS:
            return {}
        found: dict[str, Difference] = {}
        for baseline in takewhile(lambda name: name != column.name, self._baselines):
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

    def _score_quality(self, column: Column) -> dict[str, Any]:
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


def corrected(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with p-values corrected for all comparisons of the table."""
    places = [(i, name) for i, row in enumerate(rows) for name in row.versus]
    p_values = holm([rows[i].versus[name].p for i, name in places])
    corrected: dict[int, dict[str, Difference]] = defaultdict(dict)
    for (i, name), p in zip(places, p_values, strict=True):
        corrected[i][name] = replace(rows[i].versus[name], p_holm=p)
    return tuple(replace(row, versus=corrected.get(i, {})) for i, row in enumerate(rows))


def _curve(column: Column, points: Sequence[int]) -> dict[int, float]:
    """Mean outcome at each n; a step with fewer candidates than n counts with all it has."""
    curves = [replay.curve for replay in column.replays if replay.curve]
    if len(curves) < len(column.replays):
        return {}
    return {n: float(np.mean([curve[min(i, len(curve) - 1)] for curve in curves])) for i, n in enumerate(points)}


def _costs(column: Column, prices: tuple[float, float] | None) -> dict[str, Any]:
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


def length_cuts(lengths: Floats) -> tuple[float, ...]:
    """The two lengths that separate the thirds; none where no length is known."""
    known = lengths[np.isfinite(lengths)]
    return tuple(np.quantile(known, (1 / 3, 2 / 3)).tolist()) if len(known) else ()


def _thirds(lengths: Floats) -> list[NDArray[np.bool_]]:
    """Which steps have short, middling and long candidates."""
    cuts = length_cuts(lengths)
    if not cuts:
        return []
    return [lengths <= cuts[0], (lengths > cuts[0]) & (lengths <= cuts[1]), lengths > cuts[1]]


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
