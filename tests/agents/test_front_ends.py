"""Graph, middleware and chat model against a server: they refuse, verify, act in JSON and record alike."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.adding import Dying
from helpers.serving import CLIENTS, action, chat, fast, own, refusing, respond
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel

from ec_agents.agents.chat_model import CentroidChatModel
from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.middleware import EntropyCentroidMiddleware
from ec_agents.budget import Budget
from ec_agents.effort import Agree
from ec_agents.embedded import EmbeddedChatModel
from ec_agents.errors import (
    ActionError,
    BudgetExceeded,
    ConfigError,
    LogprobsMissing,
    SamplingError,
    TraceError,
    UnsupportedLogprobs,
)
from ec_agents.policy import Limiter, SamplingPolicy
from ec_agents.testing import FaultServer, Reply, ScriptedChatModel
from ec_agents.testing.server import completion
from ec_agents.trace import TraceWriter, read_trajectories

ASK: Any = {"messages": [("user", "what is 1 + 2?")]}


def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


def graph(model: Any, tools: Any = (add,), *, agent: Any = None, **options: Any) -> Any:
    return create_centroid_agent(model, list(tools), **(agent or {}), **options)


def middleware(model: Any, tools: Any = (add,), *, agent: Any = None, **options: Any) -> Any:
    return create_agent(model, list(tools), middleware=[EntropyCentroidMiddleware(**options)], **(agent or {}))


def chat_model(model: Any, tools: Any = (add,), *, agent: Any = None, **options: Any) -> Any:
    return create_agent(CentroidChatModel(model, **options), list(tools), **(agent or {}))


EVERYWHERE = pytest.mark.parametrize("make", [graph, middleware, chat_model])
WAYS = pytest.mark.parametrize("way", ["invoke", "ainvoke"])


async def run(agent: Any, way: str = "ainvoke", ask: Any = ASK, config: Any = None) -> Any:
    return await agent.ainvoke(ask, config) if way == "ainvoke" else agent.invoke(ask, config)


def records(state: Any) -> list[dict[str, Any]]:
    return [m.response_metadata["ec_agents"] for m in state["messages"] if isinstance(m, AIMessage)]


# Refusals and verdicts


@EVERYWHERE
@WAYS
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model": "o3"}, "reasoning models refuse"),
        ({"model": "gpt-5.5"}, "reasoning_effort='none' is needed; found None"),
        ({"model": "gpt-4o", "use_responses_api": True}, "use_responses_api=False is needed; found True"),
    ],
)
async def test_what_cannot_be_measured_is_refused_before_it_is_sent(
    make: Any, way: str, model: dict[str, Any], message: str
):
    with FaultServer(respond) as server:
        asked = ChatOpenAI(**model, openai_proxy=server.base_url, api_key="none")  # type: ignore[arg-type]
        with pytest.raises(UnsupportedLogprobs, match=message):
            await run(make(asked), way)
        assert server.requests == []


@EVERYWHERE
async def test_a_class_of_one_provider_is_refused_too(make: Any):
    class ChatAnthropic(ScriptedChatModel):
        model: str = "claude"

    asked = ChatAnthropic(replies=[Reply(content="3")] * 8)
    with pytest.raises(UnsupportedLogprobs, match=r"Anthropic \(claude\): the API has no log-probabilities; use anoth"):
        await run(make(asked))
    assert asked.requests == []
    await run(make(asked, top_logprobs=None))


@EVERYWHERE
@CLIENTS
async def test_silently_dropped_logprobs(make: Any, client: Any):
    """Log-probabilities dropped in silence end the step and stop the next one."""
    with FaultServer([Reply(content="hello")], faults=["null_logprobs"]) as server:
        agent = make(client(server), (), n=3)
        with pytest.raises(LogprobsMissing, match="3 of 3 responses without log-probabilities; serve the model with"):
            await run(agent)
        with pytest.raises(UnsupportedLogprobs, match="an earlier response showed"):
            await run(agent)
        assert len(server.requests) == 3


@EVERYWHERE
async def test_native_tool_calls_without_numbers(make: Any):
    """They end the step with the remedy; an explicit choice is not overridden by what was seen."""
    with FaultServer(respond) as server:
        agent = make(chat(server), n=2, action_format="native")
        with pytest.raises(LogprobsMissing, match=r"m at http.*: its tool calls carry no .*action_format='json'"):
            await run(agent)
        with pytest.raises(LogprobsMissing, match="its tool calls carry no"):
            await run(make(chat(server), n=2, action_format="native"))
        assert len(server.requests) == 4


@EVERYWHERE
async def test_without_logprobs(make: Any):
    """Where none are asked for, nothing is refused or verified."""
    with FaultServer(respond) as server:
        state = await run(make(chat(server), n=2, top_logprobs=None))
    assert state["messages"][-1].content == "it is 3"
    assert not any("logprobs" in request or "response_format" in request for request in server.requests)
    make(ChatOpenAI(model="o3", api_key="k"), n=2, top_logprobs=None)  # type: ignore[arg-type]


@EVERYWHERE
async def test_a_record_reads_the_same_in_python_and_in_json(make: Any):
    """What belongs to single candidates is a list by index, as long as the calls: a failed call keeps its place."""
    replies = [
        Reply(error=ConnectionError("reset")),
        Reply(content="3"),
        Reply(profile="...!", tool_calls=[("nope", {})]),
    ]
    [record] = records(await run(make(ScriptedChatModel(replies=replies), n=3)))
    assert json.loads(json.dumps(record)) == record
    assert record["scores"][record["chosen"]] == record["scores"][1] < 0.5
    assert record["failures"] == ["ConnectionError: reset", None, None]
    assert (record["scores"][0], record["n_tokens"], record["flaws"][:2]) == (None, [None, 4, 4], [{}, {}])


@pytest.mark.parametrize("make", [graph, middleware])
async def test_decisions_say_what_each_candidate_would_have_done(make: Any):
    replies = [
        Reply(error=ConnectionError("reset")),
        Reply(profile="!...", content="3"),
        Reply(profile="...!", content="4" * 900),
    ]
    agent = make(ScriptedChatModel(replies=replies), n=3, agent={"checkpointer": InMemorySaver()})
    await run(agent, config={"configurable": {"thread_id": "1"}})
    values = agent.get_state({"configurable": {"thread_id": "1"}}).values
    decision = values["ec_decision"] if "ec_decision" in values else values["ec_decisions"][-1]
    failed, chosen, other = decision["candidates"]
    assert (failed, chosen["content"], len(other["content"])) == (None, "3", 403)


@EVERYWHERE
async def test_temperature_0_is_refused(make: Any):
    with FaultServer(respond) as server, pytest.raises(ConfigError, match="temperature is 0, so all 2 candidates"):
        await run(make(chat(server, temperature=0), n=2))
    assert server.requests == []


@EVERYWHERE
def test_an_unknown_action_format_is_refused_at_once(make: Any):
    with pytest.raises(ConfigError, match="action_format must be one of .*; found 'xml'"):
        make(ScriptedChatModel(), n=1, action_format="xml")


# Actions as JSON


@EVERYWHERE
@CLIENTS
@WAYS
async def test_auto_asks_again_as_json(
    make: Any, client: Callable[..., Any], way: str, caplog: pytest.LogCaptureFixture
):
    """Where native tool calls carry no log-probabilities, the step is asked again as JSON, and so are later agents."""
    with FaultServer(respond) as server:
        state = await run(make(client(server), n=3), way)
        _, called, result, final = state["messages"]
        assert "asking again, with actions as JSON" in caplog.text
        assert ["tools" in request for request in server.requests] == [True] * 3 + [False] * 6
        assert await run(make(client(server), n=3), way)
        assert ["tools" in request for request in server.requests[9:]] == [False] * 6
    assert called.tool_calls[0]["args"] == {"a": 1}
    assert (result.content, final.content, final.additional_kwargs["thought"]) == ("3", "it is 3", "I think")
    assert all(score is not None for record in records(state) for score in record["scores"])
    assert records(state)[0]["usage"]["input_tokens"] > records(state)[1]["usage"]["input_tokens"] == 30


@EVERYWHERE
@WAYS
@pytest.mark.parametrize(("client", "form"), [(chat, "auto"), (chat, "json"), (fast, "json"), (own, "json")])
async def test_a_server_that_refuses_schemas(make: Any, way: str, client: Any, form: str):
    """The error names the server, its message and the remedy."""
    with FaultServer(refusing) as server:
        agent = make(client(server), n=2, action_format=form)
        with pytest.raises(ActionError, match=r"http.* refuses response_format json_schema.*not supported; use action"):
            await run(agent, way)


@EVERYWHERE
@WAYS
@pytest.mark.parametrize("problem", ["the context is too long", None])
async def test_other_problems_with_json_stay_what_they_are(make: Any, way: str, problem: str | None):
    def answer(request: Any) -> Any:
        if problem is not None:
            raise ValueError(problem)
        return completion([Reply(content=action("", {"final_answer": "3"}), profile=None).message()], request)

    with FaultServer(answer) as server:
        agent = make(chat(server), n=2, action_format="json")
        with pytest.raises((SamplingError, LogprobsMissing), match=problem or "2 of 2 responses without log-probab"):
            await run(agent, way)


@EVERYWHERE
async def test_unmeasurable_actions(make: Any):
    """Actions that can be measured in neither form end the step."""

    def unmeasured(request: Any) -> Any:
        response = respond(request)
        response["choices"][0]["logprobs"] = None
        return response

    with FaultServer(unmeasured) as server:
        agent = make(chat(server), n=2)
        with pytest.raises(LogprobsMissing, match="2 of 2 responses without log-probabilities"):
            await run(agent)
        assert {"tools" in request for request in server.requests} == {True, False}


@EVERYWHERE
async def test_a_tool_that_the_provider_runs_is_a_clear_error(make: Any):
    model = ScriptedChatModel(replies=[Reply(content="3")] * 2)
    with pytest.raises(ConfigError, match="found 'web_search', which the provider runs itself.*action_format='native'"):
        await run(make(model, (add, {"type": "web_search"}), n=2, action_format="json"))
    assert model.requests == []


class Answer(BaseModel):
    """An answer."""

    value: int
    note: str | None = None


@WAYS
async def test_json_and_a_tool_for_structured_output(way: str):
    def answer(value: Any, profile: str) -> Reply:
        arguments = {"value": value, "note": None}
        return Reply(content=action("", {"tool": "Answer", "arguments": arguments}), profile=profile)

    model = ScriptedChatModel(replies=[answer("three", ".!........"), answer(3, ".......!..")])
    options = {"response_format": ToolStrategy(Answer)}
    state = await run(middleware(model, n=2, action_format="json", agent=options), way)
    assert state["structured_response"] == Answer(value=3)
    [flaws] = [found for found in records(state)[0]["flaws"] if found]
    assert "value" in flaws["invalid_action"]
    assert len(model.requests) == 2
    assert '"final_answer"' not in json.dumps(model.requests[0][1]["response_format"])


@pytest.mark.parametrize("durable", [False, True])
@WAYS
async def test_json_and_the_providers_structured_output(way: str, *, durable: bool):
    replies = [
        Reply(content=action("", {"tool": "add", "arguments": {"a": 1, "b": None}})),
        Reply(content=action("", {"final_answer": {"value": 3, "note": None}})),
    ]
    model = ScriptedChatModel(replies=[reply for reply in replies for _ in range(2)])
    options: Any = {"response_format": ProviderStrategy(Answer), "checkpointer": InMemorySaver()}
    agent = middleware(model, n=2, action_format="json", durable=durable, agent=options)
    state = await run(agent, way, config={"configurable": {"thread_id": "1"}})
    assert state["structured_response"] == Answer(value=3)
    assert [m.content for m in state["messages"] if m.type == "tool"] == ["3"]
    assert "response_format" in model.requests[0][1]


@CLIENTS
@pytest.mark.parametrize("schema", [Answer, ProviderStrategy(Answer), ToolStrategy(Answer)])
async def test_json_and_any_structured_output_on_a_server(client: Any, schema: Any):
    def structured(request: Any) -> Any:
        allowed = json.dumps(request["response_format"]["json_schema"]["schema"]["properties"]["action"])
        value = {"value": 3, "note": None}
        given = {"tool": "Answer", "arguments": value} if '"Answer"' in allowed else {"final_answer": value}
        return completion([Reply(content=action("", given)).message()], request)

    with FaultServer(structured) as server:
        agent = middleware(client(server), n=2, action_format="json", agent={"response_format": schema})
        assert (await run(agent))["structured_response"] == Answer(value=3)
        assert not any("tools" in request or "tool_choice" in request for request in server.requests)


async def test_the_chat_models_structured_output_in_json():
    replies = [Reply(content=action("", {"tool": "Answer", "arguments": {"value": 3, "note": None}}))] * 2
    asked = ScriptedChatModel(replies=replies)
    model = CentroidChatModel(asked, n=2, action_format="json").with_structured_output(Answer)
    assert await model.ainvoke("1 + 2?") == Answer(value=3)
    assert '"final_answer"' not in json.dumps(asked.requests[0][1]["response_format"])


# A step that is run again


@WAYS
async def test_a_durable_step_that_learned_makes_no_call_again(way: str):
    thread: Any = {"configurable": {"thread_id": "1"}}
    with FaultServer(respond) as server:
        ours = EntropyCentroidMiddleware(n=2, durable=True)
        agent: Any = create_agent(chat(server), [add], middleware=[Dying(), ours], checkpointer=InMemorySaver())
        with pytest.raises(RuntimeError, match="crash"):
            await run(agent, way, config=thread)
        assert ["tools" in request for request in server.requests] == [True, True, False, False]
        state = await run(agent, way, None, thread)
        assert len(server.requests) == 6
    assert state["messages"][-1].content == "it is 3"
    assert records(state)[0]["usage"]["input_tokens"] == 40


# Loops, and a model that changes


@EVERYWHERE
@CLIENTS
def test_one_agent_runs_in_any_loop_and_thread(make: Any, client: Any):
    """In one event loop after the other, without one, and in threads, its limiter going along."""
    with FaultServer([Reply(content="hi")]) as server:
        agent = make(client(server), (), n=4, policy=SamplingPolicy(limiter=Limiter(3)))

        def ask() -> None:
            texts.append(agent.invoke(ASK)["messages"][-1].content)

        texts: list[str] = []
        ask()
        texts += [asyncio.run(run(agent))["messages"][-1].content for _ in range(3)]
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert texts == ["hi"] * 7
        assert len(server.requests) == 28


async def test_the_middleware_sees_that_a_model_was_changed():
    with FaultServer([Reply(content="hi")]) as server:
        model = chat(server, temperature=0.5)
        agent = middleware(model, (), n=1)
        await run(agent)
        model.temperature = 0.9
        await run(agent)
    assert [request["temperature"] for request in server.requests] == [0.5, 0.9]


# Traces


def steps(path: Path) -> list[tuple[str, list[int], str | None]]:
    return [(t.run, [step.number for step in t.steps], t.task) for t in read_trajectories(path)]


@EVERYWHERE
@WAYS
async def test_every_step_is_in_the_trace(make: Any, way: str, tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    with FaultServer(respond) as server, TraceWriter(path) as trace:
        agent = make(chat(server), n=2, trace=trace)
        state = await run(agent, way, config={"metadata": {"ec_run": "mine", "ec_task": "sums"}})
        await run(agent, way)
    (named, numbers, task), (_, others, _) = steps(path)
    assert (named, numbers, task, others) == ("mine", [0, 1], "sums", [0, 1])
    [first, second] = next(iter(read_trajectories(path))).steps
    assert first.selection is not None
    assert (first.selection.chosen, len(first.candidates)) == (records(state)[0]["chosen"], 2)
    assert (first.info["spent"]["input_tokens"] >= 10, second.info) == (True, {})
    assert first.seconds is not None
    if make is not graph:
        assert [(record["run"], record["step"]) for record in records(state)] == [("mine", 0), ("mine", 1)]


@EVERYWHERE
async def test_the_turns_of_a_thread_are_one_run(make: Any, tmp_path: Path):
    path, model = tmp_path / "trace.jsonl", ScriptedChatModel(replies=[Reply(content="3")] * 6)
    with TraceWriter(path) as trace:
        agent = make(model, (), n=1, trace=trace, agent={"checkpointer": InMemorySaver()})
        for thread in ("a", "b", "a", "a"):
            await run(agent, config={"configurable": {"thread_id": thread}})
    assert sorted(steps(path)) == [("a", [0, 1, 2], None), ("b", [0], None)]


async def test_many_agents_may_write_one_trace_at_once(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    with TraceWriter(path) as trace:
        agents = [
            make(ScriptedChatModel(replies=[Reply(content="3")] * 60), (), n=2, trace=trace)
            for make in (graph, middleware, chat_model)
        ]
        await asyncio.gather(*[run(agent) for agent in agents for _ in range(10)])
    assert [numbers for _, numbers, _ in steps(path)] == [[0]] * 30


@EVERYWHERE
async def test_a_trace_that_cannot_be_written_stops_nothing(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trace = TraceWriter(tmp_path / "trace.jsonl")
    trace.close()
    model = ScriptedChatModel(replies=[Reply(content="3")])
    assert (await run(make(model, (), n=1, trace=trace)))["messages"][-1].content == "3"
    assert "step 0 of run" in caplog.text
    with pytest.raises(TraceError):
        list(read_trajectories(trace.path))


async def test_calls_of_a_chat_model_in_a_named_run_are_numbered(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    with TraceWriter(path) as trace:
        model = CentroidChatModel(ScriptedChatModel(replies=[Reply(content="3")] * 12), n=1, trace=trace)
        await model.abatch(["a", "b", "c"], {"metadata": {"ec_run": "batch"}})
        first = await model.ainvoke("alone")
        await model.ainvoke([("user", "alone"), first, ("user", "again")])
    found = {run: numbers for run, numbers, _ in steps(path)}
    assert found.pop("batch") == [0, 1, 2]
    assert found == {first.response_metadata["ec_agents"]["run"]: [0, 1]}


@pytest.mark.parametrize("make", [graph, chat_model])
async def test_what_is_bound_to_the_model_hears_of_every_candidate(make: Any):
    counter = UsageMetadataCallbackHandler()
    model = EmbeddedChatModel(seed=1).with_config(callbacks=[counter])
    agent = graph(model, (), n=3) if make is graph else CentroidChatModel(model, n=3)
    await run(agent, ask={"messages": [("user", "Ann has 2.")]} if make is graph else "Ann has 2.")
    once = UsageMetadataCallbackHandler()
    await EmbeddedChatModel(seed=1).ainvoke("Ann has 2.", {"callbacks": [once]})
    [counted], [single] = counter.usage_metadata.values(), once.usage_metadata.values()
    assert counted["input_tokens"] == 3 * single["input_tokens"]


# Effort


@EVERYWHERE
@WAYS
async def test_effort(make: Any, way: str):
    """A step draws no more candidates than its effort asks for, and its record says why."""
    model = ScriptedChatModel(replies=[Reply(content="3")] * 8)
    state = await run(make(model, (), n=8, effort=Agree(confidence=0.8)), way)
    record = records(state)[0]
    assert len(model.requests) == 2
    assert record["waves"] == [2]
    assert record["stopped"].startswith("Agree: 2 candidates agree")


@EVERYWHERE
def test_effort_is_checked(make: Any):
    """What is not an effort is refused before anything is sent."""
    with pytest.raises(ConfigError, match="effort must be Agree"):
        make(ScriptedChatModel(), (), n=8, effort="agree")


@EVERYWHERE
@WAYS
async def test_budget(make: Any, way: str):
    """A budget around an agent counts what its model counts, and ends it."""
    model = ScriptedChatModel(replies=[Reply(content="3")] * 20)
    with Budget(calls=5) as budget:
        assert len(records(await run(make(model, (), n=3), way))[0]["scores"]) == 3
        assert len(records(await run(make(model, (), n=3), way))[0]["scores"]) == 2
        with pytest.raises(BudgetExceeded, match="5 of 5 calls"):
            await run(make(model, (), n=3), way)
    assert len(model.requests) == budget.spent.calls == 5
    assert budget.spent.unpriced == {"ScriptedChatModel"}
