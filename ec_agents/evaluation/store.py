"""The directory of an evaluation: settings, trace, one line for each run as it ends, and what is under way."""

import hashlib
import logging
import os
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from langgraph.checkpoint.base import BaseCheckpointSaver

from ec_agents.candidates import Step
from ec_agents.errors import ConfigError
from ec_agents.trace import TraceWriter, read_steps

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out
    fcntl = None

TRACE, OUTCOMES, SETTINGS = "trace.jsonl", "outcomes.jsonl", "settings.json"
UNDER_WAY, CHECKPOINTS = "under_way", "checkpoints.sqlite"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """What must not change when an evaluation goes on."""

    tasks: str
    """Where they come from."""
    agent: str
    """Name of the factory."""
    n: int = 8
    """Candidates a step."""
    seed: int = 0
    """Every run and call has its own seed made from this one."""
    seed_calls: bool = False
    """Whether each call of a one-step task is sent its seed; not every server takes one."""
    top_logprobs: int | None = 20
    """Alternatives that each call of a one-step task asks for; None asks for nothing."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A line of ``outcomes.jsonl``: how one run ended."""

    run: str
    """Its name in the trace."""
    task: str
    trial: int
    selector: str | None = None
    """None: all candidates of a one-step task are graded, for all selectors."""
    right: dict[int, bool] | bool | None = None
    """By candidate, or of the whole run; None: an infrastructure error."""
    usage: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Tokens of all candidates of the run."""
    seconds: float = 0.0
    seed: int = 0
    error: str | None = None
    restarts: int = 0
    """How often the run ended before its end, could not go on, and was begun again."""
    repeated: int = 0
    """Calls of steps that were recorded before that, and are made again."""


Unit = tuple[str, int, str | None]
"""Task, trial, and the selector of a whole run."""


def read_outcome_lines(out: Path) -> Iterator[tuple[Unit, Outcome]]:
    """The outcomes in a directory, in the order in which they came; a torn line is left out."""
    path = out / OUTCOMES
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            outcome = msgspec.json.decode(line, type=Outcome)
        except msgspec.DecodeError:
            continue
        yield (outcome.task, outcome.trial, outcome.selector), outcome


def write_outcome(out: Path, outcome: Outcome) -> None:
    """Append an outcome in one piece, on a line of its own even after a torn one."""
    line = msgspec.json.encode(outcome)
    with (out / OUTCOMES).open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line + b"\n")


def check_settings(out: Path, wanted: Mapping[str, Any]) -> None:
    """Write the settings into a new directory, or see that they are those of an old one.

    Raises:
        ConfigError: They are others.
    """
    path = out / SETTINGS
    if not path.exists():
        path.write_bytes(msgspec.json.format(msgspec.json.encode(wanted)))
        return
    found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    other = [
        f"{key}: {found.get(key)!r} there, {value!r} now" for key, value in wanted.items() if found.get(key) != value
    ]
    if other:
        raise ConfigError(f"{out} holds an evaluation with other settings ({'; '.join(other)}); take another directory")


@contextmanager
def locked(out: Path) -> Generator[None]:
    """Keep other processes out of the directory; the lock ends with the process, however it ends.

    Raises:
        ConfigError: Another process has it.
    """
    with (out / "lock").open("w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process is working on {out}; wait for it, or take another directory") from error
        yield


def recorded_steps(path: Path) -> Iterator[Step]:
    """The steps of a trace; none if there is no trace yet, or only a torn line."""
    return read_steps(path) if path.exists() and path.stat().st_size else iter(())


class UnderWay:
    """What is there of a run that has not ended; a small trace of its own.

    Of a one-step task each candidate as it came, as a step whose number is the candidate's index; of an agent, whose
    steps are in the trace and whose state is in its checkpoints, the name of the run.
    """

    def __init__(self, out: Path, unit: Unit) -> None:
        self._path = out / UNDER_WAY / f"{hashlib.blake2b(repr(unit).encode(), digest_size=12).hexdigest()}.jsonl"

    def steps(self) -> dict[int, Step]:
        """By number."""
        return {step.number: step for step in recorded_steps(self._path)}

    def writer(self) -> TraceWriter:
        """Adds to it."""
        return TraceWriter(self._path)

    def forget(self) -> None:
        """The run has ended, or begins again."""
        self._path.unlink(missing_ok=True)


def steps_under_way(out: Path, units: Iterable[Unit]) -> dict[str, dict[int, Step]]:
    """What the trace has of the agents' runs that have not ended: run → number → step."""
    names = {step.run for unit in units for step in UnderWay(out, unit).steps().values()}
    found: dict[str, dict[int, Step]] = {name: {} for name in names}
    for step in recorded_steps(out / TRACE) if names else ():
        if step.run in found:
            found[step.run][step.number] = step
    return found


@asynccontextmanager
async def checkpoints(out: Path) -> AsyncGenerator[BaseCheckpointSaver[Any] | None]:
    """Where agents keep their state; None where langgraph-checkpoint-sqlite is not installed."""
    try:
        from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver  # noqa: PLC0415 - part of the extra
    except ImportError as error:
        _log.warning("agents that are killed begin again: pip install langgraph-checkpoint-sqlite (%s)", error)
        yield None
        return
    async with AsyncSqliteSaver.from_conn_string(str(out / CHECKPOINTS)) as saver:
        await saver.setup()
        await saver.conn.execute("PRAGMA synchronous=NORMAL")  # a killed program loses nothing; only a power cut does
        yield saver
