"""Stage 1 - sample: one call → N candidates, concurrently; failures are results."""

import asyncio
import math
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from langgraph.errors import GraphBubbleUp

from ec_agents.candidates import Candidate, CandidateSet
from ec_agents.errors import ConfigError, SamplingError
from ec_agents.messages import as_candidate
from ec_agents.policy import SamplingPolicy, as_policy, finish, respond

_T = TypeVar("_T")


def _ignore(index: int, result: Candidate | BaseException) -> None: ...


async def sample(
    call: Callable[[int], Awaitable[Any]],
    *,
    n: int,
    policy: SamplingPolicy | float | None = None,
    parse: Callable[[Any, int], Candidate] = as_candidate,
    on_result: Callable[[int, Candidate | BaseException], None] = _ignore,
) -> CandidateSet:
    """Sample N responses concurrently and keep those that succeed.

    A failed call does not affect the others. Cancelling this coroutine cancels every call, and no call outlives it.
    LangGraph's interrupts propagate.

    Args:
        call: Index 0..N-1 → awaitable of one response. A retried call gets the same index.
        n: How many candidates.
        policy: Timeouts, retries, hedging and limits; a number is the timeout of a call in seconds. None waits for all.
        parse: Response and index → candidate.
        on_result: Called with the index and the candidate or failure of each call as it ends.

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
    policy = as_policy(policy)
    policy.check(n)
    gate = policy.gate()
    give_up_at = math.inf if policy.deadline is None else asyncio.get_running_loop().time() + policy.deadline
    drawn: dict[int, tuple[Any, Candidate]] = {}
    failures: dict[int, BaseException] = {}

    def enough() -> bool:
        return policy.first is not None and len(drawn) >= policy.first

    async def one(index: int) -> None:
        try:
            response, seconds = await respond(lambda: timed(call(index)), policy, gate, give_up_at)
            candidate = with_seconds(parse(response, index), seconds)
        except GraphBubbleUp:
            raise
        except (Exception, asyncio.CancelledError) as failure:
            if _is_cancelled():
                raise
            failures[index] = failure
            on_result(index, failure)
        else:
            if not enough():
                drawn[index] = response, candidate
                on_result(index, candidate)

    await finish([asyncio.create_task(one(index)) for index in range(n)], enough, give_up_at)
    for index in sorted(set(range(n)) - drawn.keys() - failures.keys()):
        failures[index] = _unanswered(policy, enough=enough())
        on_result(index, failures[index])
    if len(drawn) < policy.min_candidates:
        raise _too_few(len(drawn), n, policy.min_candidates, failures)
    return CandidateSet(
        candidates=[candidate for _, (_, candidate) in sorted(drawn.items())],
        messages={index: response for index, (response, _) in sorted(drawn.items())},
        failures=dict(sorted(failures.items())),
    )


def run_blocking(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run a coroutine from synchronous code, in any thread, whether or not that thread has a running loop.

    All such work shares one background loop, so a client's pooled connections stay usable from one call to the next.
    The caller's context variables are visible inside; interrupting the caller cancels the work.

    Raises:
        ConfigError: The caller already runs on that loop and would deadlock.
    """
    (loop, thread), tasks = _background_loop(), list[asyncio.Task[_T]]()
    if threading.current_thread() is thread:
        raise ConfigError(
            "a synchronous call inside a sampled call would deadlock; await the asynchronous method instead"
        )
    done: Future[_T] = Future()
    context = copy_context()

    def start() -> None:
        task = loop.create_task(work(), context=context)
        task.add_done_callback(lambda task: _settle(task, done))
        tasks.append(task)

    loop.call_soon_threadsafe(start)
    try:
        return done.result()
    except BaseException:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
        raise


async def timed(response: Awaitable[_T]) -> tuple[_T, float]:
    """Return the response and the seconds it took."""
    now = asyncio.get_running_loop().time
    started = now()
    return await response, now() - started


def with_seconds(candidate: Candidate, seconds: float) -> Candidate:
    """Return the candidate with its latency, unless it has one from an earlier attempt of the step."""
    return candidate if candidate.seconds is not None else replace(candidate, seconds=seconds)


def _unanswered(policy: SamplingPolicy, *, enough: bool) -> BaseException:
    """Explain why a cancelled call is missing from the results."""
    if enough:
        return asyncio.CancelledError(f"not needed: {policy.first} other calls succeeded before (first)")
    return TimeoutError(f"no answer within {policy.deadline or 0:g} s of the start of the step (deadline)")


def _too_few(found: int, n: int, needed: int, failures: dict[int, BaseException]) -> SamplingError:
    first = failures[min(failures)]
    error = SamplingError(
        f"{found} of {n} calls succeeded, {needed} needed (min_candidates); "
        f"first failure: {type(first).__name__}: {first}",
        dict(sorted(failures.items())),
    )
    error.__cause__ = first
    return error


def _is_cancelled() -> bool:
    """Tell whether this task itself is being cancelled, as opposed to awaiting something cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@cache
def _background_loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """Return the event loop that serves synchronous callers, and its daemon thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="ec_agents-sampling", daemon=True)
    thread.start()
    return loop, thread


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_background_loop.cache_clear)  # a forked child has the loop but not its thread


def _settle(task: asyncio.Task[_T], done: Future[_T]) -> None:
    if task.cancelled():
        done.cancel()
    elif (error := task.exception()) is not None:
        done.set_exception(error)
    else:
        done.set_result(task.result())
