"""Evaluation: exact expectations, intervals, tests, curves, tuning; a score without signal gains nothing."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.graded import SIZE, draw, measured, noise
from hypothesis import given, settings, strategies as st

from ec_agents.candidates import Candidate, Step
from ec_agents.errors import ConfigError, TraceError
from ec_agents.evaluation import stats
from ec_agents.evaluation.comparison import Evaluation, evaluate, evaluate_runs, tune
from ec_agents.evaluation.outcomes import Graded, RunOutcome, grade, read_outcomes
from ec_agents.evaluation.replay import curve_points
from ec_agents.evaluation.table import load_evaluation
from ec_agents.scoring import SCORERS, MajorityVote, RandomScorer, SignalScorer
from ec_agents.selection import Selector

OUTCOMES = st.lists(st.booleans(), min_size=1, max_size=9)


def table(graded: Sequence[Graded], **options: object) -> Evaluation:
    return evaluate(graded, {"entropy": SIZE}, resamples=200, **options)  # type: ignore[arg-type]


def values(curve: Mapping[int, stats.Estimate]) -> list[float]:
    return [point.value for point in curve.values()]


@given(st.lists(st.tuples(OUTCOMES, st.integers(0, 3)), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_the_ends_of_the_table_are_exact(draws: list[tuple[list[bool], int]]):
    graded = [draw(str(i), right, [0.5] * len(right), failures=lost) for i, (right, lost) in enumerate(draws)]
    found = table(graded)
    assert found.row("random").accuracy.value == pytest.approx(np.mean([np.mean(right) for right, _ in draws]))
    single = [sum(right) / (len(right) + lost) for right, lost in draws]
    assert found.row("avg@1").accuracy.value == pytest.approx(np.mean(single))
    assert found.row("oracle").accuracy.value == np.mean([any(right) for right, _ in draws])
    assert found.row("first").accuracy.value == np.mean([right[0] for right, _ in draws])
    assert found.n_failed == sum(lost for _, lost in draws)
    for row in found.rows:
        assert 0 <= row.accuracy.low <= row.accuracy.value <= row.accuracy.high <= 1
        assert row.regret is not None
        assert row.regret.value == pytest.approx(found.row("oracle").accuracy.value - row.accuracy.value)


def test_random_row():
    """It is what the random selector does on average."""
    rng = np.random.default_rng(0)
    graded = noise(10, 6, rng)
    flawed = graded[0].step.candidates[0]
    graded[0] = Graded(
        step=Step(
            run="a",
            task="t0",
            candidates=[measured(0, 0.1, finish_reason="length"), *graded[0].step.candidates[1:]],
        ),
        right={**graded[0].right, flawed.index: True},
    )
    chosen = Selector(scorer=RandomScorer(seed=1))
    draws = [np.mean([g.right[chosen(g.step.candidates).chosen] for g in graded]) for _ in range(2000)]
    assert table(graded).row("random").accuracy.value == pytest.approx(
        np.mean(draws), abs=4 * np.std(draws) / 2000**0.5
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.data())
def test_the_best_of_a_subset_is_the_mean_over_all_subsets(ranked: list[float], data: st.DataObject):
    n = data.draw(st.integers(1, len(ranked)))
    brute = np.mean([ranked[min(subset)] for subset in itertools.combinations(range(len(ranked)), n)])
    assert stats.best_of_subset(ranked, n) == pytest.approx(brute)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_hat_is_the_mean_over_all_subsets_of_trials(chances: list[float], k: int):
    found = stats.all_right(chances, k)
    if k > len(chances):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.mean([math.prod(s) for s in itertools.combinations(chances, k)]))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12))
def test_auroc_counts_pairs(rows: list[tuple[int, bool]]):
    pairs = [(a > b) + 0.5 * (a == b) for a, up in rows for b, down in rows if up and not down]
    found = stats.auroc([score for score, _ in rows], [right for _, right in rows])
    assert found == pytest.approx(np.mean(pairs)) if pairs else math.isnan(found)


def test_auroc_leaves_unscored_candidates_out():
    assert stats.auroc([0.1, math.nan, 0.9], [False, True, True]) == 1.0


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_paired_test_is_exact_for_few_tasks(differences: list[int]):
    patterns = itertools.product((-1, 1), repeat=len(differences))
    flips = [abs(int(np.dot(signs, differences))) for signs in patterns]
    expected = np.mean([flip >= abs(sum(differences)) for flip in flips])
    assert stats.paired_p(differences, np.random.default_rng(0)) == pytest.approx(expected)


def test_paired_test():
    """It finds a difference in many tasks and none in noise."""
    rng = np.random.default_rng(0)
    assert stats.paired_p(rng.normal(0.5, 1, 200), rng) < 0.001
    assert stats.paired_p(rng.normal(0, 1, 200), rng) > 0.05
    assert stats.paired_p([0.0] * 5, rng) == 1.0


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_orders_and_never_lowers(p_values: list[float]):
    corrected = stats.holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    assert [c for _, c in sorted(zip(p_values, corrected, strict=True))] == sorted(corrected)


def test_holm_gives_the_textbook_values():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_intervals_resample_tasks_and_not_draws():
    """Twenty copies of each draw are no more evidence than one."""
    rng = np.random.default_rng(3)
    once = noise(30, 4, rng)
    one, many = table(once).row("entropy").accuracy, table(once * 20).row("entropy").accuracy
    assert many.value == pytest.approx(one.value)
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.05)


def test_intervals_cover_the_truth():
    """Of 200 experiments, about 95 % of the intervals hold the true accuracy of 1/2."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        right = np.repeat(rng.random(60) < 0.5, 3).astype(float)
        tasks = [str(i // 3) for i in range(180)]
        found = stats.Resampling(tasks, rng, resamples=300).share(right)
        held += found is not None and found.low <= 0.5 <= found.high
    assert 0.9 <= held / 200 <= 0.985


def test_the_same_outcome_everywhere_still_leaves_doubt():
    found = table([draw(str(i), [True], [0.1]) for i in range(5)]).row("entropy").accuracy
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 5), abs=1e-6)


def test_a_perfect_score_is_found_out():
    rng = np.random.default_rng(0)
    graded = []
    for i in range(40):
        right = rng.random(6) < 0.4
        graded.append(draw(str(i), right.tolist(), np.where(right, 0.1, 0.9).tolist()))
    found = table(graded, prices=(1.0, 2.0))
    row, oracle = found.row("entropy"), found.row("oracle")
    assert row.accuracy.value == oracle.accuracy.value
    assert row.auroc_within is not None
    assert (row.auroc_within.value, row.auroc) == (1.0, 1.0)
    assert set(row.versus) == {"first", "random", "majority"}
    assert all(d.value > 0 and d.p_holm < 0.01 for d in row.versus.values())
    assert values(row.curve) == pytest.approx(values(oracle.curve))
    assert row.tokens == 6 * 6
    assert row.tokens_per_solved == pytest.approx(36 / row.accuracy.value)
    assert row.cost_per_solved == pytest.approx(6 * (5 + 2) / 1e6 / row.accuracy.value)
    assert found.row("avg@1").tokens == 6
    assert sum(b.count for b in row.margins) == 40


def test_an_exact_curve_agrees_with_subsets():
    """The curve of a score that looks at one candidate at a time is what subsampling gives in the long run."""
    graded = noise(12, 6, np.random.default_rng(1))
    exact = table(graded).row("entropy").curve
    drawn = table(graded, subsets=150)
    dependent = evaluate(graded, {"e": Selector(scorer=SIZE.scorer, tie_break=SIZE.scorer)}, subsets=150, resamples=10)
    assert list(exact) == [1, 2, 3, 4, 5, 6]
    assert values(dependent.row("e").curve) == pytest.approx(values(exact), abs=0.05)
    assert drawn.row("entropy").curve == exact


@given(st.integers(1, 200))
def test_curves_go_from_one_candidate_to_all(n: int):
    points = curve_points(n)
    assert (points[0], points[-1]) == (1, n)
    assert list(points) == sorted(set(points))


def test_the_curve_of_a_vote_counts_votes_in_each_subset():
    graded = [draw("a", [True, True, False], [0.1, 0.2, 0.3], texts=["4", "4", "5"])]
    found = evaluate(graded, {"vote": Selector(scorer=MajorityVote())}, subsets=300, resamples=10).row("vote")
    assert found.accuracy.value == 1.0
    assert found.curve[1].value == pytest.approx(2 / 3)
    assert found.curve[2].value == pytest.approx(
        1.0
    )  # ties go to the lower index, and both pairs with the wrong one have it


def test_failures_stay_in_the_denominator():
    lost = draw("b", [], [], failures=4)
    found = table([draw("a", [True] * 4, [0.1] * 4), lost])
    assert {row.selector: row.accuracy.value for row in found.rows} == dict.fromkeys(
        ["avg@1", "first", "random", "majority", "entropy", "oracle"], 0.5
    )
    assert found.n_failed == 4


def test_rates_say_what_could_not_be_used():
    signal_free = [Candidate(index=i, content="x") for i in range(4)]
    cut = [measured(0, 0.1, finish_reason="length"), *[measured(i, 0.5) for i in range(1, 4)]]
    graded = [
        Graded(step=Step(run=name, candidates=drawn), right=dict.fromkeys(range(4), True))
        for name, drawn in (("a", signal_free), ("b", cut))
    ]
    row = table(graded).row("entropy")
    assert (row.unscored, row.flawed, row.fallback) == (0.5, 1 / 8, 0.5)


def test_agreement_with_what_was_recorded():
    one = draw("a", [True, False], [0.9, 0.1])
    step = Step(run="r", task="a", candidates=one.step.candidates, selection=SIZE(one.step.candidates))
    found = table([Graded(step=step, right=one.right)])
    assert (found.row("entropy").agreement, found.row("first").agreement) == (1.0, 0.0)


def test_baselines():
    """Baselines can be chosen; each is compared with those before it."""
    graded = noise(10, 4, np.random.default_rng(0))
    found = evaluate(graded, {"entropy": SIZE, "other": SIZE}, baselines=("first", "majority", "entropy"), resamples=20)
    assert found.baselines == ("first", "majority", "entropy")
    compared = {row.selector: tuple(row.versus) for row in found.rows if row.selector != "learned"}
    assert compared == {
        "avg@1": (),
        "first": (),
        "random": (),
        "majority": ("first",),
        "entropy": ("first", "majority"),
        "other": ("first", "majority", "entropy"),
        "oracle": (),
    }
    assert found.row("other").versus["entropy"].value == 0
    with pytest.raises(ConfigError, match="no row to compare with is called nothing; known: avg@1, first"):
        evaluate(graded, {"entropy": SIZE}, baselines=("nothing",))


def test_thirds_by_length():
    graded = [
        Graded(step=Step(run=str(n), candidates=[measured(0, 0.1, tokens=n)]), right={0: n > 20}) for n in range(1, 31)
    ]
    found = table(graded)
    assert [None if e is None else e.value for e in found.row("entropy").by_length] == [0.0, 0.0, 1.0]
    assert len(found.lengths) == 2


def test_a_table_survives_saving(tmp_path: Path):
    found = evaluate(
        noise(12, 4, np.random.default_rng(0)),
        {name: Selector(scorer=make()) for name, make in SCORERS.items() if name != "random"},
        tuned={"tuned": {"a": SIZE, "b": Selector(scorer=MajorityVote())}},
        resamples=50,
    )
    found.save(tmp_path / "evaluation.json")
    assert load_evaluation(tmp_path / "evaluation.json") == found
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a saved evaluation"):
        load_evaluation(tmp_path / "other.json")


def test_the_same_seed_gives_the_same_table():
    graded = noise(15, 4, np.random.default_rng(0))
    assert table(graded, seed=7) == table(graded, seed=7)
    assert table(graded, seed=7) != table(graded, seed=8)


class NearMean:
    """The reference's outlier threshold: of the scores not below the mean by more than τ, the lowest is the best."""

    name = "near-mean"
    best = "lowest"

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def __call__(self, candidates: Sequence[Candidate]) -> np.ndarray:
        scores = SIZE.scorer(candidates)
        outlier = scores < scores.mean() - self._threshold
        return np.where(outlier & ~outlier.all(), scores + 10, scores)


def test_a_score_without_signal_gains_nothing_unless_labels_leak():
    """Thirty problems, a threshold of ten settings: picked on the labels it 'gains', by cross-fitting it does not."""
    rng = np.random.default_rng(11)
    grid = {f"{t / 100:.2f}": Selector(scorer=NearMean(t / 100)) for t in range(3, 31, 3)}  # type: ignore[arg-type]
    leaked, honest, plain = list[float](), list[float](), list[float]()
    for seed in range(12):
        graded = noise(30, 8, rng)
        right = {name: np.mean([g.right[s(g.step.candidates).chosen] for g in graded]) for name, s in grid.items()}
        random = np.mean([np.mean(list(g.right.values())) for g in graded])
        leaked.append(float(max(right.values()) - random))
        honest.append(tune(graded, grid, seed=seed).accuracy - float(random))
        plain.append(float(np.mean([g.right[SIZE(g.step.candidates).chosen] for g in graded]) - random))
    standard_error = np.std(honest) / math.sqrt(len(honest))
    assert np.mean(leaked) > 0.05
    assert abs(np.mean(honest)) < 3 * standard_error
    assert abs(np.mean(plain)) < 3 * np.std(plain) / math.sqrt(len(plain))


def test_noise_is_rarely_called_a_gain():
    """Of 25 tables of noise, hardly any has a corrected p-value below 0.05."""
    rng = np.random.default_rng(2)
    tables = [evaluate(noise(25, 4, rng), {"entropy": SIZE}, resamples=20, seed=i) for i in range(25)]
    alarms = sum(any(d.p_holm < 0.05 for d in found.row("entropy").versus.values()) for found in tables)
    assert alarms <= 4


def test_tuned_row():
    """A tuned row says so and is not better than its settings allow."""
    rng = np.random.default_rng(0)
    graded = []
    for i in range(20):
        right = rng.random(4) < 0.5
        graded.append(draw(str(i), right.tolist(), np.where(right, 0.1, 0.9).tolist()))
    worst = Selector(scorer=SignalScorer("highest", "highest", lambda s: float(s.entropies[0])))
    row = table(graded, tuned={"tuned": {"good": SIZE, "bad": worst}}).row("tuned")
    assert row.accuracy.value == table(graded).row("entropy").accuracy.value
    assert row.note.startswith("tuned by 5-fold cross-fitting, never on the tasks it is judged on")
    assert row.note.endswith("; chosen: good, good, good, good, good")


def test_tuning_keeps_a_task_in_one_fold():
    """With each task drawn five times, a setting that fits one task only never wins on that task."""
    outcomes = {str(k): np.array([float(i // 5 == k) for i in range(25)]) for k in range(5)}
    right, _ = stats.cross_fit(outcomes, [str(i // 5) for i in range(25)], np.random.default_rng(0), folds=5)
    assert right.sum() == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: evaluate([], {}), "nothing to evaluate"),
        (lambda: evaluate([], {"oracle": SIZE}), "oracle: always in the table"),
        (lambda: table([draw("a", [True], [0.1])], level=1.5), "0 < level < 1"),
        (lambda: tune([draw("a", [True], [0.1])], {"a": SIZE}), "at least as many tasks as folds"),
        (lambda: Graded(step=draw("a", [True], [0.1]).step, right={}), "no outcome for candidates"),
        (lambda: table([draw("a", [True], [0.1])]).row("nobody"), "no row is called 'nobody'; known: avg@1"),
    ],
)
def test_wrong_use_is_explained(wrong: Callable[[], object], message: str):
    with pytest.raises(ConfigError, match=message):
        wrong()


def test_whole_runs():
    """They are split by their length and say what was repeated."""
    runs = [
        RunOutcome(
            task=f"t{i}",
            selector=arm,
            right=i % 2 == 0,
            usage={"input_tokens": 1, "output_tokens": i},
            restarts=int(arm == "a"),
        )
        for arm in ("a", "b")
        for i in range(9)
    ]
    found = evaluate_runs([*runs, replace(runs[0], task="t9", repeated=8)], baselines=("a",), resamples=20)
    assert (found.baselines, found.n_restarted, found.n_repeated) == (("a",), 10, 8)
    assert [e is not None for e in found.row("b").by_length] == [True] * 3
    assert found.lengths == pytest.approx((8 / 3, 16 / 3))
    assert tuple(found.row("b").versus) == ("a",)


def test_whole_runs_are_compared_task_by_task():
    runs = [
        RunOutcome(task=f"t{i}", trial=t, selector=name, right=right, usage={"input_tokens": 1, "output_tokens": 2})
        for i in range(12)
        for t in range(2)
        for name, right in (("random", i % 2 == 0), ("first", False), ("centroid", i % 4 != 3))
    ]
    runs[-1] = RunOutcome(task="t11", trial=1, selector="centroid", right=None, error="TimeoutError")
    found = evaluate_runs(runs)
    row = found.row("centroid")
    assert (found.n_tasks, found.n_draws, found.n_failed) == (12, 24, 1)
    assert row.accuracy.value == 18 / 24
    assert row.pass_hat[2].value == 9 / 12
    assert row.versus["first"].p == pytest.approx(2 / 2**9)
    assert row.versus["random"].value == pytest.approx(0.25)
    assert [r.selector for r in found.rows] == ["random", "first", "centroid"]


def test_notes_warn_of_a_misleading_table():
    """A wrong checker, equal answers, and votes over answers that all differ are said in words; else nothing is."""

    def notes(right: list[bool], texts: list[str]) -> tuple[str, ...]:
        return table([draw(f"t{i}", right, [0.1, 0.2, 0.3], texts=texts) for i in range(4)]).notes

    assert notes([True, False, False], ["4", "4", "5"]) == ()
    [wrong] = notes([False] * 3, ["4", "4", "5"])
    assert "look at your checker" in wrong
    [equal] = notes([True] * 3, ["4", "4", "4"])
    assert "All answers to a task are equal in 4 of 4 steps" in equal
    [distinct] = notes([True, False, False], ["4", "5", "6"])
    assert "votes such as majority mean nothing here" in distinct
    runs = [RunOutcome(task=str(i), selector="first", right=False) for i in range(3)]
    assert len(evaluate_runs(runs).notes) == 1
    assert evaluate_runs([replace(runs[0], right=True), *runs[1:]]).notes == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.csv", 'run,candidate,right\n"a",0,true\na,1,0\n"x\u2028\u0085y",1,0\n'),
        ("c.jsonl", '{"run": "a\u2028", "right": 1}\n{"run": "a", "right": 0}\n{"run":"a","candidate":0,"right":1}'),
        ("a.csv", "run,candidate,right\na,0,true\na,1,0\n"),
        ("a.jsonl", '{"run": "a", "candidate": 0, "right": true}\n{"run": "a", "candidate": 1, "right": "wrong"}\n'),
        ("b.jsonl", '{"run": "a", "step": 0, "candidate": 0, "right": 1}\n{"run": "a", "right": false}\n'),
    ],
)
def test_outcomes_of_a_file_are_joined_to_the_steps(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    steps = [Step(run=run, candidates=[measured(0, 0.1), measured(1, 0.2)]) for run in ("a", "unknown")]
    assert [one.right for one in grade(steps, read_outcomes(tmp_path / name))] == [{0: True, 1: False}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "run,right\na,maybe\n", "line 2: run, right and"),
        ("a.csv", "task,right\na,1\n", "line 2: run, right and"),
        ("a.jsonl", '{"run": "a", "right": true}\n{"run"', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: run, right and"),
    ],
)
def test_outcomes_of_another_form_are_refused_with_the_line(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(TraceError, match=message) as found:
        read_outcomes(tmp_path / name)
    assert found.value.line == int(message.split()[1].rstrip(":"))
