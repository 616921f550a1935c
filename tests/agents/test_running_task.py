"""Resuming: a model step that asked after sampling is refused, any other resume goes on."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from helpers.adding import ASK, THREAD, Dying, add, two_steps
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, HumanInTheLoopMiddleware
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.constants import START
from langgraph.graph import MessagesState, StateGraph
from langgraph.types import Command, interrupt

from ec_agents import EntropyCentroidMiddleware, SamplingPolicy
from ec_agents.errors import ConfigError
from ec_agents.testing import Reply, ScriptedChatModel


@tool
def ask_person(question: str) -> str:
    """Ask a person."""
    return str(interrupt(question))


def asking_replies() -> list[Reply]:
    return [Reply(tool_calls=[("ask_person", {"question": "who?"})])] * 2 + [Reply(content="Bob")] * 2


def agent_of(replies: list[Reply], tools: Any, *outer: Any, **options: Any) -> Any:
    model = ScriptedChatModel(replies=replies)
    return create_agent(model, tools, middleware=[*outer, EntropyCentroidMiddleware(n=2)], **options)


def in_a_subgraph(inner: Any) -> Any:
    graph = StateGraph(MessagesState).add_node("inner", inner).add_edge(START, "inner")
    return graph.compile(checkpointer=InMemorySaver())


def as_a_tool(inner: Any) -> Any:
    @tool
    def delegate(task: str) -> str:
        """Let another agent do it."""
        return inner.invoke({"messages": [("user", task)]})["messages"][-1].text

    replies = [Reply(tool_calls=[("delegate", {"task": "ask"})])] * 2 + [Reply(content="Bob")] * 2
    return agent_of(replies, [delegate], checkpointer=InMemorySaver())


@pytest.mark.parametrize("place", [in_a_subgraph, as_a_tool])
@pytest.mark.parametrize("by_id", [False, True], ids=["plain", "by id"])
def test_agent_inside_another(place: Callable[[Any], Any], *, by_id: bool):
    """A tool of an inner agent asks; the answer resumes it."""
    replies = asking_replies()
    # As a tool, an agent without a checkpointer of its own keeps its steps in the parent's.
    agent = place(agent_of(replies, [ask_person]))
    asked = agent.invoke(ASK, THREAD)["__interrupt__"][0]
    resumed = agent.invoke(Command(resume={asked.id: "Bob"} if by_id else "Bob"), THREAD)
    assert resumed["messages"][-1].text == "Bob"


def test_breakpoint():
    """A static breakpoint consumes no answer."""
    agent = agent_of(
        [*two_steps()[:2], *two_steps()[3:5]], [add], checkpointer=InMemorySaver(), interrupt_before=["tools"]
    )
    agent.invoke(ASK, THREAD)
    assert agent.invoke(Command(resume=True), THREAD)["messages"][-1].content


class AskingAround(AgentMiddleware[Any, Any, Any]):
    """Asks before the model step, after it, or both."""

    def __init__(self, *, before: bool = False, after: bool = False) -> None:
        super().__init__()
        self.before, self.after = before, after

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        if self.before:
            interrupt("may I?")
        response = handler(request)
        if self.after:
            interrupt("this?")
        return response

    async def awrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        if self.before:
            interrupt("may I?")
        response = await handler(request)
        if self.after:
            interrupt("this?")
        return response


@pytest.mark.parametrize("by_id", [False, True], ids=["plain", "by id"])
def test_asked_before_sampling(*, by_id: bool):
    """A person who was asked before sampling saw no candidates: the answer is for that question."""
    agent = agent_of([Reply(content="hi")] * 2, [], AskingAround(before=True), checkpointer=InMemorySaver())
    asked = agent.invoke(ASK, THREAD)["__interrupt__"][0]
    resumed = agent.invoke(Command(resume={asked.id: True} if by_id else True), THREAD)
    assert resumed["messages"][-1].content == "hi"


@pytest.mark.parametrize("before", [False, True])
async def test_asked_after_sampling(tmp_path: Any, *, before: bool):
    """A person who saw the candidates must not approve others."""
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "db")) as saver:
        asking = AskingAround(before=before, after=True)
        agent = agent_of([Reply(content="hi")] * 4, [], asking, checkpointer=saver)
        asked = (await agent.ainvoke(ASK, THREAD))["__interrupt__"][0].value
        if before:
            assert asked == "may I?"
            asked = (await agent.ainvoke(Command(resume=True), THREAD))["__interrupt__"][0].value
        assert asked == "this?"
        with pytest.raises(ConfigError, match="other candidates than those that the person saw"):
            await agent.ainvoke(Command(resume=True), THREAD)


def test_approval_of_actions():
    """LangChain's own approval asks after the model step, and resumes."""
    human = HumanInTheLoopMiddleware(interrupt_on={"add": True})
    agent = agent_of([*two_steps()[:2], *two_steps()[3:5]], [add], human, checkpointer=InMemorySaver())
    agent.invoke(ASK, THREAD)
    done = agent.invoke(Command(resume={"decisions": [{"type": "approve"}]}), THREAD)["messages"]
    assert isinstance(done[-2], ToolMessage)


async def run(method: Callable[..., Any], given: Any) -> Any:
    found = method(given, THREAD)
    return await found if inspect.isawaitable(found) else found


@pytest.mark.parametrize("limits", [{"retries": 1}, {"hedge_after": 0.05, "retries": 1}, {"max_concurrency": 1}])
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_durable_retries(way: str, limits: dict[str, Any]):
    """A durable step that runs again repeats no call, however often its calls were sent."""
    fails = [Reply(error=ConnectionError("reset"))] if "retries" in limits else []
    model = ScriptedChatModel(replies=[*fails, *[Reply(content="hi")] * 3, *[Reply(content="again")] * 3])
    ours = EntropyCentroidMiddleware(n=3, durable=True, policy=SamplingPolicy(**limits))
    agent: Any = create_agent(model, middleware=[Dying(), ours], checkpointer=InMemorySaver())
    with pytest.raises(RuntimeError, match="crash"):
        await run(getattr(agent, way), ASK)
    sent = len(model.requests)
    state = await run(getattr(agent, way), None)
    assert (len(model.requests), state["messages"][-1].content) == (sent, "hi")
