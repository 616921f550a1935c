"""One graded step under one selector, reduced to the numbers that the tables need."""

import math
from collections.abc import Callable, Mapping, Sequence
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
"""Up to this, a curve has a point for each n."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What one way of choosing would have done at one step."""

    right: float
    """Outcome of the choice, 0..1: an expectation where the choice is random."""
    curve: tuple[float, ...]
    """Expected outcome if only n candidates had been drawn, for each n asked for."""
    tokens: tuple[float, float]
    """Input and output tokens spent; NaN if a candidate reports none."""
    scores: Floats
    """``(N,)``, turned so that high is better; NaN = unscored. Empty if nothing was scored."""
    labels: NDArray[np.bool_]
    """``(N,)``: which of them are right."""
    auroc: float = math.nan
    """Of the scores within this step."""
    margin: float = math.nan
    """In standard deviations of a signal-free score where the scorer knows them, otherwise as it is."""
    n_flawed: int = 0
    """Candidates that a guard found something in."""
    is_fallback: float = math.nan
    """1 if there was nothing to rank by, 0 if there was."""
    agrees: float = math.nan
    """1 if this is the choice that was recorded, 0 if it is another one."""


_FIRST = Selector(scorer=FirstScorer())

Policy = Callable[[Graded, Sequence[int]], Replay]
"""A graded step and the values of n of the curve → what this way of choosing would have done."""


def curve_points(n: int) -> tuple[int, ...]:
    """The values of n of a curve: each up to 16, then each doubling, and N itself."""
    doublings = (EVERY_N << shift for shift in range(1, n.bit_length()))
    return tuple(sorted({*range(1, min(n, EVERY_N) + 1), *(point for point in doublings if point < n), n}))


class SelectorPolicy:
    """A selector, replayed.

    Where the score of a candidate does not depend on the others, the curve is exact; otherwise, for votes say, it is
    the mean over ``subsets`` random subsets.

    Args:
        selector: The way of choosing.
        rng: Draws the subsets.
        subsets: How many for each n.
        calls: ``"all"``: every choice needs all N; ``"until_chosen"``: it needs the calls up to the chosen one.
    """

    PROBED = 5
    """Steps on which it is tried whether scores depend on the other candidates."""

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
            return nothing(points)
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
        lost = [0.0] * (total - len(selection.order))
        if self._independent or n == 1:
            return best_of_subset([float(graded.right[index]) for index in selection.order] + lost, n)
        drawn = [self._rng.permutation(total)[:n] for _ in range(self._subsets)]
        return sum(self._outcome(graded, subset.tolist()) for subset in drawn) / self._subsets

    def _outcome(self, graded: Graded, positions: Sequence[int]) -> float:
        candidates = graded.step.candidates
        subset = [candidates[position] for position in positions if position < len(candidates)]
        return float(graded.right[self._selector.choose(subset)]) if subset else 0.0

    def _probe(self, candidates: Sequence[Candidate], selection: Selection) -> None:
        """Find out whether a candidate alone has the score that it has among the others."""
        if not self._independent or self._probed >= self.PROBED or len(candidates) < 2:
            return
        self._probed += 1
        scores = np.array([selection.scores[c.index] for c in candidates], dtype=np.float64)
        alone = np.array([float(self._selector.scorer([c])[0]) for c in candidates])
        self._independent = bool(np.array_equal(alone, scores, equal_nan=True))


def one_call(graded: Graded, points: Sequence[int]) -> Replay:
    """avg@1: the expected outcome of a single call, failed calls counted as not right."""
    value = sum(graded.right.values()) / graded.n_drawn
    tokens = _spent(graded.step.candidates)
    return _exact(value, [value] * len(points), (tokens[0] / graded.n_drawn, tokens[1] / graded.n_drawn))


def random_sound(graded: Graded, points: Sequence[int]) -> Replay:
    """Any sound candidate with equal chance, exactly; any candidate at all if none is sound."""
    candidates = graded.step.candidates
    if not candidates:
        return nothing(points)
    flaws = _FIRST(candidates).flaws
    sound = [c for c in candidates if not flaws.get(c.index, {}).keys() - {"no_signal"}] or candidates
    value = sum(graded.right[c.index] for c in sound) / len(sound)
    tokens = _spent(candidates)
    return _exact(value, [value] * len(points), (tokens[0] / len(sound), tokens[1] / len(sound)))


def oracle(graded: Graded, points: Sequence[int]) -> Replay:
    """pass@N: right if any candidate is."""
    n_right = sum(graded.right.values())
    ranked = [1.0] * n_right + [0.0] * (graded.n_drawn - n_right)
    curve = [best_of_subset(ranked, min(n, graded.n_drawn)) for n in points]
    return _exact(float(n_right > 0), curve, _spent(graded.step.candidates))


def nothing(points: Sequence[int]) -> Replay:
    """A step in which every call failed: not right, whoever chooses."""
    return _exact(0.0, [0.0] * len(points), (0.0, 0.0))


def _exact(right: float, curve: Sequence[float], tokens: tuple[float, float]) -> Replay:
    return Replay(right=right, curve=tuple(curve), tokens=tokens, scores=np.empty(0), labels=np.empty(0, dtype=bool))


def _spent(candidates: Sequence[Candidate]) -> tuple[float, float]:
    """Input and output tokens of the candidates; NaN where one of them reports none."""
    usages = [_usage(candidate) for candidate in candidates]
    return sum(u["input_tokens"] for u in usages), sum(u["output_tokens"] for u in usages)


def _usage(candidate: Candidate) -> Mapping[str, float]:
    given = candidate.usage or {}
    output = math.nan if candidate.signals is None else candidate.signals.n_tokens
    return {
        "input_tokens": given.get("input_tokens", math.nan),
        "output_tokens": given.get("output_tokens", output),
    }
