"""Sockets of synchronous HTTP clients whose waits end together, when the request is given up."""

import math
import time
from contextvars import ContextVar
from types import ModuleType
from typing import Any

GIVE_UP_AT: ContextVar[float] = ContextVar("ec_agents_give_up_at", default=math.inf)
"""Monotonic time at which the synchronous request of this thread is given up."""


class LimitedBackend:
    """The network backend of a synchronous pool of httpcore.

    Args:
        real: The backend that it stands for.
        httpcore: The library of the pool.
    """

    def __init__(self, real: Any, httpcore: ModuleType) -> None:
        self._real = real
        self._httpcore = httpcore

    def connect_tcp(self, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """Connect to a host."""
        left = _time_left(timeout, self._httpcore.ConnectTimeout)
        return _LimitedStream(self._real.connect_tcp(*args, timeout=left, **kwargs), self._httpcore)

    def connect_unix_socket(self, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """Connect to a Unix socket."""
        left = _time_left(timeout, self._httpcore.ConnectTimeout)
        return _LimitedStream(self._real.connect_unix_socket(*args, timeout=left, **kwargs), self._httpcore)

    def sleep(self, seconds: float) -> None:
        """Wait before another attempt to connect."""
        self._real.sleep(_time_left(seconds, self._httpcore.ConnectTimeout))


class _LimitedStream:
    """One connection of a ``LimitedBackend``."""

    def __init__(self, real: Any, httpcore: ModuleType) -> None:
        self._real = real
        self._httpcore = httpcore
        self.close = real.close
        self.get_extra_info = real.get_extra_info

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Receive bytes."""
        return self._real.read(max_bytes, _time_left(timeout, self._httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send bytes."""
        self._real.write(buffer, _time_left(timeout, self._httpcore.WriteTimeout))

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
        """Encrypt the connection."""
        left = _time_left(timeout, self._httpcore.ConnectTimeout)
        return _LimitedStream(self._real.start_tls(ssl_context, server_hostname, left), self._httpcore)


def _time_left(timeout: float | None, expired: type[Exception]) -> float | None:
    """The timeout, or the time that the request has left if that is less."""
    left = GIVE_UP_AT.get() - time.monotonic()
    if left <= 0:
        raise expired("the response was not complete within the timeout")
    return timeout if math.isinf(left) else min(left, math.inf if timeout is None else timeout)
