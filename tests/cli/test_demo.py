"""The demonstration: its numbers, its picture, and the command itself."""

import io
import math
import random
import subprocess
from typing import Any

import pytest
from helpers.candidates import signals
from helpers.processes import COMMAND, run
from hypothesis import given, strategies as st
from rich.console import Console

from ec_agents.candidates import Candidate
from ec_agents.cli import demo
from ec_agents.embedded import EmbeddedChatModel, Task, make_tasks
from ec_agents.embedded.tasks import find_solution
from ec_agents.errors import SamplingError
from ec_agents.testing import Reply, ScriptedChatModel

PUZZLE = Task(family="play", prompt="make 10 from 2 3 5", numbers=(2, 3, 5), goal=10)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(COMMAND, *arguments, COLUMNS="150", OPENAI_API_KEY="none")


def call(index: int, expression: str) -> Candidate:
    return Candidate(index=index, tool_calls=[{"name": "calc", "args": {"expression": expression}}])


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 100, 0.7222, 0.8749), (0, 0, 0.0, 1.0)],
)
def test_wilson_gives_the_published_intervals(right: int, total: int, low: float, high: float):
    assert demo.wilson(right, total) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(0, 200), st.integers(0, 200))
def test_wilson_holds_the_share(right: int, wrong: int):
    low, high = demo.wilson(right, right + wrong)
    assert 0 <= low <= high <= 1
    if right + wrong:
        assert low <= right / (right + wrong) <= high


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (1, 0, 1.0), (6, 0, 2 / 64), (9, 1, 22 / 1024), (1, 9, 22 / 1024)]
)
def test_sign_test_is_exact(better: int, worse: int, p: float):
    assert demo.sign_test(better, worse) == pytest.approx(p)


@pytest.mark.parametrize(
    ("first", "centroid", "said"),
    [
        ([False] * 8, [True] * 8, "the lowest centroid helps here"),
        ([True] * 8, [False] * 8, "the lowest centroid hurts here"),
        ([True, False] * 4, [False, True] * 4, "these tasks do not show that the lowest centroid helps"),
        ([True] * 8, [True] * 8, "these tasks do not show that the lowest centroid helps"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(first: list[bool], centroid: list[bool], said: str):
    result = demo.Results(family="play", right={**demo.Results(family="").right, "first": first, "centroid": centroid})
    assert demo.verdict(result).startswith(f"play: {said} (right where the first is wrong: ")


def test_the_picture_shows_where_the_uncertainty_lies():
    early = demo.picture(signals([1.5] * 4 + [0.0] * 28), width=8)
    assert early == "█▁▁▁▁▁▁▁"
    assert demo.picture(signals([math.nan] * 4 + [0.8] * 4), width=2) == " ▅"
    assert demo.picture(signals([0.1, 0.2])) == "▁▂"
    assert demo.picture(signals([])) == demo.picture(None) == ""


def test_the_oracle_knows_which_actions_keep_the_goal_in_reach():
    oracle = demo.PlayOracle(PUZZLE)
    rows = [call(0, "5-3"), call(1, "2*5"), call(2, "5+3"), call(3, "9+9"), Candidate(index=4, content="answer 10")]
    assert oracle(rows).tolist() == [
        find_solution((2, 2), 10, random.Random(0)) is not None,
        False,
        True,
        False,
        False,
    ]
    oracle.expressions += ["5+3", "8+2"]
    assert oracle([Candidate(index=0, content="answer 10"), Candidate(index=1, content="answer 9")]).tolist() == [1, 0]


async def test_shown_task():
    """It prints candidates, choice, result and verdict."""
    replies = [
        Reply(tool_calls=[("calc", {"expression": "9*9"})], profile=".......!.."),
        Reply(tool_calls=[("calc", {"expression": "5+3"})], profile=".!........"),
        *[Reply(tool_calls=[("calc", {"expression": "8+2"})])] * 2,
        *[Reply(content="answer 10")] * 2,
    ]
    out = io.StringIO()
    await demo.show_task(ScriptedChatModel(replies=replies), PUZZLE, Console(file=out, width=120), n=2)
    text = out.getvalue()
    for expected in ("step 1", "step 3", "0.150", "0.750", "calc(5+3)", "tool: 8 left: 2 8", "answer 10", "right"):
        assert expected in text
    assert text.index("→") < text.index("calc(5+3)") < text.index("calc(9*9)")


async def test_a_task_that_never_ends_is_given_up():
    replies = [Reply(tool_calls=[("calc", {"expression": "1*1"})])] * 100
    out = io.StringIO()
    await demo.show_task(ScriptedChatModel(replies=replies), PUZZLE, Console(file=out, width=120), n=1)
    assert "given up after" in out.getvalue()
    assert "wrong" in out.getvalue()


async def test_the_summary_counts_every_policy_on_every_family():
    done: list[None] = []
    results = await demo.measure(EmbeddedChatModel(), count=2, n=3, seed=0, on_done=lambda: done.append(None))
    assert [result.family for result in results] == ["play", "solve", "plain"]
    assert len(done) == 6
    for result in results:
        assert {strategy: len(outcomes) for strategy, outcomes in result.right.items()} == dict.fromkeys(
            demo.STRATEGIES, 2
        )
        one_step = result.family != "play"
        assert not one_step or all(
            o or not f for f, o in zip(result.right["first"], result.right["oracle"], strict=True)
        )


class Flaky(EmbeddedChatModel):
    """Cannot be reached while certain tasks are asked."""

    broken: frozenset[str]

    async def _agenerate(self, messages: list[Any], *given: Any, **options: Any) -> Any:
        if messages[0].text in self.broken:
            raise ConnectionError("no route")
        return await super()._agenerate(messages, *given, **options)


async def test_a_task_that_fails_is_counted_and_the_others_go_on():
    tasks = {family: make_tasks(family, 2, seed=0) for family in ("play", "solve", "plain")}
    model = Flaky(broken=frozenset(tasks[family][1].prompt for family in ("play", "solve")))
    out = io.StringIO()
    await demo.run(model, Console(file=out, width=200), shown=0, count=2, n=2, seed=0)
    assert "play: 4 runs failed and count as not right, the first with: 0 of 1 calls succeeded" in out.getvalue()
    assert "solve: 1 runs failed and count as not right" in out.getvalue()
    assert "plain: 1 runs failed" not in out.getvalue()
    assert out.getvalue().count("/2 ") == 12
    unreachable = Flaky(broken=frozenset(task.prompt for task in tasks["play"]))
    with pytest.raises(SamplingError, match="0 of 1 calls succeeded"):
        await demo.measure(unreachable, count=2, n=2, seed=0, on_done=lambda: None)


def test_the_command_runs_on_the_embedded_model():
    done = run_command("demo", "--shown", "1", "--tasks", "2", "--n", "3")
    assert done.returncode == 0, done.stderr
    for expected in ("step 1", "final answer", "first candidate", "lowest centroid", "oracle", "sign test", "95 %"):
        assert expected in done.stdout


def test_the_command_names_what_is_wrong_in_one_line():
    alone = run_command("demo", "--model", "m")
    assert alone.returncode == 1
    assert alone.stderr.strip() == "ConfigError: --base-url and --model are needed together; only one was given"
    assert "Invalid value for '--n'" in run_command("demo", "--n", "0").stderr


def test_a_server_that_cannot_be_reached_is_one_line():
    done = run_command("demo", "--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--shown", "1", "--n", "2")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("SamplingError: 0 of 2 calls succeeded")
    assert "Traceback" not in done.stderr


def test_tasks_that_are_shown_are_not_the_ones_that_are_counted():
    shown, counted = make_tasks("play", 30, seed=1), make_tasks("play", 30, seed=0)
    assert not {task.prompt for task in shown} & {task.prompt for task in counted}
