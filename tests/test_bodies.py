"""How bodies arrive: their choices packed on the way, few at a time, and no connection keeps what a run knew."""

# pyright: reportArgumentType=false

import asyncio
import gc
import json
import math
import tracemalloc
import weakref
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ec_agents import bodies
from ec_agents.bodies import AT_ONCE, LARGE_BODY, PIECE, SMALL_BODY, Packing, Turns, async_http_client, decoded
from ec_agents.errors import LogprobsMalformed
from ec_agents.openai_client import OpenAIChatModel
from ec_agents.testing import Fault, FaultServer, Reply, profile_logprobs
from ec_agents.wire import decode_response, pack_response

MEASURED: Any = profile_logprobs("!.!")
LOGPROBS = st.sampled_from(
    [
        MEASURED,
        {"content": None, "refusal": MEASURED["content"]},
        None,
        {"content": []},
        {"content": [{"logprob": math.nan, "top_logprobs": [{"logprob": -0.1}, {"logprob": math.nan}]}]},
        {"content": [{"logprob": 3.5, "top_logprobs": [{"logprob": 3.5}]}]},
        {"token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -1.0}]},
        "none",
    ]
)
TEXTS = st.sampled_from(['{"index":0}, {"index":', '"choices":[{"index":0,', "\ud800", "é\u2028\x00", "[]},{", ""])
CALLS = st.lists(st.fixed_dictionaries({"index": st.integers(0, 3), "function": st.just({"name": "f"})}), max_size=3)
MESSAGES = st.fixed_dictionaries({"content": TEXTS}, optional={"tool_calls": CALLS, "big": st.just(2**70)})
CHOICES = st.one_of(
    st.fixed_dictionaries({"index": st.integers(0, 9), "message": MESSAGES, "logprobs": LOGPROBS}),
    st.fixed_dictionaries({"index": st.just(0), "logprobs": LOGPROBS, "message": MESSAGES, "finish_reason": TEXTS}),
    st.fixed_dictionaries({"logprobs": LOGPROBS, "message": MESSAGES}),
    st.fixed_dictionaries({"text": TEXTS, "logprobs": LOGPROBS}),
    st.sampled_from([{}, None, {"index": 0}, {"message": {}}, 7]),
)
RESPONSES = st.fixed_dictionaries(
    {"id": TEXTS, "choices": st.lists(CHOICES, max_size=5)},
    optional={"usage": st.just({"prompt_tokens": 1}), "error": st.none() | TEXTS},
)
SPACES = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")])


async def packed(body: bytes, sizes: list[int]) -> bytes:
    """The body as it comes out when it arrives in pieces of these sizes, over and over."""
    packing, begin, turn = Packing(), 0, 0
    while begin < len(body):
        size = sizes[turn % len(sizes)]
        await packing.feed(body[begin : begin + size])
        begin, turn = begin + size, turn + 1
    return packing.body()


def understood(body: bytes) -> Any:
    """What a body decodes to, comparable; for those that are no answer, that."""
    try:
        response = decode_response(body, 2)
    except LogprobsMalformed:
        return LogprobsMalformed
    return json.dumps(response, sort_keys=True)


@settings(max_examples=400)
@given(RESPONSES, SPACES, st.lists(st.integers(1, 400), min_size=1, max_size=3), st.booleans())
def test_packing_on_the_way_changes_nothing(response: Any, separators: Any, sizes: list[int], indented: bool):  # noqa: FBT001
    body = json.dumps(response, separators=separators, indent=1 if indented else None).encode()
    slim = asyncio.run(packed(body, sizes))
    assert understood(slim) == understood(pack_response(body)) == understood(body)


@given(st.binary(max_size=300), st.integers(0, 300), st.lists(st.integers(1, 99), min_size=1, max_size=3))
def test_bytes_that_are_no_answer_pass_as_they_are(noise: bytes, cut: int, sizes: list[int]):
    body = several(4, MEASURED)
    for spoilt in (noise, body[:cut], noise + body[:cut]):
        slim = asyncio.run(packed(spoilt, sizes))
        assert understood(slim) == understood(spoilt)


def several(n: int, logprobs: Any) -> bytes:
    """A response of n choices, as vLLM writes it."""
    message = {"role": "assistant", "content": "hello"}
    choices = [{"index": i, "message": message, "logprobs": logprobs, "finish_reason": "stop"} for i in range(n)]
    return json.dumps({"id": "x", "choices": choices, "usage": {}}, separators=(",", ":")).encode()


def long(n_tokens: int) -> Any:
    """Log-probabilities of so many tokens, 20 alternatives each: some 1.2 kB a token."""
    rows = np.log(np.random.default_rng(0).dirichlet(np.full(20, 0.2), n_tokens) + 1e-9)
    tokens = [[{"token": "word", "logprob": value, "bytes": list(b"word")} for value in row] for row in rows.tolist()]
    return {"content": [{**row[0], "top_logprobs": row} for row in tokens]}


async def test_of_many_choices_one_at_a_time_takes_up_memory():
    body = several(32, long(200))
    one = len(body) // 32
    slim = await packed(body, [1 << 16])  # imports and caches
    tracemalloc.start()
    try:
        packing = Packing()
        for begin in range(0, len(body), 1 << 16):
            await packing.feed(body[begin : begin + (1 << 16)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert packing.body() == slim
    assert peak < 8 * one < len(body) / 3
    assert len(slim) < 4 * one


async def test_no_more_is_read_in_vain_than_a_body_that_is_large(monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []

    def counting(text: bytes) -> bytes | None:
        read.append(len(text))

    monkeypatch.setattr(bodies, "pack_choice", counting)
    calls = [{"index": i, "function": {"name": "f", "arguments": "x" * 1000}} for i in range(3000)]
    body = json.dumps({"choices": [{"index": 0, "message": {"tool_calls": calls}}]}, separators=(",", ":")).encode()
    assert await packed(body, [1 << 18]) == body
    assert 0 < sum(read) < 2 * LARGE_BODY < len(body)


# Turns


async def test_few_have_a_turn_at_once():
    turns, having, most = Turns(2, patience=60), 0, 0

    async def take() -> None:
        nonlocal having, most
        async with turns.turn():
            having += 1
            most = max(most, having)
            await asyncio.sleep(0)
            having -= 1

    await asyncio.gather(*[take() for _ in range(20)])
    assert (having, most) == (0, 2)


async def test_who_takes_long_no_longer_keeps_others_waiting_and_frees_nothing_twice():
    turns, stuck = Turns(2, patience=0.01), asyncio.Event()

    async def take(until: asyncio.Event | None = None) -> None:
        async with turns.turn():
            if until:
                await until.wait()

    slow = [asyncio.create_task(take(stuck)) for _ in range(6)]
    await asyncio.wait_for(take(), 5)
    stuck.set()
    await asyncio.gather(*slow)
    assert turns._free._value == 2


async def test_a_turn_that_is_cancelled_or_fails_is_free_again():
    turns = Turns(1, patience=60)

    async def take() -> None:
        async with turns.turn():
            await asyncio.Event().wait()

    having, waiting = asyncio.create_task(take()), asyncio.create_task(take())
    await asyncio.sleep(0)
    for task in (waiting, having):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    with pytest.raises(ZeroDivisionError):
        async with turns.turn():
            raise ZeroDivisionError
    async with asyncio.timeout(5), turns.turn():
        pass


# Over HTTP


def model_of(server: FaultServer, **fields: Any) -> OpenAIChatModel:
    return OpenAIChatModel(model="any", base_url=server.base_url, api_key="none", max_retries=0, **fields)


def padded(size: int, **fields: Any) -> Fault:
    return Fault(about="padded", body=lambda sound: sound.ljust(size), **fields)


@asynccontextmanager
async def stream_of(size: int) -> AsyncGenerator[Any]:
    """The stream of a body of so many bytes."""
    with FaultServer(faults=[padded(size)]) as server:
        async with async_http_client() as http:
            asked = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 4}
            request = http.build_request("POST", f"{server.base_url}/chat/completions", json=asked)
            answer = await http._transport.handle_async_request(request)
            yield answer.stream
            await answer.aclose()


@pytest.mark.parametrize("size", [1, SMALL_BODY, LARGE_BODY])
async def test_bodies_are_given_in_one_piece(size: int):
    async with stream_of(size) as stream:
        (body,) = [piece async for piece in stream]
        assert len(body) == max(size, len(body.rstrip()))
        theirs: Any = type(stream).__base__
        assert theirs.CHUNK_SIZE < stream.CHUNK_SIZE == PIECE  # what it relies on in the SDK


async def test_large_bodies_come_packed():
    async with stream_of(20 * LARGE_BODY) as stream:
        (body,) = [piece async for piece in stream]
        assert len(body) < 2000
        assert "packed" in decode_response(body)["choices"][0]["logprobs"]


async def test_a_connection_takes_in_little_of_a_body_before_its_turn():
    async with stream_of(20 * LARGE_BODY) as stream:
        await asyncio.sleep(0.2)
        assert 0 < stream._aiohttp_response.content.total_bytes <= 2 * SMALL_BODY
        assert [len(piece) < 2000 async for piece in stream] == [True]


async def test_bodies_that_come_together_are_read_in_turns(monkeypatch: pytest.MonkeyPatch):
    joined: Any = bodies._joined
    reading, most = 0, 0

    async def counting(pieces: Any) -> bytes:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        try:
            return await joined(pieces)
        finally:
            reading -= 1

    monkeypatch.setattr(bodies, "_joined", counting)
    monkeypatch.setattr(bodies, "PATIENCE", 60)
    with FaultServer([Reply(content="hello")], faults=[padded(SMALL_BODY * 8)]) as server:
        model = model_of(server)
        answers = await asyncio.gather(*[model.ainvoke("hi") for _ in range(32)])
        assert {answer.text for answer in answers} == {"hello"}
    assert (reading, most) == (0, AT_ONCE)


async def test_bodies_that_stall_do_not_keep_others_waiting():
    stalling = padded(SMALL_BODY * 8, sent=0.5, stalls=True)
    with FaultServer([Reply(content="hello")], faults=[stalling] * 8 + [padded(SMALL_BODY * 8)] * 4) as server:
        model = model_of(server)
        stuck = [asyncio.create_task(model.ainvoke("hi")) for _ in range(8)]
        while server.in_flight < 8:  # noqa: ASYNC110 - the server runs in another thread
            await asyncio.sleep(0.005)
        answers = await asyncio.wait_for(asyncio.gather(*[model.ainvoke("hi") for _ in range(4)]), 10)
        assert {answer.text for answer in answers} == {"hello"}
        assert not any(task.done() for task in stuck)
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)


@pytest.mark.parametrize("padding", [0, 2 * LARGE_BODY])
async def test_one_answer_of_many_choices_is_the_same_as_many_answers(padding: int):
    large = Fault(about="large", payload=lambda response: {**response, "padding": " " * padding})
    replies = [Reply(content=f"answer {i}", profile="!..") for i in range(8)]
    answers: list[list[Any]] = []
    for fan_out in ("n", "requests"):
        with FaultServer(replies, faults=[large]) as server:
            model = model_of(server, fan_out=fan_out).bind(logprobs=True, top_logprobs=4)
            drawn = await asyncio.gather(*[model.ainvoke("hi") for _ in range(8)])
            answers.append(sorted((answer.text, answer.response_metadata["logprobs"]["packed"]) for answer in drawn))
            assert len(server.requests) == (1 if fan_out == "n" else 8)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 8


async def test_a_large_body_that_breaks_off_is_a_lost_connection_and_asked_for_again():
    breaks_off = padded(2 * LARGE_BODY, sent=0.7)
    with FaultServer([Reply(content="hello")], faults=[breaks_off, breaks_off, None]) as server:
        with pytest.raises(openai.APIConnectionError):
            await model_of(server).ainvoke("hi")
        asking = OpenAIChatModel(model="any", base_url=server.base_url, api_key="none", max_retries=1)
        assert (await asking.ainvoke("hi")).content == "hello"


async def test_a_large_body_that_is_no_answer_says_so():
    junk = Fault(about="junk", body=lambda _: b'{"detail": "' + b"x" * 2 * LARGE_BODY + b'"}')
    with FaultServer(faults=[junk]) as server, pytest.raises(LogprobsMalformed, match="non-empty list of choices"):
        await model_of(server).ainvoke("hi")


async def test_large_texts_are_decoded_off_the_loop():
    body, beats = several(1, long(4000)), 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0)
            beats += 1

    heart = asyncio.create_task(beat())
    response = await decoded(body)
    heart.cancel()
    assert beats > 1
    assert response == decode_response(body)


KNOWN: ContextVar[Any] = ContextVar("KNOWN")


async def test_an_open_connection_keeps_nothing_of_the_run_that_opened_it():
    class Everything:
        """What a run has in its context."""

    async def run(model: OpenAIChatModel) -> "weakref.ref[Everything]":
        everything = Everything()
        KNOWN.set(everything)
        await model.ainvoke("hi")
        return weakref.ref(everything)

    with FaultServer() as server:
        model = model_of(server)
        kept = await asyncio.create_task(run(model))
        await asyncio.sleep(0)
        gc.collect()
        assert server.connections == 1
        assert kept() is None
