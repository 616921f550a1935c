"""A chat completion as it travels: bytes → choices with packed signals.

``decode_response`` reads a body once, keeps three numbers a token, and builds neither token strings nor SDK objects.
Whatever does not have the documented form is read a second time, slowly, with the rules of ``logprobs``; so the result
is always what ``token_signals`` makes of the same body.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast, overload

import msgspec
from msgspec import UNSET, Raw, Struct

from ec_agents.errors import LogprobsMalformed, ResponseTooLarge, ServerError
from ec_agents.logprobs import Read, n_reasoning_tokens, pack_logprobs, signals_of, token_signals
from ec_agents.responses import server_error

Json = Mapping[str, Any]


class _Alternative(Struct, gc=False):
    logprob: float | None


class _Token(Struct, gc=False):
    logprob: float | None
    top_logprobs: list[_Alternative] | None = None


class _Logprobs(Struct, gc=False):
    content: list[_Token] | None = None
    refusal: list[_Token] | None = None
    reasoning_content: list[_Token] | None = None
    packed: str | None = None
    n_alternatives: int = 0
    excess: float = 0.0
    n_reasoning: int = 0


class _Choice(Struct):
    message: dict[str, Any]
    logprobs: _Logprobs | None = None
    reasoning_logprobs: _Logprobs | None = None
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
    reasoning_content: list[Raw] | None = None


class _RawChoice(Struct):
    logprobs: _RawLogprobs | None = None
    reasoning_logprobs: _RawLogprobs | None = None


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


MAX_CHOICES = 1024
"""Most choices of a response that are read."""
MAX_DEPTH = 100
"""Deepest nesting of the fields of a response that is read; what handles them later is recursive."""
MAX_ODD_BYTES = 1 << 26
"""Largest text in bytes that is read although it does not have the documented form: as objects, it is ten times as
large."""
SLICE = 1 << 21
"""Bytes of tokens that are decoded at once; the interpreter does nothing else meanwhile, about 10 ms."""

_SLICE_DECODER = msgspec.json.Decoder(list[_Token])
_RAW_SLICE_DECODER = msgspec.json.Decoder(list[Raw])
_FIRST_TOKEN = re.compile(rb'"(?:content|refusal)"\s*:\s*\[\s*(\{\s*"[^"\\]*"\s*:)')
_NO_LOGPROB = 12345.678125
"""Stands for the tokens that were cut out; no log-probability is above 0."""
_ATTEMPTS = 64
_NESTED = (dict, list)


class _Entries(Sequence[Any]):
    """The tokens of a choice as they came, each decoded when it is asked for."""

    def __init__(self, raw: list[Raw]) -> None:
        self._raw = raw

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
    """The response, if it is within the limits and the server reports no error for at least one of its choices.

    Choices that are nested too deeply are dropped, like all that are malformed.
    """
    choices: list[dict[str, Any]] = response["choices"]
    if len(choices) > MAX_CHOICES:
        raise ResponseTooLarge(f"the response has {len(choices)} choices; at most {MAX_CHOICES} are read")
    kept = [choice for choice in choices if not _is_deep(choice)]
    if not kept or _is_deep({**response, "choices": None}):
        raise ResponseTooLarge(f"the response is nested more than {MAX_DEPTH} levels deep")
    response["choices"] = kept
    errors = [server_error(choice) if choice.get("error") else None for choice in response["choices"]]
    if errors[0] is not None and all(errors):
        raise errors[0]
    return response


def _is_deep(value: Any) -> bool:
    """Whether a value is nested more than ``MAX_DEPTH`` levels deep."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = [
            outer.values() if isinstance(outer, dict) else outer for outer in level if isinstance(outer, _NESTED)
        ]
        if not inner:
            return False
        level = list(chain.from_iterable(inner))
    return True


def _read_one(body: bytes) -> tuple[_Head, list[dict[str, Any]]]:
    rest, slices = _cut(body)
    if slices:
        try:
            response = _DECODER.decode(rest)
            (only,) = response.choices
            return response, [_slim(only, lambda: _RAW_DECODER.decode(rest).choices[0], slices)]
        except (*_UNREADABLE, ValueError):
            pass
    _check_count(body)
    response = _DECODER.decode(body)
    choices = enumerate(response.choices)
    return response, [
        _slim(c, lambda number=number: _RAW_DECODER.decode(body).choices[number]) for number, c in choices
    ]


def _read_several(body: bytes) -> tuple[_Head, list[dict[str, Any]]]:
    _check_count(body)
    response = _SEVERAL_DECODER.decode(body)
    return response, [choice for text in response.choices if (choice := _choice(text)) is not None]


def _choice(text: bytes | Raw) -> dict[str, Any] | None:
    """The JSON of a choice as one with packed log-probabilities; None if it is not a choice.

    Raises:
        LogprobsMalformed: It is not JSON.
    """
    rest, slices = _cut(text)
    try:
        return _slim(_CHOICE_DECODER.decode(rest), lambda: _RAW_CHOICE_DECODER.decode(rest), slices)
    except _UNREADABLE:
        if slices:
            return _choice_at_once(text)
        choice = _json(bytes(text))
        return _slim_carefully(choice) if _is_choice(choice) else None


def _choice_at_once(text: bytes | Raw) -> dict[str, Any] | None:
    """``_choice`` of a text that has another form than its slices seem to have."""
    try:
        return _slim(_CHOICE_DECODER.decode(text), lambda: _RAW_CHOICE_DECODER.decode(text))
    except _UNREADABLE:
        choice = _json(bytes(text))
        return _slim_carefully(choice) if _is_choice(choice) else None


def _check_count(body: bytes) -> None:
    """Raise ``ResponseTooLarge`` if there are too many choices to be decoded together."""
    windows = range(0, len(body), SLICE)
    if len(body) > SLICE and sum(body.count(b'"message":', at, at + SLICE) for at in windows) > 2 * MAX_CHOICES:
        raise ResponseTooLarge(f"the response has more than {MAX_CHOICES} choices; found {_start(body)}")


# A long list of tokens, slice by slice


def _cut(text: bytes | Raw) -> tuple[bytes | Raw, list[bytes]]:
    """A response or a choice without most of its tokens, and the tokens that were cut out, as several lists.

    A token that has no log-probability of its own stands in their place. Whether the slices are tokens, and whether
    they were the log-probabilities of the response, is up to the caller.
    """
    if len(memoryview(text)) <= 2 * SLICE:
        return text, []
    whole = bytes(text)
    found = _FIRST_TOKEN.search(whole)
    begin, slices = found.start(1) if found else len(whole), list[bytes]()
    while found and len(whole) - begin > 2 * SLICE and (end := _token_after(whole, begin + SLICE, found[1])):
        slices.append(b"".join((b"[", memoryview(whole)[begin : whole.rindex(b",", begin, end)], b"]")))
        begin = end
    if found is None or not slices:
        return text, []
    stand_in = b'{"logprob":%r,"top_logprobs":[]},' % _NO_LOGPROB
    return whole[: found.start(1)] + stand_in + whole[begin:], slices


def _token_after(text: bytes, position: int, mark: bytes) -> int | None:
    """Where a token begins that follows one with alternatives; alternatives begin with the same bytes."""
    for _ in range(_ATTEMPTS):
        position = text.find(mark, position + 1, position + SLICE)
        if position < 0:
            return None
        if b"".join(text[position - 80 : position].split()).endswith(b"}]},"):
            return position
    return None


def _read_slice(listed: bytes) -> Read:
    """The numbers of a list of tokens; ``NaN`` and ``Infinity`` are read too.

    Raises:
        msgspec.DecodeError: They are not tokens.
    """
    try:
        return _read(_SLICE_DECODER.decode(listed))
    except _UNREADABLE:
        return _read(msgspec.convert(_json(listed), list[_Token]))


def _joined(parts: Sequence[Read]) -> Read:
    return Read(*(list(chain.from_iterable(lists)) for lists in zip(*parts, strict=True)))


def _raw_tokens(slices: Sequence[bytes], choice: _RawChoice) -> list[Raw]:
    logprobs, beside = choice.logprobs or _RawLogprobs(), choice.reasoning_logprobs or _RawLogprobs()
    last = logprobs.content or logprobs.refusal or []
    before = [token for tokens in slices for token in _RAW_SLICE_DECODER.decode(tokens)]
    return [*(logprobs.reasoning_content or beside.content or ()), *before, *last[bool(slices) :]]


# One choice


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


def _slim(choice: _Choice, raw: Callable[[], _RawChoice], slices: Sequence[bytes] = ()) -> dict[str, Any]:
    """A choice with packed log-probabilities.

    Args:
        choice: The choice.
        raw: Gives it with its tokens as they came.
        slices: Tokens that were cut out of it.

    Raises:
        msgspec.DecodeError: It has log-probabilities, but not in the form of a chat completion.
    """
    fields = {"index": choice.index, "message": choice.message, "finish_reason": choice.finish_reason}
    if choice.error:
        fields["error"] = choice.error
    reasoning = _reasoning(choice)
    if choice.logprobs is None and not slices and not reasoning:
        return {**fields, "logprobs": pack_logprobs(lambda: token_signals({**fields, "logprobs": None}))}
    tokens = None if choice.logprobs is None else choice.logprobs.content or choice.logprobs.refusal
    if choice.logprobs is not None and not tokens and choice.logprobs.packed:
        return {**fields, "logprobs": _packed_before(choice.logprobs)}
    if not (tokens or reasoning) or (slices and (not tokens or tokens[0].logprob != _NO_LOGPROB)):
        raise msgspec.DecodeError("no tokens")
    tokens = tokens or []
    before = [_read(reasoning)] if reasoning else []
    before += map(_read_slice, slices)
    read = _joined([*before, _read(tokens[bool(slices) :])]) if before else _read(tokens)
    signals = partial(signals_of, read, lambda: _Entries(_raw_tokens(slices, raw())))
    return {**fields, "logprobs": pack_logprobs(signals, len(reasoning))}


def _reasoning(choice: _Choice) -> list[_Token]:
    """The tokens of reasoning that the server reports in a field of their own."""
    inside = choice.logprobs and choice.logprobs.reasoning_content
    return inside or (choice.reasoning_logprobs and choice.reasoning_logprobs.content) or []


def _packed_before(logprobs: _Logprobs) -> dict[str, Any]:
    """The form that ``pack_logprobs`` gave it, when the choice arrived."""
    more: dict[str, Any] = {"excess": logprobs.excess} if logprobs.excess else {}
    more |= {"n_reasoning": logprobs.n_reasoning} if logprobs.n_reasoning else {}
    return {"packed": logprobs.packed, "n_alternatives": logprobs.n_alternatives, **more}


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
    return {**fields, "logprobs": pack_logprobs(lambda: token_signals(choice), _n_reasoning(choice))}


def _n_reasoning(choice: dict[str, Any]) -> int:
    try:
        return n_reasoning_tokens(choice)
    except LogprobsMalformed:
        return 0


def _is_choice(choice: Any) -> bool:
    return isinstance(choice, dict) and (isinstance(choice.get("message"), dict) or isinstance(choice.get("text"), str))


def _json(body: bytes) -> Any:
    if len(body) > MAX_ODD_BYTES:
        needed = f"a response of more than {MAX_ODD_BYTES:,} bytes must have the form of a chat completion"
        raise ResponseTooLarge(f"{needed}; found {_start(body)}")
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
