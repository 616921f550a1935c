"""The rows of an evaluation's table: outcomes of one way of choosing → accuracy, differences, costs, curves."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ec_agents.errors import ConfigError
from ec_agents.evaluation.replay import Replay
from ec_agents.evaluation.results import Difference, Distribution, MarginBin, Row
from ec_agents.evaluation.stats import Estimate, Resampling, all_right, auroc, holm, paired_p

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
