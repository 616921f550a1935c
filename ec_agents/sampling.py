"""Stage 1 - sample: one call → N candidates, concurrently; failures are results."""

import asyncio
import math
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import replace
from functools import cache, partial
from typing import Any, ParamSpec, TypeVar, cast

from ec_agents import budget
from ec_agents.candidates import Candidate, CandidateSet
from ec_agents.effort import Effort, check_effort, why
from ec_agents.errors import ConfigError, SamplingError
from ec_agents.messages import as_candidate
from ec_agents.policy import SamplingPolicy, as_policy, finish, respond

_T = TypeVar("_T")
_P = ParamSpec("_P")


def _ignore(index: int, result: Candidate | BaseException) -> None: ...


async def sample(
    call: Callable[[int], Awaitable[Any]],
    *,
    n: int,
    policy: SamplingPolicy | float | None = None,
    effort: Effort | None = None,
    parse: Callable[[Any, int], Candidate] = as_candidate,
    on_result: Callable[[int, Candidate | BaseException], None] = _ignore,
) -> CandidateSet:
    """Sample N responses concurrently and keep those that succeed.

    A failed call does not affect the others. Cancelling this coroutine cancels every call, and no call outlives it.
    LangGraph's interrupts propagate.

    Args:
        call: Index 0..N-1 → awaitable of one response. A retried call gets the same index.
        n: How many candidates, or the most with an effort.
        policy: Timeouts, retries, hedging and limits; a number is the timeout of a call in seconds. None waits for all.
        effort: Decides after each response whether to draw more, up to ``n``; None draws all N at once.
        parse: Response and index → candidate.
        on_result: Called with the index and the candidate or failure of each call as it ends.

    Returns:
        Candidates in index order, whatever order they came in; raw responses and failures by index.

    Raises:
        ConfigError: An argument is out of range.
        SamplingError: Fewer than ``min_candidates`` calls succeeded; ``failures`` holds what each raised.
        BudgetExceeded: A budget around this step allows no call.

    Example:
        >>> import asyncio
        >>> from ec_agents import sample
        >>> async def call(index: int) -> dict:
        ...     return {"message": {"content": f"answer {index}"}, "logprobs": None, "finish_reason": "stop"}
        >>> [candidate.content for candidate in asyncio.run(sample(call, n=2)).candidates]
        ['answer 0', 'answer 1']
    """
    step = _Sampling(call, n, policy=as_policy(policy), effort=effort, parse=parse, on_result=on_result)
    await step.run()
    return step.result()


class _Sampling:
    """The calls of one step."""

    def __init__(
        self,
        call: Callable[[int], Awaitable[Any]],
        n: int,
        *,
        policy: SamplingPolicy,
        effort: Effort | None,
        parse: Callable[[Any, int], Candidate],
        on_result: Callable[[int, Candidate | BaseException], None],
    ) -> None:
        policy.check(n)
        if effort is not None:
            check_effort(effort, n)
        self._call, self._n, self._policy, self._effort = call, n, policy, effort
        self._parse, self._on_result = parse, on_result
        self._gate = policy.gate()
        self._drawn: dict[int, tuple[Any, Candidate]] = {}
        self._failures: dict[int, BaseException] = {}
        self._waves: list[int] = []
        self._is_cut = False
        self._seconds = min(math.inf if policy.deadline is None else policy.deadline, budget.seconds_left())

    async def run(self) -> None:
        """Draw one wave after the other, until there is enough or it is too late."""
        now = asyncio.get_running_loop().time
        give_up_at = now() + self._seconds
        while now() < give_up_at and not self._is_cut and (more := self._affordable()):
            started = sum(self._waves)
            self._waves.append(more)
            wave = [asyncio.create_task(self._one(i, give_up_at)) for i in range(started, started + more)]
            await finish(wave, self._is_enough, give_up_at)
            for index in sorted({*range(started, started + more)} - self._drawn.keys() - self._failures.keys()):
                self._failed(index, self._unanswered())

    def result(self) -> CandidateSet:
        """Return what was drawn.

        Raises:
            SamplingError: It is too little.
        """
        needed = self._needed()
        if len(self._drawn) < needed and (self._is_cut or not budget.affordable(1)):
            raise budget.exceeded()
        if len(self._drawn) < needed:
            raise _too_few(len(self._drawn), sum(self._waves), needed, self._failures)
        return CandidateSet(
            candidates=self._candidates(),
            messages={index: response for index, (response, _) in sorted(self._drawn.items())},
            failures=dict(sorted(self._failures.items())),
            waves=tuple(self._waves),
            stopped=self._why(),
        )

    def _why(self) -> str:
        """Explain why fewer than N calls were started; empty where neither an effort nor a budget decided."""
        if self._is_cut:
            return "the budget allows no more"
        return "" if self._effort is None else why(self._effort, self._candidates())

    def _candidates(self) -> list[Candidate]:
        return [candidate for _, (_, candidate) in sorted(self._drawn.items())]

    def _needed(self) -> int:
        """Return the fewest candidates on which the step may act."""
        least: Callable[[Sequence[Candidate]], int] | None = getattr(self._effort, "least", None)
        return max(self._policy.min_candidates, 1 if least is None else least(self._candidates()))

    def _affordable(self) -> int:
        """Return how many calls to start now, as far as the budgets allow; a wave that they cut is the last."""
        wanted = self._more()
        allowed = budget.affordable(wanted)
        self._is_cut = allowed < wanted
        return allowed

    def _more(self) -> int:
        """Return how many calls to start now."""
        left = self._n - sum(self._waves)
        if self._effort is None or left == 0:
            return left
        if self._is_first_k():
            return 0
        return min(self._asked() or max(self._needed() - len(self._drawn), 0), left)

    def _asked(self) -> int:
        """Return how many more candidates the effort wants, those in flight included."""
        may_come = self._n - len(self._drawn) - len(self._failures)
        found = 0 if self._effort is None else cast("object", self._effort(self._candidates(), may_come))
        if not isinstance(found, int) or found < 0:
            raise ConfigError(f"effort must return how many more candidates to draw, 0 or more; found {found!r}")
        return found

    def _is_first_k(self) -> bool:
        return self._policy.first is not None and len(self._drawn) >= self._policy.first

    def _is_enough(self) -> bool:
        """Tell whether calls in flight are no longer needed."""
        if self._is_first_k():
            return True
        return self._effort is not None and len(self._drawn) >= self._needed() and self._asked() == 0

    async def _one(self, index: int, give_up_at: float) -> None:
        try:
            response, candidate = await respond(partial(self._answer, index), self._policy, self._gate, give_up_at)
        except (Exception, asyncio.CancelledError) as failure:
            if _is_cancelled() or _is_interrupt(failure):
                raise
            self._failed(index, failure)
        else:
            if not self._is_first_k():
                self._drawn[index] = response, candidate
                self._on_result(index, candidate)

    async def _answer(self, index: int) -> tuple[Any, Candidate]:
        """Make one call and parse its response: an error that the response reports is retried as a failed call is."""
        with budget.one_call():
            response, seconds = await timed(lambda: self._call(index))
            candidate = with_seconds(self._parse(response, index), seconds)
            budget.pay(candidate.usage)
        return response, candidate

    def _failed(self, index: int, failure: BaseException) -> None:
        self._failures[index] = failure
        self._on_result(index, failure)

    def _unanswered(self) -> BaseException:
        """Explain why a cancelled call is missing from the results."""
        if not self._is_enough():
            limit = "deadline" if self._seconds == self._policy.deadline else "budget"
            return TimeoutError(f"no answer within {self._seconds:g} s of the start of the step ({limit})")
        if self._is_first_k():
            return asyncio.CancelledError(f"not needed: {self._policy.first} other calls succeeded before (first)")
        return asyncio.CancelledError(f"not needed: {why(self._effort, self._candidates()) if self._effort else ''}")


def run_blocking(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run a coroutine from synchronous code, in any thread, whether or not that thread has a running loop.

    All such work shares one background loop, so a client's pooled connections stay usable from one call to the next.
    The caller's context variables are visible inside; interrupting the caller cancels the work.

    Raises:
        ConfigError: The caller already runs on that loop and would deadlock.
        asyncio.CancelledError: The caller is work of ``in_thread`` that was given up.
    """
    (loop, thread), own, around = _background_loop(), _Call(), _CALL.get()
    if threading.current_thread() is thread:
        raise ConfigError(
            "a synchronous call inside a sampled call would deadlock; await the asynchronous method instead"
        )
    done: Future[_T] = Future()
    context = copy_context()

    def start() -> None:
        task = loop.create_task(work(), context=context)
        task.add_done_callback(lambda task: _settle(task, done))
        for call in (own, around):
            if call is not None:
                call.add(task)

    try:
        loop.call_soon_threadsafe(start)
        return done.result()
    except BaseException:
        if around is not None and around.given_up:
            # A BaseException, so that no retry around the call takes it for a failure.
            raise asyncio.CancelledError("the step gave this call up") from None
        own.cancel()
        raise


async def in_thread(work: Callable[[], _T]) -> _T:
    """Run synchronous work in a daemon thread of its own, with the caller's context variables.

    Cancelling this coroutine cancels whatever the work awaits through ``run_blocking``, now or later. Other work cannot
    be interrupted: its thread runs on until the work is done, but does not keep the process alive.
    """
    call, context = _Call(), copy_context()
    context.run(_CALL.set, call)
    try:
        return await asyncio.wrap_future(_in_daemon_thread(context.run, _without_stop_iteration, work))
    except asyncio.CancelledError:
        call.give_up()
        raise


def may_be_given_up() -> bool:
    """Tell whether this code is work of ``in_thread``, so that whoever waits for it may stop waiting."""
    return _CALL.get() is not None


async def timed(send: Callable[[], Awaitable[_T]]) -> tuple[_T, float]:
    """Return the response to a request and the seconds it took."""
    now = asyncio.get_running_loop().time
    started = now()
    return await send(), now() - started


def with_seconds(candidate: Candidate, seconds: float) -> Candidate:
    """Return the candidate with its latency, unless it has one from an earlier attempt of the step."""
    return candidate if candidate.seconds is not None else replace(candidate, seconds=seconds)


def _too_few(found: int, n: int, needed: int, failures: dict[int, BaseException]) -> SamplingError:
    first = failures[min(failures)]
    error = SamplingError(
        f"{found} of {n} calls succeeded, {needed} needed (min_candidates); "
        f"first failure: {type(first).__name__}: {first}",
        dict(sorted(failures.items())),
    )
    error.__cause__ = first
    return error


def _is_interrupt(failure: BaseException) -> bool:
    """Tell whether this is an exception by which LangGraph steers a graph; there is none unless LangGraph is loaded."""
    errors: Any = sys.modules.get("langgraph.errors")
    return errors is not None and isinstance(failure, errors.GraphBubbleUp)


def _is_cancelled() -> bool:
    """Tell whether this task itself is being cancelled, as opposed to awaiting something cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Call:
    """Synchronous work that may be given up, and the tasks of the background loop that it waits for."""

    def __init__(self) -> None:
        self.given_up = False
        self._tasks: set[asyncio.Task[Any]] = set()

    def add(self, task: asyncio.Task[Any]) -> None:
        """Have a new task cancelled with the call; in the background loop."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.given_up:
            task.cancel()

    def cancel(self) -> None:
        """Cancel the tasks, from any thread."""
        _background_loop()[0].call_soon_threadsafe(lambda: [task.cancel() for task in self._tasks])

    def give_up(self) -> None:
        """Cancel the tasks, and those to come, from any thread."""
        self.given_up = True
        self.cancel()


_CALL: ContextVar[_Call | None] = ContextVar("ec_agents_call", default=None)
"""The work of ``in_thread`` that this code is part of."""


def _in_daemon_thread(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
    """Start work in a thread that does not keep the process alive; those of an executor are joined at exit."""
    done: Future[_T] = Future()

    def run() -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            result = work(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            done.set_exception(error)
        else:
            done.set_result(result)

    threading.Thread(target=run, name="ec_agents-call", daemon=True).start()
    return done


def _without_stop_iteration(work: Callable[[], _T]) -> _T:
    """Do the work; a ``StopIteration``, which no future can hold, becomes a ``RuntimeError``."""
    try:
        return work()
    except StopIteration as error:
        raise RuntimeError("a call raised StopIteration") from error


class _DaemonThreads(ThreadPoolExecutor):
    """An executor for event loops whose calls do not keep the process alive, however long they hang."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Start the call in a thread of its own."""
        return _in_daemon_thread(fn, *args, **kwargs)


@cache
def _background_loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """Return the event loop that serves synchronous callers, and its daemon thread."""
    loop = asyncio.new_event_loop()
    loop.set_default_executor(_DaemonThreads())
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
