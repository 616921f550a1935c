"""One step as the graph, the middleware and the chat model share it: its events, its evidence, its telemetry."""

import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec
from langchain_core.callbacks import AsyncCallbackManager, BaseCallbackManager, Callbacks
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, LLMResult
from langchain_core.runnables import Runnable
from langgraph.config import get_stream_writer
from langgraph.constants import TAG_NOSTREAM

from ec_agents.candidates import Candidate, CandidateSet, Selection
from ec_agents.errors import StateError
from ec_agents.messages import decision_record, describe_failure, outline, shortened, without_logprobs
from ec_agents.agents.quiet_model import is_stream, one_step
from ec_agents.agents.telemetry import choice_span, sampling_span
from ec_agents.selection import Selector

Write = Callable[[dict[str, Any]], None]
"""Takes one ``custom`` event."""

_T = TypeVar("_T")


def stream_writer() -> Write:
    """The stream of ``custom`` events; outside a running graph, nowhere."""
    try:
        return get_stream_writer()
    except (RuntimeError, KeyError):  # no runnable at all, or one outside a graph
        return lambda _: None


async def draw(
    sampling: Callable[..., Awaitable[CandidateSet]],
    call: Callable[[int], Awaitable[Any]],
    *,
    n: int,
    model: Runnable[Any, Any],
    write: Write,
    parse: Callable[[Any, int], Candidate] | None = None,
) -> CandidateSet:
    """Draw the candidates of a step, with a ``custom`` event for each and a span for all.

    Args:
        sampling: ``sample``, with its limits.
        call: Index 0..N-1 → awaitable of one response.
        n: How many candidates.
        model: The model that is called, for the span.
        write: Takes the events.
        parse: Response and index → candidate.

    Raises:
        SamplingError: Fewer calls succeeded than are needed.
    """

    def on_result(index: int, result: Candidate | BaseException) -> None:
        shown = outline(result) if isinstance(result, Candidate) else {"failure": describe_failure(result)}
        write({"ec_agents": "candidate", "index": index, **shown})

    with sampling_span(model, n) as report, one_step():
        drawn = await sampling(call, n=n, parse=parse, on_result=on_result)
        report(drawn)
    return drawn


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
    decision = {**record, "candidates": {str(c.index): shortened(outline(c)) for c in drawn.candidates}}
    write({"ec_agents": "choice", **decision})
    return selection, record, decision


def packed(data: object) -> bytes:
    """Data for a checkpoint, which holds some of it twice: a candidate's text is its message's. Objects become text."""
    try:
        encoded = msgspec.msgpack.encode(data, enc_hook=str)
    except UnicodeEncodeError:  # servers and models write half a surrogate pair
        encoded = msgspec.msgpack.encode(_encodable(data), enc_hook=str)
    return zlib.compress(encoded, level=1)


def _encodable(data: Any) -> Any:
    """The data with a question mark in place of half a surrogate pair."""
    if isinstance(data, str):
        return data.encode("utf-8", "replace").decode()
    if isinstance(data, Mapping):
        return {_encodable(key): _encodable(value) for key, value in cast("Mapping[Any, Any]", data).items()}
    if isinstance(data, list | tuple):
        return [_encodable(value) for value in cast("Sequence[Any]", data)]
    return data


def unpacked(data: bytes, kind: type[_T]) -> _T:
    """Undo ``packed``.

    Raises:
        StateError: The bytes are damaged, or no data of this kind.
    """
    try:
        return msgspec.msgpack.decode(zlib.decompress(data), type=kind)
    except (TypeError, zlib.error, msgspec.DecodeError) as error:
        raise StateError(f"the candidates in the checkpoint are damaged: {error}") from error


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
