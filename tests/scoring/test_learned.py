"""The learned selector finds a signal and none in noise, shows its weights, and refuses what it was not made for."""

from pathlib import Path

import numpy as np
import pytest
from helpers.candidates import candidate
from helpers.graded import draw, noise

from ec_agents.errors import ConfigError
from ec_agents.evaluation.comparison import evaluate
from ec_agents.scoring.learned import FEATURES, Example, Learned
from ec_agents.selection import as_selector, select


def examples(count: int, rng: np.random.Generator, signal: float) -> list[Example]:
    rights = [np.array([True, False, True, False]) for _ in range(count)]
    rows = [rng.normal(size=(4, len(FEATURES))) for _ in rights]
    for row, right in zip(rows, rights, strict=True):
        row[:, 3] -= signal * right
    return [Example(features=row, right=right) for row, right in zip(rows, rights, strict=True)]


def test_sign_and_weight_are_readable(tmp_path: Path):
    found = Learned.fit(examples(200, np.random.default_rng(0), 2.0), k=(20,), actions=("text",), model="m")
    weights = dict(found.log_odds)
    assert weights.pop("mean-entropy") < -0.5
    assert max(map(abs, weights.values())) < 0.3
    found.save(tmp_path / "selector.json")
    assert Learned.load(tmp_path / "selector.json") == found
    assert as_selector(str(tmp_path / "selector.json")).scorer == found


def test_nothing_is_extrapolated():
    found = Learned.fit(examples(50, np.random.default_rng(1), 1.0))
    far, farther = (np.zeros((2, len(FEATURES))) for _ in range(2))
    far[0, 3], farther[0, 3] = -1e3, -1e6
    assert found.scores(far).tolist() == found.scores(farther).tolist()


def test_other_k_and_actions_are_refused(caplog: pytest.LogCaptureFixture):
    """It scores nothing, so that the fallback decides, and says once what to do."""
    drawn = [candidate(i, [0.1, 0.2], content="x") for i in range(2)]
    k = drawn[0].signals.n_alternatives if drawn[0].signals else 0
    about = {"k": (k,), "actions": ("text",)}
    fits = Learned.fit(examples(20, np.random.default_rng(2), 1.0), **about)
    assert select(drawn, fits).reason != "fallback"
    for wrong in ({**about, "k": (k + 1,)}, {**about, "actions": ("tool_calls",)}):
        other = Learned.fit(examples(20, np.random.default_rng(2), 1.0), **wrong)
        caplog.clear()
        assert select(drawn, other).reason == select(drawn, other).reason == "fallback"
        assert caplog.text.count("ec-agents pilot") == 1


def test_another_model_is_refused():
    found = Learned.fit(examples(20, np.random.default_rng(3), 1.0), model="small")
    found.check_model("small")
    with pytest.raises(ConfigError, match="fitted on 'small', and the model is 'large'"):
        found.check_model("large")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "scorer": "learned"}', '{"format": 1, "scorer": "x"}'])
def test_damaged_files(tmp_path: Path, text: str):
    (tmp_path / "selector.json").write_text(text)
    with pytest.raises(ConfigError):
        as_selector(str(tmp_path / "selector.json"))


def test_nothing_to_learn_from():
    with pytest.raises(ConfigError, match="no step has both"):
        Learned.fit([Example(features=np.zeros((1, len(FEATURES))), right=np.array([True]))])


def test_the_row_of_a_table_finds_a_signal_and_none_in_noise():
    """Cross-fitted: without signal the mean gain over random is 0, though fitted on its own labels it would not be."""
    rng = np.random.default_rng(4)
    gains = []
    for _ in range(12):
        found = evaluate(noise(30, 4, rng), {}, resamples=10)
        gains.append(found.row("learned").accuracy.value - found.row("random").accuracy.value)
    assert abs(np.mean(gains)) < 3 * np.std(gains) / len(gains) ** 0.5 + 1e-9
    rights = [rng.random(4) < 0.5 for _ in range(40)]
    clear = [draw(f"t{i}", r.tolist(), np.where(r, 0.1, 0.9).tolist()) for i, r in enumerate(rights)]
    found = evaluate(clear, {}, resamples=10)
    assert found.row("learned").accuracy.value > found.row("random").accuracy.value + 0.3
    assert found.row("learned").curve[1].value == pytest.approx(found.row("avg@1").accuracy.value)
    assert found.row("learned").curve[4].value == pytest.approx(found.row("learned").accuracy.value)
