"""At most once: what happens to a tool call if the process dies, at every point, in every front end."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier, Event
from typing import Annotated, Any, ClassVar

import pytest
from helpers.processes import run
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, InjectedToolCallId, StructuredTool, tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState, InjectedStore, ToolNode, ToolRuntime
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, RetryPolicy, Send, interrupt
from pydantic import BaseModel

from ec_agents import ConfigError, IdempotencyKey, StateError, UnknownCall, create_centroid_agent, once
from ec_agents.agents import journal, once_where_destructive
from ec_agents.testing import Reply, ScriptedChatModel

THREAD: RunnableConfig = {"configurable": {"thread_id": "1"}}
ASK: Any = {"messages": [("user", "pay")]}
FRONTS = ["create_centroid_agent", "create_agent", "graph", "sub-graph"]


class Killed(BaseException):
    """The end of a process, as far as the tool and its journal can see."""


def killed(home: Path, *runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``helpers/kills.py``: what was paid in runs that SIGKILL ended, and that were resumed."""
    code = "import sys; from helpers.kills import main; main(sys.argv[1], *sys.argv[2:])"
    done = run(code, home, *map(json.dumps, runs))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_kills(rows: list[dict[str, Any]], runs: int) -> None:
    """No effect twice, none lost, the same key at every attempt, and nobody asked where the outcome was known."""
    assert len(rows) == 5 * runs
    for row in rows:
        assert (row["twice"], row["lost"], row["keys"]) == (0, 0, 2), row
        assert row["said"] == ["", "paid 0", "", "paid 1", "all paid"], row
        assert row["asked"] == (row["point"] in ("before the effect", "before the result")), row
        if row["point"] == "after the checkpoint" and row["front"] == "graph" and not row["asynchronous"]:
            assert row["found"] == [
                [],
                ["tools"],
            ]  # nothing is next, but a task of the step is there: its result is kept


def test_sqlite(tmp_path: Path):
    """A process that is killed, at any point of a payment or at random, pays once in every front end.

    Without ``once``, it pays twice where the result was not in a checkpoint.
    """
    at_points = [*({"front": front} for front in FRONTS), {"front": "graph", "asynchronous": True}]
    at_random = {"random": True, "seed": 1, "kills": 5, "longest": 0.3, "payments": 3, "slow": 0.01}
    rows = killed(tmp_path, *at_points, {"front": "graph", "once": False}, {"front": "graph", **at_random})
    *rows, killed_at_random = rows
    check_kills([row for row in rows if row["once"]], len(at_points))
    twice = {row["point"] for row in rows if row["twice"] and not row["once"]}
    assert twice >= {"before the result", "before the checkpoint"}
    assert (killed_at_random["twice"], killed_at_random["lost"], killed_at_random["keys"]) == (0, 0, 3)


def test_postgres(postgres: str, tmp_path: Path):
    """So does one whose checkpoints are in PostgreSQL."""
    runs = [{"front": front, "database": ["postgres", postgres]} for front in FRONTS[:3]]
    check_kills(killed(tmp_path, *runs), len(runs))


@dataclass
class Till:
    """A tool that pays, and what was paid; it can die, fail or ask on the way."""

    paid: list[int]
    keys: list[str]
    before: Callable[[int], Any]
    after: Callable[[int], Any]

    @classmethod
    def new(cls, before: Callable[[int], Any] = id, after: Callable[[int], Any] = id) -> "Till":
        return cls([], [], before, after)

    def tool(self, **settings: Any) -> BaseTool:
        def pay(amount: int, key: IdempotencyKey) -> str:
            """Pay."""
            self.keys.append(key)
            self.before(amount)
            self.paid.append(amount)
            self.after(amount)
            return f"paid {amount}"

        return once(pay, **settings)


def first_time(action: Callable[[], Any]) -> Callable[[int], Any]:
    """Does the action at the first payment only."""
    left = [action]

    def act(amount: int) -> Any:
        return left.pop()() if left else None

    return act


def die() -> None:
    raise Killed


def wired(
    tools: Sequence[Any], *steps: Sequence[tuple[str, dict[str, Any], str]], each: bool = True, **compiled: Any
) -> Any:
    """A graph whose model makes the given tool calls, step by step; ``each`` call is a task of its own."""

    def model(state: MessagesState) -> dict[str, Any]:
        done = sum(isinstance(message, AIMessage) for message in state["messages"])
        calls = steps[done] if done < len(steps) else []
        return {"messages": [AIMessage("", tool_calls=[{"name": n, "args": a, "id": i} for n, a, i in calls])]}

    def route(state: MessagesState) -> Any:
        calls = state["messages"][-1].tool_calls  # type: ignore[union-attr]
        if not calls:
            return END
        return [Send("tools", [{**call, "type": "tool_call"}]) for call in calls] if each else "tools"

    graph: Any = StateGraph(MessagesState)
    retry = compiled.pop("retry_policy", None)
    graph.add_node("model", model).add_node("tools", ToolNode(tools, handle_tool_errors=True), retry_policy=retry)
    graph.add_edge(START, "model").add_edge("tools", "model")
    graph.add_conditional_edges("model", route, ["tools", END])
    return graph.compile(**{"checkpointer": InMemorySaver(), **compiled})


PAY = [("pay", {"amount": 5}, "call_0")]


def said(state: dict[str, Any]) -> list[Any]:
    return [message.content for message in state["messages"] if isinstance(message, ToolMessage)]


def question(result: dict[str, Any]) -> dict[str, Any]:
    (asked,) = result["__interrupt__"]
    return asked.value


def crash(agent: Any, given: Any = ASK, **settings: Any) -> None:
    with pytest.raises(Killed):
        agent.invoke(given, THREAD, **settings)


# What happens to an unknown outcome


@pytest.mark.parametrize(
    ("answer", "paid", "content"),
    [
        ("repeat", [5, 5], "paid 5"),
        ("skip", [5], "The outcome of this call is unknown: it may have been carried out. It was not repeated."),
        ({"result": "receipt 7"}, [5], "receipt 7"),
        ({"result": {"receipt": 7}}, [5], '{"receipt": 7}'),
    ],
)
def test_a_person_is_asked(answer: Any, paid: list[int], content: str):
    """The question has all that is known; nothing is repeated before it is answered."""
    till = Till.new(after=first_time(die))
    agent = wired([till.tool()], PAY)
    crash(agent)
    asked = question(agent.invoke(None, THREAD))
    call = asked["ec_once"]
    assert (call["tool"], call["args"], call["tool_call_id"], call["error"]) == ("pay", {"amount": 5}, "call_0", None)
    assert call["idempotency_key"] == till.keys[0]
    assert "may have had its effect" in asked["question"]
    assert till.paid == [5]
    assert said(agent.invoke(Command(resume=answer), THREAD)) == [content]
    assert till.paid == paid
    assert set(till.keys) == {till.keys[0]}


def test_an_answer_that_is_none_is_asked_for_again():
    till = Till.new(after=first_time(die))
    agent = wired([till.tool()], PAY)
    crash(agent)
    agent.invoke(None, THREAD)
    assert "ec_once" in question(agent.invoke(Command(resume="yes"), THREAD))
    assert said(agent.invoke(Command(resume="repeat"), THREAD)) == ["paid 5"]


def test_an_answer_holds_for_one_attempt():
    """A process that dies again during the repetition leaves an unknown outcome again."""
    till = Till.new(after=lambda _: die() if len(till.paid) < 3 else None)
    agent = wired([till.tool()], PAY)
    crash(agent)
    for attempts in (1, 2):
        assert "ec_once" in question(agent.invoke(None, THREAD))
        assert len(till.paid) == attempts
        if attempts == 1:
            crash(agent, Command(resume="repeat"))
    assert said(agent.invoke(Command(resume="repeat"), THREAD)) == ["paid 5"]


async def by_lookup(call: UnknownCall) -> Any:
    return {"result": f"looked up {call.args['amount']}"}


@pytest.mark.parametrize(
    ("policy", "paid", "content"),
    [
        ("repeat", [5, 5], "paid 5"),
        ("skip", [5], "The outcome of this call is unknown: it may have been carried out. It was not repeated."),
        (lambda call: {"result": call.idempotency_key}, [5], None),
        (by_lookup, [5], "looked up 5"),
    ],
)
def test_policies(policy: Any, paid: list[int], content: str | None):
    till = Till.new(after=first_time(die))
    agent = wired([till.tool(on_unknown=policy)], PAY)
    crash(agent)
    assert said(agent.invoke(None, THREAD)) == [content or till.keys[0]]
    assert till.paid == paid


async def test_policies_of_asynchronous_runs():
    till = Till.new(after=first_time(die))
    agent = wired([till.tool(on_unknown=by_lookup)], PAY)
    with pytest.raises(Killed):
        await agent.ainvoke(ASK, THREAD)
    assert said(await agent.ainvoke(None, THREAD)) == ["looked up 5"]


def test_a_policy_may_ask():
    till = Till.new(after=first_time(die))
    agent = wired([till.tool(on_unknown=lambda _: "ask")], PAY)
    crash(agent)
    assert "ec_once" in question(agent.invoke(None, THREAD))


def test_a_policy_that_answers_something_else_ends_the_run():
    till = Till.new(after=first_time(die))
    agent = wired([till.tool(on_unknown=lambda _: "again")], PAY)
    crash(agent)
    with pytest.raises(ConfigError, match="returned 'again'"):
        agent.invoke(None, THREAD)
    assert till.paid == [5]


# What is known


class Interrupted(Exception):
    """Ends a task after its tools, before its results are in a checkpoint."""


def fails_once(*tools: Any) -> ToolNode:
    """A node that fails after its tools ran, the first time."""
    left = [Interrupted]

    def wrap(request: Any, execute: Callable[[Any], Any]) -> Any:
        result = execute(request)
        if left:
            raise left.pop()
        return result

    return ToolNode(tools, handle_tool_errors=False, wrap_tool_call=wrap)


def only_tools(node: ToolNode, *calls: tuple[str, dict[str, Any], str], **compiled: Any) -> tuple[Any, Any]:
    """A graph of the node alone, and the input that makes the calls."""
    graph: Any = StateGraph(MessagesState)
    graph.add_node("tools", node).add_edge(START, "tools")
    message = AIMessage("", tool_calls=[{"name": n, "args": a, "id": i} for n, a, i in calls], id="m")
    return graph.compile(**{"checkpointer": InMemorySaver(), **compiled}), {"messages": [message]}


def test_a_recorded_result_is_returned_as_it_was():
    ran: list[int] = []

    @tool(response_format="content_and_artifact")
    def pay(amount: int) -> tuple[str, dict[str, int]]:
        """Pay."""
        ran.append(amount)
        return f"paid {amount}", {"receipt": 7}

    agent, given = only_tools(fails_once(once(pay)), *PAY)
    with pytest.raises(Interrupted):
        agent.invoke(given, THREAD)
    last = agent.invoke(None, THREAD)["messages"][-1]
    assert (last.content, last.artifact, last.tool_call_id, last.name) == ("paid 5", {"receipt": 7}, "call_0", "pay")
    assert ran == [5]


def test_a_command_is_returned_as_it_was():
    ran: list[str] = []

    @tool
    def go(tool_call_id: Annotated[str, InjectedToolCallId]) -> Command[Any]:
        """Go."""
        ran.append(tool_call_id)
        return Command(update={"messages": [ToolMessage("gone", tool_call_id=tool_call_id)]})

    agent, given = only_tools(fails_once(once(go)), ("go", {}, "call_0"))
    with pytest.raises(Interrupted):
        agent.invoke(given, THREAD)
    assert said(agent.invoke(None, THREAD)) == ["gone"]
    assert ran == ["call_0"]


def test_of_a_result_that_cannot_be_stored_the_text_is_kept():
    @tool(response_format="content_and_artifact")
    def pay(amount: int) -> tuple[str, Any]:
        """Pay."""
        return f"paid {amount}", lambda: None

    agent, given = only_tools(fails_once(once(pay)), *PAY)
    with pytest.raises(Interrupted):
        agent.invoke(given, THREAD)
    assert said(agent.invoke(None, THREAD)) == ["paid 5"]


def test_equal_ids_in_two_steps_are_two_calls():
    """Some servers call every tool call ``call_0``: the second step's call is not taken for the first's."""
    till = Till.new()
    assert said(wired([till.tool()], PAY, PAY).invoke(ASK, THREAD)) == ["paid 5", "paid 5"]
    assert till.paid == [5, 5]
    assert len(set(till.keys)) == 2


def test_a_turn_later_and_another_thread_are_other_calls():
    till = Till.new()
    agent = wired([till.tool()], PAY, [], PAY)
    agent.invoke(ASK, THREAD)
    agent.invoke(ASK, THREAD)
    agent.invoke(ASK, {"configurable": {"thread_id": "2"}})
    assert till.paid == [5, 5, 5]


def test_a_replay_does_not_pay_and_an_edited_call_does():
    till = Till.new()
    agent = wired([till.tool()], PAY, each=False)
    agent.invoke(ASK, THREAD)
    before = next(state for state in agent.get_state_history(THREAD) if state.next == ("tools",))
    assert said(agent.invoke(None, before.config)) == ["paid 5"]
    assert till.paid == [5]
    message = before.values["messages"][-1]
    edited = message.model_copy(update={"tool_calls": [{**message.tool_calls[0], "args": {"amount": 6}}]})
    fork = agent.update_state(before.config, {"messages": [edited]}, as_node="model")
    assert said(agent.invoke(None, fork)) == ["paid 6"]
    assert till.paid == [5, 6]


def test_a_state_that_is_edited_after_a_crash_does_not_repeat():
    """The new checkpoint has another id, and its tasks too; the call is still the same."""
    till = Till.new(after=first_time(die))
    agent = wired([till.tool()], PAY, each=False)
    crash(agent)
    agent.update_state(THREAD, {"messages": []}, as_node="model")
    assert "ec_once" in question(agent.invoke(None, THREAD))
    assert till.paid == [5]


def test_journal_and_thread():
    """The journal is not part of the history and is deleted with the thread."""
    saver = InMemorySaver()
    agent = wired([Till.new().tool()], PAY, checkpointer=saver)
    agent.invoke(ASK, THREAD)
    assert all("record" not in state.values for state in agent.get_state_history(THREAD, limit=50))
    assert [ns for ns in saver.storage["1"] if ns.startswith(journal.NAMESPACE)]
    saver.delete_thread("1")
    assert "1" not in saver.storage


def test_the_call_is_in_a_checkpoint_before_it_is_made():
    """With ``durability="async"``, LangGraph writes the checkpoint while the tool runs; a kill would lose the call."""

    class Late(InMemorySaver):
        looked_for: ClassVar = Event()
        written: ClassVar = Event()

        def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
            if config["configurable"]["checkpoint_ns"] or metadata["step"] < 1:
                return super().put(config, checkpoint, metadata, new_versions)
            assert self.looked_for.wait(30)
            done = super().put(config, checkpoint, metadata, new_versions)
            self.written.set()
            return done

        def get_tuple(self, config: Any) -> Any:
            found = super().get_tuple(config)
            if found is None and config["configurable"].get("checkpoint_id"):
                self.looked_for.set()
            return found

    held: list[bool] = []
    till = Till.new(before=lambda _: held.append(Late.written.is_set()) or Late.looked_for.set())
    wired([till.tool()], PAY, checkpointer=Late()).invoke(ASK, THREAD, durability="async")
    assert held == [True]


# Errors


def test_an_error_goes_to_the_model_as_usual():
    def pay(amount: int) -> str:
        """Pay."""
        raise ValueError("no funds")

    plain, guarded = (said(wired([made], PAY).invoke(ASK, THREAD)) for made in (pay, once(pay)))
    assert guarded == plain
    assert "no funds" in guarded[0]


def test_arguments_that_do_not_fit_go_to_the_model_as_usual():
    bad = [("pay", {"amount": "five"}, "call_0")]
    till = Till.new()

    def pay(amount: int) -> str:
        """Pay."""
        return ""

    assert said(wired([till.tool()], bad).invoke(ASK, THREAD)) == said(wired([pay], bad).invoke(ASK, THREAD))
    assert till.paid == []


def test_a_failed_call_is_not_retried_unasked():
    """An error does not say that nothing was done: a retry policy asks first, and tells what was raised."""
    till = Till.new(after=first_time(lambda: (_ for _ in ()).throw(ConnectionError("lost"))))
    graph: Any = StateGraph(MessagesState)
    node = ToolNode([till.tool()], handle_tool_errors=False)
    graph.add_node("tools", node, retry_policy=RetryPolicy(initial_interval=0.001, jitter=False)).add_edge(
        START, "tools"
    )
    agent = graph.compile(checkpointer=InMemorySaver())
    _, given = only_tools(node, *PAY)
    asked = question(agent.invoke(given, THREAD))
    assert asked["ec_once"]["error"] == "ConnectionError: lost"
    assert till.paid == [5]
    assert said(agent.invoke(Command(resume="skip"), THREAD))[0].startswith("The outcome of this call is unknown")


def test_a_journal_that_cannot_be_written_ends_the_run():
    """The model is not told that a call failed which may have been carried out."""

    class Full(InMemorySaver):
        left: ClassVar = [1]

        def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
            if config["configurable"]["checkpoint_ns"].startswith(journal.NAMESPACE):
                if not self.left:
                    raise OSError("disk full")
                self.left.pop()
            return super().put(config, checkpoint, metadata, new_versions)

    till = Till.new()
    saver = Full()
    agent = wired([till.tool()], PAY, checkpointer=saver)
    with pytest.raises(StateError, match="disk full"):
        agent.invoke(ASK, THREAD)
    saver.left.extend([1, 1])
    assert "ec_once" in question(agent.invoke(None, THREAD))
    assert till.paid == [5]


# Interrupts of the tool itself


def test_a_tool_may_ask_before_it_pays():
    """An interrupt in the tool is no unknown outcome: the run resumes with its answer, and pays once."""
    till = Till.new(before=lambda amount: interrupt(f"pay {amount}?"))
    agent = wired([till.tool()], PAY)
    assert question(agent.invoke(ASK, THREAD)) == "pay 5?"
    assert till.paid == []
    assert said(agent.invoke(Command(resume="yes"), THREAD)) == ["paid 5"]
    assert till.paid == [5]


@pytest.mark.parametrize("word", ["yes", "repeat"])
def test_approval_and_outcome(word: str):
    """Not even if it is the same word; nor does the answer approve: the tool asks again before it pays again."""
    approvals: list[Any] = []
    till = Till.new(before=lambda amount: approvals.append(interrupt(f"pay {amount}?")), after=first_time(die))
    agent = wired([till.tool()], PAY)
    agent.invoke(ASK, THREAD)
    crash(agent, Command(resume=word))
    assert till.paid == [5]
    assert "ec_once" in question(agent.invoke(None, THREAD))
    result = agent.invoke(Command(resume="repeat"), THREAD)
    if "ec_once" in str(result["__interrupt__"]):
        result = agent.invoke(Command(resume="repeat"), THREAD)
    assert question(result) == "pay 5?"
    assert till.paid == [5]
    assert said(agent.invoke(Command(resume="again, yes"), THREAD)) == ["paid 5"]
    assert approvals == [word, "again, yes"]
    assert till.paid == [5, 5]


# Several calls


TWO = [("pay", {"amount": 5}, "call_0"), ("pay", {"amount": 6}, "call_1")]


def test_parallel_calls_are_asked_about_apart():
    till = Till.new(after=lambda _: die() if len(till.paid) < 3 else None)
    agent = wired([till.tool()], TWO)
    crash(agent)
    while len(till.paid) < 2:
        crash(agent, None)
    asked = {i.value["ec_once"]["args"]["amount"]: i.id for i in agent.invoke(None, THREAD)["__interrupt__"]}
    result = agent.invoke(Command(resume={asked[5]: "skip", asked[6]: "repeat"}), THREAD)
    assert [text[:8] for text in said(result)] == ["The outc", "paid 6"]
    assert sorted(till.paid) == [5, 6, 6]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_calls_that_share_a_task_are_answered_by_name(*, asynchronous: bool):
    """A plain ToolNode runs all calls in one task, where answers could be taken for another's: they name the call."""
    both = Barrier(2)
    till = Till.new(
        lambda _: both.wait() if len(till.keys) <= 2 else None, lambda _: die() if len(till.keys) <= 2 else None
    )
    agent = wired([till.tool()], TWO, each=False)

    async def go(given: Any) -> Any:
        return await agent.ainvoke(given, THREAD) if asynchronous else agent.invoke(given, THREAD)

    with pytest.raises(Killed):
        await go(ASK)
    assert "'call_" in question(await go(None))["question"]
    assert "__interrupt__" in await go(Command(resume="repeat"))  # whose answer would that be?
    result = {"__interrupt__": ()}
    while "__interrupt__" in result:
        result = await go(Command(resume={"call_0": "skip", "call_1": "repeat"}))
    assert [text[:8] for text in said(result)] == ["The outc", "paid 6"]
    assert sorted(till.paid) == [5, 6, 6]


# Tools of every form


@tool
def decorated(amount: int) -> str:
    """Pay, decorated."""
    return f"paid {amount}"


class Form(BaseModel):
    """What to pay."""

    amount: int


class Subclass(BaseTool):
    name: str = "subclass"
    description: str = "Pays."
    args_schema: Any = Form

    def _run(self, amount: int) -> str:
        return f"paid {amount}"


class Bare(BaseTool):
    name: str = "bare"
    description: str = "Pays."

    def _run(self, amount: int) -> str:
        return f"paid {amount}"


async def only_async(amount: int) -> str:
    """Pay, asynchronously."""
    return f"paid {amount}"


def with_all(  # noqa: PLR0917 - as tools are
    amount: int,
    state: Annotated[dict[str, Any], InjectedState],
    messages: Annotated[list[Any], InjectedState("messages")],
    store: Annotated[BaseStore, InjectedStore()],
    tool_call_id: Annotated[str, InjectedToolCallId],
    config: RunnableConfig,
) -> str:
    """Pay with all that can be injected."""
    assert state["messages"] == messages
    assert isinstance(store, BaseStore)
    assert config.get("configurable", {})["thread_id"] == "1"
    return f"paid {amount} {tool_call_id}"


def with_runtime(amount: int, runtime: ToolRuntime[Any, Any]) -> str:
    """Pay with the runtime."""
    assert runtime.store is not None
    return f"paid {amount} {runtime.tool_call_id}"


def with_other_runtime(amount: int, run: ToolRuntime) -> str:
    """Pay with the runtime under another name."""
    return f"paid {amount} {run.tool_call_id}"


async def remote(**arguments: Any) -> str:
    return f"paid {arguments['amount']}"


SCHEMA = {"type": "object", "properties": {"amount": {"type": "integer"}}, "required": ["amount"]}
FORMS: list[Any] = [
    decorated,
    Subclass(),
    Bare(),
    only_async,
    with_all,
    with_runtime,
    with_other_runtime,
    StructuredTool.from_function(coroutine=only_async, name="structured", return_direct=True),
    StructuredTool(name="remote", description="As MCP tools are.", args_schema=SCHEMA, coroutine=remote),
]


def name_of(form: Any) -> str:
    return getattr(form, "name", None) or form.__name__


@pytest.mark.parametrize("form", FORMS, ids=name_of)
async def test_forms_of_tools(form: Any):
    """The model sees the same schema; what is injected arrives; the message is the same as without ``once``."""
    guarded = once(form)
    assert convert_to_openai_tool(guarded) == convert_to_openai_tool(form if isinstance(form, BaseTool) else tool(form))
    if isinstance(form, BaseTool):
        assert guarded.return_direct == form.return_direct
    calls = (name_of(form), {"amount": 5}, "call_0")
    found = []
    for made in (form, guarded):
        agent, given = only_tools(ToolNode([made]), calls, store=InMemoryStore())
        found.append((await agent.ainvoke(given, THREAD))["messages"][-1])
        if form not in (only_async, FORMS[-1], FORMS[-2]):
            found.append(agent.invoke(given, {"configurable": {"thread_id": "1"}})["messages"][-1])
    assert len({(m.content, m.name, m.status) for m in found}) == 1
    assert found[0].content.startswith("paid 5")


def test_the_model_cannot_forge_the_key():
    till = Till.new()
    wired([till.tool()], [("pay", {"amount": 5, "key": "forged"}, "call_0")]).invoke(ASK, THREAD)
    assert till.paid == [5]
    assert till.keys != ["forged"]


def test_as_a_decorator():
    @once(on_unknown="skip")
    def pay(amount: int) -> str:
        """Pay."""
        return f"paid {amount}"

    assert said(wired([pay], PAY).invoke(ASK, THREAD)) == ["paid 5"]
    assert once(pay, on_unknown="ask").tool is pay.tool  # type: ignore[attr-defined]


def test_destructive_tools():
    """Metadata says which tools to guard; ``create_centroid_agent`` reads it."""
    paid: list[int] = []

    def pay(amount: int) -> str:
        """Pay."""
        paid.append(amount)
        return f"paid {amount}"

    marked = StructuredTool.from_function(pay, metadata={"destructive": True})
    guarded = once_where_destructive([marked, decorated, pay, {"type": "web_search"}])
    assert [type(made).__name__ for made in guarded] == ["OnceTool", "StructuredTool", "function", "dict"]
    script = [Reply(tool_calls=[("pay", {"amount": 5})]), Reply(content="paid")]
    agent = create_centroid_agent(ScriptedChatModel(replies=script), [marked], n=1)
    with pytest.raises(ConfigError, match="nowhere to record"):
        agent.invoke(ASK)
    assert paid == []


# What is refused, before anything is paid


@pytest.mark.parametrize("unknown", ["again", 3, None])
def test_policies_that_are_none(unknown: Any):
    with pytest.raises(ConfigError, match="on_unknown"):
        once(decorated, on_unknown=unknown)


def test_what_is_no_tool():
    with pytest.raises(ConfigError, match="needs a tool or a function"):
        once({"type": "web_search"})  # type: ignore[call-overload]


def test_no_journal():
    till = Till.new()
    agent = wired([till.tool()], PAY, checkpointer=None)
    with pytest.raises(ConfigError, match="nowhere to record the call of 'pay'"):
        agent.invoke(ASK)
    assert till.paid == []


def test_outside_of_a_graph():
    with pytest.raises(ConfigError, match="run the tool itself"):
        once(decorated).invoke({"amount": 5})


def test_durability_exit():
    """Nothing is in a checkpoint before the run ends: the call could not be recognised."""
    till = Till.new()
    with pytest.raises(ConfigError, match="durability='exit'"):
        wired([till.tool()], PAY).invoke(ASK, THREAD, durability="exit")
    assert till.paid == []


def test_a_sub_graph_without_checkpoints(monkeypatch: pytest.MonkeyPatch):
    """It starts again from its input after a crash, and its model makes other calls."""
    monkeypatch.setattr(journal, "PATIENCE", 0.05)
    till = Till.new()
    outer: Any = StateGraph(MessagesState)
    outer.add_node("agent", wired([till.tool()], PAY, checkpointer=False)).add_edge(START, "agent")
    with pytest.raises(ConfigError, match="found no checkpoint of the sub-graph 'agent:"):
        outer.compile(checkpointer=InMemorySaver()).invoke(ASK, THREAD)
    assert till.paid == []


def test_two_calls_with_one_id():
    till = Till.new()
    agent = wired([till.tool()], [*PAY, *PAY])
    with pytest.raises(ConfigError, match="two tool calls of one message have the id 'call_0'"):
        agent.invoke(ASK, THREAD)
    assert till.paid == []


def test_a_store_as_journal():
    """For callers that keep messages, with their ids, themselves: no checkpointer, nobody to ask."""
    store = InMemoryStore()
    till = Till.new(after=first_time(die))
    node = ToolNode([till.tool(on_unknown="skip")])
    agent, given = only_tools(node, *PAY, checkpointer=None, store=store)
    with pytest.raises(Killed):
        agent.invoke(given)
    for _ in range(2):
        assert said(agent.invoke(given))[0].startswith("The outcome of this call is unknown")
    assert till.paid == [5]
    asking, given = only_tools(ToolNode([till.tool()]), *PAY, checkpointer=None, store=store)
    with pytest.raises(ConfigError, match="needs a checkpointer"):
        asking.invoke(given)


async def test_a_store_as_journal_of_asynchronous_runs():
    till = Till.new()
    agent, given = only_tools(ToolNode([till.tool(on_unknown="skip")]), *PAY, checkpointer=None, store=InMemoryStore())
    for _ in range(2):
        assert said(await agent.ainvoke(given)) == ["paid 5"]
    assert till.paid == [5]
