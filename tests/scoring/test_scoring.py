"""Scorers against the reference implementations' numbers, their properties, and margins under no signal."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.candidates import candidate, signals
from helpers.paths import DATA
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from ec_agents.candidates import Candidate
from ec_agents.entropy import MASKED, token_entropies
from ec_agents.errors import ConfigError
from ec_agents.scoring import (
    DEEPCONF_BOTTOM_10,
    DEEPCONF_LOWEST_GROUP,
    DEEPCONF_MEAN,
    DEEPCONF_TAIL,
    MEAN_ENTROPY,
    SCORERS,
    SELF_CERTAINTY,
    SUM_LOGPROB,
    Best,
    CentroidScorer,
    KnowsNoise,
    RandomScorer,
    SignalScorer,
    TailEntropyScorer,
    chance_of_margin,
    scorer_named,
    self_certainty,
)
from ec_agents.scoring.baselines import bottom_groups, group_means, lowest_group, mean, tail_mean
from ec_agents.scoring.noise import maximum_chance
from ec_agents.selection import Selector

GOLDEN = json.loads((DATA / "golden.json").read_text())["cases"]
ROUNDED = 1.1e-3
"""DeepConf rounds token confidences and group means to three decimals; ours are not rounded."""


def cases(group: str) -> list[Any]:
    return [pytest.param(case, id=case["id"]) for case in GOLDEN[group]]


def number(value: Any) -> float:
    return math.nan if value is None else float(value)


def confidences_of(rows: Sequence[Sequence[Any]]) -> NDArray[np.float64]:
    """Minus the mean of the log-probabilities that are not masked, as the parser has it; NaN where none is left."""
    kept = [[number(p) for p in row if number(p) > MASKED] for row in rows]
    return np.array([-np.mean(row) if row else math.nan for row in kept])


# Against the reference


def is_whole(case: Any) -> bool:
    return not any(number(p) <= MASKED for row in case["rows"] for p in row)


@pytest.mark.parametrize("case", cases("confidence"))
def test_deepconf_scores_equal_the_reference(case: Any):
    confidences = confidences_of(case["rows"])
    expected = case["deepconf_original"]
    if not is_whole(case):  # a departure: absent alternatives are left out, where DeepConf averages -9999 and -inf
        assert np.nanmax(confidences) < number(expected["mean"])
        return
    assert confidences == pytest.approx(expected["token_confidence_rounded3"], abs=ROUNDED)
    assert mean(confidences) == pytest.approx(expected["mean"], abs=ROUNDED)
    for window in expected["windows"]:
        width = window["window"]
        assert group_means(confidences, width) == pytest.approx(window["group_means_rounded3"], abs=2 * ROUNDED)
        assert lowest_group(confidences, width) == pytest.approx(window["lowest_group"], abs=2 * ROUNDED)
        assert lowest_group(confidences, width) == pytest.approx(window["min_window"], abs=ROUNDED)
        assert tail_mean(confidences, width) == pytest.approx(window["tail"], abs=ROUNDED)
        assert bottom_groups(confidences, width) == pytest.approx(window["bottom_10pct"], abs=ROUNDED)


@pytest.mark.parametrize("case", cases("confidence"))
def test_renormalised_confidences(case: Any):
    """They are the other confidences plus the logarithm of the mass."""
    if not is_whole(case):
        return
    mass = np.log(np.exp(case["rows"]).sum(axis=1))
    expected = case["deepconf_entropy_centroid_repo"]["token_confidence_rounded3"]
    assert confidences_of(case["rows"]) + mass == pytest.approx(expected, abs=ROUNDED)


@pytest.mark.parametrize("case", cases("confidence"))
def test_self_certainty_of_k_alternatives_equals_the_reference(case: Any):
    if not is_whole(case):
        return
    expected = case["self_certainty"]["topk_certainty_V_is_k_mean"]
    assert self_certainty(case["rows"]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    values = confidences_of(case["rows"])
    drawn = signals(values, n_alternatives=case["k"], confidences=values)
    assert SELF_CERTAINTY([Candidate(index=0, signals=drawn)])[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("case", cases("self_certainty_full_vocab"))
def test_self_certainty_reference(case: Any):
    """Over the whole vocabulary it equals the reference."""
    rows = case["rows_full_vocab_logprobs"]
    assert len(rows[0]) == case["V"]
    tokens = rows[: len(rows) - case["padding_tokens_at_end"]]
    assert self_certainty(tokens) == pytest.approx(case["self_certainty"], rel=1e-12)


@pytest.mark.parametrize("case", cases("conf_sequence"))
def test_deepconf_scores_of_long_sequences_equal_the_reference(case: Any):
    confidences = case["confs"]
    assert mean(confidences) == pytest.approx(case["mean"], rel=1e-12)
    for window in case["windows"]:
        width = window["window"]
        assert tail_mean(confidences, width) == pytest.approx(window["tail"], rel=1e-12)
        assert bottom_groups(confidences, width) == pytest.approx(window["bottom_10pct"], rel=1e-9)
        assert lowest_group(confidences, width) == pytest.approx(window["min_window"], rel=1e-9)
        assert lowest_group(confidences, width) == pytest.approx(window["lowest_group_rounded3"], abs=ROUNDED)


def test_deepconf_scorers_use_windows_of_2048():
    case = max(GOLDEN["conf_sequence"], key=lambda case: len(case["confs"]))
    window = next(window for window in case["windows"] if window["window"] == 2048)
    drawn = [candidate(0, signals=signals(case["confs"], confidences=case["confs"]))]
    assert len(case["confs"]) > 2048
    for scorer, expected in (
        (DEEPCONF_MEAN, case["mean"]),
        (DEEPCONF_TAIL, window["tail"]),
        (DEEPCONF_BOTTOM_10, window["bottom_10pct"]),
        (DEEPCONF_LOWEST_GROUP, window["min_window"]),
    ):
        assert scorer(drawn)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", cases("deepconf_online"))
def test_group_means_say_where_deepconf_would_have_stopped(case: Any):
    logits = np.array(case["logits"])
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    confidences = -np.sort(logprobs, axis=1)[:, -case["topk"] :].mean(axis=1)
    known = case["token_confidences_until_stop"]
    assert confidences[: len(known)] == pytest.approx(known, rel=1e-12)
    width = case["group_size"]
    low = np.flatnonzero(group_means(confidences, width) < case["threshold"]) if len(confidences) >= width else []
    assert (int(low[0]) + width - 1 if len(low) else None) == case["stop_step"]


@pytest.mark.parametrize("case", cases("tail_entropy"))
def test_tail_entropy_equals_its_hub(case: Any):
    names = {"agg": "aggregate", "tail_min": "narrowest", "tail_max": "widest"}
    scorer = TailEntropyScorer(**{names[name]: value for name, value in case["params"].items()})
    expected = case["tail_entropy"]
    scores = scorer.scores(case["candidates"])
    assert np.where(np.isnan(scores), np.inf, scores) == pytest.approx([number(s) for s in expected["scores"]])
    assert int(np.nanargmin(scores)) == expected["selected"]
    assert int(np.nanargmax(scores)) == case["tail_certainty_same_numbers"]["selected"]
    kept = [np.array(e) for e, score in zip(case["candidates"], scores, strict=True) if not math.isnan(score)]
    assert scorer.width(kept) == expected["tail_window"]


@pytest.mark.parametrize("case", cases("group"))
def test_mean_entropy_against_the_reference(case: Any):
    """It picks as the reference does, except for missing data."""
    drawn = [candidate(i, [number(e) for e in entropies]) for i, entropies in enumerate(case["candidates"])]
    chosen = Selector(scorer=MEAN_ENTROPY, guards={})(drawn).chosen
    empty = [i for i, entropies in enumerate(case["candidates"]) if not any(e is not None for e in entropies)]
    expected = case["best_of_n"]["entropy_mean"]
    if expected in empty and len(empty) < len(drawn):  # a departure: a candidate without data never wins
        assert chosen not in empty
    else:
        assert chosen == expected


@pytest.mark.parametrize("case", cases("group"))
def test_lowest_centroid_picks_as_the_reference_does(case: Any):
    drawn = [candidate(i, [number(e) for e in entropies]) for i, entropies in enumerate(case["candidates"])]
    preset = "short" if case["top_percent"] == 5 else "paper"
    choice = Selector(scorer=CentroidScorer(preset), guards={})(drawn)
    assert (choice.chosen if choice.reason != "fallback" else None) == case["selected"]
    found = [choice.scores[i] for i in range(len(drawn))]
    for ours, theirs in zip(found, case["centroids"], strict=True):
        assert (ours is None) == (theirs is None) or ours == pytest.approx(theirs, abs=1e-6)


# What every scorer does


def test_every_scorer_gives_one_number_each_and_an_end():
    rng = np.random.default_rng(0)
    drawn = [candidate(i, rng.gamma(0.5, 1, 40 + i)) for i in range(5)]
    for name in SCORERS:
        scorer = scorer_named(name)
        assert scorer(drawn).shape == (5,)
        assert np.isfinite(scorer(drawn)).all()
        assert scorer.best in {"lowest", "highest"}
        assert scorer([]).shape == (0,)


NEEDS_NO_SIGNALS = {"first", "random"}
BY_SIGNALS = [name for name in SCORERS if name not in NEEDS_NO_SIGNALS and not hasattr(scorer_named(name), "key")]
MISSING = [math.nan] * 30


@pytest.mark.parametrize("name", BY_SIGNALS)
@pytest.mark.parametrize("missing", [None, [], MISSING])
def test_missing_data_is_never_scored_as_good(name: str, missing: Any):
    drawn = [candidate(0, missing), candidate(1, [0.1, 2.0, 0.3, 0.2] * 5)]
    if name in {"shortest", "longest"} and missing == MISSING:
        return
    choice = Selector(scorer=scorer_named(name), guards={})(drawn)
    assert (choice.chosen, choice.scores[0]) == (1, None)


@pytest.mark.parametrize("name", [n for n in BY_SIGNALS if "entropy" in n or "centroid" in n or "logprob" in n])
def test_all_zeros_mean_that_nothing_was_measured(name: str):
    assert np.isnan(scorer_named(name)([candidate(0, [0.0] * 30)])).all()


@given(st.lists(st.floats(0, 3, width=32), min_size=1, max_size=40), st.lists(st.integers(0, 39), max_size=5))
def test_missing_tokens_are_left_out_of_means(values: list[float], gaps: list[int]):
    holes = list(values)
    for gap in gaps:
        holes.insert(min(gap, len(holes)), math.nan)
    for measure in (mean, lowest_group, bottom_groups, tail_mean):
        assert measure(holes) == pytest.approx(measure(values), nan_ok=True)


@given(st.lists(st.floats(0, 30), min_size=1, max_size=80), st.integers(1, 90))
def test_group_means_are_means_of_slices(values: list[float], width: int):
    slices = [values[i : i + width] for i in range(max(1, len(values) - width + 1))]
    assert group_means(values, width) == pytest.approx([np.mean(piece) for piece in slices], abs=1e-9)
    assert lowest_group(values, width) <= bottom_groups(values, width) + 1e-9 <= max(values) + 1e-6


@given(st.integers(2, 30), st.integers(1, 10), st.integers(0, 1000))
def test_self_certainty_range(vocabulary: int, n_tokens: int, seed: int):
    """It is zero for a uniform distribution and positive otherwise."""
    assert self_certainty(np.full((n_tokens, vocabulary), -math.log(vocabulary))) == pytest.approx(0, abs=1e-12)
    logits = np.random.default_rng(seed).normal(size=(n_tokens, vocabulary))
    assert self_certainty(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))) > -1e-12


def test_sum_and_mean_of_logprobs():
    """The sum favours short responses, and the mean does not."""
    drawn = [candidate(0, [0.5] * 10), candidate(1, [0.4] * 100)]
    assert Selector(scorer=SUM_LOGPROB, guards={})(drawn).chosen == 0
    assert Selector(scorer=scorer_named("mean-logprob"), guards={})(drawn).chosen == 1
    assert Selector(scorer=scorer_named("shortest"), guards={})(drawn).chosen == 0
    assert Selector(scorer=scorer_named("longest"), guards={})(drawn).chosen == 1


def test_a_scorer_of_ones_own_passes_through_the_selector():
    class MostUncertainFirstToken:
        name = "first-token"
        best: Best = "highest"

        def __call__(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
            return np.array([c.signals.entropies[0] if c.signals else np.nan for c in candidates])

    drawn = [candidate(0, [0.1, 2.0]), candidate(1, [1.0, 0.0]), candidate(2, None)]
    choice = Selector(scorer=MostUncertainFirstToken(), guards={})(drawn)
    assert (choice.chosen, choice.selector, choice.margin_sd, choice.p_noise) == (1, "first-token", None, None)
    same = SignalScorer("first-token", "highest", lambda s: float(s.entropies[0]))
    assert Selector(scorer=same, guards={})(drawn) == choice


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scorer_named("centriod"), "no scorer is called 'centriod'; known: centroid, "),
        (lambda: TailEntropyScorer("mode"), "aggregate must be 'median' or 'mean'; found 'mode'"),  # type: ignore[arg-type]
        (lambda: TailEntropyScorer(narrowest=9, widest=8), "narrowest ≤ widest is needed; found 9 and 8"),
        (lambda: TailEntropyScorer(trim=0.5), "trim must be from 0 to below 0.5; found 0.5"),
        (lambda: self_certainty([1.0]), r"shape \(T, V\) are needed; found shape \(1,\)"),
    ],
)
def test_wrong_arguments_are_refused(make: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


# Margins under no signal


def shuffled_noise(rng: np.random.Generator, lengths: Sequence[int]) -> list[Candidate]:
    """Candidates whose tokens are exchangeable: no position means anything."""
    return [candidate(i, rng.gamma(0.3, 1, length)) for i, length in enumerate(lengths)]


def test_chance_of_a_margin_agrees_with_a_simulation():
    rng = np.random.default_rng(1)
    for sds in ([1.0] * 8, [0.29, 0.05, 0.1], [0.2, 0.2], [1.0] * 64):
        draws = np.sort(rng.normal(size=(20_000, len(sds))) * sds, axis=1)
        gaps = draws[:, 1] - draws[:, 0]
        for quantile in (0.1, 0.5, 0.95):
            margin = float(np.quantile(gaps, quantile))
            assert chance_of_margin(margin, sds) == pytest.approx(1 - quantile, abs=0.015)


@given(st.lists(st.floats(0.02, 2), min_size=1, max_size=12), st.floats(0, 5), st.floats(0, 5))
def test_a_larger_margin_is_less_likely_by_chance(sds: list[float], one: float, other: float):
    small, large = sorted((one, other))
    assert 0 <= chance_of_margin(large, sds) <= chance_of_margin(small, sds) + 1e-6 <= 1 + 1e-6


def test_the_chance_does_not_depend_on_the_unit():
    assert chance_of_margin(0.1, [0.2, 0.3]) == pytest.approx(chance_of_margin(100, [200, 300]))


NO_NULL = {"shortest", "longest"}
KNOWN = [name for name in SCORERS if name not in NO_NULL]


def agreeing_by_chance(rng: np.random.Generator, lengths: Sequence[int], n_actions: int) -> list[Candidate]:
    """Candidates whose tokens are exchangeable, each with any of the actions."""
    drawn = shuffled_noise(rng, lengths)
    return [replace(c, content=str(rng.integers(n_actions))) for c in drawn]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(("lengths", "n_actions"), [([60] * 8, 3), ([400] * 4, 2), ([40, 40, 400, 800], 5)])
def test_noise_floor_of_noise(name: str, lengths: list[int], n_actions: int):
    """Candidates without signal are rarely above the noise floor."""
    rng = np.random.default_rng(7)
    choose = Selector(scorer=RandomScorer(0) if name == "random" else SCORERS[name](), guards={})
    found = [choose(agreeing_by_chance(rng, lengths, n_actions)).above_noise for _ in range(150)]
    assert None not in found
    assert sum(map(bool, found)) <= 150 * 0.12  # 0.05 is meant; 0.12 is 3.9 standard errors above it


def test_groups_of_long_texts_have_a_noise_floor_too():
    rng = np.random.default_rng(7)
    drawn = [shuffled_noise(rng, [2000, 3000, 5000, 9000]) for _ in range(60)]
    for name in ("deepconf-lowest-group", "deepconf-bottom-10"):
        p_values = [Selector(scorer=SCORERS[name](), guards={})(rows).p_noise for rows in drawn]
        assert sum(p < 0.05 for p in p_values if p is not None) <= 60 * 0.16
        assert np.mean([p is not None and p < 0.5 for p in p_values]) == pytest.approx(0.5, abs=0.2)


def test_noise_is_the_spread_of_scores_without_signal():
    rng = np.random.default_rng(3)
    drawn = shuffled_noise(rng, [300] * 400)
    scorers: list[Any] = [CentroidScorer("short"), scorer_named("raw-entropy-centroid"), MEAN_ENTROPY]
    assert all(isinstance(scorer, KnowsNoise) for scorer in scorers)
    for scorer in scorers:
        assert scorer.noise(drawn).mean() == pytest.approx(scorer(drawn).std(), rel=0.15)


def test_noise_floor_of_a_signal():
    """A clear signal is above the noise floor and says by how much."""

    def bump(at: float) -> list[float]:
        rng = np.random.default_rng(0)
        return [*(rng.random(400) * 0.1 + np.where(np.abs(np.arange(400) - at) < 20, 2.0, 0.0)).tolist()]

    rows = [candidate(i, bump(at)) for i, at in enumerate([380, 25, 370, 360])]
    choice = Selector(scorer=CentroidScorer("short"), guards={})(rows)
    assert choice.chosen == 1
    assert choice.margin_sd is not None
    assert choice.margin_sd > 2
    assert choice.above_noise is True
    assert choice.to_builtins()["above_noise"] is True


@pytest.mark.parametrize("name", sorted(NO_NULL))
def test_what_has_no_noise_distribution_says_so(name: str):
    choice = Selector(scorer=SCORERS[name](), guards={})([candidate(0, [0.1, 2.0]), candidate(1, [1.0, 0.0, 1.0])])
    assert choice.margin == 1
    assert (choice.margin_sd, choice.p_noise, choice.above_noise) == (None, None, None)


def test_an_order_or_a_random_number_is_never_a_signal():
    drawn = [candidate(i, [0.1, 2.0]) for i in range(4)]
    assert Selector(scorer=scorer_named("first"), guards={})(drawn).p_noise == 1
    numbers = np.sort(np.random.default_rng(0).random((20_000, 4)), axis=1)
    for margin in (0.02, 0.2, 0.5):
        _, p = RandomScorer(0).chance(drawn, margin)
        assert p == pytest.approx(np.mean(numbers[:, 1] - numbers[:, 0] >= margin), abs=0.02)


def test_a_lead_that_length_alone_gives_is_no_signal():
    rng = np.random.default_rng(0)
    sums = scorer_named("sum-logprob")
    by_length = Selector(scorer=sums, guards={})(shuffled_noise(rng, [40, 400, 400, 400]))
    assert by_length.chosen == 0
    assert by_length.margin_sd is not None
    assert by_length.margin_sd > 3
    assert by_length.above_noise is False
    rows = shuffled_noise(rng, [400] * 4)
    sure = replace(rows[2], signals=signals(rng.gamma(0.1, 1, 400)))
    assert Selector(scorer=sums, guards={})([*rows[:2], sure, rows[3]]).above_noise is True


@given(st.lists(st.lists(st.floats(0, 3), min_size=1, max_size=9), min_size=2, max_size=5), st.floats(0, 4))
def test_the_chance_of_a_lowest_maximum_is_a_count(tokens: list[list[float]], margin: float):
    sd, p = maximum_chance(margin, [np.array(values) for values in tokens])
    if math.isnan(sd):
        return
    pool = np.concatenate([np.array(values) for values in tokens])
    rng = np.random.default_rng(0)
    maxima = np.stack([pool[rng.integers(len(pool), size=(2000, len(v)))].max(axis=1) for v in tokens])
    gaps = np.diff(np.sort(maxima, axis=0)[:2], axis=0)[0]
    low, high = np.mean(gaps > margin + 1e-6) - 0.06, np.mean(gaps >= margin - 1e-6) + 0.06
    assert low <= p <= high


def test_min_tokens_looks_at_sound_candidates_only(caplog: pytest.LogCaptureFixture):
    drawn = [
        candidate(0, [0.1, 2.0, 0.1]),
        candidate(1, [2.0, 0.1, 0.1]),
        candidate(2, [1.0] * 99, finish_reason="length"),
    ]
    choice = Selector(min_tokens=4)(drawn)
    assert (choice.chosen, choice.reason) == (0, "fallback")
    assert "the longest sound candidate has 3 tokens, 4 needed (min_tokens)" in caplog.text
    assert Selector(min_tokens=3)(drawn).chosen == 1
    by_votes = Selector(min_tokens=4, fallback=scorer_named("mean-entropy"))(drawn)
    assert by_votes.reason == "fallback"


def test_entropies_of_masked_rows_stay_missing():
    assert np.isnan(token_entropies([[-9999.0, -9999.0]])).all()
