"""How bodies arrive: their choices packed on the way, few at a time, and no connection keeps what a run knew."""

# pyright: reportArgumentType=false

import asyncio
import gc
import gzip
import json
import math
import tracemalloc
import weakref
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
from aiohttp import web
from hypothesis import given, settings, strategies as st

from ec_agents.errors import LogprobsMalformed, ServerError
from ec_agents.servers import body_reader, http_clients
from ec_agents.servers.body_reader import AT_ONCE, LARGE_BODY, SMALL_BODY, Packing, Turns, decode_off_loop
from ec_agents.servers.completions import decode_response, pack_response
from ec_agents.servers.http_clients import ResponseLimits
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.testing import Fault, FaultServer, Reply, profile_logprobs

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
    return await packing.body()


def understood(body: bytes) -> Any:
    """What a body decodes to, comparable; for those that are no answer, that."""
    try:
        response = decode_response(body, 2)
    except (LogprobsMalformed, ServerError) as error:
        return type(error)
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
    assert await packing.body() == slim
    assert peak < 8 * one < len(body) / 3
    assert len(slim) < 4 * one


async def test_no_more_is_read_in_vain_than_a_body_that_is_large(monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []

    def counting(text: bytes) -> bytes | None:
        read.append(len(text))

    monkeypatch.setattr(body_reader, "pack_choice", counting)
    calls = [{"index": i, "function": {"name": "f", "arguments": "x" * 1000}} for i in range(3000)]
    body = json.dumps({"choices": [{"index": 0, "message": {"tool_calls": calls}}]}, separators=(",", ":")).encode()
    assert understood(await packed(body, [1 << 18])) == understood(body)
    assert 0 < sum(read) < 2 * LARGE_BODY < len(body)


async def test_nested_choices():
    """Choices that begin like what is in them are packed all the same."""
    calls = [{"index": i, "function": {"name": "f", "arguments": "{}"}} for i in range(3)]
    choice = {"index": 0, "logprobs": long(1000), "message": {"content": "x", "tool_calls": calls}}
    body = json.dumps({"choices": [choice] * 6}, separators=(",", ":")).encode()
    slim = await packed(body, [1 << 18])
    assert len(slim) < len(body) / 20
    assert understood(slim) == understood(body)


@pytest.mark.parametrize("n", [1, 2])
def test_numbers_that_json_does_not_have_stay_as_they_are(n: int):
    message = {"content": "\ud800", "tool_calls": [{"function": {"name": "f", "arguments": {"x": math.inf}}}]}
    body = json.dumps({"choices": [{"message": message, "logprobs": MEASURED}] * n}).encode()
    assert pack_response(body, n) != body
    assert understood(pack_response(body, n)) == understood(body)


async def test_two_commas_between_choices_are_no_json():
    body = several(2, MEASURED).replace(b'},{"index"', b'},,{"index"')
    assert understood(await packed(body, [99])) == understood(body) == LogprobsMalformed


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


async def test_turn_lost_after_waiting():
    """A reader that waits too long loses its turn, and frees nothing twice."""
    turns, stuck = Turns(2, patience=0.01), asyncio.Event()

    async def never() -> bytes:
        await stuck.wait()
        return b""

    async def take() -> None:
        async with turns.turn() as turn:
            await turn.wait(never())
            await turn.wait(never())

    slow = [asyncio.create_task(take()) for _ in range(6)]
    async with asyncio.timeout(5), turns.turn():
        pass
    stuck.set()
    await asyncio.gather(*slow)
    assert turns._free._value == 2


async def piece(size: int, seconds: float) -> bytes:
    await asyncio.sleep(seconds)
    return b" " * size


async def test_turns_go_by_progress():
    """A reader that makes progress keeps its turn; one that only trickles loses it."""
    turns = Turns(1, patience=0.5)
    async with turns.turn() as turn:
        for _ in range(12):
            await turn.wait(piece(SMALL_BODY, 0.05))
        assert turns._free.locked()
        await asyncio.sleep(0.6)  # what is done with the pieces does not count
        assert turns._free.locked()
        for _ in range(12):
            await turn.wait(piece(1, 0.05))
        assert not turns._free.locked()
    assert turns._free._value == 1


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


def asked_of(http: Any, server: FaultServer) -> Any:
    asked = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 4}
    return http.build_request("POST", f"{server.base_url}/chat/completions", json=asked)


def http_client() -> Any:
    return http_clients.async_http_client(ResponseLimits())


@pytest.mark.parametrize("size", [1, SMALL_BODY, LARGE_BODY, 20 * LARGE_BODY])
async def test_bodies_come_whole_and_large_ones_packed(size: int):
    with FaultServer(faults=[padded(size)]) as server:
        async with http_client() as http:
            response = await http.send(asked_of(http, server))
    assert "packed" in decode_response(response.content)["choices"][0]["logprobs"]
    assert (len(response.content) < 2000) if size > LARGE_BODY else (len(response.content.ljust(size)) >= size)
    assert ("packed" in response.text) == (size > LARGE_BODY)


async def test_a_connection_takes_in_little_of_a_body_before_its_turn(monkeypatch: pytest.MonkeyPatch):
    taken_in: list[int] = []
    real: Any = http_clients.read_body

    async def waiting(pieces: Any, turns: Turns, *, on_turn: Any, **options: Any) -> bytes:
        for _ in range(AT_ONCE):
            await turns._free.acquire()
        content = on_turn.__self__._response.content
        asyncio.get_running_loop().call_later(
            0.2, lambda: (taken_in.append(content.total_bytes), turns._free.release())
        )
        return await real(pieces, turns, on_turn=on_turn, **options)

    monkeypatch.setattr(http_clients, "read_body", waiting)
    with FaultServer([Reply(content="hello")], faults=[padded(20 * LARGE_BODY)]) as server:
        assert (await model_of(server).ainvoke("hi")).content == "hello"
    assert 0 < taken_in[0] <= 3 * SMALL_BODY


@pytest.mark.parametrize("how", ["sized", "chunked", "gzip"])
async def test_bodies_that_come_together_are_read_in_turns(how: str, monkeypatch: pytest.MonkeyPatch):
    reading, most, turned = 0, 0, 0

    class Counting(Turns):
        def __init__(self) -> None:
            super().__init__(patience=60)

        @asynccontextmanager
        async def turn(self) -> AsyncGenerator[Any]:
            nonlocal reading, most, turned
            async with super().turn() as turn:
                reading, turned = reading + 1, turned + 1
                most = max(most, reading)
                yield turn
                reading -= 1

    monkeypatch.setattr(http_clients, "Turns", Counting)
    async with server_of(several(1, long(150)), how) as url:
        model = OpenAIChatModel(model="any", base_url=url, api_key="none", max_retries=0)
        answers = await asyncio.gather(*[model.ainvoke("hi") for _ in range(32)])
    assert {answer.text for answer in answers} == {"hello"}
    assert (reading, turned) == (0, 32)
    assert 1 <= most <= AT_ONCE


@asynccontextmanager
async def server_of(body: bytes, how: str) -> AsyncGenerator[str]:
    """A server that sends one body, whole, in chunks or compressed; one level up it redirects to there."""

    async def chat(request: web.Request) -> web.StreamResponse:
        await request.read()
        if request.path == "/chat/completions":
            raise web.HTTPTemporaryRedirect("/v1/chat/completions")
        if how == "gzip":
            return web.Response(body=gzip.compress(body, 1), headers={"Content-Encoding": "gzip"})
        response = web.Response(body=body, content_type="application/json")
        if how == "chunked":
            response.enable_chunked_encoding()
        return response

    app = web.Application()
    app.router.add_post("/{path:.*}", chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("how", ["sized", "chunked", "gzip"])
async def test_large_bodies_come_packed_however_they_are_sent(how: str):
    body = several(8, long(200))
    async with server_of(body, how) as url, http_client() as http:
        response = await http.post(f"{url}/chat/completions", json={"n": 8})
        assert len(response.content) < len(body) / 6  # all but the last
        assert understood(response.content) == understood(body)


async def test_an_idle_connection_does_not_time_out():
    with FaultServer([Reply(content="hello")], faults=[padded(SMALL_BODY // 4 * 3)]) as server:
        model = model_of(server, timeout=1.5)
        assert (await model.ainvoke("hi")).content == "hello"
        await asyncio.sleep(1.7)
        assert (await model.ainvoke("hi")).content == "hello"
        assert server.connections == 1


async def test_cancelled_while_connecting(
    monkeypatch: pytest.MonkeyPatch,
):
    """A connection that opens just as its call is cancelled is closed."""
    closed: list[bool] = []

    class Opened:
        def close(self) -> None:
            closed.append(True)

    async def opening(*_: Any) -> Opened:
        asyncio.get_running_loop().call_soon(calling.cancel)
        return Opened()

    monkeypatch.setattr(aiohttp.TCPConnector, "_create_connection", opening)
    async with http_client() as http:
        calling = asyncio.create_task(http.get("http://127.0.0.1:1/"))
        with pytest.raises(asyncio.CancelledError):
            await calling
    assert closed == [True]


async def test_redirects_are_followed():
    async with server_of(several(1, MEASURED), "sized") as url:
        model = OpenAIChatModel(model="any", base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)
        assert (await model.ainvoke("hi")).content == "hello"


async def test_bodies_that_come_through_a_proxy_are_read_in_turns_too(monkeypatch: pytest.MonkeyPatch):
    body = several(1, long(1200))
    async with server_of(body, "sized") as url:
        monkeypatch.setenv("HTTP_PROXY", url.removesuffix("/v1"))
        monkeypatch.setenv("NO_PROXY", "")
        async with http_client() as http:
            response = await http.post("http://example.invalid/v1/chat/completions", json={})
            assert len(response.content) < len(body) / 10


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


async def test_large_body_that_breaks_off():
    """It counts as a lost connection and is retried."""
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
    response = await decode_off_loop(body)
    heart.cancel()
    assert beats > 1
    assert response == decode_response(body)


KNOWN: ContextVar[Any] = ContextVar("KNOWN")


async def test_open_connection():
    """It keeps nothing of the run that opened it."""

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
