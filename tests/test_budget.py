"""What a run may spend."""

import asyncio
import threading
from typing import Any

import pytest
from hypothesis import given, strategies as st

from ec_agents import Budget, BudgetExceeded, Candidate, ConfigError, Price, sample
from ec_agents.budget import calls_of
from ec_agents.sampling import run_blocking

USAGE = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}


async def step(n: int = 4, usage: Any = USAGE, fails: int = 0) -> Any:
    sent: list[int] = []

    async def call(index: int) -> Any:
        sent.append(index)
        await asyncio.sleep(0)
        if index < fails:
            raise ValueError("x")
        return Candidate(index=index, content="a", usage=usage)

    found = await sample(call, n=n)
    assert len(sent) == len(found.candidates) + len(found.failures)
    return found


async def until_spent(n: int, drawn: list[int]) -> BudgetExceeded:
    """Run steps until the budget ends them; ``drawn`` takes their numbers of candidates."""
    try:
        while True:
            drawn.append(len((await step(n)).candidates))
    except BudgetExceeded as error:
        return error


async def test_everything_inside_is_counted():
    """Losing candidates, failed calls, other tasks, threads and nested budgets."""
    with Budget(calls=1000) as outer:
        await asyncio.gather(step(), step(fails=1))
        async with Budget(tokens=10**6) as inner:
            await asyncio.to_thread(lambda: run_blocking(step))
    assert (inner.spent.calls, inner.spent.tokens) == (4, 480)
    assert (outer.spent.calls, outer.spent.responses, outer.spent.input_tokens) == (12, 11, 1100)
    await step()
    assert outer.spent.calls == 12


@given(st.integers(1, 60), st.integers(1, 8))
def test_calls_are_never_exceeded(limit: int, n: int):
    """A limit of calls is exact: the last step gets fewer candidates, then the run ends."""

    async def run() -> list[int]:
        drawn: list[int] = []
        with Budget(calls=limit) as budget:
            error = await until_spent(n, drawn)
        assert f"{limit} of {limit} calls" in str(error)
        assert budget.spent.calls == limit
        return drawn

    drawn = asyncio.run(run())
    assert sum(drawn) == limit
    assert all(count == n for count in drawn[:-1])


@given(st.integers(1, 5000))
def test_tokens_are_exceeded_by_the_calls_in_flight_at_most(limit: int):
    """What a call costs is known when it has ended."""

    async def run() -> Budget:
        with Budget(tokens=limit) as budget:
            error = await until_spent(4, [])
        assert error.limit == "tokens"
        return budget

    budget = asyncio.run(run())
    assert limit <= budget.spent.tokens < limit + 4 * 120


async def test_low_budget_draws_fewer():
    """By the mean of the calls before, three more fit."""
    with Budget(tokens=120 * 7 + 1) as budget:
        assert len((await step(4)).candidates) == 4
        found = await step(4)
        assert len(found.candidates) == 3
        assert found.stopped == "the budget allows no more"
        assert len((await step(4)).candidates) == 1
        with pytest.raises(BudgetExceeded, match="tokens; in all 8 calls, 800 input and 160 output tokens"):
            await step(4)
    assert budget.spent.tokens == 960


async def test_cost():
    """Cached tokens have their own price; models without a price are named once."""
    price = Price(input=10.0, output=100.0, cached=1.0)
    with Budget(cost=1.0, prices={"m": price}) as budget, calls_of("m"):
        await step(1, usage={"input_tokens": 1000, "cached_tokens": 400, "output_tokens": 10})
    assert budget.spent.cost == pytest.approx((600 * 10 + 400 * 1 + 10 * 100) / 1e6)


async def test_unknown_price(caplog: pytest.LogCaptureFixture):
    with Budget(cost=1.0, prices={"m": Price(input=1, output=1)}) as budget, calls_of("other"):
        await step(4)
        await step(4)
    assert (budget.spent.cost, budget.spent.unpriced, budget.spent.tokens) == (0.0, {"other"}, 960)
    assert caplog.text.count("the cost of other is unknown") == 1


async def test_seconds():
    """Time ends calls in flight."""

    async def hang(index: int) -> Any:
        await asyncio.Event().wait()

    with Budget(seconds=0.05), pytest.raises(BudgetExceeded, match="seconds"):
        await sample(hang, n=2)


async def test_one_budget_in_several_tasks():
    """Tasks may enter the same budget at once, and leave it in any order; no call after it is counted."""
    budget = Budget(calls=1000)

    async def work(number: int) -> None:
        with budget, Budget(calls=100) as own:
            await step(number)
        assert own.spent.calls == number
        await step(1)

    await asyncio.gather(work(3), work(1), work(2))
    with budget, budget:
        pass
    await step(1)
    assert budget.spent.calls == 6


async def test_tightest_of_nested_budgets():
    with Budget(calls=3), Budget(calls=100) as inner:
        assert len((await step(8)).candidates) == 3
        with pytest.raises(BudgetExceeded, match="3 of 3 calls"):
            await step(8)
    assert inner.spent.calls == 3


def test_threads_share_a_ledger():
    """Counting is safe between threads."""
    budget = Budget(calls=10**6)

    def work() -> None:
        for _ in range(2000):
            budget.began()
            budget.pay(USAGE, "m")
            budget.ended()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (budget.spent.calls, budget.spent.tokens) == (8000, 8000 * 120)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "at least one limit"),
        ({"tokens": 0}, "tokens must be an integer above 0; found 0"),
        ({"calls": 1.5}, "calls must be an integer above 0; found 1.5"),
        ({"seconds": "3"}, "seconds must be above 0; found '3'"),
        ({"cost": float("nan"), "prices": {"m": Price(input=1, output=1)}}, "cost must be above 0; found nan"),
        ({"cost": 1.0}, "cost needs prices="),
        ({"cost": 1.0, "prices": {"m": 3}}, "the price of 'm' must be a Price"),
    ],
)
def test_refused(given: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Budget(**given)


def test_negative_price():
    with pytest.raises(ConfigError, match="price output must be 0 or more"):
        Price(input=1.0, output=-1.0)
