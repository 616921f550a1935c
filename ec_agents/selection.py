"""Stage 4 - choose: guards → ranking → the chosen candidate, with the evidence."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ec_agents.candidates import Candidate, Reason, Selection
from ec_agents.errors import ConfigError, SelectionError
from ec_agents.scoring import CentroidScorer, FindsPhases, FirstScorer, Scorer

Guard = Callable[[Candidate], str | None]
"""Says what is wrong with a candidate, or None."""

SEVERITY = ("truncated", "degenerate_loop", "no_signal", "invalid_action", "refused", "empty")
"""Flaws from the mildest to the worst; a flaw of a guard of one's own ranks as ``invalid_action``."""

_TRUNCATED = frozenset({"length", "max_tokens", "model_length", "incomplete"})
_REFUSED = frozenset({"content_filter", "refusal", "safety", "blocklist", "prohibited_content"})
_LOOP_CHARACTERS = 240
_LOOP_REPEATS = 4

_log = logging.getLogger(__name__)


def truncated(candidate: Candidate) -> str | None:
    """Flaw: the token limit cut the response off."""
    reason = (candidate.finish_reason or "").lower()
    return f"finish_reason {reason!r}: raise max_tokens" if reason in _TRUNCATED else None


def refused(candidate: Candidate) -> str | None:
    """Flaw: the provider or the model declined."""
    reason = (candidate.finish_reason or "").lower()
    return f"finish_reason {reason!r}" if reason in _REFUSED else None


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
    "degenerate_loop": degenerate_loop,
    "refused": refused,
    "empty": empty,
}
"""The guards that every selection applies, by the name of the flaw that they find."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """How one of the candidates is chosen.

    Raises:
        ConfigError: ``min_tokens`` is negative, or ``fallback`` is neither a scorer nor ``"raise"``.
    """

    scorer: Scorer = field(default_factory=CentroidScorer)
    """Ranks the candidates."""
    tie_break: Scorer | None = None
    """Decides between equal best scores; None takes the lower index."""
    guards: Mapping[str, Guard] = field(default_factory=lambda: DEFAULT_GUARDS)
    """Find flaws before anything is ranked; keyed by the name of the flaw."""
    min_tokens: int = 0
    """The fallback decides when no sound candidate has this many tokens: short texts have noisy centroids."""
    fallback: Scorer | Literal["raise"] = field(default_factory=FirstScorer)
    """Decides when no candidate can be scored; ``"raise"`` raises ``SelectionError``."""

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.min_tokens < 0:
            raise ConfigError(f"min_tokens must be 0 or more; found {self.min_tokens}")
        if not (self.fallback == "raise" or callable(self.fallback)):
            raise ConfigError(f"fallback must be a scorer or 'raise'; found {self.fallback!r}")

    def __call__(self, candidates: Sequence[Candidate]) -> Selection:
        """Choose one of the candidates.

        A candidate that cannot be scored never beats a sound one that can. Flawed candidates rank after sound ones, the
        mildest flaw first; ties go to the lower index.

        Raises:
            ConfigError: There is no candidate, or two have the same index.
            SelectionError: No candidate could be scored, and the fallback is ``"raise"``.
        """
        ordered = sorted(candidates, key=lambda candidate: candidate.index)
        if not ordered or len({candidate.index for candidate in ordered}) != len(ordered):
            found = [candidate.index for candidate in ordered]
            raise ConfigError(f"one or more candidates with different indexes are needed; found indexes {found}")
        scores = _scores(self.scorer, ordered)
        flaws = {candidate.index: self._flaws(candidate, scores[candidate.index]) for candidate in ordered}
        fallback = self._fallback(ordered, flaws, scores)
        keys = scores if fallback is None else _scores(fallback, ordered)
        ties = _scores(self.tie_break, ordered) if self.tie_break is not None else {}
        best = (fallback or self.scorer).best
        order = sorted(
            scores,
            key=lambda i: (_severity(flaws[i]), _rank(keys[i], best), _rank(ties.get(i), self._tie_best), i),
        )
        peers = [scores[i] for i in order if _severity(flaws[i]) == _severity(flaws[order[0]])]
        margin = _margin(peers) if fallback is None else None
        return Selection(
            chosen=order[0],
            order=order,
            scores=scores,
            margin=margin,
            reason=_reason(flaws[order[0]], len(order), len(peers), margin, is_fallback=fallback is not None),
            selector=self.scorer.name,
            flaws={i: found for i, found in flaws.items() if found},
            n_tokens={c.index: c.signals.n_tokens for c in ordered if c.signals is not None},
            n_phases=_phase_counts(self.scorer, ordered),
        )

    @property
    def _tie_best(self) -> Literal["lowest", "highest"]:
        return "lowest" if self.tie_break is None else self.tie_break.best

    def _flaws(self, candidate: Candidate, score: float | None) -> dict[str, str]:
        found = dict(candidate.flaws)
        for name, guard in self.guards.items():
            text = guard(candidate)
            if text is not None:
                found.setdefault(name, text)
        if score is None:
            found.setdefault("no_signal", f"the {self.scorer.name} scorer cannot score it")
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
            longest = max(c.signals.n_tokens if c.signals is not None else 0 for c in candidates)
            if longest >= self.min_tokens:
                return None
            why = f"the longest candidate has {longest} tokens, {self.min_tokens} needed (min_tokens)"
        if self.fallback == "raise":
            raise SelectionError(f"{why}. Ask for logprobs, or let fallback=FirstScorer() decide")
        _log.warning("%s; the %s scorer decides", why, self.fallback.name)
        return self.fallback


def select(candidates: Sequence[Candidate], selector: Selector | None = None) -> Selection:
    """Choose one of the candidates of a step; by default the one with the lowest entropy centroid.

    Raises:
        ConfigError: There is no candidate, or two have the same index.
        SelectionError: No candidate could be scored, and the selector's fallback is ``"raise"``.

    Example:
        >>> from ec_agents import Candidate, select
        >>> select([Candidate(index=0, content="42")]).reason
        'only_one'
    """
    return (selector or Selector())(candidates)


def action_key(candidate: Candidate) -> str:
    """The action in canonical form: the tool calls with sorted arguments, or the answer in lower case, single-spaced.

    Two candidates that would do the same thing have the same key.
    """
    if candidate.tool_calls:
        calls = [[call.get("name"), call.get("args")] for call in candidate.tool_calls]
        return "call:" + json.dumps(calls, sort_keys=True, ensure_ascii=False, default=str)
    return "text:" + " ".join(candidate.content.casefold().split())


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


def _margin(peers: Sequence[float | None]) -> float | None:
    first, second = (*peers, None, None)[:2]
    return None if first is None or second is None else abs(first - second)


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
