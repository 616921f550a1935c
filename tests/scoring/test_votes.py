"""Votes against the reference implementations' choices, and their properties."""

import itertools
import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers.candidates import candidate
from helpers.paths import DATA
from hypothesis import given, strategies as st

from ec_agents.candidates import Candidate, Selection
from ec_agents.errors import ConfigError
from ec_agents.scoring import (
    BordaVote,
    CentroidScorer,
    CentroidVote,
    CentroidWeightedVote,
    DeepConfVote,
    MajorityVote,
    Scorer,
    action_key,
    scorer_named,
)
from ec_agents.scoring.base import Best
from ec_agents.scoring.noise import vote_chance
from ec_agents.selection import Selector

CASES = json.loads((DATA / "golden.json").read_text())["cases"]["voting"]
ABSENT = "(no answer)"
"""Text that stands for the missing answer where the reference lets missing answers vote together."""

voting = pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in CASES])


class Known:
    """Scores known beforehand, by candidate index."""

    name = "known"

    def __init__(self, scores: Sequence[float], best: Best = "lowest") -> None:
        self.scores = scores
        self.best: Best = best

    def __call__(self, candidates: Sequence[Candidate]) -> Any:
        return np.array([self.scores[candidate.index] for candidate in candidates])


def answers(texts: Sequence[str | None], absent: str = "") -> list[Candidate]:
    return [Candidate(index=i, content=absent if text is None else text) for i, text in enumerate(texts)]


def choose(scorer: Scorer, candidates: Sequence[Candidate]) -> Selection:
    return Selector(scorer=scorer, guards={})(candidates)


def everyone(candidates: Sequence[Candidate]) -> Any:
    return np.ones(len(candidates), dtype=np.bool_)


def exact(candidate: Candidate) -> str:
    return candidate.content


# Against the reference


@voting
def test_majority_equals_the_reference(case: Any):
    choice = choose(MajorityVote(), answers(case["answers"]))
    expected = case["expected"]["majority"]
    assert choice.chosen == expected["selected"]
    if expected["winning_answer_key"] is not None:
        assert (choice.margin == 0) == expected["had_tie"]


@voting
def test_centroid_voting_equals_the_reference(case: Any):
    for expected in case["expected"]["centroid_voting"]:
        vote = CentroidVote(Known(case["centroids"]), percent=expected["select_percent"])
        drawn = answers(case["answers"], ABSENT)
        assert vote.weights(drawn, everyone(drawn)).sum() == expected["num_selected_for_voting"]
        assert choose(vote, drawn).chosen == expected["selected"]


@voting
def test_centroid_weighted_voting_equals_the_reference(case: Any):
    for expected in case["expected"]["centroid_weighted_voting"]:
        scorer = Known(case["centroids"])
        vote = CentroidWeightedVote(scorer, expected["weight_method"], expected["outlier_method"])
        drawn = answers(case["answers"], ABSENT)
        weights = vote.weights(drawn, everyone(drawn))
        if expected["weights"] is not None:  # otherwise all are outliers, and no weights were recorded
            assert weights == pytest.approx(expected["weights"], rel=1e-12)
        choice = choose(vote, drawn)
        assert choice.scores[choice.chosen] == pytest.approx(expected["winning_weight"], rel=1e-12, abs=1e-12)
        tied = choice.scores[expected["selected"]] == pytest.approx(choice.scores[choice.chosen], abs=1e-12)
        if tied:  # a departure: of equal actions the one with the lowest centroid acts, not the first one
            assert case["centroids"][choice.chosen] <= case["centroids"][expected["selected"]]
        else:
            assert choice.chosen == expected["selected"]


@voting
def test_deepconf_votes_equal_the_reference(case: Any):
    drawn = answers(case["answers"])
    simple = case["expected"]["deepconf_simple_majority"]
    assert case["answers"][choose(MajorityVote(exact), drawn).chosen] == simple
    scorer = Known(case["confidences"], best="highest")
    weighted = choose(DeepConfVote(scorer, keep_percent=100, key=exact), drawn)
    assert case["answers"][weighted.chosen] == case["expected"]["deepconf_weighted_majority"]
    for expected in case["expected"]["deepconf_filter"]:
        vote = DeepConfVote(scorer, keep_percent=100 * expected["top_percent"], key=exact)
        voting = np.array([candidate.content != "" for candidate in drawn])
        kept = np.flatnonzero(vote.weights(drawn, voting) > 0).tolist() if voting.any() else []
        assert kept == expected["kept"]
        assert case["answers"][choose(vote, drawn).chosen] == expected["weighted_answer"]


@voting
def test_borda_equals_the_reference(case: Any):
    drawn = answers(case["answers"])
    for expected in case["expected"]["borda"]:
        vote = BordaVote(Known(case["confidences"], best="highest"), expected["power"], key=exact)
        choice = choose(vote, drawn)
        assert case["answers"][choice.chosen] == expected["winning_answer"]
        if expected["winning_answer"] is not None:
            assert choice.scores[choice.chosen] == pytest.approx(expected["winning_votes"])


def test_departures_from_the_reference():
    # Candidates without an answer neither vote together nor win; the reference lets them in both centroid votes.
    case = next(case for case in CASES if case["answers"].count(None) == 2)
    of_all = next(e for e in case["expected"]["centroid_voting"] if e["select_percent"] == 100)
    assert case["answers"][of_all["selected"]] is None
    choice = choose(CentroidVote(Known(case["centroids"]), percent=100), answers(case["answers"]))
    assert case["answers"][choice.chosen] is not None
    # Answers that differ in case or spacing are one; DeepConf and Self-Certainty take them for several.
    spaced = answers([" 42 ", "42", "43", "43 ", "43 \n", "42", "A", "a"])
    assert MajorityVote()(spaced).tolist() == [3, 3, 3, 3, 3, 3, 2, 2]
    # Ties between actions go to the one that holds the best score, in both centroid votes.
    tie = CentroidWeightedVote(Known([0.6, 0.2]), outliers="threshold")
    assert choose(tie, answers(["p", "q"])).chosen == 1


# What is the same action


CALLS = [
    {"name": "search", "args": {"q": "cats", "why": "the user likes them"}, "id": "1"},
    {"name": "search", "args": {"why": "they are nice", "q": "cats"}, "id": "2"},
    {"name": "search", "args": {"q": "dogs", "why": "-"}, "id": "3"},
    {"name": "stop", "args": {}, "id": "4"},
]


def test_action_votes():
    """Votes count whole actions, names only, or actions without excluded arguments."""
    drawn = [Candidate(index=i, tool_calls=[call]) for i, call in enumerate(CALLS)]
    assert MajorityVote()(drawn).tolist() == [1, 1, 1, 1]
    assert MajorityVote(partial(action_key, exclude={"why"}))(drawn).tolist() == [2, 2, 1, 1]
    assert scorer_named("majority-tool-names")(drawn).tolist() == [3, 3, 3, 1]
    assert MajorityVote(lambda c: None if c.index == 3 else "x")(drawn).tolist()[:3] == [3, 3, 3]
    assert math.isnan(MajorityVote(lambda c: None if c.index == 3 else "x")(drawn)[3])


def test_arguments_that_are_no_object_are_no_obstacle():
    odd = [Candidate(index=i, tool_calls=[{"name": "f", "args": args}]) for i, args in enumerate([None, {}])]
    assert len({action_key(candidate, exclude={"a"}) for candidate in odd}) == 1


def test_flawed_candidates_do_not_vote():
    drawn = [*answers(["a", "b", "b"]), Candidate(index=3, content="a", finish_reason="length")]
    drawn.append(Candidate(index=4, content="a", flaws={"invalid_action": "found"}))
    choice = Selector(scorer=MajorityVote())(drawn)
    assert choice.chosen == 1
    assert choice.scores == {0: 1, 1: 2, 2: 2, 3: 2, 4: 2}
    assert choice.n_agree == 2


def test_a_vote_needs_no_log_probabilities():
    rows = [Candidate(index=i, content=text, flaws={"no_signal": "none came"}) for i, text in enumerate("abb")]
    choice = Selector(scorer=MajorityVote())(rows)
    assert (choice.chosen, choice.reason, choice.flaws, choice.margin) == (1, "ranked", {}, 1)
    assert Selector(scorer=CentroidScorer())(rows).flaws[0] == {"no_signal": "none came"}


# Margins, ties, combination


def test_the_margin_of_a_vote_is_the_lead_over_the_next_action():
    assert choose(MajorityVote(), answers(["a", "b", "a", "a"])).margin == 2
    assert choose(MajorityVote(), answers(["a", "a"])).margin == 2
    assert choose(MajorityVote(), answers(["b", "a", "a", "b"])).reason == "tie_break"
    assert choose(MajorityVote(), answers(["b"])).margin is None


def test_vote_then_centroid():
    drawn = answers(["a", "b", "a", "b", "c"])
    centroids = Known([0.5, 0.4, 0.6, 0.3, 0.1])
    assert choose(MajorityVote(), drawn).order == [0, 1, 2, 3, 4]
    assert choose(MajorityVote(tie_break=centroids), drawn).order == [3, 1, 0, 2, 4]
    assert Selector(scorer=MajorityVote(), tie_break=centroids, guards={})(drawn).order == [3, 1, 0, 2, 4]
    assert scorer_named("majority-then-centroid").tie_break is not None  # type: ignore[attr-defined]


def test_without_any_score_weighted_votes_are_plain_ones():
    drawn = answers(["b", "a", "a"])
    nothing = Known([math.nan] * 3)
    for vote in (CentroidVote(nothing), CentroidWeightedVote(nothing), DeepConfVote(nothing), BordaVote(nothing)):
        assert vote(drawn).tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CentroidVote(CentroidScorer(), percent=0), "percent must be above 0 and at most 100; found 0"),
        (
            lambda: DeepConfVote(CentroidScorer(), keep_percent=101),
            "keep_percent must be above 0 and at most 100; found 101",
        ),
        (lambda: CentroidWeightedVote(CentroidScorer(), "cubic"), "weighting must be one of .*; found 'cubic'"),  # type: ignore[arg-type]
        (lambda: CentroidWeightedVote(CentroidScorer(), outliers="mad"), "outliers must be one of .*; found 'mad'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused(make: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


# Properties

_texts = st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=1, max_size=12)
_entropies = st.lists(st.floats(0, 3, width=32), max_size=30)


def with_signals(texts: Sequence[str], entropies: Sequence[Sequence[float]]) -> list[Candidate]:
    padded = [*entropies, *[[0.0, 1.0]] * len(texts)]
    return [candidate(i, padded[i], content=text) for i, text in enumerate(texts)]


@given(_texts, st.lists(_entropies, max_size=12), st.sampled_from(["majority", "majority-then-centroid"]))
def test_majority_is_a_count(texts: list[str], entropies: list[list[float]], name: str):
    drawn = with_signals(texts, entropies)
    scores = scorer_named(name)(drawn).tolist()
    for text, score in zip(texts, scores, strict=True):
        assert math.isnan(score) if text == "" else score == texts.count(text)


VOTES = ["majority", "majority-then-centroid", "centroid-vote", "centroid-weighted-vote", "borda", "deepconf-vote"]


@given(_texts, st.lists(_entropies, max_size=12), st.sampled_from(VOTES), st.randoms())
def test_votes_in_any_order(texts: list[str], entropies: list[list[float]], name: str, random: Any):
    """Candidates of one action share a score, whatever the order."""
    drawn = with_signals(texts, entropies)
    choice = choose(scorer_named(name), drawn)
    for text in set(texts) - {""}:
        assert len({choice.scores[i] for i, other in enumerate(texts) if other == text}) == 1
    if any(texts):
        assert texts[choice.chosen] != ""
    shuffled = list(drawn)
    random.shuffle(shuffled)
    assert choose(scorer_named(name), shuffled) == choice


# Leads by chance


@pytest.mark.parametrize(("weights", "n_actions"), [([1.0] * 5, 2), ([1.0] * 6, 3), ([2.0, 1.5, 0.3, -0.5], 3)])
def test_the_chance_of_a_lead_is_that_of_all_ways_to_vote(weights: list[float], n_actions: int):
    ways = np.array(list(itertools.product(range(n_actions), repeat=len(weights))))
    totals = np.stack([(ways == action) @ np.array(weights) for action in range(n_actions)])
    second, first = np.sort(totals, axis=0)[-2:]
    for margin in np.unique((first - second).round(6))[1:]:
        _, p = vote_chance(float(margin) - 1e-6, weights, n_actions)
        assert p == pytest.approx(float(np.mean(first - second >= margin - 2e-6)), abs=0.03)


def test_agreement_of_many_is_above_the_noise_and_of_few_within():
    for n, above in ((5, False), (6, True)):  # 1 in 16 and 1 in 32 by chance, were there but two answers
        assert choose(MajorityVote(), answers(["42"] * n)).above_noise is above
    split = choose(MajorityVote(), answers(["42"] * 5 + ["41"] * 3))
    assert (split.margin, split.above_noise) == (2, False)
    assert split.margin_sd == pytest.approx(2 / math.sqrt(8 / 4))
