"""aiohttp as the transport of an httpx client: about a third less CPU for a large response (extra ``fast``)."""

import asyncio
import socket
import sys
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import contextmanager, suppress
from contextvars import Context
from typing import Any, cast

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from ec_agents.servers.httpx_of_sdk import httpx

SMALL_READ = 1 << 15
"""Bytes that a connection takes in before somebody reads the body."""
LARGE_READ = 1 << 19
"""Bytes that are taken from a connection at once while a body is read, if so many have arrived."""
_A_DAY = 86400.0

_RAISED: tuple[tuple[type[BaseException], Any], ...] = (
    (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
    (aiohttp.ServerTimeoutError, httpx.ReadTimeout),
    (aiohttp.ClientProxyConnectionError, httpx.ProxyError),
    (aiohttp.ClientHttpProxyError, httpx.ProxyError),
    (aiohttp.ClientConnectorError, httpx.ConnectError),
    (aiohttp.ServerDisconnectedError, httpx.RemoteProtocolError),
    (aiohttp.InvalidURL, httpx.UnsupportedProtocol),
    (aiohttp.NonHttpUrlClientError, httpx.UnsupportedProtocol),
    (aiohttp.ClientConnectionError, httpx.ReadError),
    (aiohttp.ClientError, httpx.RemoteProtocolError),
    (HttpProcessingError, httpx.RemoteProtocolError),
    (OSError, httpx.ReadError),
)
"""What httpx raises where aiohttp raises the first of these; every error of a connection is one of them."""


@contextmanager
def _errors_of_httpx() -> Generator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(getattr(error, "os_error", None), TimeoutError):  # the system gave up
            raise httpx.ConnectTimeout(str(error)) from error
        for kind, counterpart in _RAISED:
            if isinstance(error, kind):
                raise counterpart(str(error) or type(error).__name__) from error
        raise


class AiohttpTransport:
    """Sends the requests of an httpx client with aiohttp, in one event loop.

    Args:
        pool: A connection pool of httpcore; its settings are taken over.
    """

    def __init__(self, pool: Any) -> None:
        set_to = cast("dict[str, Any]", vars(pool))  # nothing public has the settings
        proxy = set_to.get("_proxy_url")
        self._proxy = None if proxy is None else bytes(proxy).decode()
        self._proxy_headers: dict[str, str] = {
            name.decode(): value.decode() for name, value in set_to.get("_proxy_headers", ())
        }
        most, expiry, address = set_to["_max_connections"], set_to["_keepalive_expiry"], set_to["_local_address"]
        self._connector = _Connector(
            ssl=set_to["_ssl_context"] or True,
            limit=0 if most == sys.maxsize else most,
            keepalive_timeout=_A_DAY if expiry is None else expiry,
            local_addr=(address, 0) if address else None,
            socket_factory=_socket_factory(tuple(set_to["_socket_options"] or ())),
        )
        # The httpx client keeps the cookies, and knows of the proxies of the environment.
        self._session = aiohttp.ClientSession(
            connector=self._connector, read_bufsize=SMALL_READ // 4, cookie_jar=aiohttp.DummyCookieJar()
        )

    @staticmethod
    def takes_over(pool: Any) -> bool:
        """Whether aiohttp can do what the pool is set to do."""
        set_to = cast("dict[str, Any]", vars(pool))
        proxy = set_to.get("_proxy_url")
        return bool(
            type(pool).__name__ in ("AsyncConnectionPool", "AsyncHTTPProxy")
            and set_to.get("_proxy") is None
            and (proxy is None or proxy.scheme == b"http")
            and set_to["_http1"]
            and not (set_to["_http2"] or set_to["_retries"] or set_to["_uds"])
        )

    async def handle_async_request(self, request: Any) -> Any:
        """Send a request whose body was read; the response is not read yet."""
        limits = request.extensions.get("timeout", {})
        timeout = aiohttp.ClientTimeout(
            sock_connect=limits.get("connect"), sock_read=limits.get("read"), connect=limits.get("pool")
        )
        plain = self._proxy_headers and request.url.scheme == "http"
        with _errors_of_httpx():
            response = await self._session.request(
                request.method,
                str(request.url),
                # A proxy gets its headers with a request that it forwards, or else when it opens a tunnel.
                headers={**self._proxy_headers, **request.headers} if plain else request.headers,
                data=request.content or None,
                allow_redirects=False,
                auto_decompress=False,
                timeout=timeout,
                server_hostname=request.extensions.get("sni_hostname"),
                proxy=self._proxy,
                proxy_headers=self._proxy_headers or None,
            )
        extensions = {"http_version": b"HTTP/1.1", "reason_phrase": (response.reason or "").encode()}
        return httpx.Response(
            response.status, headers=response.raw_headers, stream=ResponseStream(response), extensions=extensions
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._session.close()


class ResponseStream(httpx.AsyncByteStream):  # pyright: ignore[reportUntypedBaseClass]
    """The body of a response of aiohttp, still compressed if it came so."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    def take_in_more(self) -> None:
        """Take more from the connection at once, now that the body is read."""
        _take_in(self._response.connection, LARGE_READ)

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        with _errors_of_httpx():
            async for piece in self._response.content.iter_chunked(LARGE_READ):
                yield piece

    async def aclose(self) -> None:
        """Give the connection back, or close it if the body was not read to its end."""
        with _errors_of_httpx():
            self._response.release()
            await self._response.wait_for_close()


class _Connector(aiohttp.TCPConnector):
    """Its connections take in little of a body before it is read, and keep no context.

    A connection outlives the run that opened it, and would keep all that the run had in its context.
    """

    async def connect(self, *args: Any, **kwargs: Any) -> Any:
        connection = await super().connect(*args, **kwargs)
        _take_in(connection, SMALL_READ)
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


def _take_in(connection: Any, size: int) -> None:
    """Let asyncio take up to so many bytes from a connection at once; other loops have their own size."""
    with suppress(AttributeError):
        connection.transport.max_size = size


def _socket_factory(options: Iterable[Any]) -> Any:
    """Makes sockets with the options; None where there are none."""

    def make(address: Any) -> socket.socket:
        made = socket.socket(*address[:3])
        try:
            for option in options:
                made.setsockopt(*option)
        except BaseException:
            made.close()
            raise
        return made

    return make if options else None
