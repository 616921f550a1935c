"""Waiting: the first k, deadlines, second requests, retries, shared limits, and what reaches the wire."""

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from helpers.waiting import others, until
from hypothesis import given, settings, strategies as st

from ec_agents.candidates import Candidate
from ec_agents.errors import ConfigError, SamplingError
from ec_agents.policy import Limiter, SamplingPolicy, retry_delay
from ec_agents.sampling import run_blocking, sample
from ec_agents.testing import FaultServer, Reply


async def answer(index: int) -> Candidate:
    await asyncio.sleep(0)
    return Candidate(index=index, content=f"answer {index}")


async def hang(index: int) -> Any:
    await asyncio.Event().wait()


class Refused(Exception):
    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"status {status}")
        self.status_code = status
        self.response = SimpleNamespace(headers=headers)


def quota(code: str, *, wrapped: bool = True) -> Exception:
    """A 429 as OpenAI and its like send it: as the SDK raises it, or with the body only."""
    error = {"message": "no", "type": "some", "code": code}
    failure: Any = Refused(429)
    failure.body = {"error": error} if wrapped else error
    return failure


# The first k, and the deadline


@settings(deadline=None, max_examples=50)
@given(order=st.permutations(range(6)), k=st.integers(1, 6))
def test_the_first_k_are_chosen_from_and_are_in_index_order(order: list[int], k: int):
    async def step() -> Any:
        turns = {index: asyncio.Event() for index in order}
        turns[order[0]].set()

        async def call(index: int) -> Candidate:
            await turns[index].wait()
            following = order[order.index(index) + 1 :]
            if following:
                asyncio.get_running_loop().call_soon(turns[following[0]].set)
            return Candidate(index=index)

        drawn = await sample(call, n=6, policy=SamplingPolicy(first=k))
        assert not others()
        return drawn

    drawn = asyncio.run(step())
    assert [c.index for c in drawn.candidates] == sorted(order[:k])
    assert list(drawn.messages) == sorted(order[:k])
    assert sorted(drawn.failures) == sorted(order[k:])
    assert all("not needed" in str(failure) for failure in drawn.failures.values())


async def test_failures_do_not_count_among_the_first():
    async def call(index: int) -> Candidate:
        if index < 2:
            raise ValueError("boom")
        return await (answer(index) if index < 4 else hang(index))

    seen: dict[int, Any] = {}
    drawn = await sample(call, n=6, policy=SamplingPolicy(first=2), on_result=lambda i, r: seen.update({i: r}))
    assert [c.index for c in drawn.candidates] == [2, 3]
    assert {i: type(f).__name__ for i, f in drawn.failures.items()} == {
        0: "ValueError",
        1: "ValueError",
        4: "CancelledError",
        5: "CancelledError",
    }
    assert sorted(seen) == list(range(6))


async def test_what_is_there_by_the_deadline_counts():
    async def call(index: int) -> Candidate:
        return await (answer(index) if index % 2 else hang(index))

    drawn = await sample(call, n=4, policy=SamplingPolicy(deadline=0.1))
    assert [c.index for c in drawn.candidates] == [1, 3]
    assert str(drawn.failures[0]) == "no answer within 0.1 s of the start of the step (deadline)"
    assert not others()


async def test_a_deadline_without_any_answer_is_an_error_that_says_so():
    with pytest.raises(SamplingError, match=r"0 of 3 calls .* TimeoutError: no answer within 0.05 s .*deadline"):
        await sample(hang, n=3, policy=SamplingPolicy(deadline=0.05))
    assert not others()


async def test_the_deadline_counts_while_a_call_waits_for_its_place():
    drawn = await sample(
        lambda index: hang(index) if index else answer(index),
        n=3,
        policy=SamplingPolicy(deadline=0.1, limiter=Limiter(1)),
    )
    assert [c.index for c in drawn.candidates] == [0]
    assert set(drawn.failures) == {1, 2}


async def test_a_step_that_is_cancelled_twice_still_sees_its_calls_end():
    begun: list[int] = []
    ending: list[int] = []
    ended: list[int] = []

    async def call(index: int) -> Any:
        begun.append(index)
        try:
            await hang(index)
        finally:
            ending.append(index)
            for _ in range(5):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)
            ended.append(index)

    step = asyncio.create_task(sample(call, n=3))
    for reached in (begun, ending):
        await until(lambda reached=reached: len(reached) == 3)  # type: ignore[misc]
        step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert sorted(ended) == [0, 1, 2]
    assert not others()


# Second requests


class Attempts:
    """Calls whose first attempt at index 0 behaves as told."""

    def __init__(self, first: Callable[[], Any], second: Callable[[], Any] | None = None) -> None:
        self.counts: Counter[int] = Counter()
        self.cancelled = 0
        self._ways = [first, second or first]

    async def __call__(self, index: int) -> Candidate:
        self.counts[index] += 1
        try:
            if index == 0:
                await self._ways[self.counts[0] - 1]()
            return Candidate(index=index, content=f"attempt {self.counts[index]}")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def boom() -> None:
    raise ValueError("boom")


async def late_boom() -> None:
    await asyncio.sleep(0.1)
    raise ValueError("late boom")


async def nothing() -> None: ...


HEDGED = SamplingPolicy(hedge_after=0.03)


async def test_straggler():
    """A straggler is sent once more, and the loser is cancelled."""
    call = Attempts(lambda: hang(0), nothing)
    drawn = await sample(call, n=3, policy=HEDGED)
    assert [c.content for c in drawn.candidates] == ["attempt 2", "attempt 1", "attempt 1"]
    assert call.counts == {0: 2, 1: 1, 2: 1}
    assert call.cancelled == 1
    assert not others()


async def test_the_first_attempt_may_still_win():
    call = Attempts(lambda: asyncio.sleep(0.1), lambda: hang(0))
    drawn = await sample(call, n=1, policy=HEDGED)
    assert drawn.candidates[0].index == 0
    assert (call.counts[0], call.cancelled) == (2, 1)


@pytest.mark.parametrize(
    ("first", "second", "attempts", "failure"),
    [
        (boom, nothing, 1, "boom"),
        (late_boom, nothing, 2, None),
        (lambda: asyncio.sleep(0.1), boom, 2, None),
        (late_boom, boom, 2, "late boom"),
    ],
)
async def test_the_first_success_of_the_two_counts(first: Any, second: Any, attempts: int, failure: str | None):
    call = Attempts(first, second)
    drawn = await sample(call, n=2, policy=HEDGED)
    assert call.counts[0] == attempts
    assert str(drawn.failures.get(0)) == str(failure)
    assert not others()


async def test_a_second_request_keeps_to_the_limits():
    call = Attempts(lambda: asyncio.sleep(0.1))
    policy = SamplingPolicy(hedge_after=0.03, max_concurrency=1, limiter=Limiter(1), timeout=5)
    drawn = await sample(call, n=2, policy=policy)
    assert len(drawn.candidates) == 2
    assert call.counts[0] == 1


# Retries


async def test_only_what_failed_is_sent_again():
    counts: Counter[int] = Counter()

    async def call(index: int) -> Candidate:
        counts[index] += 1
        if index and counts[index] <= index:
            raise Refused(503, **{"retry-after": "0.01"})
        return await answer(index)

    drawn = await sample(call, n=4, policy=SamplingPolicy(retries=2))
    assert [c.index for c in drawn.candidates] == [0, 1, 2]
    assert str(drawn.failures[3]) == "status 503"
    assert counts == {0: 1, 1: 2, 2: 3, 3: 3}


async def test_a_wait_beyond_the_deadline_is_not_begun():
    counts: Counter[int] = Counter()

    async def call(index: int) -> Candidate:
        counts[index] += 1
        if index:
            raise Refused(429, **{"retry-after": "100"})
        return await answer(index)

    drawn = await sample(call, n=2, policy=SamplingPolicy(retries=5, deadline=60))
    assert counts == {0: 1, 1: 1}
    assert str(drawn.failures[1]) == "status 429"


async def test_a_call_that_waits_to_be_sent_again_gives_up_its_place():
    order: list[int] = []

    async def call(index: int) -> Candidate:
        order.append(index)
        if order.count(0) == 1 and index == 0:
            raise Refused(429, **{"retry-after": "0.05"})
        return await answer(index)

    drawn = await sample(call, n=3, policy=SamplingPolicy(retries=1, limiter=Limiter(1)))
    assert len(drawn.candidates) == 3
    assert order == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("failure", "least", "most"),
    [
        (Refused(429), 0.375, 0.5),
        (Refused(500), 0.375, 0.5),
        (Refused(529), 0.375, 0.5),
        (Refused(429, **{"retry-after": "7"}), 7, 7.1),
        (Refused(429, **{"retry-after": "-1"}), 0, 0.1),
        (Refused(429, **{"retry-after-ms": "250"}), 0.25, 0.35),
        (Refused(503, **{"retry-after": "nonsense"}), 0.375, 0.5),
        (ConnectionResetError("reset"), 0.375, 0.5),
        (openai.APIConnectionError(request=None), 0.375, 0.5),  # type: ignore[arg-type]
        (Refused(429, **{"Retry-After-Ms": "250", "Retry-After": "7"}), 0.25, 0.35),
        (Refused(429, **{"Retry-After-Ms": "soon", "Retry-After": "7"}), 7, 7.1),
        (Refused(429, **{"Retry-After": "nan"}), 0.375, 0.5),
        (Refused(400, **{"X-Should-Retry": "true"}), 0.375, 0.5),
        (Refused(409, **{"x-should-retry": "perhaps"}), 0.375, 0.5),
        (quota("rate_limit_exceeded"), 0.375, 0.5),
    ],
)
def test_how_long_is_waited_before_a_request_is_sent_again(failure: Exception, least: float, most: float):
    delay = retry_delay(failure, 0)
    assert delay is not None
    assert least <= delay <= most


def test_a_date_to_wait_for_is_honoured():
    delay = retry_delay(Refused(429, **{"retry-after": formatdate(time.time() + 30, usegmt=True)}), 0)
    assert delay is not None
    assert 20 < delay < 31


@pytest.mark.parametrize(
    "failure",
    [
        Refused(400),
        Refused(401),
        Refused(404),
        Refused(429, **{"retry-after": "121"}),
        Refused(429, **{"Retry-After-Ms": "121000"}),
        Refused(503, **{"X-Should-Retry": "false"}),
        Refused(400, **{"x-should-retry": "perhaps"}),
        quota("insufficient_quota"),
        quota("insufficient_quota", wrapped=False),
        ValueError("boom"),
        TimeoutError("slow"),
        openai.APITimeoutError(request=None),  # type: ignore[arg-type]
        asyncio.CancelledError(),
    ],
)
def test_what_is_never_sent_again(failure: BaseException):
    assert retry_delay(failure, 0) is None


@given(st.integers(0, 10_000))
def test_waits_never_exceed_eight_seconds(tries: int):
    assert 0 < (retry_delay(Refused(503), tries) or 0) <= 8


# A shared limit


def peaks(limiter: Limiter) -> tuple[Callable[[int], Any], list[int]]:
    running, seen, lock = [0], [0], threading.Lock()

    async def call(index: int) -> Candidate:
        with lock:
            running[0] += 1
            seen[0] = max(seen[0], running[0])
        await asyncio.sleep(0.005)
        with lock:
            running[0] -= 1
        return Candidate(index=index)

    return call, seen


def test_a_limiter_holds_over_threads_and_event_loops():
    limiter = Limiter(3)
    policy = SamplingPolicy(limiter=limiter)
    call, seen = peaks(limiter)
    drawn: list[Any] = []

    def work(number: int) -> None:
        def step() -> Any:
            return sample(call, n=8, policy=policy)

        drawn.append(asyncio.run(step()) if number % 2 else run_blocking(step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [len(each.candidates) for each in drawn] == [8] * 6
    assert seen == [3]
    assert limiter._free == 3


def test_a_limiter_serves_one_event_loop_after_the_other():
    policy = SamplingPolicy(limiter=Limiter(2))
    for _ in range(3):
        assert len(asyncio.run(sample(answer, n=5, policy=policy)).candidates) == 5


async def test_waiters_are_served_in_turn():
    order: list[int] = []

    async def call(index: int) -> Candidate:
        order.append(index)
        return await answer(index)

    await sample(call, n=6, policy=SamplingPolicy(limiter=Limiter(1)))
    assert order == list(range(6))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.lists(st.integers(0, 6), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_no_place_is_lost_when_waiters_are_cancelled(limit: int, pauses: list[int], rng: random.Random):
    limiter = Limiter(limit)

    async def hold(turns: int) -> None:
        async with limiter:
            for _ in range(turns):
                await asyncio.sleep(0)

    async def main() -> None:
        tasks = [asyncio.create_task(hold(turns)) for turns in pauses]
        for _ in range(5):
            await asyncio.sleep(0)
            rng.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert limiter._free == limit


def test_waiter_of_a_closed_loop():
    """It does not block the others."""
    limiter = Limiter(1)

    async def wait() -> None:
        async with limiter:
            pass

    keeper, gone = asyncio.new_event_loop(), asyncio.new_event_loop()
    keeper.run_until_complete(limiter.__aenter__())
    waiter = gone.create_task(wait())
    gone.run_until_complete(asyncio.sleep(0.01))
    gone.close()
    keeper.run_until_complete(limiter.__aexit__(None, None, None))
    keeper.run_until_complete(wait())
    keeper.close()
    assert not waiter.done()
    waiter._log_destroy_pending = False  # type: ignore[attr-defined]


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": 0}, r"first must be from min_candidates=1 to n=4, or None; found 0"),
        ({"first": 5}, r"first must be .* found 5"),
        ({"first": 2, "min_candidates": 3}, r"first must be from min_candidates=3 to n=4"),
        ({"deadline": 0}, "deadline must be above 0 seconds, or None; found 0"),
        ({"hedge_after": -1}, "hedge_after must be above 0 seconds"),
        ({"hedge_after": float("nan")}, "hedge_after must be above 0 seconds"),
        ({"hedge_after": 5, "timeout": 5}, "hedge_after must be below timeout and deadline; found 5 s"),
        ({"hedge_after": 5, "deadline": 3}, "hedge_after must be below timeout and deadline"),
        ({"retries": -1}, "retries must be an integer, 0 or more; found -1"),
        ({"retries": 1.5}, "retries must be an integer, 0 or more; found 1.5"),
        ({"timeout": "5"}, "timeout must be above 0 seconds, or None; found '5'"),
        ({"min_candidates": True}, "min_candidates must be an integer from 1 to n=4; found True"),
    ],
)
async def test_a_policy_out_of_range_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        await sample(answer, n=4, policy=SamplingPolicy(**arguments))


def test_a_limit_below_one_is_refused():
    with pytest.raises(ConfigError, match="limit must be an integer, 1 or more; found 0"):
        Limiter(0)


async def test_number_as_policy():
    """A number is the timeout of each call."""

    async def call(index: int) -> Any:
        return await (hang(index) if index == 0 else answer(index))

    drawn = await sample(call, n=2, policy=0.05)
    assert "0.05 s (timeout)" in str(drawn.failures[0])


def test_synchronous_step_in_a_sampled_call():
    """A synchronous step inside a sampled call is refused instead of waiting for itself."""

    async def call(index: int) -> Any:
        return run_blocking(lambda: sample(answer, n=1))

    with pytest.raises(SamplingError, match="ConfigError: a synchronous call .* deadlock"):
        run_blocking(lambda: sample(call, n=1))


# On the wire


@pytest.mark.parametrize(
    ("policy", "faults", "found", "abandoned"),
    [
        (SamplingPolicy(first=2), ["hang", None, "hang", None], 2, 2),
        (SamplingPolicy(deadline=1), ["hang", None, None, "hang"], 2, 2),
        (SamplingPolicy(timeout=1), ["hang", None, None, None], 3, 1),
        (SamplingPolicy(hedge_after=0.5), ["hang", None, None, None, None], 4, 1),
    ],
    ids=["first", "deadline", "timeout", "hedge"],
)
async def test_losing_requests_are_cancelled_on_the_wire(
    policy: SamplingPolicy, faults: list[str | None], found: int, abandoned: int
):
    with FaultServer([Reply(content="hello")], faults=faults) as server:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "hi"}]
            drawn = await sample(
                lambda _: client.chat.completions.create(model="m", messages=messages), n=4, policy=policy
            )
            await until(lambda: server.abandoned == abandoned and server.in_flight == 0)
        assert len(drawn.candidates) == found
        assert len(server.requests) == len(faults)
        await until(lambda: server.connections == 0)


async def test_rate_limit():
    """The step waits for it and does not repeat finished candidates."""
    faults = ["status_429", None, None, None, None]
    with FaultServer([Reply(content="hello")], faults=faults) as server:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "hi"}]
            drawn = await sample(
                lambda _: client.chat.completions.create(model="m", messages=messages),
                n=4,
                policy=SamplingPolicy(retries=1),
            )
        assert len(drawn.candidates) == 4
        assert len(server.requests) == 5
