"""Decoding within limits: long lists of tokens slice by slice, few choices, no deep nesting."""

# pyright: reportArgumentType=false

import json
import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from ec_agents.errors import LogprobsMalformed, ResponseTooLarge
from ec_agents.servers import completions
from ec_agents.servers.completions import MAX_CHOICES, MAX_DEPTH, decode_response

LOGPROBS = st.sampled_from([-0.5, -1.0, -2.0, -9999.0, None, math.nan, -math.inf])
TEXTS = st.sampled_from(["a", "token", '{"token":', "}]},", '}]},{"token":"', "é\\", ""])
ALTERNATIVES = st.fixed_dictionaries(
    {"token": TEXTS, "logprob": LOGPROBS, "bytes": st.lists(st.integers(0, 255), max_size=2)}
)
TOKENS = st.lists(
    st.fixed_dictionaries(
        {"token": TEXTS, "logprob": LOGPROBS, "top_logprobs": st.lists(ALTERNATIVES, max_size=3) | st.none()},
        optional={"bytes": st.none()},
    ),
    min_size=1,
    max_size=40,
)
MESSAGES = st.fixed_dictionaries(
    {"content": TEXTS | st.just([{"token": "x", "logprob": -1, "top_logprobs": [{"token": "x"}]}] * 30)}
)
RESPONSES = st.builds(
    lambda tokens, message, where, order: dict(
        order([("message", message), ("logprobs", {where: tokens}), ("finish_reason", "stop")])
    ),
    TOKENS,
    MESSAGES,
    st.sampled_from(["content", "refusal"]),
    st.sampled_from([list, reversed]),
)
FORMS = st.sampled_from([{"separators": (",", ":")}, {}, {"indent": 1}])


@settings(max_examples=200)
@given(RESPONSES, FORMS, st.integers(1, 300))
def test_slices(choice: Any, form: Any, size: int):
    """A list of tokens that is decoded in slices gives what it gives at once, whatever the tokens and texts are."""
    for n in (1, 2):
        body = json.dumps({"id": "x", "choices": [choice] * n, "usage": {"prompt_tokens": 1}}, **form).encode()
        at_once = outcome(body, n)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(completions, "SLICE", size)
            assert outcome(body, n) == at_once


def outcome(body: bytes, n: int) -> Any:
    try:
        return json.dumps(decode_response(body, n))
    except LogprobsMalformed as error:
        return type(error)


def long(n_tokens: int) -> bytes:
    row = [{"token": f"tok{i}", "logprob": -0.5 - i, "bytes": [116, 111, 107, 48 + i]} for i in range(8)]
    choice = {"message": {"content": "hello"}, "logprobs": {"content": [{**row[0], "top_logprobs": row}] * n_tokens}}
    return json.dumps({"choices": [choice]}, separators=(",", ":")).encode()


@pytest.mark.parametrize("n", [1, 2])
def test_no_decoder_gets_a_large_text(n: int, monkeypatch: pytest.MonkeyPatch):
    """The tokens of a large response are never decoded all at once, because nothing else runs meanwhile."""
    decoded: list[int] = []

    class Noting:
        def __init__(self, real: Any) -> None:
            self.real = real

        def decode(self, text: Any) -> Any:
            decoded.append(len(memoryview(text)))
            return self.real.decode(text)

    monkeypatch.setattr(completions, "SLICE", 1 << 16)
    body = long(5000)
    assert len(body) > 30 * completions.SLICE
    for name in ("_DECODER", "_CHOICE_DECODER", "_SLICE_DECODER"):
        monkeypatch.setattr(completions, name, Noting(getattr(completions, name)))
    (choice,) = decode_response(body, n)["choices"]
    assert len(choice["logprobs"]["packed"]) == 16 * 5000
    assert len(decoded) > 10
    assert max(decoded) < 3 * completions.SLICE


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("count", [MAX_CHOICES + 1, 400_000])
def test_too_many_choices(n: int, count: int):
    """Choices beyond the limit are a typed error, before objects are made of very many."""
    body = b'{"choices":[' + b",".join([b'{"message":{"content":"a"}}'] * count) + b"]}"
    tracemalloc.start()
    try:
        with pytest.raises(ResponseTooLarge, match="choices"):
            decode_response(body, n)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("where", ["message", "finish_reason", "usage", "id", "error"])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 500, 5000])
def test_deep_nesting(where: str, depth: int, n: int):
    """A response that is nested too deeply is a typed error, whichever of its fields it is."""
    response: dict[str, Any] = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": {}}
    owner = response if where in ("usage", "id") else response["choices"][0]
    owner[where] = "?"
    deep = '{"a":' * depth + "1" + "}" * depth
    body = json.dumps(response).replace('"?"', deep).encode()
    with pytest.raises(LogprobsMalformed):
        decode_response(body, n)


def test_one_deep_choice_leaves_the_others():
    deep = {"message": {"content": "a", "x": nested(MAX_DEPTH + 2)}}
    body = json.dumps({"choices": [{"message": {"content": "b"}}, deep, {"message": {"content": "c"}}]}).encode()
    for n in (1, 3):
        assert [choice["message"]["content"] for choice in decode_response(body, n)["choices"]] == ["b", "c"]
    sound = json.dumps({"choices": [{"message": {"content": "a", "x": nested(MAX_DEPTH - 5)}}]}).encode()
    assert decode_response(sound)["choices"][0]["message"]["x"] == nested(MAX_DEPTH - 5)


def test_odd_forms_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """What is not decoded as documented becomes objects many times as large, so less of it is read."""
    body = json.dumps({"choices": [{"text": "a", "logprobs": None}]}).encode()
    assert decode_response(body)["choices"][0]["message"]["content"] == "a"
    monkeypatch.setattr(completions, "MAX_ODD_BYTES", 20)
    with pytest.raises(ResponseTooLarge, match="more than 20 bytes must have the form of a chat completion"):
        decode_response(body)
