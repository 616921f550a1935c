"""Tool calls that cannot be decoded, against a server that refuses every invalid history."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from helpers.adding import ASK, THREAD, add
from helpers.serving import CLIENTS, own
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphRecursionError
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode

from ec_agents.agents.graph import CentroidScorerNode, SamplingNode, create_centroid_agent, route_selected
from ec_agents.agents.middleware import EntropyCentroidMiddleware
from ec_agents.agents.state import CentroidState
from ec_agents.agents.tool_calls import answered
from ec_agents.testing import FaultServer, Reply
from ec_agents.testing.server import completion


def check_history(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what OpenAI or vLLM refuse: calls without answers, answers without calls, broken names and arguments."""
    open_calls: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            if message["tool_call_id"] not in open_calls:
                raise ValueError("a tool message must answer a call of the message before")
            open_calls.remove(message["tool_call_id"])
            continue
        if open_calls:
            raise ValueError(f"calls without an answer: {open_calls}")
        for call in message.get("tool_calls") or ():
            if not call["id"] or call["id"] in open_calls:
                raise ValueError("ids of calls must be strings that differ")
            if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", call["function"]["name"]):
                raise ValueError("name of a function")
            if not isinstance(json.loads(call["function"]["arguments"]), dict):
                raise ValueError("arguments must be an object")  # noqa: TRY004 - the server answers 400
            open_calls.add(call["id"])
    if open_calls:
        raise ValueError(f"calls without an answer: {open_calls}")


def saying(request: Any, *calls: tuple[Any, str, str]) -> Any:
    """An answer with these calls: id, name, and arguments as they are written."""
    body: Any = completion([Reply(content="it is 3").message()], request)
    if calls:
        written = [
            {"id": id_, "type": "function", "function": {"name": name, "arguments": args}} for id_, name, args in calls
        ]
        body["choices"][0]["message"] |= {"content": None, "tool_calls": written}
        body["choices"][0]["finish_reason"] = "tool_calls"
    return body


BROKEN = '{"a": 1, "b": '


def strict(*steps: Sequence[tuple[Any, str, str]]) -> Callable[[Any], Any]:
    """A server whose answers call these tools, step by step, and then end; it refuses invalid histories."""

    def answer(request: Any) -> Any:
        check_history(request["messages"])
        done = sum(message["role"] == "assistant" for message in request["messages"])
        return saying(request, *(steps[done] if done < len(steps) else ()))

    return answer


def prebuilt(model: Any, tools: Any, **options: Any) -> Any:
    return create_centroid_agent(model, tools, n=2, action_format="native", **options)


def wired(model: Any, tools: Any, **options: Any) -> Any:
    graph: Any = StateGraph(CentroidState)
    graph.add_node("sample", SamplingNode(model, n=2, tools=tools, action_format="native"))
    graph.add_node("score", CentroidScorerNode())
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "sample").add_edge("sample", "score").add_edge("tools", "sample")
    graph.add_conditional_edges("score", route_selected, ["tools", END])
    return graph.compile(**options)


def with_middleware(model: Any, tools: Any, **options: Any) -> Any:
    return create_agent(model, tools, middleware=[EntropyCentroidMiddleware(n=2, action_format="native")], **options)


BUILDS = pytest.mark.parametrize("build", [prebuilt, wired, with_middleware])


@BUILDS
@CLIENTS
@pytest.mark.parametrize("arguments", [BROKEN, "", "x" * 5000, "{'a': 1}"])
async def test_all_broken(build: Any, client: Any, arguments: str):
    """The error goes back to the model, which can then act."""
    await goes_back(build, client, arguments)


@BUILDS
@pytest.mark.parametrize("arguments", ["[1, 2]", "null", '"text"', "7"])
async def test_no_object(build: Any, arguments: str):
    """So does JSON that is not an object. ``ChatOpenAI`` raises on it, and the call has failed."""
    await goes_back(build, own, arguments)


async def goes_back(build: Any, client: Any, arguments: str) -> None:
    steps = [("c1", "add", arguments)], [("c2", "add", '{"a": 1, "b": 2}')]
    with FaultServer(strict(*steps)) as server:
        state = await build(client(server), [add]).ainvoke(ASK)
    assert state["messages"][-1].text == "it is 3"
    told = next(message for message in state["messages"] if isinstance(message, ToolMessage))
    if arguments:  # some clients read none as {}
        assert (told.status, told.tool_call_id) == ("error", "c1")
        assert len(told.text) < 1000


@BUILDS
@CLIENTS
@pytest.mark.parametrize("saver", [None, InMemorySaver])
async def test_half_broken(build: Any, client: Any, saver: Any):
    """The sound calls run once, the broken ones are answered, and the next turn of the conversation is valid."""
    ran: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        ran.append((a, b))
        return a + b

    steps = [("c1", "add", BROKEN), ("c2", "add", '{"a": 1, "b": 2}'), ("c3", "nope", "{")]
    with FaultServer(strict(steps)) as server:
        agent = build(client(server), [add], checkpointer=saver and saver())
        state = await agent.ainvoke(ASK, THREAD)
        if saver:
            state = await agent.ainvoke({"messages": [("user", "and now?")]}, THREAD)
    assert ran == [(1, 2)]
    assert state["messages"][-1].text == "it is 3"
    answers = [message for message in state["messages"] if isinstance(message, ToolMessage)]
    assert sorted((answer.tool_call_id, answer.status) for answer in answers) == [
        ("c1", "error"),
        ("c2", "success"),
        ("c3", "error"),
    ]


@BUILDS
@CLIENTS
@pytest.mark.parametrize("ids", [(None, None), ("same", "same"), ("", "")])
async def test_ids(build: Any, client: Any, ids: tuple[Any, Any]):
    """Missing and repeated ids are replaced, so that every call has its answer."""
    first, second = ids
    steps = [(first, "add", '{"a": 1, "b": 2}'), (second, "add", BROKEN)]
    with FaultServer(strict(steps)) as server:
        state = await build(client(server), [add]).ainvoke(ASK)
    assert state["messages"][-1].text == "it is 3"


@pytest.mark.parametrize("build", [prebuilt, wired])
def test_recursion_limit(build: Any):
    """A model that never writes a sound call is told until the recursion limit."""
    with FaultServer(lambda request: saying(request, ("c", "add", BROKEN))) as server:
        agent = build(own(server), [add])
        with pytest.raises(GraphRecursionError):
            agent.invoke(ASK, {"recursion_limit": 9})
        assert len(server.requests) >= 6


def test_front_end_broken():
    """A broken call of a tool that runs elsewhere is answered here, and the model goes on."""
    show: Any = {"type": "function", "function": {"name": "show", "parameters": {"type": "object", "properties": {}}}}
    with FaultServer(strict([("c1", "show", "{")])) as server:
        for tools in ([show], [show, add]):
            assert prebuilt(own(server), tools).invoke(ASK)["messages"][-1].text == "it is 3"


def test_other_forms_of_the_call():
    """No trace of the broken call is left in the blocks of the content, or in what the client keeps of the response."""
    call: Any = {"type": "invalid_tool_call", "name": "add", "args": BROKEN, "id": "c1", "error": None}
    raw = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": BROKEN}}
    message = AIMessage(
        [{"type": "text", "text": "hm"}, dict(call)],
        invalid_tool_calls=[call],
        additional_kwargs={"tool_calls": [raw], "refusal": None},
    )
    kept, error = answered(message)
    assert kept.content == [{"type": "text", "text": "hm"}]
    assert kept.additional_kwargs == {"refusal": None}
    assert isinstance(error, ToolMessage)
    assert "add was not called" in error.text
    assert BROKEN in error.text


def test_sound_message():
    """A sound message comes back as it is."""
    message = AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])
    assert answered(message) == [message]
    assert answered(message)[0] is message
