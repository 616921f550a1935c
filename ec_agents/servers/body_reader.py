"""How bodies are read: few at a time, with the log-probabilities of a choice packed as soon as it has arrived.

Otherwise N responses that arrive together would be N whole bodies in memory, and so would one response of N choices.
"""

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cache
from io import BytesIO
from typing import Any, TypeVar

from ec_agents.servers.completions import decode_response, pack_choice, pack_response

LARGE_BODY = 1 << 20
"""Bytes; larger texts are decoded in a thread, so that the event loop continues."""
SMALL_BODY = 1 << 15
"""Bytes of a body that are read before its turn, so that small bodies wait for none."""
AT_ONCE = 4
"""Bodies that are read at the same time."""
PATIENCE = 0.03
"""Seconds for ``SMALL_BODY`` bytes; a slower body no longer keeps others waiting."""

Decoded = TypeVar("Decoded")

_FIRST_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*(\{\s*"[^"\\]*"\s*:)')


async def decode_off_loop(body: bytes, n: int = 1) -> dict[str, Any]:
    """``decode_response``, in a thread if the body is large."""
    return await _off_loop(lambda text: decode_response(text, n), body)


async def _off_loop(decode: Callable[[bytes], Decoded], text: bytes) -> Decoded:
    if len(text) <= LARGE_BODY:
        return decode(text)
    return await asyncio.get_running_loop().run_in_executor(_decoder(), decode, text)


@cache
def _decoder() -> ThreadPoolExecutor:
    """One thread; several would take turns in holding the interpreter, and the loop would wait for all."""
    return ThreadPoolExecutor(1, "ec_agents-decode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_decoder.cache_clear)  # a forked child has the executor but not its thread


async def _packed(body: bytes, n: int = 1) -> bytes:
    return body if len(body) <= LARGE_BODY else await _off_loop(lambda text: pack_response(text, n), body)


class Packing:
    """A body that arrives piece by piece; its choices are replaced by equal ones with packed log-probabilities.

    ``decode_response`` returns the same for the result as for the body. A choice ends where the next one begins, with
    the same bytes as the first. Anything that is not a choice, and the last choice, stays as it is unless the body is
    large.
    """

    def __init__(self) -> None:
        self._size = 0
        self._done: list[bytes] = []
        self._rest = bytearray()
        self._mark: bytes | None = None
        """The bytes that choices begin with; once known, the rest begins with them."""
        self._searched = 0
        self._in_vain = 0
        """Bytes that were taken for the next choice and were not one."""

    async def feed(self, piece: bytes) -> None:
        """Take the next piece, and pack the choices that it completes."""
        early = self._size < SMALL_BODY
        self._size += len(piece)
        self._rest += piece
        if self._mark is None and early and (found := _FIRST_CHOICE.search(self._rest)):
            self._mark = found[1]
            self._replace(found.start(1), bytes(self._rest[: found.start(1)]))
        while self._mark is not None and self._in_vain < LARGE_BODY:
            end = self._rest.find(self._mark, self._searched)
            if end < 0:
                self._searched = max(self._searched, len(self._rest) - len(self._mark))
                break
            await self._try_choice(end)

    async def body(self) -> bytes:
        """The body; this ends the packing."""
        body = b"".join([*self._done, self._rest])
        self._done, self._rest = [], bytearray()
        return await _packed(body, n=2)

    async def _try_choice(self, end: int) -> None:
        """Pack the bytes before ``end`` if they are exactly one choice."""
        self._searched = end + 1
        near = self._rest[max(0, end - 80) : end]
        kept = near.rstrip()
        if kept.endswith(b","):
            with memoryview(self._rest) as rest:
                text = bytes(rest[: end - (len(near) - len(kept)) - 1])
            packed = await _off_loop(pack_choice, text)
            if packed is None:
                self._in_vain += len(text)
            else:
                self._replace(end, packed + b",")

    def _replace(self, end: int, by: bytes) -> None:
        """Put something in the place of the rest up to there."""
        self._done.append(by)
        del self._rest[:end]
        self._searched, self._in_vain = 1, 0


class Turn:
    """A read slot, released by its holder or when the body arrives too slowly.

    Args:
        release: Frees the slot.
        patience: Seconds that the holder may wait for ``SMALL_BODY`` bytes.
    """

    def __init__(self, release: Callable[[], None], patience: float) -> None:
        self._release: Callable[[], None] | None = release
        self._patience = self._left = patience

    def end(self) -> None:
        """Free the slot for others; calling it again does no harm."""
        if self._release is not None:
            self._release()
        self._release = None

    async def wait(self, coming: Awaitable[bytes | None]) -> bytes | None:
        """Wait for the next bytes; the turn ends if they are too few for the time."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        timer = loop.call_later(self._left, self.end)
        try:
            piece = await coming
        finally:
            timer.cancel()
        earned = self._patience * len(piece or b"") / SMALL_BODY
        self._left = min(self._patience, max(0, self._left - loop.time() + begin) + earned)
        return piece


class Turns:
    """Lets few bodies at a time be read, not counting those that arrive so slowly that others would lose by it.

    Args:
        at_once: How many.
        patience: Seconds that each may wait for ``SMALL_BODY`` bytes.
    """

    def __init__(self, at_once: int = AT_ONCE, patience: float = PATIENCE) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._patience = patience

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[Turn]:
        """Wait for a turn, and hold it."""
        await self._free.acquire()
        turn = Turn(self._free.release, self._patience)
        try:
            yield turn
        finally:
            turn.end()


async def read_body(
    pieces: AsyncGenerator[bytes],
    turns: Turns,
    *,
    announced: int = 0,
    several: bool = False,
    on_turn: Callable[[], object] = lambda: None,
) -> bytes:
    """Read a body: small ones at once, large ones in turns and packed.

    Args:
        pieces: The body, decompressed.
        turns: The turns of all bodies that may arrive together.
        announced: Size in bytes that the response announced; 0 if it did not.
        several: Whether the response may have several choices; each is packed when it is complete.
        on_turn: Called when the body has its turn.
    """
    taken = Packing() if several else BytesIO()
    size = 0
    while announced <= SMALL_BODY and size <= SMALL_BODY:
        piece = await anext(pieces, None)
        if piece is None:
            return await _body(taken)
        size += len(piece)
        await _feed(taken, piece)
    async with turns.turn() as turn:
        on_turn()
        while (piece := await turn.wait(anext(pieces, None))) is not None:
            await _feed(taken, piece)
        return await _body(taken)


async def _feed(taken: Packing | BytesIO, piece: bytes) -> None:
    if isinstance(taken, Packing):
        await taken.feed(piece)
    else:
        taken.write(piece)


async def _body(taken: Packing | BytesIO) -> bytes:
    return await (taken.body() if isinstance(taken, Packing) else _packed(taken.getvalue()))
