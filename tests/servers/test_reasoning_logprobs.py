"""Log-probabilities of reasoning in a field of their own: joined with those of the answer, or apart."""

import json
from typing import Any

import numpy as np
import pytest

from ec_agents.errors import LogprobsMissing
from ec_agents.logprobs import Part, token_signals
from ec_agents.servers import completions
from ec_agents.servers.completions import decode_response
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.testing import FaultServer


def tokens(*logprobs: float) -> list[dict[str, Any]]:
    rows = [[{"token": "a", "logprob": p}, {"token": "b", "logprob": -2.0}] for p in logprobs]
    return [{**row[0], "top_logprobs": row} for row in rows]


THOUGHT, ANSWER = tokens(-0.1, -0.2, -0.3), tokens(-0.4, -0.5)


def choice(form: str) -> dict[str, Any]:
    """A choice whose reasoning has log-probabilities in the form of DeepSeek or of Cerebras."""
    message = {"role": "assistant", "content": "ab", "reasoning_content": "aaa"}
    if form == "deepseek":
        fields: dict[str, Any] = {"logprobs": {"content": ANSWER, "reasoning_content": THOUGHT}}
    else:
        fields = {"logprobs": {"content": ANSWER}, "reasoning_logprobs": {"content": THOUGHT}}
    return {"index": 0, "message": message, "finish_reason": "stop", **fields}


FORMS = pytest.mark.parametrize("form", ["deepseek", "cerebras"])


@FORMS
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("part", "expected"),
    [("all", [-0.1, -0.2, -0.3, -0.4, -0.5]), ("answer", [-0.4, -0.5]), ("reasoning", [-0.1, -0.2, -0.3])],
)
def test_parts(form: str, is_packed: Any, part: Part, expected: list[float]):
    """Reasoning comes first; either part can be measured alone, before and after packing."""
    found = choice(form)
    if is_packed:
        (found,) = decode_response(json.dumps({"choices": [found]}).encode())["choices"]
    assert np.allclose(token_signals(found, part=part).logprobs, expected)


@FORMS
@pytest.mark.parametrize("n", [1, 2])
def test_both_decoders_agree(form: str, n: int):
    """The fast decoder, and the careful one that reads ``NaN``, give the same."""
    body = json.dumps({"choices": [choice(form)] * n})
    fast = decode_response(body.encode(), n)["choices"]
    careful = decode_response(body.replace('"index": 0', '"index": NaN').encode(), n)["choices"]
    assert [found["logprobs"] for found in fast] == [found["logprobs"] for found in careful]
    assert fast[0]["logprobs"]["n_reasoning"] == 3


@FORMS
def test_long_answers(form: str, monkeypatch: pytest.MonkeyPatch):
    """Tokens that are decoded slice by slice follow the reasoning too."""
    monkeypatch.setattr(completions, "SLICE", 1 << 12)
    found = choice(form)
    found["logprobs"]["content"] = ANSWER * 500
    (packed,) = decode_response(json.dumps({"choices": [found]}, separators=(",", ":")).encode())["choices"]
    assert np.array_equal(token_signals(packed).logprobs, token_signals(found).logprobs)
    assert token_signals(packed, part="answer").n_tokens == 1000


def test_reasoning_only():
    """A response that was cut off while it reasoned has no answer to measure."""
    found = choice("deepseek")
    found["logprobs"]["content"] = None
    assert token_signals(found).n_tokens == 3
    with pytest.raises(LogprobsMissing, match="answer"):
        token_signals(found, part="answer")
    (packed,) = decode_response(json.dumps({"choices": [found]}).encode())["choices"]
    assert token_signals(packed).n_tokens == 3


def test_no_reasoning():
    with pytest.raises(LogprobsMissing, match="reasoning"):
        token_signals({"content": ANSWER}, part="reasoning")
    assert token_signals({"content": ANSWER}, part="answer").n_tokens == 2


@FORMS
@pytest.mark.parametrize(("option", "lengths"), [("joined", (5, None)), ("apart", (2, 3))])
async def test_the_model(form: str, option: Any, lengths: tuple[int, int | None]):
    """The option of the model decides which tokens rank a candidate."""
    with FaultServer({"choices": [choice(form)]}) as server:
        model = OpenAIChatModel(model="m", base_url=server.base_url, reasoning_logprobs=option)  # type: ignore[call-arg]
        for message in (await model.ainvoke("hi"), model.invoke("hi")):
            metadata = message.response_metadata
            assert token_signals(metadata["logprobs"]).n_tokens == lengths[0]
            beside = metadata.get("reasoning_logprobs")
            assert (None if beside is None else token_signals(beside).n_tokens) == lengths[1]
