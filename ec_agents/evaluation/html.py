"""Stage 8 - show: a trace or an evaluation as one self-contained HTML file.

Model output is untrusted. Everything goes through escaping templates, or as JSON that a script puts into text nodes;
the page's policy allows its own style and script, by their hashes, and nothing else: no network, images or forms.
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
from ec_agents.evaluation.charts import Axis, Series, bars, line_chart, linear_axis, log_axis, percent_axis
from ec_agents.evaluation.comparison import BASELINES
from ec_agents.evaluation.table import ALWAYS, Evaluation, Row
from ec_agents.scoring import CentroidScorer
from ec_agents.selection import Selector

try:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup
except ImportError as error:
    raise ImportError(f"reports need the extra 'report' ({error}): pip install 'ec-agents[report]'") from error

LEVELS = 8
"""Shades of token entropy, from none to half of the largest possible entropy; one more stands for missing."""
STRIP = 48
"""Parts of the picture of a whole response."""
MOST_LINES = 5
"""Selectors in a chart, besides the references."""
REFERENCES = ("oracle", "majority", "random")

_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'"

REASONS = {
    "ranked": "it has the best score",
    "tie_break": "several have the best score; the tie was broken",
    "only_one": "there was no other",
    "only_sound": "all others are flawed",
    "fallback": "there was nothing to rank by; the fallback decided",
    "all_flawed": "all are flawed; its flaw is the mildest",
}


def write_trace_report(
    steps: Iterable[Step], path: str | Path, *, title: str = "Trace", phases: PhaseConfig | str = "paper"
) -> int:
    """Write the steps of a trace as one HTML file, and say how many there were.

    A step without a recorded choice is shown with that of the lowest centroid. One step at a time is in memory.

    Args:
        steps: As ``read_steps`` gives them.
        path: The file.
        title: Heading of the page.
        phases: How the phases are found that are underlined.

    Raises:
        ConfigError: There is no preset of that name.
    """
    scorer = CentroidScorer(phases)
    count = itertools.count()
    shown = (_step_view(step, scorer) for step in steps for _ in [next(count)])
    _write(path, "trace.html.j2", title=title, steps=shown)
    return next(count)


def write_evaluation_report(evaluation: Evaluation, path: str | Path, *, title: str = "Evaluation") -> None:
    """Write an evaluation as one HTML file: table, curves, score distributions, reliability of the margin."""
    rows = evaluation.rows
    own = [row for row in rows if row.selector not in {*ALWAYS, *BASELINES}]
    shown = own[:MOST_LINES]
    references = [row for name in REFERENCES for row in rows if row.selector == name]
    lines = [(row, f"reference r{i}") for i, row in enumerate(references)] + [(r, f"s{i}") for i, r in enumerate(shown)]
    _write(
        path,
        "evaluation.html.j2",
        title=title,
        evaluation=evaluation,
        baselines=[name for name in evaluation.baselines if any(name in row.versus for row in rows)],
        most_trials=max((k for row in rows for k in row.pass_hat), default=1),
        legend=[(row.selector, style) for row, style in lines],
        left_out=len(own) - len(shown),
        by_n=_by_n(lines),
        by_tokens=_by_tokens(lines, evaluation),
        distributions=[(row.selector, _scores_chart(row)) for row in shown if row.scores is not None],
        reliability=[(row.selector, _margin_chart(row)) for row in shown if len(row.margins) > 1],
    )


def explain(selection: Selection) -> str:
    """In a sentence or two, why this candidate was chosen, and how much that means."""
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
    """In a sentence, how long drawing took, the slowest call, and all calls one after the other; empty if unknown."""
    calls = [candidate.seconds for candidate in step.candidates if candidate.seconds is not None]
    said = [] if step.seconds is None else [f"drawing took {step.seconds:.3g} s"]
    if calls:
        said += [f"the slowest call {max(calls):.3g} s", f"{len(calls)} calls together {sum(calls):.3g} s"]
    return f"{', '.join(said)}.".capitalize() if said else ""


def _step_view(step: Step, scorer: CentroidScorer) -> dict[str, Any]:
    """What the template needs of a step; the candidates as JSON, for the script to show when the step is opened."""
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
    why = why if recorded or selection is None else f"Replayed, the trace records no choice. {why}"
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
    """A candidate for the script: its text in pieces of one shade, its phases, its centroid."""
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
    levels = np.clip(np.nan_to_num(signals.entropies) / unit, 0, LEVELS - 1).astype(np.int64)
    return np.where(missing, LEVELS, levels)


def script_json(data: object) -> str:
    """JSON that cannot end the ``<script>`` element that it stands in, nor open a comment there; ASCII only."""
    text = json.dumps(data, default=str)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _pieces(levels: NDArray[np.int64], in_phase: NDArray[np.bool_], ends: NDArray[np.int64]) -> list[int]:
    """Runs of tokens of one look: number of characters, then 2 · shade + phase, one after the other."""
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
    """The darkest shade in each part of the response, one digit a part."""
    parts = np.array_split(shades(signals), min(STRIP, signals.n_tokens))
    return "".join(str(int(known.max()) if len(known := part[part < LEVELS]) else LEVELS) for part in parts)


def _recorded_texts(step: Step) -> dict[int, tuple[str, Sequence[int]]]:
    """Text and token lengths of each candidate, where the trace has them."""
    found: Any = step.info.get("tokens")
    if not isinstance(found, Mapping):
        return {}
    entries = cast("Mapping[str, Any]", found)
    return {int(index): (str(entry["text"]), list(entry["lengths"])) for index, entry in entries.items()}


def _arguments(call: Mapping[str, Any]) -> str:
    return json.dumps(call.get("args"), ensure_ascii=False, default=str)


def _by_n(lines: Sequence[tuple[Row, str]]) -> Markup | None:
    series = [
        Series(name=row.selector, style=style, points=list(row.curve.items())) for row, style in lines if row.curve
    ]
    return _chart(series, "candidates drawn", "right", log=True)


def _by_tokens(lines: Sequence[tuple[Row, str]], evaluation: Evaluation) -> Markup | None:
    """Gain over a single call, against the tokens that n candidates take."""
    single = next((row.accuracy.value for row in evaluation.rows if row.selector == "avg@1"), None)
    series = [
        Series(
            name=row.selector,
            style=style,
            points=[(row.tokens * n / max(row.curve), value - single) for n, value in row.curve.items()],
        )
        for row, style in lines
        if row.curve and row.tokens and single is not None and row.selector != "random"
    ]
    return _chart(series, "tokens a task", "gain", log=True)


def _scores_chart(row: Row) -> Markup:
    scores = row.scores
    if scores is None:
        raise AssertionError("only rows with scores are charted")
    return Markup(bars(scores.right, scores.wrong, scores.edges, f"{row.selector} (right end = better)"))  # noqa: S704


def _margin_chart(row: Row) -> Markup | None:
    series = [
        Series(name="chosen", style="s0", points=[(bin_.margin, bin_.right) for bin_ in row.margins]),
        Series(name="random", style="reference r2", points=[(bin_.margin, bin_.random) for bin_ in row.margins]),
    ]
    return _chart(series, f"margin of {row.selector}", "right", log=False)


def _chart(series: Sequence[Series], x_label: str, y_label: str, *, log: bool) -> Markup | None:
    points = [point for one in series for point in one.points]
    if len({x for x, _ in points}) < 2:
        return None
    axis = log_axis if log else linear_axis
    x: Axis = axis([x for x, _ in points], x_label)
    return Markup(line_chart(series, x, percent_axis([y for _, y in points], y_label)))  # noqa: S704 - escaped by charts


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
    with Path(path).open("w", encoding="utf-8", errors="replace") as file:
        file.writelines(page)  # piece by piece, so that one step at a time is in memory


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _asset(name: str) -> str:
    return (resources.files("ec_agents.evaluation") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content-security policy calls an inline element by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
