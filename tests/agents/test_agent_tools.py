"""How tools run: ``create_centroid_agent`` and the wiring of the documentation, beside ``create_agent``."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from helpers.adding import ASK, EARLY, LATE, THREAD, add
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, interrupt

from ec_agents.agents.graph import CentroidScorerNode, SamplingNode, create_centroid_agent, route_selected
from ec_agents.agents.state import CentroidState
from ec_agents.testing import Reply, ScriptedChatModel

Build = Callable[..., Any]


def prebuilt(replies: Sequence[Reply], tools: Sequence[Any], **options: Any) -> Any:
    """Our agent: two equal candidates per step."""
    twice = [reply for reply in replies for _ in range(2)]
    return create_centroid_agent(ScriptedChatModel(replies=twice), tools, n=2, **options)


def wired(replies: Sequence[Reply], tools: Sequence[Any], **options: Any) -> Any:
    """The graph that the documentation builds by hand."""
    graph: Any = StateGraph(CentroidState)
    graph.add_node("sample", SamplingNode(ScriptedChatModel(replies=replies), n=1, tools=tools))
    graph.add_node("score", CentroidScorerNode())
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "sample").add_edge("sample", "score").add_edge("tools", "sample")
    graph.add_conditional_edges("score", route_selected, ["tools", END])
    return graph.compile(**options)


def langchains(replies: Sequence[Reply], tools: Sequence[Any], **options: Any) -> Any:
    return create_agent(ScriptedChatModel(replies=replies), tools, **options)


ALL = pytest.mark.parametrize("build", [prebuilt, wired, langchains])
AGENTS = pytest.mark.parametrize("build", [prebuilt, langchains])


def calls(*named: tuple[str, dict[str, Any]]) -> Reply:
    return Reply(tool_calls=list(named))


def results(state: dict[str, Any]) -> list[str]:
    return [message.text for message in state["messages"] if isinstance(message, ToolMessage)]


@ALL
def test_pay_and_ask(build: Build):
    """A tool that finished is not repeated when one beside it interrupts, and results are in the order of the calls."""
    paid: list[int] = []

    @tool
    def pay(amount: int) -> str:
        """Pay."""
        paid.append(amount)
        return f"paid {amount}"

    @tool
    def ask() -> str:
        """Ask."""
        return f"answered {interrupt('sure?')}"

    replies = [calls(("ask", {}), ("pay", {"amount": 5}), ("pay", {"amount": 6})), Reply(content="done")]
    agent = build(replies, [pay, ask], checkpointer=InMemorySaver())
    assert [found.value for found in agent.invoke(ASK, THREAD)["__interrupt__"]] == ["sure?"]
    state = agent.invoke(Command(resume="yes"), THREAD)
    assert sorted(paid) == [5, 6]
    assert results(state) == ["answered yes", "paid 5", "paid 6"]


@ALL
async def test_two_questions(build: Build):
    """Two tools that interrupt ask one question each, and each gets its own answer."""

    @tool
    def delete(what: str) -> str:
        """Delete."""
        return f"{what}: {interrupt(f'delete {what}?')}"

    replies = [calls(("delete", {"what": "a"}), ("delete", {"what": "b"})), Reply(content="done")]
    agent = build(replies, [delete], checkpointer=InMemorySaver())
    asked = (await agent.ainvoke(ASK, THREAD))["__interrupt__"]
    assert {found.value for found in asked} == {"delete a?", "delete b?"}
    assert len({found.id for found in asked}) == 2
    answers = {found.id: "no" if found.value == "delete a?" else "yes" for found in asked}
    assert results(await agent.ainvoke(Command(resume=answers), THREAD)) == ["a: no", "b: yes"]


@ALL
def test_one_answer_of_two(build: Build):
    """A question that was not answered is asked again, and its tool does not run."""

    @tool
    def delete(what: str) -> str:
        """Delete."""
        return f"{what}: {interrupt(f'delete {what}?')}"

    replies = [calls(("delete", {"what": "a"}), ("delete", {"what": "b"})), Reply(content="done")]
    agent = build(replies, [delete], checkpointer=InMemorySaver())
    first, second = agent.invoke(ASK, THREAD)["__interrupt__"]
    (left,) = agent.invoke(Command(resume={first.id: "yes"}), THREAD)["__interrupt__"]
    assert (left.id, left.value) == (second.id, second.value)


@ALL
def test_a_crash_beside_a_result(build: Build):
    """A tool that finished is not repeated after one beside it failed the run."""
    done: list[str] = []
    stored = threading.Event()

    class Outage(BaseException):
        pass

    class Saver(InMemorySaver):
        def put_writes(self, config: Any, writes: Any, *args: Any, **kwargs: Any) -> None:
            super().put_writes(config, writes, *args, **kwargs)
            if "content='sent'" in str(writes):
                stored.set()

    @tool
    def send() -> str:
        """Send."""
        done.append("sent")
        return "sent"

    @tool
    def fetch() -> str:
        """Fetch."""
        stored.wait(30)
        done.append("fetched")
        if done.count("fetched") == 1:
            raise Outage
        return "fetched"

    replies = [calls(("send", {}), ("fetch", {})), Reply(content="done")]
    agent = build(replies, [send, fetch], checkpointer=Saver())
    with pytest.raises(Outage):
        agent.invoke(ASK, THREAD, durability="sync")
    assert results(agent.invoke(None, THREAD)) == ["sent", "fetched"]
    assert sorted(done) == ["fetched", "fetched", "sent"]


@ALL
def test_many_results(build: Build):
    """A dozen results are in the order of the calls."""
    agent = build([calls(*[("add", {"a": i, "b": 0}) for i in range(12)]), Reply(content="done")], [add])
    assert results(agent.invoke(ASK)) == [str(i) for i in range(12)]


@AGENTS
def test_edited_arguments(build: Build):
    """A person who edits the call before it runs decides what runs."""
    agent = build(
        [calls(("add", {"a": 1, "b": 1})), Reply(content="done")],
        [add],
        checkpointer=InMemorySaver(),
        interrupt_before=["tools"],
    )
    agent.invoke(ASK, THREAD)
    message = agent.get_state(THREAD).values["messages"][-1]
    edited = message.model_copy(update={"tool_calls": [{**message.tool_calls[0], "args": {"a": 40, "b": 2}}]})
    agent.update_state(THREAD, {"messages": [edited]})
    assert results(agent.invoke(None, THREAD)) == ["42"]


@tool(return_direct=True)
def report(text: str) -> str:
    """Report."""
    return text


@tool(return_direct=True)
def sign(name: str) -> str:
    """Sign."""
    return name


@AGENTS
@pytest.mark.parametrize(
    ("first", "kinds"),
    [
        (calls(("report", {"text": "it is 3"})), ["human", "ai", "tool"]),
        (calls(("report", {"text": "it is 3"}), ("sign", {"name": "A."})), ["human", "ai", "tool", "tool"]),
        (calls(("report", {"text": "it is 3"}), ("add", {"a": 1, "b": 2})), ["human", "ai", "tool", "tool", "ai"]),
        (calls(("add", {"a": 1, "b": 2})), ["human", "ai", "tool", "ai"]),
    ],
)
def test_return_direct(build: Build, first: Reply, kinds: list[str]):
    """The run ends after tools that return directly, if no other tool ran beside them."""
    agent = build([first, Reply(content="model")], [report, sign, add])
    assert [message.type for message in agent.invoke(ASK)["messages"]] == kinds


def test_return_direct_error():
    """An error of a tool that returns directly goes to the model."""
    agent = prebuilt([calls(("report", {})), Reply(content="sorry")], [report])
    assert agent.invoke(ASK)["messages"][-1].text == "sorry"


@AGENTS
def test_name(build: Build):
    """The agent's name stands on its messages, and on nobody else's."""
    agent = build([calls(("add", {"a": 1, "b": 2})), Reply(content="3")], [add], name="adder")
    state = agent.invoke(ASK)
    assert [m.name for m in state["messages"] if isinstance(m, AIMessage)] == ["adder", "adder"]
    assert [m.name for m in state["messages"] if not isinstance(m, AIMessage)] == [None, "add"]
    assert agent.name == "adder"


def test_own_name():
    """A tool node of another name is reached through ``to``."""
    graph: Any = StateGraph(CentroidState)
    replies = [calls(("add", {"a": 1, "b": 2})), Reply(content="3")]
    graph.add_node("draft", SamplingNode(ScriptedChatModel(replies=replies), n=1, tools=[add]))
    graph.add_node("choose", CentroidScorerNode())
    graph.add_node("act", ToolNode([add]))
    graph.add_edge(START, "draft").add_edge("draft", "choose").add_edge("act", "draft")
    graph.add_conditional_edges("choose", partial(route_selected, to="act"), ["act", END])
    assert results(graph.compile().invoke(ASK)) == ["3"]


# Tools that run elsewhere

SHOW: Any = {
    "type": "function",
    "function": {
        "name": "show",
        "description": "Show.",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}


@pytest.mark.parametrize("tools", [[SHOW], [SHOW, add]])
def test_front_end(tools: list[Any]):
    """A call of a tool in the user interface ends the run; the next one goes on from the result that is added."""
    replies = [calls(("show", {"x": 1})), Reply(content="shown")]
    agent = prebuilt(replies, tools, checkpointer=InMemorySaver())
    last = agent.invoke(ASK, THREAD)["messages"][-1]
    assert last.tool_calls[0]["name"] == "show"
    assert last.response_metadata["ec_agents"]["flaws"] == [{}] * 2
    result = ToolMessage("ok", tool_call_id=last.tool_calls[0]["id"])
    assert agent.invoke({"messages": [result]}, THREAD)["messages"][-1].text == "shown"


def test_front_end_beside_ours():
    """Of a message with calls here and elsewhere, those here run, and the run ends."""
    agent = prebuilt([calls(("show", {"x": 1}), ("add", {"a": 1, "b": 2}))], [SHOW, add])
    state = agent.invoke(ASK)
    assert [message.type for message in state["messages"]] == ["human", "ai", "tool"]
    assert results(state) == ["3"]


# What depends on the run


def test_prompt_of_the_state():
    """A function of the state gives the prompt of each step."""

    def prompt(state: Any) -> str:
        return f"{len(state['messages'])} messages"

    model = ScriptedChatModel(replies=[calls(("add", {"a": 1, "b": 2})), Reply(content="3")])
    state = create_centroid_agent(model, [add], n=1, system_prompt=prompt).invoke(ASK)
    assert [messages[0].text for messages, _ in model.requests] == ["1 messages", "3 messages"]
    assert not any(message.type == "system" for message in state["messages"])


async def test_prompt_awaited():
    """The function may be asynchronous, and return nothing."""

    async def prompt(state: Any) -> str | None:
        return None

    model = ScriptedChatModel(replies=[Reply(content="3")])
    await create_centroid_agent(model, n=1, system_prompt=prompt).ainvoke(ASK)
    assert [message.type for message in model.requests[0][0]] == ["human"]


def test_model_of_the_state():
    """A function of the state gives the model of each step, with the tools bound."""
    quick = ScriptedChatModel(replies=[calls(("add", {"a": 1, "b": 2}))])
    careful = ScriptedChatModel(replies=[Reply(content="3")])
    agent = create_centroid_agent(lambda state: careful if len(state["messages"]) > 1 else quick, [add], n=2)
    assert agent.invoke(ASK)["messages"][-1].text == "3"
    assert [len(quick.requests), len(careful.requests)] == [2, 2]
    assert careful.requests[0][1]["tools"][0]["function"]["name"] == "add"


def test_llm_input_messages():
    """Messages for the model alone are used once and do not enter the conversation."""
    model = ScriptedChatModel(replies=[calls(("add", {"a": 1, "b": 2})), Reply(content="3")])

    def hook(state: Any) -> Any:
        return {"llm_input_messages": [HumanMessage("short")]} if len(state["messages"]) == 1 else {}

    agent = create_centroid_agent(model, [add], n=1, pre_model_hook=hook)
    state = agent.invoke(ASK)
    assert [messages[0].text for messages, _ in model.requests] == ["short", "what is 1 + 2?"]
    assert [message.type for message in state["messages"]] == ["human", "ai", "tool", "ai"]
    assert "llm_input_messages" not in state


def test_profiles_still_decide():
    """The choice is made among candidates of the model that the function gave."""
    replies = [Reply(content="late", profile=LATE), Reply(content="early", profile=EARLY)]
    model = ScriptedChatModel(replies=replies)
    assert create_centroid_agent(lambda _: model, n=2).invoke(ASK)["messages"][-1].text == "early"
