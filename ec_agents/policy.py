"""Timeouts, retries, hedging and concurrency limits of a step.

``sampling`` decides how many responses a step needs; this module gets one, and cancels what is no longer needed.
"""

import asyncio
import math
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import count
from types import TracebackType
from typing import Any, TypeVar, cast

from ec_agents.errors import ConfigError

_T = TypeVar("_T")

LONGEST_RETRY_AFTER = 120.0
"""Seconds; a server that asks for a longer wait is not asked again."""

_RETRIED = frozenset((408, 409, 425, 429))
_VERDICTS = {"true": True, "false": False}
"""What the header ``x-should-retry`` says."""
_NO_CREDIT = frozenset(("insufficient_quota", "billing_hard_limit_reached", "billing_not_active"))
"""Codes of a 429 that waiting does not cure."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0


class Limiter:
    """Limit concurrent requests across everything that shares the object: agents, event loops, threads.

    Waiters are served first come, first served.

    Args:
        limit: Most requests in flight at once.

    Raises:
        ConfigError: ``limit`` is below 1.

    Example:
        >>> from ec_agents import SamplingPolicy
        >>> from ec_agents.policy import Limiter
        >>> policy = SamplingPolicy(limiter=Limiter(16), timeout=60)
    """

    def __init__(self, limit: int) -> None:
        _check_count("limit", limit, 1)
        self.limit = limit
        self._free = limit
        self._lock = threading.Lock()
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, Future[None]]] = deque()

    async def __aenter__(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn: Future[None] = Future()
            self._waiting.append((asyncio.get_running_loop(), turn))
        try:
            await asyncio.wrap_future(turn)
        except asyncio.CancelledError:
            if not turn.cancel():
                self._pass_on()  # the turn had come already
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        """Give the place to the first waiter that still waits in a loop that still runs."""
        with self._lock:
            while self._waiting:
                loop, turn = self._waiting.popleft()
                if not loop.is_closed() and turn.set_running_or_notify_cancel():
                    turn.set_result(None)
                    return
            self._free += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPolicy:
    """How many responses a step needs and how long it waits for them.

    Wherever a policy is expected, a number is the ``timeout`` of a call in seconds.

    Raises:
        ConfigError: A value is out of range.
    """

    min_candidates: int = 1
    """Raise ``SamplingError`` if fewer calls than this succeed."""
    first: int | None = None
    """Cancel the other calls once this many have succeeded; None waits for all."""
    timeout: float | None = None
    """Seconds that one call may take, excluding queueing; None waits indefinitely."""
    deadline: float | None = None
    """Seconds that the whole step may take, including queueing; responses received by then count."""
    hedge_after: float | None = None
    """Seconds after which a call in flight is sent a second time; the first response wins. None never hedges."""
    retries: int = 0
    """How often a call is retried after a lost connection or a status 408, 409, 425, 429 or 5xx.

    ``Retry-After`` is honoured up to 120 s. Clients retry too: set their ``max_retries=0`` if this is above 0.
    """
    max_concurrency: int | None = None
    """Most calls of a step in flight at once; None starts all."""
    limiter: Limiter | None = None
    """A concurrency limit shared with other steps and agents."""

    def __post_init__(self) -> None:
        """Check everything that does not depend on N."""
        for name in ("timeout", "deadline", "hedge_after"):
            _check_seconds(name, getattr(self, name))
        _check_count("retries", self.retries, 0)
        if self.max_concurrency is not None:
            _check_count("max_concurrency", self.max_concurrency, 1, ", or None")
        limits = [limit for limit in (self.timeout, self.deadline) if limit is not None]
        if self.hedge_after is not None and limits and self.hedge_after >= min(limits):
            raise ConfigError(f"hedge_after must be below timeout and deadline; found {self.hedge_after:g} s")

    def gate(self) -> AbstractAsyncContextManager[Any]:
        """Return the concurrency limit of one step."""
        return nullcontext() if self.max_concurrency is None else asyncio.Semaphore(self.max_concurrency)

    def check(self, n: int) -> None:
        """Check the values against N.

        Raises:
            ConfigError: ``n``, ``min_candidates`` or ``first`` is out of range.
        """
        _check_count("n", n, 1)
        least = self.min_candidates
        if not _is_count(least) or not 1 <= least <= n:
            raise ConfigError(f"min_candidates must be an integer from 1 to n={n}; found {least!r}")
        if self.first is not None and not (_is_count(self.first) and least <= self.first <= n):
            raise ConfigError(f"first must be from min_candidates={least} to n={n}, or None; found {self.first!r}")


def as_policy(policy: SamplingPolicy | float | None) -> SamplingPolicy:
    """Return the policy; a number is the timeout of a call in seconds, None the default policy.

    Raises:
        ConfigError: It is something else, or the number is not above 0.
    """
    found = cast("object", policy)
    if isinstance(found, SamplingPolicy):
        return found
    if found is None:
        return SamplingPolicy()
    if isinstance(found, int | float) and not isinstance(found, bool):
        return SamplingPolicy(timeout=found)
    raise ConfigError(
        f"policy must be a SamplingPolicy, the timeout of a call in seconds, or None; found {type(found).__name__}"
    )


async def respond(
    send: Callable[[], Awaitable[_T]],
    policy: SamplingPolicy,
    gate: AbstractAsyncContextManager[Any],
    give_up_at: float,
) -> _T:
    """Return the response to one request, with the timeout, retries and hedging of the policy.

    A request that is backing off releases its slot.

    Args:
        send: Starts the request.
        policy: Timeout, hedging, retries, shared limiter.
        gate: The step's own concurrency limit.
        give_up_at: Loop time after which a response is useless.
    """

    async def attempt(on_start: Callable[[], object] = lambda: None) -> _T:
        async with gate, policy.limiter or nullcontext():
            on_start()
            return await _within(policy.timeout, send())

    for tries in count():
        try:
            return await (attempt() if policy.hedge_after is None else _hedged(attempt, policy.hedge_after))
        except Exception as failure:
            seconds = retry_delay(failure, tries) if tries < policy.retries else None
            if seconds is None or asyncio.get_running_loop().time() + seconds >= give_up_at:
                raise
        await asyncio.sleep(seconds)
    raise AssertionError


async def finish(tasks: Iterable[asyncio.Task[Any]], enough: Callable[[], bool], give_up_at: float) -> None:
    """Wait until all tasks are done, there are enough results, or it is too late; then cancel and await the rest.

    A task that raises ends the wait, and its exception propagates.
    """
    everything, pending = set(tasks), set(tasks)
    now = asyncio.get_running_loop().time
    try:
        while pending and not enough():
            left = None if math.isinf(give_up_at) else max(give_up_at - now(), 0)
            done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if not done:
                break
    finally:
        await _end(everything)


def retry_delay(failure: BaseException, tries: int) -> float | None:
    """Seconds to wait before a failed request may be sent again; None if it must not be.

    ``x-should-retry`` takes precedence over the status. Without ``Retry-After-Ms`` or ``Retry-After`` the wait doubles
    from 0.5 to 8 s, less up to a quarter at random.

    Args:
        failure: What the client raised; its class may be any library's.
        tries: How often the request was sent again already.
    """
    response = getattr(failure, "response", None)
    status = next((s for s in _attributes((failure, response), "status_code", "status") if isinstance(s, int)), None)
    found = next((h for h in _attributes((response, failure), "headers") if hasattr(h, "items")), None)
    headers = {str(name).lower(): str(value) for name, value in cast("Mapping[Any, Any]", found or {}).items()}
    verdict = None if status is None else _VERDICTS.get(headers.get("x-should-retry", "").strip().lower())
    if not (_is_temporary(failure, status) if verdict is None else verdict):
        return None
    told = _retry_after(headers)
    if told is None:
        return min(_FIRST_WAIT * 2 ** min(tries, 10), _LONGEST_WAIT) * random.uniform(0.75, 1)
    return told + random.uniform(0, 0.1) if told <= LONGEST_RETRY_AFTER else None


def _is_temporary(failure: BaseException, status: int | None) -> bool:
    """Whether the same request may succeed later: lost connections and busy servers, but not an exhausted credit."""
    if status is None:
        return _lost_connection(failure)
    body: Any = getattr(failure, "body", None)
    error: Any = cast("Any", body).get("error", body) if isinstance(body, dict) else None
    fields = cast("dict[str, Any]", error) if isinstance(error, dict) else {}
    codes = (*_attributes((failure,), "code", "type"), fields.get("code"), fields.get("type"))
    return (status in _RETRIED or status >= 500) and not any(
        isinstance(code, str) and code in _NO_CREDIT for code in codes
    )


async def _hedged(attempt: Callable[..., Coroutine[Any, Any, _T]], seconds: float) -> _T:
    """Return the first success of the attempt and, ``seconds`` after its start, of a second one."""
    late = asyncio.Event()
    loop = asyncio.get_running_loop()

    def unless_answered() -> None:
        if _succeeded(first):
            raise asyncio.CancelledError

    async def again() -> _T:
        await late.wait()
        return await attempt(unless_answered)

    timers: list[asyncio.TimerHandle] = []
    first = asyncio.create_task(attempt(lambda: timers.append(loop.call_later(seconds, late.set))))
    second = asyncio.create_task(again())
    try:
        await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
        if late.is_set() and not any(map(_succeeded, (first, second))):
            await asyncio.wait({first, second})
        return (second if _succeeded(second) and not _succeeded(first) else first).result()
    finally:
        for timer in timers:
            timer.cancel()
        await _end((first, second))


async def _within(seconds: float | None, response: Awaitable[_T]) -> _T:
    """Return the response, or raise a ``TimeoutError`` that names the limit."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await response
    except TimeoutError as error:
        if limit.expired():
            raise TimeoutError(f"no answer within {seconds:g} s (timeout)") from error
        raise


async def _end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel and await the tasks, even if this task is cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    for task in tasks:
        task.cancel()
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
    for task in tasks:
        if not task.cancelled():
            task.exception()  # somebody has looked at it: asyncio logs nothing
    if cancelled is not None:
        raise cancelled


def _succeeded(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _lost_connection(failure: BaseException) -> bool:
    """Whether no answer came because the connection could not be made or broke; a time limit is something else."""
    names = {kind.__name__ for kind in type(failure).__mro__}
    return bool(names & {"ConnectionError", "APIConnectionError", "TransportError", "ClientConnectionError"}) and not (
        names & {"TimeoutError", "APITimeoutError", "TimeoutException"}
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: milliseconds, seconds or a date; None if it asks for nothing readable."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        with suppress(ValueError):
            seconds = float(headers.get(name, "")) / unit
            if not math.isnan(seconds):
                return max(seconds, 0)
    try:
        return max(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time(), 0)
    except (ValueError, OverflowError):
        return None


def _attributes(owners: Iterable[object], *names: str) -> Iterable[object]:
    return (getattr(owner, name, None) for owner in owners for name in names)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_count(name: str, value: object, least: int, rest: str = "") -> None:
    if not _is_count(value) or cast("int", value) < least:
        raise ConfigError(f"{name} must be an integer, {least} or more{rest}; found {value!r}")


def _check_seconds(name: str, value: object) -> None:
    if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
        raise ConfigError(f"{name} must be above 0 seconds, or None; found {value!r}")
