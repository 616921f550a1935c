"""What was right, from a file or a checker; never part of a candidate."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ec_agents.candidates import Candidate, Step
from ec_agents.errors import ConfigError, TraceError
from ec_agents.jsonl import Records, decoded

StepGrader = Callable[[Step, Candidate], bool | None]
"""Decides whether a candidate of a step is right; None = unknown."""

_TRUE = frozenset({"1", "1.0", "true", "yes", "right", "correct", "pass"})
_FALSE = frozenset({"0", "0.0", "false", "no", "wrong", "incorrect", "fail"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """A step whose candidates are all known to be right or wrong: N samples for one task."""

    step: Step
    """Its candidates and failures."""
    right: Mapping[int, bool]
    """Outcome of each candidate, by index."""

    def __post_init__(self) -> None:
        """Check that every candidate has an outcome."""
        missing = [candidate.index for candidate in self.step.candidates if candidate.index not in self.right]
        if missing:
            raise ConfigError(
                f"run {self.step.run!r}, step {self.step.number}: no outcome for candidates {missing}; every candidate "
                "needs one, or leave the step out"
            )

    @property
    def task(self) -> str:
        """The problem; intervals and tests treat the steps of one task as dependent."""
        return self.step.run if self.step.task is None else self.step.task

    @property
    def n_drawn(self) -> int:
        """N, including failed calls."""
        return max(1, len(self.step.candidates) + len(self.step.failures))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How one whole run of an agent ended."""

    task: str
    """The problem."""
    selector: str
    """Name of the selector that the agent used."""
    trial: int = 0
    """Which of the repeated runs, from 0."""
    right: bool | None
    """None: an infrastructure error, so the outcome is unknown."""
    usage: Mapping[str, int] = field(default_factory=dict[str, int])
    """Tokens of all candidates of all steps, as far as they are reported."""
    error: str | None = None
    """The infrastructure error, if any."""
    restarts: int = 0
    """How often the run was interrupted, could not be resumed, and was started over."""
    repeated: int = 0
    """Calls that were repeated because of that, as far as a trace shows."""


def grade(steps: Iterable[Step], check: StepGrader) -> Iterator[Graded]:
    """Yield the steps that can be judged, each with the outcomes of its candidates.

    A step with a candidate of unknown outcome is skipped: unknown is not the same as wrong. A step in which every call
    failed is kept: it was not right.
    """
    for step in steps:
        right = {candidate.index: check(step, candidate) for candidate in step.candidates}
        known = {index: outcome for index, outcome in right.items() if outcome is not None}
        if len(known) == len(right):
            yield Graded(step=step, right=known)


def read_outcomes(path: str | Path) -> StepGrader:
    """Read outcomes from a CSV or JSONL file.

    Columns: ``run``, ``right`` and, where they matter, ``step`` (by default any) and ``candidate`` (by default any).
    ``right`` is 1/0, true/false, yes/no or right/wrong.

    Raises:
        TraceError: The file cannot be read, or a line has another form; the message names the line.
    """
    path = Path(path)
    known: dict[tuple[str, int | None, int | None], bool] = {}
    for number, row in _csv_rows(path) if path.suffix == ".csv" else _json_rows(path):
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


Rows = Iterator[tuple[int, dict[str, Any]]]
"""Line number and fields of each row."""


def _csv_rows(path: Path) -> Rows:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}", path) from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    yield from ((reader.line_num, row) for row in reader)


def _json_rows(path: Path) -> Rows:
    with Records(path) as records:
        for _, number, text in records.scan():
            row = decoded(text)
            if row is None:
                raise TraceError(f"{path}, line {number}: not JSON", path, number)
            yield number, cast("dict[str, Any]", row) if isinstance(row, dict) else {"": row}


def _integer(value: object) -> int | None:
    return None if value in (None, "") else int(cast("Any", value))


def _truth(value: object) -> bool:
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError(text)
