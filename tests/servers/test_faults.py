"""Every fault of the server, with 1, 8 and 64 candidates, in an agent and in a step of one's own.

The step ends, chooses a sound answer or raises, says what happened, and leaks nothing.
"""

# pyright: reportArgumentType=false

import asyncio
import gc
import math
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import openai
import pytest
from helpers.waiting import settle, until

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.step import decision_record
from ec_agents.errors import EcAgentsError, LogprobsMalformed, LogprobsMissing, SamplingError, ServerError
from ec_agents.messages import message_candidate
from ec_agents.policy import SamplingPolicy
from ec_agents.sampling import sample
from ec_agents.scoring import centroids
from ec_agents.selection import Selector
from ec_agents.servers.body_reader import LARGE_BODY
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.testing import FAULTS, Fault, FaultServer, Reply
from ec_agents.testing.faults import inflated

UNENDING = ("hang", "stall")
FAILURES: Mapping[str, type[BaseException]] = {
    "hang": TimeoutError,
    "stall": TimeoutError,
    "status_429": openai.RateLimitError,
    "retry_after": openai.RateLimitError,
    "status_500": openai.InternalServerError,
    "status_503": openai.InternalServerError,
    "disconnect": openai.APIConnectionError,
    "truncated_json": LogprobsMalformed,
    "html_page": LogprobsMalformed,
    "invalid_utf8": LogprobsMalformed,
    "empty_choices": LogprobsMalformed,
    "error_body": ServerError,
    "error_choice": ServerError,
}
"""What a call raises that meets the fault."""
FLAWS = {
    "null_logprobs": "no_signal",
    "no_top_logprobs": "no_signal",
    "unmeasured_tool_calls": "no_signal",
    "refusal": "refused",
    "length": "truncated",
    "aborted": "interrupted",
}
"""What is wrong with a candidate that meets the fault. All other faults do no harm."""
QUICK = {
    "straggler": replace(FAULTS["straggler"], delay=0.15),
    "latency": replace(FAULTS["latency"], delay=0.05),
    "big_body": replace(FAULTS["big_body"], body=inflated(LARGE_BODY + 1)),
}
"""The same, less of it."""

Run = Callable[[OpenAIChatModel, int, float], Any]


async def plain(model: OpenAIChatModel, n: int, seconds: float) -> dict[str, Any]:
    """The record of a step of one's own."""
    asking = model.bind(logprobs=True, top_logprobs=4)
    drawn = await sample(lambda _: asking.ainvoke("hi"), n=n, policy=seconds, parse=message_candidate)
    selection = Selector()(drawn.candidates)
    assert [c.index for c in drawn.candidates] == sorted(drawn.messages)
    return decision_record(drawn, selection)


async def graph(model: OpenAIChatModel, n: int, seconds: float) -> dict[str, Any]:
    """The record of a step of an agent."""
    agent = create_centroid_agent(model, n=n, policy=seconds, top_logprobs=4)
    state = await agent.ainvoke({"messages": [("user", "hi")]})
    return state["messages"][-1].response_metadata["ec_agents"]


async def outcome_of(run: Run, model: OpenAIChatModel, n: int, seconds: float) -> Any:
    """The record, or the error of the step."""
    try:
        return await run(model, n, seconds)
    except EcAgentsError as error:
        return error


def model_of(server: FaultServer) -> OpenAIChatModel:
    return OpenAIChatModel(model="any", base_url=server.base_url, api_key="none", max_retries=0)


def steps(run: Run, faults: Mapping[int, Sequence[Fault | None]], timeout: float) -> dict[int, Any]:
    """What steps of several sizes come to, each on a server with its faults; they leave no task and no connection.

    They run at the same time, so that they wait as long as the slowest.
    """
    reply = Reply(content="hello", profile="!...")

    async def together(models: Mapping[int, OpenAIChatModel]) -> list[Any]:
        before = asyncio.all_tasks()
        outcomes = await asyncio.gather(*(outcome_of(run, model, n, timeout) for n, model in models.items()))
        assert asyncio.all_tasks() == before
        return outcomes

    with ExitStack() as stack:
        servers = {n: stack.enter_context(FaultServer([reply], faults=f)) for n, f in faults.items()}
        outcomes = asyncio.run(together({n: model_of(server) for n, server in servers.items()}))
        for n, server in servers.items():
            settle(lambda server=server: server.connections == 0 and server.in_flight == 0)
            assert len(server.requests) == n
    return dict(zip(faults, outcomes, strict=True))


def fault(name: str, n: int = 0) -> Fault:
    """The fault; not as much of it where it meets several."""
    return FAULTS[name] if n == 1 and name == "big_body" else QUICK.get(name, FAULTS[name])


@pytest.mark.parametrize("run", [plain, graph])
@pytest.mark.parametrize("name", FAULTS)
def test_a_step_on_a_faulty_server(name: str, run: Run):
    faults = {n: [fault(name, n), None, None, None] for n in (1, 8, 64)}
    outcomes = steps(run, faults, 3.0 if name in UNENDING else 30.0)
    check_alone(name, run, outcomes[1])
    for n in (8, 64):
        check_among_sound_ones(name, n, outcomes[n])


def check_alone(name: str, run: Run, outcome: Any) -> None:
    """The only candidate has met the fault."""
    if name in FAILURES:
        assert isinstance(outcome, SamplingError)
        assert isinstance(outcome.failures[0], FAILURES[name])
        assert str(outcome).startswith("0 of 1 calls succeeded, 1 needed")
    elif FLAWS.get(name) == "no_signal" and run is graph:
        assert isinstance(outcome, LogprobsMissing)
    else:
        assert outcome["failures"] == [None]
        assert len(outcome["scores"]) == 1
        assert FLAWS[name] in outcome["flaws"][0] if name in FLAWS else not outcome["flaws"][0]


def check_among_sound_ones(name: str, n: int, outcome: Any) -> None:
    """Every fourth candidate has met the fault."""
    failures, flaws, scores = [*filter(None, outcome["failures"])], [*filter(None, outcome["flaws"])], outcome["scores"]
    assert len(failures) == (n // 4 if name in FAILURES else 0)
    assert len(flaws) == (n // 4 if name in FLAWS else 0)
    assert all(text.startswith(FAILURES[name].__name__) for text in failures)
    assert all(FLAWS[name] in found for found in flaws)
    assert len(outcome["order"]) == n - len(failures)
    chosen = outcome["chosen"]
    assert not outcome["failures"][chosen]
    assert not outcome["flaws"][chosen]
    assert scores[chosen] is not None
    assert outcome["usage"]["output_tokens"] >= 3 * n


@pytest.mark.parametrize("run", [plain, graph])
@pytest.mark.parametrize("name", FAULTS)
def test_a_step_on_which_every_call_meets_the_fault(name: str, run: Run):
    outcome = steps(run, {2: [fault(name)]}, 2.0 if name in UNENDING else 30.0)[2]
    if name in FAILURES:
        assert isinstance(outcome, SamplingError)
        assert {type(failure) for failure in outcome.failures.values()} == {FAILURES[name]}
    elif FLAWS.get(name) == "no_signal" and run is graph:
        assert isinstance(outcome, LogprobsMissing)
    elif name in FLAWS:
        assert outcome["reason"] in ("all_flawed", "fallback")
        assert all(outcome["flaws"])
        assert len(outcome["flaws"]) == 2
    else:
        assert outcome["reason"] in ("ranked", "tie_break")


@pytest.mark.parametrize("run", [plain, graph])
def test_many_faults_at_once(run: Run):
    names = [name for name in FAULTS if name not in UNENDING]
    outcome = steps(run, {len(names): [fault(name) for name in names]}, 30.0)[len(names)]
    assert sum(map(bool, outcome["failures"])) == len(FAILURES) - len(UNENDING)
    assert sum(map(bool, outcome["flaws"])) == len(FLAWS)
    assert not outcome["failures"][outcome["chosen"]]
    assert not outcome["flaws"][outcome["chosen"]]


@pytest.mark.parametrize("run", [plain, graph])
@pytest.mark.parametrize("name", UNENDING)
def test_cancelling_a_step_closes_every_connection(name: str, run: Run):
    async def cancelled(server: FaultServer) -> None:
        task = asyncio.create_task(run(model_of(server), 8, math.inf))
        await until(lambda: server.in_flight == 8)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with FaultServer(faults=[name]) as server:
        asyncio.run(asyncio.wait_for(cancelled(server), 10))
        settle(lambda: server.abandoned == 8 and server.connections == 0)


@pytest.mark.parametrize("run", [plain, graph])
def test_no_memory_is_kept_after_any_fault(run: Run):
    slim = replace(FAULTS["big_body"], body=inflated(200_000))
    faults = [slim, *(fault(name) for name in FAULTS if name not in ("straggler", "big_body"))]
    kept: list[int] = []
    with FaultServer([Reply(content="hello")], faults=faults) as server:
        model = model_of(server)
        tracemalloc.start()
        try:
            for _ in range(4):
                # Each in a loop of its own, so that no connection stays open.
                asyncio.run(outcome_of(run, model, len(faults), 0.5))
                settle(lambda: server.connections == 0)
                server.requests.clear()
                server.headers.clear()
                centroids._phases.cache_clear()  # remembers the last 256 candidates
                gc.collect()
                kept.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert max(kept[2:]) - kept[1] < 50_000


@pytest.mark.parametrize("fault", ["error_body", "error_choice"])
async def test_error_with_status_200_is_retried(fault: str):
    """An error inside a successful response is retried as its status would be, and costs no candidate."""
    with FaultServer([Reply(content="hello", profile="!...")], faults=[fault, None]) as server:
        asking = model_of(server).bind(logprobs=True, top_logprobs=4)
        policy = SamplingPolicy(retries=1)
        drawn = await sample(lambda _: asking.ainvoke("hi"), n=1, policy=policy, parse=message_candidate)
        assert len(server.requests) == 2
    assert (drawn.candidates[0].content, drawn.candidates[0].flaws, drawn.failures) == ("hello", {}, {})
