"""Stage 2 - parse: provider payload → TokenSignals.

The only module that knows what log-probabilities look like on the wire. Four forms are read:

- one choice of a chat response, ``{"message": …, "logprobs": {"content": [{"logprob", "top_logprobs"}, …]}}``;
- its ``logprobs`` alone, as LangChain keeps it in ``response_metadata["logprobs"]``;
- either of them with the legacy completions form, ``{"token_logprobs": […], "top_logprobs": [{token: logprob}, …]}``;
- the packed form of ``pack_logprobs``, which messages carry in their place: 16 bytes a token, or what was wrong.

Example:
    >>> alternatives = [{"token": "a", "logprob": -0.7}, {"token": "b", "logprob": -0.7}]
    >>> signals = token_signals({"content": [{"token": "a", "logprob": -0.7, "top_logprobs": alternatives}]})
    >>> signals.n_tokens, signals.n_alternatives, round(float(signals.entropies[0]), 4)
    (1, 2, 0.6931)
"""

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeGuard

import msgspec
import numpy as np
from numpy.typing import NDArray

from ec_agents.candidates import TokenSignals, storable
from ec_agents.entropy import MASKED, entropies_and_mass, keep_largest
from ec_agents.errors import LogprobsMalformed, LogprobsMissing, StateError

Json = Mapping[str, Any]
Part = Literal["all", "answer", "reasoning"]
"""Which tokens of a response to measure, where a server reports those of reasoning in a field of their own."""
Floats = NDArray[np.float64]

HIGHEST_LOGPROB = 0.1
"""Rounding puts a log-probability slightly above 0, but never this far."""

TOLERANCE = 0.01
"""By so much the probabilities of the alternatives of a token may add up to more than 1: servers round."""

_USUAL_WIDTH = 64
"""Rows of up to so many alternatives are kept whole."""

_CHOICE_KEYS = frozenset(("logprobs", "message", "text"))
_PACKED_KEYS = frozenset(("packed", "missing", "malformed"))
_LOGPROBS_KEYS = frozenset(("content", "refusal", "reasoning_content", "token_logprobs")) | _PACKED_KEYS
_ASK = "ask for logprobs=True and top_logprobs=20"
_TOOL_CALLS = (
    "OpenAI, Azure and some local servers return none for tool calls: serve the model with vLLM, SGLang or "
    "llama-server, or let it write its action as structured output"
)


class Read(NamedTuple):
    """The numbers of a payload, nothing checked yet."""

    drawn: Sequence[Any]
    """Log-probability of the drawn token, T."""
    sizes: Sequence[int]
    """How many alternatives each token came with, T."""
    alternatives: Sequence[Any]
    """Log-probabilities of the alternatives, token after token, ``sum(sizes)``."""


def token_signals(choice: Json | None, *, top_k: int | None = None, part: Part = "all") -> TokenSignals:
    """What one response says about its tokens: entropies, log-probabilities and confidences.

    Alternatives may come in any order, any number and without the drawn token; null, NaN and -9999.0 or less count as
    absent. Tokens without any alternative are missing (NaN) in ``entropies`` and ``confidences``. Reasoning and
    tool-call tokens count like all others wherever the server reports them. If there is no content, the tokens of a
    refusal are read. Reasoning in a field of its own (DeepSeek's ``logprobs.reasoning_content``, Cerebras's
    ``reasoning_logprobs``) comes before the answer, as other servers report it.

    Source: H = -Σ q ln q (arXiv 2604.26173) and C = -(1/K) Σ ln p (DeepConf, arXiv 2508.15260), both over the
    alternatives that are present.

    Args:
        choice: One choice of a saved response, or its ``logprobs``.
        top_k: How many of the alternatives to use; None = all. The packed form has kept none to choose from.
        part: ``answer`` leaves out reasoning that has a field of its own, and ``reasoning`` everything else.

    Raises:
        LogprobsMissing: There are no log-probabilities, or none of alternatives, or none of this part.
        LogprobsMalformed: They are not in the documented form; the message names the position.
        ConfigError: ``top_k`` is below 1.
    """
    payload = _payload(choice)
    reasoning: Any = _reasoning(choice, payload)
    content: Any = payload.get("content") or payload.get("refusal")
    if not content and (packed := _unpacked(payload)):
        return _part(packed, _n_reasoning(payload), part)
    if not content and payload.get("token_logprobs"):
        read = _read_legacy(payload)
    elif not content and not reasoning:
        raise LogprobsMissing(_nothing_found(choice, f"logprobs holds no tokens, only {outline(payload)}"))
    elif not is_list(content or []):
        raise LogprobsMalformed(f"logprobs.content must be a list of tokens; found {outline(content)}")
    else:
        content = [*reasoning, *(content or ())] if reasoning else content
        content = content if is_mapping(content[0]) else [dumped(entry) for entry in content]  # objects of an SDK
        read = _read_content(content)
    return _part(signals_of(read, lambda: content if is_list(content) else (), top_k), len(reasoning), part)


def n_reasoning_tokens(choice: Json) -> int:
    """Number of tokens of reasoning that a choice reports in a field of their own."""
    payload: Any = choice.get("logprobs")
    return len(_reasoning(choice, payload if is_mapping(payload) else {}))


def _reasoning(choice: Any, payload: Json) -> Sequence[Any]:
    """The tokens of reasoning in a field of their own."""
    beside: Any = choice.get("reasoning_logprobs") if is_mapping(choice) else None
    tokens: Any = payload.get("reasoning_content") or (beside.get("content") if is_mapping(beside) else beside)
    if tokens and not is_list(tokens):
        raise LogprobsMalformed(f"log-probabilities of reasoning must be a list of tokens; found {outline(tokens)}")
    return tokens or ()


def _n_reasoning(packed: Json) -> int:
    count: Any = packed.get("n_reasoning", 0)
    return count if is_count(count) else 0


def _part(signals: TokenSignals, n_reasoning: int, part: Part) -> TokenSignals:
    """The signals of one part of a response whose first tokens are reasoning."""
    if part == "all" or (part == "answer" and not n_reasoning):
        return signals
    tokens = slice(n_reasoning, None) if part == "answer" else slice(n_reasoning)
    kept = replace(
        signals,
        entropies=signals.entropies[tokens],
        logprobs=signals.logprobs[tokens],
        confidences=signals.confidences[tokens],
    )
    if not kept.n_tokens:
        raise LogprobsMissing(f"none of the {signals.n_tokens} tokens belongs to the {part}")
    return kept


def signals_of(read: Read, entries: Callable[[], Sequence[Any]], top_k: int | None = None) -> TokenSignals:
    """The signals of the numbers of a payload.

    Args:
        read: The numbers.
        entries: Gives the tokens as they came; asked only where a token may be listed twice. Empty: none can be.
        top_k: How many of the alternatives to use; None = all.

    Raises:
        LogprobsMissing: No token comes with alternatives.
        LogprobsMalformed: One of them is no log-probability; the message names the position.
    """
    if not any(read.sizes):
        raise LogprobsMissing(f"none of the {len(read.sizes)} tokens comes with alternatives: {_ASK}")
    drawn, alternatives = _arrays(read)
    sizes = [min(size, alternatives.shape[1]) for size in read.sizes]
    _drop_repeats(entries, drawn, alternatives, sizes)
    kept = keep_largest(alternatives, top_k)
    entropies, mass = entropies_and_mass(kept)
    excess = float(np.fmax.reduce(mass)) - 1  # NaN is left out
    return TokenSignals(
        entropies=entropies.astype(np.float32),
        logprobs=drawn.astype(np.float32),
        confidences=_confidences(kept).astype(np.float32),
        n_alternatives=min(max(sizes), kept.shape[1]),
        excess=excess if excess > TOLERANCE else 0.0,
    )


def pack_logprobs(measure: Callable[[], TokenSignals], n_reasoning: int = 0) -> dict[str, Any]:
    """The packed form of the log-probabilities of a choice, which JSON can hold; ``token_signals`` reads it.

    Args:
        measure: Gives the signals. Where it raises a ``LogprobsError``, the form says why.
        n_reasoning: How many of the first tokens are reasoning that the server reported separately.

    Example:
        >>> token_signals(pack_logprobs(lambda: token_signals(None)))
        Traceback (most recent call last):
        ec_agents.errors.LogprobsMissing: logprobs is null or absent: ask for logprobs=True and top_logprobs=20, ...
    """
    try:
        signals = measure()
    except LogprobsMissing as error:
        return {"missing": str(error)}
    except LogprobsMalformed as error:
        return {"malformed": str(error)}
    more: dict[str, Any] = {"excess": signals.excess} if signals.excess else {}
    more |= {"n_reasoning": n_reasoning} if n_reasoning else {}
    return {"packed": b64encode(signals.to_bytes()).decode(), "n_alternatives": signals.n_alternatives, **more}


def is_packed(logprobs: Any) -> bool:
    """Whether log-probabilities are in the packed form."""
    return is_mapping(logprobs) and bool(_PACKED_KEYS & logprobs.keys())


def packed_length(packed: Json) -> int | None:
    """Number of tokens of log-probabilities in the packed form; None where there are none."""
    return len(packed["packed"]) // 16 if "packed" in packed else None


def is_count(value: Any) -> TypeGuard[int]:
    """Tell whether a value is a number of things, such as tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def dumped(value: Any) -> Any:
    """The value, or the dict form of an object of an SDK."""
    dump: Any = getattr(value, "model_dump", None)
    return dump(warnings=False) if callable(dump) else value


def shown(value: Any, most: int) -> str:
    """A value that a server wrote as text of at most so many characters, whatever it is."""
    found = storable(value)
    return (found if isinstance(found, str) else repr(found))[:most]


def quoted(value: Any, most: int) -> str:
    """``repr`` of a value that a server wrote, of at most so many characters, however deep it is nested."""
    return repr(storable(value))[:most]


def _payload(choice: Any) -> Json:
    """The ``logprobs`` of a choice, or the argument itself where it is that already."""
    payload: Any = choice
    if is_mapping(choice) and (_CHOICE_KEYS & choice.keys() or not _LOGPROBS_KEYS & choice.keys()):
        payload = choice.get("logprobs")
    payload = payload if is_mapping(payload) else dumped(payload)
    if payload is None and is_mapping(choice) and choice.get("reasoning_logprobs"):
        return {}
    if payload is None:
        raise LogprobsMissing(_nothing_found(choice, "logprobs is null or absent"))
    if is_list(payload):
        return {"content": payload}  # Ollama, as ChatOllama passes it on
    if not is_mapping(payload):
        raise LogprobsMalformed(f"logprobs must be a JSON object; found {outline(payload)}")
    return payload


def _unpacked(payload: Json) -> TokenSignals | None:
    """The signals in the packed form; None if it is another form."""
    if "missing" in payload:
        raise LogprobsMissing(shown(payload["missing"], 500))
    if "malformed" in payload:
        raise LogprobsMalformed(shown(payload["malformed"], 500))
    packed = payload.get("packed")
    try:
        if packed is None:
            return None
        return TokenSignals.from_bytes(b64decode(packed, validate=True), *_extent(payload))
    except (StateError, KeyError, TypeError, ValueError) as error:
        raise LogprobsMalformed(f"packed log-probabilities are damaged: {error}") from error


def _extent(payload: Json) -> tuple[int, float]:
    """K and the excess of the packed form."""
    n_alternatives, excess = payload["n_alternatives"], payload.get("excess", 0.0)
    if not is_count(n_alternatives) or not isinstance(excess, int | float):
        raise TypeError(f"n_alternatives {quoted(n_alternatives, 60)} and excess {quoted(excess, 60)} found")
    return n_alternatives, float(excess)


def _nothing_found(choice: Any, found: str) -> str:
    """What was found instead of log-probabilities, with the remedy."""
    message: Any = choice.get("message") if is_mapping(choice) else None
    if is_mapping(message) and message.get("tool_calls"):
        return f"{found}, beside tool calls; {_TOOL_CALLS}"
    return f"{found}: {_ASK}, and check that this model and server return them"


def _read_content(content: Sequence[Any]) -> Read:
    """The numbers of the chat form."""
    try:
        return _gather(content, [entry["top_logprobs"] for entry in content])
    except (KeyError, TypeError):
        # Something is absent, null or of a wrong type; only now is every token looked at.
        return _gather(content, [_checked_rows(entry, position) for position, entry in enumerate(content)])


def _gather(content: Sequence[Any], rows: Sequence[Any]) -> Read:
    return Read(
        drawn=[entry["logprob"] for entry in content],
        sizes=[len(row) for row in rows],
        alternatives=[alternative["logprob"] for row in rows for alternative in row],
    )


def _checked_rows(entry: Any, position: int) -> Sequence[Any]:
    """The alternatives of one token, none for null; raises where the form is wrong."""
    where = f"logprobs.content[{position}]"
    if not is_mapping(entry) or "logprob" not in entry:
        raise LogprobsMalformed(f"{where} must be an object with a logprob; found {outline(entry)}")
    row = entry.get("top_logprobs")
    if row is None:
        return ()
    if not is_list(row):
        raise LogprobsMalformed(f"{where}.top_logprobs must be a list; found {outline(row)}")
    for rank, alternative in enumerate(row):
        if not is_mapping(alternative) or "logprob" not in alternative:
            found = outline(alternative)
            raise LogprobsMalformed(f"{where}.top_logprobs[{rank}] must be an object with a logprob; found {found}")
    return row


def _read_legacy(payload: Json) -> Read:
    """The numbers of the completions form; ``top_logprobs`` may be null, as a whole or token by token."""
    drawn: Any = payload["token_logprobs"]
    if not is_list(drawn):
        raise LogprobsMalformed(f"logprobs.token_logprobs must be a list; found {outline(drawn)}")
    rows: Any = payload.get("top_logprobs") or [None] * len(drawn)
    if not is_list(rows) or len(rows) != len(drawn):
        raise LogprobsMalformed(
            f"logprobs.top_logprobs must have {len(drawn)} items, one a token; found {outline(rows)}"
        )
    for position, row in enumerate(rows):
        if row is not None and not is_mapping(row):
            raise LogprobsMalformed(f"logprobs.top_logprobs[{position}] must be an object; found {outline(row)}")
    values = [list(row.values()) if row else [] for row in rows]
    return Read(drawn, [len(row) for row in values], [value for row in values for value in row])


def _arrays(read: Read) -> tuple[Floats, Floats]:
    """``(T,)`` drawn with NaN for masked, ``(T, K)`` alternatives with -inf for masked and padding."""
    n_tokens, width = len(read.drawn), _width(read.sizes)
    numbers = _floats([*read.drawn, *read.alternatives], lambda number: _name(read, number))
    drawn, flat = numbers[:n_tokens], numbers[n_tokens:]
    if not numbers.min() > MASKED:  # or one is NaN
        drawn, flat = np.where(drawn > MASKED, drawn, np.nan), np.where(flat > MASKED, flat, -np.inf)
    if min(read.sizes) == max(read.sizes):
        return drawn, flat.reshape(-1, width)
    alternatives = np.full((n_tokens, width), -np.inf)
    sizes = np.array(read.sizes)
    if sizes.max() > width:
        flat, sizes = _cut(flat, sizes, width)
    alternatives[np.arange(width) < sizes[:, None]] = flat
    return drawn, alternatives


def _width(sizes: Sequence[int]) -> int:
    """How many alternatives to keep of each token: all, unless single rows are far wider than the others.

    Rows are padded to the widest, so that one of a million alternatives would multiply the memory of a response.
    """
    widest = max(sizes)
    return widest if widest <= _USUAL_WIDTH else min(widest, max(_USUAL_WIDTH, 4 * int(np.median(sizes))))


def _cut(flat: Floats, sizes: NDArray[np.int64], width: int) -> tuple[Floats, NDArray[np.int64]]:
    """The alternatives, token after token, of which none has more than the ``width`` largest."""
    rows = np.split(flat, np.cumsum(sizes)[:-1])
    kept = [row if len(row) <= width else np.partition(row, len(row) - width)[-width:] for row in rows]
    return np.concatenate(kept), np.minimum(sizes, width)


def _name(read: Read, number: int) -> str:
    """Which of the numbers of a payload it is."""
    if number < len(read.drawn):
        return f"the logprob of token {number}"
    owner = np.searchsorted(np.cumsum(read.sizes), number - len(read.drawn), side="right")
    return f"an alternative of token {owner}"


def _floats(values: list[Any], name: Callable[[int], str]) -> Floats:
    """The values as float64, None as NaN; raises for anything that is no log-probability."""
    numbers = _only_floats(values)
    if numbers is None:
        for number, value in enumerate(values):
            if not isinstance(value, float | int | NoneType) or isinstance(value, bool):
                raise LogprobsMalformed(f"{name(number)} must be a number or null; found {quoted(value, 60)}")
        try:
            numbers = np.array(values, dtype=np.float64)
        except OverflowError as error:
            raise LogprobsMalformed("a log-probability is too large for a float") from error
    if np.fmax.reduce(numbers) > HIGHEST_LOGPROB:  # NaN is left out
        above = int(np.nanargmax(numbers))
        raise LogprobsMalformed(
            f"{name(above)} is {numbers[above]:.4g}, but a log-probability is never above 0; are these logits? "
            "vLLM: --logprobs-mode raw_logprobs"
        )
    return numbers


def _only_floats(values: list[Any]) -> Floats | None:
    """The values as float64; None if one is anything else.

    MessagePack writes each as a tag and eight bytes, five times as fast as numpy reads a list, and the tags say what
    the values are.
    """
    try:
        encoded = msgspec.msgpack.encode(values)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None
    n_values = len(values)
    start = 1 if n_values < 1 << 4 else 3 if n_values < 1 << 16 else 5
    if len(encoded) != start + 9 * n_values or encoded[start::9].count(0xCB) != n_values:
        return None
    return np.ndarray(n_values, ">f8", encoded, start + 1, (9,)).astype(np.float64)


def _drop_repeats(entries: Callable[[], Sequence[Any]], drawn: Floats, alternatives: Floats, sizes: list[int]) -> None:
    """Let a drawn token that is listed twice count once, in place.

    vLLM's second model runner lists it as drawn and once more by rank. Two entries are the same token only if they
    agree in everything: different special tokens may share their text, and rounded logits may give ties.
    """
    listed = (alternatives == drawn[:, None]).sum(axis=1)
    if listed.max() < 2 or not (content := entries()):
        return
    for position in np.flatnonzero(listed > 1).tolist():
        entry = content[position]
        if len(entry["top_logprobs"]) > alternatives.shape[1]:
            continue  # cut, and no longer in the order of the payload
        fields = {key: value for key, value in entry.items() if key != "top_logprobs"}
        same = [rank for rank, other in enumerate(entry["top_logprobs"]) if other.items() <= fields.items()]
        alternatives[position, same[1:]] = -np.inf
        sizes[position] -= len(same[1:])


def _confidences(alternatives: Floats) -> Floats:
    """Minus the mean of the log-probabilities that are present, ``(T,)``; NaN where none is."""
    totals = alternatives.sum(axis=1)
    if totals.min() > -np.inf:
        return -totals / alternatives.shape[1]
    present = alternatives > -np.inf
    counts = present.sum(axis=1)
    totals = -np.where(present, alternatives, 0.0).sum(axis=1)
    return np.divide(totals, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def is_mapping(value: Any) -> TypeGuard[Json]:
    """Tell whether a value is a JSON object."""
    return isinstance(value, (dict, Mapping))  # most are, and that is seen at once


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Tell whether a value is a JSON array."""
    return isinstance(value, list)


def outline(value: Any) -> str:
    """Describe in a few words what was found."""
    if is_mapping(value):
        error = f" (error: {quoted(value['error'], 200)})" if value.get("error") else ""
        return f"an object with keys {sorted(map(str, value))[:8]}{error}"
    if is_list(value):
        return f"a list of {len(value)}"
    return f"{type(value).__name__} {quoted(value, 60)}"
