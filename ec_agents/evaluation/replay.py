"""Replay one graded step under one strategy, reduced to the numbers that the tables need."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import Candidate, Selection
from ec_agents.evaluation.outcomes import Graded
from ec_agents.evaluation.stats import auroc, best_of_subset
from ec_agents.scoring import CentroidScorer, FirstScorer, MajorityVote, Scorer, SignalScorer
from ec_agents.selection import Selector

Floats = NDArray[np.float64]

MOST_COUNTED = 2000
"""Random subsets of one step for which a majority is counted; up to so many are enumerated."""
FEW = 70
"""So many subsets are always enumerated: all those of 8 candidates."""

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

    If the score of a candidate does not depend on the others, the curve is exact. Otherwise it is the mean over all
    subsets, or over enough random ones: for a majority, 2,000 per step and point; for other votes, ``subsets``.

    Args:
        selector: Chooses.
        rng: Random generator for the subsets.
        subsets: Random subsets per step and point of the curve, where each has to be replayed.
        calls: Which calls the choice has to wait for: ``"all"``, or ``"until_chosen"`` for those up to the chosen one.
    """

    PROBED = 5
    """Steps on which the independence of the scores is tested."""

    def __init__(self, selector: Selector, rng: np.random.Generator, *, subsets: int = 32, calls: str = "all") -> None:
        self._selector = selector
        self._fast = selector
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
        majority = _Majority.of(self._selector, graded, selection) if len(points) > 1 else None
        self._fast = _remembering(self._selector, candidates)
        return Replay(
            right=float(graded.right[selection.chosen]),
            curve=tuple(self._expected(graded, selection, n, majority) for n in points),
            tokens=spent([c for c in candidates if self._calls == "all" or c.index <= selection.chosen]),
            scores=scores,
            labels=labels,
            auroc=auroc(scores, labels),
            margin=math.nan if margin is None else margin,
            n_flawed=sum(bool(flaws.keys() - {"no_signal"}) for flaws in selection.flaws.values()),
            is_fallback=float(selection.reason == "fallback"),
            agrees=math.nan if recorded is None else float(recorded.chosen == selection.chosen),
        )

    def _expected(self, graded: Graded, selection: Selection, n: int, majority: "_Majority | None") -> float:
        total = graded.n_drawn
        if n >= total:
            return float(graded.right[selection.chosen])
        failed = [0.0] * (total - len(selection.order))
        if self._independent or n == 1:
            return best_of_subset([float(graded.right[index]) for index in selection.order] + failed, n)
        subsets = subsets_of(total, n, self._subsets if majority is None else MOST_COUNTED, self._rng)
        outcomes = np.full(len(subsets), np.nan) if majority is None else majority.outcomes(subsets)
        for i in np.flatnonzero(np.isnan(outcomes)).tolist():
            outcomes[i] = self._outcome(graded, np.flatnonzero(subsets[i]).tolist())
        return float(outcomes.mean())

    def _outcome(self, graded: Graded, positions: Sequence[int]) -> float:
        candidates = graded.step.candidates
        subset = [candidates[position] for position in positions if position < len(candidates)]
        return float(graded.right[self._fast.choose(subset)]) if subset else 0.0

    def _probe(self, candidates: Sequence[Candidate], selection: Selection) -> None:
        """Test whether a candidate scores the same alone as among the others."""
        if not self._independent or self._probed >= self.PROBED or len(candidates) < 2:
            return
        self._probed += 1
        scores = np.array([selection.scores[c.index] for c in candidates], dtype=np.float64)
        alone = np.array([float(self._selector.scorer([c])[0]) for c in candidates])
        self._independent = bool(np.array_equal(alone, scores, equal_nan=True))


def subsets_of(total: int, n: int, most: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """All subsets of n of ``total`` calls as ``(S, total)`` masks, or ``most`` random ones if there are more."""
    if math.comb(total, n) <= max(most, FEW):
        return _all_subsets(total, n)
    order = rng.random((most, total)).argsort(axis=1)
    return order < n


@lru_cache(256)
def _all_subsets(total: int, n: int) -> NDArray[np.bool_]:
    masks = np.zeros((math.comb(total, n), total), dtype=np.bool_)
    for row, chosen in enumerate(combinations(range(total), n)):
        masks[row, list(chosen)] = True
    return masks


class _Remembered:
    """A scorer that looks at one candidate at a time, with its scores of one step computed once."""

    def __init__(self, scorer: Scorer, candidates: Sequence[Candidate]) -> None:
        self.name, self.best = scorer.name, scorer.best
        scores = np.asarray(scorer(candidates), dtype=np.float64).tolist()
        self._scores = {c.index: score for c, score in zip(candidates, scores, strict=True)}

    def __call__(self, candidates: Sequence[Candidate]) -> Floats:
        """Scores of some of the candidates, ``(N,)``."""
        return np.array([self._scores[candidate.index] for candidate in candidates])


def _remembering(selector: Selector, candidates: Sequence[Candidate]) -> Selector:
    """The selector for the subsets of one step: guards, and scores inside votes, are computed once."""
    scorer = selector.scorer
    if isinstance(scorer, MajorityVote):
        scorer = copy(scorer)
        for name in ("_scorer", "tie_break"):
            inner = getattr(scorer, name, None)
            if isinstance(inner, SignalScorer | CentroidScorer):
                setattr(scorer, name, _Remembered(inner, candidates))
    found = {name: {c.index: guard(c) for c in candidates} for name, guard in selector.guards.items()}
    guards = {name: partial(_flaw, flaws) for name, flaws in found.items()}
    return replace(selector, scorer=scorer, guards=guards)


def _flaw(flaws: Mapping[int, str | None], candidate: Candidate) -> str | None:
    return flaws[candidate.index]


class _Majority:
    """A plain majority on any number of subsets at once."""

    def __init__(self, graded: Graded, selection: Selection, keys: Sequence[str | None], ties: Floats) -> None:
        candidates = graded.step.candidates
        names = {key: i for i, key in enumerate(dict.fromkeys(key for key in keys if key is not None))}
        self._votes = np.zeros((graded.n_drawn, max(1, len(names))))
        for row, (candidate, key) in enumerate(zip(candidates, keys, strict=True)):
            is_sound = not selection.flaws.get(candidate.index)
            if key is not None and is_sound:
                self._votes[row, names[key]] = 1.0
        self._votes_at_all = self._votes.any(axis=1)
        self._ties = np.concatenate([ties, np.zeros(graded.n_drawn - len(candidates))])
        right = [float(graded.right[candidate.index]) for candidate in candidates]
        self._right = np.array(right + [0.0] * (graded.n_drawn - len(right)))

    @classmethod
    def of(cls, selector: Selector, graded: Graded, selection: Selection) -> "_Majority | None":
        """The majority that a selector counts; None if it does something else."""
        scorer, candidates = selector.scorer, graded.step.candidates
        if type(scorer) is not MajorityVote or selector.min_tokens or selector.tie_break is not None:
            return None
        if type(selector.fallback) is not FirstScorer:
            return None
        ties = np.zeros(len(candidates))
        if scorer.tie_break is not None:
            if type(scorer.tie_break) is not CentroidScorer:
                return None
            ties = np.nan_to_num(-scorer.tie_break(candidates), nan=-np.inf)
        return cls(graded, selection, [scorer.key(candidate) for candidate in candidates], ties)

    def outcomes(self, masks: NDArray[np.bool_]) -> Floats:
        """Outcome of each subset, ``(S, N)`` masks; NaN where no sound candidate votes."""
        counts = masks.astype(np.float64) @ self._votes
        scores = np.where(masks & self._votes_at_all, counts @ self._votes.T, -1.0)
        ties = np.where(scores == scores.max(axis=1, keepdims=True), self._ties, -np.inf)
        best = np.where(ties == ties.max(axis=1, keepdims=True), scores, -2.0).argmax(axis=1)
        return np.where(scores.max(axis=1) > 0, self._right[best], np.nan)


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
    return _exact(float(n_right > 0), curve, spent(graded.step.candidates))


def all_failed(points: Sequence[int]) -> Replay:
    """A step in which every call failed: not right under any strategy."""
    return _exact(0.0, [0.0] * len(points), (0.0, 0.0))


def outcome_only(right: float, tokens: tuple[float, float] = (math.nan, math.nan)) -> Replay:
    """An outcome without scores or a curve, as of a whole run."""
    return _exact(right, (), tokens)


def _exact(right: float, curve: Sequence[float], tokens: tuple[float, float]) -> Replay:
    return Replay(right=right, curve=tuple(curve), tokens=tokens, scores=np.empty(0), labels=np.empty(0, dtype=bool))


def _per_call(graded: Graded, calls: int) -> tuple[float, float]:
    given, taken = spent(graded.step.candidates)
    return given / calls, taken / calls


def spent(candidates: Sequence[Candidate]) -> tuple[float, float]:
    """Input and output tokens of the candidates; NaN if one of them reports none."""
    given = sum((c.usage or {}).get("input_tokens", math.nan) for c in candidates)
    return given, sum(map(_output_tokens, candidates))


def _output_tokens(candidate: Candidate) -> float:
    counted = math.nan if candidate.signals is None else candidate.signals.n_tokens
    return (candidate.usage or {}).get("output_tokens", counted)
