"""The agent graph: shape, state, streaming, faults, humans, crashes."""

import asyncio
import math
import operator
import os
import random
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
from helpers.adding import ASK, EARLY, LATE, THREAD, add, call_add, record, two_steps
from helpers.processes import run
from helpers.waiting import until
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatResult
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.errors import GraphRecursionError
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, Send, interrupt

from ec_agents.agents.graph import (
    CentroidScorerNode,
    SamplingNode,
    create_centroid_agent,
    route_selected,
)
from ec_agents.agents.state import CentroidState, pack_candidates, unpack_candidates
from ec_agents.candidates import FORMAT
from ec_agents.errors import ConfigError, SamplingError, SelectionError, StateError
from ec_agents.policy import SamplingPolicy
from ec_agents.sampling import sample
from ec_agents.selection import Selector
from ec_agents.testing import Reply, ScriptedChatModel

STRICT = os.environ.get("LANGGRAPH_STRICT_MSGPACK") == "true"


def agent_of(replies: Sequence[Reply], tools: Any = (add,), n: int = 3, **options: Any) -> Any:
    return create_centroid_agent(ScriptedChatModel(replies=replies), tools, n=n, **options)


def test_the_drawn_graph_shows_the_shape():
    drawn = agent_of([]).get_graph()
    assert {(edge.source, edge.target, edge.conditional) for edge in drawn.edges} == {
        ("__start__", "sample", False),
        ("sample", "score", False),
        ("score", "tools", True),
        ("score", "__end__", True),
        ("tools", "sample", False),
    }
    without_tools = agent_of([], tools=()).get_graph()
    assert {(edge.source, edge.target) for edge in without_tools.edges} == {
        ("__start__", "sample"),
        ("sample", "score"),
        ("score", "__end__"),
    }


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_only_the_winner_enters_the_messages_and_acts(way: str):
    agent = agent_of(two_steps())
    state = agent.invoke(ASK) if way == "invoke" else await agent.ainvoke(ASK)
    kinds = [type(message) for message in state["messages"]]
    assert kinds == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    _, action, result, final = state["messages"]
    assert action.tool_calls[0]["args"] == {"a": 1, "b": 2}
    assert result.content == "3"
    assert final.content == "it is 3"
    assert state["ec_candidates"] is None


def test_the_message_says_how_it_was_chosen():
    state = agent_of(two_steps()).invoke(ASK)
    found = record(state["messages"][1])
    assert found["chosen"] == 1
    assert found["scores"] == [0.75, pytest.approx(0.15), 0.75]
    assert found["margin"] == pytest.approx(0.6)
    assert found["reason"] == "ranked"
    assert found["usage"] == {"input_tokens": 30, "output_tokens": 30, "total_tokens": 60}
    assert "logprobs" not in state["messages"][1].response_metadata
    assert state["messages"][1].usage_metadata["total_tokens"] == 20


def test_streams():
    """They show each candidate, each choice and only the winner's text."""
    events = list(agent_of(two_steps()).stream(ASK, stream_mode=["custom", "messages"]))
    custom = [event for mode, event in events if mode == "custom"]
    assert [event["ec_agents"] for event in custom] == [*["candidate"] * 3, "choice", *["candidate"] * 3, "choice"]
    assert sorted(event["index"] for event in custom[:3]) == [0, 1, 2]
    assert custom[3]["chosen"] == 1
    texts = [event[0].text for mode, event in events if mode == "messages" and event[0].type == "ai"]
    assert [text for text in texts if text] == ["it is 3"]


async def test_streams_hide_the_losers_from_asynchronous_callers_too():
    seen = [message async for message, _ in agent_of(two_steps()).astream(ASK, stream_mode="messages")]
    assert [message.text for message in seen if message.type == "ai" and message.text] == ["it is 3"]


def test_requests():
    """Every request asks for log-probabilities and carries the tools and the prompt."""
    model = ScriptedChatModel(replies=two_steps())
    agent = create_centroid_agent(model.bind(user="me"), [add], n=3, top_logprobs=7, system_prompt="be brief")
    state = agent.invoke(ASK)
    assert len(model.requests) == 6
    for messages, options in model.requests:
        assert messages[0] == SystemMessage("be brief")
        assert (options["logprobs"], options["top_logprobs"], options["user"]) == (True, 7, "me")
        assert options["tools"][0]["function"]["name"] == "add"
    assert not any(isinstance(message, SystemMessage) for message in state["messages"])


def test_what_the_user_bound_wins_and_none_asks_for_nothing():
    model = ScriptedChatModel(replies=[Reply(), Reply()])
    create_centroid_agent(model.bind(top_logprobs=3), n=1).invoke(ASK)
    create_centroid_agent(model, n=1, top_logprobs=None).invoke(ASK)
    assert model.requests[0][1]["top_logprobs"] == 3
    assert "logprobs" not in model.requests[1][1]


def test_a_failed_and_a_hung_call_take_no_other_down():
    replies = [Reply(error=ConnectionError("reset")), Reply(delay=math.inf), Reply(content="fine")]
    found = agent_of(replies, policy=0.2).invoke(ASK)["messages"][-1]
    assert found.content == "fine"
    assert record(found)["failures"] == [
        "ConnectionError: reset",
        "TimeoutError: no answer within 0.2 s (timeout)",
        None,
    ]


def test_too_few_successes():
    """They raise, and the run can be resumed from where it was."""
    model = ScriptedChatModel(
        replies=[*two_steps()[:3], Reply(error=ConnectionError("reset")), *[Reply(content="3")] * 5]
    )
    agent = create_centroid_agent(
        model, [add], n=3, policy=SamplingPolicy(min_candidates=3), checkpointer=InMemorySaver()
    )
    with pytest.raises(SamplingError, match=r"2 of 3 calls succeeded, 3 needed .*ConnectionError: reset"):
        agent.invoke(ASK, THREAD)
    assert [m.type for m in agent.get_state(THREAD).values["messages"]] == ["human", "ai", "tool"]
    assert agent.invoke(None, THREAD)["messages"][-1].content == "3"


async def test_cancelling_the_run_leaves_no_task():
    model = ScriptedChatModel(replies=[Reply(delay=math.inf)] * 8)
    run = asyncio.create_task(create_centroid_agent(model, [add], n=8).ainvoke(ASK))
    await until(lambda: len(model.requests) == 8)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


# Flaws of the action


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (("nope", {}), "unknown tool 'nope'; known: add"),
        (("add", {"a": 1}), "arguments of 'add' do not fit: b: Field required"),
        (("add", {"a": "x", "b": 2}), "arguments of 'add' do not fit: a: Input should be a valid integer"),
    ],
)
def test_an_invalid_action_loses_to_a_valid_one(call: tuple[str, dict[str, Any]], problem: str):
    replies = [Reply(tool_calls=[call], profile=EARLY), call_add(1, 2, LATE), *[Reply(content="3")] * 2]
    state = agent_of(replies, n=2).invoke(ASK)
    found = record(state["messages"][1])
    assert found["chosen"] == 1
    assert problem in found["flaws"][0]["invalid_action"]


def test_every_action_invalid():
    """The error is returned to the model and the run continues."""
    replies = [*[Reply(tool_calls=[("nope", {})])] * 2, *[Reply(content="sorry")] * 2]
    state = agent_of(replies, n=2).invoke(ASK)
    assert record(state["messages"][1])["reason"] == "all_flawed"
    assert "nope is not a valid tool" in state["messages"][2].content
    assert state["messages"][-1].content == "sorry"


def test_an_empty_response_loses_and_alone_it_is_recorded():
    assert (
        agent_of([Reply(content="", profile=EARLY), Reply(content="3", profile=LATE)], n=2)
        .invoke(ASK)["messages"][-1]
        .content
        == "3"
    )
    found = record(agent_of([Reply(content="")] * 2, n=2).invoke(ASK)["messages"][-1])
    assert found["reason"] == "all_flawed"
    assert set(found["flaws"][0]) == {"empty"}


def test_a_tool_that_raises_is_answered_with_its_error():
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        raise ValueError("the adder is broken")

    state = agent_of([call_add(1, 2), Reply(content="I could not add")], [add], n=1).invoke(ASK)
    assert state["messages"][2].status == "error"
    assert "the adder is broken" in state["messages"][2].content
    assert state["messages"][-1].content == "I could not add"


def test_a_tool_node_of_ones_own_decides_about_errors():
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        raise ValueError("the adder is broken")

    with pytest.raises(ValueError, match="the adder is broken"):
        agent_of([call_add(1, 2)], ToolNode([add], handle_tool_errors=False), n=1).invoke(ASK)


# Models without log-probabilities


def test_a_model_without_logprobs_falls_back_and_says_so(caplog: pytest.LogCaptureFixture):
    found = record(agent_of([Reply(content="3", profile=None)] * 3).invoke(ASK)["messages"][-1])
    assert found["reason"] == "fallback"
    assert found["scores"] == [None, None, None]
    assert "logprobs is null or absent" in found["flaws"][0]["no_signal"]
    assert "could be scored" in caplog.text


def test_a_model_without_logprobs_can_be_an_error():
    with pytest.raises(SelectionError, match="none of 3 candidates could be scored"):
        agent_of([Reply(content="3", profile=None)] * 3, selector=Selector(fallback="raise")).invoke(ASK)


def test_tool_calls_without_logprobs_never_win_by_having_no_data():
    replies = [call_add(1, 2, profile=None), Reply(content="3", profile=LATE), call_add(1, 2, profile=None)]
    found = agent_of(replies).invoke(ASK)["messages"][-1]
    assert found.content == "3"
    assert record(found)["scores"][0] is None


# Arguments


@pytest.mark.parametrize(
    "options", [{"n": 0}, {"n": "8"}, {"policy": {}}, {"policy": -1}, {"policy": SamplingPolicy(min_candidates=9)}]
)
def test_bad_arguments(options: dict[str, Any]):
    """Arguments out of range are refused when the agent is made."""
    with pytest.raises(ConfigError, match=r"^(n|policy|timeout|min_candidates) must be"):
        agent_of([], **{"n": 8, **options})


def test_something_that_is_no_chat_model_is_refused():
    with pytest.raises(ConfigError, match="model must be a LangChain BaseChatModel.*; found RunnableLambda"):
        create_centroid_agent(RunnableLambda(lambda _: AIMessage("")))


def test_recursion_limit_stops_a_run_that_never_ends():
    with pytest.raises(GraphRecursionError):
        agent_of([call_add(1, 2)] * 9, n=1, recursion_limit=7).invoke(ASK)


# State


def test_the_state_may_have_more_keys_and_tools_may_write_them():
    class Notes(CentroidState):
        notes: Annotated[list[str], operator.add]

    @tool
    def note(text: str) -> Any:
        """Keep a note."""
        return Command(update={"notes": [text], "messages": [ToolMessage("kept", tool_call_id="call_0")]})

    replies = [Reply(tool_calls=[("note", {"text": "milk"})]), Reply(content="done")]
    state = agent_of(replies, [note], n=1, state_schema=Notes).invoke({**ASK, "notes": ["eggs"]})
    assert state["notes"] == ["eggs", "milk"]


def builtins_only(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and builtins_only(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(builtins_only, value))
    return value is None or type(value) in (str, int, float, bool)


async def test_what_enters_the_state_is_builtins_without_logprobs():
    async def call(index: int) -> AIMessage:
        return two_steps()[index].message()

    packed = pack_candidates(await sample(call, n=3))
    assert builtins_only(packed)
    drawn = unpack_candidates(packed)
    assert [c.tool_calls[0]["args"] for c in drawn.candidates] == [{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 9, "b": 9}]
    assert all("logprobs" not in message.response_metadata for message in drawn.messages.values())
    state = CentroidScorerNode().invoke({"ec_candidates": packed})
    assert builtins_only(state["ec_decision"])
    assert builtins_only(record(state["messages"][0]))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "a SamplingNode must run before"),
        ({"ec_candidates": None}, "a SamplingNode must run before"),
        (
            {"ec_candidates": {"format": FORMAT + 1, "packed": ""}},
            "another version of ec_agents wrote this checkpoint",
        ),
        ({"ec_candidates": {"format": FORMAT, "packed": "no zlib"}}, "damaged"),
        ({"ec_candidates": {"format": FORMAT}}, "damaged"),
    ],
)
def test_a_state_without_readable_candidates_is_a_clear_error(state: dict[str, Any], message: str):
    with pytest.raises(StateError, match=message):
        CentroidScorerNode().invoke(state)


def checkpoint_sizes(agent: Any, saver: InMemorySaver) -> list[int]:
    """Bytes that each checkpoint of a run takes, channel values included."""
    agent.invoke(ASK, THREAD)
    serde = JsonPlusSerializer()
    return [len(serde.dumps_typed(found.checkpoint["channel_values"])[1]) for found in saver.list(THREAD)]


def long_reply(rng: random.Random) -> Reply:
    """500 tokens of four characters, hard to compress, with entropies of all sizes."""
    text = "".join(rng.choice("etaoinshrdlucmfwypvb ") for _ in range(2000))
    return Reply(content=text, profile="".join(rng.choices("!.", k=500)))


_rng = random.Random(7)


class Scattered(ScriptedChatModel):
    """Its log-probabilities are drawn at random, so that no two tokens have equal ones."""

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        result = await super()._agenerate(*args, **kwargs)
        for entry in result.generations[0].message.response_metadata["logprobs"]["content"]:
            for alternative in entry["top_logprobs"]:
                alternative["logprob"] = math.log(_rng.uniform(1e-6, 0.25))
            entry["logprob"] = entry["top_logprobs"][0]["logprob"]
        return result


def plain_graph(reply: Reply, saver: InMemorySaver) -> Any:
    def model(state: CentroidState) -> Any:
        return {"messages": [ScriptedChatModel(replies=[reply]).invoke(state.get("messages", []))]}

    graph = StateGraph(CentroidState)
    graph.add_node("model", model)
    graph.add_edge(START, "model").add_edge("model", END)
    return graph.compile(checkpointer=saver)


def test_a_checkpoint_is_at_most_60_kb_larger_than_without_us():
    rng = random.Random(1)
    replies = [long_reply(rng) for _ in range(8)]
    model = Scattered(replies=replies)
    plain = max(checkpoint_sizes(plain_graph(Reply(content=replies[0].content, profile=None), s := InMemorySaver()), s))
    ours = checkpoint_sizes(create_centroid_agent(model, n=8, checkpointer=(s := InMemorySaver())), s)
    print(f"largest checkpoint: {plain} bytes without us, {max(ours)} with us")
    assert len(ours) >= 4
    assert max(ours) - plain < 60_000


def test_a_run_goes_through_the_sqlite_checkpointer(tmp_path: Path):
    with SqliteSaver.from_conn_string(str(tmp_path / "state.db")) as saver:
        agent = agent_of(two_steps(), checkpointer=saver, interrupt_before=["score", "tools"])
        state = agent.invoke(ASK, THREAD)
        for _ in range(3):
            state = agent.invoke(None, THREAD)
    assert state["messages"][-1].content == "it is 3"
    assert record(state["messages"][1])["chosen"] == 1


@pytest.mark.skipif(not STRICT, reason="run by test_all_of_this_holds_under_strict_serialization")
def test_strict_serialization_is_on():
    serde = JsonPlusSerializer()
    assert not isinstance(serde.loads_typed(serde.dumps_typed(Reply())), Reply)


@pytest.mark.skipif(STRICT, reason="would call itself")
def test_all_of_this_holds_under_strict_serialization():
    """LangGraph reads the setting when it is imported, so it takes a process of its own."""
    options = ["-q", "--assert=plain", "-p", "no:cacheprovider", "-k", "60_kb or sqlite or strict or person"]
    code = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    done = run(code, *options, __file__, anew=["langchain", "langgraph"], LANGGRAPH_STRICT_MSGPACK="true")
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout


# Humans and crashes


def test_a_person_sees_the_scored_candidates():
    """A person sees the scored candidates before one acts."""
    done: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        done.append((a, b))
        return a + b

    model = ScriptedChatModel(replies=two_steps())
    agent = create_centroid_agent(model, [add], n=3, checkpointer=InMemorySaver(), interrupt_before=["tools"])
    agent.invoke(ASK, THREAD)
    assert not done
    waiting = agent.get_state(THREAD)
    assert waiting.next == ("tools",)
    decision = waiting.values["ec_decision"]
    assert decision["chosen"] == 1
    assert [decision["candidates"][i]["tool_calls"][0]["args"]["a"] for i in range(3)] == [1, 1, 9]
    agent.invoke(None, THREAD)
    assert done == [(1, 2)]
    assert len(model.requests) == 6


def test_a_tool_that_asks_a_person_draws_no_new_candidates():
    @tool
    def pay(amount: int) -> str:
        """Pay."""
        return f"{interrupt('sure?')} {amount}"

    model = ScriptedChatModel(replies=[*[Reply(tool_calls=[("pay", {"amount": 5})])] * 2, *[Reply(content="paid")] * 2])
    agent = create_centroid_agent(model, [pay], n=2, checkpointer=InMemorySaver())
    assert agent.invoke(ASK, THREAD)["__interrupt__"][0].value == "sure?"
    state = agent.invoke(Command(resume="yes"), THREAD)
    assert state["messages"][2].content == "yes 5"
    assert len(model.requests) == 4


CRASH = """
import os, sys
from langgraph.checkpoint.sqlite import SqliteSaver
from ec_agents import Selector, create_centroid_agent
from ec_agents.scoring import CentroidScorer
from ec_agents.testing import Reply, ScriptedChatModel

class Deadly(CentroidScorer):
    def __call__(self, candidates):
        os._exit(9)

database, log, deadly = sys.argv[1:]
class Counting(ScriptedChatModel):
    def _next(self, messages, options):
        with open(log, "a") as file:
            file.write("call\\n")
        return super()._next(messages, options)

model = Counting(replies=[Reply(content=f"answer {i}", profile="." * (7 - i) + "!" + "." * i) for i in range(4)])
selector = Selector(scorer=Deadly() if deadly else CentroidScorer())
with SqliteSaver.from_conn_string(database) as saver:
    agent = create_centroid_agent(model, n=4, selector=selector, checkpointer=saver)
    ask = {"messages": [("user", "hi")]} if deadly else None
    state = agent.invoke(ask, {"configurable": {"thread_id": "1"}}, durability="sync")
    print(state["messages"][-1].content)
"""


def test_killed_between_sample_and_score(tmp_path: Path):
    """A run killed between sample and score resumes without a new call."""
    log = tmp_path / "calls.txt"
    given = (CRASH, tmp_path / "state.db", log)
    assert run(*given, "deadly").returncode == 9
    assert log.read_text().count("call") == 4
    with sqlite3.connect(tmp_path / "state.db") as database:
        assert database.execute("select count(*) from checkpoints").fetchone()[0] >= 2
    database.close()
    resumed = run(*given, "")
    assert resumed.stdout.strip() == "answer 3", resumed.stderr
    assert log.read_text().count("call") == 4


# Own graphs


def test_the_nodes_work_in_a_graph_of_ones_own():
    class State(CentroidState):
        seen: list[str]

    def look(state: State) -> dict[str, Any]:
        return {"seen": [*state.get("seen", []), state.get("messages", [])[-1].text]}

    model = ScriptedChatModel(replies=two_steps())
    graph = StateGraph(State)
    graph.add_node("draft", SamplingNode(model, tools=[add], n=3))
    graph.add_node("choose", CentroidScorerNode())
    graph.add_node("look", look)
    graph.add_node("tools", ToolNode([add]))
    graph.add_edge(START, "draft").add_edge("draft", "choose").add_edge("tools", "draft").add_edge("look", END)
    graph.add_conditional_edges("choose", route_selected, {"tools": "tools", END: "look"})
    compiled: Any = graph.compile()
    assert compiled.invoke(ASK)["seen"] == ["it is 3"]


CALL: Any = {"name": "f", "args": {}, "id": "1", "type": "tool_call"}


@pytest.mark.parametrize(
    ("messages", "target"),
    [
        ([], END),
        ([HumanMessage("hi")], END),
        ([AIMessage("done")], END),
        ([AIMessage("", tool_calls=[CALL])], [Send("tools", [CALL])]),
        (
            [AIMessage("", tool_calls=[CALL]), ToolMessage("x", tool_call_id="1")],
            [Send("tools", {"messages": [AIMessage("")]})],
        ),
        ([AIMessage("", tool_calls=[CALL]), HumanMessage("stop")], END),
    ],
)
def test_route_selected(messages: list[Any], target: Any):
    assert route_selected({"messages": messages}) == target


def test_text_of_any_script_survives():
    text = "数学 ∑ \U0001f600 e\u0301 \u202eabc"
    assert agent_of([Reply(content=text)] * 2, n=2).invoke(ASK)["messages"][-1].content == text


@pytest.mark.parametrize("n", [1, 64])
def test_any_number_of_candidates(n: int):
    replies = [Reply(content=f"{i}", profile="." * (70 - i) + "!" + "." * i) for i in range(n)]
    assert agent_of(replies, n=n).invoke(ASK)["messages"][-1].content == f"{n - 1}"


def test_a_cache_does_not_make_the_candidates_equal():
    model = ScriptedChatModel(replies=[Reply(content=str(i)) for i in range(4)], cache=InMemoryCache())
    create_centroid_agent(model, n=4).invoke(ASK)
    assert len(model.requests) == 4
