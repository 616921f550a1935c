"""How bodies are read: few at a time, and with the log-probabilities of a choice packed as soon as it is there.

Otherwise N answers that come together would be N whole bodies in memory, and so would one answer of N choices.
"""

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from contextvars import Context
from functools import cache, partial
from io import BytesIO
from typing import Any, TypeVar

import openai

from ec_agents.servers.completions import decode_response, pack_choice, pack_response

LARGE_BODY = 1 << 20
"""Bytes; larger texts are decoded in a thread, so that the event loop goes on."""
SMALL_BODY = 1 << 15
"""Bytes; what of a body is read before its turn, so that smaller ones wait for none."""
PIECE = 1 << 19
"""Bytes of a body that are taken from the connection at once, if so many have arrived."""
AT_ONCE = 4
"""Bodies that are read at the same time."""
PATIENCE = 0.03
"""Seconds for ``SMALL_BODY`` bytes; a body that is slower no longer keeps others waiting."""

Decoded = TypeVar("Decoded")

_OF_THE_BODY = (b"content-encoding", b"content-length", b"transfer-encoding")
"""Headers that are no longer true of a body that was read."""
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


async def _packed(body: bytes, n: int = 1) -> bytes:
    return body if len(body) <= LARGE_BODY else await _off_loop(lambda text: pack_response(text, n), body)


class Joining:
    """Takes a body piece by piece."""

    def __init__(self) -> None:
        self._taken = BytesIO()

    @property
    def size(self) -> int:
        """Bytes that were taken."""
        return self._taken.tell()

    async def feed(self, piece: bytes) -> None:
        """Take the next piece."""
        self._taken.write(piece)

    async def body(self) -> bytes:
        """All that was taken, packed if it is large."""
        return await _packed(self._taken.getvalue())


class Packing:
    """Takes a body piece by piece, and replaces its choices by the same ones with packed log-probabilities.

    ``decode_response`` makes the same of the result as of the body. A choice ends where the next one begins, with the
    same bytes as the first. What is no choice, and the last one, stays as it came unless the body is large.
    """

    def __init__(self) -> None:
        self.size = 0
        """Bytes that were taken."""
        self._done: list[bytes] = []
        self._rest = bytearray()
        self._mark: bytes | None = None
        """What choices begin with; once it is known, the rest begins with it."""
        self._searched = 0
        self._in_vain = 0
        """Bytes that were taken for the choice that comes next, and were none."""

    async def feed(self, piece: bytes) -> None:
        """Take the next piece."""
        early = self.size < SMALL_BODY
        self.size += len(piece)
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

    async def body(self) -> bytes:
        """All that was taken; this ends the packing."""
        body = b"".join([*self._done, self._rest])
        self._done, self._rest = [], bytearray()
        return await _packed(body, n=2)

    async def _try_choice(self, end: int) -> None:
        """Pack what lies before ``end``, if it is one whole choice."""
        self._searched = end + 1
        near = self._rest[max(0, end - 80) : end]
        kept = near.rstrip()
        if kept.endswith(b","):
            with memoryview(self._rest) as rest:
                text = bytes(rest[: end - (len(near) - len(kept)) - 1])
            packed = await _off_loop(pack_choice, text)
            if packed is None:
                self._in_vain += len(text)
            else:
                self._replace(end, packed + b",")

    def _replace(self, end: int, by: bytes) -> None:
        """Put something in the place of the rest up to there."""
        self._done.append(by)
        del self._rest[:end]
        self._searched, self._in_vain = 1, 0


class Turn:
    """One of few that there are at once, until it is ended, by whoever has it or by what he waits for.

    Args:
        end: What ends it.
        patience: Seconds for which one may wait for ``SMALL_BODY`` bytes.
    """

    def __init__(self, end: Callable[[], None], patience: float) -> None:
        self._end: Callable[[], None] | None = end
        self._patience = self._left = patience

    def end(self) -> None:
        """Let others have it; more than once does no harm."""
        if self._end is not None:
            self._end()
        self._end = None

    async def wait(self, coming: Awaitable[bytes | None]) -> bytes | None:
        """Wait for the next bytes; the turn ends if they are too few for the time."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        timer = loop.call_later(self._left, self.end)
        try:
            piece = await coming
        finally:
            timer.cancel()
        earned = self._patience * len(piece or b"") / SMALL_BODY
        self._left = min(self._patience, max(0, self._left - loop.time() + begin) + earned)
        return piece


class Turns:
    """Lets few bodies at a time be read, apart from those that are so slow in coming that others would lose by it."""

    def __init__(self, at_once: int, patience: float) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._patience = patience

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[Turn]:
        """Wait for a turn, and have it."""
        await self._free.acquire()
        turn = Turn(self._free.release, self._patience)
        try:
            yield turn
        finally:
            turn.end()


def async_http_client() -> Any:
    """An HTTP client for bodies that are read whole, in turns if aiohttp is installed; otherwise the SDK's own."""
    try:
        client: Any = openai.DefaultAioHttpClient()
    except RuntimeError:
        return openai.DefaultAsyncHttpxClient()
    turns = Turns(AT_ONCE, PATIENCE)
    for transport in (client._transport, *client._mounts.values()):  # noqa: SLF001 - those mounted are for proxies
        if transport is not None:
            transport.client = partial(_session, transport)
            transport.handle_async_request = partial(_handle, transport.handle_async_request, turns)
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
            opening = asyncio.create_task(super()._create_connection(*args, **kwargs), context=Context())
            try:
                return await opening
            except asyncio.CancelledError:
                if opening.done() and not opening.cancelled() and not opening.exception():
                    opening.result().close()  # it was open before the cancellation came, and nobody else knows it
                raise

        def _release(self, key: Any, protocol: Any, **kwargs: Any) -> None:
            protocol.read_timeout = None  # or else aiohttp lets reads of an idle connection time out, and uses it again
            protocol.start_timeout()
            Context().run(super()._release, key, protocol, **kwargs)  # it sets a timer

    limits = transport.limits
    connector = Connector(
        ssl=transport.ssl_context, limit=limits.max_connections or 0, keepalive_timeout=limits.keepalive_expiry
    )
    return aiohttp.ClientSession(connector=connector, read_bufsize=SMALL_BODY // 4)


def _take(connection: Any, size: int) -> None:
    """Let asyncio take up to so many bytes from a connection at once; other loops have their own size."""
    with suppress(AttributeError):
        connection.transport.max_size = size


async def _handle(send: Callable[[Any], Awaitable[Any]], turns: Turns, request: Any) -> Any:
    """The response to a request as the SDK's transport gives it, but with the whole body, packed and decompressed."""
    await request.aread()  # the body of a request that was redirected is not read yet
    response = await send(request)
    try:
        several = b'"n":' in request.content  # if a message says so and not the request, it only costs time
        body = await _body(response, turns, Packing() if several else Joining())
    finally:
        await response.aclose()
    headers = [(name, value) for name, value in response.headers.raw if name.lower() not in _OF_THE_BODY]
    return type(response)(response.status_code, headers=headers, content=body, extensions=response.extensions)


async def _body(response: Any, turns: Turns, taken: Joining | Packing) -> bytes:
    stream = response.stream
    large = int(response.headers.get("content-length", 0)) > SMALL_BODY
    if "content-encoding" not in response.headers:  # or else a piece may become many times as large
        stream.CHUNK_SIZE = PIECE
    async with aclosing(response.aiter_bytes()) as pieces:
        while not large and taken.size <= SMALL_BODY:
            piece = await anext(pieces, None)
            if piece is None:
                return await taken.body()
            await taken.feed(piece)
        async with turns.turn() as turn:
            _take(stream._aiohttp_response.connection, PIECE)  # noqa: SLF001 - the SDK gives no other way to it
            while (piece := await turn.wait(anext(pieces, None))) is not None:
                await taken.feed(piece)
            return await taken.body()
