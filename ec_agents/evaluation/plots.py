"""The charts of an evaluation as files, for papers and slides (extra ``plot``)."""

from io import BytesIO
from pathlib import Path
from typing import Any

from ec_agents.evaluation.charts import Chart, accuracy_by_n, gain_by_tokens, shown_rows
from ec_agents.evaluation.table import Evaluation
from ec_agents.files import make_folder, replacing

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
except ImportError as error:
    raise ImportError(f"plots need the extra 'plot' ({error}): pip install 'ec-agents[plot]'") from error

DASHES = {"reference r0": ":", "reference r1": "--", "reference r2": "-."}
"""Line style of each reference."""
FORMATS = ("png", "svg")


def write_plots(evaluation: Evaluation, folder: str | Path) -> list[Path]:
    """Write accuracy with intervals, accuracy against N, and gain against tokens, each as PNG and SVG.

    Of whole runs, only the first chart exists.

    Args:
        evaluation: The table.
        folder: Folder of the files; it is made if it does not exist.

    Returns:
        The files.

    Raises:
        WriteError: A file cannot be written.
    """
    make_folder(folder)
    charts = {"accuracy_by_n": accuracy_by_n(evaluation), "gain_by_tokens": gain_by_tokens(evaluation)}
    figures = {"accuracy": _intervals(evaluation), **{n: _lines(chart) for n, chart in charts.items() if chart}}
    written: list[Path] = []
    for name, figure in figures.items():
        for form in FORMATS:
            picture = BytesIO()
            figure.savefig(picture, dpi=160, format=form)
            written.append(Path(folder) / f"{name}.{form}")
            with replacing(written[-1], "wb") as file:
                file.write(picture.getvalue())
    return written


def _intervals(evaluation: Evaluation) -> Any:
    """Accuracy of each selector with its interval."""
    figure, axes = _figure()
    rows = [row for row, _ in shown_rows(evaluation)]
    places = range(len(rows))
    values = [row.accuracy.value for row in rows]
    errors = [[r.accuracy.value - r.accuracy.low for r in rows], [r.accuracy.high - r.accuracy.value for r in rows]]
    axes.errorbar(values, places, xerr=errors, fmt="o", capsize=3)
    axes.set_yticks(places, [row.selector for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.grid(axis="x", alpha=0.3)
    return figure


def _lines(chart: Chart) -> Any:
    figure, axes = _figure()
    for series in chart.series:
        dashes = DASHES.get(series.style)
        style: dict[str, Any] = {"linestyle": dashes, "color": "0.4"} if dashes else {"marker": "o"}
        axes.plot(*zip(*series.points, strict=True), label=series.name, markersize=4, **style)
    if chart.is_log:
        axes.set_xscale("log", base=2)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _figure() -> tuple[Any, Any]:
    figure: Any = Figure(figsize=(6.4, 4.2), layout="constrained")
    return figure, figure.subplots()
