"""Stage 7 - record: every step as a JSON line; read back as trajectories.

A trace is a file of JSON lines, one a step, in the order in which the steps of any number of runs ended. Files of other
programs are read as well; see ``ec_agents.foreign_records``.

Example:
    >>> import tempfile, pathlib
    >>> from ec_agents import Candidate, select
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.jsonl"
    >>> drawn = [Candidate(index=0, content="42"), Candidate(index=1, content="41")]
    >>> with TraceWriter(path) as trace:
    ...     trace.write(Step(run="a", candidates=drawn, selection=select(drawn)))
    >>> [step.chosen.content for step in read_steps(path)]
    ['42']
"""

import base64
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import msgspec

from ec_agents.candidates import Candidate, Selection, Step, Trajectory, by_index, storable
from ec_agents.errors import ConfigError, LogprobsMalformed, ServerError, StateError, TraceError
from ec_agents.foreign_records import read_record
from ec_agents.jsonl import Records, decoded, zstd

TRACE_FORMAT = 1
"""Version of the lines that this version writes; it reads all up to this one."""

_OWN = b'{"ec_agents":'
"""How a line of a trace begins, also a torn one."""

REMOVED = "[removed]"
"""Stands where a secret was."""

_SECRET_NAME = re.compile(r"(?i)(api[-_ ]?key|authorization|auth[-_]?token|access[-_]?token|secret|password|cookie)s?$")
_SECRET_TEXT = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|hf|ghp|gho|github_pat|lsv2|AIza|AKIA)[-_A-Za-z0-9]{14,}"
    r"|(?i:\b(?:bearer|basic)\s+)[-\w.~+/=]{8,}"
    r"|(?i:\b(?:api[-_ ]?key|authorization|access[-_]?token|client[-_]?secret|password)[\"']?\s*[:=]\s*[\"']?)"
    r"[^\s\"',}]{6,}"
)
_SECRET_VARIABLE = re.compile(r"(?i)(key|token|secret|password)$")

_log = logging.getLogger(__name__)


class TraceWriter:
    """Appends steps to a file, from any number of tasks, threads and processes at once.

    A step is one line, handed to the system in one piece, so that a killed program leaves at most one torn line, which
    readers skip. Keys, tokens and passwords are removed: what looks like one, and the values of environment variables
    whose names end in KEY, TOKEN, SECRET or PASSWORD. Prompts, headers and model settings are not recorded at all.

    Args:
        path: ``.jsonl``, or ``.jsonl.zst`` for compression (extra ``zstd``). Steps are added to what is there.
        redact: Applied to every text that the model or a server wrote: contents, arguments of tools, flaws, failures;
            and to the texts of ``info``.

    Raises:
        ConfigError: Compression is asked for and zstandard is not installed.
        TraceError: The file cannot be opened; from ``write``: or written.
    """

    def __init__(self, path: str | Path, *, redact: Callable[[str], str] | None = None) -> None:
        self.path = Path(path)
        self._redact = redact
        self._known = _known_secrets()
        self._lock = threading.Lock()
        self._pack: Callable[[bytes], bytes] | None = None
        if self.path.suffix == ".zst":
            module = zstd(self.path)
            self._pack = lambda line: module.ZstdCompressor(write_checksum=True).compress(line)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise TraceError(f"{path} cannot be opened for writing: {error.strerror or error}", path) from error

    def write(self, step: Step) -> None:
        """Append a step. It is in the file when this returns.

        Raises:
            TraceError: The disk is full, the writer is closed, or another failure of the system.
        """
        line = msgspec.json.encode(_to_record(step, self._clean), enc_hook=str) + b"\n"
        data = line if self._pack is None else self._pack(line)
        with self._lock:
            if self._file < 0:
                raise TraceError(f"{self.path} is closed; a step of run {step.run!r} came too late", self.path)
            try:
                # A line torn by any writer is ended first, so that the damage does not spread to this step.
                data = b"\n" + data if self._pack is None and _ends_inside_a_line(self._file) else data
                written = os.write(self._file, data)
            except OSError as error:
                raise TraceError(f"{self.path} cannot be written: {error.strerror or error}", self.path) from error
        if written < len(data):
            raise TraceError(f"{self.path}: only {written} of {len(data)} bytes fit; the step is lost", self.path)

    def close(self) -> None:
        """Close the file; closing it twice is fine."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close the file."""
        self.close()

    def _clean(self, value: Any) -> Any:
        """The value with no secret in any text, and every text redacted."""
        if isinstance(value, str):
            text = _SECRET_TEXT.sub(REMOVED, value)
            text = text if self._known is None else self._known.sub(REMOVED, text)
            text = text if self._redact is None else self._redact(text)
            return storable(text)
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value).items()
            return {name: _hidden(name, item) or self._clean(item) for name, item in items}
        if isinstance(value, list | tuple):
            return [self._clean(item) for item in cast("Sequence[Any]", value)]
        return value


def as_trace_writer(trace: TraceWriter | str | Path | None) -> TraceWriter | None:
    """Return the writer that an argument called ``trace`` stands for.

    Args:
        trace: A ``TraceWriter``; the path of a trace, which is opened for appending; None for no trace.

    Raises:
        ConfigError: It is anything else, or compression is asked for and zstandard is not installed.
        TraceError: The file cannot be opened.
    """
    if trace is None or isinstance(trace, TraceWriter):
        return trace
    try:
        path = Path(trace)
    except TypeError as error:
        raise ConfigError(
            "trace must be a TraceWriter, the path of a .jsonl or .jsonl.zst file, or None; "
            f"found {type(trace).__name__} {trace!r:.80}"
        ) from error
    return TraceWriter(path)


def read_steps(path: str | Path, *, group_by: str | None = None) -> Iterator[Step]:
    """The steps of a file, run after run.

    Args and Raises: see ``read_trajectories``.
    """
    for trajectory in read_trajectories(path, group_by=group_by):
        yield from trajectory.steps


def read_trajectories(path: str | Path, *, group_by: str | None = None) -> Iterator[Trajectory]:
    """The runs of a file, in the order in which they first occur; one at a time is in memory.

    Steps of a trace are put in order; a step that was recorded twice counts once, as recorded last. In files of other
    programs the responses to one problem become the candidates of one step: those with the same ``group_by``; without
    it, those with the same ``original_id`` (the reference) or ``custom_id``; otherwise each record is a step.

    Args:
        path: A trace, or responses as other programs keep them: JSON lines or one array, plain or ``.zst``.
        group_by: Name of the field that says which records of other programs belong together.

    Raises:
        ConfigError: The file is compressed and zstandard is not installed.
        TraceError: The file cannot be read, or a record has no known form; the message names the line.
    """
    with Records(path) as records:
        for run, places in _index(records, group_by).items():
            yield _trajectory(records, run, places)


Places = list[tuple[int, int]]
"""Place and number of each record of a run."""


def _trajectory(records: Records, run: str, places: Places) -> Trajectory:
    found = [_object(records, place, number) for place, number in places]
    own = [record for record in found if "ec_agents" in record]
    try:
        steps = _own_steps(own) if own else [_foreign_step(run, found)]
    except (LogprobsMalformed, ServerError, StateError, LookupError, TypeError, ValueError, AttributeError) as error:
        line = places[0][1]
        raise TraceError(f"{records.path}, record {line}: {error}", records.path, line) from error
    return Trajectory(run=run, task=steps[-1].task, steps=steps)


def _index(records: Records, group_by: str | None) -> dict[str, Places]:
    """Where the records of each run are; only the names of runs are decoded."""
    names = ["ec_agents", "run", "original_id", "custom_id"]
    fields = names if group_by is None or group_by in names else [*names, group_by]
    attributes = [f"field_{i}" for i in range(len(fields))]
    head = msgspec.defstruct(
        "Head", [(a, Any, None) for a in attributes], rename=dict(zip(attributes, fields, strict=True))
    )
    decoder = msgspec.json.Decoder(head)
    index: dict[str, Places] = {}
    torn: list[int] = []
    is_trace = False
    for place, number, text in records.scan():
        try:
            values = dict(zip(fields, msgspec.structs.astuple(decoder.decode(text)), strict=True))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            values = decoded(text)
            if values is None:
                torn.append(number)
                is_trace = is_trace or _OWN.startswith(bytes(text)[: len(_OWN)].rstrip())
                continue
            if not isinstance(values, dict):
                message = f"{records.path}, record {number}: an object is needed; found {values!r:.60}"
                raise TraceError(message, records.path, number) from None
        index.setdefault(_run_name(cast("dict[str, Any]", values), group_by, number, records.path), []).append(
            (place, number)
        )
    if torn:
        _log.warning("%s: %d torn or damaged lines skipped, the first is line %d", records.path, len(torn), torn[0])
    if not index and not (is_trace and len(torn) == 1):  # a killed program leaves one torn line
        raise TraceError(f"{records.path} holds no JSON record: {len(torn)} damaged lines found", records.path)
    return index


def _run_name(values: Mapping[str, Any], group_by: str | None, number: int, path: Path) -> str:
    if values.get("ec_agents") is not None:
        return str(values.get("run"))
    if group_by is not None:
        if values.get(group_by) is None:
            raise TraceError(f"{path}, record {number}: it has no field {group_by!r} to group by", path, number)
        return str(values[group_by])
    names = (values.get(name) for name in ("original_id", "custom_id"))
    return next((str(name) for name in names if name is not None), f"record {number}")


def _object(records: Records, place: int, number: int) -> dict[str, Any]:
    value = decoded(records.text(place))
    if not isinstance(value, dict):
        raise TraceError(f"{records.path}, record {number} changed while it was read", records.path, number)
    return cast("dict[str, Any]", value)


def _to_record(step: Step, clean: Callable[[Any], Any]) -> dict[str, Any]:
    candidates = [candidate.to_builtins() for candidate in step.candidates]
    for data in candidates:
        data.update({name: clean(data[name]) for name in ("content", "tool_calls", "flaws")})
    selection = None if step.selection is None else step.selection.to_builtins()
    if selection is not None:
        selection["flaws"] = clean(selection["flaws"])
    return {
        "ec_agents": TRACE_FORMAT,
        "run": step.run,
        "number": step.number,
        "task": step.task,
        "time": time.time() if step.time is None else step.time,
        "seconds": step.seconds,
        "candidates": candidates,
        "selection": selection,
        "failures": by_index({i: clean(text) for i, text in step.failures.items()}, 0, None),
        "info": clean(step.info),
    }


def _own_steps(found: Sequence[Mapping[str, Any]]) -> list[Step]:
    steps = {step.number: step for step in map(_from_record, found)}
    return [steps[number] for number in sorted(steps)]


class _Line(msgspec.Struct):
    """The fields of a step in a trace, for checking types."""

    run: str
    number: int
    candidates: list[dict[str, Any]]
    task: str | None = None
    time: float | None = None
    seconds: float | None = None
    selection: dict[str, Any] | None = None
    failures: list[str | None] = []
    info: dict[str, Any] | None = None


def _from_record(record: Mapping[str, Any]) -> Step:
    if type(record["ec_agents"]) is not int or record["ec_agents"] > TRACE_FORMAT:
        raise StateError(
            f"a step in format {record['ec_agents']!r} found, {TRACE_FORMAT} or lower needed: a newer version of "
            "ec_agents wrote this trace; read it with that version"
        )
    line = msgspec.convert(record, _Line)
    step = Step(
        run=line.run,
        number=line.number,
        task=line.task,
        time=line.time,
        seconds=line.seconds,
        candidates=[_candidate(data) for data in line.candidates],
        selection=None if line.selection is None else Selection.from_builtins(line.selection),
        failures={i: text for i, text in enumerate(line.failures) if text is not None},
        info=line.info or {},
    )
    indexes = {candidate.index for candidate in step.candidates}
    if len(indexes) < len(step.candidates) or not _mentioned(step.selection) <= indexes:
        raise StateError("candidates and selection of a step do not fit together: the line was changed")
    return step


def _mentioned(selection: Selection | None) -> set[int]:
    """The candidates that a selection speaks of."""
    return set() if selection is None else {selection.chosen, *selection.order, *selection.scores}


def _candidate(data: Mapping[str, Any]) -> Candidate:
    signals = data.get("signals")
    packed = None if signals is None else base64.b64decode(signals, validate=True)
    return Candidate.from_builtins({**data, "signals": packed})


def _foreign_step(run: str, records: Sequence[Mapping[str, Any]]) -> Step:
    """All candidates of the records as one step; of records with the same ``id`` the last one counts."""
    unique = {str(record.get("id", f"record {i}")): record for i, record in enumerate(records)}
    found = [read_record(record) for record in (unique.values() if _is_reference(records) else records)]
    candidates: list[Candidate] = []
    failures: dict[int, str] = {}
    info: dict[str, Any] = {}
    for one in found:
        start = len(candidates) + len(failures)
        candidates += [replace(candidate, index=start + i) for i, candidate in enumerate(one.candidates)]
        failures |= {start + len(one.candidates) + i: text for i, text in enumerate(one.failures)}
        info[str(start)] = one.info
    return Step(
        run=run,
        task=run,
        candidates=candidates,
        failures=failures,
        selection=found[0].selection if len(found) == 1 else None,
        info={"records": info},
    )


def _is_reference(records: Sequence[Mapping[str, Any]]) -> bool:
    return all("entropy_sequence" in record for record in records)


def _known_secrets() -> re.Pattern[str] | None:
    """The values of environment variables that are named like secrets."""
    values = {v for name, v in os.environ.items() if _SECRET_VARIABLE.search(name) and len(v) >= 8}
    return re.compile("|".join(map(re.escape, sorted(values, key=len, reverse=True)))) if values else None


def _hidden(name: Any, value: Any) -> str | None:
    """The stand-in for a value whose name says that it is a secret."""
    return REMOVED if isinstance(value, str) and isinstance(name, str) and _SECRET_NAME.search(name) else None


def _ends_inside_a_line(file: int) -> bool:
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"
