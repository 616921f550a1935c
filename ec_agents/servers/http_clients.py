"""The HTTP clients under the SDK: whole responses within limits, and connections for each event loop.

A client is copied with everything that is set on it (headers, hooks, cookies, proxies, TLS, socket options); only its
transports are replaced. With aiohttp installed (extra ``fast``), it carries the requests of transports whose settings
it can take over.
"""

import asyncio
import copy
import math
import sys
import time
import weakref
import zlib
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from contextvars import Context
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import openai

from ec_agents.errors import ConfigError, RedirectRefused, ResponseTooLarge
from ec_agents.servers.body_reader import Turns, read_body
from ec_agents.servers.httpx_of_sdk import httpx
from ec_agents.servers.limited_sockets import GIVE_UP_AT, LimitedBackend
from ec_agents.servers.per_loop import PerLoop

MAX_BODY_BYTES = 1 << 28
"""Largest decompressed body that is read: 256 MB."""

PIECE = 1 << 19
"""Largest piece of a body in bytes that is decompressed at once."""
_MOST_CODINGS = 5
_BODY_HEADERS = (b"content-encoding", b"content-length", b"transfer-encoding")
"""Headers that are no longer true of a body that was read."""
_NO_CREDIT = b"insufficient_quota"
_GIVE_UP_AT = "ec_agents_give_up_at"
"""Extension of a request: monotonic time at which it is given up, redirects included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseLimits:
    """What one response may cost.

    Raises:
        ConfigError: A value is out of range.
    """

    max_body_bytes: int = MAX_BODY_BYTES
    """Largest decompressed body in bytes."""
    whole_request: bool = True
    """Whether the read timeout of a request limits all of it, from the wait for a connection to the last byte;
    otherwise it limits each read, as in httpx."""
    redirect_hosts: frozenset[str] = frozenset()
    """Other hosts that a server may redirect requests to."""

    def __post_init__(self) -> None:
        """Check the values."""
        size: Any = self.max_body_bytes
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"max_body_bytes must be 1 or more; found {size!r}")

    def check_size(self, size: int) -> None:
        """Raise ``ResponseTooLarge`` if a body has more bytes than that."""
        if size > self.max_body_bytes:
            raise _TooLarge(
                f"the response has more than {self.max_body_bytes:,} bytes; if that is to be expected, raise "
                "max_body_bytes"
            )

    def start_clock(self, request: Any) -> float:
        """Monotonic time at which the request is given up; the limits of single reads become limits of it all."""
        timeouts = request.extensions.get("timeout", {})
        seconds = timeouts.get("read")
        if self.whole_request and seconds is not None:
            request.extensions[_GIVE_UP_AT] = time.monotonic() + seconds
            request.extensions["timeout"] = {"connect": timeouts.get("connect")}  # each of them costs a timer
        return request.extensions.get(_GIVE_UP_AT, math.inf)  # a redirected request has the time that is left

    def check_redirect(self, request: Any, response: Any) -> None:
        """Raise ``RedirectRefused`` if the response sends the request to another host that is not allowed."""
        location = response.headers.get("location")
        if not 300 <= response.status_code < 400 or location is None:
            return
        try:
            target = request.url.join(location)
        except httpx.InvalidURL as error:
            raise httpx.RemoteProtocolError(f"the server redirects to an invalid address: {error}") from error
        upgraded = (request.url.scheme, target.scheme) == ("http", "https") and request.url.host == target.host
        origin = (target.scheme, target.host, target.port)
        if upgraded or origin == (request.url.scheme, request.url.host, request.url.port):
            return
        if not {target.host, target.netloc.decode()} & self.redirect_hosts:
            raise _Refused(
                f"{request.url.host} redirects the request to {target.netloc.decode()}, which would get the prompt and "
                f"the key; set base_url to that server, or allow it with redirect_hosts={{{target.host!r}}}"
            )


# The SDK passes its own errors on, and takes others for a lost connection.
class _TooLarge(ResponseTooLarge, openai.OpenAIError):
    __doc__ = ResponseTooLarge.__doc__


class _Refused(RedirectRefused, openai.OpenAIError):
    __doc__ = RedirectRefused.__doc__


for _error in (_TooLarge, _Refused):
    _error.__name__ = _error.__qualname__ = _error.__mro__[1].__name__  # tracebacks and records show the public name


# Whole responses


class _WholeResponses(httpx.AsyncBaseTransport):  # pyright: ignore[reportUntypedBaseClass]
    """Reads the responses of another transport whole, in turns, with large ones packed.

    Args:
        inner: Sends the requests.
        limits: What a response may cost.
        shared: Whether somebody else closes ``inner``.
    """

    def __init__(self, inner: Any, limits: ResponseLimits, *, shared: bool = False) -> None:
        self._inner = inner
        self._limits = limits
        self._shared = shared
        self._turns = Turns()

    async def handle_async_request(self, request: Any) -> Any:
        """The response with its whole body, decompressed."""
        await request.aread()  # the body of a request that was redirected is not read yet
        request.headers["accept-encoding"] = "gzip"
        left = self._limits.start_clock(request) - time.monotonic()
        limit = asyncio.timeout(None)
        try:
            async with limit:
                if not math.isinf(left):
                    # The loop keeps a timer that was cancelled, and the timer keeps its context: an empty one.
                    Context().run(limit.reschedule, asyncio.get_running_loop().time() + left)
                return await self._receive(request)
        except TimeoutError as error:
            if limit.expired():
                raise httpx.ReadTimeout("the response was not complete within the timeout") from error
            raise

    async def _receive(self, request: Any) -> Any:
        response = await self._inner.handle_async_request(request)
        try:
            self._limits.check_redirect(request, response)
            several = b'"n":' in request.content  # if a message says so and not the request, it only costs time
            async with aclosing(_decompressed(response, self._limits)) as pieces:
                on_turn = getattr(response.stream, "take_in_more", lambda: None)
                body = await read_body(
                    pieces, self._turns, announced=_announced(response), several=several, on_turn=on_turn
                )
        finally:
            await response.aclose()
        return _whole(response, body)

    async def aclose(self) -> None:
        """Close all connections, unless they are another's."""
        if not self._shared:
            await self._inner.aclose()


async def _decompressed(response: Any, limits: ResponseLimits) -> AsyncGenerator[bytes]:
    """The body in pieces of bounded size, as many as the limits allow."""
    gunzip, size = _Gunzip(response), 0
    async with aclosing(aiter(response.stream)) as pieces:
        async for compressed in pieces:
            for piece in gunzip.feed(compressed):
                size += len(piece)
                limits.check_size(size)
                yield piece
                if gunzip.is_needed:
                    await asyncio.sleep(0)  # a few bytes may become many pieces, with nothing to wait for
    gunzip.finish()


class _WholeResponsesBlocking(httpx.BaseTransport):  # pyright: ignore[reportUntypedBaseClass]
    """``_WholeResponses`` for synchronous clients.

    Args:
        inner: Sends the requests; its socket reads are limited too.
        limits: What a response may cost.
        shared: Whether somebody else closes ``inner``; otherwise it is closed with this object.
    """

    def __init__(self, inner: Any, limits: ResponseLimits, *, shared: bool = False) -> None:
        self._inner = inner
        self._limits = limits
        if not shared:
            weakref.finalize(self, inner.close)

    def handle_request(self, request: Any) -> Any:
        """The response with its whole body, decompressed."""
        request.read()
        request.headers["accept-encoding"] = "gzip"
        token = GIVE_UP_AT.set(self._limits.start_clock(request))
        try:
            return self._receive(request)
        finally:
            GIVE_UP_AT.reset(token)

    def _receive(self, request: Any) -> Any:
        response = self._inner.handle_request(request)
        try:
            self._limits.check_redirect(request, response)
            gunzip, pieces, size = _Gunzip(response), list[bytes](), 0
            for piece in chain.from_iterable(map(gunzip.feed, response.stream)):
                size += len(piece)
                self._limits.check_size(size)
                pieces.append(piece)
            gunzip.finish()
        finally:
            response.close()
        return _whole(response, b"".join(pieces))


def _announced(response: Any) -> int:
    """The size in bytes that the response announced, 0 if it did not."""
    length = response.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0


def _whole(response: Any, body: bytes) -> Any:
    """The response with a body that was read; a used-up quota is not worth the SDK's retries."""
    headers = [(name, value) for name, value in response.headers.raw if name.lower() not in _BODY_HEADERS]
    if response.status_code == 429 and _NO_CREDIT in body and "x-should-retry" not in response.headers:
        headers.append((b"x-should-retry", b"false"))
    return httpx.Response(response.status_code, headers=headers, content=body, extensions=response.extensions)


class _Gunzip:
    """Decompresses a body, at most ``PIECE`` bytes at a time.

    Args:
        response: Says in its headers how often its body is compressed.

    Raises:
        httpx.DecodingError: The body is compressed in another way than the request allows, or damaged.
    """

    def __init__(self, response: Any) -> None:
        named = response.headers.get("content-encoding", "").lower().replace(" ", "").split(",")
        codings = [coding for coding in named if coding not in ("", "identity")]
        if len(codings) > _MOST_CODINGS or not {"gzip", "x-gzip"}.issuperset(codings):
            raise httpx.DecodingError(f"the body is sent as {', '.join(codings)[:60]!r}; only gzip was asked for")
        self._stages = [zlib.decompressobj(zlib.MAX_WBITS | 16) for _ in codings]
        self.is_needed = bool(codings)
        """Whether the body is compressed."""

    def feed(self, compressed: bytes) -> Iterator[bytes]:
        """What the next bytes decompress to."""
        pieces: Iterator[bytes] = iter((compressed,))
        for stage in self._stages:
            pieces = _inflate(stage, pieces)
        return pieces

    def finish(self) -> None:
        """Check that the body was complete."""
        if not all(stage.eof for stage in self._stages):
            raise httpx.DecodingError("the compressed body ends early")


def _inflate(stage: Any, pieces: Iterator[bytes]) -> Iterator[bytes]:
    for compressed in pieces:
        remaining, piece = compressed, b""
        while not stage.eof and (remaining or len(piece) == PIECE):  # or else a full piece may have left some behind
            try:
                piece = stage.decompress(remaining, PIECE)
            except zlib.error as error:
                raise httpx.DecodingError(str(error)) from error
            remaining = stage.unconsumed_tail
            if piece:
                yield piece


# Copies of clients


def async_http_client(limits: ResponseLimits) -> Any:
    """An asynchronous client with the SDK's defaults for one event loop, which reads whole responses."""
    return _copied(
        openai.DefaultAsyncHttpxClient(), lambda transport: _WholeResponses(_fast(transport) or transport, limits)
    )


def http_client(limits: ResponseLimits) -> Any:
    """A synchronous client with the SDK's defaults, which reads whole responses."""
    return _copied(openai.DefaultHttpxClient(), lambda transport: _WholeResponsesBlocking(_limited(transport), limits))


def with_whole_responses(client: Any, limits: ResponseLimits) -> Any:
    """The SDK's client with the same settings, which reads whole responses.

    A synchronous client shares its connections with the copy; an asynchronous one that is ``per_loop`` gets others, as
    does every event loop.
    """
    http = client._client  # noqa: SLF001 - the SDK has no public way to its HTTP client
    if not isinstance(http, httpx.Client | httpx.AsyncClient):
        return client  # of another httpx library
    if isinstance(client, openai.OpenAI):
        return client.copy(http_client=_copied(http, lambda real: _WholeResponsesBlocking(real, limits, shared=True)))
    return client.copy(http_client=_copied(http, lambda real: _whole_per_loop(real, limits)))


def per_loop(client: openai.AsyncOpenAI) -> openai.AsyncOpenAI | None:
    """The SDK's client with the same settings and with its own connections in each event loop.

    Returns:
        The copy, or None if the client has transports that cannot be made again.
    """
    http: Any = client._client  # noqa: SLF001 - the SDK has no public way to its HTTP client
    if not isinstance(http, httpx.AsyncClient):
        return None  # of another httpx library
    transports = [http._transport, *filter(None, http._mounts.values())]  # noqa: SLF001 - nor httpx to these
    if not all(map(_can_be_made_again, transports)):
        return None
    return client.copy(http_client=_copied(http, lambda real: _TransportPerLoop(real, lambda: _made_again(real))))


def is_per_loop(client: Any) -> bool:
    """Whether an SDK client has its own connections in each event loop."""
    return isinstance(getattr(client._client, "_transport", None), _TransportPerLoop)  # noqa: SLF001 - see above


class _TransportPerLoop(httpx.AsyncBaseTransport):  # pyright: ignore[reportUntypedBaseClass]
    """One transport for each event loop, closed with the loop.

    Args:
        model: The transport whose settings they have.
        make: Makes one.
    """

    def __init__(self, model: Any, make: Callable[[], Any]) -> None:
        self.model = model
        self._transports: PerLoop[Any] = PerLoop(make, lambda transport: transport.aclose())

    async def handle_async_request(self, request: Any) -> Any:
        """Send a request through the transport of the running loop."""
        transport = await self._transports.get()
        return await transport.handle_async_request(request)


def _whole_per_loop(real: Any, limits: ResponseLimits) -> _TransportPerLoop:
    if not isinstance(real, _TransportPerLoop):  # the user's own connections
        return _TransportPerLoop(real, lambda: _WholeResponses(real, limits, shared=True))
    model = real.model
    return _TransportPerLoop(model, lambda: _WholeResponses(_fast(model) or _made_again(model), limits))


def _copied(client: Any, replaced: Callable[[Any], Any]) -> Any:
    """An httpx client with everything that is set on another one, and other transports."""
    # The classes of the SDK and of langchain-openai close the client when it is garbage, in a task that nobody awaits.
    own = type(client).__module__.partition(".")[0] in ("openai", "langchain_openai")
    kind: Any = (
        (httpx.AsyncClient if isinstance(client, httpx.AsyncClient) else httpx.Client)
        if own
        else cast("Any", type(client))
    )
    made: Any = object.__new__(kind)
    made.__dict__.update(vars(client))
    made._transport = replaced(client._transport)  # noqa: SLF001 - httpx has no public way to these
    made._mounts = {pattern: mounted and replaced(mounted) for pattern, mounted in client._mounts.items()}  # noqa: SLF001
    return made


def _can_be_made_again(transport: Any) -> bool:
    return type(transport) is httpx.AsyncHTTPTransport


def _made_again(transport: Any) -> Any:
    """A transport of httpx with the same settings and no connections yet."""
    made = copy.copy(transport)
    made._pool = pool = copy.copy(transport._pool)  # noqa: SLF001 - nothing public has all of the settings
    pool._connections, pool._requests = [], []  # noqa: SLF001 - all that a pool remembers
    return made


def _limited(transport: Any) -> Any:
    """A synchronous transport of httpx, every read of which is limited."""
    pool = transport._pool  # noqa: SLF001 - httpx hands no network backend to it
    httpcore = sys.modules[type(pool).__module__.partition(".")[0]]
    pool._network_backend = LimitedBackend(pool._network_backend, httpcore)  # noqa: SLF001 - see above
    return transport


def _fast(transport: Any) -> Any | None:
    """A transport of aiohttp with the settings of one of httpx; None where aiohttp is missing or cannot have them."""
    try:
        from ec_agents.servers.aiohttp_transport import AiohttpTransport  # noqa: PLC0415 - of the extra "fast"
    except ImportError:
        return None
    pool = getattr(transport, "_pool", None) if _can_be_made_again(transport) else None
    return AiohttpTransport(pool) if pool is not None and AiohttpTransport.takes_over(pool) else None
