"""What a scorer is, and the plain way to make one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import Candidate, TokenSignals
from ec_agents.scoring.noise import Chance, normal_chance

Best = Literal["lowest", "highest"]
Scores = NDArray[np.float64]


class Scorer(Protocol):
    """Anything that gives each candidate of a step a number."""

    @property
    def name(self) -> str:
        """Name in records and tables."""
        ...

    @property
    def best(self) -> Best:
        """Which end wins."""
        ...

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores of the candidates, ``(N,)``; NaN = cannot be scored."""
        ...


@runtime_checkable
class FindsPhases(Protocol):
    """A scorer that works on high-entropy phases, so that their number can be reported."""

    def phases(self, candidate: Candidate) -> NDArray[np.int64]:
        """High-entropy phases of one candidate, ``(P, 2)``: start and duration in tokens."""
        ...


@runtime_checkable
class KnowsNoise(Protocol):
    """A scorer that knows how far its scores stray where nothing tells the candidates apart."""

    def noise(self, candidates: Sequence[Candidate]) -> Scores:
        """Standard deviation of the score of each candidate without any signal, ``(N,)``; NaN = unknown."""
        ...


@runtime_checkable
class KnowsChance(Protocol):
    """A scorer that knows how often a margin comes about where nothing tells the candidates apart.

    For scores without signal that are not normal, or not of one mean; otherwise ``KnowsNoise`` is enough.
    """

    def chance(self, candidates: Sequence[Candidate], margin: float) -> Chance:
        """What the margin between the first two of these candidates, best first, amounts to; NaN = unknown."""
        ...


@runtime_checkable
class CountsVotes(Protocol):
    """A scorer whose score belongs to an action, so that candidates with the same action stand together."""

    @property
    def tie_break(self) -> Scorer | None:
        """Ranks the candidates of one action, and equal actions."""
        ...

    def key(self, candidate: Candidate) -> str | None:
        """The action that a candidate votes for; None = it abstains."""
        ...


@dataclass(frozen=True, slots=True)
class SignalScorer:
    """A scorer made of one function of a candidate's signals.

    Example:
        >>> last_entropy = SignalScorer("last-entropy", "lowest", lambda signals: float(signals.entropies[-1]))
        >>> last_entropy([Candidate(index=0)]).tolist()
        [nan]
    """

    name: str
    """Name in records and tables."""
    best: Best
    """Which end wins."""
    measure: Callable[[TokenSignals], float]
    """Signals of at least one token → score; NaN = cannot be scored."""
    spread: Callable[[TokenSignals], float] | None = None
    """Signals → standard deviation of the score without any signal, if that is known."""
    odds: Callable[[Sequence[TokenSignals], float], Chance] | None = None
    """Signals of all candidates, best first, and a margin → what it amounts to, where ``spread`` does not say it."""

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """Score of each candidate, ``(N,)``; NaN without signals."""
        return _each(self.measure, candidates)

    def noise(self, candidates: Sequence[Candidate]) -> Scores:
        """Standard deviation of each score without any signal, ``(N,)``; NaN where it is unknown."""
        return np.full(len(candidates), np.nan) if self.spread is None else _each(self.spread, candidates)

    def chance(self, candidates: Sequence[Candidate], margin: float) -> Chance:
        """What the margin between the first two of these candidates amounts to; NaN where that is unknown."""
        signals = [candidate.signals for candidate in candidates if candidate.signals is not None]
        if self.odds is not None and len(signals) == len(candidates) and all(s.n_tokens for s in signals):
            return self.odds(signals, margin)
        return normal_chance(margin, self.noise(candidates))


def _each(measure: Callable[[TokenSignals], float], candidates: Sequence[Candidate]) -> Scores:
    """The measure of each candidate that has tokens, NaN for the others, ``(N,)``."""
    signals = [candidate.signals for candidate in candidates]
    return np.array([np.nan if s is None or not s.n_tokens else measure(s) for s in signals], dtype=np.float64)
