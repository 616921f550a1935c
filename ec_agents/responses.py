"""Stage 2 - parse: an OpenAI-style response, or one choice of it → candidates.

The log-probabilities in it are read by ``logprobs``; this module reads the rest: text, tool calls, usage, errors.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ec_agents.candidates import Candidate, storable
from ec_agents.errors import LogprobsError, LogprobsMalformed, ServerError
from ec_agents.logprobs import dumped, is_count, is_list, is_mapping, outline, quoted, shown, token_signals

Json = Mapping[str, Any]


def choice_candidate(choice: object, index: int) -> Candidate:
    """One choice of a chat or completions response as a candidate.

    What is wrong with it becomes a flaw: ``no_signal``, ``refused``, ``interrupted`` for an error that the server
    reports beside the choice, or ``invalid_action`` for tool-call arguments that are not a JSON object (the call stays,
    with empty ``args``).

    Args:
        choice: The choice, a dict or an object of an SDK: ``message`` or ``text``, ``finish_reason``, ``logprobs``.
        index: Position among the N responses, from 0.

    Raises:
        LogprobsMalformed: It is not a choice at all.
    """
    found = dumped(choice)
    fields: Json = found if is_mapping(found) else {}
    message: Any = {"content": fields["text"]} if "text" in fields else fields.get("message")
    if not is_mapping(message):
        raise LogprobsMalformed(f"choice {index} must have a message or a text; found {outline(found)}")
    flaws: dict[str, str] = {}
    signals = None
    try:
        signals = token_signals(fields)
    except LogprobsError as error:
        flaws["no_signal"] = str(error)
    calls: Any = message.get("tool_calls") or []
    if message.get("refusal"):
        flaws["refused"] = shown(message["refusal"], 500)
    if fields.get("error"):
        flaws["interrupted"] = str(server_error(fields))
    return Candidate(
        index=index,
        content=storable(_text(message.get("content"))),
        tool_calls=[_tool_call(call, flaws) for call in (calls if is_list(calls) else [calls])],
        finish_reason=finish_reason(fields.get("finish_reason")),
        signals=signals,
        flaws=storable(flaws),
    )


def response_candidates(response: object) -> list[Candidate]:
    """All choices of one chat or completions response as candidates, in the order in which they stand.

    The usage belongs to the response as a whole; a candidate has it only if it is the only one.

    Args:
        response: A dict, or an object of an SDK such as ``openai``.

    Raises:
        ServerError: The response is an error.
        LogprobsMalformed: The response has no list of ``choices``, or one of them is not a choice.
    """
    found = dumped(response)
    fields: Json = found if is_mapping(found) else {}
    choices, error = fields.get("choices"), server_error(fields)
    if not is_list(choices) or not choices:
        if error is not None:
            raise error
        raise LogprobsMalformed(f"a response with a non-empty list of choices is needed; found {outline(found)}")
    candidates = [choice_candidate(choice, index) for index, choice in enumerate(choices)]
    if len(candidates) == 1:
        candidates = [replace(candidates[0], usage=usage_counts(fields.get("usage")))]
    if error is not None:
        return [replace(c, flaws={"interrupted": str(error), **c.flaws}) for c in candidates]
    return candidates


def server_error(response: Json) -> ServerError | None:
    """The error that a response, or one choice of it, reports; None if it reports none.

    Servers and routers report errors inside responses with status 200: instead of the choices, beside them, or in one
    of them.
    """
    error: Any = response.get("error") or (response if response.get("object") == "error" else None)
    if not error:
        return None
    details: Json = error if is_mapping(error) else {}
    names = [details.get(name) for name in ("status_code", "status", "code", "type")]
    statuses = [status for status in map(_status, names) if status is not None]
    code = next((shown(name, 100) for name in (*names[2:], *names[:2]) if name), None)
    message = storable(f"the server answered with an error: {quoted(error, 300)}")
    return ServerError(message, statuses[0] if statuses else None, code)


_STATUS_OF = {
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "resource_exhausted": 429,
    "too_many_requests": 429,
    "insufficient_quota": 402,
    "server_error": 500,
    "api_error": 500,
    "internal": 500,
    "internal_error": 500,
    "internal_server_error": 500,
    "internalservererror": 500,
    "bad_gateway": 502,
    "overloaded": 503,
    "overloaded_error": 503,
    "unavailable": 503,
    "service_unavailable": 503,
    "service_unavailable_error": 503,
    "timeout": 504,
    "timeout_error": 504,
    "gateway_timeout": 504,
}
"""The HTTP status that the name of an error stands for, where a server gives no number."""


def _status(name: Any) -> int | None:
    if isinstance(name, str):
        name = int(name) if name.isascii() and name.isdigit() and len(name) == 3 else _STATUS_OF.get(name.lower())
    return name if isinstance(name, int) and 400 <= name <= 599 else None


def finish_reason(*found: Any) -> str | None:
    """The first finish reason that is there, as text; None if none is.

    Values that are not text become their description, which no list of sound reasons holds.
    """
    reason = next((value for value in found if value is not None and value != ""), None)
    return None if reason is None else shown(reason, 100)


def usage_counts(usage: Any) -> dict[str, int] | None:
    """Return the token counts of a response, under LangChain's names; None if it reports none.

    Input tokens that the provider read from its cache are ``cached_tokens``, where there are any.
    """
    counts: Any = dumped(usage)
    if not is_mapping(counts):
        return None
    found = {ours: count for name, ours in _COUNTS.items() if is_count(count := counts.get(name))}
    details = (dumped(counts.get(name)) for name in ("input_token_details", "prompt_tokens_details"))
    cached = next((d.get(name) for d in details if is_mapping(d) for name in _CACHED if d.get(name)), None)
    return {**found, **({"cached_tokens": cached} if is_count(cached) else {})} or None


_CACHED = ("cache_read", "cached_tokens")
"""LangChain's name, and that of OpenAI-compatible servers."""


_COUNTS = {
    "prompt_tokens": "input_tokens",
    "completion_tokens": "output_tokens",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "total_tokens": "total_tokens",
}


def _text(content: Any) -> str:
    """The text of a message; content parts are joined."""
    if is_list(content):
        return "".join(_text(part.get("text")) if is_mapping(part) else _text(part) for part in content)
    return content if isinstance(content, str) else ""


def _tool_call(call: Any, flaws: dict[str, str]) -> dict[str, Any]:
    """One tool call with decoded arguments; adds a flaw where they cannot be decoded."""
    function: Any = call.get("function") if is_mapping(call) else None
    if not is_mapping(function):
        flaws["invalid_action"] = f"a tool call without a function: {outline(call)}"
        return {"name": "", "args": {}}
    arguments: Any = function.get("arguments")
    args: Any = arguments
    problem = "they are not a JSON object"
    try:
        # Models write no arguments as "" too, and line breaks in strings as they are.
        args = json.loads(arguments or "{}", strict=False) if isinstance(arguments, str | None) else arguments
    except (ValueError, RecursionError) as failure:
        problem = str(failure)
    return tool_call(function.get("name"), args, call.get("id"), flaws, f"{problem}; found {quoted(arguments, 200)}")


def tool_call(
    name: Any, args: Any, identity: Any, flaws: dict[str, str], problem: str = "they are not an object"
) -> dict[str, Any]:
    """A tool call as candidates hold it; adds the flaw ``invalid_action`` where its arguments cannot be kept.

    Args:
        name: Name of the tool.
        args: Its decoded arguments.
        identity: ID of the call; left out if it is None or empty.
        flaws: Takes the flaw.
        problem: What is wrong if ``args`` is not a mapping.
    """
    called = shown(name, 200) if name else ""
    problems: list[str] = []
    kept = storable(args if is_mapping(args) else {}, problems)
    if not is_mapping(args):
        problems.append(problem)
    if problems:
        flaws["invalid_action"] = f"arguments of {called or 'a tool call'}: {problems[0]}"
    return {"name": called, "args": kept, **({"id": shown(identity, 500)} if identity else {})}
