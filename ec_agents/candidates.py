"""The nouns: token signals, candidates, the set drawn at one step, the selection among them, steps, trajectories.

Everything here is plain frozen data that knows no framework. ``to_builtins`` and ``from_builtins`` turn it into what a
checkpoint may hold (dict, list, str, int, float, bytes) and back.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from ec_agents.errors import ConfigError, StateError

Floats = NDArray[np.float32]
Reason = Literal["ranked", "tie_break", "only_one", "only_sound", "fallback", "all_flawed"]

FORMAT = 1
"""Version of the builtins form of candidates."""

FINISHED = frozenset(
    (
        "stop",
        "tool_calls",
        "function_call",
        # Anthropic, Bedrock, xAI
        "end_turn",
        "stop_sequence",
        "tool_use",
        # Cohere, OpenAI Responses, its_hub
        "complete",
        "completed",
        "tool_call",
        # Text Generation Inference, watsonx, Together
        "eos_token",
        "eos",
    )
)
"""Finish reasons of responses that the model brought to an end. Whatever is in none of these three sets is suspect."""

TRUNCATED = frozenset(
    (
        "length",
        "max_tokens",
        "max_output_tokens",
        "model_length",
        "model_context_window_exceeded",
        "token_limit",
        "incomplete",
    )
)
"""Finish reasons of responses that a token limit cut off."""

REFUSED = frozenset(
    (
        "content_filter",
        "content_filtered",
        "guardrail_intervened",
        "refusal",
        "safety",
        "blocklist",
        "prohibited_content",
        "recitation",
        "spii",
        "sensitive",
        "error_toxic",
    )
)
"""Finish reasons of responses that the provider or the model declined to give."""

NOISE_LEVEL = 0.05
"""A margin is above the noise floor if candidates without any signal show it in a smaller share of steps than this."""

DEEPEST = 100
"""Levels of nesting that a checkpoint can hold of a value that a model or server wrote."""

_BEYOND = "…"


def storable(value: Any, problems: list[str] | None = None, *, objects: Callable[[Any], Any] = str) -> Any:
    """Return a value that a model or server wrote in a form that checkpoints and traces can hold.

    Half a surrogate pair becomes a question mark, an integer beyond 64 bits its text, and whatever is nested more than
    ``DEEPEST`` levels deep is cut off. Sound values come back equal.

    Args:
        value: Any mix of dicts, lists and scalars.
        problems: Collects what had to be changed in structure: nesting and integers.
        objects: Applied to values of other types.
    """
    return _storable(value, [] if problems is None else problems, objects, DEEPEST)


def _storable(value: Any, problems: list[str], objects: Callable[[Any], Any], levels: int) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, bool | float | bytes):
        return value
    if isinstance(value, int):
        if -(1 << 63) <= value < 1 << 63:
            return value
        problems.append("an integer does not fit into 64 bits")
        return str(value) if value.bit_length() < 1000 else f"an integer of {value.bit_length()} bits"
    if not isinstance(value, dict | list | tuple | Mapping):
        return objects(value)
    if not levels:
        problems.append(f"values are nested more than {DEEPEST} levels deep")
        return _BEYOND
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {
            key if isinstance(key, int) else _storable(str(key), problems, objects, 0): _storable(
                item, problems, objects, levels - 1
            )
            for key, item in items
        }
    return [_storable(item, problems, objects, levels - 1) for item in cast("Sequence[Any]", value)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSignals:
    """What is kept of the log-probabilities of one response: three numbers a token.

    Raises:
        ConfigError: The arrays are not one-dimensional and equally long.
    """

    entropies: Floats
    """Token entropies, ``(T,)``, nats, renormalised over the top K; NaN = missing."""
    logprobs: Floats
    """Log-probability of the drawn token, ``(T,)``, nats; NaN = missing."""
    confidences: Floats
    """DeepConf token confidence, ``(T,)``: minus the mean of the K log-probabilities, nats; NaN = missing."""
    n_alternatives: int
    """K, the largest number of alternatives that a token came with."""
    excess: float = 0.0
    """By how much the alternatives of one of the tokens that were looked at exceed a total probability of 1."""

    def __post_init__(self) -> None:
        """Check the shapes."""
        shapes = self.entropies.shape, self.logprobs.shape, self.confidences.shape
        if not shapes[0] == shapes[1] == shapes[2] or len(shapes[0]) != 1:
            raise ConfigError(f"three arrays of one shape (T,) are needed; found shapes {sorted(set(shapes))}")

    @classmethod
    def concatenate(cls, parts: Iterable[Self]) -> Self:
        """Join the signals of several responses, such as the turns of a run, into those of one text.

        Args:
            parts: In order. The boundaries are the running sums of their ``n_tokens``.

        Returns:
            ``(Σ T_i,)`` for each array; K and ``excess`` are the largest of the parts.
        """
        joined = tuple(parts)
        empty = np.empty(0, dtype=np.float32)
        return cls(
            entropies=np.concatenate([empty, *(part.entropies for part in joined)], dtype=np.float32),
            logprobs=np.concatenate([empty, *(part.logprobs for part in joined)], dtype=np.float32),
            confidences=np.concatenate([empty, *(part.confidences for part in joined)], dtype=np.float32),
            n_alternatives=max((part.n_alternatives for part in joined), default=0),
            excess=max((part.excess for part in joined), default=0.0),
        )

    @property
    def n_tokens(self) -> int:
        """T, missing tokens counted."""
        return len(self.entropies)

    @property
    def n_missing(self) -> int:
        """How many tokens have no entropy."""
        return int(np.isnan(self.entropies).sum())

    def to_bytes(self) -> bytes:
        """The three arrays, one after the other, as little-endian float32.

        All first bytes come first, then all second bytes and so on: bytes of one kind compress better side by side.
        """
        arrays = np.concatenate((self.entropies, self.logprobs, self.confidences), dtype="<f4")
        return arrays.view(np.uint8).reshape(-1, 4).T.tobytes()

    @classmethod
    def from_bytes(cls, packed: bytes, n_alternatives: int, excess: float = 0.0) -> Self:
        """Undo ``to_bytes``.

        Raises:
            StateError: The length is not a multiple of three float32.
        """
        if len(packed) % 12:
            raise StateError(f"packed signals must be three float32 arrays; found {len(packed)} bytes")
        planes = np.frombuffer(packed, np.uint8).reshape(4, -1)
        arrays = planes.T.copy().view("<f4").astype(np.float32, copy=False)
        entropies, logprobs, confidences = arrays.reshape(3, -1)
        arrays = {"entropies": entropies, "logprobs": logprobs, "confidences": confidences}
        return cls(**arrays, n_alternatives=n_alternatives, excess=excess)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One of the N responses of a step."""

    index: int
    """Position among the N calls, from 0."""
    content: str = ""
    """Text of the answer."""
    tool_calls: Sequence[Mapping[str, Any]] = ()
    """Tool calls, each with ``name``, ``args`` and, if known, ``id``."""
    finish_reason: str | None = None
    """Why the model stopped, as the provider says it: ``stop``, ``length``, ``tool_calls``, …"""
    signals: TokenSignals | None = None
    """None: nothing to measure."""
    usage: Mapping[str, int] | None = None
    """Token counts of this response, if reported: ``input_tokens``, ``output_tokens``, ``total_tokens``, and
    ``cached_tokens`` where the provider read a part of the input from its cache."""
    flaws: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name of each flaw found so far → what was found."""
    seconds: float | None = None
    """How long the call took that answered, without what it waited for its turn; None where nobody measured it."""

    def to_builtins(self) -> dict[str, Any]:
        """The candidate as builtins only."""
        return {
            "format": FORMAT,
            "index": self.index,
            "content": self.content,
            "tool_calls": [dict(call) for call in self.tool_calls],
            "finish_reason": self.finish_reason,
            "signals": None if self.signals is None else self.signals.to_bytes(),
            "n_alternatives": 0 if self.signals is None else self.signals.n_alternatives,
            "excess": 0.0 if self.signals is None else self.signals.excess,
            "usage": None if self.usage is None else dict(self.usage),
            "flaws": dict(self.flaws),
            "seconds": self.seconds,
        }

    @classmethod
    def from_builtins(cls, data: Mapping[str, Any]) -> Self:
        """Undo ``to_builtins``.

        Raises:
            StateError: Another version wrote the data, or a field is missing.
        """
        if data.get("format") != FORMAT:
            raise StateError(
                f"candidates in format {data.get('format')!r} found in the state, {FORMAT} needed: another version of "
                "ec_agents wrote this checkpoint; finish the run with that version or start the step again"
            )
        try:
            stored = msgspec.convert(data, _StoredCandidate)
        except (msgspec.ValidationError, TypeError) as error:
            raise StateError(f"a candidate in the state is damaged: {error}") from error
        given = {name: getattr(stored, name) for name in _CANDIDATE_FIELDS}
        if stored.signals is not None:
            given["signals"] = TokenSignals.from_bytes(stored.signals, stored.n_alternatives, stored.excess)
        return cls(**given)


class _StoredCandidate(msgspec.Struct):
    """The builtins form of a candidate, for checking types."""

    index: int
    content: str
    tool_calls: list[dict[str, Any]]
    finish_reason: str | None
    signals: bytes | None
    n_alternatives: int
    usage: dict[str, int] | None
    flaws: dict[str, str]
    seconds: float | None = None
    excess: float = 0.0


_CANDIDATE_FIELDS = tuple(f.name for f in fields(Candidate))


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateSet:
    """What the N calls of one step gave."""

    candidates: Sequence[Candidate]
    """The responses, in index order; failed calls are not among them."""
    messages: Mapping[int, Any] = field(default_factory=dict[int, Any])
    """Whatever each call returned, keyed by candidate index."""
    failures: Mapping[int, BaseException] = field(default_factory=dict[int, BaseException])
    """What each failed call raised, keyed by candidate index."""
    spent: Mapping[str, int] = field(default_factory=dict[str, int])
    """Token counts of responses that were thrown away, because they could not be measured, before these were drawn."""
    waves: Sequence[int] = ()
    """How many calls were started in each wave."""
    stopped: str = ""
    """With an effort: why no more were drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The choice among the candidates of a step, with its evidence."""

    chosen: int
    """Index of the chosen candidate."""
    order: Sequence[int]
    """Candidate indexes from best to worst."""
    scores: Mapping[int, float | None]
    """Score of each candidate; None = could not be scored."""
    margin: float | None
    """Distance between the best two scores that were ranked together; None if there are no two.

    Of a vote: the lead over the strongest other action.
    """
    reason: Reason
    """Why this one.

    ``ranked``: best score; ``tie_break``: equal best scores; ``only_one``: there was one candidate; ``only_sound``: all
    others are flawed; ``fallback``: nothing to rank by; ``all_flawed``: the least flawed one.
    """
    selector: str
    """Name of the scorer that ranked."""
    flaws: Mapping[int, Mapping[str, str]] = field(default_factory=dict[int, Mapping[str, str]])
    """Flaws of each flawed candidate: name → what was found."""
    n_tokens: Mapping[int, int] = field(default_factory=dict[int, int])
    """Tokens of each candidate that has signals."""
    n_phases: Mapping[int, int] = field(default_factory=dict[int, int])
    """High-entropy phases of each candidate that the scorer found some in."""
    margin_sd: float | None = None
    """``margin`` in standard deviations of a score without any signal; None where the scorer does not know them."""
    p_noise: float | None = None
    """How often candidates without any signal, as many and as long as these, have such a margin or a larger one."""
    n_agree: int = 1
    """How many candidates, the chosen one included, would do the same as the chosen one."""

    @property
    def above_noise(self) -> bool | None:
        """Whether signal-free candidates have such a margin in fewer than 5 % of steps; None where it is not known."""
        return None if self.p_noise is None else self.p_noise < NOISE_LEVEL

    def to_builtins(self, n: int = 0) -> dict[str, Any]:
        """Return the selection as builtins only.

        What belongs to single candidates becomes lists by candidate index, which are the same in Python and in JSON:
        ``data["scores"][data["chosen"]]``. A call that failed has None there, and no flaws.

        Args:
            n: How many calls were made; the lists are at least that long.
        """
        n = max(n, 1 + max(self.order, default=-1))
        return {
            "chosen": self.chosen,
            "order": list(self.order),
            "scores": by_index(self.scores, n, None),
            "margin": self.margin,
            "reason": self.reason,
            "selector": self.selector,
            "flaws": [dict(flaws) for flaws in by_index(self.flaws, n, {})],
            "n_tokens": by_index(self.n_tokens, n, None),
            "n_phases": by_index(self.n_phases, n, None),
            "margin_sd": self.margin_sd,
            "p_noise": self.p_noise,
            "above_noise": self.above_noise,
            "n_agree": self.n_agree,
        }

    @classmethod
    def from_builtins(cls, data: Mapping[str, Any]) -> Self:
        """Undo ``to_builtins``; fields that this version does not know are dropped.

        Raises:
            StateError: A field is missing or of a wrong type, or the lists do not fit the order.
        """
        try:
            stored = msgspec.convert(data, _StoredSelection)
        except (msgspec.ValidationError, TypeError) as error:
            raise StateError(f"a saved selection is damaged: {error}") from error
        if stored.chosen not in stored.order or not 0 <= min(stored.order) <= max(stored.order) < len(stored.scores):
            found = f"choice {stored.chosen}, order {stored.order}, {len(stored.scores)} scores"
            raise StateError(f"a saved selection is damaged: {found}"[:300])
        given = {name: getattr(stored, name) for name in _SELECTION_FIELDS}
        given["scores"] = {i: stored.scores[i] for i in sorted(stored.order)}
        given["flaws"] = {i: flaws for i, flaws in enumerate(stored.flaws) if flaws}
        given["n_tokens"] = {i: n for i, n in enumerate(stored.n_tokens) if n is not None}
        given["n_phases"] = {i: n for i, n in enumerate(stored.n_phases) if n is not None}
        return cls(**given)


class _StoredSelection(msgspec.Struct):
    """The builtins form of a selection, for checking types."""

    chosen: int
    order: list[int]
    scores: list[float | None]
    margin: float | None
    reason: Reason
    selector: str
    flaws: list[dict[str, str]] = []
    n_tokens: list[int | None] = []
    n_phases: list[int | None] = []
    margin_sd: float | None = None
    p_noise: float | None = None
    n_agree: int = 1


_SELECTION_FIELDS = tuple(f.name for f in fields(Selection))


def by_index(found: Mapping[int, Any], n: int, missing: Any) -> list[Any]:
    """Return the values of a mapping from candidate index as a list of ``n`` values or as many as it takes."""
    return [found.get(index, missing) for index in range(max(n, 1 + max(found, default=-1)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One turn of a run: the candidates drawn, and which of them acted."""

    run: str
    """Name of the run that the step belongs to."""
    number: int = 0
    """Position in the run, from 0."""
    task: str | None = None
    """Name of the task that the run is about; runs of one task are compared with each other."""
    candidates: Sequence[Candidate] = ()
    """In index order."""
    selection: Selection | None = None
    """The choice that was made, if any."""
    failures: Mapping[int, str] = field(default_factory=dict[int, str])
    """What each failed call raised, keyed by candidate index."""
    time: float | None = None
    """When the step was recorded, seconds since 1970."""
    seconds: float | None = None
    """How long the step took, from the first call to the choice."""
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Anything else that JSON can hold."""

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that acted, if that is known."""
        index = None if self.selection is None else self.selection.chosen
        return next((candidate for candidate in self.candidates if candidate.index == index), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The steps of one run."""

    run: str
    """Name of the run."""
    task: str | None = None
    """Name of the task that the run is about."""
    steps: Sequence[Step] = ()
    """In the order in which they were taken."""


def add_usage(usages: Iterable[Mapping[str, int] | None]) -> dict[str, int]:
    """Add up token counts by name; None, for what was not reported, adds nothing."""
    total: dict[str, int] = {}
    for usage in usages:
        for name, count in (usage or {}).items():
            total[name] = total.get(name, 0) + count
    return total
