"""Stage 4 - choose: guards → ranking → the chosen candidate, with the evidence."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeGuard, cast

import numpy as np

from ec_agents.candidates import FINISHED, REFUSED, TRUNCATED, Candidate, Reason, Selection
from ec_agents.errors import ConfigError, SelectionError
from ec_agents.scoring import (
    SCORERS,
    CentroidScorer,
    CountsVotes,
    FindsPhases,
    FirstScorer,
    KnowsChance,
    KnowsNoise,
    Scorer,
    action_key,
    normal_chance,
    scorer_named,
)

__all__ = [
    "DEFAULT_GUARDS",
    "SEVERITY",
    "Guard",
    "Selector",
    "action_key",
    "as_selector",
    "degenerate_loop",
    "empty",
    "interrupted",
    "refused",
    "select",
    "truncated",
]

Guard = Callable[[Candidate], str | None]
"""Says what is wrong with a candidate, or None."""

Groups = tuple[list[Candidate], list[Candidate]]
"""The sound candidates, and the flawed ones."""

SEVERITY = ("truncated", "interrupted", "degenerate_loop", "no_signal", "invalid_action", "refused", "empty")
"""Flaws from the mildest to the worst; flaws of custom guards rank as ``invalid_action``."""

_QUIET = np.errstate(invalid="ignore", over="ignore", divide="ignore")
"""Infinite signals of a damaged file give scores that are not finite, and these count as missing."""

_LOOP_CHARACTERS = 240
_LOOP_REPEATS = 4

_log = logging.getLogger(__name__)


def truncated(candidate: Candidate) -> str | None:
    """Flaw: the token limit cut the response off."""
    reason = _finish(candidate)
    return f"finish_reason {reason!r}: raise max_tokens" if reason in TRUNCATED else None


def interrupted(candidate: Candidate) -> str | None:
    """Flaw: the response stopped for a reason that is not known to be sound, such as an error of the server."""
    reason = _finish(candidate)
    if reason is None or reason in FINISHED or reason in TRUNCATED or reason in REFUSED:
        return None
    return f"finish_reason {reason!r}: the response is not known to be complete"


def refused(candidate: Candidate) -> str | None:
    """Flaw: the provider or the model declined."""
    reason = _finish(candidate)
    return f"finish_reason {reason!r}" if reason in REFUSED else None


def _finish(candidate: Candidate) -> str | None:
    """The finish reason in one spelling; None if the provider gives none."""
    return candidate.finish_reason.strip().lower().replace("-", "_") if candidate.finish_reason else None


def empty(candidate: Candidate) -> str | None:
    """Flaw: neither text nor a tool call."""
    return None if candidate.content.strip() or candidate.tool_calls else "neither text nor a tool call"


def degenerate_loop(candidate: Candidate) -> str | None:
    """Flaw: the text ends in one piece repeated over and over; such a text has a very low centroid and would win."""
    text = candidate.content
    for period in range(1, len(text) // _LOOP_REPEATS + 1):
        span = max(_LOOP_REPEATS * period, _LOOP_CHARACTERS)
        if span > min(len(text), _LOOP_REPEATS * _LOOP_CHARACTERS):
            return None
        tail = text[-span:]
        if tail[period:] == tail[:-period]:
            return f"the last {span} characters repeat {tail[-period:]!r}"
    return None


DEFAULT_GUARDS: Mapping[str, Guard] = {
    "truncated": truncated,
    "interrupted": interrupted,
    "degenerate_loop": degenerate_loop,
    "refused": refused,
    "empty": empty,
}
"""The guards that every selection applies, by the name of the flaw that they find."""


class _Ranking(NamedTuple):
    """What a selector finds before it looks for evidence."""

    ordered: list[Candidate]
    """By index."""
    ranked: list[Candidate]
    """From best to worst."""
    flaws: dict[int, dict[str, str]]
    scores: dict[int, float | None]
    fallback: Scorer | None
    """What ranked instead, if there was nothing to rank by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """How one of the candidates is chosen.

    Raises:
        ConfigError: A field is of the wrong type or out of range.
    """

    scorer: Scorer = field(default_factory=CentroidScorer)
    """Ranks the candidates."""
    tie_break: Scorer | None = None
    """Decides between equal scores; None leaves it to the vote, if the scorer is one, and then to the lower index."""
    guards: Mapping[str, Guard] = field(default_factory=lambda: DEFAULT_GUARDS)
    """Find flaws before anything is ranked; keyed by the name of the flaw."""
    min_tokens: int = 0
    """The fallback decides when no sound candidate has this many tokens: on short texts a centroid is mostly noise."""
    fallback: Scorer | Literal["raise"] = field(default_factory=FirstScorer)
    """Decides when no candidate can be scored; ``"raise"`` raises ``SelectionError``."""

    def __post_init__(self) -> None:
        """Check the fields."""
        if not _is_scorer(self.scorer):
            raise ConfigError(f"scorer must be a Scorer, such as CentroidScorer(); found {_found(self.scorer)}")
        if self.tie_break is not None and not _is_scorer(self.tie_break):
            raise ConfigError(f"tie_break must be a Scorer or None; found {_found(self.tie_break)}")
        if self.fallback != "raise" and not _is_scorer(self.fallback):
            raise ConfigError(f"fallback must be a Scorer or 'raise'; found {_found(self.fallback)}")
        if type(self.min_tokens) is not int or self.min_tokens < 0:
            raise ConfigError(f"min_tokens must be an integer of 0 or more; found {self.min_tokens!r}")
        if not _is_guards(self.guards):
            raise ConfigError(f"guards must be a mapping of flaw names to functions; found {_found(self.guards)}")

    @_QUIET
    def __call__(self, candidates: Sequence[Candidate]) -> Selection:
        """Choose one of the candidates.

        A candidate that cannot be scored never beats a sound one that can. Flawed candidates rank after sound ones, the
        mildest flaw first, and neither vote for nor otherwise touch the scores of the sound ones; ties go to the lower
        index.

        Raises:
            ConfigError: There is no candidate, or two have the same index.
            SelectionError: No candidate could be scored, and the fallback is ``"raise"``.
        """
        ordered, ranked, flaws, scores, fallback = self._ranking(candidates)
        peers = [c for c in ranked if _severity(flaws[c.index]) == _severity(flaws[ranked[0].index])]
        margin = _margin(self.scorer, peers, scores) if fallback is None else None
        margin_sd, p_noise = (None, None) if margin is None else _noise(self.scorer, peers, margin)
        winner = action_key(ranked[0])
        return Selection(
            chosen=ranked[0].index,
            order=[candidate.index for candidate in ranked],
            scores=scores,
            margin=margin,
            reason=_reason(flaws[ranked[0].index], len(ranked), len(peers), margin, is_fallback=fallback is not None),
            selector=self.scorer.name,
            flaws={i: found for i, found in flaws.items() if found},
            n_tokens={c.index: c.signals.n_tokens for c in ordered if c.signals is not None},
            n_phases=_phase_counts(self.scorer, ordered),
            margin_sd=margin_sd,
            p_noise=p_noise,
            n_agree=sum(action_key(candidate) == winner for candidate in ordered),
        )

    @_QUIET
    def choose(self, candidates: Sequence[Candidate]) -> int:
        """Index of the candidate that a call chooses, without the evidence; raises what a call raises."""
        return self._ranking(candidates).ranked[0].index

    def _ranking(self, candidates: Sequence[Candidate]) -> _Ranking:
        ordered = sorted(candidates, key=lambda candidate: candidate.index)
        found = [candidate.index for candidate in ordered]
        if not found or len(set(found)) != len(found) or found[0] < 0:
            raise ConfigError(f"one or more candidates with different indexes from 0 are needed; found indexes {found}")
        flaws = {candidate.index: self._flaws(candidate) for candidate in ordered}
        groups = ([c for c in ordered if not flaws[c.index]], [c for c in ordered if flaws[c.index]])
        scores = self._score(self.scorer, groups)
        for candidate in ordered:
            if scores[candidate.index] is None:
                unscored = candidate.flaws.get("no_signal", f"the {self.scorer.name} scorer cannot score it")
                flaws[candidate.index].setdefault("no_signal", unscored)
        fallback = self._fallback(ordered, flaws, scores)
        return _Ranking(ordered, self._ranked(groups, flaws, scores, fallback), flaws, scores, fallback)

    def _ranked(
        self,
        groups: Groups,
        flaws: Mapping[int, Mapping[str, str]],
        scores: Mapping[int, float | None],
        fallback: Scorer | None,
    ) -> list[Candidate]:
        """The candidates from best to worst."""
        keys = scores if fallback is None else self._score(fallback, groups)
        best = (fallback or self.scorer).best
        tie_break = self.tie_break or (self.scorer.tie_break if isinstance(self.scorer, CountsVotes) else None)
        ties = {} if tie_break is None else self._score(tie_break, groups)
        tie_best = "lowest" if tie_break is None else tie_break.best

        def place(candidate: Candidate) -> tuple[int, float, float, int]:
            i = candidate.index
            return _severity(flaws[i]), _rank(keys[i], best), _rank(ties.get(i), tie_best), i

        return sorted((candidate for group in groups for candidate in group), key=place)

    def _score(self, scorer: Scorer, groups: Groups) -> dict[int, float | None]:
        """Scores by candidate index, in index order; each group is scored by itself."""
        scores = {index: score for group in groups if group for index, score in _scores(scorer, group).items()}
        return dict(sorted(scores.items()))

    def _flaws(self, candidate: Candidate) -> dict[str, str]:
        found = dict(candidate.flaws)
        if candidate.signals is None:
            found.pop("no_signal", None)  # comes back if the scorer needs signals
        for name, guard in self.guards.items():
            text = guard(candidate)
            if text is not None:
                found.setdefault(name, text)
        return found

    def _fallback(
        self,
        candidates: Sequence[Candidate],
        flaws: Mapping[int, Mapping[str, str]],
        scores: Mapping[int, float | None],
    ) -> Scorer | None:
        """The scorer to use instead, if the usual one has nothing to go by."""
        if all(score is None for score in scores.values()):
            why = f"none of {len(candidates)} candidates could be scored; {_first_reason(flaws)}"
        else:
            sound = [c for c in candidates if not flaws[c.index]] or candidates
            longest = max(c.signals.n_tokens if c.signals is not None else 0 for c in sound)
            if longest >= self.min_tokens:
                return None
            why = f"the longest sound candidate has {longest} tokens, {self.min_tokens} needed (min_tokens)"
        if self.fallback == "raise":
            raise SelectionError(f"{why}. Ask for logprobs, or let fallback=FirstScorer() decide")
        _log.warning("%s; the %s scorer decides", why, self.fallback.name)
        return self.fallback


def as_selector(selector: Selector | Scorer | str | None = None) -> Selector:
    """Return the selector that an argument called ``selector`` stands for.

    Args:
        selector: A ``Selector``; a scorer or a vote, which then ranks; the name of one in ``SCORERS``, or the path of
            a ``selector.json``; None for the entropy centroid.

    Raises:
        ConfigError: It is anything else.

    Example:
        >>> as_selector("majority").scorer.name
        'majority'
    """
    if isinstance(selector, Selector):
        return selector
    if selector is None:
        return Selector()
    if isinstance(selector, str):
        return Selector(scorer=scorer_named(selector))
    if _is_scorer(selector):
        return Selector(scorer=selector)
    raise ConfigError(
        "selector must be a Selector, a scorer or vote such as CentroidScorer(), the name of one, or None; "
        f"found {_found(selector)}. Known names: {', '.join(SCORERS)}"
    )


def select(candidates: Sequence[Candidate], selector: Selector | Scorer | str | None = None) -> Selection:
    """Choose one of the candidates of a step.

    Args:
        candidates: The candidates, each with an index of its own.
        selector: A ``Selector``, a scorer or vote, or the name of one; None takes the lowest entropy centroid.

    Raises:
        ConfigError: There is no candidate, two have the same index, or ``selector`` is none of these.
        SelectionError: No candidate could be scored, and the selector's fallback is ``"raise"``.

    Example:
        >>> from ec_agents import Candidate, select
        >>> select([Candidate(index=0, content="42")]).reason
        'only_one'
    """
    return as_selector(selector)(candidates)


def _is_scorer(value: object) -> TypeGuard[Scorer]:
    """Whether a value is an instance of a scorer; a class is not, though it has the attributes of one."""
    best: object = getattr(value, "best", None)
    is_named = isinstance(getattr(value, "name", None), str)
    return callable(value) and not isinstance(value, type) and is_named and best in ("lowest", "highest")


def _is_guards(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and callable(guard) for name, guard in cast("Mapping[object, object]", value).items()
    )


def _found(value: object) -> str:
    """What was found in place of a scorer or selector."""
    if isinstance(value, type):
        return f"the class {value.__name__}; pass an instance, {value.__name__}(...)"
    return f"{type(value).__name__} {value!r:.80}"


def _scores(scorer: Scorer, candidates: Sequence[Candidate]) -> dict[int, float | None]:
    """Scores by candidate index; what is not finite is None, so that it can never be the best."""
    values = np.asarray(scorer(candidates), dtype=np.float64)
    if values.shape != (len(candidates),):
        raise ConfigError(f"scorer {scorer.name!r} must return {len(candidates)} scores; found shape {values.shape}")
    return {c.index: float(v) if np.isfinite(v) else None for c, v in zip(candidates, values, strict=True)}


def _severity(flaws: Mapping[str, str]) -> int:
    own = SEVERITY.index("invalid_action")
    return max((1 + (SEVERITY.index(name) if name in SEVERITY else own) for name in flaws), default=0)


def _rank(score: float | None, best: Literal["lowest", "highest"]) -> float:
    """Sort key of a score: lower is better, None last."""
    if score is None:
        return float("inf")
    return score if best == "lowest" else -score


def _margin(scorer: Scorer, peers: Sequence[Candidate], scores: Mapping[int, float | None]) -> float | None:
    """Distance from the best score to the second; of a vote, to the best one for another action, 0 if there is none."""
    best, others = scores[peers[0].index], [scores[candidate.index] for candidate in peers[1:]]
    if isinstance(scorer, CountsVotes) and others:
        own = scorer.key(peers[0])
        others = [*(scores[c.index] for c in peers[1:] if scorer.key(c) != own), 0.0]
    return None if best is None or not others or others[0] is None else abs(best - others[0])


def _noise(scorer: Scorer, peers: Sequence[Candidate], margin: float) -> tuple[float | None, float | None]:
    """The margin in standard deviations of scores without any signal, and how often these have such a margin."""
    if isinstance(scorer, KnowsChance):
        found = scorer.chance(peers, margin)
    elif isinstance(scorer, KnowsNoise):
        found = normal_chance(margin, scorer.noise(peers))
    else:
        return None, None
    return found if all(map(math.isfinite, found)) else (None, None)


def _reason(flaws: Mapping[str, str], n: int, n_peers: int, margin: float | None, *, is_fallback: bool) -> Reason:
    if set(flaws) - {"no_signal"} or (flaws and not is_fallback):
        return "all_flawed"
    if n == 1:
        return "only_one"
    if is_fallback:
        return "fallback"
    if n_peers == 1:
        return "only_sound"
    return "tie_break" if margin == 0 else "ranked"


def _first_reason(flaws: Mapping[int, Mapping[str, str]]) -> str:
    index = min(flaws)
    return f"candidate {index}: {flaws[index]['no_signal']}"


def _phase_counts(scorer: Scorer, candidates: Sequence[Candidate]) -> dict[int, int]:
    if not isinstance(scorer, FindsPhases):
        return {}
    return {c.index: len(scorer.phases(c)) for c in candidates if c.signals is not None}
