"""The fast path: decoding, the chat model, requests for several choices, and the same under ChatOpenAI."""

import asyncio
import json
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial, wraps
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import signature
from itertools import product
from typing import Any

import numpy as np
import openai
import pytest
from helpers.waiting import settle, until
from hypothesis import example, given, settings, strategies as st
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import AzureChatOpenAI, ChatOpenAI
from openai.resources.chat import AsyncCompletions, Completions
from openai.resources.chat.completions import completions as sdk
from openai.types.chat import ChatCompletion, ParsedChatCompletion
from pydantic import BaseModel

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.errors import ConfigError, LogprobsError, LogprobsMalformed, LogprobsMissing
from ec_agents.logprobs import token_signals
from ec_agents.messages import message_candidate
from ec_agents.responses import response_candidates
from ec_agents.sampling import sample
from ec_agents.servers.completions import decode_response, split_usage
from ec_agents.servers.fast_logprobs import _typed, fast_logprobs
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.servers.transport import PARAMETERS
from ec_agents.servers.wire_messages import choice_message, wire_messages
from ec_agents.testing import Fault, FaultServer, Reply, ScriptedChatModel, profile_logprobs

# pyright: reportArgumentType=false

ASK: Any = {"logprobs": True, "top_logprobs": 4}


def body(choice: Any, **fields: Any) -> bytes:
    return json.dumps({"id": "x", "model": "any", "choices": [choice], **fields}).encode()


def chat(logprobs: Any, **message: Any) -> dict[str, Any]:
    fields = {"role": "assistant", "content": "hello", **message}
    return {"index": 0, "message": fields, "logprobs": logprobs, "finish_reason": "stop"}


def client(server: FaultServer, **fields: Any) -> OpenAIChatModel:
    options: Any = {"model": "any", "base_url": server.base_url, "api_key": "none", "max_retries": 0, **fields}
    return OpenAIChatModel(**options)


def outcome(choice: Any) -> tuple[Any, ...]:
    """What ``token_signals`` makes of a choice, comparable."""
    try:
        signals = token_signals(choice)
    except LogprobsError as error:
        return type(error), str(error)
    return signals.to_bytes(), signals.n_alternatives


# Decoding

NUMBERS = st.one_of(
    st.none(),
    st.just(-9999.0),
    st.floats(-30, 0),
    st.floats(allow_nan=True),
    st.integers(-5, 1),
    st.booleans(),
    st.text(),
)
ALTERNATIVES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"logprob": NUMBERS}, optional={"token": st.text(max_size=3), "bytes": st.none()}),
        st.just({}),
        st.none(),
    ),
    max_size=4,
)
TOKENS = st.one_of(
    st.fixed_dictionaries({"logprob": NUMBERS, "token": st.text(max_size=3), "top_logprobs": ALTERNATIVES}),
    st.fixed_dictionaries({"logprob": st.floats(-30, 0)}, optional={"top_logprobs": st.none() | st.integers()}),
    st.none(),
)
SOUND = st.lists(
    st.fixed_dictionaries(
        {
            "logprob": st.sampled_from([-0.5, -1.0, -9999.0]),
            "token": st.sampled_from(["a", "b"]),
            "top_logprobs": st.lists(
                st.fixed_dictionaries(
                    {"logprob": st.sampled_from([-0.5, -1.0, -9999.0, None]), "token": st.sampled_from(["a", "b"])}
                ),
                max_size=4,
            ),
        }
    ),
    max_size=5,
)
LOGPROBS = st.one_of(
    st.none(),
    st.fixed_dictionaries({"content": SOUND}, optional={"refusal": SOUND}),
    st.fixed_dictionaries({}, optional={"content": st.none() | st.lists(TOKENS, max_size=4), "refusal": SOUND}),
    st.fixed_dictionaries({"token_logprobs": st.lists(NUMBERS, max_size=3)}),
    st.integers(),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "logprobs", "text", "tool_calls", "function", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@settings(max_examples=300)
@given(LOGPROBS)
def test_decoding_gives_what_token_signals_gives(logprobs: Any):
    choice = chat(logprobs)
    (decoded,) = decode_response(body(choice))["choices"]
    assert outcome(decoded) == outcome(choice)
    assert {key: decoded[key] for key in ("message", "finish_reason", "index")} == {
        key: choice[key] for key in ("message", "finish_reason", "index")
    }


@given(st.lists(LOGPROBS | SOUND.map(lambda tokens: {"content": tokens}), min_size=1, max_size=4))
def test_choices_read_one_by_one_are_those_read_at_once(several: list[Any]):
    encoded = json.dumps({"id": "x", "choices": [chat(logprobs) for logprobs in several], "usage": {"a": 1}}).encode()
    assert decode_response(encoded, n=2) == decode_response(encoded)


@settings(max_examples=300)
@given(JSON)
def test_any_json_gives_messages_or_the_typed_error(data: Any):
    for n, encoded in product((1, 2), (json.dumps(data).encode(), body(data), body({"message": data}))):
        try:
            response = decode_response(encoded, n)
            messages = [choice_message(choice, response) for choice in response["choices"]]
        except LogprobsMalformed:
            continue
        assert messages
        assert all(isinstance(message_candidate(message, 0).content, str) for message in messages)


@settings(max_examples=300)
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 400))
def test_any_bytes_give_messages_or_the_typed_error(noise: bytes, start: int, stop: int):
    sound = body(chat(profile_logprobs("!.")))
    for encoded in (noise, sound[:start] + noise + sound[stop:]):
        try:
            response = decode_response(encoded)
            assert [choice_message(choice, response) for choice in response["choices"]]
        except LogprobsMalformed:
            continue


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "no JSON"),
        (b"<html>", "no JSON: .*; it is 6 bytes, b'<html>'"),
        (b"[" * 100_000, "no JSON"),
        (b"[1]", "must be a JSON object; found 3 bytes"),
        (b'{"choices": []}', "non-empty list of choices"),
        (b'{"choices": [1, {"index": 0}]}', "none of the 2 choices has a message or a text"),
        (b'{"choices": [{"message": {"content": "\xff"}}]}', "no JSON"),
    ],
)
def test_what_is_no_completion_is_refused_with_what_was_found(encoded: bytes, message: str):
    with pytest.raises(LogprobsMalformed, match=message):
        decode_response(encoded)


def test_choices_that_are_none_are_left_out():
    encoded = body(chat(profile_logprobs("!."))).replace(b'"choices": [', b'"choices": [null, ')
    assert len(decode_response(encoded)["choices"]) == 1


def test_literals_that_json_does_not_know_are_read():
    content = [{"logprob": -0.5, "top_logprobs": [{"logprob": -0.5}, {"logprob": math.nan}, {"logprob": -math.inf}]}]
    (choice,) = decode_response(body(chat({"content": content})))["choices"]
    signals = token_signals(choice)
    assert (signals.n_tokens, signals.n_missing, signals.n_alternatives) == (1, 0, 3)
    assert outcome(choice) == outcome(chat({"content": content}))


def test_invalid_text_in_a_token_costs_nothing_but_the_token():
    logprobs = profile_logprobs("!.")
    logprobs["content"][0]["top_logprobs"].append(logprobs["content"][0]["top_logprobs"][0])  # listed twice
    encoded = body(chat(logprobs)).replace(b'"token": "a"', b'"token": "\xff"')
    (choice,) = decode_response(encoded)["choices"]
    assert outcome(choice) == outcome(chat(logprobs))


def test_the_packed_form_is_json_of_sixteen_characters_a_token():
    (choice,) = decode_response(body(chat(profile_logprobs("!..!"))))["choices"]
    assert set(choice["logprobs"]) == {"packed", "n_alternatives"}
    assert len(choice["logprobs"]["packed"]) == 4 * 16
    assert response_candidates(json.loads(json.dumps({"choices": [choice]})))[0].signals is not None


@pytest.mark.parametrize("packed", [b"123", "text", "!!", "é", None, 5, [1]])
def test_a_damaged_packed_form_is_malformed(packed: Any):
    expected = LogprobsMissing if packed is None else LogprobsMalformed
    with pytest.raises(expected):
        token_signals({"packed": packed})


# Usage


@given(st.lists(st.none() | st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 500), st.integers(0, 99))
def test_shares_of_the_usage_add_up(lengths: list[int | None], written: int, read: int):
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    shares = [share for share in split_usage(usage, lengths) if share]
    counted = sum(length or 0 for length in lengths)
    assert sum(share["prompt_tokens"] for share in shares) == read
    assert sum(share["completion_tokens"] for share in shares) == max(written, counted)
    assert all(s["total_tokens"] == s["prompt_tokens"] + s["completion_tokens"] for s in shares)
    assert all(s["completion_tokens"] >= (length or 0) for s, length in zip(shares, lengths, strict=True))


# The same as langchain-openai

CALL = {"id": "c1", "type": "function", "function": {"name": "calc", "arguments": '{"x": "6*7"}'}}


def called(arguments: Any) -> dict[str, Any]:
    return {**CALL, "function": {"name": "calc", "arguments": arguments}}


PAYLOADS = {
    "text": chat(profile_logprobs("!..")),
    "no content": chat(None, content=None),
    "tool call": chat(profile_logprobs("!.."), content=None, tool_calls=[CALL]),
    "two tool calls": chat(None, content="thinking", tool_calls=[CALL, {**CALL, "id": "c2"}]),
    "undecodable arguments": chat(None, content=None, tool_calls=[called('{"x": ')]),
    "no arguments": chat(None, content=None, tool_calls=[called("")]),
    "line break in arguments": chat(None, content=None, tool_calls=[called('{"x": "a\nb"}')]),
    "refusal": chat({"content": None, "refusal": profile_logprobs("!.")["content"]}, content=None, refusal="No."),
    "cut off": {**chat(profile_logprobs("!.")), "finish_reason": "length"},
    "filtered": {**chat(None), "finish_reason": "content_filter"},
    "reasoning": chat(profile_logprobs("!."), reasoning_content="first this"),
    "function call": chat(None, content=None, function_call={"name": "calc", "arguments": "{}"}),
    "structured": chat(profile_logprobs("!."), content='{"answer": 42}'),
}
USAGES = {
    "none": None,
    "plain": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    "details": {
        "prompt_tokens": 30,
        "completion_tokens": 5,
        "total_tokens": 35,
        "prompt_tokens_details": {"cached_tokens": 16, "audio_tokens": None},
        "completion_tokens_details": {"reasoning_tokens": 2},
    },
}


def response(choice: Any, usage: Any = None, **fields: Any) -> dict[str, Any]:
    head = {"id": "x", "object": "chat.completion", "created": 1, "model": "any-1", "system_fingerprint": "fp"}
    return {**head, "choices": [choice], "usage": usage, **fields}


def comparable(message: AIMessage) -> dict[str, Any]:
    """A message without what is meant to differ: ids, the form of log-probabilities, and reasoning."""
    data = message.model_dump()
    data.pop("id")
    metadata = data["response_metadata"]
    metadata.pop("logprobs", None)
    usage = metadata.get("token_usage") or {}
    metadata["token_usage"] = {
        key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for key, value in usage.items()
        if value is not None
    }
    data["additional_kwargs"].pop("reasoning_content", None)
    return data


@pytest.mark.parametrize("tier", [None, "priority"])
@pytest.mark.parametrize("usage", USAGES.values(), ids=USAGES)
@pytest.mark.parametrize("choice", PAYLOADS.values(), ids=PAYLOADS)
def test_messages_are_those_of_langchain_openai(choice: Any, usage: Any, tier: str | None):
    data = response(choice, usage, **({"service_tier": tier} if tier else {}))
    theirs_model = ChatOpenAI(model="any", api_key="none", base_url="http://127.0.0.1:1/v1")
    theirs = theirs_model._create_chat_result(ChatCompletion.construct(**data))
    expected: Any = theirs.generations[0].message
    info = theirs.generations[0].generation_info or {}
    expected.response_metadata = {**(theirs.llm_output or {}), **info, **expected.response_metadata}
    decoded = decode_response(json.dumps(data).encode())
    ours = choice_message(decoded["choices"][0], decoded)
    assert comparable(ours) == comparable(expected)
    assert message_candidate(ours, 0).flaws.keys() == message_candidate(expected, 0).flaws.keys()
    assert outcome(ours.response_metadata["logprobs"])[0] == outcome(choice)[0]
    assert ours.additional_kwargs.get("reasoning_content") == choice["message"].get("reasoning_content")


CONVERSATION: list[BaseMessage] = [
    SystemMessage("be brief"),
    HumanMessage("hi"),
    HumanMessage([{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "https://x/y"}}]),
    AIMessage("", tool_calls=[{"name": "f", "args": {"a": "é"}, "id": "c1", "type": "tool_call"}]),
    ToolMessage("42", tool_call_id="c1", name="f"),
    AIMessage(
        "", invalid_tool_calls=[{"name": "f", "args": "{", "id": "c2", "error": "", "type": "invalid_tool_call"}]
    ),
    AIMessage("done", additional_kwargs={"refusal": None, "reasoning_content": "not sent"}, response_metadata={"a": 1}),
]


def test_requests_are_those_of_langchain_openai():
    theirs = ChatOpenAI(model="any", api_key="none", base_url="http://127.0.0.1:1/v1")
    expected = theirs._get_request_payload(CONVERSATION)["messages"]
    assert wire_messages(CONVERSATION) == expected


class Answer(BaseModel):
    """An answer."""

    answer: int


@pytest.mark.parametrize("kind", ["ours", "fast"])
def test_structured_output(kind: str):
    call = {"name": "Answer", "arguments": '{"answer": 42}'}
    choice = chat(None, content=None, tool_calls=[{"id": "c1", "type": "function", "function": call}])
    with FaultServer(response(choice)) as server:
        fast = fast_logprobs(ChatOpenAI(model="any", base_url=server.base_url, api_key="none"))
        model = client(server) if kind == "ours" else fast
        assert model.with_structured_output(Answer, method="function_calling").invoke("hi") == Answer(answer=42)
        assert server.requests[0]["tools"][0]["function"]["name"] == "Answer"


# The chat model


@tool
def calc(x: str) -> str:
    """Calculate."""
    return f"= {x}"


def test_every_field_reaches_the_server():
    with FaultServer([Reply()]) as server:
        model = client(
            server,
            temperature=0.7,
            top_p=0.9,
            max_tokens=7,
            seed=1,
            stop=["!"],
            extra_body={"min_p": 0.1},
            model_kwargs={"presence_penalty": 0.5},
            default_headers={"X-Team": "a"},
        )
        model.bind_tools([calc], tool_choice="calc", parallel_tool_calls=False).invoke("hi", **ASK)
        named = {"type": "function", "function": {"name": "calc"}}
        expected = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 7, "seed": 1, "stop": ["!"], "min_p": 0.1}
        expected |= {"presence_penalty": 0.5, "model": "any", "tool_choice": named, "parallel_tool_calls": False, **ASK}
        (sent,) = server.requests
        assert sent.pop("tools")[0]["function"]["name"] == "calc"
        assert sent == {**expected, "messages": [{"role": "user", "content": "hi"}]}
        assert (server.headers[0]["x-team"], server.headers[0]["authorization"]) == ("a", "Bearer none")


def test_openai_gets_the_name_that_it_knows_for_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert OpenAIChatModel(model="gpt-4.1", max_tokens=5)._options() == {"max_completion_tokens": 5}


@pytest.mark.parametrize("run", [lambda model: model.invoke("hi"), lambda model: asyncio.run(model.ainvoke("hi"))])
def test_options_of_one_request_are_those_of_the_sdk(run: Any):
    with FaultServer(faults=["hang", None]) as server:
        options = {"extra_headers": {"X-Team": "a"}, "extra_body": {"top_k": 1}}
        with pytest.raises(openai.APITimeoutError):
            run(client(server).bind(**options, timeout=0.2))
        assert run(client(server).bind(**options)).content == "hello"
        assert [headers["x-team"] for headers in server.headers] == ["a", "a"]
        assert [(request["top_k"], set(request)) for request in server.requests] == [
            (1, {"model", "messages", "top_k"})
        ] * 2


async def test_a_query_is_added_to_the_address():
    seen: list[str] = []

    async def see(request: Any) -> None:
        seen.append(str(request.url))

    with FaultServer() as server:
        http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [see]})
        own = openai.AsyncOpenAI(base_url=server.base_url, api_key="none", http_client=http)
        await client(server, async_client=lambda: own).ainvoke("hi", extra_query={"api-version": "2"})
        await own.close()
        assert seen == [f"{server.base_url}/chat/completions?api-version=2"]


@pytest.mark.parametrize("run", [lambda model: model.invoke("hi"), lambda model: asyncio.run(model.ainvoke("hi"))])
def test_parameter_unknown_to_the_sdk(run: Any):
    """The error names the parameter and the remedy."""
    with FaultServer() as server:
        with pytest.raises(ConfigError, match="knows no parameter 'min_p'; .* extra_body"):
            run(client(server, model_kwargs={"min_p": 0.1}))
        assert not server.requests


@pytest.mark.parametrize("given", ["any", "required", True])
def test_any_tool_can_be_required(given: Any):
    bound: Any = OpenAIChatModel(model="any", base_url="http://127.0.0.1:1/v1").bind_tools([calc], tool_choice=given)
    assert bound.kwargs["tool_choice"] == "required"


def test_an_agent_runs_on_it():
    replies = [Reply(tool_calls=[("calc", {"x": "6*7"})])] * 2 + [Reply(content="42", profile="..!.")] * 2
    with FaultServer(replies) as server:
        agent = create_centroid_agent(client(server), [calc], n=2)
        state = agent.invoke({"messages": [("user", "what is 6*7?")]})
        assert [m.content for m in state["messages"]][2:] == ["= 6*7", "42"]
        record = state["messages"][-1].response_metadata["ec_agents"]
        assert all(score is not None for score in record["scores"])
        assert server.requests[-1]["messages"][-1]["role"] == "tool"


def test_one_loop_after_the_other():
    """One model serves one event loop after the other and leaves no connection open."""
    with FaultServer([Reply(content="hello")]) as server:
        model = client(server)
        for _ in range(3):
            assert asyncio.run(model.ainvoke("hi")).content == "hello"
            settle(lambda: server.connections == 0)


def test_threads_share_one_model():
    """Threads with and without an event loop share one model."""
    with FaultServer([Reply(content="hello")]) as server:
        model, results = client(server), list[Any]()
        works: list[Any] = [lambda: model.invoke("hi"), lambda: asyncio.run(model.ainvoke("hi"))] * 4
        threads = [threading.Thread(target=lambda work=work: results.append(work().content)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == ["hello"] * 8


async def test_cancelling_a_call_closes_its_connection():
    with FaultServer(faults=["hang"]) as server:
        call = asyncio.create_task(client(server).ainvoke("hi"))
        await until(lambda: server.in_flight == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: server.abandoned == 1 and server.in_flight == 0)


async def test_a_hostname_serves_many_calls_at_once():
    with FaultServer([Reply(content="hello")], latency=0.05) as server:
        model = client(server, base_url=server.base_url.replace("127.0.0.1", "localhost"))
        async with asyncio.timeout(20):
            drawn = await sample(lambda _: model.ainvoke("hi", **ASK), n=64, parse=message_candidate)
        assert len(drawn.candidates) == 64


async def test_large_bodies_give_the_same_as_small_ones():
    with FaultServer([Reply(content="hello")], faults=[None, "big_body"]) as server:
        model = client(server)
        small, large = [message_candidate(await model.ainvoke("hi", **ASK), 0).signals for _ in range(2)]
        assert small is not None
        assert large is not None
        assert large.n_tokens > 10_000
        assert np.array_equal(large.entropies[:4], small.entropies)


def test_errors_of_the_server_are_those_of_the_sdk():
    with FaultServer(faults=["status_429"]) as server, pytest.raises(openai.RateLimitError):
        client(server).invoke("hi")
    with FaultServer(faults=["status_500", None]) as server:
        assert client(server, max_retries=1).invoke("hi").content == "hello"


def test_a_server_of_ones_own_needs_no_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FaultServer() as server:
        assert client(server, api_key=None).invoke("hi").content == "hello"


def test_clients_of_ones_own_are_used():
    with FaultServer() as server:
        model = OpenAIChatModel(
            model="any",
            async_client=lambda: openai.AsyncOpenAI(base_url=server.base_url, api_key="mine"),
            client=lambda: openai.OpenAI(base_url=server.base_url, api_key="mine"),
        )
        assert model.invoke("hi").content == asyncio.run(model.ainvoke("hi")).content == "hello"
        assert {headers["authorization"] for headers in server.headers} == {"Bearer mine"}
        model._transport._client.close()  # type: ignore[union-attr]


# Several choices to a request


async def draw(model: OpenAIChatModel, n: int) -> list[AIMessage]:
    return list(await asyncio.gather(*[model.ainvoke("hi", **ASK) for _ in range(n)]))


def billed(messages: list[AIMessage]) -> tuple[int, int]:
    usages = [message.usage_metadata for message in messages if message.usage_metadata]
    return sum(usage["input_tokens"] for usage in usages), sum(usage["output_tokens"] for usage in usages)


@pytest.mark.parametrize("n", [1, 8, 64])
async def test_equal_calls_share_one_request(n: int):
    with FaultServer([Reply(content=f"answer {i}", profile="!" * (i % 5 + 1)) for i in range(n)]) as server:
        messages = await draw(client(server, fan_out="n"), n)
        assert sorted(m.text for m in messages) == sorted(f"answer {i}" for i in range(n))
        assert [request.get("n", 1) for request in server.requests] == [n]
        assert billed(messages) == (10, sum(i % 5 + 1 for i in range(n)))
        assert all(message_candidate(message, 0).signals is not None for message in messages)


async def test_requests_of_their_own_bill_the_prompt_each():
    with FaultServer([Reply()]) as server:
        messages = await draw(client(server, fan_out="requests"), 8)
        assert len(server.requests) == 8
        assert billed(messages) == (80, 32)


async def test_different_calls_do_not_share():
    with FaultServer([Reply()]) as server:
        model = client(server, fan_out="n")
        await asyncio.gather(*[model.ainvoke("hi", seed=seed) for seed in (1, 1, 2)])
        assert sorted((request["seed"], request.get("n", 1)) for request in server.requests) == [(1, 2), (2, 1)]


async def test_missing_choices():
    """They are asked for one by one, and from then on every choice is."""
    with FaultServer([Reply()], faults=["fewer_choices"]) as server:
        model = client(server, fan_out="n")
        assert len(await draw(model, 8)) == 8
        assert [request.get("n", 1) for request in server.requests] == [8, *[1] * 7]
        await draw(model, 3)
        assert [request.get("n", 1) for request in server.requests[8:]] == [1, 1, 1]


async def test_a_server_that_refuses_n_is_asked_one_by_one():
    refuse = Fault(about="n is not supported", status=400)
    with FaultServer([Reply(content="hello")], faults=[refuse, *[None] * 8]) as server:
        assert len(await draw(client(server, fan_out="n"), 8)) == 8


async def test_other_refusals():
    """A refusal for another reason costs one request and teaches nothing."""
    too_long = Fault(about="This model's maximum context length is 10 tokens", status=400)
    with FaultServer([Reply(content="hello")], faults=[too_long, None]) as server:
        model = client(server, fan_out="n")
        failures = await asyncio.gather(*[model.ainvoke("hi") for _ in range(8)], return_exceptions=True)
        assert {type(failure) for failure in failures} == {openai.BadRequestError}
        assert [request["n"] for request in server.requests] == [8]
        assert len(await draw(model, 8)) == 8
        assert [request["n"] for request in server.requests] == [8, 8]


async def test_a_failure_of_the_shared_request_reaches_every_call():
    with FaultServer(faults=["status_500"]) as server:
        drawn = await asyncio.gather(*[client(server, fan_out="n").ainvoke("hi")] * 1, return_exceptions=True)
        assert isinstance(drawn[0], openai.InternalServerError)
        model = client(server, fan_out="n")
        failures = await asyncio.gather(*[model.ainvoke("hi") for _ in range(3)], return_exceptions=True)
        assert {type(failure) for failure in failures} == {openai.InternalServerError}


async def test_cancelling_calls_that_share_a_request():
    """Cancelling one of the calls leaves the others; cancelling all closes the connection."""
    with FaultServer([Reply(content="hello")], latency=0.1) as server:
        model = client(server, fan_out="n")
        calls = [asyncio.create_task(model.ainvoke("hi")) for _ in range(3)]
        await until(lambda: server.in_flight == 1)
        calls[0].cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [getattr(result, "content", None) for result in results] == [None, "hello", "hello"]
    with FaultServer(faults=["hang"]) as server:
        model = client(server, fan_out="n")
        calls = [asyncio.create_task(model.ainvoke("hi")) for _ in range(3)]
        await until(lambda: server.in_flight == 1)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: server.abandoned == 1)


@pytest.mark.parametrize("fan_out", ["n", "requests"])
@pytest.mark.parametrize("faults", [[None], ["fewer_choices", None]])
def test_n_gives_n_generations_with_and_without_a_loop(fan_out: Any, faults: list[Any]):
    for run in (
        lambda model: model.generate([[HumanMessage("hi")]], n=4),
        lambda model: asyncio.run(model.agenerate([[HumanMessage("hi")]], n=4)),
    ):
        with FaultServer([Reply()], faults=faults) as server:
            result = run(client(server, fan_out=fan_out))
            messages: Any = [generation.message for generation in result.generations[0]]
            assert len(messages) == 4
            read, written = billed(messages)
            reported = [4 * request.get("n", 1) for request in server.requests]
            assert (read, written) == (10 * len(reported), sum(reported))
            usage = result.llm_output["token_usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (read, written)


def test_one_failed_request_fails_the_call_with_the_error_itself():
    with FaultServer(faults=[None, "status_500"]) as server, pytest.raises(openai.InternalServerError):
        asyncio.run(client(server, fan_out="requests").agenerate([[HumanMessage("hi")]], n=3))


@pytest.mark.parametrize(
    ("base_url", "expected"), [("https://api.openai.com/v1", 128), ("https://api.groq.com/openai/v1", 1), ("", 128)]
)
def test_auto_goes_by_the_provider(base_url: str, expected: int):
    assert OpenAIChatModel(model="gpt-4.1", base_url=base_url, api_key="none")._n_max == expected


# Under langchain-openai


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer([Reply(content="hello", tool_calls=[("calc", {"x": "1"})])]) as running:
        yield running


def langchain(server: FaultServer, **fields: Any) -> ChatOpenAI:
    return ChatOpenAI(model="any", base_url=server.base_url, api_key="none", max_retries=0, **fields)


async def test_the_fast_model_answers_as_the_ordinary_one_does(server: FaultServer):
    ordinary = langchain(server)
    fast = fast_logprobs(ordinary)
    assert type(fast) is ChatOpenAI
    first: Any = ordinary.invoke("hi", **ASK)
    for second in (fast.invoke("hi", **ASK), await fast.ainvoke("hi", **ASK)):
        assert comparable(second) == comparable(first)
        assert "packed" in second.response_metadata["logprobs"]
        assert message_candidate(second, 0).signals is not None
    assert len({json.dumps(request, sort_keys=True) for request in server.requests}) == 1


def test_the_fast_model_serves_one_loop_after_the_other(server: FaultServer):
    fast = fast_logprobs(langchain(server))
    for _ in range(3):
        assert asyncio.run(fast.ainvoke("hi")).content == "hello"


def test_settings_and_bindings_stay(server: FaultServer):
    bound = langchain(server, default_headers={"X-Team": "a"}, temperature=0.5).bind(**ASK)
    fast = fast_logprobs(bound)
    assert "packed" in fast.invoke("hi").response_metadata["logprobs"]
    assert server.headers[0]["x-team"] == "a"
    assert server.requests[0]["temperature"] == 0.5


def test_response_formats():
    """They are fast as dicts and ordinary as classes."""
    with FaultServer(response(chat(profile_logprobs("!."), content='{"answer": 42}'))) as server:
        fast = fast_logprobs(langchain(server))
        as_dict = fast.with_structured_output(Answer.model_json_schema(), method="json_schema", include_raw=True)
        result: Any = as_dict.invoke("hi")
        assert result["parsed"] == {"answer": 42}
        assert "packed" in result["raw"].response_metadata["logprobs"]
        assert fast.with_structured_output(Answer, method="json_schema").invoke("hi") == Answer(answer=42)


def test_refusals_survive():
    with FaultServer(faults=["refusal"]) as server:
        message = fast_logprobs(langchain(server)).invoke("hi", **ASK)
        candidate = message_candidate(message, 0)
        assert candidate.flaws == {"refused": "I cannot help with that."}
        assert candidate.signals is not None


def test_errors_stay_those_of_langchain_openai():
    with FaultServer(faults=["status_429"]) as server, pytest.raises(openai.RateLimitError):
        fast_logprobs(langchain(server)).invoke("hi")


def test_what_it_relies_on_in_langchain_openai_is_there(server: FaultServer):
    model = langchain(server)
    assert isinstance(model.client, Completions)
    assert isinstance(model.async_client, AsyncCompletions)
    assert isinstance(model.root_client, openai.OpenAI)
    assert isinstance(model.root_async_client, openai.AsyncOpenAI)
    fast = fast_logprobs(model)
    for name in ("client", "async_client", "root_client", "root_async_client"):
        assert getattr(fast, name) is not getattr(model, name)
    arguments = {"self", "stream", "extra_headers", "extra_query", "extra_body", "timeout", *PARAMETERS}
    for completions in (Completions, AsyncCompletions):
        assert set(signature(completions.create).parameters) == arguments


class Recorder(ThreadingHTTPServer):
    """A server with one answer for every path; it keeps the paths, headers and bodies of what it is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        answer = response(chat(profile_logprobs("!."), content="{}", tool_calls=[CALL]), USAGES["details"])
        body = json.dumps(answer).encode()
        self.asked = asked = list[Any]()
        self.url = ""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                content = json.loads(self.rfile.read(int(headers["content-length"])))
                asked.append((self.path, {k: v for k, v in headers.items() if k not in OF_NO_CONCERN}, content))
                self.send_response_only(200)
                for name, value in {"content-length": len(body), "x-request-id": "7"}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002 - inherited

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


OF_NO_CONCERN = ("host", "accept-encoding", "connection", "content-length", "x-stainless-helper-method")
"""Headers that go with the connection, or say which function of the SDK was called."""


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


OPENAI: Any = {"model": "any", "api_key": "none", "max_tokens": 9}
AZURE: Any = {"api_version": "1", "api_key": "none"}
MODELS: dict[str, Any] = {
    "headers": lambda url: ChatOpenAI(base_url=url, include_response_headers=True, default_query={"a": "b"}, **OPENAI),
    "own connections": lambda url: ChatOpenAI(
        base_url=url,
        http_client=openai.DefaultHttpxClient(headers={"X-Team": "a"}),
        http_async_client=openai.DefaultAsyncHttpxClient(headers={"X-Team": "a"}),
        **OPENAI,
    ),
    "Azure": lambda url: AzureChatOpenAI(model="any", azure_endpoint=url, **AZURE),
    "Azure deployment": lambda url: AzureChatOpenAI(azure_deployment="mine", azure_endpoint=url, **AZURE),
}
TOOL = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object", "properties": {}}}}
EXTRAS: Any = {"extra_body": {"top_k": 5}, "extra_headers": {"X-A": "b"}, "extra_query": {"q": "1"}, "timeout": 3.5}
OPTIONS: tuple[Any, ...] = (
    ASK,
    {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False, "stop": ["."]},
    {"response_format": {"type": "json_object"}, **ASK},
    {"stream_options": {"include_usage": True}, "logit_bias": {"1": -1}, "seed": None, "n": 2},
    EXTRAS,
    dict.fromkeys(EXTRAS),
    {"timeout": openai.NOT_GIVEN, "temperature": openai.NOT_GIVEN},
    {"tools": {"calc": TOOL}.values()},
    {"unknown": 1},
)


async def told(call: Any, options: dict[str, Any]) -> Any:
    """The message or the error that a call gives, comparable."""
    try:
        return comparable(await call(CONVERSATION, **options))
    except TypeError as error:
        return str(error)


@pytest.mark.parametrize("name", MODELS)
async def test_requests_and_answers_are_those_of_the_ordinary_model(name: str, recorder: Recorder):
    ordinary = MODELS[name](recorder.url)
    fast = fast_logprobs(ordinary)
    for options in OPTIONS:
        first, second = [
            [await told(call, options) for call in (partial(asyncio.to_thread, model.invoke), model.ainvoke)]
            for model in (ordinary, fast)
        ]
        assert second == first
        asked = [recorder.asked.pop(0) for _ in range(len(recorder.asked) // 2)]
        assert recorder.asked == asked
        assert bool(asked) == ("unknown" not in options)
        recorder.asked.clear()
    ordinary.root_client.close()
    await ordinary.root_async_client.close()


async def test_requests_are_not_copied(server: FaultServer, monkeypatch: pytest.MonkeyPatch):
    """Requests are not copied, and yet a tracer around ``create`` is called."""

    def copied(*_: Any) -> None:
        raise AssertionError

    fast = fast_logprobs(langchain(server))
    with monkeypatch.context() as patch:
        patch.setattr(sdk, "maybe_transform", copied)
        patch.setattr(sdk, "async_maybe_transform", copied)
        assert fast.invoke("hi").content == (await fast.ainvoke("hi")).content == "hello"
    seen: list[Any] = []
    for completions in (Completions, AsyncCompletions):

        @wraps(completions.create)
        def traced(self: Any, *, create: Any = completions.create, **arguments: Any) -> Any:
            seen.append(type(self))
            return create(self, **arguments)

        monkeypatch.setattr(completions, "create", traced)
    assert fast.invoke("hi").content == (await fast.ainvoke("hi")).content == "hello"
    assert seen == [Completions, AsyncCompletions]


def test_the_key_of_an_administrator_is_not_sent(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "secret")
    for model in (OpenAIChatModel, ChatOpenAI):
        with suppress(TypeError):  # the SDK may want to be told that there is no key
            fast_logprobs(model(model="any", base_url=recorder.url, api_key="")).invoke("hi")
    assert "secret" not in str(recorder.asked)


ODD = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["a", "7", [{}]])


def fields(**known: Any) -> Any:
    """Objects as they should be, but for a field that is missing and one that may be of any type."""
    return st.builds(
        lambda missing, odd: {name: value for name, value in {**known, **odd}.items() if name != missing},
        st.sampled_from([None, *known]),
        st.dictionaries(st.sampled_from([*known, "x"]), ODD, max_size=1),
    )


COUNTS = fields(prompt_tokens=3, completion_tokens=5, total_tokens=8, prompt_tokens_details={"cached_tokens": 2})
CHOICES = st.fixed_dictionaries(
    {
        "index": st.just(0) | ODD,
        "message": st.sampled_from([payload["message"] for payload in PAYLOADS.values()])
        | fields(role="assistant", content="a", tool_calls=[CALL, {**CALL, "type": "custom"}], reasoning="b"),
        "finish_reason": st.sampled_from(["stop", "eos"]) | ODD,
        "logprobs": st.just({"packed": "AAAA", "n_alternatives": 4}) | st.just({"packed": None, "reason": "none"}),
    }
)
COMPLETIONS = st.builds(
    lambda known, choices, usage: {**known, "choices": choices, **usage},
    fields(id="x", object="chat.completion", created=1, model="any", system_fingerprint="f", service_tier="flex"),
    st.lists(CHOICES, min_size=1, max_size=2),
    st.just({}) | st.fixed_dictionaries({"usage": COUNTS | st.none()}),
)


@example({**response(chat(None)), "created": "7"}, ChatCompletion)
@given(COMPLETIONS, st.sampled_from([ChatCompletion, ParsedChatCompletion]))
def test_validated_completions_are_those_that_the_sdk_constructs(completion: Any, kind: Any):
    validated, constructed = _typed(kind, completion), kind.construct(**completion)
    assert repr(validated) == repr(constructed)
    assert validated.model_dump(warnings=False) == constructed.model_dump(warnings=False)


@pytest.mark.parametrize("model", [ScriptedChatModel(), object(), None])
def test_what_is_not_recognised_comes_back_as_it_is(model: Any):
    assert fast_logprobs(model) is model


async def test_without_aiohttp_the_sdks_transport_is_used(server: FaultServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ec_agents.servers.aiohttp_transport", None)
    assert (await client(server).ainvoke("hi", **ASK)).content == "hello"
