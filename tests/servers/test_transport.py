"""Calls that share one request: whoever is cancelled, everybody else is answered."""

# pyright: reportArgumentType=false

import asyncio
import json
import random
from collections import Counter
from typing import Any

import pytest

from ec_agents.servers import transport
from ec_agents.servers.transport import Answer, Transport


class FakeClient:
    """Stands for the SDK's client: answers after some turns of the loop with as many choices as asked."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.under_way = 0

    async def get(self) -> "FakeClient":
        return self

    async def post(self, *, body: dict[str, Any], **_: Any) -> bytes:
        self.under_way += 1
        try:
            for _turn in range(self.rng.randrange(5)):
                await asyncio.sleep(0)
        finally:
            self.under_way -= 1
        message = {"role": "assistant", "content": body["messages"][0]["content"]}
        return json.dumps({"choices": [{"message": message}] * body.get("n", 1)}).encode()


async def turns(n: int) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


@pytest.fixture
def gathers_for_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "GATHERING", 0)


@pytest.mark.usefixtures("gathers_for_one_turn")
@pytest.mark.parametrize("seed", range(60))
async def test_random_cancels(seed: int):
    """Of calls that start and are cancelled in any turn of the loop, each is answered or cancelled, and none hangs."""
    rng = random.Random(seed)
    client = FakeClient(rng)
    sending, calls, cancelled = Transport(client, None), list[asyncio.Task[Answer]](), Counter[bool]()
    for _ in range(120):
        match rng.choice(("start", "start", "cancel", "cancel", "turn")):
            case "start":
                payload = {"messages": [{"role": "user", "content": rng.choice("ab")}]}
                calls.append(asyncio.create_task(sending.answer(payload, n_max=8)))
            case "cancel" if calls:
                cancelled[rng.choice(calls).cancel()] += 1
            case _:
                await turns(rng.randrange(3))
    await turns(200)
    assert all(call.done() for call in calls)
    for call in calls:
        assert call.cancelled() or call.result().choice["message"]["content"] in "ab"
    assert 0 < cancelled[True] < len(calls)
    assert (sending._open, client.under_way) == ({}, 0)


@pytest.mark.usefixtures("gathers_for_one_turn")
async def test_joining_a_cancelled_batch():
    """A call that starts in the turn in which the last caller of a batch is cancelled opens a batch of its own."""
    sending = Transport(FakeClient(random.Random(0)), None)
    payload: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
    first = asyncio.create_task(sending.answer(payload, n_max=8))
    await turns(1)
    first.cancel()
    second = asyncio.create_task(sending.answer(payload, n_max=8))
    await turns(50)
    assert first.cancelled()
    assert second.done()


@pytest.mark.usefixtures("gathers_for_one_turn")
async def test_a_batch_cancelled_from_outside():
    """If something else cancels the task of a batch, its callers send their own requests."""
    sending = Transport(FakeClient(random.Random(0)), None)
    payload: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
    calls = [asyncio.create_task(sending.answer(payload, n_max=8)) for _ in range(3)]
    await turns(1)
    (batch,) = sending._open.values()
    assert batch.task is not None
    batch.task.cancel()
    await turns(50)
    assert [call.result().choice["message"]["content"] for call in calls] == ["a"] * 3
