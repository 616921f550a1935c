"""Every fault of the server, with 1, 8 and 64 candidates, in an agent and in a step of one's own.

The step ends, chooses a sound answer or raises, says what happened, and leaks nothing.
"""

# pyright: reportArgumentType=false

import asyncio
import gc
import math
import threading
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import openai
import pytest

import ec_agents.testing.server
from ec_agents.errors import EcAgentsError, LogprobsMalformed, LogprobsMissing, SamplingError
from ec_agents.graph import create_centroid_agent
from ec_agents.messages import decision_record, message_candidate
from ec_agents.openai_client import OpenAIChatModel
from ec_agents.sampling import sample
from ec_agents.selection import Selector
from ec_agents.testing import FAULTS, Fault, FaultServer, Reply

FAILURES: Mapping[str, type[BaseException]] = {
    "hang": TimeoutError,
    "status_429": openai.RateLimitError,
    "retry_after": openai.RateLimitError,
    "status_500": openai.InternalServerError,
    "status_503": openai.InternalServerError,
    "disconnect": openai.APIConnectionError,
    "truncated_json": LogprobsMalformed,
    "html_page": LogprobsMalformed,
    "invalid_utf8": LogprobsMalformed,
    "empty_choices": LogprobsMalformed,
}
"""What a call raises that meets the fault."""
FLAWS = {
    "null_logprobs": "no_signal",
    "no_top_logprobs": "no_signal",
    "unmeasured_tool_calls": "no_signal",
    "refusal": "refused",
    "length": "truncated",
}
"""What is wrong with a candidate that meets the fault. All other faults do no harm."""
QUICK = {"straggler": 0.15, "latency": 0.05}

Run = Callable[[OpenAIChatModel, int, float], Any]


async def plain(model: OpenAIChatModel, n: int, seconds: float) -> dict[str, Any]:
    """The record of a step of one's own."""
    asking = model.bind(logprobs=True, top_logprobs=4)
    drawn = await sample(lambda _: asking.ainvoke("hi"), n=n, timeout=seconds, parse=message_candidate)
    selection = Selector()(drawn.candidates)
    assert [c.index for c in drawn.candidates] == sorted(drawn.messages)
    return decision_record(drawn, selection)


async def graph(model: OpenAIChatModel, n: int, seconds: float) -> dict[str, Any]:
    """The record of a step of an agent."""
    agent = create_centroid_agent(model, n=n, timeout=seconds, top_logprobs=4)
    state = await agent.ainvoke({"messages": [("user", "hi")]})
    return state["messages"][-1].response_metadata["ec_agents"]


async def watched(run: Run, model: OpenAIChatModel, n: int, seconds: float) -> Any:
    """The record, or the error of the step; and no task is left."""
    before = asyncio.all_tasks()
    try:
        return await run(model, n, seconds)
    except EcAgentsError as error:
        return error
    finally:
        assert asyncio.all_tasks() == before


def settle(done: Callable[[], bool]) -> None:
    """Wait until it is so; the server runs in another thread."""
    pause = threading.Event()
    for _ in range(500):
        if done():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come to that within 5 s")


def step(run: Run, faults: list[Any], n: int, timeout: float = 30.0) -> Any:
    """What a step comes to on a server with these faults; no connection is left."""
    with FaultServer([Reply(content="hello", profile="!...")], faults=faults) as server:
        model = OpenAIChatModel(model="any", base_url=server.base_url, api_key="none", max_retries=0)
        outcome = asyncio.run(watched(run, model, n, timeout))
        settle(lambda: server.connections == 0 and server.in_flight == 0)
        assert len(server.requests) == n
        return outcome


def fault(name: str) -> Fault:
    return replace(FAULTS[name], delay=QUICK.get(name, FAULTS[name].delay))


@pytest.fixture
def n(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many candidates; with more than one, big bodies have 1 MB instead of 20 so that the tests stay quick."""
    if request.param > 1:
        monkeypatch.setattr(ec_agents.testing.server, "BIG_BODY", 1_000_000)
    return request.param


@pytest.mark.parametrize("run", [plain, graph])
@pytest.mark.parametrize("n", [1, 8, 64], indirect=True)
@pytest.mark.parametrize("name", FAULTS)
def test_a_step_on_a_faulty_server(name: str, n: int, run: Run):
    faulty = (n + 3) // 4
    outcome = step(run, [fault(name), None, None, None], n, 4.0 if name == "hang" else 30.0)
    if name in FAILURES and n == 1:
        assert isinstance(outcome, SamplingError)
        assert isinstance(outcome.failures[0], FAILURES[name])
        assert str(outcome).startswith("0 of 1 calls succeeded, 1 needed")
        return
    if n == 1 and FLAWS.get(name) == "no_signal" and run is graph:
        assert isinstance(outcome, LogprobsMissing)
        return
    failures, flaws, scores = outcome["failures"], outcome["flaws"], outcome["scores"]
    if name in FAILURES:
        assert len(failures) == faulty
        assert all(text.startswith(FAILURES[name].__name__) for text in failures.values())
        assert not flaws
    elif name in FLAWS:
        assert len(flaws) == faulty
        assert all(FLAWS[name] in found for found in flaws.values())
        assert not failures
    else:
        assert not failures
        assert not flaws
    assert len(failures) + len(scores) == n
    if n > 1:
        chosen = str(outcome["chosen"])
        assert chosen not in {*failures, *flaws}
        assert scores[chosen] is not None
        assert outcome["usage"]["output_tokens"] >= 4 * (n - faulty)


@pytest.mark.parametrize("run", [plain, graph])
@pytest.mark.parametrize("name", FAULTS)
def test_a_step_on_which_every_call_meets_the_fault(name: str, run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ec_agents.testing.server, "BIG_BODY", 1_000_000)
    outcome = step(run, [fault(name)], 2, 0.4 if name == "hang" else 30.0)
    if name in FAILURES:
        assert isinstance(outcome, SamplingError)
        assert {type(failure) for failure in outcome.failures.values()} == {FAILURES[name]}
    elif FLAWS.get(name) == "no_signal" and run is graph:
        assert isinstance(outcome, LogprobsMissing)
    elif name in FLAWS:
        assert outcome["reason"] in ("all_flawed", "fallback")
        assert set(outcome["flaws"]) == {"0", "1"}
    else:
        assert outcome["reason"] in ("ranked", "tie_break")


@pytest.mark.parametrize("run", [plain, graph])
def test_many_faults_at_once(run: Run):
    names = [name for name in FAULTS if name not in ("hang", "big_body")]
    outcome = step(run, [fault(name) for name in names], len(names))
    assert len(outcome["failures"]) == len(FAILURES) - 1
    assert len(outcome["flaws"]) == len(FLAWS)
    assert str(outcome["chosen"]) not in {*outcome["failures"], *outcome["flaws"]}


@pytest.mark.parametrize("run", [plain, graph])
def test_cancelling_a_step_closes_every_connection(run: Run):
    with FaultServer(faults=["hang"]) as server:
        model = OpenAIChatModel(model="any", base_url=server.base_url, api_key="none", max_retries=0)

        async def cancelled() -> None:
            task = asyncio.create_task(run(model, 8, math.inf))
            while server.in_flight < 8:  # noqa: ASYNC110 - the server runs in another thread
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(asyncio.wait_for(cancelled(), 10))
        settle(lambda: server.abandoned == 8 and server.connections == 0)


def test_no_memory_is_kept_after_large_answers():
    async def steps(model: OpenAIChatModel) -> list[int]:
        kept: list[int] = []
        for _ in range(4):
            await plain(model, 2, 30.0)
            gc.collect()
            kept.append(tracemalloc.get_traced_memory()[0])
        return kept

    with FaultServer([Reply(content="hello")], faults=[replace(FAULTS["big_body"], body=_two_megabytes)]) as server:
        model = OpenAIChatModel(model="any", base_url=server.base_url, api_key="none", max_retries=0)
        tracemalloc.start()
        try:
            kept = asyncio.run(steps(model))
        finally:
            tracemalloc.stop()
    assert max(kept[1:]) - kept[0] < 500_000


def _two_megabytes(body: bytes) -> bytes:
    return body.replace(b'"created":0', b'"created":0,"padding":"%s"' % (b"x" * 2_000_000))
