"""The recommendation of a pilot, and the comparison of evaluations."""

import itertools

import numpy as np
import pytest
from helpers.graded import SIZE, draw, noise

from ec_agents.errors import ConfigError
from ec_agents.evaluation.comparison import evaluate
from ec_agents.evaluation.pilot import compare, recommend, simultaneous, step_seconds


def test_without_signal_it_says_do_not_use_it():
    """In at least 95 % of signal-free models, up to chance."""
    rng = np.random.default_rng(0)
    found = [recommend(evaluate(noise(40, 4, rng), {"entropy": SIZE}, resamples=10)) for _ in range(40)]
    assert sum(one.helps for one in found) <= 5  # 2 expected at most; more than 5 has a chance of 1 %
    assert all(one.sentences[0].startswith("Do not use it: N = 1 is as good") for one in found if not one.helps)
    assert {(one.selector, one.n) for one in found if not one.helps} == {("first", 1)}
    assert all(len(one.sentences) == 5 for one in found)


def test_a_signal_is_recommended():
    rng = np.random.default_rng(1)
    rights = [rng.random(4) < 0.5 for _ in range(40)]
    graded = [draw(f"t{i}", r.tolist(), np.where(r, 0.1, 0.9).tolist()) for i, r in enumerate(rights)]
    found = recommend(evaluate(graded, {"entropy": SIZE}, resamples=10), seconds={1: 1.0, 4: 2.0})
    assert found.helps
    assert found.selector in {"entropy", "learned"}
    assert found.gain.low > 0
    assert found.sentences[0].startswith(f"Use it: {found.selector}")
    assert "tokens" in found.sentences[3]


def test_interval_and_p_agree():
    rng = np.random.default_rng(2)
    for _ in range(30):
        found, _ = simultaneous(rng.normal(0.25, 1, size=(30, 3)), rng)
        assert all((one.low > 0 or one.high < 0) == (one.p <= 0.05) for one in found)


def test_shared_tasks_are_compared():
    a = evaluate([draw(f"t{i}", [False, True], [0.1, 0.9]) for i in range(8)], {"entropy": SIZE}, resamples=10)
    b = evaluate([draw(f"t{i}", [True, False], [0.1, 0.9]) for i in range(2, 12)], {"entropy": SIZE}, resamples=10)
    found = compare(a, b)
    assert (found["entropy"].value, found["random"].value) == (1.0, 0.0)
    assert found["entropy"].p == pytest.approx(2 / 2**6)
    other = evaluate([draw("x", [True], [0.1])], {}, resamples=10)
    with pytest.raises(ConfigError, match="0 shared tasks"):
        compare(a, other)


def test_seconds_of_the_slowest_call():
    calls = [[1.0, 5.0, 2.0]]
    slowest = [max(pair) for pair in itertools.combinations(calls[0], 2)]
    assert step_seconds(calls, 3) == pytest.approx({1: 8 / 3, 2: np.mean(slowest), 3: 5.0})
