"""Tools that take effect at most once, whatever happens to the process.

LangGraph runs a tool again if the process died before the tool's result was in a checkpoint. ``once`` records each call
before the tool runs and its result afterwards, so that a resumed run knows which calls are finished, and which may or
may not have had their effect.
"""

import inspect
import json
import uuid
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints, overload

from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool, InjectedToolArg, tool as create_tool
from langchain_core.tools.base import get_all_basemodel_annotations
from langchain_core.utils.pydantic import get_fields
from langgraph import errors as langgraph_errors
from langgraph.errors import GraphBubbleUp, GraphInterrupt
from langgraph.prebuilt import ToolRuntime
from langgraph.store.base import BaseStore
from langgraph.types import interrupt

from ec_agents.agents.journal import CheckpointJournal, Journal, NotRecorded, Record, Refused, StoreJournal
from ec_agents.errors import ConfigError
from ec_agents.sampling import run_blocking

_RUNTIME = "ec_runtime"
_ANSWERS = ("ask", "skip", "repeat")
_is_invalid_resume: Callable[[BaseException], bool] = getattr(langgraph_errors, "is_invalid_resume", lambda _: False)


class _IdempotencyKey(InjectedToolArg):
    """Marks the parameter that receives the idempotency key."""


IdempotencyKey = Annotated[str, _IdempotencyKey]
"""Type of a tool's parameter that receives the idempotency key of the call, a UUID; the model does not see it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownCall:
    """A call that was started and has no recorded result: it may or may not have had its effect."""

    tool: str
    """Name of the tool."""
    args: Mapping[str, Any]
    """Arguments that the model gave."""
    tool_call_id: str
    """Id of the tool call in the message."""
    idempotency_key: str
    """What a parameter of type ``IdempotencyKey`` received: the same for every attempt."""
    started: str
    """Time of the last attempt, ISO 8601, UTC."""
    error: str | None
    """What the tool raised; None: the process ended first."""


Answer = Literal["ask", "skip", "repeat"] | Mapping[Literal["result"], Any]
"""``ask`` a person, ``skip`` the call and tell the model, ``repeat`` it, or give the ``result`` that it had."""
OnUnknown = Literal["ask", "skip", "repeat"] | Callable[[UnknownCall], Answer | Awaitable[Answer]]


@overload
def once(tool: BaseTool | Callable[..., Any], *, on_unknown: OnUnknown = "ask") -> BaseTool: ...
@overload
def once(*, on_unknown: OnUnknown = "ask") -> Callable[[BaseTool | Callable[..., Any]], BaseTool]: ...
def once(tool: BaseTool | Callable[..., Any] | None = None, *, on_unknown: OnUnknown = "ask") -> Any:
    """Return a tool whose calls take effect at most once, even if the process is killed while one is under way.

    The call is recorded before the tool runs and its result afterwards, in the checkpointer of the run (without one, in
    its store). When LangGraph makes the call again, a recorded result is returned as it was. A call without a result,
    because the process ended or the tool raised, is not repeated; ``on_unknown`` decides. A tool that interrupts runs
    again on resume, as usual: what it does before its ``interrupt`` must be repeatable.

    The model sees the same schema. Injected state, store, runtime and tool call id reach the tool as before, and a
    parameter of type ``IdempotencyKey`` receives a UUID that is the same for every attempt at the call.

    Args:
        tool: A tool or a function. Without it, ``once`` is a decorator.
        on_unknown: ``ask`` interrupts the run with what is known (an ``UnknownCall``) and expects ``"skip"``,
            ``"repeat"`` or ``{"result": ...}`` as resume value; where several calls share a task, a mapping from tool
            call id to one of these. ``skip`` tells the model that the outcome is unknown; ``repeat`` runs the tool
            again. A function, synchronous or asynchronous, receives the ``UnknownCall`` and returns one of these
            answers: it may look the call up by its idempotency key.

    Raises:
        ConfigError: ``tool`` is neither a tool nor a function, or ``on_unknown`` is none of the above. At run time,
            before the tool runs: the graph has neither checkpointer nor store, ``durability="exit"`` is set, two calls
            of one message have the same id, or the ``on_unknown`` function returned something else. A ``ToolNode``
            does not return it to the model.
        StateError: At run time: the journal cannot be read or written.

    Example:
        >>> from ec_agents import once
        >>> def pay(amount: int) -> str:
        ...     '''Pay an amount.'''
        ...     return f"paid {amount}"
        >>> once(pay).args
        {'amount': {'title': 'Amount', 'type': 'integer'}}
    """
    if tool is None:
        return partial(once, on_unknown=on_unknown)
    if not (isinstance(tool, BaseTool) or callable(tool)):
        raise ConfigError(f"once() needs a tool or a function, got {type(tool).__name__}; server tools run elsewhere")
    if on_unknown not in _ANSWERS and not callable(on_unknown):
        raise ConfigError(f"on_unknown must be one of {', '.join(_ANSWERS)}, or a function; got {on_unknown!r}")
    inner = tool if isinstance(tool, BaseTool) else create_tool(tool)
    return OnceTool.around(inner.tool if isinstance(inner, OnceTool) else inner, on_unknown)


def once_where_destructive(tools: Sequence[Any], *, on_unknown: OnUnknown = "ask") -> list[Any]:
    """Apply ``once`` to the tools whose ``metadata`` has a true ``"destructive"``; return the others as they are."""
    return [once(tool, on_unknown=on_unknown) if _is_destructive(tool) else tool for tool in tools]


def _is_destructive(tool: Any) -> bool:
    return (
        isinstance(tool, BaseTool) and not isinstance(tool, OnceTool) and bool((tool.metadata or {}).get("destructive"))
    )


class OnceTool(BaseTool):
    """A tool that records the calls of another; see ``once``."""

    tool: BaseTool
    """The tool that does the work."""
    on_unknown: OnUnknown
    """What to do about a call whose outcome is unknown."""
    func: Any
    """Shows ``ToolNode`` which arguments to inject."""
    runtime_arg: str
    """Name of the argument that ``ToolNode`` fills with its ``ToolRuntime``."""
    hidden_args: frozenset[str]
    """Arguments that the model does not give."""
    key_args: tuple[str, ...]
    """Arguments of type ``IdempotencyKey``."""

    @classmethod
    def around(cls, tool: BaseTool, on_unknown: OnUnknown) -> "OnceTool":
        """Wrap the tool, with its name, description, schema and settings."""
        work = getattr(tool, "func", None) or getattr(tool, "coroutine", None)
        hints = get_type_hints(work, include_extras=True) if work else {}
        schema = tool.args_schema if isinstance(tool.args_schema, dict) else tool.get_input_schema()
        if isinstance(schema, type):
            hints |= get_all_basemodel_annotations(schema)
        given = tool.tool_call_schema
        known = set(get_fields(given)) if isinstance(given, type) else set(given.get("properties", ()))
        runtimes = (name for name, hint in hints.items() if name == "runtime" or _mentions(hint, ToolRuntime))
        runtime = next(runtimes, _RUNTIME)
        shared = ("name", "description", "return_direct", "response_format", "metadata", "tags", "extras")
        return cls(
            **{name: getattr(tool, name) for name in shared},
            args_schema=schema,
            tool=tool,
            on_unknown=on_unknown,
            func=_Signature({**hints, runtime: ToolRuntime}),
            runtime_arg=runtime,
            hidden_args=frozenset({*hints, _RUNTIME} - known),
            key_args=tuple(name for name, hint in hints.items() if _mentions(hint, _IdempotencyKey)),
        )

    def run(
        self, tool_input: Any, *args: Any, config: Any = None, tool_call_id: str | None = None, **kwargs: Any
    ) -> Any:
        """Run the tool, or return what is recorded."""
        call = _Call.of(self, tool_input, config, tool_call_id)
        actions: dict[str, Callable[..., Any]] = {
            "run": lambda: self.tool.run(call.input, *args, config=config, tool_call_id=tool_call_id, **kwargs),
            "decide": self._decide,
        }
        steps = call.steps()
        resume: Callable[[Any], Any] = steps.send
        value: Any = None
        while True:
            try:
                name, *arguments = resume(value)
            except StopIteration as end:
                return end.value
            try:
                resume, value = steps.send, (actions.get(name) or getattr(call.journal, name))(*arguments)
            except BaseException as error:  # noqa: BLE001 - the steps raise it again
                resume, value = steps.throw, error

    async def arun(
        self, tool_input: Any, *args: Any, config: Any = None, tool_call_id: str | None = None, **kwargs: Any
    ) -> Any:
        """Run the tool, or return what is recorded."""
        call = _Call.of(self, tool_input, config, tool_call_id)
        actions: dict[str, Callable[..., Any]] = {
            "run": lambda: self.tool.arun(call.input, *args, config=config, tool_call_id=tool_call_id, **kwargs),
            "decide": self._adecide,
        }
        steps = call.steps()
        resume: Callable[[Any], Any] = steps.send
        value: Any = None
        while True:
            try:
                name, *arguments = resume(value)
            except StopIteration as end:
                return end.value
            try:
                resume, value = steps.send, await (actions.get(name) or getattr(call.journal, f"a{name}"))(*arguments)
            except BaseException as error:  # noqa: BLE001 - the steps raise it again
                resume, value = steps.throw, error

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a OnceTool runs its tool by run and arun")  # BaseTool wants one

    def _decide(self, unknown: UnknownCall) -> Any:
        answer = cast("Callable[[UnknownCall], Any]", self.on_unknown)(unknown)
        return run_blocking(partial(_awaited, answer)) if inspect.isawaitable(answer) else answer

    async def _adecide(self, unknown: UnknownCall) -> Any:
        answer = cast("Callable[[UnknownCall], Any]", self.on_unknown)(unknown)
        return await answer if inspect.isawaitable(answer) else answer


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


class _Signature:
    """Something with type hints, in the place where ``ToolNode`` looks for a tool's function."""

    def __init__(self, hints: Mapping[str, Any]) -> None:
        self.__annotations__ = dict(hints)


_Steps = Generator[tuple[Any, ...], Any, Any]
"""What a call does, as names of actions: of its journal (``read``, ``write``, …), ``run`` and ``decide``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One tool call: where it is recorded, and what happens to it."""

    tool: OnceTool
    id: str
    key: str
    input: Any
    args: Mapping[str, Any]
    journal: Journal
    answers: Sequence[Any]
    """Resume values that the task has used so far; LangGraph extends it."""
    shares_task: bool
    """Whether the task runs other calls as well, so that a resume value may be meant for one of those."""

    @classmethod
    def of(cls, tool: OnceTool, tool_input: Any, config: RunnableConfig | None, tool_call_id: str | None) -> "_Call":
        """Find out which call of which run this is, and where to record it; refuse if that cannot be known."""
        given: dict[str, Any] = {**tool_input} if isinstance(tool_input, dict) else {"input": tool_input}
        found: Any = given.get(tool.runtime_arg)
        runtime = cast("ToolRuntime[Any, Any]", found) if isinstance(found, ToolRuntime) else None
        settings: dict[str, Any] = dict(ensure_config(config).get("configurable") or {})
        if tool_call_id is None or "checkpoint_ns" not in settings:
            raise Refused(
                f"once() cannot tell which call of {tool.name!r} this is: run it by its tool call in a graph, e.g. in "
                "a ToolNode; outside of a graph, run the tool itself"
            )
        message = _calling_message(runtime.state, tool_call_id) if runtime else None
        key = _key(settings, message, tool_call_id)
        given.pop(_RUNTIME, None)
        given |= dict.fromkeys(tool.key_args, key)
        path = ensure_config(config).get("metadata", {}).get("langgraph_path", ())
        return cls(
            tool=tool,
            id=tool_call_id,
            key=key,
            input=given if isinstance(tool_input, dict) else tool_input,
            args={name: value for name, value in given.items() if name not in tool.hidden_args},
            journal=_journal(tool, key, settings, message, runtime.store if runtime else None),
            answers=getattr(settings.get("__pregel_scratchpad"), "resume", []),
            shares_task=message is not None and len(message.tool_calls) > 1 and "__pregel_pull" in path,
        )

    def steps(self) -> _Steps:
        """Run the tool, return its recorded result, or find out what to do about an unknown outcome."""
        yield from self._record("ensure_held")
        record: Record | None = yield from self._record("read")
        used = record.used if record else 0
        if record and record.status == "done" and _same(record.args, self.args):
            return self._returned(record.result)
        if record and record.status in ("started", "failed"):
            result = yield from self._settle(record)
            if result is not None:
                yield from self._record("write", replace(record, status="done", result=result))
                return result
            used = len(self.answers)
        elif not self.shares_task:
            for _ in range(used):
                interrupt({"question": _LOST})  # answered before; the tool's own questions come after
        return (yield from self._attempt(Record.start(self.args, used)))

    def _attempt(self, record: Record) -> _Steps:
        yield from self._record("write", record)
        try:
            result = yield ("run",)
        except GraphInterrupt:
            yield from self._record("write", replace(record, status="interrupted"))
            raise
        except GraphBubbleUp:
            raise
        except Exception as error:
            status = "interrupted" if _is_invalid_resume(error) else "failed"
            yield from self._record("write", replace(record, status=status, error=f"{type(error).__name__}: {error}"))
            raise
        yield from self._record("write", replace(record, status="done", result=result))
        return result

    def _settle(self, record: Record) -> _Steps:
        """The message that stands for the unknown result; None: repeat the call."""
        unknown = UnknownCall(
            tool=self.tool.name,
            args=record.args,
            tool_call_id=self.id,
            idempotency_key=self.key,
            started=record.started,
            error=record.error,
        )
        answer: Any = (yield "decide", unknown) if callable(self.tool.on_unknown) else self.tool.on_unknown
        if answer == "ask":
            answer = yield from self._ask(record, unknown)
        match answer:
            case "repeat":
                return None
            case "skip":
                return self._message(_SKIPPED, "error")
            case {"result": result}:
                return self._message(result if isinstance(result, str) else json.dumps(result, default=str))
            case _:
                raise Refused(f"on_unknown of {self.tool.name!r} returned {answer!r}; needed is 'ask', {_FORMS}")

    def _ask(self, record: Record, unknown: UnknownCall) -> _Steps:
        """Interrupt until there is an answer to this question; earlier resume values answer earlier questions."""
        question = _question(unknown, by_call=self.shares_task)
        answer, seen = None, 0
        try:
            while answer is None or seen < len(self.answers):
                interrupt(question)
                answer, seen = self._answer(record.asked), seen + 1
        except GraphInterrupt:
            answer = self._answer(record.asked)  # another call of the task may have received it
            if record.asked is None:
                yield from self._record("write", replace(record, asked=len(self.answers)))
            if answer is None:
                raise
        return answer

    def _answer(self, asked: int | None) -> Any:
        """The latest resume value since the question that is an answer for this call; None: there is none."""
        for answer in reversed(self.answers[asked:] if asked is not None else ()):
            named: Any = cast("Any", answer).get(self.id) if isinstance(answer, dict) else None
            found = named if named is not None or self.shares_task else cast("Any", answer)
            if found in ("skip", "repeat") or (isinstance(found, dict) and "result" in cast("dict[str, Any]", found)):
                return cast("Any", found)
        return None

    def _record(self, action: str, *args: Any) -> _Steps:
        try:
            return (yield action, *args)
        except GraphBubbleUp:
            raise
        except Exception as error:
            raise NotRecorded(
                f"the journal of once() failed at {action!r} for the call {self.id} of {self.tool.name!r}: "
                f"{type(error).__name__}: {error}; resume the run when the database can be reached"
            ) from error

    def _returned(self, result: Any) -> Any:
        return self._message(result) if isinstance(result, str) else result

    def _message(self, content: Any, status: Literal["success", "error"] = "success") -> ToolMessage:
        return ToolMessage(content, name=self.tool.name, tool_call_id=self.id, status=status)


_SKIPPED = "The outcome of this call is unknown: it may have been carried out. It was not repeated."
_LOST = "The answers to earlier questions of this call are lost. Resume with any value to be asked again."
_FORMS = "'skip', 'repeat' or {'result': ...}"


def _question(unknown: UnknownCall, *, by_call: bool) -> dict[str, Any]:
    cause = f"it raised {unknown.error}" if unknown.error else "the process ended before its result was recorded"
    form = f"{{{unknown.tool_call_id!r}: one of these}}" if by_call else "one of these"
    return {
        "ec_once": asdict(unknown),
        "question": f"{unknown.tool} was started at {unknown.started} and may have had its effect: {cause}. "
        f"Resume with {form}: {_FORMS}.",
    }


def _journal(
    tool: OnceTool, key: str, settings: Mapping[str, Any], message: AIMessage | None, store: BaseStore | None
) -> Journal:
    saver = settings.get("__pregel_checkpointer")
    if saver:
        if settings.get("__pregel_durability") == "exit":
            raise Refused("once() needs a checkpoint before the tool runs; durability='exit' writes none, use 'sync'")
        held_by: Mapping[str, str] = settings.get("checkpoint_map") or {}
        return CheckpointJournal(saver, str(settings["thread_id"]), key, held_by)
    if store is None or message is None or message.id is None:
        raise Refused(
            f"once() has nowhere to record the call of {tool.name!r}: compile the graph with a checkpointer or, if you "
            "keep the messages and their ids yourself, with a store"
        )
    if tool.on_unknown == "ask":
        raise Refused(
            "once(on_unknown='ask') needs a checkpointer: without one, a run cannot be resumed with an answer; compile "
            "the graph with one, or choose 'skip', 'repeat' or a function"
        )
    return StoreJournal(store, key)


def _key(settings: Mapping[str, Any], message: AIMessage | None, tool_call_id: str) -> str:
    """A UUID that is the same whenever the call is made again, and no other call's.

    Some servers repeat tool call ids (``call_0`` at every step), so the message is part of it; without one, the task.
    """
    if message and sum(call["id"] == tool_call_id for call in message.tool_calls) > 1:
        raise Refused(f"two tool calls of one message have the id {tool_call_id!r}, so once() cannot tell them apart")
    task = str(settings["checkpoint_ns"])
    graph = task.rpartition("|")[0] if settings.get("__pregel_checkpointer") else ""
    place = [graph, message.id] if message and message.id else [task]
    parts = [str(settings.get("thread_id", "")), *place, tool_call_id]
    return str(uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(["ec_agents.once", *parts])))


def _calling_message(state: Any, tool_call_id: str) -> AIMessage | None:
    """The last message with the tool call, in whatever form the state has."""
    lists: Any = [state] if isinstance(state, list) else _fields(state).values()
    messages: list[Any] = [
        message for found in lists if isinstance(found, list) for message in cast("list[Any]", found)
    ]
    for message in reversed(messages):
        if isinstance(message, AIMessage) and any(call["id"] == tool_call_id for call in message.tool_calls):
            return message
    return None


def _fields(state: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", state) if isinstance(state, Mapping) else getattr(state, "__dict__", {})


def _same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return json.dumps(first, sort_keys=True, default=str) == json.dumps(second, sort_keys=True, default=str)


def _mentions(hint: Any, marker: type) -> bool:
    """Whether a type hint is the marker, or has it among its arguments, however deep."""
    candidates = (hint, get_origin(hint))
    return any(isinstance(c, type) and issubclass(c, marker) for c in candidates) or any(
        _mentions(argument, marker) for argument in get_args(hint)
    )
