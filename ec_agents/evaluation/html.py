"""Stage 8 - show: a trace or an evaluation as one self-contained HTML file.

Model output is untrusted. Everything goes through escaping templates, or as JSON that a script puts into text nodes.
The page's security policy allows its own style and script, by their hashes, and nothing else: no network, images or
forms.
"""

import base64
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import Candidate, Selection, Step, TokenSignals
from ec_agents.entropy import PhaseConfig, entropy_centroid
from ec_agents.evaluation.charts import (
    Chart,
    accuracy_by_margin,
    accuracy_by_n,
    bars,
    gain_by_tokens,
    lines,
    shown_rows,
)
from ec_agents.evaluation.settings import REFERENCES
from ec_agents.evaluation.table import Evaluation, Row
from ec_agents.files import replacing
from ec_agents.scoring import CentroidScorer
from ec_agents.selection import Selector

try:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup
except ImportError as error:
    raise ImportError(f"reports need the extra 'report' ({error}): pip install 'ec-agents[report]'") from error

LEVELS = 8
"""Shades of token entropy, from zero to half of the largest possible entropy; one more stands for missing."""
STRIP = 48
"""Segments of the strip that shows a whole response."""

_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'"

REASONS = {
    "ranked": "it has the best score",
    "tie_break": "several have the best score, and the tie was broken",
    "only_one": "there was no other",
    "only_sound": "all others are flawed",
    "fallback": "there was nothing to rank by, and the fallback decided",
    "all_flawed": "all are flawed, and its flaw is the mildest",
}


def write_trace_report(
    steps: Iterable[Step], path: str | Path, *, title: str = "Trace", phases: PhaseConfig | str = "paper"
) -> int:
    """Write the steps of a trace as one HTML file.

    A step without a recorded choice is shown with the choice of the lowest centroid. One step at a time is in memory.

    Args:
        steps: Steps, as from ``read_steps``.
        path: The file; it is replaced when all steps are written.
        title: Heading of the page.
        phases: Preset or configuration of the phases to underline.

    Returns:
        The number of steps.

    Raises:
        ConfigError: No preset has that name.
        WriteError: The file cannot be written.
    """
    scorer = CentroidScorer(phases)
    count = itertools.count()
    shown = (_step_view(step, scorer) for step in steps for _ in [next(count)])
    _write(path, "trace.html.j2", title=title, steps=shown)
    return next(count)


def write_evaluation_report(evaluation: Evaluation, path: str | Path, *, title: str = "Evaluation") -> None:
    """Write an evaluation as one HTML file: table, curves, score distributions, reliability of the margin.

    Raises:
        WriteError: The file cannot be written.
    """
    shown = shown_rows(evaluation)
    own = [row for row, _ in shown if row.selector not in REFERENCES]
    _write(
        path,
        "evaluation.html.j2",
        title=title,
        evaluation=evaluation,
        most_trials=max((k for row in evaluation.rows for k in row.pass_hat), default=1),
        legend=[(row.selector, style) for row, style in shown],
        left_out=len(evaluation.own) - len(own),
        by_n=_svg(accuracy_by_n(evaluation)),
        by_tokens=_svg(gain_by_tokens(evaluation)),
        distributions=[(row.selector, _scores_chart(row)) for row in own if row.scores is not None],
        reliability=[(row.selector, _svg(accuracy_by_margin(row))) for row in own if row.margins],
    )


def explain(selection: Selection) -> str:
    """Explain in a sentence or two why this candidate was chosen, and how much that means."""
    said = f"Candidate {selection.chosen} was chosen by {selection.selector}: {REASONS[selection.reason]}."
    if selection.margin is not None and selection.reason == "ranked":
        said += f" It leads by {selection.margin:.3g}"
        said += "." if selection.margin_sd is None else f", {selection.margin_sd:.2g} standard deviations of noise."
    if selection.p_noise is not None:
        verdict = "above" if selection.above_noise else "within"
        share = f"{selection.p_noise:.0%} of steps"
        said += f" Candidates without any signal show such a lead in {share}: {verdict} the noise."
    if selection.n_agree > 1:
        said += f" {selection.n_agree} of {len(selection.order)} would do the same."
    return said


def timing(step: Step) -> str:
    """How long sampling took, the slowest call, and all calls added up, in a sentence; empty if unknown."""
    calls = [candidate.seconds for candidate in step.candidates if candidate.seconds is not None]
    said = [] if step.seconds is None else [f"sampling took {step.seconds:.3g} s"]
    if calls:
        said += [f"the slowest call {max(calls):.3g} s", f"{len(calls)} calls together {sum(calls):.3g} s"]
    return f"{', '.join(said)}.".capitalize() if said else ""


def _step_view(step: Step, scorer: CentroidScorer) -> dict[str, Any]:
    """The values of the template for a step; the candidates as JSON, which the script shows when the step is opened."""
    selection, recorded = step.selection, step.selection is not None
    if selection is None and step.candidates:
        selection = Selector()(step.candidates)
    scores: Mapping[int, float | None] = {} if selection is None else selection.scores
    texts = _recorded_texts(step)
    order = [] if selection is None else list(selection.order)
    data: dict[str, Any] = {
        "chosen": None if selection is None else selection.chosen,
        "order": order,
        "scorer": "score" if selection is None else selection.selector,
        "candidates": [
            {
                **_picture(c, scorer.phases(c), texts.get(c.index)),
                "score": scores.get(c.index),
                "flaws": {**c.flaws, **(dict(selection.flaws.get(c.index, {})) if selection else {})},
            }
            for c in step.candidates
        ],
        "failures": {str(i): text for i, text in step.failures.items()},
    }
    why = "No candidate: every call failed." if selection is None else explain(selection)
    why = why if recorded or selection is None else f"The trace records no choice; this one was replayed. {why}"
    return {
        "run": step.run,
        "task": step.task,
        "number": step.number,
        "why": f"{why} {timing(step)}".rstrip(),
        "count": len(step.candidates),
        "chosen": data["chosen"],
        "json": Markup(script_json(data)),  # noqa: S704 - escaped by script_json
    }


def _picture(
    candidate: Candidate, phases: NDArray[np.int64], recorded: tuple[str, Sequence[int]] | None
) -> dict[str, Any]:
    """A candidate for the script: its text in pieces of equal shade, its phases, its centroid."""
    text, lengths = (candidate.content, None) if recorded is None else recorded
    signals = candidate.signals
    n_tokens = 0 if signals is None else signals.n_tokens
    centroid = entropy_centroid(phases, n_tokens)
    is_exact = lengths is not None and len(lengths) == n_tokens and sum(lengths) == len(text)
    view: dict[str, Any] = {
        "index": candidate.index,
        "text": text,
        "answer": None if recorded is None or not candidate.content else candidate.content,
        "calls": [f"{call.get('name')}({_arguments(call)})" for call in candidate.tool_calls],
        "tokens": n_tokens if signals is not None else None,
        "finish": candidate.finish_reason,
        "seconds": candidate.seconds,
        "phases": len(phases),
        "centroid": centroid if math.isfinite(centroid) else None,
    }
    if signals is None or not n_tokens:
        return {**view, "pieces": [], "mark": None, "strip": "", "exact": True}
    ends = np.cumsum(lengths) if is_exact and lengths is not None else _even_ends(len(text), n_tokens)
    marked = int(centroid * n_tokens) if math.isfinite(centroid) else None
    return {
        **view,
        "pieces": _pieces(shades(signals), _in_phase(phases, n_tokens), ends),
        "mark": None if marked is None else int(ends[min(marked, n_tokens - 1)]),
        "strip": _strip(signals),
        "exact": bool(is_exact),
    }


def shades(signals: TokenSignals) -> NDArray[np.int64]:
    """Shade of each token, ``(T,)``: 0 to ``LEVELS`` - 1 by entropy, ``LEVELS`` = missing."""
    unit = math.log(max(signals.n_alternatives, 2)) / 2 / LEVELS
    missing = np.isnan(signals.entropies)
    known = np.clip(np.nan_to_num(signals.entropies), 0, LEVELS * unit)
    levels = np.minimum(known / unit, LEVELS - 1).astype(np.int64)
    return np.where(missing, LEVELS, levels)


def script_json(data: object) -> str:
    """Encode as ASCII JSON that can neither end its ``<script>`` element nor open a comment there.

    NaN and infinite numbers, which browsers refuse in JSON, become null.
    """
    text = json.dumps(_finite(data), default=str, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        items = cast("Mapping[Any, Any]", data).items()
        return {str(_finite(key)): _finite(value) for key, value in items}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in cast("Sequence[Any]", data)]
    return data


def _pieces(levels: NDArray[np.int64], in_phase: NDArray[np.bool_], ends: NDArray[np.int64]) -> list[int]:
    """Runs of tokens that look the same, as a flat list of pairs: number of characters, 2 · shade + phase."""
    looks = 2 * levels + in_phase
    last = np.append(np.flatnonzero(np.diff(looks)), len(looks) - 1)
    widths = np.diff(ends[last], prepend=0)
    return np.column_stack((widths, looks[last])).ravel().tolist()


def _in_phase(phases: NDArray[np.int64], n_tokens: int) -> NDArray[np.bool_]:
    marks = np.zeros(n_tokens + 1, dtype=np.int64)
    for start, duration in phases.tolist():
        marks[start] += 1
        marks[min(start + duration, n_tokens)] -= 1
    return np.cumsum(marks)[:n_tokens] > 0


def _even_ends(n_characters: int, n_tokens: int) -> NDArray[np.int64]:
    return (np.arange(1, n_tokens + 1) * n_characters) // n_tokens


def _strip(signals: TokenSignals) -> str:
    """The darkest shade in each segment of the response, one digit per segment."""
    segments = np.array_split(shades(signals), min(STRIP, signals.n_tokens))
    return "".join(str(int(known.max()) if len(known := part[part < LEVELS]) else LEVELS) for part in segments)


def _recorded_texts(step: Step) -> dict[int, tuple[str, Sequence[int]]]:
    """Text and token lengths of each candidate, if the trace has them."""
    tokens: Any = step.info.get("tokens")
    if not isinstance(tokens, Mapping):
        return {}
    texts: dict[int, tuple[str, Sequence[int]]] = {}
    for index, entry in cast("Mapping[str, Any]", tokens).items():
        try:
            texts[int(index)] = str(entry["text"]), [int(length) for length in entry["lengths"]]
        except (KeyError, TypeError, ValueError, OverflowError):
            continue  # other programs may write anything under this name
    return texts


def _arguments(call: Mapping[str, Any]) -> str:
    return json.dumps(call.get("args"), ensure_ascii=False, default=str)


def _scores_chart(row: Row) -> Markup:
    scores = row.scores
    if scores is None:
        raise AssertionError("only rows with scores are charted")
    return Markup(bars(scores.right, scores.wrong, scores.edges, f"{row.selector} (right end = better)"))  # noqa: S704


def _svg(chart: Chart | None) -> Markup | None:
    return None if chart is None else Markup(lines(chart))  # noqa: S704 - escaped by charts


def _write(path: str | Path, template: str, **values: Any) -> None:
    style, script = _asset("report.css"), _asset("report.js")
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = _percent
    page = environment.get_template(template).generate(
        **values,
        style=Markup(style),  # noqa: S704 - the package's own file
        script=Markup(script),  # noqa: S704 - the package's own file
        policy=f"{_NOTHING}; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
    )
    with replacing(path) as file:
        file.writelines(page)  # piece by piece, so that one step at a time is in memory


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _asset(name: str) -> str:
    return (resources.files("ec_agents.evaluation") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The name of an inline element in a content-security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
