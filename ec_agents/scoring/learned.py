"""A selector that is learned from graded steps: a logistic model on a handful of features, compared within a step."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import Candidate
from ec_agents.errors import ConfigError
from ec_agents.files import replace_text
from ec_agents.scoring.answers import ANSWERS, Extract, answer_key
from ec_agents.scoring.base import Best, Scores
from ec_agents.scoring.baselines import mean_entropy, mean_logprob, present, top_k_certainty
from ec_agents.scoring.centroids import CentroidScorer, raw_centroid
from ec_agents.scoring.votes import Key

Floats = NDArray[np.float64]

FORMAT = 1
"""Version of the files."""

FEATURES = (
    "centroid",
    "centroid-short",
    "raw-entropy-centroid",
    "mean-entropy",
    "tail-entropy",
    "self-certainty",
    "mean-logprob",
    "log-length",
    "vote-share",
)
"""What the model looks at, in the order of the weights."""

SHRINKAGE = 4.0
"""Strength of the L2 penalty: that of a normal prior with standard deviation 1/2 on each standardised weight."""

TAIL = 0.2
"""Share of the tokens that ``tail-entropy`` averages, at the end of the response."""

_PAPER, _SHORT = CentroidScorer("paper"), CentroidScorer("short")

_log = logging.getLogger(__name__)


def features(candidates: Sequence[Candidate], key: Key) -> Floats:
    """The features of the candidates of one step, ``(N, F)``; NaN where one cannot be measured.

    Args:
        candidates: Candidates to compare with each other, without flaws.
        key: What a candidate votes for, for the share of the vote.
    """
    rows = np.full((len(candidates), len(FEATURES)), np.nan)
    rows[:, 0], rows[:, 1] = _PAPER(candidates), _SHORT(candidates)
    for row, candidate in zip(rows, candidates, strict=True):
        signals = candidate.signals
        if signals is None or not signals.n_tokens:
            continue
        end = present(signals.entropies)[-max(1, round(TAIL * signals.n_tokens)) :]
        row[2:8] = (
            raw_centroid(signals),
            mean_entropy(signals),
            end.mean() if len(end) else math.nan,
            top_k_certainty(signals),
            mean_logprob(signals),
            math.log(signals.n_tokens),
        )
    votes = [key(candidate) for candidate in candidates]
    counts = Counter(vote for vote in votes if vote is not None)
    rows[:, 8] = [counts[vote] / len(votes) if vote is not None else 0.0 for vote in votes]
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """The candidates of a step that a model learns from."""

    features: Floats
    """``(N, F)``"""
    right: NDArray[np.bool_]
    """``(N,)``"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """A learned score of the candidates of a step. High = better.

    The features of a step are centred on their mean, divided by the spread seen in training and clipped to the range
    seen there, so that nothing is extrapolated. ``log_odds`` holds sign and weight of each: by how much the log-odds
    of being the right one of two rise with one standard deviation.

    A model is for one language model, one number of alternatives and one form of action. Where these differ it scores
    nothing and logs a warning, so that the selector's fallback decides.

    Source:
        Conditional (pairwise) logistic regression with an L2 penalty; what all candidates of a step have in common,
        such as the difficulty of the task, cancels.
    """

    log_odds: Mapping[str, float]
    """Feature → weight."""
    spread: Mapping[str, float]
    """Feature → standard deviation within a step."""
    low: Mapping[str, float]
    """Feature → lowest value seen, standardised."""
    high: Mapping[str, float]
    """Feature → highest value seen, standardised."""
    model: str = ""
    """Name of the language model; empty = unknown."""
    k: tuple[int, ...] = ()
    """Numbers of alternatives per token that were seen."""
    actions: tuple[str, ...] = ()
    """Forms of action that were seen: ``text`` or ``tool_calls``."""
    answer: str = "text"
    """What the share of the vote compares: a name in ``ANSWERS``, or ``text``."""
    n_tasks: int = 0
    """Tasks that it was fitted on."""
    find: Extract | None = None
    """Finds the answer, if that is no name in ``ANSWERS``."""
    name: str = "learned"
    """Name in records and tables."""
    best: Best = "highest"
    """Which end wins."""
    _warned: set[str] = field(default_factory=set[str], compare=False, repr=False)

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """Score of each candidate, ``(N,)``; NaN without signals, or where the model does not apply."""
        problem = self._problem(candidates)
        if problem is not None:
            if problem not in self._warned:
                self._warned.add(problem)
                _log.warning("%s; the learned selector is not used: fit another one with ec-agents pilot", problem)
            return np.full(len(candidates), np.nan)
        found = self.scores(features(candidates, answer_key(self.find or ANSWERS.get(self.answer))))
        return np.where([bool(c.signals is not None and c.signals.n_tokens) for c in candidates], found, np.nan)

    def scores(self, rows: Floats) -> Scores:
        """Score of each candidate by its features, ``(…, N, F)`` → ``(…, N)``."""
        return self._standardised(rows) @ self._vector(self.log_odds)

    def check_model(self, model: str) -> None:
        """Refuse another language model than the one it was fitted on.

        Raises:
            ConfigError: The name differs.
        """
        if self.model and model and model != self.model:
            raise ConfigError(
                f"the learned selector was fitted on {self.model!r}, and the model is {model!r}: scores of one model "
                "mean nothing for another; run ec-agents pilot on this one"
            )

    @classmethod
    def fit(cls, examples: Iterable[Example], **about: Any) -> Self:
        """Fit the weights on steps that have both right and wrong candidates.

        Args:
            examples: The steps.
            about: ``model``, ``k``, ``actions``, ``answer`` and ``n_tasks``.

        Raises:
            ImportError: The extra ``eval`` is not installed.
            ConfigError: No step has both.
        """
        mixed = [one for one in examples if one.right.any() and not one.right.all()]
        if not mixed:
            raise ConfigError("nothing to learn from: no step has both a right and a wrong candidate")
        centred = [_centred(one.features) for one in mixed]
        rows = np.concatenate(centred)
        spread = np.sqrt(np.mean(rows**2, axis=0))
        spread = np.where(spread > 1e-9, spread, np.inf)
        names: list[str] = list(FEATURES)
        pairs = [_pairs(step / spread, one.right) for step, one in zip(centred, mixed, strict=True)]
        weights = _fitted(np.concatenate(pairs), np.concatenate([np.full(len(p), 1 / len(p)) for p in pairs]))
        values = (weights, np.where(np.isfinite(spread), spread, 0.0), (rows / spread).min(0), (rows / spread).max(0))
        log_odds, spreads, low, high = (dict(zip(names, v.tolist(), strict=True)) for v in values)
        return cls(log_odds=log_odds, spread=spreads, low=low, high=high, **about)

    def save(self, path: str | Path) -> None:
        """Write the model as JSON.

        Raises:
            WriteError: The file cannot be written.
        """
        data = {name: getattr(self, name) for name in _Stored.__struct_fields__}
        save_selector(path, "learned", data)

    @classmethod
    def load(cls, path: str | Path, *, answer: Extract | None = None) -> Self:
        """Read a model that ``save`` or ``ec-agents pilot`` wrote.

        Args:
            path: The file.
            answer: Finds the answer in a text, if it was fitted with a function of yours; files run no code.

        Raises:
            ConfigError: The file cannot be read, or is not such a model.
        """
        scorer, data = read_selector(path)
        try:
            if scorer != "learned":
                raise ConfigError(f"{path} names the scorer {scorer!r} and holds no learned one; pass its path instead")
            stored = msgspec.convert(data, _Stored)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{path} is not a learned selector ({error}); run ec-agents pilot again") from error
        tables = (stored.log_odds, stored.spread, stored.low, stored.high)
        if any(set(table) != set(FEATURES) for table in tables):
            raise ConfigError(f"{path} was written by another version of ec_agents; run ec-agents pilot again")
        if stored.answer not in {"text", *ANSWERS} and answer is None:
            raise ConfigError(
                f"{path} was fitted with a function of yours, {stored.answer}: Learned.load(path, answer=function)"
            )
        return cls(**{name: getattr(stored, name) for name in stored.__struct_fields__}, find=answer)

    def _problem(self, candidates: Sequence[Candidate]) -> str | None:
        """Why it does not apply to these candidates."""
        found_k = {c.signals.n_alternatives for c in candidates if c.signals is not None and c.signals.n_tokens}
        if self.k and not found_k <= set(self.k):
            return f"fitted with top_logprobs {_list(self.k)}, and {_list(found_k - set(self.k))} arrived"
        forms = {action_form(candidate) for candidate in candidates}
        if self.actions and not forms <= set(self.actions):
            return f"fitted on the actions {_list(self.actions)}, and {_list(forms - set(self.actions))} arrived"
        return None

    def _standardised(self, rows: Floats) -> Floats:
        spread = self._vector(self.spread)
        scaled = np.divide(_centred(rows), spread, out=np.zeros_like(rows), where=spread > 0)
        return np.clip(scaled, self._vector(self.low), self._vector(self.high))

    @staticmethod
    def _vector(values: Mapping[str, float]) -> Floats:
        return np.array([values[name] for name in FEATURES])


class _Stored(msgspec.Struct):
    """The fields of a file, for checking types."""

    log_odds: dict[str, float]
    spread: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    model: str
    k: tuple[int, ...]
    actions: tuple[str, ...]
    answer: str
    n_tasks: int


def action_form(candidate: Candidate) -> str:
    """How a candidate acts: ``tool_calls`` or ``text``."""
    return "tool_calls" if candidate.tool_calls else "text"


def save_selector(path: str | Path, scorer: str, data: Mapping[str, Any]) -> None:
    """Write a selector as JSON: the name of a scorer, and what else belongs to it.

    Raises:
        WriteError: The file cannot be written.
    """
    replace_text(path, msgspec.json.format(msgspec.json.encode({"format": FORMAT, "scorer": scorer, **data})).decode())


def read_selector(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The name of the scorer in a saved selector, and what else belongs to it.

    Raises:
        ConfigError: The file cannot be read, or is not a saved selector.
    """
    data = _read(path)
    if data.pop("format", None) != FORMAT or not isinstance(data.get("scorer"), str):
        raise ConfigError(f"{path} is not a selector in format {FORMAT}; run ec-agents pilot again")
    return str(data.pop("scorer")), data


def _read(path: str | Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"the selector {str(path)!r} cannot be read: {error.strerror or error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a saved selector: {error}") from error


def _centred(rows: Floats) -> Floats:
    """The features minus their mean over the step, ``(…, N, F)``; 0, the mean, where one is missing."""
    known = np.isfinite(rows)
    counts = np.maximum(known.sum(axis=-2, keepdims=True), 1)
    return np.where(known, rows - np.where(known, rows, 0.0).sum(axis=-2, keepdims=True) / counts, 0.0)


def _pairs(rows: Floats, right: NDArray[np.bool_]) -> Floats:
    """Differences of every right candidate from every wrong one, ``(P, F)``."""
    return (rows[right][:, None, :] - rows[~right][None, :, :]).reshape(-1, rows.shape[1])


def _fitted(pairs: Floats, weights: Floats) -> Floats:
    """The weights with the least penalised loss, ``(F,)``; every step counts as one pair."""
    try:
        from scipy import optimize  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ImportError(
            f"fitting a selector needs the extra 'eval' ({error}): pip install 'ec-agents[eval]'"
        ) from error

    def loss(beta: Floats) -> tuple[float, Floats]:
        margins = pairs @ beta
        slope = -weights / (1 + np.exp(np.clip(margins, -500, 500)))
        value = float(weights @ np.logaddexp(0, -margins)) + SHRINKAGE / 2 * float(beta @ beta)
        return value, pairs.T @ slope + SHRINKAGE * beta

    found = cast("Any", optimize).minimize(loss, np.zeros(pairs.shape[1]), jac=True, method="L-BFGS-B")
    return np.asarray(found.x, dtype=np.float64)


def _list(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, values)))
