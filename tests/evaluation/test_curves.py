"""Curves over N: a majority counted on many subsets at once is the majority of each."""

import itertools
from typing import Any

import numpy as np
import pytest
from helpers.graded import measured
from hypothesis import given, settings, strategies as st

from ec_agents.candidates import Step
from ec_agents.evaluation.comparison import evaluate
from ec_agents.evaluation.outcomes import Graded
from ec_agents.evaluation.replay import SelectorStrategy, curve_points
from ec_agents.scoring import CentroidScorer, MajorityVote, scorer_named
from ec_agents.selection import Selector

CANDIDATES = st.tuples(st.sampled_from("aabc "), st.sampled_from(["stop", "stop", "length"]), st.booleans())


@settings(max_examples=40, deadline=None)
@given(st.lists(CANDIDATES, min_size=2, max_size=6), st.integers(0, 1), st.integers(0, 9))
@pytest.mark.parametrize("tie_break", [None, CentroidScorer("short")])
def test_a_curve_is_the_mean_over_all_subsets(tie_break: Any, drawn: list[Any], lost: int, seed: int):
    rng = np.random.default_rng(seed)
    made = [
        measured(i, float(rng.random()), tokens=5, content=text.strip(), finish_reason=reason)
        for i, (text, reason, _) in enumerate(drawn)
    ]
    step = Step(run="r", task="t", candidates=made, failures=dict.fromkeys(range(len(made), len(made) + lost), "e"))
    graded = Graded(step=step, right={i: right for i, (_, _, right) in enumerate(drawn)})
    selector = Selector(scorer=MajorityVote(tie_break=tie_break))
    points = curve_points(graded.n_drawn)
    for n, found in zip(points, SelectorStrategy(selector, rng)(graded, points).curve, strict=True):
        subsets = list(itertools.combinations(range(graded.n_drawn), n))
        kept = [[made[i] for i in subset if i < len(made)] for subset in subsets]
        assert found == pytest.approx(np.mean([graded.right[selector.choose(s)] if s else 0.0 for s in kept]))


@pytest.mark.parametrize("name", ["borda", "deepconf-vote", "centroid-weighted-vote", "tail-entropy"])
def test_remembered_scores_change_nothing(name: str):
    rng = np.random.default_rng(0)
    texts = [str(text) for text in rng.choice(["a", "b"], 5)]
    made = [measured(i, float(rng.random()), tokens=4 + i, content=texts[i]) for i in range(5)]
    graded = Graded(step=Step(run="r", task="t", candidates=made), right={i: i % 2 == 0 for i in range(5)})
    selector = Selector(scorer=scorer_named(name))
    found = SelectorStrategy(selector, rng)(graded, (1, 2, 3, 4, 5)).curve
    for n in (2, 3, 4):
        subsets = itertools.combinations(made, n)
        assert found[n - 1] == pytest.approx(np.mean([graded.right[selector.choose(s)] for s in subsets]))


def test_curves_coverage_and_diversity_have_intervals():
    made = [measured(i, 0.1 * i, content="same" if i else "other") for i in range(4)]
    graded = [
        Graded(step=Step(run=f"r{t}", task=f"t{t}", candidates=made), right={i: (i + t) % 3 == 0 for i in range(4)})
        for t in range(9)
    ]
    table = evaluate(graded, {}, resamples=50)
    assert table.equal is not None
    assert table.equal.value == pytest.approx(0.5)
    assert table.effective_n is not None
    assert table.effective_n.value == pytest.approx(16 / 10)
    row = table.row("majority")
    assert set(row.coverage) == {10, 25, 50, 75, 100}
    assert row.coverage[100].value == row.accuracy.value
    assert row.margin_brier is not None
    assert all(at.low <= at.value <= at.high for at in row.curve.values())
    assert len(row.by_task) == len(table.tasks) == 9
