import json
import math
from typing import Any

import numpy as np
import pytest
from helpers.paths import DATA
from hypothesis import assume, given, settings, strategies as st

from ec_agents.entropy import (
    PRESETS,
    PhaseConfig,
    concatenate_turns,
    entropy_centroid,
    entropy_thresholds,
    high_entropy_phases,
    raw_entropy_centroid,
    standardized_centroid,
    token_entropies,
)
from ec_agents.errors import ConfigError

GOLDEN = json.loads((DATA / "golden.json").read_text())["cases"]
BAD_FLOATS = {None: math.nan, "nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def number(value: Any) -> float:
    """A golden number; null, "inf", "-inf" and "nan" become floats."""
    return BAD_FLOATS[value] if value is None or isinstance(value, str) else value


def close(value: Any) -> Any:
    return pytest.approx(number(value), rel=1e-12, abs=1e-12, nan_ok=True)


def config_of(case: dict[str, Any]) -> PhaseConfig:
    return PhaseConfig(case["top_percent"], case["bottom_percent"], case["consecutive_low"])


def cases(group: str) -> list[Any]:
    return [pytest.param(case, id=case["id"]) for case in GOLDEN[group]]


def hep_settings() -> list[Any]:
    return [
        pytest.param(
            case,
            setting,
            id=f"{case['id']}-{setting['top_percent']}-{setting['bottom_percent']}-{setting['consecutive_low']}",
        )
        for case in GOLDEN["hep"]
        for setting in case["settings"]
    ]


# Golden results of the reference implementation


@pytest.mark.parametrize(("case", "setting"), hep_settings())
def test_thresholds_phases_and_centroids_equal_the_reference(case: dict[str, Any], setting: dict[str, Any]) -> None:
    entropies, config = case["entropies"], config_of(setting)
    expected = (number(setting["high_threshold"]), number(setting["low_threshold"]))
    assert entropy_thresholds(entropies, config) == expected
    phases = high_entropy_phases(entropies, config)
    assert phases.tolist() == setting["heps"]
    length = case["length"]
    centroids = setting["centroid"]
    assert entropy_centroid(phases, length) == close(centroids["weighted_average_center"])
    assert entropy_centroid(phases, length) == close(setting["pipeline_centroid"])
    assert entropy_centroid(phases, length, position="start") == close(centroids["weighted_average"])
    assert entropy_centroid(phases, length, position="moment") == close(centroids["moment"])


@pytest.mark.parametrize("case", cases("hep"))
def test_raw_centroid_equals_the_reference(case: dict[str, Any]) -> None:
    raw = raw_entropy_centroid(case["entropies"])
    assert raw == close(case["raw_entropy"]["centroid"])
    assert raw == close(case["raw_entropy"]["pipeline_centroid"])


# Rows without any log-probability: the reference says 0.0, the most certain value; they are missing here.
ALL_MASKED = {"tok-011": (0, 1), "tok-012": (0,)}


def token_entropy_settings() -> list[Any]:
    return [
        pytest.param(case, int(top_k), id=f"{case['id']}-top{top_k}")
        for case in GOLDEN["token_entropy"]
        for top_k in case["entropies_by_top_k"]
    ]


@pytest.mark.parametrize(("case", "top_k"), token_entropy_settings())
def test_token_entropies_equal_the_reference(case: dict[str, Any], top_k: int) -> None:
    width = max(len(row or ()) for row in case["rows"])
    rows = [[number(value) for value in row or ()] for row in case["rows"]]
    entropies = token_entropies([row + [-math.inf] * (width - len(row)) for row in rows], top_k=top_k)
    expected = case["entropies_by_top_k"][str(top_k)]
    departures = ALL_MASKED.get(case["id"], ())
    assert [expected[position] for position in departures] == [0.0] * len(departures)
    for position, (found, wanted) in enumerate(zip(entropies.tolist(), expected, strict=True)):
        assert found == close(None if position in departures else wanted)


@pytest.mark.parametrize("case", cases("group"))
def test_group_equals_the_reference(case: dict[str, Any]) -> None:
    config = config_of(case)
    phases = [high_entropy_phases(entropies, config) for entropies in case["candidates"]]
    centroids = [entropy_centroid(p, len(e)) for p, e in zip(phases, case["candidates"], strict=True)]
    assert [len(p) for p in phases] == case["num_heps"]
    assert centroids == [close(value) for value in case["centroids"]]
    assert [raw_entropy_centroid(e) for e in case["candidates"]] == [close(value) for value in case["raw_centroids"]]
    lowest = None if np.isnan(centroids).all() else int(np.nanargmin(centroids))
    assert lowest == case["selected"]


@pytest.mark.parametrize("case", cases("multiturn"))
def test_turns_equal_the_reference(case: dict[str, Any]) -> None:
    config = config_of(case)
    entropies = concatenate_turns(case["turns"])
    assert len(entropies) == case["total_tokens"]
    assert entropy_thresholds(entropies, config) == (number(case["high_threshold"]), number(case["low_threshold"]))
    phases = high_entropy_phases(entropies, config)
    assert phases.tolist() == case["heps"]
    assert entropy_centroid(phases, len(entropies)) == close(case["trajectory_centroid"])
    assert sum(map(bool, case["turns"])) == case["num_turns_kept"]
    own = [entropy_centroid(high_entropy_phases(turn, config), len(turn)) for turn in case["turns"]]
    assert own == [close(value) for value in case["per_turn_centroids_own_thresholds"]]


# Properties


def slow_phases(entropies: list[float], high: float, low: float, patience: int) -> list[list[int]]:
    """The state machine, token by token."""
    phases: list[list[int]] = []
    start, duration, low_run = None, 0, 0
    for position, entropy in enumerate(entropies):
        if math.isnan(entropy):
            continue
        if start is None:
            if entropy >= high:
                start, duration, low_run = position, 1, 0
            continue
        duration += 1
        low_run = low_run + 1 if entropy <= low else 0
        if low_run >= patience:
            phases.append([start, duration - patience])
            start = None
    if start is not None:
        phases.append([start, duration])
    return phases


PERCENTS = st.sampled_from([0.0, 1.0, 5.0, 20.0, 37.5, 50.0, 80.0, 100.0]) | st.floats(0.0, 100.0)
CONFIGS = st.builds(PhaseConfig, PERCENTS, PERCENTS, st.integers(1, 7))
ENTROPY = st.sampled_from([0.0, 0.1, 0.5, 2.0, math.nan]) | st.floats(0.0, 3.0)
ENTROPIES = st.lists(ENTROPY, max_size=80)


@given(ENTROPIES, CONFIGS)
@settings(max_examples=300, deadline=None)
def test_phases_equal_the_state_machine(entropies: list[float], config: PhaseConfig) -> None:
    high, low = entropy_thresholds(entropies, config)
    expected = slow_phases(entropies, high, low, config.patience)
    assert high_entropy_phases(entropies, config).tolist() == expected


@pytest.mark.parametrize("patience", [1, 2, 3, 4, 5, 8, 9, 500])
def test_phases_of_long_texts_equal_the_state_machine(patience: int) -> None:
    rng = np.random.default_rng(patience)
    entropies = np.round(rng.gamma(0.4, 0.6, 3_000), 1)
    entropies[rng.random(3_000) < 0.05] = np.nan
    for top, bottom in ((1, 80), (5, 50), (30, 95), (90, 90)):
        config = PhaseConfig(top, bottom, patience)
        expected = slow_phases(entropies.tolist(), *entropy_thresholds(entropies, config), patience)
        assert high_entropy_phases(entropies, config).tolist() == expected


# Percentages of 16ths make the interpolated rank exact, so that rounding cannot move a threshold past a value.
EXACT_PERCENTS = st.integers(0, 16).map(lambda sixteenths: sixteenths * 6.25)
STRETCHES = {"shift": lambda r: r + 7.0, "scale": lambda r: 5.0 * r, "cube": lambda r: r**3, "exponential": np.exp2}


@pytest.mark.parametrize("stretch", STRETCHES.values(), ids=STRETCHES.keys())
@given(
    ranks=st.lists(st.integers(0, 30), max_size=60),
    config=st.builds(PhaseConfig, EXACT_PERCENTS, EXACT_PERCENTS, st.integers(1, 4)),
)
@settings(max_examples=50, deadline=None)
def test_phases_depend_on_the_order_of_the_entropies_only(ranks: list[int], config: PhaseConfig, stretch: Any) -> None:
    stretched = stretch(np.array(ranks, dtype=np.float64))
    assert np.array_equal(high_entropy_phases(ranks, config), high_entropy_phases(stretched, config))


@given(ENTROPIES, CONFIGS)
@settings(max_examples=200, deadline=None)
def test_phases_and_centroid_are_sound(entropies: list[float], config: PhaseConfig) -> None:
    """Phases are ordered and disjoint, and their centroid lies inside the text."""
    phases = high_entropy_phases(entropies, config)
    assert phases.dtype == np.int64
    assert phases.shape == (len(phases), 2)
    n_tokens = len(entropies)
    assert (len(phases) == 0) == np.isnan(np.array(entropies, dtype=float)).all()
    assume(len(phases))
    starts, durations = phases.T
    assert (durations >= 1).all()
    assert (starts[1:] >= (starts + durations + config.patience)[:-1]).all()
    assert starts[-1] + durations[-1] <= n_tokens
    assert 0.0 < entropy_centroid(phases, n_tokens) < 1.0
    assert 0.0 <= entropy_centroid(phases, n_tokens, position="start") < 1.0


LOGPROB = st.floats(-30.0, 0.0) | st.sampled_from([0.0, -0.0, -1e-9, -math.inf, -9999.0, -3.4028234663852886e38])
ROW = st.lists(LOGPROB, min_size=6, max_size=6)


@given(rows=st.lists(ROW, min_size=1, max_size=8), top_k=st.none() | st.integers(1, 8), data=st.data())
@settings(max_examples=200, deadline=None)
def test_entropies_lie_between_zero_and_log_k_in_any_order(
    rows: list[list[float]], top_k: int | None, data: st.DataObject
) -> None:
    entropies = token_entropies(rows, top_k=top_k)
    missing = [max(row) <= -9999.0 for row in rows]
    assert np.isnan(entropies).tolist() == missing
    present = entropies[~np.isnan(entropies)]
    assert not np.signbit(present).any()
    assert (present <= math.log(min(top_k or 6, 6)) + 1e-12).all()
    shuffled = [data.draw(st.permutations(row)) for row in rows]
    assert token_entropies(shuffled, top_k=top_k) == pytest.approx(entropies, abs=1e-12, nan_ok=True)


# Examples


def test_token_entropies_of_known_distributions() -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    rows = [[half, quarter, quarter], [half, half, -math.inf], [0.0, -9999.0, -3.4e38], [-7.0, -math.inf, -math.inf]]
    expected = [1.5 * math.log(2), math.log(2), 0.0, 0.0]
    assert token_entropies(rows).tolist() == pytest.approx(expected, abs=1e-15)
    assert token_entropies(rows, top_k=1).tolist() == [0.0] * 4


def test_token_entropies_renormalise_whatever_the_sum_is() -> None:
    row = np.log([0.5, 0.3, 0.2])
    shifted = token_entropies([row, row + 0.05, row - 600.0, row + 600.0])
    assert shifted == pytest.approx(np.full(4, shifted[0]), abs=1e-12)


@pytest.mark.parametrize(
    "row",
    [[math.nan, -0.1], [-0.1, math.nan], [-math.inf] * 2, [-9999.0] * 2, [-3.4e38, -1e9], [math.inf, -1.0], []],
)
@pytest.mark.parametrize("top_k", [None, 1, 5])
def test_token_without_usable_alternatives_is_missing(row: list[float], top_k: int | None) -> None:
    assert np.isnan(token_entropies([row], top_k=top_k)).tolist() == [True]


def test_no_tokens_give_no_entropies() -> None:
    assert token_entropies(np.empty((0, 20))).shape == (0,)


@pytest.mark.parametrize("entropies", [[], [math.nan], [None, None]])
def test_text_without_entropies(entropies: list[Any]) -> None:
    """It has neither thresholds nor phases nor a centroid."""
    assert entropy_thresholds(entropies, PRESETS["paper"]) == (math.inf, -math.inf)
    phases = high_entropy_phases(entropies, PRESETS["paper"])
    assert phases.shape == (0, 2)
    assert math.isnan(entropy_centroid(phases, len(entropies)))
    assert math.isnan(standardized_centroid(phases, len(entropies)))
    assert math.isnan(raw_entropy_centroid(entropies))


def test_opening_token_does_not_count_as_low() -> None:
    config = PhaseConfig(top_percent=100, bottom_percent=100, patience=2)
    assert high_entropy_phases([1.0] * 7, config).tolist() == [[0, 1], [3, 1], [6, 1]]


def test_closed_and_open_phases() -> None:
    """A closed phase leaves its low tokens, and an open one keeps them."""
    entropies = [2.0, 0.1, 0.1, 0.05, 0.2, 0.2]
    assert high_entropy_phases(entropies, PhaseConfig(1, 80, 5)).tolist() == [[0, 1]]
    assert high_entropy_phases(entropies, PhaseConfig(1, 80, 6)).tolist() == [[0, 6]]


def test_missing_tokens_have_a_position_only() -> None:
    entropies = [math.nan, 2.0, math.nan, 1.9, 0.1, math.nan, 0.1, 0.1, 0.1, 0.1]
    assert high_entropy_phases(entropies, PhaseConfig(10, 60, 2)).tolist() == [[1, 2]]


def test_half_precision_and_lists_are_accepted() -> None:
    entropies = [0.25, 2.0, 0.25, 0.25, 0.25]
    expected = high_entropy_phases(entropies, PRESETS["short"])
    assert np.array_equal(high_entropy_phases(np.array(entropies, dtype=np.float16), PRESETS["short"]), expected)
    assert entropy_centroid(expected.tolist(), 5) == entropy_centroid(expected, 5) == 0.3


def test_centroid_of_two_phases_by_hand() -> None:
    phases = [[2, 4], [10, 1]]
    assert entropy_centroid(phases, 20) == pytest.approx((4 * 4 + 1 * 10.5) / 5 / 20)
    assert entropy_centroid(phases, 20, position="start") == pytest.approx((4 * 2 + 1 * 10) / 5 / 20)
    assert entropy_centroid(phases, 20, position="moment") == pytest.approx((4 * 2 + 1 * 10) / 20)
    assert standardized_centroid(phases, 20) == pytest.approx((0.265 - 0.5) / math.sqrt(17 / (12 * 25)))


@pytest.mark.parametrize("n_tokens", [0, -1])
def test_centroid_of_no_tokens_is_undefined(n_tokens: int) -> None:
    assert math.isnan(entropy_centroid([[0, 1]], n_tokens))
    assert math.isnan(standardized_centroid([], n_tokens))


def test_standardized_centroid_of_noise() -> None:
    """Over uniformly placed phases it has mean 0 and variance 1."""
    rng = np.random.default_rng(7)
    scores = [
        standardized_centroid(np.stack((rng.integers(0, 100_000, 12), rng.integers(1, 9, 12)), axis=1), 100_000)
        for _ in range(4_000)
    ]
    assert np.mean(scores) == pytest.approx(0.0, abs=0.06)
    assert np.std(scores) == pytest.approx(1.0, abs=0.06)


def test_raw_centroid_skips_missing_and_negative_entropies() -> None:
    assert raw_entropy_centroid([math.nan, 1.0, -5.0, 3.0]) == pytest.approx((1 * 1 + 3 * 3) / 4 / 4)
    assert math.isnan(raw_entropy_centroid([0.0, 0.0]))


def test_turns_are_joined_and_empty_ones_vanish() -> None:
    assert concatenate_turns([]).shape == (0,)
    assert concatenate_turns([[0.5], [], np.array([1.0, np.nan], dtype=np.float32)]).tolist()[:2] == [0.5, 1.0]


def test_presets() -> None:
    assert {"paper": PhaseConfig(1.0, 80.0, 2), "short": PhaseConfig(5.0, 50.0, 3)} == PRESETS
    assert PhaseConfig() == PRESETS["paper"]


# Faults


@pytest.mark.parametrize("percent", [-0.1, 100.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["top_percent", "bottom_percent"])
def test_percentage_out_of_range_is_refused(name: str, percent: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a percentage between 0 and 100; found"):
        PhaseConfig(**{name: percent})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("patience", [0, -1, 1.5, True, "2"])
def test_patience_must_be_a_positive_integer(patience: Any) -> None:
    with pytest.raises(ConfigError, match="patience must be an integer of at least 1; found"):
        PhaseConfig(patience=patience)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_k must be at least 1; found 0"):
        token_entropies([[-0.1]], top_k=0)
    with pytest.raises(ConfigError, match=r"shape \(T, K\) are needed; found shape \(1,\)"):
        token_entropies([-0.1])
    with pytest.raises(ConfigError, match=r"shape \(T,\) are needed; found shape \(1, 1\)"):
        high_entropy_phases([[0.1]], PRESETS["paper"])
    with pytest.raises(ConfigError, match=r"shape \(P, 2\) are needed; found shape \(1, 3\)"):
        entropy_centroid([[1, 2, 3]], 4)
    with pytest.raises(ConfigError, match="position must be 'center', 'start' or 'moment'; found 'end'"):
        entropy_centroid([[0, 1]], 4, position="end")  # pyright: ignore[reportArgumentType]
