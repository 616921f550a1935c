"""Reports: everything is escaped, nothing is loaded, thousands of candidates open at once."""

import html
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import CHROMIUM, browser_page
from helpers.candidates import candidate, signals
from hypothesis import given, strategies as st

from ec_agents.candidates import Candidate, Step
from ec_agents.errors import ConfigError, TraceError
from ec_agents.evaluation import charts
from ec_agents.evaluation.comparison import evaluate, evaluate_runs
from ec_agents.evaluation.html import explain, script_json, shades, timing, write_evaluation_report, write_trace_report
from ec_agents.evaluation.outcomes import Graded, RunOutcome
from ec_agents.evaluation.plots import write_plots
from ec_agents.scoring import SCORERS
from ec_agents.selection import Selector, select

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "<!--<script>",
    "]]>{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "\u2028\u2029\u202e\u0000\ufeff",
    "👩‍👩‍👧 ünï 漢字",
    "&lt;b&gt; &amp;",
]

browser = pytest.mark.browser
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no headless browser: {CHROMIUM} is absent")


def hostile_step(text: str) -> Step:
    drawn = [
        Candidate(
            index=0,
            content=text,
            tool_calls=[{"name": text, "args": {text: text}}],
            signals=signals([1.0, 0.0, 2.0]),
            flaws={text: text},
            finish_reason=text,
        ),
        candidate(1, [0.1] * 5, content=text, finish_reason="stop"),
    ]
    tokens = {"1": {"text": text, "lengths": [len(text), 0, 0, 0, 0]}}
    info = {"tokens": tokens, text: text}
    return Step(run=text, task=f"task {text}", candidates=drawn, failures={2: text}, selection=select(drawn), info=info)


class Tags(HTMLParser):
    """What a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def tags(path: Path) -> Tags:
    found = Tags()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def an_evaluation(name: str = "centroid") -> Any:
    rng = np.random.default_rng(0)
    graded = []
    for i in range(30):
        right = rng.random(8) < 0.5
        drawn = [
            Candidate(
                index=j,
                content=f"answer {j % 3}",
                signals=signals(rng.gamma(0.4, 1, 40)[np.argsort(rng.random(40) + (np.arange(40) / 40 if ok else 0))]),
                usage={"input_tokens": 9, "output_tokens": 40, "total_tokens": 49},
            )
            for j, ok in enumerate(right)
        ]
        graded.append(Graded(step=Step(run=str(i), candidates=drawn), right=dict(enumerate(right.tolist()))))
    selectors = {name: Selector(), "mean-entropy": Selector(scorer=SCORERS["mean-entropy"]())}
    return evaluate(graded, selectors, resamples=50, prices=(1, 2))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_makes_no_markup(tmp_path: Path, text: str):
    """Whatever a model writes, the page has the elements and attributes of a harmless page."""
    write_trace_report([hostile_step(text)], tmp_path / "hostile.html", title=text)
    write_trace_report([hostile_step("harmless")], tmp_path / "harmless.html", title="harmless")
    found, expected = tags(tmp_path / "hostile.html"), tags(tmp_path / "harmless.html")
    assert found.tags == expected.tags
    assert found.attributes == expected.attributes


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_make_no_markup_in_an_evaluation(tmp_path: Path, text: str):
    write_evaluation_report(an_evaluation(text), tmp_path / "hostile.html", title=text)
    write_evaluation_report(an_evaluation("harmless"), tmp_path / "harmless.html", title="harmless")
    found, expected = tags(tmp_path / "hostile.html"), tags(tmp_path / "harmless.html")
    assert found.tags == expected.tags
    differing = {name for name, value in found.attributes if (name, value) not in expected.attributes}
    assert differing <= {"aria-label"}


@given(
    st.recursive(st.text() | st.sampled_from(HOSTILE) | st.integers() | st.none(), lambda t: st.lists(t, max_size=3))
)
def test_json_in_a_script_says_the_same_and_cannot_end_it(data: Any):
    text = script_json(data)
    assert json.loads(text) == data
    assert not re.search("[<>&\u2028\u2029]", text)


def test_no_number_that_browsers_refuse(tmp_path: Path):
    """NaN and infinite numbers anywhere in a trace are null in the page."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    odd = [math.nan, math.inf, -math.inf]
    drawn = [
        Candidate(
            index=i, content="x", signals=signals([x, 1.0]), seconds=x, tool_calls=[{"name": "f", "args": {"x": x}}]
        )
        for i, x in enumerate(odd)
    ]
    chosen = select([candidate(i, [0.1]) for i in range(3)])
    chosen = replace(chosen, scores=dict(enumerate(odd)), margin=math.nan)
    step = Step(run="a", candidates=drawn, selection=chosen, seconds=math.nan, info={"tokens": {"0": 5, "x": {}}})
    write_trace_report([step], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    [data] = re.findall(r'<script type="application/json">(.*?)</script>', text)
    assert len(json.loads(data, parse_constant=refuse)["candidates"]) == 3
    assert json.loads(script_json({"a": odd, 1: (math.nan,)}), parse_constant=refuse) == {"a": [None] * 3, "1": [None]}


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path):
    def steps() -> Iterator[Step]:
        yield hostile_step("a")
        raise TraceError("torn", "t.jsonl")

    (tmp_path / "a.html").write_text("precious")
    with pytest.raises(TraceError, match="torn"):
        write_trace_report(steps(), tmp_path / "a.html")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_charts_show_the_same_in_pages_and_plots():
    """Both draw these lines: the references, then the first selectors."""
    found = an_evaluation()
    by_n, by_tokens = charts.accuracy_by_n(found), charts.gain_by_tokens(found)
    assert by_n is not None
    assert by_tokens is not None
    assert [s.name for s in by_n.series] == ["oracle", "majority", "random", "centroid", "mean-entropy", "learned"]
    assert [s.name for s in by_tokens.series] == ["oracle", "majority", "centroid", "mean-entropy", "learned"]
    assert dict(by_n.series[3].points) == {n: at.value for n, at in found.row("centroid").curve.items()}
    runs = [RunOutcome(task=str(i), selector="first", right=True) for i in range(4)]
    assert charts.accuracy_by_n(evaluate_runs(runs)) is None


def test_a_lone_surrogate_does_not_stop_a_report(tmp_path: Path):
    step = hostile_step("half \ud83d of a pair")
    assert write_trace_report([step], tmp_path / "a.html") == 1


def test_the_policy_allows_the_page_itself_and_nothing_else(tmp_path: Path):
    write_trace_report([hostile_step("a")], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1])  # type: ignore[index]
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not re.search(r"""(src|href|style)\s*=\s*["']""", text)


def test_a_step_is_summed_up_in_words():
    phases = [0.0] * 50 + [2.0] * 4 + [0.0] * 46, [2.0] * 4 + [0.0] * 96
    drawn = [candidate(i, entropies, content="a") for i, entropies in enumerate(phases)]
    said = explain(select(drawn))
    assert said.startswith("Candidate 1 was chosen by centroid: it has the best score. It leads by 0.5, ")
    assert said.endswith("of steps: within the noise. 2 of 2 would do the same.") or "above the noise" in said
    assert explain(select(drawn[:1])) == "Candidate 0 was chosen by centroid: there was no other."
    nothing = [Candidate(index=i, content=str(i)) for i in range(2)]
    assert "there was nothing to rank by" in explain(select(nothing))


def test_timings_are_summed_up_in_words():
    drawn = [candidate(i, [1.0], seconds=seconds) for i, seconds in enumerate((0.5, None, 2.0))]
    assert timing(Step(run="a", candidates=drawn, seconds=2.125)) == (
        "Sampling took 2.12 s, the slowest call 2 s, 2 calls together 2.5 s."
    )
    assert timing(Step(run="a", candidates=drawn[:1])) == "The slowest call 0.5 s, 1 calls together 0.5 s."
    assert timing(Step(run="a", candidates=drawn[1:2])) == ""


def test_incomplete_steps(tmp_path: Path):
    """A step without a choice or a candidate is shown as what it is."""
    steps = [
        Step(run="a", candidates=[candidate(0, [1.0, 0.0])]),
        Step(run="b", failures={0: "TimeoutError: 30 s"}),
    ]
    assert write_trace_report(iter(steps), tmp_path / "a.html") == 2
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "The trace records no choice; this one was replayed. Candidate 0" in text
    assert "No candidate: every call failed." in text
    assert write_trace_report([], tmp_path / "b.html") == 0
    assert "The trace has no steps." in (tmp_path / "b.html").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="phases must be"):
        write_trace_report([], tmp_path / "c.html", phases="long")


def test_shades_follow_entropy():
    half = math.log(20) / 2
    assert shades(signals([0.0, 0.01, half * 0.99, half * 3, math.nan])).tolist() == [0, 0, 7, 7, 8]


def test_axes_have_round_ticks():
    assert list(charts.percent_axis([0.31, 0.58], "").ticks) == pytest.approx([0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6])
    assert list(charts.percent_axis([0.5, 0.5], "").ticks) == pytest.approx([0.5, 0.51])
    assert list(charts.log_axis([1, 16], "").ticks) == [1, 2, 4, 8, 16]
    assert charts.log_axis([100, 12_800], "").share(1131.37) == pytest.approx(0.5, abs=0.001)


def test_evaluation_page(tmp_path: Path):
    """It shows the table, curves, distributions and reliability."""
    write_evaluation_report(an_evaluation(), tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    for heading in (
        "Accuracy against the number",
        "against tokens",
        "Scores of right and wrong",
        "Reliability of the margin",
    ):
        assert heading in text
    assert text.count("<svg") == 2 + 3 + 3 + 6  # curves, distributions, reliability, and the keys
    runs = [RunOutcome(task=str(i), selector=name, right=True) for i in range(4) for name in ("first", "mine")]
    write_evaluation_report(evaluate_runs(runs), tmp_path / "b.html")
    assert "runs of each selector" in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_plots_are_files(tmp_path: Path):
    files = write_plots(an_evaluation(), tmp_path / "plots")
    names = [path.name for path in files]
    assert names == [f"{n}.{s}" for n in ("accuracy", "accuracy_by_n", "gain_by_tokens") for s in ("png", "svg")]
    assert all(path.stat().st_size > 5000 for path in files)


@browser
@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
async def test_pages_in_a_browser(tmp_path: Path, width: int, dark: bool):  # noqa: FBT001
    """Hostile text is shown as text, nothing is asked of the network, nothing is wider than the screen."""
    write_trace_report([hostile_step(text) for text in HOSTILE], tmp_path / "trace.html")
    write_evaluation_report(an_evaluation(HOSTILE[1]), tmp_path / "evaluation.html")
    async with browser_page() as page:
        for name in ("trace", "evaluation"):
            await page.open(tmp_path / f"{name}.html", width=width, dark=dark)
            await page.run("document.querySelectorAll('details').forEach((step) => { step.open = true; })")
            await page.run("new Promise((done) => setTimeout(done, 100))")
            assert await page.run("document.documentElement.scrollWidth") <= width
            assert (
                await page.run("document.images.length + document.querySelectorAll('iframe, link, object').length") == 0
            )
            header = ".results thead th" if name == "evaluation" else ".scores th"
            heights = await page.run(f"[...document.querySelectorAll('{header}')].map((cell) => cell.offsetHeight)")
            assert max(heights) < 100  # no heading with a letter a line
            assert await page.run(f"document.querySelector('{header}').offsetWidth") <= width / 2
            background = await page.run("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
            if name == "trace":
                shown = await page.run(
                    "[...document.querySelectorAll('.candidate div.text')].map((box) => box.textContent)"
                )
                assert len(shown) == 2 * len(HOSTILE)
                assert [text.replace("▼", "") for text in shown if "img" in text] == [HOSTILE[1]] * 2
                assert await page.run("document.querySelectorAll('.mark').length") > len(HOSTILE)
        assert page.complaints == []
        assert {url.split(":")[0] for url in page.requests} == {"file"}


@browser
@needs_chromium
async def test_five_hundred_steps_of_64_candidates_open(tmp_path: Path):
    rng = np.random.default_rng(0)
    drawn = [candidate(i, rng.gamma(0.3, 1, 300), content="word " * 300) for i in range(64)]
    chosen = select(drawn)
    steps = (Step(run=f"run {i}", candidates=drawn, selection=chosen) for i in range(500))
    assert write_trace_report(steps, tmp_path / "large.html") == 500
    async with browser_page() as page:
        await page.open(tmp_path / "large.html")
        await page.run("document.querySelectorAll('details')[499].open = true")
        await page.run("new Promise((done) => setTimeout(done, 100))")
        assert await page.run("document.querySelectorAll('.candidate').length") == 128
        assert await page.run("document.querySelectorAll('details').length") == 500
        assert await page.run("document.querySelectorAll('*').length") < 60_000
        assert page.complaints == []
