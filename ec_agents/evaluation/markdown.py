"""An evaluation as Markdown tables, for documentation and for pull requests."""

from collections.abc import Sequence
from pathlib import Path

from ec_agents.evaluation.stats import Estimate
from ec_agents.evaluation.table import Difference, Evaluation, Row
from ec_agents.files import replace_text

Cells = Sequence[str]


def write_markdown(evaluation: Evaluation, path: str | Path, *, title: str = "Evaluation", command: str = "") -> None:
    """Write the results, the results by length, the curves over N and the costs as one Markdown file.

    Args:
        evaluation: The table.
        path: The file.
        title: Its heading.
        command: The command that made it, for readers who want to reproduce it.

    Raises:
        WriteError: The file cannot be written.
    """
    parts = [f"# {title}", _heading(evaluation), *([f"```console\n$ {command}\n```"] if command else [])]
    parts += [*(f"**Note:** {note}" for note in evaluation.notes), _results(evaluation)]
    if evaluation.lengths:
        short, long = (f"{cut:g}" for cut in evaluation.lengths)
        unit = "median tokens of a candidate" if evaluation.n_candidates else "mean output tokens of a task's runs"
        parts += [
            "## By length",
            f"Right answers in percent, in thirds by {unit}: up to {short}, up to {long}, and above.",
            _lengths(evaluation),
        ]
    if any(row.curve for row in evaluation.rows):
        parts += [
            "## By number of candidates",
            "Right answers in percent, with only so many candidates.",
            _curves(evaluation),
        ]
    replace_text(path, "\n\n".join(parts) + "\n")


def _heading(evaluation: Evaluation) -> str:
    what = f"steps of {evaluation.n_candidates} candidates" if evaluation.n_candidates else "runs of each selector"
    again = ""
    if evaluation.n_restarted:
        again = (
            f" {evaluation.n_restarted} interrupted runs were started over; "
            f"{evaluation.n_repeated} recorded calls were repeated."
        )
    return (
        f"{evaluation.n_tasks} tasks, {evaluation.n_draws} {what}, {evaluation.n_failed} failed calls or runs, which "
        f"count as not right.{again} Right answers in percent, with {evaluation.level:.0%} intervals from a bootstrap "
        f"over tasks ({evaluation.resamples} resamples, seed {evaluation.seed}). Differences in points, paired by "
        "task, each with the interval of a single comparison; two-sided p, Holm-corrected for all comparisons of the "
        f"table, so that an interval may exclude 0 where p does not agree; bold: p < 0.05.{_diversity(evaluation)}"
    )


def _diversity(evaluation: Evaluation) -> str:
    if evaluation.equal is None or evaluation.effective_n is None:
        return ""
    return (
        f" Diversity: {_share(evaluation.equal)} % of the pairs of candidates give the same answer (compared: "
        f"{evaluation.answer}); effective N {evaluation.effective_n.value:.1f} of {evaluation.n_candidates}."
    )


def _results(evaluation: Evaluation) -> str:
    names = evaluation.compared
    header = ["selector", "right", *(f"against {name}" for name in names), "AUROC within a task", "tokens per solved"]
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
    return _table(["selector", "short", "medium", "long"], rows)


def _curves(evaluation: Evaluation) -> str:
    points = sorted({n for row in evaluation.rows for n in row.curve if not n & (n - 1)} | {evaluation.n_candidates})
    rows = [[row.selector, *(_share(row.curve.get(n)) for n in points)] for row in evaluation.rows if row.curve]
    return _table(["selector", *map(str, points)], rows)


def _share(share: Estimate | None) -> str:
    return "" if share is None else f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    p = "p < 0.001" if difference.p_holm < 0.001 else f"p = {difference.p_holm:.2g}"
    text = f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return f"**{text}**, {p}" if difference.p_holm < 0.05 else f"{text}, {p}"


def _table(header: Cells, rows: Sequence[Cells]) -> str:
    rule = ["---", *("--:" for _ in header[1:])]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in (header, rule, *rows)]
    return "\n".join(f"| {line} |" for line in lines)
