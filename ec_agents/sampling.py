"""Stage 1 - sample: one call → N candidates, concurrently; failures are results."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextvars import copy_context
from functools import cache
from typing import Any, TypeVar

from langgraph.errors import GraphBubbleUp

from ec_agents.candidates import Candidate, CandidateSet
from ec_agents.errors import ConfigError, SamplingError
from ec_agents.messages import as_candidate

_T = TypeVar("_T")


def _ignore(index: int, result: Candidate | BaseException) -> None: ...


async def sample(
    call: Callable[[int], Awaitable[Any]],
    *,
    n: int,
    min_candidates: int = 1,
    timeout: float | None = None,  # noqa: ASYNC109 - a limit of each call, not of this function
    max_concurrency: int | None = None,
    parse: Callable[[Any, int], Candidate] | None = None,
    on_result: Callable[[int, Candidate | BaseException], None] = _ignore,
) -> CandidateSet:
    """Call the model N times at once and keep what succeeds.

    A call that fails or hangs takes no other call down. Cancelling this coroutine cancels every call, and none outlives
    it. LangGraph's interrupts pass.

    Args:
        call: Index 0..N-1 → awaitable of one response.
        n: How many calls.
        min_candidates: Fewer successes than this are an error.
        timeout: Seconds that one call may take once it is under way; None waits for ever.
        max_concurrency: At most so many calls at once; None starts all.
        parse: Response and index → candidate; by default ``as_candidate``.
        on_result: Told the index and the candidate or failure of each call as it ends.

    Returns:
        Candidates in index order, whatever order they came in; raw responses and failures by index.

    Raises:
        ConfigError: An argument is out of range.
        SamplingError: Fewer than ``min_candidates`` calls succeeded; ``failures`` holds what each raised.

    Example:
        >>> import asyncio
        >>> from ec_agents import sample
        >>> async def call(index: int) -> dict:
        ...     return {"message": {"content": f"answer {index}"}, "logprobs": None, "finish_reason": "stop"}
        >>> [candidate.content for candidate in asyncio.run(sample(call, n=2)).candidates]
        ['answer 0', 'answer 1']
    """
    check_sampling(n, min_candidates, timeout, max_concurrency)
    gate = asyncio.Semaphore(max_concurrency or n)
    to_candidate = parse or as_candidate

    async def one(index: int) -> tuple[Any, Candidate] | BaseException:
        try:
            async with gate:
                response = await _within(timeout, call(index))
            candidate = to_candidate(response, index)
        except GraphBubbleUp:
            raise
        except (Exception, asyncio.CancelledError) as failure:
            if _is_cancelled():
                raise
            on_result(index, failure)
            return failure
        on_result(index, candidate)
        return response, candidate

    results = await _run_all([one(index) for index in range(n)])
    failures = {i: result for i, result in enumerate(results) if isinstance(result, BaseException)}
    drawn = {i: result for i, result in enumerate(results) if not isinstance(result, BaseException)}
    if len(drawn) < min_candidates:
        first = next(iter(failures.values()))
        raise SamplingError(
            f"{len(drawn)} of {n} calls succeeded, {min_candidates} needed (min_candidates); "
            f"first failure: {type(first).__name__}: {first}",
            failures,
        ) from first
    return CandidateSet(
        candidates=[candidate for _, candidate in drawn.values()],
        messages={i: response for i, (response, _) in drawn.items()},
        failures=failures,
    )


def run_blocking(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run a coroutine from synchronous code, in any thread, whether or not that thread has a running loop.

    All such work shares one background loop, so a client's pooled connections stay usable from one call to the next.
    The caller's context variables hold inside; interrupting the caller cancels the work.
    """
    done: Future[_T] = Future()
    context = copy_context()

    def start() -> None:
        task = loop.create_task(work(), context=context)
        task.add_done_callback(lambda task: _settle(task, done))
        tasks.append(task)

    loop, tasks = _background_loop(), list[asyncio.Task[_T]]()
    loop.call_soon_threadsafe(start)
    try:
        return done.result()
    except BaseException:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
        raise


def check_sampling(n: int, min_candidates: int, timeout: float | None, max_concurrency: int | None) -> None:
    """Check the arguments of ``sample``.

    Raises:
        ConfigError: One of them is out of range.
    """
    if n < 1:
        raise ConfigError(f"n must be 1 or more; found {n}")
    if not 1 <= min_candidates <= n:
        raise ConfigError(f"min_candidates must be from 1 to n={n}; found {min_candidates}")
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"timeout must be above 0 seconds, or None; found {timeout}")
    if max_concurrency is not None and max_concurrency < 1:
        raise ConfigError(f"max_concurrency must be 1 or more, or None; found {max_concurrency}")


async def _within(seconds: float | None, response: Awaitable[Any]) -> Any:
    """The response, or a ``TimeoutError`` that says how long was waited."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await response
    except TimeoutError as error:
        if limit.expired():
            raise TimeoutError(f"no answer within {seconds:g} s (timeout)") from error
        raise


def _is_cancelled() -> bool:
    """Whether this task is being cancelled from outside, as opposed to awaiting something that was."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _run_all(calls: list[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Run all at once; when one raises or this is cancelled, cancel the rest and see them end."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@cache
def _background_loop() -> asyncio.AbstractEventLoop:
    """The loop of synchronous callers, running in a daemon thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="ec_agents-sampling", daemon=True).start()
    return loop


def _settle(task: asyncio.Task[_T], done: Future[_T]) -> None:
    if task.cancelled():
        done.cancel()
    elif (error := task.exception()) is not None:
        done.set_exception(error)
    else:
        done.set_result(task.result())
