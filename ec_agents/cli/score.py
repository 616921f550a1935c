"""``ec-agents score``: every candidate of a file under any scorers, as rows, streamed."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ec_agents.candidates import Candidate, Selection, Step
from ec_agents.cli.options import DEFAULT_SCORERS
from ec_agents.cli.terminal import one_line
from ec_agents.errors import ConfigError, SelectionError
from ec_agents.files import replacing
from ec_agents.scoring import scorer_named
from ec_agents.selection import Selector
from ec_agents.trace import read_steps

FORMS = ("table", "csv", "jsonl")
LEADING = ("run", "step", "candidate", "chosen", "tokens")
_FORMULA = ("=", "+", "-", "@")
"""A spreadsheet evaluates a cell that begins with one of these, after any spaces."""
TRAILING = ("margin_sd", "above_noise", "flaws")

Row = Mapping[str, Any]


def score_rows(
    path: str | Path, names: Sequence[str] = DEFAULT_SCORERS, *, group_by: str | None = None
) -> Iterator[Row]:
    """Yield one row per candidate of a file, in order; one run at a time is in memory.

    A row has ``run``, ``step``, ``candidate``, ``chosen`` (by the first scorer), ``tokens``, the score of each scorer,
    and for the chosen candidate ``margin_sd`` and ``above_noise``; ``flaws`` names the flaws of a candidate. Missing
    values are None. If the first scorer can score no candidate, none is chosen. The ``flaws`` of a failed response are
    its error.

    Args:
        path: Any file that ``read_trajectories`` reads.
        names: Names in ``SCORERS``; the first one chooses.
        group_by: See ``read_trajectories``.

    Raises:
        ConfigError: A scorer is unknown, or no scorer is given.
        TraceError: The file cannot be read.
    """
    if not names:
        raise ConfigError("the name of at least one scorer is needed")
    selectors = {name: Selector(scorer=scorer_named(name), fallback="raise") for name in names}
    return (row for step in read_steps(path, group_by=group_by) for row in _step_rows(step, selectors))


def columns(names: Sequence[str]) -> list[str]:
    """Names of the columns, in order."""
    return [*LEADING, *names, *TRAILING]


def write_rows(rows: Iterable[Row], names: Sequence[str], out: IO[str], form: str) -> int:
    """Write the rows as they come: as a ``table`` for people, as ``csv`` or ``jsonl`` for programs.

    In CSV, a text that a spreadsheet would take for a formula begins with an apostrophe.

    Returns:
        The number of rows.

    Raises:
        ConfigError: ``form`` is none of these.
    """
    if form not in FORMS:
        raise ConfigError(f"rows can be written as {', '.join(FORMS)}; found {form!r}")
    header = columns(names)
    writer = csv.writer(out, lineterminator="\n")
    if form == "csv":
        writer.writerow(header)
    elif form == "table":
        out.write(_line(header, header))
    count = 0
    for row in rows:
        count += 1
        if form == "csv":
            writer.writerow([_csv_cell(row[name]) for name in header])
        elif form == "table":
            out.write(_line([_cell(row[name]) for name in header], header))
        else:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def write_file(path: Path, rows: Iterator[Row], names: Sequence[str]) -> int:
    """Write the rows to a ``.csv`` or ``.jsonl`` file, which is replaced when all rows are written.

    Returns:
        The number of rows.

    Raises:
        ConfigError: The file name has another suffix.
        WriteError: The file cannot be written.
    """
    form = path.suffix.lstrip(".")
    if form not in {"csv", "jsonl"}:
        raise ConfigError(f"rows can be written to a .csv or .jsonl file; found {path.name!r}")
    with replacing(path) as out:
        return write_rows(rows, names, out, form)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case _:
            return one_line(value)


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")  # readers end a row at a carriage return
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def _line(cells: Sequence[str], header: Sequence[str]) -> str:
    """One line of the table; the last column may be long and is not padded."""
    widths = [max(len(name), 9) for name in header[:-1]]
    padded = [f"{cell:{width}.{width}}" for cell, width in zip(cells[:-1], widths, strict=True)]
    return f"{' '.join(padded)} {cells[-1]:.80}".rstrip() + "\n"


def _step_rows(step: Step, selectors: Mapping[str, Selector]) -> Iterator[Row]:
    selections = {name: _selection(selector, step.candidates) for name, selector in selectors.items()}
    first = next(iter(selections.values()))
    for candidate in step.candidates:
        scores = {name: None if s is None else s.scores[candidate.index] for name, s in selections.items()}
        yield _row(step, candidate, first, scores)
    blank = dict.fromkeys(columns(list(selectors)))
    for index, text in step.failures.items():
        yield {**blank, "run": step.run, "step": step.number, "candidate": index, "chosen": False, "flaws": text}


def _selection(selector: Selector, candidates: Sequence[Candidate]) -> Selection | None:
    """The choice; None if no candidate can be scored."""
    try:
        return selector(candidates) if candidates else None
    except SelectionError:
        return None


def _row(step: Step, candidate: Candidate, first: Selection | None, scores: Mapping[str, float | None]) -> Row:
    is_chosen = first is not None and candidate.index == first.chosen
    flaws = candidate.flaws or {"no_signal": ""} if first is None else first.flaws.get(candidate.index, {})
    return {
        "run": step.run,
        "step": step.number,
        "candidate": candidate.index,
        "chosen": is_chosen,
        "tokens": None if candidate.signals is None else candidate.signals.n_tokens,
        **scores,
        "margin_sd": first.margin_sd if first is not None and is_chosen else None,
        "above_noise": first.above_noise if first is not None and is_chosen else None,
        "flaws": " ".join(flaws),
    }
