"""Evaluations as Markdown: whole tables whatever the names, and nothing that is not in the evaluation."""

from pathlib import Path

import numpy as np
from helpers.graded import SIZE, noise

from ec_agents.evaluation.comparison import evaluate, evaluate_runs
from ec_agents.evaluation.markdown import write_markdown
from ec_agents.evaluation.outcomes import RunOutcome


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table of a Markdown text."""
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    return [[row.replace("\\|", "¦")[2:-2].split(" | ") for row in block.strip().split("\n")] for block in blocks]


def test_every_row_is_in_every_table(tmp_path: Path):
    found = evaluate(
        noise(40, 6, np.random.default_rng(0)), {"a|b": SIZE}, baselines=("first", "majority"), resamples=50, seed=3
    )
    write_markdown(found, tmp_path / "r.md", title="solve", command="ec-agents eval solve --out r")
    text = (tmp_path / "r.md").read_text()
    assert text.startswith("# solve\n\n40 tasks, 40 steps of 6 candidates, 0 failed calls or runs")
    assert "(50 resamples, seed 3)" in text
    assert "```console\n$ ec-agents eval solve --out r\n```" in text
    results, lengths, curves = tables(text)
    names = [row.selector.replace("|", "¦") for row in found.rows]
    for table in (results, lengths, curves):
        assert [cells[0] for cells in table[2:]] == names
        assert len({len(cells) for cells in table}) == 1
    assert results[0][2:4] == ["against first", "against majority"]
    assert curves[0][1:] == ["1", "2", "4", "6"]
    own = found.row("a|b")
    share = f"{100 * own.accuracy.value:.1f} [{100 * own.accuracy.low:.1f}, {100 * own.accuracy.high:.1f}]"
    assert results[2 + names.index("a¦b")][1] == share


def test_differences_say_how_sure_they_are(tmp_path: Path):
    runs = [
        RunOutcome(task=f"t{i}", selector=arm, right=arm == "good", restarts=1, repeated=4)
        for arm in ("first", "good")
        for i in range(30)
    ]
    found = evaluate_runs(runs, resamples=50)
    write_markdown(found, tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    assert "| good | 100.0 [88.4, 100.0] | **+100.0 [+100.0, +100.0]**, p < 0.001 |" in text
    assert "60 interrupted runs were started over; 240 recorded calls were repeated." in text
    assert "## By" not in text
