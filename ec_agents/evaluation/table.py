"""The table of an evaluation: plain data that is saved as JSON, and the builder of its rows."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ec_agents.errors import ConfigError
from ec_agents.evaluation.replay import Replay
from ec_agents.evaluation.settings import ALWAYS, BASELINES
from ec_agents.evaluation.stats import Estimate, Resampling, all_right, auroc, brier, holm, paired_p
from ec_agents.files import replace_text

Floats = NDArray[np.float64]

_BINS = 20
_MARGIN_BINS = 5

COVERAGES = (10, 25, 50, 75, 100)
"""Percent of the steps at each point of a risk-coverage curve."""
FOLDS = 5
"""Folds of every cross-fitting."""


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
    """Accuracy of the steps with similar margins."""

    margin: float
    """Mean margin."""
    right: float
    """Share of right choices."""
    random: float
    """Expected share of right choices of a random sound candidate on the same steps."""
    count: int
    """Number of steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Histograms of the scores of right and wrong candidates; high = better."""

    edges: tuple[float, ...]
    """Edges of the bins, one more than there are bins."""
    right: tuple[int, ...]
    """Right candidates in each bin."""
    wrong: tuple[int, ...]
    """Wrong candidates in each bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The results of one selector, or of another way of choosing."""

    selector: str
    """Name of the row."""
    accuracy: Estimate
    """Share of right choices; errors and failures count as not right."""
    pass_hat: Mapping[int, Estimate]
    """pass^k: k → chance that k trials of a task are all right."""
    regret: Estimate | None = None
    """Oracle minus accuracy."""
    versus: Mapping[str, Difference] = field(default_factory=dict[str, Difference])
    """Baseline → difference."""
    auroc_within: Estimate | None = None
    """Share of pairs within a step in which the right candidate scores above the wrong one."""
    auroc: float | None = None
    """AUROC over all candidates of all steps."""
    margin_auroc: float | None = None
    """AUROC of the margin: right choices against wrong ones."""
    margin_brier: tuple[float, float] | None = None
    """Brier score of the chance of being right that the margin gives, cross-fitted, and that of a constant chance."""
    margins: tuple[MarginBin, ...] = ()
    """Reliability of the margin, from small to large."""
    coverage: Mapping[int, Estimate] = field(default_factory=dict[int, Estimate])
    """Percent of the steps, those with the largest margins → share of right choices among them."""
    unscored: float | None = None
    """Share of candidates without a score."""
    flawed: float | None = None
    """Share of candidates in which a guard found a flaw."""
    fallback: float | None = None
    """Share of steps with nothing to rank by."""
    agreement: float | None = None
    """Share of steps in which the recorded choice is the same."""
    tokens: float | None = None
    """Input and output tokens per step or run; None if they are not reported."""
    tokens_per_solved: float | None = None
    """Tokens per right outcome."""
    cost_per_solved: float | None = None
    """Cost per right outcome, in the currency of the prices."""
    curve: Mapping[int, Estimate] = field(default_factory=dict[int, Estimate])
    """n → expected accuracy with only n candidates."""
    by_length: tuple[Estimate | None, ...] = ()
    """Accuracy in the thirds of the steps with short, medium and long candidates, or of the tasks by their runs."""
    scores: Distribution | None = None
    """Scores of right and wrong candidates."""
    note: str = ""
    """Remark that a reader of this row needs."""
    by_task: tuple[float, ...] = ()
    """Mean outcome of each task, in the order of the evaluation's ``tasks``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A table of results."""

    rows: tuple[Row, ...]
    n_tasks: int
    """Problems; intervals and tests treat everything that belongs to one as dependent."""
    n_draws: int
    """Graded steps, or runs of each selector."""
    n_candidates: int
    """The largest N; 0 for whole runs."""
    n_failed: int
    """Failed calls, or runs that ended in an infrastructure error; they count as not right."""
    lengths: tuple[float, ...]
    """Boundaries of ``by_length``: median tokens of a candidate, or mean output tokens of a task's runs."""
    level: float
    """Coverage of the intervals."""
    resamples: int
    """Bootstrap resamples."""
    seed: int
    """Seed of resampling and subsets."""
    baselines: tuple[str, ...] = ()
    """Rows that the others are compared with."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks."""
    equal: Estimate | None = None
    """Diversity: share of pairs of candidates with the same answer or action."""
    effective_n: Estimate | None = None
    """Diversity: mean number of different answers that would be as diverse, 1 / Σ share²; at most N."""
    answer: str = "text"
    """What votes compared: whole texts, or how the answer was found in them."""
    n_restarted: int = 0
    """How often a whole run was interrupted, could not be resumed, and was started over."""
    n_repeated: int = 0
    """Calls that were repeated because of that, as far as the trace shows."""
    notes: tuple[str, ...] = ()
    """Warnings about the evaluation as a whole; each is a sentence."""

    @property
    def compared(self) -> list[str]:
        """The baselines that at least one row is compared with."""
        return [name for name in self.baselines if any(name in row.versus for row in self.rows)]

    @property
    def own(self) -> list[Row]:
        """The rows of the user's selectors: all that are not in every table."""
        return [row for row in self.rows if row.selector not in {*ALWAYS, *BASELINES}]

    def row(self, selector: str) -> Row:
        """Find the row of a selector.

        Raises:
            ConfigError: No row has that name.
        """
        for row in self.rows:
            if row.selector == selector:
                return row
        raise ConfigError(f"no row is called {selector!r}; known: {', '.join(row.selector for row in self.rows)}")

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; ``load_evaluation`` reads it.

        Raises:
            WriteError: The file cannot be written.
        """
        replace_text(path, msgspec.json.format(msgspec.json.encode(self), indent=1).decode())


def load_evaluation(path: str | Path) -> Evaluation:
    """Read a saved evaluation.

    Raises:
        ConfigError: The file cannot be read, or is not a saved evaluation.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Evaluation)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a saved evaluation: {error}") from error


class Replays:
    """The replays of all steps under one strategy, as arrays; they become one row."""

    def __init__(self, name: str, replays: Sequence[Replay], note: str = "") -> None:
        self.name = name
        self.note = note
        self.replays = replays
        self.right = np.array([replay.right for replay in replays])
        self.tokens = np.array([replay.tokens for replay in replays]).reshape(-1, 2).sum(axis=0)

    def of(self, measure: Callable[[Replay], float]) -> Floats:
        """One measure of every step, ``(G,)``."""
        return np.array([measure(replay) for replay in self.replays])

    def joined(self, measure: Callable[[Replay], NDArray[Any]]) -> NDArray[Any]:
        """One measure of every scored candidate of all steps."""
        return np.concatenate([measure(replay) for replay in self.replays])


class RowBuilder:
    """Computes the rows of a table, which share tasks, resamples and baselines.

    Args:
        replays: The replays of every row.
        tasks: ``(G,)``: the task of each step.
        resampling: Bootstrap over these tasks.
        rng: Random generator of the paired tests.
        baselines: Rows that the others are compared with.
        points: The n of each point of the curves.
        lengths: ``(G,)``: tokens by which the steps are split into thirds.
        prices: Price per million input and output tokens.

    Raises:
        ConfigError: No row has the name of a baseline.
    """

    def __init__(
        self,
        replays: Sequence[Replays],
        tasks: Sequence[str],
        resampling: Resampling,
        rng: np.random.Generator,
        *,
        baselines: Sequence[str],
        points: Sequence[int] = (),
        lengths: Floats | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        self._outcomes = {one.name: one.right for one in replays}
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

    def row(self, replays: Replays) -> Row:
        """Compute everything about one strategy."""
        mean, right = self._resampling.mean, replays.right
        accuracy = self._resampling.share(right)
        if accuracy is None:
            raise AssertionError("outcomes are never NaN")
        return replace(
            Row(selector=replays.name, accuracy=accuracy, pass_hat=self._pass_hat(right), note=replays.note),
            regret=mean(self._outcomes["oracle"] - right) if "oracle" in self._outcomes else None,
            versus=self._versus(replays),
            curve=self._curve(replays),
            by_task=tuple(self._resampling.per_task(right).tolist()),
            by_length=tuple(self._resampling.share(np.where(part, right, np.nan)) for part in self._thirds),
            **_costs(replays, self._prices),
            **self._score_quality(replays),
        )

    def _versus(self, replays: Replays) -> dict[str, Difference]:
        if replays.name in ALWAYS:
            return {}
        versus: dict[str, Difference] = {}
        for baseline in takewhile(lambda name: name != replays.name, self._baselines):
            differences = replays.right - self._outcomes[baseline]
            p = paired_p(self._resampling.per_task(differences), self._rng)
            if (mean := self._resampling.mean(differences)) is not None:
                versus[baseline] = Difference(value=mean.value, low=mean.low, high=mean.high, p=p)
        return versus

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

    def _curve(self, replays: Replays) -> dict[int, Estimate]:
        """Mean outcome at each n; a step with fewer candidates than n counts with all it has."""
        curves = [replay.curve for replay in replays.replays if replay.curve]
        if len(curves) < len(replays.replays):
            return {}
        found = {
            n: self._resampling.share([curve[min(i, len(curve) - 1)] for curve in curves])
            for i, n in enumerate(self._points)
        }
        return {n: estimate for n, estimate in found.items() if estimate is not None}

    def _coverage(self, margins: Floats, right: Floats) -> dict[int, Estimate]:
        """Share of right choices among the steps with the largest margins."""
        known = margins[np.isfinite(margins)]
        found = {
            percent: self._resampling.share(np.where(margins >= np.quantile(known, 1 - percent / 100), right, np.nan))
            for percent in (COVERAGES if len(known) else ())
        }
        return {percent: estimate for percent, estimate in found.items() if estimate is not None}

    def _score_quality(self, replays: Replays) -> dict[str, Any]:
        """How well the scores separate right from wrong; empty without scores."""
        scores = replays.joined(lambda replay: replay.scores)
        if not len(scores):
            return {}
        labels = replays.joined(lambda replay: replay.labels)
        margins = replays.of(lambda replay: replay.margin)
        mean = self._resampling.mean
        return {
            "auroc_within": mean(replays.of(lambda replay: replay.auroc)),
            "auroc": _known(auroc(scores, labels)),
            "margin_auroc": _known(auroc(margins, replays.right > 0.5)),
            "margin_brier": brier(margins, replays.right, self._resampling.cluster % FOLDS),
            "coverage": self._coverage(margins, replays.right),
            "margins": _margin_bins(margins, replays.right, self._outcomes.get("random", replays.right)),
            "unscored": float(np.isnan(scores).mean()),
            "flawed": sum(replay.n_flawed for replay in replays.replays) / len(scores),
            "fallback": _value(mean(replays.of(lambda replay: replay.is_fallback))),
            "agreement": _value(mean(replays.of(lambda replay: replay.agrees))),
            "scores": _distribution(scores, labels),
        }


def corrected(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Correct the p-values of the rows for all comparisons of the table."""
    rows = tuple(rows)
    places = [(i, name) for i, row in enumerate(rows) for name in row.versus]
    p_values = holm([rows[i].versus[name].p for i, name in places])
    corrected: dict[int, dict[str, Difference]] = defaultdict(dict)
    for (i, name), p in zip(places, p_values, strict=True):
        corrected[i][name] = replace(rows[i].versus[name], p_holm=p)
    return tuple(replace(row, versus=corrected.get(i, {})) for i, row in enumerate(rows))


def _costs(replays: Replays, prices: tuple[float, float] | None) -> dict[str, Any]:
    spent, solved = float(replays.tokens.sum()), float(replays.right.sum())
    if not math.isfinite(spent):
        return {}
    cost = None if prices is None else float(replays.tokens @ np.array(prices)) / 1e6
    return {
        "tokens": spent / len(replays.right),
        "tokens_per_solved": spent / solved if solved else None,
        "cost_per_solved": cost / solved if cost is not None and solved else None,
    }


def _margin_bins(margins: Floats, right: Floats, random: Floats) -> tuple[MarginBin, ...]:
    """Split the steps into bins of equal size, from small margins to large ones."""
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
    """The two lengths that separate the thirds; empty if no length is known."""
    known = lengths[np.isfinite(lengths)]
    return tuple(np.quantile(known, (1 / 3, 2 / 3)).tolist()) if len(known) else ()


def _thirds(lengths: Floats) -> list[NDArray[np.bool_]]:
    """Masks of the steps with short, medium and long candidates."""
    cuts = length_cuts(lengths)
    if not cuts:
        return []
    return [lengths <= cuts[0], (lengths > cuts[0]) & (lengths <= cuts[1]), lengths > cuts[1]]


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
