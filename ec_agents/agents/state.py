"""The state of the graph: its schema, and the form in which candidates wait in it between sampling and scoring.

Everything in the state is JSON, so that checkpointers, HTTP servers and traces can hold it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast, get_type_hints

from langchain_core.messages import AnyMessage, message_to_dict, messages_from_dict
from langgraph.channels import EphemeralValue, LastValue
from langgraph.errors import InvalidUpdateError
from langgraph.graph.message import add_messages
from pydantic import BaseModel

# pydantic describes no other TypedDict before Python 3.12.
from typing_extensions import TypedDict

from ec_agents.agents.packing import packed, planes, reading_state, signals_of, unpacked
from ec_agents.agents.step import describe_failure, without_logprobs
from ec_agents.candidates import FORMAT, Candidate, CandidateSet
from ec_agents.errors import ConfigError, FailedCall, StateError

Row = dict[str, Any]


class _Latest(LastValue[Any]):
    """The last value of a superstep; agents that run in parallel in one graph may each write one."""

    def update(self, values: Sequence[Any]) -> bool:
        return super().update(values[-1:])


class _Candidates(LastValue[Any]):
    """The candidates of one sampling node; agents that run in parallel in one graph each clear theirs."""

    def update(self, values: Sequence[Any]) -> bool:
        found = [value for value in values if value is not None]
        if len(found) > 1:
            raise InvalidUpdateError(
                f"{len(found)} sampling nodes wrote {self.key!r} in the same superstep; compile each agent as a graph "
                "of its own and add these graphs as nodes"
            )
        return super().update(found or values[-1:])


class CentroidState(TypedDict, total=False):
    """The state that the nodes work on; extend it with keys of your own."""

    messages: Annotated[list[AnyMessage], add_messages]
    """The conversation; of the candidates of each step, only the chosen one."""
    llm_input_messages: Annotated[list[AnyMessage], EphemeralValue]
    """Messages that a node before ``sample`` wrote for the model: used once, in place of ``messages``."""
    ec_candidates: Annotated[dict[str, Any] | None, _Candidates]
    """Between ``sample`` and ``score``: the packed candidates, which ``unpack_candidates`` reads. Otherwise None."""
    ec_decision: Annotated[dict[str, Any], _Latest]
    """After ``score``: the selection, and what each candidate would have done."""


def state_value(state: Any, key: str) -> Any:
    """Return a value of a state that is a dict, a dataclass or a pydantic model; None where it has none."""
    return cast("Any", state).get(key) if isinstance(state, Mapping) else getattr(state, key, None)


def check_state_schema(schema: Any, *, hook: bool) -> None:
    """Refuse a state schema that lacks a key: LangGraph would drop what is written to it.

    Args:
        schema: The class of the state.
        hook: Whether a node before ``sample`` may write ``llm_input_messages``.

    Raises:
        ConfigError: It is no class with annotated fields, or a key is missing.
    """
    is_class = isinstance(schema, type)
    if not is_class or not (dataclasses.is_dataclass(schema) or issubclass(schema, dict | BaseModel)):
        raise ConfigError(f"state_schema must be a TypedDict, a dataclass or a pydantic model; found {schema!r}")
    needed = ("messages", "ec_candidates", "ec_decision", *(["llm_input_messages"] if hook else []))
    known = get_type_hints(cast("Any", schema))
    missing = [key for key in needed if key not in known]
    if missing:
        raise ConfigError(
            f"state_schema {schema.__name__} has no {', '.join(missing)}: extend CentroidState, or declare the fields "
            "as it does, each with a default"
        )


def pack_candidates(drawn: CandidateSet) -> dict[str, Any]:
    """Return candidates, their messages without log-probabilities, and the failures, as JSON for the state."""
    rows = [(c.to_builtins(), message_to_dict(without_logprobs(drawn.messages[c.index]))) for c in drawn.candidates]
    signals = [row.pop("signals") for row, _ in rows]
    lengths = [None if found is None else len(found) for found in signals]
    return {
        "format": FORMAT,
        "failures": {str(i): describe_failure(failure) for i, failure in drawn.failures.items()},
        "spent": dict(drawn.spent),
        "waves": list(drawn.waves),
        "stopped": drawn.stopped,
        "packed": packed(rows, lengths, *planes([found or b"" for found in signals])),
    }


def unpack_candidates(state: Mapping[str, Any] | None) -> CandidateSet:
    """Undo ``pack_candidates``; failures come back as ``FailedCall``.

    Raises:
        StateError: There are no candidates, another version packed them, or they are damaged.
    """
    if not state:
        raise StateError(
            "no candidates found in the state (ec_candidates): a SamplingNode must run before this node, and the state "
            "schema needs the keys of CentroidState"
        )
    if state.get("format") != FORMAT:
        raise StateError(
            f"candidates in format {state.get('format')!r} found in the state, {FORMAT} needed: another version of "
            "ec_agents wrote this checkpoint; finish the run with that version, or start the step again"
        )
    with reading_state():
        rows, lengths, *found = unpacked(state.get("packed"), list[tuple[Row, Row]], list[int | None], *[bytes] * 4)
        signals = signals_of(found, [length or 0 for length in lengths])
        known = [None if length is None else s for s, length in zip(signals, lengths, strict=True)]
        candidates = [Candidate.from_builtins({**row, "signals": s}) for (row, _), s in zip(rows, known, strict=True)]
        messages = messages_from_dict([message for _, message in rows])
        return CandidateSet(
            candidates=candidates,
            messages={c.index: message for c, message in zip(candidates, messages, strict=True)},
            failures={int(i): FailedCall(text) for i, text in state.get("failures", {}).items()},
            spent=state.get("spent", {}),
            waves=state.get("waves", ()),
            stopped=state.get("stopped", ""),
        )
