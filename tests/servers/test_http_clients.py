"""The HTTP clients: time and size of a whole response, the same errors on every transport, no setting lost."""

# pyright: reportArgumentType=false

import asyncio
import gzip
import re
import socket
import socketserver
import sys
import threading
import tracemalloc
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI

from ec_agents.errors import ConfigError, LogprobsMalformed, RedirectRefused, ResponseTooLarge
from ec_agents.policy import retry_delay
from ec_agents.sampling import sample
from ec_agents.servers.fast_logprobs import fast_logprobs, loop_safe
from ec_agents.servers.httpx_of_sdk import httpx
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.testing import Fault, FaultServer, Reply

SOUND = b'{"choices":[{"message":{"role":"assistant","content":"hello"},"finish_reason":"stop"}]}'


class Script(socketserver.ThreadingTCPServer):
    """A server that answers every request with the bytes that a generator yields, one write each."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, answer: Callable[[socket.socket], Any], *, reads: bool = True) -> None:
        self.asked: list[bytes] = []
        self.stopped = stopped = threading.Event()
        asked = self.asked

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                sock: socket.socket = self.request
                with suppress(OSError):
                    asked.append(request_of(sock) if reads else b"")
                    for piece in answer(sock):
                        if stopped.is_set():
                            break
                        sock.sendall(piece)

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


def request_of(sock: socket.socket) -> bytes:
    """One request with its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    length = int(found[1]) if found else 0
    while len(body) < length:
        body += sock.recv(65536)
    return head + b"\r\n\r\n" + body


@contextmanager
def serving(answer: Callable[[socket.socket], Any], *, reads: bool = True) -> Generator[Script]:
    with Script(answer, reads=reads) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.stopped.set()
            server.shutdown()
            thread.join()


def head(*fields: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", "Content-Type: application/json", *fields, "", ""]).encode()


def whole(body: bytes, *fields: str, status: str = "200 OK") -> bytes:
    return head(f"Content-Length: {len(body)}", "Connection: close", *fields, status=status) + body


def in_turn(*answers: Callable[[socket.socket], Any]) -> Callable[[socket.socket], Any]:
    """Each of the answers once."""
    following = iter(answers)

    def answer(sock: socket.socket) -> Any:
        return next(following)(sock)

    return answer


def plainly(*pieces: bytes) -> Callable[[socket.socket], Any]:
    return lambda _: pieces


def model_at(url: str, **fields: Any) -> OpenAIChatModel:
    return OpenAIChatModel(**{"model": "any", "base_url": url, "api_key": "secret", "max_retries": 0, **fields})


@pytest.fixture(params=["aiohttp", "httpx", "sync"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Asks a model once, over each of the transports."""
    if request.param == "httpx":
        monkeypatch.setitem(sys.modules, "ec_agents.servers.aiohttp_transport", None)

    def asking(url: str, **fields: Any) -> str:
        model = model_at(url, **fields)
        return (model.invoke("hi") if request.param == "sync" else asyncio.run(model.ainvoke("hi"))).text

    return asking


# One limit for the whole request


def forever(piece: bytes, every: float, first: bytes = b"") -> Callable[[socket.socket], Iterator[bytes]]:
    def answer(_: socket.socket) -> Iterator[bytes]:
        yield first
        pause = threading.Event()
        while True:
            yield piece
            pause.wait(every)

    return answer


SLOW: dict[str, Callable[[socket.socket], Iterator[bytes]]] = {
    "silence": forever(b"", 0.05),
    "slow headers": forever(b"X-A: b\r\n", 0.05, b"HTTP/1.1 200 OK\r\n"),
    "a byte now and then": forever(b" ", 0.05, head("Content-Length: 100000")),
    "blank lines": forever(b"1\r\n\n\r\n", 0.05, head("Transfer-Encoding: chunked")),
    "endless 103": forever(head(status="103 Early Hints"), 0.05),
    "half a status line": forever(b"", 0.05, b"HTTP/1.1 2"),
}


@pytest.mark.parametrize("name", SLOW)
def test_timeout_is_of_the_request(name: str, ask: Callable[..., str]):
    """However a server keeps a request busy, it ends with the SDK's time-out; each read alone would be in time."""
    with serving(SLOW[name]) as server, pytest.raises(openai.APITimeoutError):
        ask(server.url, timeout=0.6)
    assert len(server.asked) == 1


def test_redirects_share_the_time_of_their_request(ask: Callable[..., str]):
    """A chain of redirects, each in time, does not make a request longer."""

    def answer(_: socket.socket) -> Iterator[bytes]:
        threading.Event().wait(0.15)
        yield whole(b"", "Location: /v1/chat/completions", status="307 Temporary Redirect")

    with serving(answer) as server, pytest.raises(openai.APITimeoutError):
        ask(server.url, timeout=0.6)
    assert 1 < len(server.asked) < 10


def test_a_retry_has_its_own_time(ask: Callable[..., str]):
    with serving(in_turn(SLOW["silence"], plainly(whole(SOUND)))) as server:
        assert ask(server.url, timeout=0.5, max_retries=1) == "hello"


# The same errors on every transport


def reset(sock: socket.socket) -> list[bytes]:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    sock.close()
    return []


CHUNKED = head("Transfer-Encoding: chunked")
BROKEN: dict[str, Callable[[socket.socket], Any]] = {
    "closed": plainly(),
    "reset": reset,
    "no status line": plainly(b"hello, who is there?\r\n\r\n"),
    "bad version": plainly(b"HTTP/x.1 200 OK\r\n\r\n"),
    "bad status": plainly(b"HTTP/1.1 abc OK\r\n\r\n"),
    "bad header": plainly(b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n"),
    "TLS alert": plainly(b"\x15\x03\x01\x00\x02\x02\x46"),
    "half the headers": plainly(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "endless header": lambda _: [b"HTTP/1.1 200 OK\r\nX-A: ", *[b"a" * 65536] * 8],
    "bad length": plainly(head("Content-Length: many") + SOUND),
    "negative length": plainly(head("Content-Length: -5") + SOUND),
    "two lengths": plainly(head("Content-Length: 5", "Content-Length: 7") + SOUND),
    "half the body": plainly(head(f"Content-Length: {2 * len(SOUND)}") + SOUND),
    "half a large body": plainly(head("Content-Length: 9000000") + b" " * 3_000_000),
    "bad chunk size": plainly(CHUNKED + b"zz\r\nhello\r\n"),
    "half a chunk": plainly(CHUNKED + b"ff\r\nhello"),
    "no last chunk": plainly(CHUNKED + b"5\r\nhello\r\n"),
    "not gzip": plainly(whole(SOUND, "Content-Encoding: gzip")),
    "half of gzip": plainly(whole(gzip.compress(SOUND)[:40], "Content-Encoding: gzip")),
    "unknown coding": plainly(whole(SOUND, "Content-Encoding: br")),
    "bad redirect": plainly(whole(b"", "Location: http://[::1/", status="307 Temporary Redirect")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_connection_faults(name: str, ask: Callable[..., str]):
    """A broken connection is the SDK's ``APIConnectionError``, sent again by the SDK and by a sampling policy."""
    with serving(BROKEN[name]) as server:
        with pytest.raises(openai.APIConnectionError) as raised:
            ask(server.url, timeout=20)
        assert type(raised.value) is openai.APIConnectionError
        assert retry_delay(raised.value, 0) is not None
    with serving(in_turn(BROKEN[name], plainly(whole(SOUND)))) as server:
        assert ask(server.url, timeout=20, max_retries=1) == "hello"
        assert len(server.asked) == 2


def test_a_refused_connection(ask: Callable[..., str]):
    """Nobody listens: no time-out, but a lost connection that is worth a retry."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(openai.APIConnectionError) as raised:
            ask(f"http://127.0.0.1:{bound.getsockname()[1]}/v1", timeout=20)
    assert type(raised.value) is openai.APIConnectionError
    assert retry_delay(raised.value, 0) is not None


def test_tls_to_a_server_without(ask: Callable[..., str]):
    plain = plainly(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with serving(plain, reads=False) as server, pytest.raises(openai.APIConnectionError) as raised:
        ask(server.url.replace("http:", "https:"), timeout=20)
    assert type(raised.value) is openai.APIConnectionError


# Size


def bomb(megabytes: int, times: int) -> bytes:
    """So many megabytes of spaces, compressed so many times."""
    return gzip.compress(bomb(megabytes, times - 1) if times > 1 else b" " * 1_000_000 * megabytes, 1)


def endless(_: socket.socket) -> Iterator[bytes]:
    yield CHUNKED
    while True:
        yield b"10000\r\n" + b" " * 65536 + b"\r\n"


TWICE = bomb(300, 2)
LARGE: dict[str, Callable[[socket.socket], Any]] = {
    "gzip": plainly(whole(bomb(300, 1), "Content-Encoding: gzip")),
    "gzip, gzip": plainly(whole(TWICE, "Content-Encoding: gzip, gzip")),
    "two headers": plainly(whole(TWICE, "Content-Encoding: gzip", "Content-Encoding: gzip")),
    "endless": endless,
    "announced": plainly(head("Content-Length: 300000000"), *[b" " * 1_000_000] * 300),
    "an error": plainly(whole(TWICE, "Content-Encoding: gzip, gzip", status="500 Oops")),
}


@pytest.mark.parametrize("name", LARGE)
def test_bodies_beyond_the_limit(name: str, ask: Callable[..., str]):
    """A body larger than the limit is a typed error, is not asked for again, and takes up no more than the limit."""
    with serving(LARGE[name]) as server:
        tracemalloc.start()
        try:
            with pytest.raises(ResponseTooLarge, match="more than 20,000,000 bytes.*raise max_body_bytes"):
                ask(server.url, max_body_bytes=20_000_000, max_retries=2, timeout=60)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(server.asked) == 1
    assert peak < 65_000_000


def test_the_limit_is_of_the_decompressed_body(ask: Callable[..., str]):
    body = gzip.compress(SOUND.ljust(100_000))
    with serving(plainly(whole(body, "Content-Encoding: gzip"))) as server:
        assert ask(server.url, max_body_bytes=100_000) == "hello"
        with pytest.raises(ResponseTooLarge):
            ask(server.url, max_body_bytes=99_999)


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "1"])
def test_the_limit_is_checked_at_construction(size: Any):
    with pytest.raises((ConfigError, ValueError)):
        fast_logprobs(ChatOpenAI(model="any", api_key="none"), max_body_bytes=size)


async def test_a_large_body_costs_the_step_one_candidate():
    huge = Fault(about="huge", body=lambda sound: sound.ljust(2_000_000))
    with FaultServer([Reply(content="hello")], faults=[huge, None, None]) as server:
        model = model_at(server.base_url, max_body_bytes=1_000_000)
        drawn = await sample(lambda _: model.ainvoke("hi", logprobs=True, top_logprobs=4), n=3)
    assert len(drawn.candidates) == 2
    (failure,) = drawn.failures.values()
    assert (type(failure).__name__, isinstance(failure, LogprobsMalformed)) == ("ResponseTooLarge", True)


async def test_limit_of_other_clients():
    """Clients of the user and those of fast_logprobs have the limit too."""
    huge = Fault(about="huge", body=lambda sound: sound.ljust(2_000_000))
    with FaultServer([Reply(content="hello")], faults=[huge]) as server:
        keys: Any = {"base_url": server.base_url, "api_key": "none", "max_retries": 0}
        fast = fast_logprobs(ChatOpenAI(model="any", **keys), max_body_bytes=1_000_000)
        custom = OpenAIChatModel(model="any", async_client=lambda: openai.AsyncOpenAI(**keys), max_body_bytes=1_000_000)
        for call in (fast.ainvoke("hi"), asyncio.to_thread(fast.invoke, "hi"), custom.ainvoke("hi")):
            with pytest.raises(ResponseTooLarge):
                await call


@pytest.mark.parametrize("transport", ["aiohttp", "httpx"])
async def test_a_bomb_does_not_hold_up_the_loop(transport: str, monkeypatch: pytest.MonkeyPatch):
    """While a small body becomes a large one, with nothing to wait for, other tasks have their turns."""
    if transport == "httpx":
        monkeypatch.setitem(sys.modules, "ec_agents.servers.aiohttp_transport", None)
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0)
            beats += 1

    with serving(LARGE["gzip, gzip"]) as server:
        model = model_at(server.url, max_body_bytes=100_000_000)
        heart = asyncio.create_task(beat())
        with pytest.raises(ResponseTooLarge):
            await model.ainvoke("hi")
        heart.cancel()
    assert beats > 100_000_000 / (1 << 19)


# Redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_to_another_host(status: str, ask: Callable[..., str]):
    """Neither the prompt nor a key reaches another host, unless it is allowed; then the request is followed."""
    with serving(plainly(whole(SOUND))) as other:
        target = other.url.replace("127.0.0.1", "localhost") + "/chat/completions"
        keys: Any = {"default_headers": {"api-key": "secret", "x-api-key": "secret"}, "timeout": 20}
        with serving(plainly(whole(b"", f"Location: {target}", status=status))) as server:
            with pytest.raises(RedirectRefused, match=r"redirects the request to localhost.*redirect_hosts="):
                ask(server.url, max_retries=2, **keys)
            assert (len(server.asked), other.asked) == (1, [])
            assert ask(server.url, redirect_hosts=frozenset({"localhost"}), **keys) == "hello"
            assert len(other.asked) == 1


@pytest.mark.parametrize("location", ["/v2/chat/completions", "{url}/elsewhere"])
def test_redirects_on_the_same_host(location: str, ask: Callable[..., str]):
    pages: list[bytes] = []
    with serving(lambda _: [pages.pop(0)]) as server:
        where = location.format(url=server.url)
        pages += [whole(b"", f"Location: {where}", status="307 Temporary Redirect"), whole(SOUND)]
        assert ask(server.url, timeout=20) == "hello"
        assert [b"Bearer secret" in asked and b'"hi"' in asked for asked in server.asked] == [True, True]


# Settings of ChatOpenAI


KEEPALIVE = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
BUFFER = (socket.SOL_SOCKET, socket.SO_SNDBUF, 54321)


def chat(url: str, **fields: Any) -> ChatOpenAI:
    return ChatOpenAI(**{"model": "any", "base_url": url, "api_key": "none", "max_retries": 0, **fields})


@pytest.fixture(params=["fast", "fast httpx", "agent", "agent fast"])
def taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """What an agent and ``fast_logprobs`` make of a model."""
    if request.param == "fast httpx":
        monkeypatch.setitem(sys.modules, "ec_agents.servers.aiohttp_transport", None)
    return {
        "agent": loop_safe,
        "agent fast": lambda model: loop_safe(fast_logprobs(model)),
    }.get(request.param, fast_logprobs)


@pytest.fixture
def options_set(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Every option that is set on a socket."""
    seen: list[tuple[int, int, int]] = []
    real = socket.socket.setsockopt

    def noting(self: socket.socket, *option: Any) -> None:
        seen.append(option)
        real(self, *option)

    monkeypatch.setattr(socket.socket, "setsockopt", noting)
    return seen


@pytest.mark.parametrize("fields", [{}, {"http_socket_options": (KEEPALIVE, BUFFER)}, {"http_socket_options": ()}])
async def test_socket_options(fields: Any, taken: Any, options_set: list[Any], monkeypatch: pytest.MonkeyPatch):
    """TCP keep-alive, which langchain-openai turns on by default, and explicit options are set on connections."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(plainly(whole(SOUND))) as server:
        model = taken(chat(server.url, **fields))
        options_set.clear()
        assert (await model.ainvoke("hi")).text == "hello"
    assert (KEEPALIVE in options_set) == (fields != {"http_socket_options": ()})
    assert (BUFFER in options_set) == ("http_socket_options" in fields and BUFFER in fields["http_socket_options"])


async def test_settings_of_the_client(taken: Any):
    """Hooks, headers, cookies, authentication, TLS, limits and proxies of the HTTP client are those of the user."""
    seen: list[str] = []

    async def note(request: Any) -> None:
        seen.append(str(request.url))

    with FaultServer([Reply(content="hello")]) as server:
        http = openai.DefaultAsyncHttpxClient(
            event_hooks={"request": [note]},
            headers={"X-Team": "a"},
            cookies={"b": "c"},
            params={"d": "e"},
            limits=httpx.Limits(max_connections=3, max_keepalive_connections=2, keepalive_expiry=7),
        )
        async with http:
            assert (await taken(chat(server.base_url, http_async_client=http)).ainvoke("hi")).text == "hello"
        assert (server.headers[0]["x-team"], server.headers[0]["cookie"]) == ("a", "b=c")
        assert seen == [f"{server.base_url}/chat/completions?d=e"]


async def test_a_proxy(taken: Any):
    """``openai_proxy`` is used in an agent and under ``fast_logprobs``, in one event loop after another."""
    with serving(plainly(whole(SOUND))) as proxy:
        address = proxy.url.removesuffix("/v1").replace("//", "//user:pass@")
        model = taken(chat("http://example.invalid/v1", openai_proxy=address))
        for _ in range(2):
            assert (await asyncio.to_thread(lambda: asyncio.run(model.ainvoke("hi")))).text == "hello"
        assert len(proxy.asked) == 2
        for asked in proxy.asked:
            assert asked.startswith(b"POST http://example.invalid/v1/chat/completions HTTP/1.1\r\n")
            assert b"proxy-authorization: basic dxnlcjpwyxnz" in asked.lower()


def pool_of(model: Any) -> Any:
    """The connection pool that an asynchronous model has the settings of."""
    transport = model.root_async_client._client._transport
    return getattr(transport, "model", transport)._pool


def test_limits_and_tls(taken: Any):
    """The pool of the copies has the limits, the TLS context and the versions of HTTP that langchain-openai set."""
    model = chat("https://127.0.0.1:1/v1")
    before, after = vars(pool_of(model)), vars(pool_of(taken(model)))
    assert {"_ssl_context", "_max_connections", "_keepalive_expiry", "_socket_options"} <= before.keys()
    for name in before.keys() - {"_connections", "_requests", "_optional_thread_lock"}:
        assert after[name] is before[name]


def test_a_transport_of_the_user_is_kept(taken: Any):
    """What cannot be made again for another loop is used as it is."""
    answer = httpx.MockTransport(lambda _: httpx.Response(200, content=SOUND))
    http = openai.DefaultAsyncHttpxClient(transport=answer)
    model = taken(chat("http://example.invalid/v1", http_async_client=http))
    assert asyncio.run(model.ainvoke("hi")).text == "hello"


def test_structured_output_in_one_loop_after_another(taken: Any):
    """``parse`` too goes through the connections of the running loop."""
    with FaultServer([Reply(content='{"answer": 42}')]) as server:
        model = taken(chat(server.base_url))
        asking = model.bind(response_format={"type": "json_object"})
        for _ in range(3):
            assert asyncio.run(asking.ainvoke("hi")).text == '{"answer": 42}'


def test_a_quota_that_is_used_up_is_not_asked_again(ask: Callable[..., str]):
    error = b'{"error": {"message": "no credit", "type": "insufficient_quota", "code": "insufficient_quota"}}'
    with serving(plainly(whole(error, status="429 Too Many Requests"))) as server:
        with pytest.raises(openai.RateLimitError) as raised:
            ask(server.url, max_retries=2)
        assert len(server.asked) == 1
    assert retry_delay(raised.value, 0) is None
