"""One step as the graph, the middleware and the chat model share it: its events, its evidence, its telemetry."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, cast
from uuid import uuid4

from langchain_core.callbacks import AsyncCallbackManager, BaseCallbackManager, Callbacks
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata, add_usage as add_usage_metadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from langgraph.config import get_stream_writer
from langgraph.constants import TAG_NOSTREAM

from ec_agents.agents.quiet_model import is_stream
from ec_agents.agents.telemetry import choice_span
from ec_agents.candidates import Candidate, CandidateSet, Selection, Step, add_usage, by_index, storable
from ec_agents.effort import StepView
from ec_agents.errors import FailedCall, TraceError
from ec_agents.messages import SIGNALS_KEY
from ec_agents.selection import Selector
from ec_agents.trace import TraceWriter

Write = Callable[[dict[str, Any]], None]
"""Takes one ``custom`` event."""


def stream_writer() -> Write:
    """The stream of ``custom`` events; outside a running graph, nowhere."""
    try:
        return get_stream_writer()
    except (RuntimeError, KeyError):  # no runnable at all, or one outside a graph
        return lambda _: None


def decide(selector: Selector, drawn: CandidateSet, write: Write) -> tuple[Selection, dict[str, Any], dict[str, Any]]:
    """Choose, and say so in a ``custom`` event and a span.

    Returns:
        The selection; its record, for the message; and the record with a short outline of every candidate.

    Raises:
        SelectionError: Nothing could be scored, and the selector's fallback is ``"raise"``.
    """
    with choice_span() as report:
        selection = selector(drawn.candidates)
        report(selection)
    record = decision_record(drawn, selection)
    outlines = {c.index: shortened(outline(c)) for c in drawn.candidates}
    decision = {**record, "candidates": by_index(outlines, len(record["scores"]), None)}
    write({"ec_agents": "choice", **decision})
    return selection, record, decision


def chosen_message(message: AIMessage, record: dict[str, Any]) -> AIMessage:
    """The chosen message as it goes into the conversation: with the record, without log-probabilities."""
    kept = without_logprobs(message)
    return kept.model_copy(update={"response_metadata": {**kept.response_metadata, "ec_agents": record}})


async def announce(message: AIMessage, asked: Sequence[BaseMessage], callbacks: Callbacks) -> None:
    """Show the chosen message, as one finished model call, to the streams that were kept from the candidates.

    ``astream_events`` v1 and v2 live on such calls. The ``messages`` stream does not, and takes the message from the
    output of the node.
    """
    if not isinstance(callbacks, BaseCallbackManager):
        return
    streams = [handler for handler in callbacks.handlers if is_stream(handler)]
    if not streams:
        return
    manager = AsyncCallbackManager(
        streams, parent_run_id=callbacks.parent_run_id, tags=[TAG_NOSTREAM], metadata=dict(callbacks.metadata)
    )
    [run] = await manager.on_chat_model_start({}, [list(asked)], name="chosen")
    chunk = AIMessageChunk(content=message.content, tool_calls=message.tool_calls, id=message.id)
    await run.on_llm_new_token(str(message.text), chunk=ChatGenerationChunk(message=chunk))
    await run.on_llm_end(LLMResult(generations=[[ChatGeneration(message=message)]]))


_log = logging.getLogger(__name__)


def record_step(
    trace: TraceWriter,
    drawn: CandidateSet,
    selection: Selection,
    *,
    config: RunnableConfig | None = None,
    previous: Mapping[str, Any] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Append a step to a trace. A trace that cannot be written is logged and does not stop the run.

    The run is named by ``metadata["ec_run"]`` of the configuration, or its ``thread_id``, or as the step before, or
    afresh; its task by ``metadata["ec_task"]``.

    Args:
        trace: Where to.
        drawn: The candidates.
        selection: The choice among them.
        config: Configuration of the run.
        previous: What this function returned for the step before; None at the first one.
        seconds: How long it took to draw the candidates.

    Returns:
        ``run`` and ``step``: the name of the run and the number of the step, for the next call.
    """
    name = step_name(config, previous)
    task = ensure_config(config).get("metadata", {}).get("ec_task")
    step = Step(
        run=name["run"],
        number=name["step"],
        task=None if task is None else str(task),
        candidates=drawn.candidates,
        selection=selection,
        failures={i: describe_failure(failure) for i, failure in drawn.failures.items()},
        seconds=seconds,
        info={**({"spent": dict(drawn.spent)} if drawn.spent else {}), **effort_record(drawn)},
    )
    try:
        trace.write(step)
    except TraceError:
        _log.exception("step %(step)d of run %(run)s is not in the trace", name)
    return name


def step_name(config: RunnableConfig | None, previous: Mapping[str, Any] | None) -> dict[str, Any]:
    """``run`` and ``step``: how the step of a run with this configuration is named; see ``record_step``."""
    settings = ensure_config(config)
    named, thread = settings.get("metadata", {}).get("ec_run"), settings.get("configurable", {}).get("thread_id")
    before = previous or {}
    run = str(named or thread or before.get("run") or uuid4())
    return {"run": run, "step": before["step"] + 1 if before.get("run") == run else 0}


SHOWN_CHARACTERS = 400
"""Most characters of each candidate's text that the decision in the state shows; every checkpoint has a copy of it."""


def without_logprobs(message: AIMessage) -> AIMessage:
    """The message without its log-probabilities and signals, which are too large to keep.

    What no checkpoint can hold of the rest, such as arguments nested thousands deep, is replaced.
    """
    dropped = ("logprobs", SIGNALS_KEY)
    metadata = {key: value for key, value in message.response_metadata.items() if key not in dropped}
    fields = {name: getattr(message, name) for name in _WRITTEN}
    kept = storable({**fields, "response_metadata": metadata}, objects=lambda value: value)
    problems: list[str] = []
    usage = storable(message.usage_metadata, problems)
    return message.model_copy(update={**kept, "usage_metadata": None if problems else usage})


_WRITTEN = ("content", "additional_kwargs", "tool_calls", "invalid_tool_calls", "id", "name")
"""The fields of a message that the server or the model wrote."""


def decision_record(drawn: CandidateSet, selection: Selection) -> dict[str, Any]:
    """The evidence of a choice as builtins, small enough to stay on the message: ``response_metadata["ec_agents"]``."""
    n = len(drawn.candidates) + len(drawn.failures)
    failures = {i: describe_failure(failure) for i, failure in drawn.failures.items()}
    return {
        **selection.to_builtins(n),
        "failures": by_index(failures, n, None),
        "usage": total_usage(drawn),
        **effort_record(drawn),
    }


def effort_record(drawn: CandidateSet) -> dict[str, Any]:
    """Return, for a step with an effort, how many calls each wave had and why no more were drawn."""
    return {"waves": list(drawn.waves), "stopped": drawn.stopped} if drawn.stopped else {}


def step_view(messages: Sequence[BaseMessage], tools: Mapping[str, Any]) -> StepView:
    """Return what an effort may know of a step; steps are counted from the last human message."""
    latest = next((i for i, m in enumerate(reversed(messages)) if m.type == "human"), len(messages))
    number = sum(message.type == "ai" for message in messages[len(messages) - latest :])
    return StepView(messages=messages, tools=tools, number=number)


def outline(candidate: Candidate) -> dict[str, Any]:
    """What a person wants to see of a candidate, as builtins."""
    return {
        "content": candidate.content,
        "tool_calls": [dict(call) for call in candidate.tool_calls],
        "finish_reason": candidate.finish_reason,
        "flaws": dict(candidate.flaws),
        "n_tokens": None if candidate.signals is None else candidate.signals.n_tokens,
    }


def shortened(found: dict[str, Any]) -> dict[str, Any]:
    """An ``outline`` as checkpoints keep it: of a long text, the beginning and the end."""
    text, half = found["content"], SHOWN_CHARACTERS // 2
    return found if len(text) <= SHOWN_CHARACTERS else {**found, "content": f"{text[:half]} … {text[-half:]}"}


def total_usage_metadata(drawn: CandidateSet) -> UsageMetadata | None:
    """Return the usage of all responses in LangChain's form, with details such as cached tokens; None if unreported."""
    total = drawn.spent
    found = [UsageMetadata(**cast("Any", {**_NO_USAGE, **total}))] if total else []
    found += [message.usage_metadata for message in drawn.messages.values() if message.usage_metadata]
    return reduce(add_usage_metadata, found) if found else None


_NO_USAGE = UsageMetadata(input_tokens=0, output_tokens=0, total_tokens=0)


def total_usage(drawn: CandidateSet) -> dict[str, int]:
    """Tokens of all candidates together, and of responses that were thrown away, as far as they are reported."""
    return add_usage([drawn.spent, *(candidate.usage for candidate in drawn.candidates)])


def describe_failure(failure: BaseException) -> str:
    """A failed call in one line."""
    return str(failure) if isinstance(failure, FailedCall) else f"{type(failure).__name__}: {failure}"
