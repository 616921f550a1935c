"""How many candidates a step deserves: functions that decide, while a step is sampled, whether to draw more.

An effort is called with the candidates so far and the most that may still come, calls in flight included. It returns
how many more to draw now; 0 means enough, and calls in flight are cancelled. One that depends on the step, such as
``ByRisk``, has a method ``for_step``.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

from ec_agents.candidates import REFUSED, TRUNCATED, Candidate
from ec_agents.errors import ConfigError
from ec_agents.scoring import Scorer, action_key, scorer_named

Effort = Callable[[Sequence[Candidate], int], int]
"""Candidates so far, most that may still come → how many more to draw now; 0 = enough."""

Key = Callable[[Candidate], str | None]
"""Candidate → what it votes for; None = it abstains."""

Risk = Callable[[Mapping[str, Any], Any], bool]
"""Tool call and its tool (None if unknown) → whether it may have side effects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """What an effort may know of a step."""

    messages: Sequence[Any] = ()
    """The conversation that is sent."""
    tools: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The bound tools by name."""
    number: int = 0
    """Position of the step in its run, from 0."""


@runtime_checkable
class ForStep(Protocol):
    """An effort that depends on the step."""

    def for_step(self, view: StepView) -> Effort:
        """Return the effort of this step."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Agree:
    """Draw until the actions agree beyond doubt.

    The posterior probability that the leading action is more likely than the runner-up, from a uniform prior, must
    reach ``confidence``. Each wave draws the fewest candidates that could settle it. Helps where many candidates do the
    same, as in tool calls and short answers; on free text no two candidates agree, and all are drawn: give a ``key``
    that extracts the answer.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> from ec_agents import Agree, Candidate
        >>> Agree()([Candidate(index=0, content="4"), Candidate(index=1, content="4")], 6)
        2

    Source:
        The Beta criterion of Adaptive-Consistency, arXiv 2305.11860.
    """

    first: int = 2
    """Candidates in the first wave."""
    confidence: float = 0.95
    """Posterior probability, above 0.5 and below 1; at 0.95 four candidates that agree are enough, at 0.85 two."""
    key: Key = action_key
    """What a candidate votes for."""

    def __post_init__(self) -> None:
        """Check the values."""
        _check_count("first", self.first)
        if not 0.5 < self.confidence < 1:
            raise ConfigError(f"confidence must be above 0.5 and below 1; found {self.confidence!r}")

    def __call__(self, candidates: Sequence[Candidate], most: int) -> int:
        """Return how many more to draw now."""
        leader, second = self._votes(candidates)
        if leader > second + most or lead_probability(leader, second) >= self.confidence:
            return 0
        if len(candidates) < self.first:
            return min(self.first - len(candidates), most)
        settles = (more for more in range(1, most) if lead_probability(leader + more, second) >= self.confidence)
        return next(settles, most)

    def why(self, candidates: Sequence[Candidate]) -> str:
        """Describe the state of the vote."""
        leader, second = self._votes(candidates)
        probability = lead_probability(leader, second)
        return f"{leader} candidates agree, {second} do something else alike: probability {probability:.3f}"

    def _votes(self, candidates: Sequence[Candidate]) -> tuple[int, int]:
        """Return how many sound candidates want the leading action, and how many the next one."""
        votes = Counter(key for c in candidates if is_sound(c) and (key := self.key(c)) is not None)
        leader, second = [*(count for _, count in votes.most_common(2)), 0, 0][:2]
        return leader, second


@dataclass(frozen=True, slots=True, kw_only=True)
class Escalate:
    """Draw one candidate, and the rest only if it is uncertain.

    Helps where easy steps look certain; hurts where the model is confidently wrong. A candidate that is flawed or
    cannot be scored counts as uncertain.

    Raises:
        ConfigError: The scorer is unknown or is a vote, or the threshold is not a number.
    """

    scorer: Scorer | str = "mean-entropy"
    """Scores the first candidate by itself."""
    threshold: float
    """The score from which on a candidate is certain enough, in the scorer's unit; choose it on other tasks."""
    then: Effort | None = None
    """How many to draw after the first; None draws the rest."""

    def __post_init__(self) -> None:
        """Check the values."""
        if isinstance(self.scorer, str):
            object.__setattr__(self, "scorer", scorer_named(self.scorer))
        if not isinstance(cast("object", self.threshold), int | float) or math.isnan(self.threshold):
            raise ConfigError(f"threshold must be a number; found {self.threshold!r}")

    def __call__(self, candidates: Sequence[Candidate], most: int) -> int:
        """Return how many more to draw now."""
        if not candidates:
            return min(1, most)
        if self._is_certain(candidates[0]):
            return 0
        return _rest(self.then, candidates, most)

    def why(self, candidates: Sequence[Candidate]) -> str:
        """Describe the first candidate's score."""
        if candidates and self._is_certain(candidates[0]):
            return f"the first candidate is certain: {cast('Scorer', self.scorer).name} within {self.threshold:g}"
        return "the first candidate is uncertain"

    def _is_certain(self, candidate: Candidate) -> bool:
        scorer = cast("Scorer", self.scorer)
        score = float(scorer([candidate])[0])
        within = score <= self.threshold if scorer.best == "lowest" else score >= self.threshold
        return is_sound(candidate) and within


@dataclass(frozen=True, slots=True, kw_only=True)
class Prime:
    """Draw the first candidate alone, so that the provider caches the prompt before the other calls read it.

    Saves money where cached input is cheap and prompts are long, and costs the latency of one call more per step.
    """

    then: Effort | None = None
    """How many to draw after the first; None draws the rest."""

    def __call__(self, candidates: Sequence[Candidate], most: int) -> int:
        """Return how many more to draw now."""
        return _rest(self.then, candidates, most) if candidates else min(1, most)

    def for_step(self, view: StepView) -> Effort:
        """Return the effort of this step."""
        return Prime(then=None if self.then is None else effort_for(self.then, view))

    def why(self, candidates: Sequence[Candidate]) -> str:
        """Describe what decided after the first candidate."""
        return "all were drawn" if self.then is None else why(self.then, candidates)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByRisk:
    """Draw few candidates for read-only actions and many for actions with side effects.

    A step with a candidate that wants a risky action gets the risky number, whichever candidate came first. Tools are
    read-only if their LangChain ``metadata`` says ``readOnlyHint`` (as MCP adapters set it) or ``read_only``; tools
    that say nothing are risky, and final answers are not.

    Raises:
        ConfigError: A value is out of range.
    """

    safe: int = 1
    """Candidates of a step without risky actions."""
    risky: int | Effort = 8
    """Candidates of a step with a risky action, or the effort that decides."""
    is_risky: Risk | None = None
    """Tool call and tool → whether it is risky; None reads the tool's metadata."""
    view: StepView = field(default_factory=StepView)
    """The step; front ends set it."""

    def __post_init__(self) -> None:
        """Check the values."""
        _check_count("safe", self.safe)
        if not callable(self.risky):
            _check_count("risky", self.risky)

    def __call__(self, candidates: Sequence[Candidate], most: int) -> int:
        """Return how many more to draw now."""
        if not self._wants_risk(candidates):
            return max(min(self.safe - len(candidates), most), 0)
        if callable(self.risky):
            return self.risky(candidates, most)
        return max(min(self.risky - len(candidates), most), 0)

    def for_step(self, view: StepView) -> Effort:
        """Return the effort of this step."""
        risky = effort_for(self.risky, view) if callable(self.risky) else self.risky
        return ByRisk(safe=self.safe, risky=risky, is_risky=self.is_risky, view=view)

    def least(self, candidates: Sequence[Candidate]) -> int:
        """Return the fewest candidates on which the step may act: a risky action needs all of the risky number."""
        return self.risky if not callable(self.risky) and self._wants_risk(candidates) else 1

    def why(self, candidates: Sequence[Candidate]) -> str:
        """Describe the risk."""
        if not self._wants_risk(candidates):
            return "no candidate wants an action with side effects"
        return why(self.risky, candidates) if callable(self.risky) else "a candidate wants an action with side effects"

    def _wants_risk(self, candidates: Sequence[Candidate]) -> bool:
        risk = self.is_risky or has_side_effects
        return any(risk(call, self.view.tools.get(call["name"])) for c in candidates for call in c.tool_calls)


def has_side_effects(call: Mapping[str, Any], tool: Any) -> bool:  # noqa: ARG001 - the signature of Risk
    """Tell whether a tool call may have side effects, by the metadata of the tool."""
    metadata: Mapping[str, Any] = getattr(tool, "metadata", None) or {}
    return not (metadata.get("readOnlyHint") or metadata.get("read_only"))


def effort_for(effort: Effort, view: StepView) -> Effort:
    """Return the effort of one step."""
    return effort.for_step(view) if isinstance(effort, ForStep) else effort


def replay_effort(effort: Effort, candidates: Sequence[Candidate]) -> list[int]:
    """Return how many of recorded candidates an effort would have drawn in each wave.

    Waves are taken whole: live, a vote that is settled within a wave cancels the calls in flight.
    """
    waves: list[int] = []
    while more := min(effort(candidates[: sum(waves)], len(candidates) - sum(waves)), len(candidates) - sum(waves)):
        waves.append(more)
    return waves


def why(effort: Effort, candidates: Sequence[Candidate]) -> str:
    """Describe in a few words why an effort drew as many candidates as it did."""
    explain = getattr(effort, "why", None)
    name = getattr(effort, "__name__", type(effort).__name__)
    return f"{name}: {explain(candidates)}" if callable(explain) else name


def lead_probability(leader: int, second: int) -> float:
    """Return the probability that the leader is more likely than the second, given their votes and a uniform prior.

    That is the mass of Beta(leader + 1, second + 1) above one half, as a tail of the binomial distribution.
    """
    flips = leader + second + 1
    return sum(math.comb(flips, k) for k in range(leader + 1)) / 2**flips


def is_sound(candidate: Candidate) -> bool:
    """Tell whether a candidate is complete and has no flaw but missing log-probabilities."""
    reason = str(candidate.finish_reason or "").lower()
    has_action = bool(candidate.tool_calls or candidate.content.strip())
    return has_action and reason not in TRUNCATED | REFUSED and not set(candidate.flaws) - {"no_signal"}


def check_effort(effort: object, n: int) -> None:
    """Refuse what is not an effort, and one that needs more candidates than N.

    Raises:
        ConfigError: It is not callable, or its numbers exceed ``n``.
    """
    if not callable(effort):
        raise ConfigError(f"effort must be Agree(), Escalate(...), ByRisk(), Prime() or a function; found {effort!r}")
    for name in ("first", "safe", "risky"):
        found = getattr(effort, name, 0)
        if isinstance(found, int) and found > n:
            raise ConfigError(f"{name} of {type(effort).__name__} must be at most n={n}; found {found}")


def _rest(then: Effort | None, candidates: Sequence[Candidate], most: int) -> int:
    return most if then is None else then(candidates, most)


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be an integer, 1 or more; found {value!r}")
