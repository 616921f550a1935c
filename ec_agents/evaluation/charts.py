"""The charts of an evaluation: what they show, and how they look as SVG.

The SVG has classes instead of styles, so that the page's colours and security policy apply to it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from ec_agents.evaluation.settings import REFERENCES
from ec_agents.evaluation.table import Evaluation, Row

MOST_LINES = 5
"""Selectors in a chart, besides the references."""

WIDTH, HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 22, 12, 40

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line of a chart."""

    name: str
    """Name in the legend."""
    points: Sequence[Point]
    """x and y of each point."""
    style: str
    """Class of the line: ``s0`` to ``s4`` for selectors, ``reference r0`` to ``reference r2`` for references."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over one axis; y is a share."""

    series: Sequence[Series]
    """The lines."""
    x: str
    """Label of the x axis."""
    y: str
    """Label of the y axis."""
    is_log: bool = False
    """Whether the x axis is logarithmic."""


def shown_rows(evaluation: Evaluation) -> list[tuple[Row, str]]:
    """The rows that charts show, each with the style of its line: the references and the first selectors."""
    styles = {name: f"reference r{i}" for i, name in enumerate(REFERENCES)}
    references = [(row, styles[name]) for name in REFERENCES for row in evaluation.rows if row.selector == name]
    return references + [(row, f"s{i}") for i, row in enumerate(evaluation.own[:MOST_LINES])]


def accuracy_by_n(evaluation: Evaluation) -> Chart | None:
    """Accuracy against the number of candidates; None without curves."""
    series = [
        Series(name=row.selector, style=style, points=[(n, at.value) for n, at in row.curve.items()])
        for row, style in shown_rows(evaluation)
        if row.curve
    ]
    return _unless_flat(Chart(series=series, x="candidates per step", y="accuracy", is_log=True))


def gain_by_tokens(evaluation: Evaluation) -> Chart | None:
    """Gain over a single call against the tokens of n candidates; None without curves or token counts."""
    single = next((row.accuracy.value for row in evaluation.rows if row.selector == "avg@1"), math.nan)
    series = [
        Series(
            name=row.selector,
            style=style,
            points=[(row.tokens * n / max(row.curve), at.value - single) for n, at in row.curve.items()],
        )
        for row, style in shown_rows(evaluation)
        if row.curve and row.tokens and row.selector != "random"
    ]
    return _unless_flat(Chart(series=series, x="tokens per task", y="gain over a single call", is_log=True))


def accuracy_by_margin(row: Row) -> Chart | None:
    """Accuracy of the choice, and of a random one, from small margins to large ones; None without margins."""
    series = [
        Series(name="chosen", style="s0", points=[(bin_.margin, bin_.right) for bin_ in row.margins]),
        Series(name="random", style="reference r2", points=[(bin_.margin, bin_.random) for bin_ in row.margins]),
    ]
    return _unless_flat(Chart(series=series, x=f"margin of {row.selector}", y="accuracy"))


def _unless_flat(chart: Chart) -> Chart | None:
    """The chart, if it has two or more different x."""
    return chart if len({x for series in chart.series for x, _ in series.points}) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An axis, which maps values to positions."""

    low: float
    high: float
    ticks: Sequence[float]
    label: str
    text: Callable[[float], str]
    """Formats a tick."""
    is_log: bool = False

    def share(self, value: float) -> float:
        """Position of a value along the axis, 0..1."""
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5


def lines(chart: Chart) -> str:
    """Draw the lines, with a dot at each point, as an ``<svg>`` element."""
    points = [point for series in chart.series for point in series.points]
    x = (log_axis if chart.is_log else linear_axis)([a for a, _ in points], chart.x)
    y = percent_axis([b for _, b in points], chart.y)
    return _svg(f"{y.label} against {x.label}", [*_grid(x, y), *(p for one in chart.series for p in _line(one, x, y))])


def bars(right: Sequence[int], wrong: Sequence[int], edges: Sequence[float], label: str) -> str:
    """Draw the shares of right candidates upwards and of wrong ones downwards, as an ``<svg>`` element."""
    shares = [[count / max(1, sum(counts)) for count in counts] for counts in (right, wrong)]
    top = max(max(column) for column in shares) or 1.0
    x = Axis(low=edges[0], high=edges[-1], ticks=(edges[0], edges[-1]), label=label, text=lambda v: f"{v:.3g}")
    y = Axis(low=-top, high=top, ticks=(), label="share", text=str)
    parts = list(_grid(x, y))
    for share, sign, style in ((shares[0], 1, "right"), (shares[1], -1, "wrong")):
        for low, high, value in zip(edges, edges[1:], share, strict=False):
            left, far = _x(x, low) + 0.5, _x(x, high) - 0.5
            ends = sorted((_y(y, 0.0), _y(y, sign * value)))
            parts.append(
                f'<rect class="{style}" x="{left:.1f}" y="{ends[0]:.1f}" width="{max(far - left, 0.5):.1f}" '
                f'height="{ends[1] - ends[0]:.1f}"/>'
            )
    parts.append(f'<text x="{_LEFT + 4}" y="{_TOP + 12}">right ↑</text>')
    parts.append(f'<text x="{_LEFT + 4}" y="{HEIGHT - _BOTTOM - 6}">wrong ↓</text>')
    return _svg(f"scores of right and wrong candidates: {label}", parts)


def percent_axis(values: Sequence[float], label: str) -> Axis:
    """An axis for shares, with round ticks that enclose the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / step <= 6 or step == 0.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [step * i for i in range(first, max(last, first + 1) + 1)]
    return Axis(low=ticks[0], high=ticks[-1], ticks=ticks, label=label, text=lambda v: f"{100 * v:.0f} %")


def log_axis(values: Sequence[float], label: str) -> Axis:
    """A logarithmic axis, with a tick at each doubling."""
    low, high = min(values, default=1.0), max(values, default=2.0)
    ticks = [low * 2**i for i in range(int(math.log2(high / low) + 1e-9) + 1)]
    return Axis(low=low, high=max(high, low * 1.01), ticks=ticks, label=label, text=_short, is_log=True)


def linear_axis(values: Sequence[float], label: str) -> Axis:
    """An axis with ticks at its ends and in the middle."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    high = high if high > low else low + 1.0
    return Axis(low=low, high=high, ticks=(low, (low + high) / 2, high), label=label, text=lambda v: f"{v:.2g}")


def _short(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM)


def _grid(x: Axis, y: Axis) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>']
    for value in y.ticks:
        at = _y(y, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 5}" y="{at + 4:.1f}">{escape(y.text(value))}</text>')
    parts += [
        f'<text class="middle" x="{_x(x, value):.1f}" y="{bottom + 16}">{escape(x.text(value))}</text>'
        for value in x.ticks
    ]
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="middle label" x="{middle}" y="{HEIGHT - 6}">{escape(x.label)}</text>')
    return parts


def _line(series: Series, x: Axis, y: Axis) -> list[str]:
    places = [(_x(x, a), _y(y, b)) for a, b in series.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    name = escape(series.name)
    dots = [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in places]
    return [f'<g class="{escape(series.style)}"><title>{name}</title><polyline points="{path}"/>', *dots, "</g>"]


def _svg(title: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
