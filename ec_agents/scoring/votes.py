"""Votes: candidates that would do the same stand together."""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import Candidate
from ec_agents.errors import ConfigError
from ec_agents.scoring.base import Best, Scorer, Scores
from ec_agents.scoring.noise import Chance, vote_chance

Key = Callable[[Candidate], str | None]
"""Candidate → what it votes for; None = it abstains."""

Mask = NDArray[np.bool_]
Weighting = Literal["linear", "inverse", "exponential"]
Outliers = Literal["std", "threshold", "none"]

OUTLIER_WEIGHT = -0.5


def action_key(candidate: Candidate, *, exclude: Collection[str] = (), names_only: bool = False) -> str:
    """The action in canonical form: the tool calls with sorted arguments, or the answer in lower case, single-spaced.

    Two candidates that would do the same thing have the same key.

    Args:
        candidate: Whose action.
        exclude: Arguments of tool calls that make no difference, such as a free-text reason.
        names_only: Whether calls of the same tools are the same, whatever the arguments.
    """
    if candidate.tool_calls:
        calls = [[call.get("name"), _without(call.get("args"), exclude)] for call in candidate.tool_calls]
        if names_only:
            calls = [call[:1] for call in calls]
        return "call:" + json.dumps(calls, sort_keys=True, ensure_ascii=False, default=str)
    return "text:" + " ".join(candidate.content.casefold().split())


class MajorityVote:
    """Self-consistency: how many candidates would do the same. High = better.

    Candidates with neither text nor tool calls, and those without a key, abstain; their score is NaN.

    Args:
        key: What a candidate votes for; by default the whole action. ``partial(action_key, names_only=True)`` votes on
            the tools alone; to vote on an answer inside a longer text, give a function that extracts it.
        tie_break: Ranks the candidates of one action, and equal actions; None takes the lower index.

    Source:
        Self-consistency, arXiv 2203.11171.
    """

    name = "majority"
    best: Best = "highest"

    def __init__(self, key: Key = action_key, *, tie_break: Scorer | None = None) -> None:
        self._key = key
        self.tie_break = tie_break

    @property
    def votes_on(self) -> Key:
        """The key that was given."""
        return self._key

    def on(self, key: Key) -> Self:
        """A copy of this vote with another key."""
        other = copy(self)
        other._key = key  # noqa: SLF001 - its own class
        return other

    def key(self, candidate: Candidate) -> str | None:
        """What a candidate votes for; None = it abstains."""
        return self._key(candidate) if candidate.content.strip() or candidate.tool_calls else None

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """Weight of all candidates that would do the same, ``(N,)``; NaN for those that abstain."""
        keys = [self.key(candidate) for candidate in candidates]
        weights = self.weights(candidates, np.array([key is not None for key in keys], dtype=np.bool_))
        totals: dict[str, float] = {}
        for key, weight in zip(keys, weights.tolist(), strict=True):
            if key is not None:
                totals[key] = totals.get(key, 0.0) + (0.0 if math.isnan(weight) else weight)
        return np.array([math.nan if key is None else totals[key] for key in keys])

    def weights(self, candidates: Sequence[Candidate], voting: Mask) -> Scores:  # noqa: ARG002 - for weighted votes
        """Weight of the vote of each candidate, ``(N,)``, given which of them vote; NaN counts as 0."""
        return np.ones(len(candidates))

    def chance(self, candidates: Sequence[Candidate], margin: float) -> Chance:
        """What a lead amounts to, had each voter taken any of the actions that were voted for, at least two, by chance.

        Agreement on one of more possible actions than were seen is rarer than this says.
        """
        keys = [self.key(candidate) for candidate in candidates]
        weights = np.nan_to_num(self.weights(candidates, np.array([key is not None for key in keys], dtype=np.bool_)))
        votes = {i: w for i, w in enumerate(weights.tolist()) if w and keys[i] is not None}
        return vote_chance(margin, list(votes.values()), max(2, len({keys[i] for i in votes})))


class CentroidVote(MajorityVote):
    """Majority among the candidates with the best scores; the best of the winning action acts.

    Args:
        scorer: Scores the candidates: for centroid voting, the centroid.
        percent: How many of them vote, rounded down, at least one.
        key: What a candidate votes for.

    Raises:
        ConfigError: ``percent`` is outside 0..100.

    Source:
        Centroid voting in the code of arXiv 2604.26173.
    """

    name = "centroid-vote"

    def __init__(self, scorer: Scorer, percent: float = 30.0, key: Key = action_key) -> None:
        if not 0 < percent <= 100:
            raise ConfigError(f"percent must be above 0 and at most 100; found {percent}")
        super().__init__(key, tie_break=scorer)
        self._scorer = scorer
        self._percent = percent

    def weights(self, candidates: Sequence[Candidate], voting: Mask) -> Scores:
        """1 for the best ``percent``, otherwise 0; everyone votes if no one has a score, ``(N,)``."""
        costs = np.where(voting, costs_of(self._scorer, candidates), np.inf)
        n_scored = int(np.isfinite(costs).sum())
        if not n_scored:
            return np.ones(len(candidates))
        kept = max(1, int(n_scored * self._percent / 100))
        weights = np.zeros(len(candidates))
        weights[np.argsort(costs, kind="stable")[:kept]] = 1.0
        return weights


class CentroidWeightedVote(MajorityVote):
    """Majority with votes weighted by centroid, low = heavy; the best of the winning action acts.

    Args:
        scorer: Scores the candidates, lowest = best: the centroid.
        weighting: ``linear``: from 1 for the lowest to 0 for the highest; ``inverse``: 1 / (c + 0.01);
            ``exponential``: exp(-c). Positive weights are made to sum to 1.
        outliers: Which scores count as outliers, whose votes weigh -0.5: ``std``: over one standard deviation from the
            mean; ``threshold``: over 0.1 from the mean; ``none``.
        key: What a candidate votes for.

    Raises:
        ConfigError: ``weighting`` or ``outliers`` is unknown.

    Source:
        Centroid-weighted voting in the code of arXiv 2604.26173, with its defaults.
    """

    name = "centroid-weighted-vote"

    def __init__(
        self,
        scorer: Scorer,
        weighting: Weighting = "linear",
        outliers: Outliers = "std",
        key: Key = action_key,
    ) -> None:
        for name, given, known in (("weighting", weighting, Weighting), ("outliers", outliers, Outliers)):
            if given not in get_args(known):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(known))}; found {given!r}")
        super().__init__(key, tie_break=scorer)
        self._scorer = scorer
        self._weighting: Weighting = weighting
        self._outliers: Outliers = outliers

    def weights(self, candidates: Sequence[Candidate], voting: Mask) -> Scores:
        """Weight of each vote, ``(N,)``; NaN where there is no score; 1 if no one has one."""
        scores = np.asarray(self._scorer(candidates), dtype=np.float64)
        scored = np.flatnonzero(np.isfinite(scores) & voting)
        if not len(scored):
            return np.ones(len(candidates))
        weights = np.full(len(candidates), np.nan)
        weights[scored] = self._weigh(scores[scored])
        return weights

    def _weigh(self, centroids: Scores) -> Scores:
        middle = float(centroids.mean())
        limit = {"std": float(centroids.std()) or math.inf, "threshold": 0.1, "none": math.inf}[self._outliers]
        outlier = (centroids < middle - limit) | (centroids > middle + limit)
        if outlier.all():
            return np.full(len(centroids), 1 / len(centroids))
        weights = np.where(outlier, OUTLIER_WEIGHT, self._raw(centroids, centroids[~outlier]))
        positive = weights > 0
        return np.where(positive, weights / (weights[positive].sum() or 1.0), weights)

    def _raw(self, centroids: Scores, kept: Scores) -> Scores:
        match self._weighting:
            case "linear":
                return 1 - (centroids - kept.min()) / (float(kept.max() - kept.min()) or 1.0)
            case "inverse":
                return 1 / (centroids + 0.01)
            case "exponential":
                return np.exp(-centroids)


class BordaVote(MajorityVote):
    """Votes weighted by rank: the r-th best of N has (N - r + 1)^power. High = better.

    Args:
        scorer: Ranks the candidates; ties go to the earlier one. In the paper Self-Certainty.
        power: 0 is majority voting; a large one lets the best score decide.
        key: What a candidate votes for.

    Source:
        Borda voting of Self-Certainty, arXiv 2502.18581.
    """

    name = "borda"

    def __init__(self, scorer: Scorer, power: float = 0.5, key: Key = action_key) -> None:
        super().__init__(key)
        self._scorer = scorer
        self._power = power

    def weights(self, candidates: Sequence[Candidate], voting: Mask) -> Scores:  # noqa: ARG002 - all have a rank
        """Weight of each vote, ``(N,)``; NaN where there is no score. Who abstains has a rank all the same."""
        costs = costs_of(self._scorer, candidates)
        weights = np.empty(len(candidates))
        weights[np.argsort(costs, kind="stable")] = np.arange(len(candidates), 0.0, -1.0) ** self._power
        return np.where(np.isfinite(costs), weights, np.nan) if np.isfinite(costs).any() else np.ones(len(candidates))


class DeepConfVote(MajorityVote):
    """Majority among the most confident candidates, each vote weighted by its confidence. High = better.

    Args:
        scorer: The confidence, highest = best.
        keep_percent: Candidates below the percentile 100 - ``keep_percent`` have no vote. DeepConf uses 10 and 90.
        key: What a candidate votes for.

    Raises:
        ConfigError: ``keep_percent`` is outside 0..100.

    Source:
        Confidence filtering and weighted majority voting of DeepConf, arXiv 2508.15260.
    """

    name = "deepconf-vote"

    def __init__(self, scorer: Scorer, keep_percent: float = 90.0, key: Key = action_key) -> None:
        if not 0 < keep_percent <= 100:
            raise ConfigError(f"keep_percent must be above 0 and at most 100; found {keep_percent}")
        super().__init__(key, tie_break=scorer)
        self._scorer = scorer
        self._keep_percent = keep_percent

    def weights(self, candidates: Sequence[Candidate], voting: Mask) -> Scores:
        """The confidence of those that pass the filter, otherwise 0, ``(N,)``; 1 if no one has one."""
        confidences = np.where(voting, np.asarray(self._scorer(candidates), dtype=np.float64), np.nan)
        if not np.isfinite(confidences).any():
            return np.ones(len(candidates))
        threshold = np.nanpercentile(confidences, 100 - self._keep_percent)
        return np.where(confidences >= threshold, confidences, 0.0)


def _without(args: Mapping[str, Any] | None, exclude: Collection[str]) -> Mapping[str, Any] | None:
    return {name: value for name, value in (args or {}).items() if name not in exclude} if exclude else args


def costs_of(scorer: Scorer, candidates: Sequence[Candidate]) -> Scores:
    """The scores turned so that low is better, ``(N,)``; inf where there is none."""
    scores = np.asarray(scorer(candidates), dtype=np.float64)
    return np.where(np.isfinite(scores), scores if scorer.best == "lowest" else -scores, np.inf)
