"""One object for each event loop, closed when its loop ends.

Pooled connections belong to the loop that opened them, and fail in any other.
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")

_closing: set[asyncio.Task[None]] = set()
"""Tasks that close something; a loop keeps only weak references to its tasks."""


class PerLoop(Generic[_T]):
    """One object for each event loop, closed when the loop ends or the owner is garbage.

    Args:
        make: Makes the object; called in the loop that is going to use it.
        close: Closes it.
    """

    def __init__(self, make: Callable[[], _T], close: Callable[[_T], Awaitable[None]]) -> None:
        self._make = make
        self._close = close
        self._made: dict[asyncio.AbstractEventLoop, tuple[_T, weakref.finalize[..., Any]]] = {}

    async def get(self) -> _T:
        """The object of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._made:
            for ended in [other for other in self._made if other.is_closed()]:
                self._made.pop(ended, None)
            keeper = _keep(self._make(), self._close, loop, self._made)
            # An asynchronous generator is what a loop closes when it ends: asyncio.run calls shutdown_asyncgens.
            made = await anext(keeper)
            # The registry of finalizers keeps the object whole until it is closed; garbage could not be closed.
            closing = weakref.finalize(self, _close_soon, loop, keeper)
            closing.atexit = False
            self._made[loop] = made, closing
        return self._made[loop][0]


def _close_soon(loop: asyncio.AbstractEventLoop, keeper: AsyncGenerator[Any]) -> None:
    async def close() -> None:
        await keeper.aclose()

    def start() -> None:
        task = loop.create_task(close())
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    if not loop.is_closed():
        loop.call_soon_threadsafe(start)


async def _keep(
    made: _T, close: Callable[[_T], Awaitable[None]], loop: asyncio.AbstractEventLoop, all_made: dict[Any, Any]
) -> AsyncGenerator[_T]:
    try:
        yield made
    finally:
        _, closing = all_made.pop(loop, (None, None))
        if closing is not None:
            closing.detach()
        await close(made)
