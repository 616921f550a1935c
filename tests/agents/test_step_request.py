"""A step against a server: actions as JSON or natively, verdicts, refusals, seeds, event loops."""

import asyncio
import json
import logging
import os
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import openai
import pytest
from helpers.processes import run
from helpers.serving import CLIENTS, action, chat, respond
from helpers.waiting import until
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_openai import ChatOpenAI
from pydantic import PrivateAttr

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.step_request import StepModel, StepRequest, remembering
from ec_agents.candidates import Candidate
from ec_agents.embedded import EmbeddedChatModel
from ec_agents.errors import ActionError, ConfigError, SamplingError, UnsupportedLogprobs
from ec_agents.messages import message_candidate
from ec_agents.policy import SamplingPolicy
from ec_agents.selection import Selector
from ec_agents.servers.providers import endpoint_of, remember, verdict_on, verify
from ec_agents.testing import FaultServer, Reply, ScriptedChatModel
from ec_agents.testing.server import completion

ASK = {"messages": [("user", "what is 1 + 2?")]}


def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


def measuring(request: Any) -> Any:
    return respond(request, measured="!...")


def roles(request: Any) -> list[str]:
    return [message["role"] for message in request["messages"]]


# Actions as JSON


@CLIENTS
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_actions_as_json_run_tools_and_are_measured(client: Callable[..., Any], way: str):
    with FaultServer(respond) as server:
        agent = create_centroid_agent(client(server), [add], n=2, action_format="json")
        state = agent.invoke(ASK) if way == "invoke" else await agent.ainvoke(ASK)
    _, called, result, final = state["messages"]
    assert called.tool_calls[0]["args"] == {"a": 1}
    assert result.content == "3"
    assert (final.content, final.additional_kwargs["thought"]) == ("it is 3", "I think")
    assert all(message.response_metadata["ec_agents"]["reason"] != "fallback" for message in (called, final))
    assert len(server.requests) == 4
    assert [roles(request) for request in server.requests[::2]] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
    ]
    for request in server.requests:
        assert request["response_format"]["json_schema"]["strict"] is True
        assert "tools" not in request


def test_the_users_own_extra_body_stays():
    with FaultServer(respond) as server:
        model = chat(server, extra_body={"top_k": 7})
        create_centroid_agent(model, [add], n=1, action_format="json").invoke(ASK)
        create_centroid_agent(model.bind(extra_body={"min_p": 0.1}), [add], n=1, action_format="json").invoke(ASK)
    assert server.requests[0]["top_k"] == 7
    assert server.requests[-1]["min_p"] == 0.1
    assert all("response_format" in request for request in server.requests)


def test_auto_uses_native_tool_calls_where_they_are_measured():
    with FaultServer(measuring) as server:
        state = create_centroid_agent(chat(server), [add], n=2).invoke(ASK)
    assert state["messages"][-1].content == "it is 3"
    assert all("tools" in request and "response_format" not in request for request in server.requests)


@pytest.mark.parametrize(("name", "as_json"), [("gpt-4o", True), ("o3", False)])
def test_auto_goes_by_the_table_before_anything_is_sent(name: str, *, as_json: bool):
    model = StepModel(ChatOpenAI(model=name, api_key="k"), top_logprobs=20, action_format="auto")  # type: ignore[arg-type]
    request = partial(StepRequest, model, n=2, policy=SamplingPolicy(), parse=message_candidate)
    assert request(model.with_tools([add])).writes_json() == as_json
    assert request({**model.options, "model": "gpt-4.1"}, tools=True).writes_json()


async def test_auto_learns():
    """The first three calls decide, and their usage counts."""
    with FaultServer(respond, faults=[*[None] * 3, *["hang"] * 5, *[None] * 16]) as server:
        agent = create_centroid_agent(chat(server), [add], n=8)
        state = await agent.ainvoke(ASK)
    first, last = (m.response_metadata["ec_agents"] for m in state["messages"] if m.type == "ai")
    assert ["tools" in request for request in server.requests] == [True] * 8 + [False] * 16
    assert server.abandoned == 5
    assert first["usage"] == {"input_tokens": 110, "output_tokens": 32, "total_tokens": 142}
    assert last["usage"] == {"input_tokens": 80, "output_tokens": 32, "total_tokens": 112}


class Served(ScriptedChatModel):
    """A scripted model with an endpoint."""

    base_url: str = "http://127.0.0.1:9/v1"


CALL = [("add", {"a": 1})]
UNMEASURED, MEASURED = Reply(tool_calls=CALL, profile=None), Reply(tool_calls=CALL, profile="!...")


@pytest.mark.parametrize("unmeasured", [1, 2])
def test_damaged_answers_switch_nothing(unmeasured: int):
    """The first calls to land have no numbers, the others do: the step goes on natively, and so does the endpoint."""
    replies = [*[UNMEASURED] * unmeasured, *[MEASURED] * (4 - unmeasured), *[Reply(content="3")] * 4]
    model = Served(replies=replies)
    state = create_centroid_agent(model, [add], n=4).invoke(ASK)
    record = state["messages"][1].response_metadata["ec_agents"]
    assert sum(score is None for score in record["scores"]) == unmeasured
    assert all("tools" in options for _, options in model.requests)
    create_centroid_agent(model, [add], n=4, action_format="native")


def test_a_measured_answer_in_the_same_turn_comes_too_late():
    """Three calls without numbers settle it for this step; a fourth with numbers does no harm."""
    as_json = Reply(content=action("", {"final_answer": "3"}))
    model = Served(replies=[*[UNMEASURED] * 3, MEASURED, *[as_json] * 4])
    state = create_centroid_agent(model, [add], n=4).invoke(ASK)
    assert state["messages"][-1].content == "3"


def without_json(*, calls_measured: Callable[[int], bool]) -> Callable[[Any], Any]:
    """A server that refuses JSON schemas, and measures some of its tool calls."""
    seen = count()

    def answer(request: Any) -> Any:
        if "response_format" in request:
            raise ValueError("response_format is not supported")
        return respond(request, measured="!..." if calls_measured(next(seen)) else None)

    return answer


async def test_a_server_without_json_is_asked_natively_again():
    """Even after three damaged calls in a row no run fails, neither this one nor those of other agents."""
    with FaultServer(without_json(calls_measured=lambda number: number >= 3)) as server:
        for _ in range(3):
            state = await create_centroid_agent(chat(server), [add], n=3).ainvoke(ASK)
            assert state["messages"][-1].content == "it is 3"
        assert sum("response_format" in request for request in server.requests) <= 3


async def test_a_server_that_measures_nothing_is_a_clear_error():
    with (
        FaultServer(without_json(calls_measured=lambda _: False)) as server,
        pytest.raises(ActionError, match="refuses response_format json_schema"),
    ):
        await create_centroid_agent(chat(server), [add], n=3).ainvoke(ASK)


def test_native_is_not_overridden_by_what_others_saw():
    where = endpoint_of(Served())
    assert where is not None
    calls = [Candidate(index=i, content="", tool_calls=[{"name": "add", "args": {}}]) for i in range(3)]
    verdict = verify(calls, top_logprobs=20)
    assert verdict is not None
    remember(where, verdict, tools=True)
    model = Served(replies=[MEASURED, MEASURED, Reply(content="3"), Reply(content="3")])
    state = create_centroid_agent(model, [add], n=2, action_format="native").invoke(ASK)
    assert state["messages"][-1].content == "3"
    found = verdict_on(where, tools=True)
    assert found is not None
    assert found.tool_tokens == "all"


def test_equal_answers_are_said_once_also_without_a_server(caplog: pytest.LogCaptureFixture):
    same = Reply(content="the same", profile="!" * 20)
    model = ScriptedChatModel(replies=[same] * 8)
    agent = create_centroid_agent(model, n=4)
    agent.invoke(ASK)
    agent.invoke(ASK)
    assert caplog.text.count("4 responses are the same") == 1


async def test_auto_stays_native_where_some_tool_calls_are_measured(caplog: pytest.LogCaptureFixture):
    replies = [Reply(tool_calls=[("add", {"a": 1})]), Reply(tool_calls=[("add", {"a": 1})], profile=None, delay=0.2)]
    with FaultServer([*replies, Reply(content="3"), Reply(content="3")]) as server:
        state = await create_centroid_agent(chat(server), [add], n=2).ainvoke(ASK)
        assert all("tools" in request for request in server.requests)
    record = state["messages"][1].response_metadata["ec_agents"]
    assert sorted(score is None for score in record["scores"]) == [False, True]
    assert "missing: 1 of 2 responses without log-probabilities, 1 of them tool calls" in caplog.text


async def test_concurrent_steps_learn_together():
    """Steps under way while another one learns are asked again too."""
    with FaultServer(respond) as server:
        agents = [create_centroid_agent(chat(server), [add], n=2) for _ in range(4)]
        states = await asyncio.gather(*[agent.ainvoke(ASK) for agent in agents])
    for state in states:
        records = [m.response_metadata["ec_agents"] for m in state["messages"] if m.type == "ai"]
        assert all(score is not None for record in records for score in record["scores"])


def test_unable_provider():
    """A provider without log-probabilities is refused when the agent is made."""
    with pytest.raises(UnsupportedLogprobs, match="reasoning models refuse"):
        create_centroid_agent(ChatOpenAI(model="o3", api_key="k"))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedLogprobs, match="at most 20 alternatives, and 21"):
        create_centroid_agent(ChatOpenAI(model="gpt-4o", api_key="k"), top_logprobs=21)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedLogprobs, match="reasoning_effort='none' is needed; found 'low'"):
        create_centroid_agent(ChatOpenAI(model="gpt-5.2", api_key="k").bind(reasoning_effort="low"))  # type: ignore[arg-type]


def test_a_server_that_ignores_schemas_is_a_clear_error():
    with FaultServer(lambda request: respond(request, json_schema=False)) as server:
        agent = create_centroid_agent(chat(server), [add], n=2, action_format="json")
        with pytest.raises(ActionError, match="the JSON action .* found 'it is 3'; does this server"):
            agent.invoke(ASK)


def test_one_answer_that_is_no_json_is_a_failed_call():
    replies = [Reply(content="it is 3"), Reply(content=action("", {"final_answer": "3"}))]
    model = ScriptedChatModel(replies=replies)
    state = create_centroid_agent(model, [add], n=2, action_format="json").invoke(ASK)
    failures = state["messages"][-1].response_metadata["ec_agents"]["failures"]
    assert [text.split(":")[0] for text in filter(None, failures)] == ["ActionError"]


@pytest.mark.parametrize("parallel", [True, False])
def test_several_calls_at_once_all_run(*, parallel: bool):
    calls = {"calls": [{"tool": "add", "arguments": {"a": a, "b": None}} for a in (1, 2)]}
    replies = [Reply(content=action("both", calls)), Reply(content=action("", {"final_answer": "3 and 4"}))]
    model = ScriptedChatModel(replies=replies)
    bound = model if parallel else model.bind(parallel_tool_calls=False)
    state = create_centroid_agent(bound, [add], n=1, action_format="json").invoke(ASK)
    assert [m.content for m in state["messages"] if m.type == "tool"] == ["3", "4"]
    sent = json.dumps(model.requests[0][1]["response_format"])
    assert ('"calls"' in sent) == parallel
    assert "parallel_tool_calls" not in model.requests[0][1]


def test_unusual_bind_tools():
    """A model that binds tools in another way is a clear error."""

    class Odd(ScriptedChatModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return super().bind_tools(tools, **kwargs) | (lambda message: message)

    with pytest.raises(ConfigError, match="bind_tools.. of Odd must return a RunnableBinding; found RunnableSequence"):
        create_centroid_agent(Odd(), [add], n=1)


def test_other_errors_of_the_server_stay_what_they_are():
    with FaultServer(respond, faults=["status_500"]) as server:
        agent = create_centroid_agent(chat(server), [add], n=2, action_format="json")
        with pytest.raises(SamplingError, match="internal error"):
            agent.invoke(ASK)


@CLIENTS
def test_an_answer_that_was_cut_off_is_flawed_and_not_lost(client: Callable[..., Any]):
    with FaultServer(respond, faults=["length", None]) as server:
        agent = create_centroid_agent(client(server), [add], n=2, action_format="json")
        record = agent.invoke(ASK)["messages"][1].response_metadata["ec_agents"]
    assert not any(record["failures"])
    assert [list(flaws) for flaws in record["flaws"] if flaws] == [["truncated"]]


@CLIENTS
@pytest.mark.parametrize(("reason", "flaw"), [("length", "truncated"), ("content_filter", "refused")])
def test_half_an_action_is_flawed_and_not_lost(client: Callable[..., Any], reason: str, flaw: str):
    half = Reply(content='{"thought": "I', finish_reason=reason)
    with FaultServer([half, Reply(content=action("I think", {"final_answer": "3"}))]) as server:
        agent = create_centroid_agent(client(server), [add], n=2, action_format="json")
        message = agent.invoke(ASK)["messages"][1]
    record = message.response_metadata["ec_agents"]
    assert message.content == "3"
    assert not any(record["failures"])
    assert [list(flaws) for flaws in record["flaws"] if flaws] == [[flaw]]


@CLIENTS
@pytest.mark.parametrize("action_format", ["native", "json"])
def test_half_a_surrogate_pair_stops_no_step(client: Callable[..., Any], action_format: Any):
    native = Reply(tool_calls=[("add", {"a": 1, "\ud83d": 2})])
    as_json = Reply(content=action("\ud83d", {"tool": "add", "arguments": {"a": 1, "\ud83d": 2}}))
    last = Reply(content=action("\ud83d", {"final_answer": "\ud83d"}) if action_format == "json" else "\ud83d")
    first = as_json if action_format == "json" else native
    with FaultServer([first, first, last, last]) as server:
        agent = create_centroid_agent(client(server), [add], n=2, action_format=action_format)
        messages = agent.invoke(ASK)["messages"]
    assert messages[1].tool_calls[0]["args"] == {"a": 1, "?": 2}
    assert messages[-1].content == "?"


def test_changed_private_attribute():
    """A model whose private attribute changes is prepared again."""
    prepared = remembering(partial(StepModel, top_logprobs=20, action_format="auto"))
    model = Counting()
    first = prepared(model)
    assert prepared(model) is first
    model._private = 2
    assert prepared(model).model.invoke("hi").content == "2"


class Counting(EmbeddedChatModel):
    _private: int = PrivateAttr(default=1)

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(str(self._private)))])


def test_models_without_a_server_stay_native_and_fall_back():
    model = ScriptedChatModel(replies=[Reply(tool_calls=[("add", {"a": 1})], profile=None), Reply(content="3")])
    state = create_centroid_agent(model, [add], n=1).invoke(ASK)
    assert state["messages"][1].response_metadata["ec_agents"]["scores"] == [None]


def test_actions_as_json_work_with_any_chat_model():
    replies = [
        Reply(content=action("x", {"tool": "add", "arguments": {"a": 1, "b": 2}})),
        Reply(content=action("", {"final_answer": "3"})),
    ]
    model = ScriptedChatModel(replies=replies)
    state = create_centroid_agent(model, [add], n=1, action_format="json").invoke(ASK)
    assert state["messages"][-1].content == "3"
    assert "response_format" in model.requests[0][1]


def test_problems_that_are_merely_odd_are_logged_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    with FaultServer([Reply(content=str(i)) for i in range(4)]) as server:
        for _ in range(2):
            create_centroid_agent(chat(server), n=2).invoke(ASK)
    assert caplog.text.count("4 alternatives per token, 20 were asked for") == 1


def excessive(payload: Any) -> Any:
    """Every token has one more alternative, and the drawn one no number of its own."""
    for choice in payload["choices"]:
        for token in choice["logprobs"]["content"]:
            token["top_logprobs"].append({"token": "x", "bytes": [120], "logprob": -0.01})
            token["logprob"] = -9999.0
    return payload


@CLIENTS
def test_numbers_that_are_no_probabilities_are_logged(client: Callable[..., Any], caplog: pytest.LogCaptureFixture):
    with FaultServer(lambda request: excessive(completion([Reply(content="hi").message()], request))) as server:
        create_centroid_agent(client(server), n=2).invoke(ASK)
    assert "sums: the alternatives of a token have a total probability of 1.99" in caplog.text
    assert "sentinels: 8 of 8 drawn tokens have no number of their own" in caplog.text


# Candidates differ


@pytest.mark.parametrize("bound", [True, False])
@CLIENTS
def test_seeds_differ_between_candidates(client: Callable[..., Any], bound: Any):
    with FaultServer([Reply(content="hi")]) as server:
        model = client(server).bind(seed=40) if bound else client(server, seed=40)
        create_centroid_agent(model, n=4).invoke(ASK)
    assert sorted(request["seed"] for request in server.requests) == [40, 41, 42, 43]


def test_without_a_seed_none_is_sent():
    with FaultServer([Reply(content="hi")]) as server:
        create_centroid_agent(chat(server), n=2).invoke(ASK)
    assert not any("seed" in request for request in server.requests)


def test_seeded_embedded_model():
    """Its candidates differ from each other and are the same every time."""
    ask = {"messages": [("user", "Ann has 12. Bob has 5 more than Ann. How many has Bob?")]}

    def texts() -> list[str]:
        state = create_centroid_agent(EmbeddedChatModel(seed=3, temperature=2.0), n=4).invoke(ask)
        return [outline["content"] for outline in state["ec_decision"]["candidates"]]

    assert len(set(texts())) > 1
    assert texts() == texts()


@pytest.mark.parametrize(
    "model",
    [EmbeddedChatModel(temperature=0.0), EmbeddedChatModel().bind(temperature=0), EmbeddedChatModel(temperature=0)],
)
def test_temperature_0(model: Any):
    """With several candidates it is refused, with the reason; with one it is allowed."""
    with pytest.raises(ConfigError, match="temperature is 0, so all 2 candidates would be identical; .* or n=1"):
        create_centroid_agent(model, n=2)
    create_centroid_agent(model, n=1)


# Event loops, threads, the wire


@CLIENTS
async def test_an_agents_losing_requests_are_cancelled_on_the_wire(client: Callable[..., Any]):
    faults = ["hang", None, "hang", None]
    with FaultServer([Reply(content="hi")], faults=faults) as server:
        agent = create_centroid_agent(client(server), n=4, policy=SamplingPolicy(first=2))
        state = await agent.ainvoke(ASK)
        await until(lambda: server.abandoned == 2 and not server.in_flight)
    record = state["messages"][-1].response_metadata["ec_agents"]
    assert len(record["order"]) == 2
    assert len([*filter(None, record["failures"])]) == 2


def test_a_client_of_the_users_own_is_left_alone():
    with FaultServer([Reply(content="hi")]) as server:

        async def main() -> str:
            async with openai.DefaultAsyncHttpxClient(headers={"x-mine": "yes"}) as http:
                agent = create_centroid_agent(chat(server, http_async_client=http), n=1)
                return (await agent.ainvoke(ASK))["messages"][-1].content

        assert asyncio.run(main()) == "hi"
        assert server.headers[0]["x-mine"] == "yes"


def test_single_responses_without_numbers():
    """The selector still decides."""
    with FaultServer([Reply(content="hi")], faults=["null_logprobs", None, None]) as server:
        agent = create_centroid_agent(chat(server), n=3, selector=Selector(fallback="raise"))
        record = agent.invoke(ASK)["messages"][-1].response_metadata["ec_agents"]
    assert sum(score is None for score in record["scores"]) == 1


FORK = """
import os
from ec_agents.sampling import run_blocking

async def answer():
    return 42

assert run_blocking(answer) == 42
child = os.fork()
if child == 0:
    # The loop came along and its thread did not: without a loop of its own the child would wait for ever.
    os._exit(0 if run_blocking(answer) == 42 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert run_blocking(answer) == 42
print("both answered")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_a_loop_of_its_own():
    done = run(FORK, timeout=60)
    assert done.stdout.strip() == "both answered", done.stderr
