"""JSON records in files: one a line, one array, or one object; plain or zstd; of any size."""

import json
import logging
import mmap
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import msgspec

from ec_agents.errors import ConfigError, TraceError

CHUNK = 1 << 20
MAGIC = b"\x28\xb5\x2f\xfd"
"""First bytes of a zstd frame."""
_LARGEST_FRAME = 1 << 26
"""Frames larger than this are not searched for others after damage; those of a ``TraceWriter`` hold one step."""

_SLICE = 1 << 10
"""Packed bytes that are unpacked at once: zstd expands up to 32,000 times, so that these become 32 MB at most."""

LARGEST_UNPACKED, LARGEST_EXPANSION = 1 << 30, 200
"""A compressed file may expand to so many bytes, or to so many times its size if that is more."""

_LARGEST_COPY = 1 << 26
"""Texts larger than this are not tried a second time, for NaN, just to see whether they are JSON."""

_log = logging.getLogger(__name__)


class Records:
    """The JSON records of a file, read one at a time.

    NaN and Infinity, which JSON does not know, are understood.

    Args:
        path: ``.jsonl``, ``.json``, or either with ``.zst``.

    Raises:
        ConfigError: The file is compressed and zstandard is not installed.
        TraceError: The file cannot be read, or holds no record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file: BinaryIO = self.path.open("rb", buffering=CHUNK)
        except OSError as error:
            raise TraceError(f"{path} cannot be read: {error.strerror or error}", path) from error
        try:
            if self.path.suffix == ".zst":
                self._file = _unpacked(self._file, self.path)
            self._items = self._whole()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close the file."""
        self._items = None
        self._file.close()

    def scan(self) -> Iterator[tuple[int, int, msgspec.Raw | bytes]]:
        """Place, number from 1 (in files of lines: the line) and JSON text of each record; blank lines are left out."""
        if self._items is not None:
            yield from ((i, i + 1, item) for i, item in enumerate(self._items))
            return
        self._file.seek(0)
        place = 0
        for number, line in enumerate(self._file, 1):
            if not line.isspace():
                yield place, number, line
            place += len(line)

    def text(self, place: int) -> msgspec.Raw | bytes:
        """JSON text of the record at a place that ``scan`` gave."""
        if self._items is not None:
            return self._items[place]
        self._file.seek(place)
        return self._file.readline()

    def _whole(self) -> Sequence[msgspec.Raw | bytes] | None:
        """The records, if the file is one array or one object over several lines; slices of the file, not copies."""
        if not self._file.seek(0, os.SEEK_END):
            raise TraceError(f"{self.path} is empty: one or more JSON records are needed", self.path)
        self._file.seek(0)
        first = self._file.readline()
        start = first.lstrip()[:1]
        if start not in {b"[", b"{"} or (start == b"{" and is_json(first)):
            return None
        view = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        if start == b"[":
            return _array(view)
        if is_json(view):
            return [bytes(view)]
        return _indented(bytes(view)) if first.strip() == b"{" else None


def is_json(text: bytes | mmap.mmap) -> bool:
    """Whether the text is one whole JSON value; NaN and Infinity may stand for numbers."""
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return len(text) <= _LARGEST_COPY and _lenient(text) is not None
    return True


def decoded(text: msgspec.Raw | bytes) -> Any:
    """The value that the JSON text stands for, None if it is not JSON; NaN and Infinity may stand for numbers."""
    try:
        return _DECODER.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _lenient(text)


_DECODER = msgspec.json.Decoder()


def _lenient(text: bytes | mmap.mmap | msgspec.Raw) -> Any:
    try:
        return json.loads(bytes(text))
    except (ValueError, RecursionError):
        return None


def _array(view: mmap.mmap) -> Sequence[msgspec.Raw | bytes] | None:
    """The items of one JSON array; None if the text is not one."""
    try:
        return msgspec.json.decode(view, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        values = _lenient(view)  # NaN somewhere: the array has to pass through memory once
        return [json.dumps(value).encode() for value in cast("list[Any]", values)] if isinstance(values, list) else None


def _indented(text: bytes) -> Sequence[bytes] | None:
    """Objects over several lines each, one after the other, as ``jq .`` writes them; None if one of them is damaged."""
    ends = [match.end() for match in re.finditer(rb"^}\s*$", text, re.MULTILINE)]
    pieces = [text[start:end] for start, end in pairwise([0, *ends])]
    return pieces if pieces and all(map(is_json, pieces)) and not text[ends[-1] :].strip() else None


def zstd(path: Path) -> Any:
    """The module zstandard.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import zstandard  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ConfigError(f"{path} needs the extra 'zstd' ({error}): pip install 'ec-agents[zstd]'") from error
    return zstandard


def _unpacked(packed: BinaryIO, path: Path) -> BinaryIO:
    """Return the decompressed contents as a temporary file; what follows a damaged frame is not lost.

    Raises:
        TraceError: They are larger than any trace of that size.
    """
    module = zstd(path)
    most = max(LARGEST_UNPACKED, LARGEST_EXPANSION * os.fstat(packed.fileno()).st_size)
    plain = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    rest = packed.read(CHUNK)
    while rest:
        frame = module.ZstdDecompressor().decompressobj()
        seen = b""
        try:
            while True:
                seen = seen + rest if len(seen) < _LARGEST_FRAME else rest
                rest = _expand(frame, rest, plain, most) or packed.read(CHUNK)
                if frame.eof:
                    break
                if not rest:
                    raise module.ZstdError("the frame is torn")  # noqa: TRY301 - as if it were damaged
        except OverflowError as error:
            plain.close()
            raise TraceError(f"{path} expands to more than {most} bytes, which no trace does", path) from error
        except module.ZstdError as error:
            _log.warning("%s: a damaged frame is skipped: %s", path, error)
            plain.write(b"\n")
            following = seen.find(MAGIC, len(MAGIC))
            rest = seen[following:] + packed.read(CHUNK) if following >= 0 else b""
    packed.close()
    plain.flush()
    return plain


def _expand(frame: Any, packed: bytes, plain: BinaryIO, most: int) -> bytes:
    """Write the expansion of a part of a frame slice by slice, and return what follows the frame.

    Raises:
        OverflowError: There are more than ``most`` bytes in all.
    """
    for start in range(0, len(packed), _SLICE):
        plain.write(frame.decompress(packed[start : start + _SLICE]))
        if plain.tell() > most:
            raise OverflowError
        if frame.eof:
            return frame.unused_data + packed[start + _SLICE :]
    return b""
