"""Data as compressed text: what waits in a checkpoint between two nodes, and passes through JSON unharmed."""

import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import storable
from ec_agents.errors import StateError

_ALPHABET = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
_DIGITS = np.frombuffer(_ALPHABET, np.uint8)
_VALUES: NDArray[np.uint32] = np.full(256, 0, np.uint32)
_VALUES[_DIGITS] = np.arange(85, dtype=np.uint32)
_POWERS = 85 ** np.arange(4, -1, -1, dtype=np.uint32)


def packed(*parts: object) -> str:
    """Return the parts as text; each is compressed on its own, so data of one kind belong into one part.

    Objects other than builtins become text.
    """
    return _as_text(msgspec.msgpack.encode([zlib.compress(_encoded(part), level=6) for part in parts]))


LARGEST_STATE = 1 << 29
"""Most bytes that a part may expand to: 64 candidates have 8 MB each."""


def unpacked(text: object, *kinds: Any) -> Sequence[Any]:
    """Undo ``packed``, given the type of each part.

    Raises:
        StateError: The text is damaged, a part is of another type, or expands to more than ``LARGEST_STATE``.
    """
    try:
        parts = msgspec.msgpack.decode(_as_bytes(cast("str", text)), type=list[bytes])
        return [msgspec.msgpack.decode(_expanded(part), type=kind) for part, kind in zip(parts, kinds, strict=True)]
    except (AttributeError, TypeError, ValueError, RecursionError, zlib.error, msgspec.DecodeError) as error:
        raise StateError(f"the candidates in the checkpoint are damaged: {error}") from error


def _expanded(part: bytes) -> bytes:
    expanding = zlib.decompressobj()
    found = expanding.decompress(part, LARGEST_STATE)
    if not expanding.eof:
        raise ValueError(f"more than {LARGEST_STATE} bytes found" if expanding.unconsumed_tail else "they are torn")
    return found


@contextmanager
def reading_state() -> Generator[None]:
    """Raise ``StateError`` for whatever damaged contents of a checkpoint make other code raise."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, NotImplementedError, StopIteration) as error:
        raise StateError(f"the candidates in the checkpoint are damaged: {type(error).__name__}: {error}") from error


def planes(packed_signals: Sequence[bytes]) -> list[bytes]:
    """Return the four planes of the bytes of several ``TokenSignals``: the first bytes of all floats, then the second.

    Bytes of one kind compress better side by side.
    """
    arrays = [np.frombuffer(signals, np.uint8).reshape(4, -1) for signals in packed_signals]
    return [plane.tobytes() for plane in np.concatenate([np.empty((4, 0), np.uint8), *arrays], axis=1)]


def signals_of(found: Sequence[bytes], lengths: Sequence[int]) -> list[bytes]:
    """Undo ``planes``, given the length of each result.

    Raises:
        StateError: The lengths do not fit.
    """
    if {len(plane) * 4 for plane in found} != {sum(lengths)}:
        raise StateError("the candidates in the checkpoint are damaged: their signals are incomplete")
    together = np.stack([np.frombuffer(plane, np.uint8) for plane in found])
    ends = np.cumsum([length // 4 for length in lengths])[:-1]
    return [array.tobytes() for array in np.split(together, ends, axis=1)] if lengths else []


def _encoded(part: object) -> bytes:
    try:
        return msgspec.msgpack.encode(part, enc_hook=str)
    except (UnicodeEncodeError, OverflowError, RecursionError):  # models and servers write such values
        return msgspec.msgpack.encode(storable(part), enc_hook=str)


def _as_text(data: bytes) -> str:
    """The data in base 85, as ``base64.b85encode`` writes it, which takes ten times as long; base 64 is 7 % longer."""
    padding = -len(data) % 4
    words = np.frombuffer(data + bytes(padding), ">u4").astype(np.uint32)
    text = _DIGITS[words[:, None] // _POWERS % 85].tobytes().decode()
    return text[: len(text) - padding]


def _as_bytes(text: str) -> bytes:
    padding = -len(text) % 5
    digits = _VALUES[np.frombuffer(text.encode() + b"~" * padding, np.uint8).reshape(-1, 5)]
    data = (digits * _POWERS).sum(axis=1, dtype=np.uint32).astype(">u4").tobytes()
    return data[: len(data) - padding]
