"""The command line as a whole: light help, the names that options take, clear errors."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.graded import SIZE, noise
from helpers.processes import COMMAND, run
from typer.testing import CliRunner

import ec_agents
from ec_agents.candidates import Candidate, Step
from ec_agents.cli import main as cli
from ec_agents.cli.options import SCORER_NAMES, EvalOptions
from ec_agents.errors import ConfigError, TraceError, WriteError
from ec_agents.evaluation.comparison import evaluate
from ec_agents.evaluation.run import EvalRun
from ec_agents.evaluation.settings import BASELINES, EvalSettings
from ec_agents.scoring import SCORERS
from ec_agents.trace import TraceWriter

HEAVY = ("numpy", "langchain_core", "langgraph", "openai", "scipy", "jinja2", "matplotlib", "httpx")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as writer:
        writer.write(Step(run="a", candidates=[Candidate(index=0, content="x")]))
    return path


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """The directory of an evaluation."""
    folder = tmp_path / "mine"
    folder.mkdir()
    evaluate(noise(8, 4, np.random.default_rng(0)), {"own": SIZE}, resamples=10).save(folder / "evaluation.json")
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["eval", "--help"], ["score", "--help"]])
def test_help_is_light(arguments: list[str]):
    """Help and version import none of the frameworks."""
    code = (
        "import sys\nfrom ec_agents.cli.main import main\n"
        f"try: main()\nexcept SystemExit as ended: assert not ended.code\n"
        f"print('heavy:', *({set(HEAVY)!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "heavy:", done.stderr


def test_version():
    assert invoke("--version").stdout == f"ec-agents {ec_agents.__version__}\n"


@pytest.mark.parametrize(("command", "names"), [("eval", [*SCORERS, "all", "exact", "math"]), ("score", SCORERS)])
def test_help_lists_names(command: str, names: Any):
    text = re.sub(r"[│\s]+", " ", invoke(command, "--help").stdout)
    assert [name for name in names if name not in text] == []


def test_names_in_help_are_the_scorers():
    assert ", ".join(SCORERS) == SCORER_NAMES


def test_one_set_of_defaults():
    """The command's defaults are those of the Python interface."""
    options = EvalOptions(tasks="solve", out=Path("x"))
    settings = EvalSettings(tasks="solve", agent="embedded")
    assert (options.n, options.seed, options.top_logprobs) == (settings.n, settings.seed, settings.top_logprobs)
    assert tuple(options.baseline) == BASELINES
    defaults = {f.name: f.default for f in fields(EvalRun)}
    assert (options.trials, options.concurrency) == (defaults["trials"], defaults["concurrency"])
    text = re.sub(r"[│\s]+", " ", invoke("eval", "--help").stdout)
    assert all(f"--{f.name.replace('_', '-')}" in text for f in fields(EvalOptions) if f.name != "tasks")


# report


def test_report_keeps_what_exists(tmp_path: Path):
    """A source that cannot be read does not touch the report of yesterday."""
    out = tmp_path / "report.html"
    out.write_text("precious")
    result = invoke("report", tmp_path / "missing.jsonl", "--out", out)
    assert isinstance(result.exception, TraceError)
    bad = tmp_path / "evaluation.json"
    bad.write_text("{}")
    assert isinstance(invoke("report", bad, "--out", out).exception, ConfigError)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "report.html"]


def test_report_takes_a_directory(tmp_path: Path, evaluation: Path, trace: Path):
    out = tmp_path / "r.html"
    assert invoke("report", evaluation, "--out", out).stdout == f"{out}\n"
    assert "<h1>mine</h1>" in out.read_text()
    only_trace = tmp_path / "traced"
    only_trace.mkdir()
    trace.rename(only_trace / "trace.jsonl")
    assert invoke("report", only_trace, "--out", out).exit_code == 0
    assert "<h1>trace.jsonl</h1>" in out.read_text()
    result = invoke("report", tmp_path, "--out", out)
    assert "has neither evaluation.json nor trace.jsonl" in str(result.exception)


def test_report_forms(tmp_path: Path, evaluation: Path, trace: Path):
    """Another suffix is refused before anything is read; Markdown and charts need an evaluation."""
    for source, options, message in (
        (evaluation, ["--out", tmp_path / "r.pdf"], "--out must end in .html or .md; found 'r.pdf'"),
        (trace, ["--out", tmp_path / "r.md"], "need an evaluation"),
        (trace, ["--out", tmp_path / "r.html", "--plots", tmp_path / "p"], "need an evaluation"),
    ):
        result = invoke("report", source, *options)
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)
    assert not list(tmp_path.glob("r.*"))
    assert invoke("report", evaluation, "--out", tmp_path / "r.md").exit_code == 0
    assert (tmp_path / "r.md").read_text().startswith("# mine\n")


def test_report_needs_its_extra_only(tmp_path: Path, evaluation: Path, trace: Path):
    """Without the extras of evaluations and charts, saved ones are shown all the same."""
    extras = ["scipy", "matplotlib", "langgraph.checkpoint.sqlite", "langchain", "aiohttp", "zstandard"]
    for source in (evaluation, trace):
        done = run(COMMAND, "report", source, "--out", tmp_path / "r.html", without=extras)
        assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'r.html'}\n"), done.stderr
    done = run(COMMAND, "eval", "solve", "--out", tmp_path / "e", without=extras)
    assert done.returncode == 1
    assert "evaluations need the extra 'eval'" in done.stderr
    assert not (tmp_path / "e").exists()


# Paths that cannot be written


@pytest.mark.parametrize("command", ["score", "report", "eval", "replay"])
def test_bad_out_is_one_line(tmp_path: Path, trace: Path, command: str):
    (tmp_path / "file").write_text("")
    outcomes = tmp_path / "o.jsonl"
    outcomes.write_text(json.dumps({"run": "a", "right": True}))
    bad = tmp_path / "file" / "x.csv"
    arguments = {
        "score": ["score", trace, "--out", bad],
        "report": ["report", trace, "--out", bad.with_suffix(".html")],
        "eval": ["eval", "solve", "--limit", 1, "--n", 1, "--out", bad],
        "replay": ["eval", trace, "--outcomes", outcomes, "--out", bad],
    }[command]
    error = invoke(*arguments).exception
    assert isinstance(error, WriteError)
    assert str(error).endswith("cannot be written: Not a directory")


FULL = """
import os, errno, sys
def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.fsync = full
from ec_agents.cli.main import main
main()
"""


@pytest.mark.parametrize("command", ["score", "report", "eval", "replay"])
def test_full_disk_is_one_line(tmp_path: Path, trace: Path, command: str):
    outcomes = tmp_path / "o.jsonl"
    outcomes.write_text(json.dumps({"run": "a", "right": True}))
    out = tmp_path / "out"
    done = run(
        FULL,
        *{
            "score": ["score", trace, "--out", f"{out}.csv"],
            "report": ["report", trace, "--out", f"{out}.html"],
            "eval": ["eval", "solve", "--limit", 1, "--n", 1, "--out", out],
            "replay": ["eval", trace, "--outcomes", outcomes, "--out", out],
        }[command],
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"WriteError: \S+ cannot be written: No space left on device", last), done.stderr
    assert "Traceback" not in done.stderr


def test_errors_are_filtered(tmp_path: Path):
    """A field of a file reaches the terminal through an error message, in one printable line."""
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": 1, "x": "\x9b31m\u202e"}\n', encoding="utf-8")
    done = run(COMMAND, "eval", path, "--agent", "json:loads", "--out", tmp_path / "e")
    assert done.stderr.startswith("ConfigError: ")
    assert done.stderr.count("\n") == 1
    assert not set(done.stderr) & {"\x9b", "\u202e"}
