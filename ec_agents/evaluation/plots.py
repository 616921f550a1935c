"""The charts of an evaluation as files, for papers and slides (extra ``plot``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ec_agents.evaluation.table import Evaluation, Row

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f"plots need the extra 'plot' ({error}): pip install 'ec-agents[plot]'") from error

REFERENCES = {"oracle": ":", "majority": "--", "random": "-."}
"""Rows that every chart shows, and their line style."""
FORMATS = ("png", "svg")


def write_plots(evaluation: Evaluation, folder: str | Path, *, most: int = 6) -> list[Path]:
    """Write accuracy against N, gain against tokens, and accuracy with intervals, each as PNG and SVG.

    Args:
        evaluation: A table; of whole runs only the last chart can be drawn.
        folder: Where to; it is made if it is not there.
        most: Selectors in a chart, besides oracle, majority and random.

    Returns:
        The files.
    """
    own = [row for row in evaluation.rows if row.selector not in {*REFERENCES, "avg@1", "first"}][:most]
    rows = [*own, *(row for row in evaluation.rows if row.selector in REFERENCES)]
    charts = {"accuracy": _intervals, "accuracy_by_n": _by_n, "gain_by_tokens": _by_tokens}
    written: list[Path] = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, draw in charts.items():
        figure: Any = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        if not draw(axes, rows, evaluation):
            continue
        for suffix in FORMATS:
            written.append(Path(folder) / f"{name}.{suffix}")
            figure.savefig(written[-1], dpi=160)
    return written


def _intervals(axes: Any, rows: Sequence[Row], evaluation: Evaluation) -> bool:  # noqa: ARG001 - one form for all
    """Accuracy of each selector with its interval."""
    places = range(len(rows))
    values = [row.accuracy.value for row in rows]
    errors = [[r.accuracy.value - r.accuracy.low for r in rows], [r.accuracy.high - r.accuracy.value for r in rows]]
    axes.errorbar(values, places, xerr=errors, fmt="o", capsize=3)
    axes.set_yticks(places, [row.selector for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("right")
    axes.grid(axis="x", alpha=0.3)
    return True


def _by_n(axes: Any, rows: Sequence[Row], evaluation: Evaluation) -> bool:  # noqa: ARG001 - one form for all
    """Accuracy against the number of candidates."""
    shown = [(row, list(row.curve), list(row.curve.values())) for row in rows if len(row.curve) > 1]
    return _lines(axes, shown, "candidates drawn", "right")


def _by_tokens(axes: Any, rows: Sequence[Row], evaluation: Evaluation) -> bool:
    """Gain over a single call against the tokens of a task."""
    single = evaluation.row("avg@1").accuracy.value if evaluation.n_candidates else 0.0
    shown = [
        (row, [row.tokens * n / max(row.curve) for n in row.curve], [value - single for value in row.curve.values()])
        for row in rows
        if len(row.curve) > 1 and row.tokens and row.selector != "random"
    ]
    return _lines(axes, shown, "tokens a task", "gain over a single call")


def _lines(axes: Any, shown: Sequence[tuple[Row, list[Any], list[float]]], x_label: str, y_label: str) -> bool:
    for row, x, y in shown:
        is_reference = row.selector in REFERENCES
        style = {"linestyle": REFERENCES[row.selector], "color": "0.4"} if is_reference else {"marker": "o"}
        axes.plot(x, y, label=row.selector, markersize=4, **style)
    if shown:
        axes.set_xscale("log", base=2)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return bool(shown)
