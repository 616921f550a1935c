"""Replay one graded step under one strategy, reduced to the numbers that the tables need."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import Candidate, Selection
from ec_agents.evaluation.outcomes import Graded
from ec_agents.evaluation.stats import auroc, best_of_subset
from ec_agents.scoring import FirstScorer
from ec_agents.selection import Selector

Floats = NDArray[np.float64]

EVERY_N = 16
"""A curve has a point for each n up to this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The result of one strategy at one step."""

    right: float
    """Outcome of the choice, 0..1: an expectation if the choice is random."""
    curve: tuple[float, ...]
    """Expected outcome with only n candidates, for each requested n."""
    tokens: tuple[float, float]
    """Input and output tokens spent; NaN if a candidate reports none."""
    scores: Floats
    """``(N,)``, with the sign that makes high better; NaN = unscored. Empty if nothing was scored."""
    labels: NDArray[np.bool_]
    """``(N,)``: whether each scored candidate is right."""
    auroc: float = math.nan
    """AUROC of the scores within this step."""
    margin: float = math.nan
    """In standard deviations of a signal-free score where the scorer knows them, otherwise in units of the score."""
    n_flawed: int = 0
    """Candidates in which a guard found a flaw."""
    is_fallback: float = math.nan
    """1 if there was nothing to rank by, otherwise 0."""
    agrees: float = math.nan
    """1 if the recorded choice is the same, 0 if it differs."""


_FIRST = Selector(scorer=FirstScorer())

Strategy = Callable[[Graded, Sequence[int]], Replay]
"""A way of choosing: takes a graded step and the n of each point of the curve."""


def curve_points(n: int) -> tuple[int, ...]:
    """The n of each point of a curve: every n up to 16, then each doubling, and N itself."""
    doublings = (EVERY_N << shift for shift in range(1, n.bit_length()))
    return tuple(sorted({*range(1, min(n, EVERY_N) + 1), *(point for point in doublings if point < n), n}))


class SelectorStrategy:
    """The strategy of a selector.

    If the score of a candidate does not depend on the others, the curve is exact. Otherwise, as for votes, it is the
    mean over ``subsets`` random subsets.

    Args:
        selector: Chooses.
        rng: Random generator for the subsets.
        subsets: Random subsets per point of the curve.
        calls: Which calls the choice has to wait for: ``"all"``, or ``"until_chosen"`` for those up to the chosen one.
    """

    PROBED = 5
    """Steps on which the independence of the scores is tested."""

    def __init__(self, selector: Selector, rng: np.random.Generator, *, subsets: int = 2, calls: str = "all") -> None:
        self._selector = selector
        self._rng = rng
        self._subsets = subsets
        self._calls = calls
        self._probed = 0
        self._independent = selector.min_tokens == 0 and selector.tie_break is None

    def __call__(self, graded: Graded, points: Sequence[int]) -> Replay:
        """Replay one step."""
        candidates = graded.step.candidates
        if not candidates:
            return all_failed(points)
        selection = self._selector(candidates)
        self._probe(candidates, selection)
        sign = 1.0 if self._selector.scorer.best == "highest" else -1.0
        scores = np.array([sign * (math.nan if s is None else s) for s in selection.scores.values()])
        labels = np.array([graded.right[index] for index in selection.scores], dtype=bool)
        recorded = graded.step.selection
        margin = selection.margin if selection.margin_sd is None else selection.margin_sd
        return Replay(
            right=float(graded.right[selection.chosen]),
            curve=tuple(self._expected(graded, selection, n) for n in points),
            tokens=_spent([c for c in candidates if self._calls == "all" or c.index <= selection.chosen]),
            scores=scores,
            labels=labels,
            auroc=auroc(scores, labels),
            margin=math.nan if margin is None else margin,
            n_flawed=sum(bool(flaws.keys() - {"no_signal"}) for flaws in selection.flaws.values()),
            is_fallback=float(selection.reason == "fallback"),
            agrees=math.nan if recorded is None else float(recorded.chosen == selection.chosen),
        )

    def _expected(self, graded: Graded, selection: Selection, n: int) -> float:
        total = graded.n_drawn
        if n >= total:
            return float(graded.right[selection.chosen])
        failed = [0.0] * (total - len(selection.order))
        if self._independent or n == 1:
            return best_of_subset([float(graded.right[index]) for index in selection.order] + failed, n)
        subsets = [self._rng.permutation(total)[:n] for _ in range(self._subsets)]
        return sum(self._outcome(graded, subset.tolist()) for subset in subsets) / self._subsets

    def _outcome(self, graded: Graded, positions: Sequence[int]) -> float:
        candidates = graded.step.candidates
        subset = [candidates[position] for position in positions if position < len(candidates)]
        return float(graded.right[self._selector.choose(subset)]) if subset else 0.0

    def _probe(self, candidates: Sequence[Candidate], selection: Selection) -> None:
        """Test whether a candidate scores the same alone as among the others."""
        if not self._independent or self._probed >= self.PROBED or len(candidates) < 2:
            return
        self._probed += 1
        scores = np.array([selection.scores[c.index] for c in candidates], dtype=np.float64)
        alone = np.array([float(self._selector.scorer([c])[0]) for c in candidates])
        self._independent = bool(np.array_equal(alone, scores, equal_nan=True))


def one_call(graded: Graded, points: Sequence[int]) -> Replay:
    """avg@1: the expected outcome of a single call; failed calls count as not right."""
    value = sum(graded.right.values()) / graded.n_drawn
    return _exact(value, [value] * len(points), _per_call(graded, graded.n_drawn))


def random_sound(graded: Graded, points: Sequence[int]) -> Replay:
    """Any sound candidate with equal chance, exactly; any candidate at all if none is sound."""
    candidates = graded.step.candidates
    if not candidates:
        return all_failed(points)
    flaws = _FIRST(candidates).flaws
    sound = [c for c in candidates if not flaws.get(c.index, {}).keys() - {"no_signal"}] or candidates
    value = sum(graded.right[c.index] for c in sound) / len(sound)
    return _exact(value, [value] * len(points), _per_call(graded, len(sound)))


def oracle(graded: Graded, points: Sequence[int]) -> Replay:
    """pass@N: right if any candidate is."""
    n_right = sum(graded.right.values())
    ranked = [1.0] * n_right + [0.0] * (graded.n_drawn - n_right)
    curve = [best_of_subset(ranked, min(n, graded.n_drawn)) for n in points]
    return _exact(float(n_right > 0), curve, _spent(graded.step.candidates))


def all_failed(points: Sequence[int]) -> Replay:
    """A step in which every call failed: not right under any strategy."""
    return _exact(0.0, [0.0] * len(points), (0.0, 0.0))


def outcome_only(right: float, tokens: tuple[float, float] = (math.nan, math.nan)) -> Replay:
    """An outcome without scores or a curve, as of a whole run."""
    return _exact(right, (), tokens)


def _exact(right: float, curve: Sequence[float], tokens: tuple[float, float]) -> Replay:
    return Replay(right=right, curve=tuple(curve), tokens=tokens, scores=np.empty(0), labels=np.empty(0, dtype=bool))


def _per_call(graded: Graded, calls: int) -> tuple[float, float]:
    given, taken = _spent(graded.step.candidates)
    return given / calls, taken / calls


def _spent(candidates: Sequence[Candidate]) -> tuple[float, float]:
    """Input and output tokens of the candidates; NaN if one of them reports none."""
    given = sum((c.usage or {}).get("input_tokens", math.nan) for c in candidates)
    return given, sum(map(_output_tokens, candidates))


def _output_tokens(candidate: Candidate) -> float:
    counted = math.nan if candidate.signals is None else candidate.signals.n_tokens
    return (candidate.usage or {}).get("output_tokens", counted)
