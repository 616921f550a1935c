"""The learned selector in evaluations: fitted on some tasks, judged on the others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import Candidate
from ec_agents.errors import ConfigError
from ec_agents.evaluation.outcomes import Graded
from ec_agents.evaluation.replay import Replay, all_failed, spent, subsets_of
from ec_agents.evaluation.stats import auroc, folds_of
from ec_agents.scoring import FirstScorer
from ec_agents.scoring.learned import FEATURES, Example, Learned, action_form, features
from ec_agents.scoring.votes import Key
from ec_agents.selection import Selector

Floats = NDArray[np.float64]

LEARNED = "learned"
"""Name of the row."""

_FIRST = Selector(scorer=FirstScorer())
_SHARE = FEATURES.index("vote-share")
_MOST_SUBSETS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What is kept of a graded step."""

    rows: Floats
    """``(N, F)``: the features of the candidates to choose among, NaN for the others and for failed calls."""
    can: NDArray[np.bool_]
    """``(N,)``: the sound candidates with signals; those with the mildest flaw if none is sound."""
    right: NDArray[np.bool_]
    """``(N,)``"""
    votes: Floats
    """``(N, A)``: which answer each votes for."""
    rank: NDArray[np.int64]
    """``(N,)``: the order without a score."""
    n_flawed: int
    tokens: tuple[float, float]


@dataclass(slots=True, kw_only=True)
class Learning:
    """Collects what the learned selector needs of each step, and evaluates it by cross-fitting."""

    key: Key
    """What votes compare."""
    _steps: list[_Step] = field(default_factory=list[_Step])
    _points: list[Sequence[int]] = field(default_factory=list[Sequence[int]])
    _k: set[int] = field(default_factory=set[int])
    _actions: set[str] = field(default_factory=set[str])

    def add(self, graded: Graded, points: Sequence[int]) -> None:
        """Take down a step."""
        self._steps.append(_step(graded, self.key))
        self._points.append(points)
        for candidate in graded.step.candidates:
            self._actions.add(action_form(candidate))
            if candidate.signals is not None and candidate.signals.n_tokens:
                self._k.add(candidate.signals.n_alternatives)

    def replays(self, tasks: Sequence[str], rng: np.random.Generator, *, folds: int) -> list[Replay] | None:
        """Every step under a model that was fitted on the other folds; None if the data do not suffice."""
        if len(set(tasks)) < folds:
            return None
        fold = folds_of(tasks, rng, folds)
        found: list[Replay] = [all_failed(points) for points in self._points]
        for k in range(folds):
            try:
                model = self._fit([step for step, other in zip(self._steps, fold, strict=True) if other != k])
            except ConfigError:  # nothing to learn from
                return None
            for i in np.flatnonzero(fold == k).tolist():
                if len(self._steps[i].rank):
                    found[i] = _replay(self._steps[i], model, self._points[i], rng)
        return found

    def fitted(self, tasks: Sequence[str], *, model: str, answer: str) -> Learned:
        """The model of all steps.

        Raises:
            ConfigError: No step has both a right and a wrong candidate.
        """
        k, actions = tuple(sorted(self._k)), tuple(sorted(self._actions))
        return self._fit(self._steps, model=model, answer=answer, k=k, actions=actions, n_tasks=len(set(tasks)))

    @staticmethod
    def _fit(steps: Sequence[_Step], **about: object) -> Learned:
        examples = [Example(features=step.rows[step.can], right=step.right[step.can]) for step in steps]
        return Learned.fit([one for one in examples if len(one.right)], **about)


def _step(graded: Graded, key: Key) -> _Step:
    total, candidates = graded.n_drawn, graded.step.candidates
    rows, can = np.full((total, len(FEATURES)), np.nan), np.zeros(total, dtype=np.bool_)
    right, rank = np.zeros(total, dtype=np.bool_), np.arange(total if candidates else 0)
    votes = np.zeros((total, 0))
    if not candidates:
        return _Step(rows=rows, can=can, right=right, votes=votes, rank=rank, n_flawed=0, tokens=(0.0, 0.0))
    selection = _FIRST(candidates)
    flaws = {c.index: set(selection.flaws.get(c.index, {})) - {"no_signal"} for c in candidates}
    mildest = flaws[selection.chosen]
    group = [i for i, c in enumerate(candidates) if flaws[c.index] == mildest]
    rows[group] = features([candidates[i] for i in group], key)
    can[group] = [_is_measured(candidates[i]) for i in group]
    place = {index: position for position, index in enumerate(selection.order)}
    rank[: len(candidates)] = [place[c.index] for c in candidates]
    right[: len(candidates)] = [graded.right[c.index] for c in candidates]
    names = {name: i for i, name in enumerate(dict.fromkeys(key(candidates[i]) for i in group))}
    votes = np.zeros((total, len(names)))
    for i in group:
        if (name := key(candidates[i])) is not None:
            votes[i, names[name]] = 1.0
    n_flawed = sum(map(bool, flaws.values()))
    return _Step(rows=rows, can=can, right=right, votes=votes, rank=rank, n_flawed=n_flawed, tokens=spent(candidates))


def _is_measured(candidate: Candidate) -> bool:
    return candidate.signals is not None and candidate.signals.n_tokens > 0


def _replay(step: _Step, model: Learned, points: Sequence[int], rng: np.random.Generator) -> Replay:
    total = len(step.rank)
    scores = _subset_scores(step, model, np.ones((1, total), dtype=np.bool_))[0]
    chosen = _choices(step, scores[None], np.ones((1, total), dtype=np.bool_))[0]
    known = np.where(np.isfinite(scores), scores, np.nan)
    best = np.sort(scores[step.can])[::-1]
    margin = float(best[0] - best[1]) if len(best) > 1 else math.nan
    curve: list[float] = []
    for n in points:
        masks = subsets_of(total, n, _MOST_SUBSETS, rng)
        curve.append(float(step.right[_choices(step, _subset_scores(step, model, masks), masks)].mean()))
    return Replay(
        right=float(step.right[chosen]),
        curve=tuple(curve),
        tokens=step.tokens,
        scores=known,
        labels=step.right,
        auroc=auroc(known, step.right),
        margin=margin,
        n_flawed=step.n_flawed,
        is_fallback=float(not step.can.any()),
    )


def _subset_scores(step: _Step, model: Learned, masks: NDArray[np.bool_]) -> Floats:
    """Score of each candidate in each subset, ``(S, N)``; -inf for those that are not in it."""
    can = masks & step.can
    members = can.astype(np.float64)
    shares = (members @ step.votes) @ step.votes.T / np.maximum(members.sum(axis=1), 1)[:, None]
    rows = np.where(can[:, :, None], step.rows[None], np.nan)
    rows[:, :, _SHARE] = np.where(can, shares, np.nan)
    return np.where(can, model.scores(rows), -np.inf)


def _choices(step: _Step, scores: Floats, masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The candidate that each subset chooses, ``(S,)``: the best score, otherwise the first in order."""
    first = np.where(masks, step.rank, len(step.rank)).argmin(axis=1)
    best = cast("NDArray[np.int64]", scores.argmax(axis=1))
    return cast("NDArray[np.int64]", np.where(np.isfinite(scores).any(axis=1), best, first))
