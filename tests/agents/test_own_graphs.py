"""The nodes in graphs of one's own: subgraphs, tools, commands, retries, context, checkpointers."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import pytest
from helpers.adding import ASK, EARLY, LATE, THREAD, add
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import InjectedState, ToolNode
from langgraph.runtime import Runtime
from langgraph.types import Command, RetryPolicy

from ec_agents.agents.graph import CentroidScorerNode, SamplingNode, route_selected
from ec_agents.agents.state import CentroidState
from ec_agents.errors import SamplingError
from ec_agents.policy import SamplingPolicy
from ec_agents.testing import Reply, ScriptedChatModel


def two_steps() -> list[Reply]:
    """A step whose second of two candidates wins and acts, then a step whose first wins and ends the run."""
    return [
        Reply(tool_calls=[("add", {"a": 1, "b": 1})], profile=LATE),
        Reply(tool_calls=[("add", {"a": 1, "b": 2})], profile=EARLY),
        Reply(content="it is 3", profile=EARLY),
        Reply(content="it is 4", profile=LATE),
    ]


def graph_of(
    replies: Sequence[Reply], tools: Sequence[Any] = (add,), *, schema: Any = CentroidState, **node: Any
) -> StateGraph[Any, Any, Any, Any]:
    """sample → score ⇢ tools → sample, by hand."""
    graph: Any = StateGraph(schema)
    graph.add_node(
        "sample",
        SamplingNode(ScriptedChatModel(replies=replies), n=2, tools=tools, policy=SamplingPolicy(min_candidates=2)),
        **node,
    )
    graph.add_node("score", CentroidScorerNode())
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "sample").add_edge("sample", "score").add_edge("tools", "sample")
    graph.add_conditional_edges("score", route_selected, ["tools", END])
    return graph


def kinds(state: dict[str, Any]) -> list[type]:
    return [type(message) for message in state["messages"]]


def test_a_subgraph_shows_and_keeps_only_what_was_chosen():
    outer: Any = StateGraph(CentroidState)
    outer.add_node("agent", graph_of(two_steps()).compile())
    outer.add_edge(START, "agent").add_edge("agent", END)
    agent = outer.compile(checkpointer=InMemorySaver())
    seen = [message for _, (message, _) in agent.stream(ASK, THREAD, stream_mode="messages", subgraphs=True)]
    # Neither the losers nor the same message twice.
    assert [m.text for m in seen if isinstance(m, AIMessage) and m.text] == ["it is 3"]
    assert len({message.id for message in seen}) == len(seen)
    assert kinds(agent.get_state(THREAD).values) == [HumanMessage, AIMessage, ToolMessage, AIMessage]


def test_parallel_tool_calls_of_the_winner_run_once_each():
    done: list[int] = []

    def square(x: int) -> int:
        """Square a number."""
        done.append(x)
        return x * x

    both = Reply(tool_calls=[("square", {"x": 2}), ("square", {"x": 3})], profile=EARLY)
    one = Reply(tool_calls=[("square", {"x": 9})], profile=LATE)
    state = graph_of([one, both, *[Reply(content="ok")] * 2], [square]).compile().invoke(ASK)
    assert sorted(done) == [2, 3]
    assert kinds(state) == [HumanMessage, AIMessage, ToolMessage, ToolMessage, AIMessage]


def test_injected_state():
    """A tool may read the state, and the model is not asked for it."""

    class Accounts(CentroidState):
        balance: int

    @tool
    def can_pay(amount: int, state: Annotated[dict[str, Any], InjectedState]) -> bool:
        """Whether there is enough money."""
        return state["balance"] >= amount

    replies = [*[Reply(tool_calls=[("can_pay", {"amount": 5})])] * 2, *[Reply(content="yes")] * 2]
    state = graph_of(replies, [can_pay], schema=Accounts).compile().invoke({**ASK, "balance": 7})
    assert state["messages"][2].content == "true"
    assert state["messages"][1].response_metadata["ec_agents"]["flaws"] == [{}] * 2


def test_a_tool_may_update_the_state_and_say_where_to_go():
    class Notes(CentroidState):
        done: bool

    @tool
    def finish(tool_call_id: Annotated[str, InjectedToolCallId]) -> Any:
        """Finish."""
        return Command(update={"done": True, "messages": [ToolMessage("finished", tool_call_id=tool_call_id)]})

    replies = [*[Reply(tool_calls=[("finish", {})])] * 2, *[Reply(content="bye")] * 2]
    state = graph_of(replies, [finish], schema=Notes).compile().invoke({**ASK, "done": False})
    assert state["done"] is True
    assert state["messages"][-1].content == "bye"


def test_a_node_after_the_choice_may_route_with_a_command():
    def route(state: CentroidState) -> Command[Any]:
        is_sure = (state.get("ec_decision", {})["margin"] or 0) > 0.5
        return Command(goto="tools" if is_sure else END)

    graph: Any = StateGraph(CentroidState)
    model = ScriptedChatModel(replies=two_steps())
    graph.add_node("sample", SamplingNode(model, n=2, tools=[add]))
    graph.add_node("score", CentroidScorerNode())
    graph.add_node("route", route, destinations=("tools", END))
    graph.add_node("tools", ToolNode([add]))
    graph.add_edge(START, "sample").add_edge("sample", "score").add_edge("score", "route").add_edge("tools", END)
    assert graph.compile().invoke(ASK)["messages"][-1].content == "3"


def test_a_retry_policy_repeats_the_node():
    replies = [Reply(error=ConnectionError("reset")), Reply(), *two_steps()]
    policy = RetryPolicy(retry_on=SamplingError, initial_interval=0.01, jitter=False)
    state = graph_of(replies, retry_policy=policy).compile().invoke(ASK)
    assert state["messages"][-1].content == "it is 3"


def test_the_context_of_the_run_may_choose_the_node():
    @dataclass
    class Context:
        is_careful: bool

    def pick(state: CentroidState, runtime: Runtime[Context]) -> str:
        return "careful" if runtime.context.is_careful else "quick"

    model = ScriptedChatModel(replies=[Reply(content="3")] * 9)
    graph: Any = StateGraph(CentroidState, context_schema=Context)
    graph.add_node("quick", SamplingNode(model, n=1)).add_node("careful", SamplingNode(model, n=8))
    graph.add_node("score", CentroidScorerNode())
    graph.add_conditional_edges(START, pick, ["quick", "careful"])
    graph.add_edge("quick", "score").add_edge("careful", "score").add_edge("score", END)
    agent = graph.compile()
    assert len(agent.invoke(ASK, context=Context(is_careful=True))["ec_decision"]["scores"]) == 8
    assert len(agent.invoke(ASK, context=Context(is_careful=False))["ec_decision"]["scores"]) == 1


# Checkpointers


def stop_and_go(saver: Any) -> None:
    """A run that stops between ``sample`` and ``score`` and goes on from what is stored."""
    agent = graph_of(two_steps()).compile(checkpointer=saver, interrupt_before=["score"])
    agent.invoke(ASK, THREAD)
    assert agent.get_state(THREAD).next == ("score",)
    agent.invoke(None, THREAD)
    state = agent.invoke(None, THREAD)
    assert state["messages"][-1].content == "it is 3"
    assert state["messages"][1].response_metadata["ec_agents"]["chosen"] == 1
    assert len(list(agent.get_state_history(THREAD))) >= 6


@pytest.mark.parametrize("strict", ["false", "true"])
def test_sqlite(strict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LANGGRAPH_STRICT_MSGPACK", strict)
    with SqliteSaver.from_conn_string(str(tmp_path / "state.db")) as saver:
        stop_and_go(saver)


async def test_sqlite_asynchronously(tmp_path: Path):
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "state.db")) as saver:
        agent = graph_of(two_steps()).compile(checkpointer=saver)
        assert (await agent.ainvoke(ASK, THREAD))["messages"][-1].content == "it is 3"


def test_postgres(postgres: str):
    with import_module("langgraph.checkpoint.postgres").PostgresSaver.from_conn_string(postgres) as saver:
        saver.setup()
        stop_and_go(saver)
