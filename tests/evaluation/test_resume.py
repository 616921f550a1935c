"""Evaluations that are killed go on where they were: the same results as without, and no answer asked for twice."""

import asyncio
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import FORKS
from helpers.waiting import until
from langgraph.checkpoint.memory import InMemorySaver

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.embedded import EmbeddedChatModel
from ec_agents.evaluation import run as run_eval
from ec_agents.evaluation.checkers import check_embedded, check_exact
from ec_agents.evaluation.factories import embedded_agent
from ec_agents.evaluation.run import EvalRun
from ec_agents.evaluation.settings import EvalSettings
from ec_agents.evaluation.store import CHECKPOINTS, TRACE, UNDER_WAY, read_outcome_lines
from ec_agents.evaluation.table import Evaluation
from ec_agents.evaluation.tasks import EvalTask, read_tasks
from ec_agents.scoring import CentroidScorer
from ec_agents.selection import Selector
from ec_agents.testing import Reply, ScriptedChatModel, profile_logprobs
from ec_agents.trace import TraceWriter, read_trajectories

N = 2
KILLED = 9


def playing(out: Path) -> EvalRun:
    return EvalRun(
        settings=EvalSettings(tasks="play", agent="embedded", n=N, seed=0),
        tasks=read_tasks("play", limit=1)[0],
        factory=embedded_agent,
        check=check_embedded,
        selectors={"centroid": Selector(scorer=CentroidScorer())},
        out=out,
    )


def play(out: Path, dies_at: int) -> None:
    """Run the evaluation in this process, which ends without warning before its ``dies_at``-th event, if there is one.

    Events are answers of the model and everything that is written: states, pending results, steps, outcomes.
    """
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver  # noqa: PLC0415 - in the child only

    left = dies_at

    def event(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def tick(*given: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os._exit(KILLED)
            return inner(*given, **options)

        setattr(owner, name, tick)

    answer = EmbeddedChatModel._agenerate

    async def counted(self: Any, *given: Any, **options: Any) -> Any:
        with (out / "calls.txt").open("a") as file:
            file.write("call\n")
        return await answer(self, *given, **options)

    EmbeddedChatModel._agenerate = counted
    for owner, name in (
        (AsyncSqliteSaver, "aput"),
        (AsyncSqliteSaver, "aput_writes"),
        (AsyncSqliteSaver, "adelete_thread"),
        (TraceWriter, "write"),
        (run_eval, "write_outcome_line"),
        (EmbeddedChatModel, "_agenerate"),
    ):
        event(owner, name)
    out.mkdir(exist_ok=True)
    asyncio.run(playing(out).run())


def played(out: Path, dies_at: int = 0) -> int | None:
    child = FORKS.Process(target=play, args=(out, dies_at))
    child.start()
    child.join(120)
    return child.exitcode


def what_came_of_it(out: Path) -> Any:
    """The outcome and every candidate of every step, without what is made afresh in each process."""
    [(_, outcome)] = read_outcome_lines(out)
    [steps] = [found.steps for found in read_trajectories(out / TRACE) if found.run == outcome.run]
    drawn = [
        (step.number, [(c.content, [call["args"] for call in c.tool_calls]) for c in step.candidates], step.selection)
        for step in steps
    ]
    return outcome.right, outcome.usage, outcome.error, outcome.restarts, outcome.repeated, drawn


def test_killed_anywhere(tmp_path: Path):
    """An agent that is killed at any point and resumed ends as if it had not been."""
    assert played(tmp_path / "whole") == 0
    expected = what_came_of_it(tmp_path / "whole")
    assert len(expected[-1]) >= 3
    calls = len((tmp_path / "whole" / "calls.txt").read_text().splitlines())
    n_kills = 0
    for dies_at in range(2, 60, 8):
        out = tmp_path / str(dies_at)
        killed = played(out, dies_at)
        if killed == 0:
            break
        assert killed == KILLED
        n_kills += 1
        assert played(out) == 0
        assert what_came_of_it(out) == expected, dies_at
        assert len((out / "calls.txt").read_text().splitlines()) <= calls + N  # those that were under way
        assert not list((out / UNDER_WAY).iterdir())
        [left] = sqlite3.connect(out / CHECKPOINTS).execute("select count(*) from checkpoints").fetchone()
        assert not left
    assert n_kills >= 4


# Cut off within one process


def choice(content: str) -> dict[str, Any]:
    return {"message": {"content": content}, "finish_reason": "stop", "logprobs": profile_logprobs("!...")}


def an_evaluation(out: Path, factory: Callable[..., Any], n: int = 4) -> EvalRun:
    return EvalRun(
        settings=EvalSettings(tasks="file", agent="mine", n=n, seed_calls=False),
        tasks=[EvalTask(id="t", prompt="is it?", answer="yes")],
        factory=factory,
        check=check_exact,
        selectors={"centroid": Selector(scorer=CentroidScorer())},
        out=out,
    )


async def cut_off(run: EvalRun, reached: asyncio.Event) -> None:
    running = asyncio.create_task(run.run())
    await reached.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_of_a_one_step_task_every_answer_is_kept_as_it_comes(tmp_path: Path):
    stuck, asked = asyncio.Event(), Counter[int]()
    hung = {2}

    def kept() -> list[bytes]:
        return [line for path in (tmp_path / UNDER_WAY).iterdir() for line in path.read_bytes().splitlines()]

    def factory() -> Any:
        async def answer(prompt: str) -> dict[str, Any]:
            index = asked.total() % 4 if hung else 2
            asked[index] += 1
            if index in hung:
                await until(lambda: len(kept()) == 3)
                stuck.set()
                await asyncio.Event().wait()
            return choice("yes" if index else "no")

        return answer

    await cut_off(an_evaluation(tmp_path, factory), stuck)
    assert asked == {0: 1, 1: 1, 2: 1, 3: 1}
    hung.clear()
    again = an_evaluation(tmp_path, factory)
    await again.run()
    assert asked == {0: 1, 1: 1, 2: 2, 3: 1}
    [graded] = again.graded()
    assert graded.right == {0: False, 1: True, 2: True, 3: True}
    assert [c.seconds is not None for c in graded.step.candidates] == [True] * 4
    assert graded.step.seconds is None  # nobody knows
    assert not list((tmp_path / UNDER_WAY).iterdir())


async def cut_off_and_resumed(out: Path, **compiled: Any) -> tuple[Evaluation, int]:
    """A scripted agent of two steps that is cut off in the second one, and the calls of both starts together."""
    stuck, calls = asyncio.Event(), 0
    is_first = True

    def wait() -> str:
        """Wait."""
        return "waited"

    class Model(ScriptedChatModel):
        async def _agenerate(self, messages: list[Any], *given: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if len(messages) > 1 and is_first:
                stuck.set()
                await asyncio.Event().wait()
            return await super()._agenerate(messages, *given, **options)

        def _next(self, messages: list[Any], options: dict[str, Any]) -> Reply:
            return Reply(content="yes") if len(messages) > 1 else Reply(tool_calls=[("wait", {})])

    def factory(*, n: int, selector: Selector) -> Any:
        return create_centroid_agent(Model(replies=[]), [wait], n=n, selector=selector, **compiled)

    await cut_off(an_evaluation(out, factory, n=2), stuck)
    is_first = False
    again = an_evaluation(out, factory, n=2)
    await again.run()
    return again.evaluation(resamples=20), calls


async def test_a_graph_goes_on_and_what_cannot_says_what_it_repeats(tmp_path: Path):
    going_on, calls = await cut_off_and_resumed(tmp_path / "graph")
    assert (going_on.row("centroid").accuracy.value, calls) == (1.0, 6)  # two are made, two under way, two again
    assert (going_on.n_restarted, going_on.n_repeated) == (0, 0)
    anew, calls = await cut_off_and_resumed(tmp_path / "refuses", checkpointer=False)
    assert (anew.row("centroid").accuracy.value, calls) == (1.0, 8)
    assert (anew.n_restarted, anew.n_repeated) == (1, 2)


async def test_a_graph_with_a_checkpointer_of_its_own_goes_on_from_it(tmp_path: Path):
    saver = InMemorySaver()
    going_on, calls = await cut_off_and_resumed(tmp_path, checkpointer=saver)
    assert (going_on.n_restarted, calls) == (0, 6)
    assert len(list(saver.storage)) == 1  # it is the user's, and stays as it is


async def test_without_the_extra_an_agent_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "langgraph.checkpoint.sqlite.aio", None)
    anew, _ = await cut_off_and_resumed(tmp_path)
    assert (anew.n_restarted, anew.n_repeated) == (1, 2)


async def test_an_agent_that_is_a_function_begins_again(tmp_path: Path):
    stuck = asyncio.Event()
    is_first = True

    def factory(*, selector: Selector) -> Any:
        async def agent(prompt: str) -> str:
            if is_first:
                stuck.set()
                await asyncio.Event().wait()
            return "yes"

        return agent

    await cut_off(an_evaluation(tmp_path, factory), stuck)
    is_first = False
    again = an_evaluation(tmp_path, factory)
    await again.run()
    found = again.evaluation(resamples=20)
    assert (found.row("centroid").accuracy.value, found.n_restarted, found.n_repeated) == (1.0, 1, 0)


async def test_a_trace_with_one_torn_line_is_no_obstacle(tmp_path: Path):
    (tmp_path / TRACE).write_text('{"ec_agents":1,"run":"t/0/al')

    def factory() -> Any:
        async def answer(prompt: str) -> dict[str, Any]:
            return choice("yes")

        return answer

    run = an_evaluation(tmp_path, factory)
    await run.run()
    assert run.evaluation(resamples=20).row("avg@1").accuracy.value == 1.0
