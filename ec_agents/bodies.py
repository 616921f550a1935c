"""How bodies are read: few at a time, and with the log-probabilities of a choice packed as soon as it is there.

Otherwise N answers that come together would be N whole bodies in memory, and so would one answer of N choices.
"""

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext, suppress
from contextvars import Context
from functools import cache
from io import BytesIO
from typing import Any, TypeVar

import openai

from ec_agents.wire import decode_response, pack_choice, pack_response

LARGE_BODY = 1 << 20
"""Bytes; larger texts are decoded in a thread, so that the event loop goes on."""
SMALL_BODY = 1 << 16
"""Bytes; what a connection takes in before its turn, and the largest body that waits for none."""
PIECE = 1 << 19
"""Bytes of a body that are taken from the connection at once, if so many have arrived."""
AT_ONCE = 4
"""Bodies that are read at the same time."""
PATIENCE = 0.03
"""Seconds after which a body that still arrives no longer keeps others waiting."""

Decoded = TypeVar("Decoded")

_FIRST_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*(\{\s*"[^"\\]*"\s*:)')


async def decoded(body: bytes, n: int = 1) -> dict[str, Any]:
    """``decode_response``, without holding up the loop for long."""
    return await _off_loop(lambda text: decode_response(text, n), body)


async def _off_loop(decode: Callable[[bytes], Decoded], text: bytes) -> Decoded:
    if len(text) <= LARGE_BODY:
        return decode(text)
    return await asyncio.get_running_loop().run_in_executor(_decoder(), decode, text)


@cache
def _decoder() -> ThreadPoolExecutor:
    """One thread: several would take the interpreter from the loop in turn."""
    return ThreadPoolExecutor(1, "ec_agents-decode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_decoder.cache_clear)  # a forked child has the executor but not its thread


class Packing:
    """Takes a body piece by piece, and replaces its choices by the same ones with packed log-probabilities.

    ``decode_response`` makes the same of the result as of the body. A choice ends where the next one begins, with the
    same bytes as the first. What is no choice, and the last one, stays as it came.
    """

    def __init__(self) -> None:
        self._done: list[bytes] = []
        self._rest = bytearray()
        self._mark: bytes | None = None
        """What choices begin with; once it is known, the rest begins with it."""
        self._searched = 0
        self._in_vain = 0
        """Bytes that were taken for a choice and were none."""

    async def feed(self, piece: bytes) -> None:
        """Take the next piece."""
        early = len(self._rest) < LARGE_BODY
        self._rest += piece
        if self._mark is None and early and (found := _FIRST_CHOICE.search(self._rest)):
            self._mark = found[1]
            self._replace(found.start(1), bytes(self._rest[: found.start(1)]))
        while self._mark is not None and self._in_vain < LARGE_BODY:
            end = self._rest.find(self._mark, self._searched)
            if end < 0:
                self._searched = max(self._searched, len(self._rest) - len(self._mark))
                break
            await self._try_choice(end)

    def body(self) -> bytes:
        """All that was taken."""
        return b"".join([*self._done, self._rest])

    async def _try_choice(self, end: int) -> None:
        """Pack what lies before ``end``, if it is one whole choice."""
        self._searched = end + 1
        if self._rest[max(0, end - 80) : end].rstrip().endswith(b","):
            text = bytes(self._rest[:end]).rstrip(b" \t\r\n,")
            packed = await _off_loop(pack_choice, text)
            if packed is None:
                self._in_vain += len(text)
            else:
                self._replace(end, packed + b",")

    def _replace(self, end: int, by: bytes) -> None:
        """Put something in the place of the rest up to there."""
        self._done.append(by)
        del self._rest[:end]
        self._searched = 1


class Turns:
    """Lets few bodies at a time be read; one that is still not there after ``patience`` seconds no longer counts."""

    def __init__(self, at_once: int, patience: float) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._patience = patience

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """Wait for a turn, and have it."""
        await self._free.acquire()
        counted = True

        def end() -> None:
            nonlocal counted
            if counted:
                self._free.release()
            counted = False

        timer = asyncio.get_running_loop().call_later(self._patience, end)
        try:
            yield
        finally:
            timer.cancel()
            end()


def async_http_client() -> Any:
    """An HTTP client on aiohttp, which reads bodies in turns, if that is installed; otherwise the SDK's own."""
    try:
        client = openai.DefaultAioHttpClient()
    except RuntimeError:
        return openai.DefaultAsyncHttpxClient()
    transport: Any = getattr(client, "_transport", None)
    if transport is not None:
        transport.client = lambda: _session(transport)
        transport.handle_async_request = _in_turns(transport.handle_async_request)
    return client


def _session(transport: Any) -> Any:
    """The session that the SDK's transport would make, but with connections of our own."""
    import aiohttp  # noqa: PLC0415 - of the extra "fast"

    class Connector(aiohttp.TCPConnector):
        """Its connections take in little of a body before its turn, and keep no context.

        A connection outlives the run that opened it, and would keep all that the run had in its context.
        """

        async def connect(self, *args: Any, **kwargs: Any) -> aiohttp.connector.Connection:
            connection = await super().connect(*args, **kwargs)
            _take(connection, SMALL_BODY)
            return connection

        async def _create_connection(self, *args: Any, **kwargs: Any) -> Any:
            return await asyncio.create_task(super()._create_connection(*args, **kwargs), context=Context())

        def _release(self, *args: Any, **kwargs: Any) -> None:
            Context().run(super()._release, *args, **kwargs)  # it sets a timer

    limits = transport.limits
    connector = Connector(
        ssl=transport.ssl_context, limit=limits.max_connections or 0, keepalive_timeout=limits.keepalive_expiry
    )
    return aiohttp.ClientSession(connector=connector, read_bufsize=SMALL_BODY // 4)


def _take(connection: Any, size: int) -> None:
    """Let asyncio take up to so many bytes from a connection at once; other loops have their own size."""
    with suppress(AttributeError):
        connection.transport.max_size = size


def _in_turns(send: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    turns = Turns(AT_ONCE, PATIENCE)

    async def handle(request: Any) -> Any:
        response = await send(request)
        stream: Any = response.stream
        stream.__class__ = _stream_in_turns(stream.__class__)
        stream.turns, stream.several = turns, b'"n":' in request.content
        return response

    return handle


@cache
def _stream_in_turns(stream: Any) -> Any:
    """The class of the SDK's streams, with bodies in one piece, so that nobody has to put them together once more.

    Bodies of a known length are complete on the server, and can wait; others may be long in coming.
    """

    class InTurns(stream):
        CHUNK_SIZE = PIECE
        turns: Turns
        several: bool
        """Whether more than one choice may have been asked for."""

        async def __aiter__(self) -> AsyncIterator[bytes]:
            parent: Any = super()
            response = self._aiohttp_response
            length = response.content_length or 0
            may_be_large = length == 0 or length > LARGE_BODY
            async with self.turns.turn() if length > SMALL_BODY else nullcontext():
                _take(response.connection, PIECE)
                body = await (_packed if self.several and may_be_large else _joined)(parent.__aiter__())
            yield body

    return InTurns


async def _packed(pieces: AsyncIterator[bytes]) -> bytes:
    packing = Packing()
    async for piece in pieces:
        await packing.feed(piece)
    return packing.body()


async def _joined(pieces: AsyncIterator[bytes]) -> bytes:
    joined = BytesIO()
    async for piece in pieces:
        joined.write(piece)
    body = joined.getvalue()
    return body if len(body) <= LARGE_BODY else await _off_loop(pack_response, body)
