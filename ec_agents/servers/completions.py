"""A chat completion as it travels: bytes → choices with packed signals.

``decode_response`` reads a body once, keeps three numbers a token, and builds neither token strings nor SDK objects.
Whatever does not have the documented form is read a second time, slowly, with the rules of ``logprobs``; so the result
is always what ``token_signals`` makes of the same body.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, overload

import msgspec
from msgspec import UNSET, Raw, Struct

from ec_agents.errors import LogprobsMalformed, ServerError
from ec_agents.logprobs import Read, measured, pack_logprobs, server_error, token_signals

Json = Mapping[str, Any]


class _Alternative(Struct, gc=False):
    logprob: float | None


class _Token(Struct, gc=False):
    logprob: float | None
    top_logprobs: list[_Alternative] | None = None


class _Logprobs(Struct, gc=False):
    content: list[_Token] | None = None
    refusal: list[_Token] | None = None
    packed: str | None = None
    n_alternatives: int = 0
    excess: float = 0.0


class _Choice(Struct):
    message: dict[str, Any]
    logprobs: _Logprobs | None = None
    index: Any = None
    finish_reason: Any = None
    error: Any = None


class _Head(Struct):
    """The fields of a response that are kept beside its choices."""

    id: Any = UNSET
    object: Any = UNSET
    created: Any = UNSET
    model: Any = UNSET
    usage: Any = UNSET
    service_tier: Any = UNSET
    system_fingerprint: Any = UNSET
    error: Any = UNSET


class _Response(_Head, kw_only=True):
    choices: list[_Choice]


class _Several(_Head, kw_only=True):
    choices: list[Raw]


class _RawLogprobs(Struct):
    content: list[Raw] | None = None
    refusal: list[Raw] | None = None


class _RawChoice(Struct):
    logprobs: _RawLogprobs | None = None


class _RawResponse(Struct):
    choices: list[_RawChoice]


_DECODER = msgspec.json.Decoder(_Response)
_SEVERAL_DECODER = msgspec.json.Decoder(_Several)
_CHOICE_DECODER = msgspec.json.Decoder(_Choice)
_RAW_DECODER = msgspec.json.Decoder(_RawResponse)
_RAW_CHOICE_DECODER = msgspec.json.Decoder(_RawChoice)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_UNPACKABLE = (LogprobsMalformed, ServerError, RecursionError)
_KEPT = _Head.__struct_fields__


class _Entries(Sequence[Any]):
    """The tokens of a choice as they came, each decoded when it is asked for."""

    def __init__(self, choice: _RawChoice) -> None:
        logprobs = choice.logprobs or _RawLogprobs()
        self._raw = logprobs.content or logprobs.refusal or []

    def __len__(self) -> int:
        return len(self._raw)

    @overload
    def __getitem__(self, position: int) -> Any: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[Any]: ...
    def __getitem__(self, position: int | slice) -> Any:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        return json.loads(bytes(self._raw[position]).decode(errors="replace"))


def decode_response(body: bytes, n: int = 1) -> dict[str, Any]:
    """A chat completion with the ``logprobs`` of its choices in the packed form (``logprobs.pack_logprobs``).

    The body is not needed afterwards. Choices that are none are left out, as if the server had sent fewer.

    Args:
        body: The response, JSON; ``NaN`` and ``Infinity`` are read too.
        n: How many choices were asked for. Several are read one by one, so that one at a time takes up memory.

    Returns:
        ``choices``, each with ``message``, ``finish_reason`` and ``logprobs``; and ``id``, ``model``, ``usage``, …

    Raises:
        LogprobsMalformed: The body is not a chat completion with at least one choice.
        ServerError: The body is an error, or reports one for every choice.
    """
    try:
        head, choices = _read_one(body) if n == 1 else _read_several(body)
    except _UNREADABLE:
        return _decode_carefully(body)
    if not choices or head.error not in (UNSET, None):
        return _decode_carefully(body)
    fields = {name: value for name in _KEPT if (value := getattr(head, name)) is not UNSET}
    return _sound({**fields, "choices": choices})


def _sound(response: dict[str, Any]) -> dict[str, Any]:
    """The response, if the server reports no error for one of its choices at least."""
    errors = [server_error(choice) if choice.get("error") else None for choice in response["choices"]]
    if errors[0] is not None and all(errors):
        raise errors[0]
    return response


def _read_one(body: bytes) -> tuple[_Head, list[dict[str, Any]]]:
    response = _DECODER.decode(body)
    choices = enumerate(response.choices)
    return response, [
        _slim(c, lambda number=number: _RAW_DECODER.decode(body).choices[number]) for number, c in choices
    ]


def _read_several(body: bytes) -> tuple[_Head, list[dict[str, Any]]]:
    response = _SEVERAL_DECODER.decode(body)
    return response, [choice for text in response.choices if (choice := _choice(text)) is not None]


def _choice(text: bytes | Raw) -> dict[str, Any] | None:
    """The JSON of a choice as one with packed log-probabilities; None if it is none.

    Raises:
        LogprobsMalformed: It is no JSON.
    """
    try:
        return _slim(_CHOICE_DECODER.decode(text), lambda: _RAW_CHOICE_DECODER.decode(text))
    except _UNREADABLE:
        choice = _json(bytes(text))
        return _slim_carefully(choice) if _is_choice(choice) else None


def pack_choice(text: bytes) -> bytes | None:
    """The JSON of a choice with its log-probabilities packed; None if it is no choice, or not the whole of it."""
    try:
        choice = _choice(text)
        return None if choice is None else json.dumps(choice).encode()  # msgspec writes null for NaN
    except _UNPACKABLE:
        return None


def pack_response(body: bytes, n: int = 1) -> bytes:
    """A chat completion with its log-probabilities packed, or else the body as it is; both decode to the same."""
    try:
        return json.dumps(decode_response(body, n)).encode()
    except _UNPACKABLE:
        return body


def _slim(choice: _Choice, raw: Callable[[], _RawChoice]) -> dict[str, Any]:
    """A choice with packed log-probabilities.

    Args:
        choice: The choice.
        raw: Gives it with its tokens as they came.

    Raises:
        msgspec.DecodeError: It has log-probabilities, but not in the form of a chat completion.
    """
    fields = {"index": choice.index, "message": choice.message, "finish_reason": choice.finish_reason}
    if choice.error:
        fields["error"] = choice.error
    if choice.logprobs is None:
        return {**fields, "logprobs": pack_logprobs(lambda: token_signals({**fields, "logprobs": None}))}
    tokens = choice.logprobs.content or choice.logprobs.refusal
    if not tokens and choice.logprobs.packed:
        return {**fields, "logprobs": _packed_before(choice.logprobs)}
    if not tokens:
        raise msgspec.DecodeError("no tokens")
    return {**fields, "logprobs": pack_logprobs(lambda: measured(_read(tokens), lambda: _Entries(raw())))}


def _packed_before(logprobs: _Logprobs) -> dict[str, Any]:
    """The form that ``pack_logprobs`` gave it, when the choice arrived."""
    excess = {"excess": logprobs.excess} if logprobs.excess else {}
    return {"packed": logprobs.packed, "n_alternatives": logprobs.n_alternatives, **excess}


def _read(tokens: list[_Token]) -> Read:
    rows = [token.top_logprobs or () for token in tokens]
    return Read(
        drawn=[token.logprob for token in tokens],
        sizes=[len(row) for row in rows],
        alternatives=[alternative.logprob for row in rows for alternative in row],
    )


def _decode_carefully(body: bytes) -> dict[str, Any]:
    """``decode_response`` of a body that has another form than most."""
    if body.lstrip()[:5] in (b"data:", b"event"):
        raise LogprobsMalformed(f"the response is a stream, but none was asked for; found {_start(body)}")
    response = _json(body)
    if not isinstance(response, dict):
        raise LogprobsMalformed(f"a chat completion must be a JSON object; found {_start(body)}")
    fields = cast("dict[str, Any]", response)
    if (error := server_error(fields)) is not None:
        raise error
    choices: list[Any] | None = fields.get("choices")
    if not isinstance(choices, list) or not choices:
        raise LogprobsMalformed(f"a chat completion must have a non-empty list of choices; found {_start(body)}")
    slim = [_slim_carefully(choice) for choice in choices if _is_choice(choice)]
    if not slim:
        raise LogprobsMalformed(f"none of the {len(choices)} choices has a message or a text; found {_start(body)}")
    return _sound({**{name: fields[name] for name in _KEPT if name in fields}, "choices": slim})


def _slim_carefully(choice: dict[str, Any]) -> dict[str, Any]:
    message: Any = choice.get("message")
    if not isinstance(message, dict):
        message = {"role": "assistant", "content": choice["text"]}
    fields: dict[str, Any] = {
        "index": choice.get("index"),
        "message": message,
        "finish_reason": choice.get("finish_reason"),
        **({"error": choice["error"]} if choice.get("error") else {}),
    }
    return {**fields, "logprobs": pack_logprobs(lambda: token_signals(choice))}


def _is_choice(choice: Any) -> bool:
    return isinstance(choice, dict) and (isinstance(choice.get("message"), dict) or isinstance(choice.get("text"), str))


def _json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except _UNREADABLE:
        pass
    try:
        return json.loads(body)  # reads NaN, Infinity and lone surrogates, which msgspec does not
    except (ValueError, RecursionError) as error:
        raise LogprobsMalformed(f"the body of the response is no JSON: {error}; it is {_start(body)}") from error


def _start(body: bytes) -> str:
    return f"{len(body)} bytes, {body[:100]!r}{'…' if len(body) > 100 else ''}"


def split_usage(usage: Mapping[str, Any] | None, lengths: Sequence[int | None]) -> list[dict[str, Any] | None]:
    """The usage of a response with several choices, shared out so that the sum is what the server reports.

    The first choice has the prompt. Each has as many completion tokens as log-probabilities; what remains goes in equal
    parts to those without any, or else to the first.

    Args:
        usage: As reported for the whole response; None where it is not.
        lengths: Tokens of each choice; None = unknown.
    """
    if not usage:
        return [None] * len(lengths)
    outputs = [length or 0 for length in lengths]
    rest = max(0, (usage.get("completion_tokens") or 0) - sum(outputs))
    unknown = [number for number, length in enumerate(lengths) if length is None] or [0]
    for number in unknown:
        outputs[number] += rest // len(unknown)
    outputs[unknown[0]] += rest % len(unknown)
    prompts = [usage.get("prompt_tokens") or 0, *[0] * (len(lengths) - 1)]
    details = [{k: v for k, v in usage.items() if k.endswith("_details")}, *[{}] * (len(lengths) - 1)]
    return [
        {**more, "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        for more, read, written in zip(details, prompts, outputs, strict=True)
    ]
