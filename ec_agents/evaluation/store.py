"""The directory of an evaluation: settings, trace, one line per finished run, and the state of unfinished runs."""

import hashlib
import logging
import os
import sqlite3
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from langgraph.checkpoint.base import BaseCheckpointSaver

from ec_agents.candidates import Step, Trajectory
from ec_agents.errors import ConfigError, WriteError
from ec_agents.files import explained, private, replace_text
from ec_agents.trace import TraceWriter, read_steps, read_trajectories

try:
    import fcntl
except ImportError:  # on Windows the directory is not locked
    fcntl = None

TRACE, OUTCOMES, SETTINGS = "trace.jsonl", "outcomes.jsonl", "settings.json"
UNDER_WAY, CHECKPOINTS = "under_way", "checkpoints.sqlite"

_log = logging.getLogger(__name__)


class OutcomeLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of ``outcomes.jsonl``: how one run ended."""

    run: str
    """Name of the run in the trace."""
    task: str
    trial: int
    selector: str | None = None
    """None: a one-step task, all candidates of which are graded for all selectors."""
    right: dict[int, bool] | bool | None = None
    """By candidate, or of the whole run; None: an infrastructure error."""
    usage: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Tokens of all candidates of the run."""
    seconds: float = 0.0
    seed: int = 0
    error: str | None = None
    restarts: int = 0
    """How often the run was interrupted, could not be resumed, and was started over."""
    repeated: int = 0
    """Calls of recorded steps that were repeated because of that."""
    gave_up: bool = False
    """Whether the agent ended without an answer, by its own failure: wrong for every checker."""
    prompt: str = ""
    """Digest of the prompt that was answered."""
    answer: str = ""
    """Digest of everything else of the task, by which the answer was graded."""
    checker: str = ""
    """Name of the checker; of one that is not built in, with a digest of its source."""


Unit = tuple[str, int, str | None]
"""One run to do: task, trial and, for whole runs of an agent, the selector."""


def read_outcome_lines(out: Path) -> Iterator[tuple[Unit, OutcomeLine]]:
    """The outcomes in a directory, in the order in which they were written; torn lines are skipped."""
    path = out / OUTCOMES
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            outcome = msgspec.json.decode(line, type=OutcomeLine)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        yield (outcome.task, outcome.trial, outcome.selector), outcome


def write_outcome_line(out: Path, outcome: OutcomeLine) -> None:
    """Append an outcome in one write, starting a new line after a torn one.

    Raises:
        WriteError: The disk is full, or the directory cannot be written to.
    """
    line = msgspec.json.encode(outcome)
    path = out / OUTCOMES
    with explained(path), open(path, "ab+", opener=private) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line + b"\n")


def check_settings(out: Path, wanted: Mapping[str, Any]) -> None:
    """Write the settings into a new directory, or compare them with those of an existing one.

    Settings that the directory does not record are added to it.

    Raises:
        ConfigError: The settings differ, or those of the directory cannot be read.
        WriteError: The file cannot be written.
    """
    path = out / SETTINGS
    if not path.exists():
        replace_text(path, msgspec.json.format(msgspec.json.encode(wanted)).decode())
        return
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it, or use another directory") from error
    now: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(wanted))
    other = [f"{key}: {found[key]!r} there, {now[key]!r} now" for key in now if key in found and found[key] != now[key]]
    if not other and now.keys() - found.keys():
        replace_text(path, msgspec.json.format(msgspec.json.encode({**now, **found})).decode())
    if other:
        raise ConfigError(f"{out} holds an evaluation with other settings ({'; '.join(other)}); use another directory")


@contextmanager
def locked(out: Path) -> Generator[None]:
    """Keep other processes out of the directory; the lock ends with the process, however it ends.

    Raises:
        ConfigError: Another process holds it.
        WriteError: The directory cannot be written to.
    """
    with explained(out):
        file = open(out / "lock", "w", encoding="ascii", opener=private)  # noqa: SIM115 - closed below
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process is working on {out}; wait for it, or use another directory") from error
        yield


def recorded_steps(path: Path) -> Iterator[Step]:
    """The steps of a trace; none if the file does not exist yet or is empty."""
    return read_steps(path) if path.exists() and path.stat().st_size else iter(())


def recorded_trajectories(path: Path) -> Iterator[Trajectory]:
    """The runs of a trace; none if the file does not exist yet or is empty."""
    return read_trajectories(path) if path.exists() and path.stat().st_size else iter(())


class UnderWay:
    """The state of one unfinished run, as a small trace of its own.

    For a one-step task: each finished candidate, as a step whose number is the candidate's index. For an agent, whose
    steps are in the trace and whose state is in its checkpoints: the name of the run.
    """

    def __init__(self, out: Path, unit: Unit) -> None:
        self._path = out / UNDER_WAY / f"{hashlib.blake2b(repr(unit).encode(), digest_size=12).hexdigest()}.jsonl"

    def steps(self) -> dict[int, Step]:
        """The steps by number."""
        return {step.number: step for step in recorded_steps(self._path)}

    def writer(self) -> TraceWriter:
        """A writer that appends to it."""
        return TraceWriter(self._path)

    def forget(self) -> None:
        """Delete it: the run has ended."""
        self._path.unlink(missing_ok=True)


def steps_under_way(out: Path, units: Iterable[Unit]) -> dict[str, dict[int, Step]]:
    """The recorded steps of the agents' unfinished runs: run → number → step."""
    names = {step.run for unit in units for step in UnderWay(out, unit).steps().values()}
    by_run: dict[str, dict[int, Step]] = {name: {} for name in names}
    for step in recorded_steps(out / TRACE) if names else ():
        if step.run in by_run:
            by_run[step.run][step.number] = step
    return by_run


@asynccontextmanager
async def checkpoints(out: Path) -> AsyncGenerator[BaseCheckpointSaver[Any] | None]:
    """Open the store of the agents' states; None if langgraph-checkpoint-sqlite is not installed."""
    try:
        from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver  # noqa: PLC0415 - part of the extra
    except ImportError as error:
        _log.warning(
            "interrupted agents will start over; to resume them, pip install langgraph-checkpoint-sqlite (%s)", error
        )
        yield None
        return
    with explained(out / CHECKPOINTS):
        os.close(private(str(out / CHECKPOINTS), os.O_CREAT | os.O_WRONLY))  # SQLite's own files take over its mode
    async with AsyncSqliteSaver.from_conn_string(str(out / CHECKPOINTS)) as saver:
        try:
            await saver.setup()
        except sqlite3.Error as error:
            raise WriteError(f"{out / CHECKPOINTS} cannot be written: {error}", out / CHECKPOINTS) from error
        await saver.conn.execute("PRAGMA synchronous=NORMAL")  # a killed process loses nothing, only a power cut does
        yield saver
