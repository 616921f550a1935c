"""A step against a server: actions as JSON or natively, verdicts, refusals, seeds, event loops."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI

from ec_agents.drawing import StepModel
from ec_agents.embedded import EmbeddedChatModel
from ec_agents.errors import ActionError, ConfigError, LogprobsMissing, SamplingError, UnsupportedLogprobs
from ec_agents.graph import create_centroid_agent
from ec_agents.openai_client import OpenAIChatModel, fast_logprobs
from ec_agents.selection import Selector
from ec_agents.testing import FaultServer, Reply, ScriptedChatModel
from ec_agents.testing.server import completion
from ec_agents.waiting import Limiter, SamplingPolicy

ASK = {"messages": [("user", "what is 1 + 2?")]}


def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


def action(thought: str, action: Any) -> str:
    return json.dumps({"thought": thought, "action": action})


def respond(request: Any, *, measured: str | None = None, json_schema: bool = True) -> Any:
    """A model that calls ``add`` and then answers, natively or as JSON; native calls may be without numbers."""
    last = request["messages"][-1]
    done = last["role"] == "tool" or "Result of add: 3" in str(last["content"])
    if "response_format" in request and json_schema:
        text = {"final_answer": "it is 3"} if done else {"tool": "add", "arguments": {"a": 1, "b": None}}
        reply = Reply(content=action("I think", text), profile="!...")
    elif done or "tools" not in request:
        reply = Reply(content="it is 3")
    else:
        reply = Reply(tool_calls=[("add", {"a": 1})], profile=measured)
    return completion([reply.message()], request)


def measuring(request: Any) -> Any:
    return respond(request, measured="!...")


def chat(server: FaultServer, **options: Any) -> Any:
    return ChatOpenAI(model="m", base_url=server.base_url, api_key="none", max_retries=0, **options)  # type: ignore[arg-type]


def own(server: FaultServer, **options: Any) -> Any:
    return OpenAIChatModel(model="m", base_url=server.base_url, max_retries=0, fan_out="requests", **options)  # type: ignore[call-arg]


def fast(server: FaultServer, **options: Any) -> Any:
    return fast_logprobs(chat(server, **options))


CLIENTS = pytest.mark.parametrize("client", [chat, fast, own])


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


@CLIENTS
def test_auto_asks_again_as_json_where_they_are_not_and_remembers_it(
    client: Callable[..., Any], caplog: pytest.LogCaptureFixture
):
    with FaultServer(respond) as server:
        state = create_centroid_agent(client(server), [add], n=2).invoke(ASK)
        assert state["messages"][-1].content == "it is 3"
        assert ["tools" in request for request in server.requests] == [True, True, False, False, False, False]
        assert "asking again, with actions as JSON" in caplog.text
        create_centroid_agent(client(server), [add], n=2).invoke(ASK)
        assert not any("tools" in request for request in server.requests[6:])


def test_auto_goes_by_the_table_before_anything_is_sent():
    step = StepModel(ChatOpenAI(model="gpt-4o", api_key="k"), [add], n=2, top_logprobs=20, action_format="auto")  # type: ignore[arg-type]
    assert "response_format" in step.prepared.kwargs["extra_body"]  # type: ignore[attr-defined]


def test_native_tool_calls_without_numbers_end_the_step_and_stop_the_next():
    with FaultServer(respond) as server:
        agent = create_centroid_agent(chat(server), [add], n=2, action_format="native")
        with pytest.raises(LogprobsMissing, match=r"m at http.*: its tool calls carry no .*action_format='json'"):
            agent.invoke(ASK)
        assert len(server.requests) == 2
        with pytest.raises(UnsupportedLogprobs, match="an earlier response showed: m at http"):
            agent.invoke(ASK)
        with pytest.raises(UnsupportedLogprobs, match="an earlier response showed: m at http"):
            create_centroid_agent(chat(server), [add], n=2, action_format="native")
        assert len(server.requests) == 2


def test_numbers_that_are_dropped_in_silence_end_the_step():
    with FaultServer([Reply(content="hello")], faults=["null_logprobs"]) as server:
        agent = create_centroid_agent(chat(server), n=2)
        with pytest.raises(LogprobsMissing, match="2 of 2 responses without log-probabilities; serve the model with"):
            agent.invoke(ASK)
        with pytest.raises(UnsupportedLogprobs):
            agent.invoke(ASK)
        assert len(server.requests) == 2


def test_without_log_probabilities_nothing_is_refused_or_verified():
    with FaultServer(respond) as server:
        agent = create_centroid_agent(chat(server), [add], n=2, top_logprobs=None)
        assert agent.invoke(ASK)["messages"][-1].content == "it is 3"
        assert "logprobs" not in server.requests[0]
    create_centroid_agent(ChatOpenAI(model="o3", api_key="k"), [add], n=2, top_logprobs=None)  # type: ignore[arg-type]


def test_a_provider_that_cannot_is_refused_when_the_agent_is_made():
    with pytest.raises(UnsupportedLogprobs, match="reasoning models refuse"):
        create_centroid_agent(ChatOpenAI(model="o3", api_key="k"))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedLogprobs, match="at most 20 alternatives, and 21"):
        create_centroid_agent(ChatOpenAI(model="gpt-4o", api_key="k"), top_logprobs=21)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedLogprobs, match="reasoning_effort='none' is needed; found 'low'"):
        create_centroid_agent(ChatOpenAI(model="gpt-5.2", api_key="k").bind(reasoning_effort="low"))  # type: ignore[arg-type]


def refusing(request: Any) -> Any:
    if "response_format" in request:
        raise ValueError("response_format is not supported")
    return respond(request)


@CLIENTS
def test_a_server_that_refuses_schemas_is_a_clear_error(client: Callable[..., Any]):
    with FaultServer(refusing) as server:
        agent = create_centroid_agent(client(server), [add], n=2, action_format="json")
        with pytest.raises(ActionError, match=r"http.* refuses response_format json_schema.*not supported; use action"):
            agent.invoke(ASK)


def test_a_server_that_ignores_schemas_is_a_clear_error():
    with FaultServer(lambda request: respond(request, json_schema=False)) as server:
        agent = create_centroid_agent(chat(server), [add], n=2, action_format="json")
        with pytest.raises(SamplingError, match="ActionError: the JSON action .* found 'it is 3'; does this server"):
            agent.invoke(ASK)


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
    assert record["failures"] == {}
    assert [list(flaws) for flaws in record["flaws"].values()] == [["truncated"]]


def test_models_without_a_server_stay_native_and_fall_back():
    model = ScriptedChatModel(replies=[Reply(tool_calls=[("add", {"a": 1})], profile=None), Reply(content="3")])
    state = create_centroid_agent(model, [add], n=1).invoke(ASK)
    assert state["messages"][1].response_metadata["ec_agents"]["scores"] == {"0": None}


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
    assert caplog.text.count("4 alternatives a token, 20 were asked for") == 1


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


def test_a_seeded_embedded_model_gives_different_candidates_every_time_the_same():
    ask = {"messages": [("user", "Ann has 12. Bob has 5 more than Ann. How many has Bob?")]}

    def texts() -> list[str]:
        state = create_centroid_agent(EmbeddedChatModel(seed=3, temperature=2.0), n=4).invoke(ask)
        return [outline["content"] for outline in state["ec_decision"]["candidates"].values()]

    assert len(set(texts())) > 1
    assert texts() == texts()


@pytest.mark.parametrize(
    "model",
    [EmbeddedChatModel(temperature=0.0), EmbeddedChatModel().bind(temperature=0), EmbeddedChatModel(temperature=0)],
)
def test_temperature_0_with_several_candidates_is_refused_with_the_reason(model: Any):
    with pytest.raises(ConfigError, match="temperature is 0, so that all 2 candidates would be equal .* or n=1"):
        create_centroid_agent(model, n=2)
    create_centroid_agent(model, n=1)


def test_an_unknown_action_format_is_refused():
    with pytest.raises(ConfigError, match="action_format must be one of .*; found 'xml'"):
        create_centroid_agent(ScriptedChatModel(), n=1, action_format="xml")  # type: ignore[arg-type]


# Event loops, threads, the wire


@CLIENTS
def test_one_agent_may_be_run_in_any_loop_and_thread(client: Callable[..., Any]):
    with FaultServer([Reply(content="hi")]) as server:
        policy = SamplingPolicy(limiter=Limiter(3))
        agent = create_centroid_agent(client(server), n=4, policy=policy)

        async def main() -> Any:
            return await agent.ainvoke(ASK)

        texts = [agent.invoke(ASK)["messages"][-1].content]
        texts += [asyncio.run(main())["messages"][-1].content for _ in range(3)]
        threads = [
            threading.Thread(target=lambda: texts.append(agent.invoke(ASK)["messages"][-1].content)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert texts == ["hi"] * 7
        assert len(server.requests) == 28


@CLIENTS
async def test_an_agents_losing_requests_are_cancelled_on_the_wire(client: Callable[..., Any]):
    faults = ["hang", None, "hang", None]
    with FaultServer([Reply(content="hi")], faults=faults) as server:
        agent = create_centroid_agent(client(server), n=4, policy=SamplingPolicy(first=2))
        state = await agent.ainvoke(ASK)
        async with asyncio.timeout(20):
            while server.abandoned < 2 or server.in_flight:  # noqa: ASYNC110 - the server has no event for it
                await asyncio.sleep(0.01)
    record = state["messages"][-1].response_metadata["ec_agents"]
    assert len(record["scores"]) == 2
    assert len(record["failures"]) == 2


def test_a_client_of_the_users_own_is_left_alone():
    with FaultServer([Reply(content="hi")]) as server:

        async def main() -> str:
            async with openai.DefaultAsyncHttpxClient(headers={"x-mine": "yes"}) as http:
                agent = create_centroid_agent(chat(server, http_async_client=http), n=1)
                return (await agent.ainvoke(ASK))["messages"][-1].content

        assert asyncio.run(main()) == "hi"
        assert server.headers[0]["x-mine"] == "yes"


def test_the_selector_still_decides_where_single_responses_lack_numbers():
    with FaultServer([Reply(content="hi")], faults=["null_logprobs", None, None]) as server:
        agent = create_centroid_agent(chat(server), n=3, selector=Selector(fallback="raise"))
        record = agent.invoke(ASK)["messages"][-1].response_metadata["ec_agents"]
    assert sum(score is None for score in record["scores"].values()) == 1
