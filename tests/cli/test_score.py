"""``ec-agents score``: rows, forms, files of any kind, messages."""

import csv
import io
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from ec_agents.candidates import Candidate, Step
from ec_agents.cli import main as cli
from ec_agents.cli.score import DEFAULT_SCORERS, columns, score_rows, write_file, write_rows
from ec_agents.errors import ConfigError, EcAgentsError, TraceError
from ec_agents.responses import response_candidates
from ec_agents.scoring import SCORERS, scorer_named
from ec_agents.selection import Selector
from ec_agents.testing import profile_logprobs
from ec_agents.trace import TraceWriter


def response(*profiles: str | None, **fields: Any) -> dict[str, Any]:
    choices = [
        {
            "message": {"content": f"answer {i}"},
            "finish_reason": "stop",
            "logprobs": None if profile is None else profile_logprobs(profile),
        }
        for i, profile in enumerate(profiles)
    ]
    return {"choices": choices, **fields}


def saved(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["score", *map(str, arguments)])


def test_rows_hold_what_the_scorers_say(tmp_path: Path):
    body = response("...!....", ".!......", "......!.")
    rows = list(score_rows(saved(tmp_path / "r.jsonl", body), list(SCORERS)))
    drawn = response_candidates(body)
    for name in set(SCORERS) - {"random"}:
        expected = scorer_named(name)(drawn).tolist()
        assert [row[name] for row in rows] == [None if math.isnan(score) else score for score in expected]
    choice = Selector(scorer=scorer_named(next(iter(SCORERS))))(drawn)
    assert [row["chosen"] for row in rows] == [c.index == choice.chosen for c in drawn]
    assert rows[choice.chosen]["margin_sd"] == choice.margin_sd
    assert [row["tokens"] for row in rows] == [8, 8, 8]
    assert all(list(row) == columns(list(SCORERS)) for row in rows)


def test_a_trace_gives_the_rows_of_its_steps(tmp_path: Path):
    path = tmp_path / "t.jsonl.zst"
    with TraceWriter(path) as trace:
        for number in range(2):
            drawn = response_candidates(response(".!...", "...!."))
            trace.write(Step(run="a", number=number, candidates=drawn, failures={2: "TimeoutError: late"}))
    rows = list(score_rows(path))
    assert [(row["step"], row["candidate"], row["chosen"]) for row in rows] == [
        (0, 0, True),
        (0, 1, False),
        (0, 2, False),
        (1, 0, True),
        (1, 1, False),
        (1, 2, False),
    ]
    assert rows[2]["flaws"] == "TimeoutError: late"
    assert rows[2]["centroid"] is None


def test_nothing_to_score(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Where nothing can be scored, nothing is chosen and nothing is logged."""
    with caplog.at_level(logging.DEBUG):
        rows = list(score_rows(saved(tmp_path / "r.jsonl", response(None, None)), ["centroid", "majority"]))
    assert [(row["chosen"], row["centroid"], row["flaws"]) for row in rows] == [(False, None, "no_signal")] * 2
    assert [row["majority"] for row in rows] == [1, 1]
    assert caplog.text == ""


def test_flaws_are_named(tmp_path: Path):
    body = response("!..", ".!.")
    body["choices"][0]["finish_reason"] = "length"
    rows = list(score_rows(saved(tmp_path / "r.jsonl", body), ["centroid"]))
    assert [(row["flaws"], row["chosen"]) for row in rows] == [("truncated", False), ("", True)]


def test_forms_say_the_same(tmp_path: Path):
    path = saved(tmp_path / "r.jsonl", response("!...", "..!."), {"error": {"code": 429}})
    rows = list(score_rows(path))
    written: dict[str, str] = {}
    for form in ("table", "csv", "jsonl"):
        out = io.StringIO()
        assert write_rows(rows, DEFAULT_SCORERS, out, form) == 3
        written[form] = out.getvalue()
    assert [json.loads(line) for line in written["jsonl"].splitlines()] == rows
    table = list(csv.DictReader(io.StringIO(written["csv"])))
    assert [float(row["centroid"]) for row in table[:2]] == [row["centroid"] for row in rows[:2]]
    assert table[2]["centroid"] == ""
    lines = written["table"].splitlines()
    assert len(lines) == 4
    assert lines[0].split() == columns(DEFAULT_SCORERS)
    assert lines[1].split()[:6] == ["record", "1", "0", "0", "yes", "4"]


def test_hostile_texts_stay_in_their_cell(tmp_path: Path):
    drawn = [Candidate(index=0, content="x", flaws={'a,"b\n=1+1': "found"})]
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as trace:
        trace.write(Step(run='r,"\n\x1b[31m', candidates=drawn))
    out = io.StringIO()
    write_rows(score_rows(path), DEFAULT_SCORERS, out, "csv")
    [row] = csv.DictReader(io.StringIO(out.getvalue()))
    assert row["run"] == 'r,"\n\x1b[31m'
    out = io.StringIO()
    write_rows(score_rows(path), DEFAULT_SCORERS, out, "table")
    assert "\x1b" not in out.getvalue()
    assert len(out.getvalue().splitlines()) == 2


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", " =1", "\r=1", "plain", "a=1"]
)
def test_csv_is_safe_in_spreadsheets(tmp_path: Path, text: str):
    """A text that a spreadsheet would evaluate begins with an apostrophe; numbers stay numbers."""
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as trace:
        trace.write(Step(run=text, candidates=response_candidates(response("!..", ".!.")), failures={2: text}))
    write_file(tmp_path / "s.csv", score_rows(path, ["mean-logprob"]), ["mean-logprob"])
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    safe = text if text in {"plain", "a=1"} else f"'{text}".replace("\r", "\n")
    assert [row["run"] for row in rows] == [safe] * 3
    assert rows[2]["flaws"] == safe
    assert float(rows[0]["mean-logprob"]) < 0


# The command


def test_the_command_prints_a_table_and_stops_where_it_was_told(tmp_path: Path):
    path = saved(tmp_path / "r.jsonl", *[response("!..", ".!.")] * 3)
    assert len(run(path).stdout.splitlines()) == 7
    shown = run(path, "--rows", 4).stdout.splitlines()
    assert len(shown) == 6
    assert "--rows 0 prints all" in shown[-1]
    assert len(run(path, "--rows", 6).stdout.splitlines()) == 7
    assert len(run(path, "--rows", 0).stdout.splitlines()) == 7


def test_the_command_groups_picks_scorers_and_writes_files(tmp_path: Path):
    bodies = [response(profile, problem=f"p{i % 2}") for i, profile in enumerate(["!..", ".!.", "..!", "..!"])]
    path = saved(tmp_path / "r.jsonl", *bodies)
    out = tmp_path / "scores.csv"
    result = run(path, "--group-by", "problem", "--scorer", "max-entropy", "--scorer", "centroid", "--out", out)
    assert result.stdout == f"4 rows written to {out}\n"
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [(row["run"], row["candidate"]) for row in rows] == [("p0", "0"), ("p0", "1"), ("p1", "0"), ("p1", "1")]
    assert list(rows[0])[5:7] == ["max-entropy", "centroid"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--scorer", "centriod"], ConfigError, "no scorer is called 'centriod'; known: centroid, "),
        (["--out", "x.xlsx"], ConfigError, "rows can be written to a .csv or .jsonl file; found 'x.xlsx'"),
        (["--group-by", "task"], TraceError, "record 1: it has no field 'task' to group by"),
    ],
)
def test_wrong_use_is_one_line_that_says_what_to_do(
    tmp_path: Path, arguments: Sequence[str], error: type[EcAgentsError], message: str
):
    result = run(saved(tmp_path / "r.jsonl", response("!..")), *arguments)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    with pytest.raises(ConfigError, match="at least one scorer is needed"):
        score_rows(tmp_path / "r.jsonl", [])
    with pytest.raises(ConfigError, match="rows can be written as table, csv, jsonl; found 'xml'"):
        write_rows([], DEFAULT_SCORERS, io.StringIO(), "xml")


def test_an_existing_table_survives_a_file_that_cannot_be_read(tmp_path: Path):
    out = tmp_path / "scores.csv"
    out.write_text("precious")
    with pytest.raises(TraceError, match="cannot be read"):
        write_file(out, score_rows(tmp_path / "nowhere.jsonl"), DEFAULT_SCORERS)
    assert out.read_text() == "precious"


VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    10**30,
    1e308,
    math.nan,
    math.inf,
    "",
    "\x1b[31m",
    "\ud800",
    [],
    {},
    [None],
    10**12,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys or indexes."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@pytest.mark.parametrize("seed", range(8))
def test_commands_on_edited_traces(tmp_path: Path, seed: int):
    """A trace in which one value is replaced or removed is read, or refused in one line; never a traceback."""
    drawn = response_candidates(response("!...", "..!.", "...!"))
    path, random = tmp_path / "trace.jsonl", Random(seed)
    with TraceWriter(path) as trace:
        trace.write(Step(run="r", task="t", candidates=drawn, selection=Selector()(drawn), failures={3: "late"}))
    commands = [["score", str(path)], ["report", str(path), "--out", str(tmp_path / "report.html")]]
    assert [CliRunner().invoke(cli.app, command).exit_code for command in commands] == [0, 0]
    whole = path.read_text(encoding="utf-8")
    for _ in range(12):
        record = json.loads(whole)
        inside, key = random.choice(places(record))
        if random.random() < 0.2:
            del inside[key]
        else:
            inside[key] = random.choice(VALUES)
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        for command in commands:
            error = CliRunner().invoke(cli.app, command).exception
            assert error is None or isinstance(error, TraceError), (record, error)
            assert "\n" not in str(error)
