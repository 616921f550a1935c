"""Waiting for what another thread does, where it has no event to wait for."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

LIMIT = 60
"""Seconds after which what was waited for counts as a failure."""
PAUSE = 0.002


def settle(done: Callable[[], bool]) -> None:
    """Wait in this thread until it is so."""
    end, pause = time.monotonic() + LIMIT, threading.Event()
    while not done():
        assert time.monotonic() < end, f"it did not come to that within {LIMIT} s"
        pause.wait(PAUSE)


async def until(done: Callable[[], bool]) -> None:
    """Wait in the event loop until it is so."""
    async with asyncio.timeout(LIMIT):
        while not done():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(PAUSE)


def others() -> set[asyncio.Task[Any]]:
    """The tasks of this loop besides the one that asks."""
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]
