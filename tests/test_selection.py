"""Selection: guards, ranking, ties, fallback, evidence."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
from helpers.candidates import candidate, signals
from hypothesis import given, strategies as st

from ec_agents.candidates import Candidate, Selection, TokenSignals
from ec_agents.errors import ConfigError, SelectionError, StateError
from ec_agents.scoring import (
    SCORERS,
    CentroidScorer,
    FirstScorer,
    MajorityVote,
    RandomScorer,
    Scorer,
    StandardizedCentroidScorer,
)
from ec_agents.selection import DEFAULT_GUARDS, SEVERITY, Selector, action_key, as_selector, degenerate_loop, select


def peak(position: int, length: int = 20) -> TokenSignals:
    """Signals with one high-entropy phase, at ``position``."""
    return signals([2.0 if i == position else 0.1 for i in range(length)])


def peaked(index: int, position: int | None = 5, **fields: Any) -> Candidate:
    """A candidate whose only high-entropy phase is at ``position``; None: without signals."""
    given: dict[str, Any] = {"signals": None if position is None else peak(position), **fields}
    return candidate(index, **given)


class Fixed:
    """Scores read from a list, in candidate order."""

    name = "fixed"

    def __init__(self, scores: Sequence[float], best: Literal["lowest", "highest"] = "lowest") -> None:
        self.scores = scores
        self.best: Literal["lowest", "highest"] = best

    def __call__(self, candidates: Sequence[Candidate]) -> Any:
        return np.array(self.scores)


def test_lowest_centroid_wins_with_its_evidence():
    choice = select([peaked(0, 15), peaked(1, 2), peaked(2, 9)])
    assert choice.chosen == 1
    assert choice.order == [1, 2, 0]
    assert choice.scores == {0: 15.5 / 20, 1: 2.5 / 20, 2: 9.5 / 20}
    assert choice.margin == pytest.approx(7 / 20)
    assert choice.reason == "ranked"
    assert choice.selector == "centroid"
    assert choice.n_tokens == {0: 20, 1: 20, 2: 20}
    assert choice.n_phases == {0: 1, 1: 1, 2: 1}
    assert choice.flaws == {}


def test_ties():
    """They go to the lower index, whatever the order of the list."""
    choice = select([peaked(2), peaked(0), peaked(1)])
    assert (choice.chosen, choice.reason, choice.margin) == (0, "tie_break", 0.0)


def test_tie_break_scorer_decides_between_equal_scores():
    selector = Selector(tie_break=Fixed([3, 1, 2], best="highest"))
    choice = selector([peaked(0), peaked(1), peaked(2)])
    assert choice.order == [0, 2, 1]
    assert choice.reason == "tie_break"


def test_highest_end_can_be_the_best():
    assert Selector(scorer=Fixed([0.1, 0.9, 0.5], best="highest"))([peaked(i) for i in range(3)]).order == [1, 2, 0]


@pytest.mark.parametrize("missing", [None, signals([]), signals([math.nan] * 30), signals([0.0] * 30)])
def test_missing_data_never_wins(missing: TokenSignals | None):
    choice = select([peaked(0, signals=missing), peaked(1, 19)])
    assert choice.chosen == 1
    assert choice.reason == "only_sound"
    assert choice.scores[0] is None
    assert "no_signal" in choice.flaws[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_never_wins(bad: float):
    choice = Selector(scorer=Fixed([bad, 0.99]))([peaked(0), peaked(1)])
    assert choice.chosen == 1
    assert choice.scores == {0: None, 1: 0.99}


@pytest.mark.parametrize(
    ("flaw", "fields"),
    [
        ("truncated", {"finish_reason": "length"}),
        ("truncated", {"finish_reason": "MAX_TOKENS"}),
        ("refused", {"finish_reason": "content_filter"}),
        ("refused", {"flaws": {"refused": "I cannot help"}}),
        ("empty", {"content": " \n"}),
        ("degenerate_loop", {"content": "Let me think. " + "no wait, " * 60}),
        ("invalid_action", {"flaws": {"invalid_action": "unknown tool"}}),
    ],
)
def test_a_flawed_candidate_loses_however_low_its_centroid(flaw: str, fields: dict[str, Any]):
    choice = select([peaked(0, 0, **fields), peaked(1, 19)])
    assert choice.chosen == 1
    assert choice.reason == "only_sound"
    assert set(choice.flaws[0]) == {flaw}


def test_flawed_candidates_rank_by_severity_then_score():
    rows = [peaked(i, flaws={name: "found"}) for i, name in enumerate(reversed(SEVERITY))]
    choice = select([*rows, peaked(7, 9, flaws={"truncated": "found"})])
    assert choice.order == [6, 7, 5, 4, 3, 2, 1, 0]
    assert choice.reason == "all_flawed"


def test_a_flaw_from_ones_own_guard_counts():
    selector = Selector(guards={**DEFAULT_GUARDS, "rude": lambda c: "rude" if "fool" in c.content else None})
    choice = selector([peaked(0, 0, content="you fool"), peaked(1, 19)])
    assert choice.chosen == 1
    assert choice.flaws == {0: {"rude": "rude"}}


def test_nothing_to_rank_by_falls_back_to_the_first_and_says_so(caplog: pytest.LogCaptureFixture):
    choice = select([peaked(1, None), peaked(0, None)])
    assert (choice.chosen, choice.reason, choice.margin) == (0, "fallback", None)
    assert choice.scores == {0: None, 1: None}
    assert "none of 2 candidates could be scored" in caplog.text


def test_fallback_can_raise():
    with pytest.raises(SelectionError, match="none of 2 candidates could be scored; candidate 0: .*logprobs"):
        Selector(fallback="raise")([peaked(0, None), peaked(1, None)])


def test_fallback_never_prefers_an_empty_answer(caplog: pytest.LogCaptureFixture):
    choice = select([peaked(0, None, content=""), peaked(1, None)])
    assert choice.chosen == 1
    assert choice.reason == "fallback"


def test_texts_under_min_tokens_are_left_to_the_fallback():
    rows = [peaked(0, 15), peaked(1, 2)]
    assert Selector(min_tokens=20)(rows).chosen == 1
    choice = Selector(min_tokens=21)(rows)
    assert (choice.chosen, choice.reason) == (0, "fallback")
    assert choice.scores[1] == 2.5 / 20


def test_one_candidate():
    assert select([peaked(3)]).reason == "only_one"
    assert select([peaked(3, None)]).reason == "only_one"
    assert select([peaked(3, finish_reason="length")]).reason == "all_flawed"


@pytest.mark.parametrize("bad", [[], [peaked(0), peaked(0)], [peaked(-1)]])
def test_no_candidates_or_equal_indexes_are_refused(bad: list[Candidate]):
    with pytest.raises(ConfigError, match="different indexes from 0 are needed"):
        select(bad)


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match="min_tokens must be an integer of 0 or more; found -1"):
        Selector(min_tokens=-1)
    with pytest.raises(ConfigError, match="fallback must be a Scorer or 'raise'; found str 'first'"):
        Selector(fallback="first")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="scorer 'fixed' must return 2 scores"):
        Selector(scorer=Fixed([1.0]))([peaked(0), peaked(1)])
    with pytest.raises(ConfigError, match="one of paper, short; found 'long'"):
        CentroidScorer("long")


@pytest.mark.parametrize(
    "text",
    ["", "short", "a perfectly ordinary answer. " * 2, "x" * 200, "|---|---|---|\n" * 3, "0.3333333333333333"],
)
def test_ordinary_texts_are_no_loops(text: str):
    assert degenerate_loop(Candidate(index=0, content=text)) is None


@given(st.text(min_size=1, max_size=40), st.text(max_size=30))
def test_any_piece_repeated_long_enough_is_a_loop(piece: str, before: str):
    repeats = max(4, math.ceil(240 / len(piece))) + 1
    assert degenerate_loop(Candidate(index=0, content=before + piece * repeats)) is not None


def test_action_key_ignores_argument_order_case_and_spacing():
    first = Candidate(index=0, tool_calls=[{"name": "f", "args": {"a": 1, "b": "é"}, "id": "1"}])
    second = Candidate(index=1, tool_calls=[{"name": "f", "args": {"b": "é", "a": 1}, "id": "2"}])
    assert action_key(first) == action_key(second)
    assert action_key(Candidate(index=0, content=" The  Answer\n")) == action_key(
        Candidate(index=1, content="the answer")
    )
    assert action_key(Candidate(index=0, content="f")) != action_key(first)


def test_baselines():
    rows = [peaked(2, None), peaked(5, None)]
    assert FirstScorer()(rows).tolist() == [2, 5]
    assert RandomScorer(7)(rows).tolist() == RandomScorer(7)(rows).tolist()
    assert len({Selector(scorer=RandomScorer(s))([peaked(0), peaked(1)]).chosen for s in range(20)}) == 2


def test_every_named_scorer_scores():
    rows = [peaked(0, 3), peaked(1, 9)]
    for name, make in SCORERS.items():
        assert make().name in name
        assert np.isfinite(make()(rows)).all()


def test_standardized_centroid_does_not_favour_short_texts():
    rng = np.random.default_rng(0)
    counts = {"centroid": 0, "standardized-centroid": 0}
    scorers: list[Scorer] = [CentroidScorer("short"), StandardizedCentroidScorer("short")]
    for _ in range(150):
        rows = [Candidate(index=i, signals=signals(rng.gamma(0.3, 1, 60 if i < 4 else 600))) for i in range(8)]
        for scorer in scorers:
            counts[scorer.name] += Selector(scorer=scorer, guards={})(rows).chosen < 4
    assert counts["centroid"] > 100
    assert 45 < counts["standardized-centroid"] < 105


_entropies = st.lists(st.one_of(st.floats(0, 3, width=32), st.just(math.nan)), max_size=60)
_flaws = st.dictionaries(st.sampled_from([*SEVERITY, "own"]), st.just("found"), max_size=2)
_candidates = st.lists(st.tuples(st.one_of(st.none(), _entropies), _flaws), min_size=1, max_size=12)


@given(_candidates, st.randoms())
def test_selection_properties(rows: list[tuple[list[float] | None, dict[str, str]]], random: Any):
    drawn = [
        Candidate(index=i, content="text", signals=None if e is None else signals(e), flaws=flaws)
        for i, (e, flaws) in enumerate(rows)
    ]
    choice = select(drawn)
    assert sorted(choice.order) == list(range(len(rows)))
    assert choice.chosen == choice.order[0]
    for c in drawn:
        assert (choice.scores[c.index] is None) == (c.signals is None or not (c.signals.entropies > 0).any())
    sound = [c.index for c in drawn if not c.flaws and choice.scores[c.index] is not None]
    if sound:
        scored = {i: choice.scores[i] for i in sound}
        assert choice.chosen == min(sound, key=lambda i: (scored[i], i))
        assert choice.order[: len(sound)] == sorted(sound, key=lambda i: (scored[i], i))
    shuffled = list(drawn)
    random.shuffle(shuffled)
    assert select(shuffled) == choice


@given(_entropies, _flaws, st.none() | st.floats(0, 1e6))
def test_candidates_survive_the_state_exactly(entropies: list[float], flaws: dict[str, str], seconds: float | None):
    call = {"name": "f", "args": {"é": [1]}}
    before = peaked(0, signals=signals(entropies), flaws=flaws, tool_calls=[call], seconds=seconds)
    after = Candidate.from_builtins(before.to_builtins())
    assert after.signals is not None
    assert before.signals is not None
    for field in ("entropies", "logprobs", "confidences"):
        np.testing.assert_array_equal(getattr(after.signals, field), getattr(before.signals, field))
    assert dataclasses.replace(after, signals=None) == dataclasses.replace(before, signals=None)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True), st.sampled_from(["centroid", "majority"]))
def test_selections_survive_json_exactly(indexes: list[int], name: str):
    before = select([peaked(i, None if i % 3 == 2 else i, finish_reason="length" * (i % 2)) for i in indexes], name)
    data = json.loads(json.dumps(before.to_builtins(25)))
    assert data == before.to_builtins(25)
    assert data["scores"][data["chosen"]] == before.scores[before.chosen]
    assert {len(data[field]) for field in ("scores", "flaws", "n_tokens", "n_phases")} == {25}
    assert Selection.from_builtins(data) == before


numbers = st.one_of(st.floats(width=32), st.sampled_from([math.inf, -math.inf, math.nan, 0.0, 3e38, -3e38]))


@pytest.mark.parametrize("name", SCORERS)
@given(st.lists(st.one_of(st.none(), st.lists(numbers, max_size=40)), min_size=1, max_size=4))
def test_any_numbers_are_ranked_without_error_or_warning(name: str, rows: list[list[float] | None]):
    """Infinite, missing, huge and no signals: each scorer and vote chooses, and no score in the record is infinite."""
    drawn = [candidate(i, signals=None if row is None else signals(row)) for i, row in enumerate(rows)]
    choice = select(drawn, name)
    assert sorted(choice.order) == list(range(len(rows)))
    assert all(score is None or math.isfinite(score) for score in choice.scores.values())
    json.dumps(choice.to_builtins(), allow_nan=False)


@pytest.mark.parametrize("change", [{"chosen": 9}, {"order": []}, {"order": [0, -1]}, {"scores": []}, {"scores": {}}])
def test_damaged_selections_are_refused(change: dict[str, Any]):
    data = select([peaked(0), peaked(1)]).to_builtins()
    with pytest.raises(StateError, match="a saved selection is damaged"):
        Selection.from_builtins({**data, **change})


@pytest.mark.parametrize("name", SCORERS)
def test_selector_by_name(name: str):
    """Every known name, and the scorer of that name, stand for the same selector."""
    scorer = SCORERS[name]()
    assert as_selector(name).scorer.name == as_selector(scorer).scorer.name == scorer.name
    assert as_selector(scorer).scorer is scorer


def test_selector_defaults():
    """A selector is returned as it is; None takes the centroid."""
    selector = Selector(scorer=MajorityVote(), min_tokens=3)
    assert as_selector(selector) is selector
    assert isinstance(as_selector(None).scorer, CentroidScorer)
    assert select([peaked(0), peaked(1, 2)], CentroidScorer()).chosen == 1
    assert select([peaked(0), peaked(1, 2)], "first").selector == "first"


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (CentroidScorer, "the class CentroidScorer; pass an instance"),
        (Selector, "the class Selector"),
        (lambda rows: [0.0 for _ in rows], "function"),
        ({}, "dict {}"),
        (8, "int 8"),
        (False, "bool False"),
        (SCORERS, "dict"),
    ],
)
def test_selector_of_a_wrong_type(wrong: Any, found: str):
    """Anything else is refused with what was found and the known names."""
    with pytest.raises(ConfigError, match=f"found {found}.*Known names: centroid, .*majority"):
        select([peaked(0), peaked(1)], wrong)


@pytest.mark.parametrize("unknown", ["majoriti", "", "Centroid"])
def test_selector_of_an_unknown_name(unknown: str):
    with pytest.raises(ConfigError, match=f"{unknown!r}; known: centroid"):
        as_selector(unknown)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("scorer", "majority"),
        ("scorer", CentroidScorer),
        ("scorer", None),
        ("tie_break", "first"),
        ("tie_break", FirstScorer),
        ("fallback", None),
        ("fallback", FirstScorer),
        ("min_tokens", "20"),
        ("min_tokens", True),
        ("min_tokens", math.nan),
        ("guards", None),
        ("guards", [degenerate_loop]),
        ("guards", {"rude": "rude"}),
    ],
)
def test_selector_field_of_a_wrong_type(field: str, wrong: Any):
    """Fields are checked at construction, not when the responses are paid for."""
    with pytest.raises(ConfigError, match=field):
        Selector(**{field: wrong})


SOUND = [
    *("stop", "tool_calls", "function_call", "end_turn", "stop_sequence", "tool_use", "STOP", "COMPLETE", "TOOL_CALL"),
    *("eos_token", "eos", "completed", "tool-calls", None, ""),
]
FINISHES = {
    "truncated": ["length", "max_tokens", "MAX_TOKENS", "model_length", "incomplete", "model_context_window_exceeded"],
    "refused": ["content_filter", "content-filter", "SAFETY", "refusal", "guardrail_intervened", "RECITATION"],
    "interrupted": [
        *("error", "abort", "aborted", "cancelled", "ERROR", "network_error", "insufficient_system_resource", "load"),
        *("pause_turn", "MALFORMED_FUNCTION_CALL", "OTHER", "FINISH_REASON_UNSPECIFIED", "timeout", "time_limit"),
        *("repetition", "failed", "in_progress", "null", "None", "stopped?", "{'type': 'stop'}", "True", "1", "st?op"),
    ],
}


@pytest.mark.parametrize("reason", SOUND)
def test_sound_finish_reason(reason: str | None):
    """What providers say of a finished response, and nothing at all, are sound."""
    assert select([peaked(0, finish_reason=reason)]).flaws == {}


@pytest.mark.parametrize(("flaw", "reason"), [(flaw, reason) for flaw, found in FINISHES.items() for reason in found])
def test_unsound_finish_reason(flaw: str, reason: str):
    """Every other reason is a flaw, also one that nobody knows, and loses to a finished response with a worse score."""
    choice = select([peaked(0, 2, finish_reason=reason), peaked(1, 18, finish_reason="stop")])
    assert choice.chosen == 1
    assert list(choice.flaws[0]) == [flaw]


@given(st.text(min_size=1))
def test_finish_reasons_have_one_meaning(reason: str):
    """A reason is sound or exactly one flaw."""
    found = [guard(peaked(0, finish_reason=reason)) for guard in DEFAULT_GUARDS.values()]
    assert sum(text is not None for text in found) <= 1
