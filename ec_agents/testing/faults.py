"""Faults of a server, by name."""

import json
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Json = dict[str, Any]


def _same(data: Any) -> Any:
    return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault: when, with which status, and what replaces the response."""

    about: str
    """What goes wrong."""
    delay: float = 0.0
    """Seconds before anything is sent; with ``math.inf`` nothing ever is."""
    jitter: float = 0.0
    """Most seconds added to the delay, chosen uniformly."""
    status: int = 200
    """HTTP status; from 400 on, an error in OpenAI's form replaces the response."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """Headers besides the usual ones."""
    content_type: str = "application/json"
    """The ``Content-Type`` header."""
    payload: Callable[[Json], Any] = _same
    """Changes the response before it becomes JSON."""
    body: Callable[[bytes], bytes] = _same
    """Changes the bytes of the body."""
    sent: float = 1.0
    """Share of the body sent before the connection is closed."""
    stalls: bool = False
    """Whether the connection stays open instead, with nothing more sent."""

    def spoil(self, response: Any) -> bytes:
        """Return the body to send instead of a response, which is not changed."""
        changed = response if self.payload is _same else self.payload(deepcopy(response))
        return self.body(json.dumps(changed, separators=(",", ":")).encode())


NO_FAULT = Fault(about="nothing")
"""A sound answer."""


def _choices(change: Callable[[Json], Any]) -> Callable[[Json], Json]:
    """Return a change of every choice of a response."""

    def payload(response: Json) -> Json:
        for choice in response["choices"]:
            change(choice)
        return response

    return payload


def _tokens(change: Callable[[Json], Any]) -> Callable[[Json], Json]:
    """Return a change of every token of every choice."""

    def payload(choice: Json) -> None:
        for token in (choice["logprobs"] or {"content": ()})["content"]:
            change(token)

    return _choices(payload)


def _fewer(response: Json) -> Json:
    return {**response, "choices": response["choices"][:1]}


def _last_is(value: float) -> Callable[[Json], Json]:
    """Gives the last alternative of every token another number."""
    return _tokens(lambda token: token["top_logprobs"][-1].update(logprob=value))


def _absent(token: Json) -> None:
    token.update({"token": "(drawn)", "bytes": list(b"(drawn)"), "logprob": -12.5})


def _call(choice: Json) -> None:
    function = {"name": "calc", "arguments": '{"expression":"6*7"}'}
    call = {"id": "call_0", "type": "function", "function": function}
    choice["message"].update(content=None, tool_calls=[call])
    choice["finish_reason"] = "tool_calls"


def _unmeasured_call(choice: Json) -> None:
    _call(choice)
    choice["logprobs"] = None


def _refuse(choice: Json) -> None:
    choice["message"].update(content=None, refusal="I cannot help with that.")
    if choice["logprobs"]:
        choice["logprobs"] = {"content": None, "refusal": choice["logprobs"]["content"]}


def inflated(size: int) -> Callable[[bytes], bytes]:
    """Repeats the tokens of the first choice until the body has at least ``size`` bytes."""

    def body(sound: bytes) -> bytes:
        response: Json = json.loads(sound)
        tokens: list[Json] = (response["choices"][0]["logprobs"] or {"content": list[Json]()})["content"]
        if not tokens:
            return sound
        once = json.dumps(tokens, separators=(",", ":")).encode()[1:-1]
        return sound.replace(once, b",".join([once] * (size // len(once) + 1)), 1)

    return body


_HTML = b"<!doctype html><title>Sign in</title>"

_ERROR = {"code": 502, "message": "the upstream provider disconnected"}

FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        "latency": Fault(about="a slow answer", delay=0.1),
        "jitter": Fault(about="answers in any order", jitter=0.1),
        "straggler": Fault(about="an answer long after the others", delay=1.0),
        "hang": Fault(about="no answer", delay=math.inf),
        "status_429": Fault(about="rate limit", status=429),
        "retry_after": Fault(about="rate limit, with the time to wait", status=429, headers={"Retry-After": "1"}),
        "status_500": Fault(about="internal error", status=500),
        "status_503": Fault(about="overloaded", status=503),
        "disconnect": Fault(about="the connection breaks in the middle of the body", sent=0.5),
        "stall": Fault(about="the body stops in the middle, and the connection stays open", sent=0.5, stalls=True),
        "truncated_json": Fault(about="the body ends in the middle", body=lambda body: body[: len(body) // 2]),
        "html_page": Fault(about="a page instead of JSON", content_type="text/html", body=lambda _: _HTML),
        "wrong_content_type": Fault(about="JSON declared as text", content_type="text/plain"),
        "invalid_utf8": Fault(
            about="bytes that are not text", body=lambda body: body.replace(b"assistant", b"\xff\xfe")
        ),
        "big_body": Fault(about="a body of 20 MB", body=inflated(20_000_000)),
        "empty_choices": Fault(about="no choices", payload=lambda response: {**response, "choices": []}),
        "error_body": Fault(about="an error with status 200", payload=lambda _: {"error": _ERROR}),
        "error_choice": Fault(
            about="an error beside a choice that is broken off",
            payload=_choices(lambda choice: choice.update(finish_reason="error", error=_ERROR)),
        ),
        "aborted": Fault(about="broken off", payload=_choices(lambda choice: choice.update(finish_reason="abort"))),
        "fewer_choices": Fault(about="one choice, whatever n is", payload=_fewer),
        "null_logprobs": Fault(
            about="logprobs are null", payload=_choices(lambda choice: choice.update(logprobs=None))
        ),
        "no_top_logprobs": Fault(about="no alternatives", payload=_tokens(lambda token: token.pop("top_logprobs"))),
        "nan": Fault(about="NaN among the alternatives", payload=_last_is(math.nan)),
        "infinity": Fault(about="-Infinity among the alternatives", payload=_last_is(-math.inf)),
        "sentinel": Fault(about="-9999 among the alternatives", payload=_last_is(-9999.0)),
        "unsorted": Fault(about="alternatives in no order", payload=_tokens(lambda t: t["top_logprobs"].reverse())),
        "absent_token": Fault(about="the drawn token is not among the alternatives", payload=_tokens(_absent)),
        "duplicate_token": Fault(
            about="the drawn token is listed twice",
            payload=_tokens(lambda token: token["top_logprobs"].append(token["top_logprobs"][0])),
        ),
        "tool_calls": Fault(about="a tool call, its tokens measured", payload=_choices(_call)),
        "unmeasured_tool_calls": Fault(
            about="a tool call without log-probabilities", payload=_choices(_unmeasured_call)
        ),
        "reasoning": Fault(
            about="reasoning beside the answer",
            payload=_choices(lambda choice: choice["message"].update(reasoning_content="6 times 7 is 42")),
        ),
        "refusal": Fault(about="the model refuses", payload=_choices(_refuse)),
        "length": Fault(about="cut off", payload=_choices(lambda choice: choice.update(finish_reason="length"))),
    }
)
"""The faults by name."""
