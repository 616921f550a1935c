"""Stage 2 - parse: what a call returned, a LangChain message or an OpenAI-style response → candidate.

LangChain is not imported: its messages are known by their attributes, so that ``sample`` works, and loads, without it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeGuard, cast

from ec_agents.candidates import Candidate, storable
from ec_agents.errors import LogprobsError, LogprobsMalformed
from ec_agents.logprobs import dumped, quoted, shown, token_signals
from ec_agents.responses import (
    choice_candidate,
    finish_reason,
    response_candidates,
    server_error,
    tool_call,
    usage_counts,
)


class Message(Protocol):
    """What is read of a LangChain ``AIMessage``."""

    @property
    def text(self) -> str:
        """Text of all content blocks."""
        ...

    @property
    def tool_calls(self) -> Sequence[Any]:
        """Tool calls with decoded arguments."""
        ...

    @property
    def invalid_tool_calls(self) -> Sequence[Any]:
        """Tool calls whose arguments could not be decoded."""
        ...

    @property
    def response_metadata(self) -> dict[str, Any]:
        """Finish reason, log-probabilities and whatever else the integration keeps of the response."""
        ...

    @property
    def additional_kwargs(self) -> dict[str, Any]:
        """Fields of the provider's own, such as ``refusal``."""
        ...

    @property
    def usage_metadata(self) -> Any:
        """Token counts, if reported."""
        ...


def as_candidate(response: object, index: int) -> Candidate:
    """A candidate from what a call returned.

    Understands a ``Candidate``, a LangChain ``AIMessage``, an OpenAI-style response or choice as a dict, and objects of
    the OpenAI SDK. A response with several choices gives the first, with the usage of all of them.

    Raises:
        ServerError: The response is an error, or reports one beside its first choice.
        LogprobsMalformed: The response is none of these.
    """
    if isinstance(response, Candidate):
        return replace(response, index=index)
    if _is_message(response):
        return message_candidate(response, index)
    data = dumped(response)
    if not isinstance(data, Mapping):
        found = type(response).__name__
        raise LogprobsMalformed(f"a call must return an AIMessage, a Candidate or an OpenAI-style dict; found {found}")
    payload = cast("Mapping[str, Any]", data)
    if (error := server_error(payload)) is not None:
        raise error
    if "choices" not in payload:
        return choice_candidate(payload, index)
    first = response_candidates(payload)[0]
    if (error := server_error(payload["choices"][0])) is not None:
        raise error
    return replace(first, index=index, usage=usage_counts(payload.get("usage")))


def message_candidate(message: Message, index: int) -> Candidate:
    """A candidate from a LangChain message.

    Its signals are those that a model prepared by ``sampling_model`` packed, or those of the log-probabilities in
    OpenAI's form in ``response_metadata["logprobs"]``. Missing or malformed log-probabilities, undecodable tool calls,
    refusals and errors become flaws.
    """
    metadata = message.response_metadata
    flaws: dict[str, str] = {}
    try:
        signals = token_signals(metadata.get(SIGNALS_KEY) or metadata.get("logprobs"))
    except LogprobsError as error:
        signals = None
        flaws["no_signal"] = str(error)
    calls = [tool_call(c["name"], c["args"], c["id"], flaws) for c in message.tool_calls]
    if message.invalid_tool_calls:
        bad = message.invalid_tool_calls[0]
        name, args = quoted(bad.get("name"), 200), quoted(bad.get("args"), 200)
        flaws["invalid_action"] = f"arguments of {name} are not a JSON object: {args}"
    refusal: Any = message.additional_kwargs.get("refusal")
    if refusal:
        flaws["refused"] = shown(refusal, 500)
    if metadata.get("error"):
        flaws["interrupted"] = str(server_error(metadata))
    return Candidate(
        index=index,
        content=storable(_text(message)),
        tool_calls=calls,
        finish_reason=_finish_reason(metadata),
        signals=signals,
        usage=usage_counts(message.usage_metadata),
        flaws=storable(flaws),
    )


def _is_message(response: object) -> TypeGuard[Message]:
    """Tell whether the response is a LangChain ``AIMessage``, or a chunk or subclass of it."""
    return hasattr(response, "invalid_tool_calls") and hasattr(response, "response_metadata")


def _text(message: Message) -> str:
    try:
        return str(message.text)
    except (TypeError, AttributeError, KeyError, ValueError, RecursionError):
        return ""  # content blocks that are none


def _finish_reason(metadata: Mapping[str, Any]) -> str | None:
    """Why the model stopped, under the name that each integration gives it."""
    names = ("finish_reason", "stop_reason", "stopReason", "done_reason")
    reason = finish_reason(*map(metadata.get, names))
    if reason is None and metadata.get("object") == "response":
        details: Any = metadata.get("incomplete_details")
        why: Any = cast("Any", details).get("reason") if isinstance(details, Mapping) else None
        return finish_reason(why, metadata.get("status"))
    return reason


SIGNALS_KEY = "ec_signals"
"""Where ``response_metadata`` holds the packed signals, or why there are none."""
