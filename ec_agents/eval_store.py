"""The directory of an evaluation: settings, trace, and one line for each run as it ends."""

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ec_agents.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out
    fcntl = None

TRACE, OUTCOMES, SETTINGS = "trace.jsonl", "outcomes.jsonl", "settings.json"


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
