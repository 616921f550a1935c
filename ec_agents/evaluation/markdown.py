"""An evaluation as Markdown tables, for documentation and for pull requests."""

from collections.abc import Sequence
from pathlib import Path

from ec_agents.evaluation.stats import Estimate
from ec_agents.evaluation.table import Difference, Evaluation, Row

Cells = Sequence[str]


def write_markdown(evaluation: Evaluation, path: str | Path, *, title: str = "Evaluation", command: str = "") -> None:
    """Write the results, the results by length, the curves over N and the costs as one Markdown file.

    Args:
        evaluation: The table.
        path: The file.
        title: Its heading.
        command: What made it, for readers who want to make it again.
    """
    parts = [f"# {title}", _heading(evaluation), *([f"```console\n$ {command}\n```"] if command else [])]
    parts.append(_results(evaluation))
    if evaluation.lengths:
        short, long = (f"{cut:g}" for cut in evaluation.lengths)
        unit = "median tokens of a candidate" if evaluation.n_candidates else "mean output tokens of a task's runs"
        parts += [
            "## By length",
            f"Right, in thirds by {unit}: to {short}, to {long}, and beyond.",
            _lengths(evaluation),
        ]
    if any(row.curve for row in evaluation.rows):
        parts += ["## By number of candidates", "Right, had only so many been drawn.", _curves(evaluation)]
    Path(path).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _heading(evaluation: Evaluation) -> str:
    what = f"draws of {evaluation.n_candidates} candidates" if evaluation.n_candidates else "runs of each selector"
    again = ""
    if evaluation.n_restarted:
        again = (
            f" {evaluation.n_restarted} runs were cut off and begun again; "
            f"{evaluation.n_repeated} recorded calls were made twice."
        )
    return (
        f"{evaluation.n_tasks} tasks, {evaluation.n_draws} {what}, {evaluation.n_failed} failed calls or runs, which "
        f"count as not right.{again} Right in percent, with {evaluation.level:.0%} intervals from a bootstrap over "
        f"tasks ({evaluation.resamples} draws, seed {evaluation.seed}). Differences in points, paired by task; "
        "two-sided p, Holm-corrected for all comparisons of the table; bold: p < 0.05."
    )


def _results(evaluation: Evaluation) -> str:
    names = [name for name in evaluation.baselines if any(name in row.versus for row in evaluation.rows)]
    header = ["selector", "right", *(f"against {name}" for name in names), "AUROC in a task", "tokens per solved"]
    return _table(header, [_cells(row, names) for row in evaluation.rows])


def _cells(row: Row, baselines: Sequence[str]) -> Cells:
    return [
        row.selector,
        _share(row.accuracy),
        *(_difference(row.versus.get(name)) for name in baselines),
        "" if row.auroc_within is None else f"{row.auroc_within.value:.2f}",
        "" if row.tokens_per_solved is None else f"{row.tokens_per_solved:.0f}",
    ]


def _lengths(evaluation: Evaluation) -> str:
    rows = [[row.selector, *map(_share, row.by_length)] for row in evaluation.rows]
    return _table(["selector", "short", "middling", "long"], rows)


def _curves(evaluation: Evaluation) -> str:
    points = sorted({n for row in evaluation.rows for n in row.curve if not n & (n - 1)} | {evaluation.n_candidates})
    rows = [
        [row.selector, *(f"{100 * row.curve[n]:.1f}" if n in row.curve else "" for n in points)]
        for row in evaluation.rows
        if row.curve
    ]
    return _table(["selector", *map(str, points)], rows)


def _share(found: Estimate | None) -> str:
    return "" if found is None else f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    p = "p < 0.001" if found.p_holm < 0.001 else f"p = {found.p_holm:.2g}"
    text = f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"**{text}**, {p}" if found.p_holm < 0.05 else f"{text}, {p}"


def _table(header: Cells, rows: Sequence[Cells]) -> str:
    rule = ["---", *("--:" for _ in header[1:])]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in (header, rule, *rows)]
    return "\n".join(f"| {line} |" for line in lines)
