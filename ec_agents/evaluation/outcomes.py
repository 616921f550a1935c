"""What was right, from a file or a checker; never part of a candidate."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec

from ec_agents.candidates import Candidate, Step
from ec_agents.errors import ConfigError, TraceError

Check = Callable[[Step, Candidate], bool | None]
"""Says whether a candidate of a step is right; None = unknown."""

_TRUE = frozenset({"1", "1.0", "true", "yes", "right", "correct", "pass"})
_FALSE = frozenset({"0", "0.0", "false", "no", "wrong", "incorrect", "fail"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """A step of which every candidate is known to be right or wrong: one draw of N for one task."""

    step: Step
    """Its candidates and failures."""
    right: Mapping[int, bool]
    """Outcome of each candidate, by index."""

    def __post_init__(self) -> None:
        """Check that no candidate is without an outcome."""
        missing = [candidate.index for candidate in self.step.candidates if candidate.index not in self.right]
        if missing:
            raise ConfigError(
                f"run {self.step.run!r}, step {self.step.number}: no outcome for candidates {missing}; every candidate "
                "needs one, or leave the step out"
            )

    @property
    def task(self) -> str:
        """The problem that this draw is about; intervals and tests treat draws of one task as one."""
        return self.step.run if self.step.task is None else self.step.task

    @property
    def n_drawn(self) -> int:
        """N, failed calls counted."""
        return max(1, len(self.step.candidates) + len(self.step.failures))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How one whole run of an agent ended."""

    task: str
    """The problem."""
    selector: str
    """Name of the way of choosing that the agent used."""
    trial: int = 0
    """Which of the repeated runs, from 0."""
    right: bool | None
    """None: an infrastructure error, so that nobody knows."""
    usage: Mapping[str, int] = field(default_factory=dict[str, int])
    """Tokens of all candidates of all steps, as far as they are reported."""
    error: str | None = None
    """What went wrong, of an infrastructure error."""
    restarts: int = 0
    """How often it was cut off, could not go on, and was begun again."""
    repeated: int = 0
    """Calls that were made again because of that, as far as a trace tells."""


def grade(steps: Iterable[Step], check: Check) -> Iterator[Graded]:
    """The steps that can be judged, each with the outcomes of its candidates.

    A step of which the checker says None for any candidate is left out: unknown is not the same as wrong. A step in
    which every call failed stays: nothing came of it.
    """
    for step in steps:
        right = {candidate.index: check(step, candidate) for candidate in step.candidates}
        known = {index: outcome for index, outcome in right.items() if outcome is not None}
        if len(known) == len(right):
            yield Graded(step=step, right=known)


def read_outcomes(path: str | Path) -> Check:
    """Outcomes from a CSV or JSONL file, as a checker.

    Columns: ``run``, ``right`` and, where they matter, ``step`` (by default any) and ``candidate`` (by default any).
    ``right`` is 1/0, true/false, yes/no or right/wrong.

    Raises:
        TraceError: The file cannot be read, or a line is not of this form; the message names it.
    """
    path = Path(path)
    known: dict[tuple[str, int | None, int | None], bool] = {}
    for number, row in enumerate(_rows(path), start=2 if path.suffix == ".csv" else 1):
        try:
            key = (str(row["run"]), _integer(row.get("step")), _integer(row.get("candidate")))
            known[key] = _truth(row["right"])
        except (KeyError, ValueError, TypeError) as error:
            message = f"run, right and, if they matter, step and candidate are needed; found {row!r}"
            raise TraceError(f"{path}, line {number}: {message}", path, number) from error

    def check(step: Step, candidate: Candidate) -> bool | None:
        for number in (step.number, None):
            for index in (candidate.index, None):
                if (step.run, number, index) in known:
                    return known[step.run, number, index]
        return None

    return check


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}", path) from error
    if path.suffix == ".csv":
        yield from csv.DictReader(lines)
    else:
        for number, line in enumerate(lines, start=1):
            try:
                row = msgspec.json.decode(line)
            except msgspec.DecodeError as error:
                raise TraceError(f"{path}, line {number}: not JSON: {error}", path, number) from error
            yield cast("dict[str, Any]", row) if isinstance(row, dict) else {"": row}


def _integer(value: object) -> int | None:
    return None if value in (None, "") else int(cast("Any", value))


def _truth(value: object) -> bool:
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError(text)
