"""Whatever a server writes into a message makes one flawed candidate at most, never the end of a step."""

# pyright: reportUnknownMemberType=false

import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import PrivateAttr

from ec_agents.agents.chat_model import CentroidChatModel
from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.middleware import EntropyCentroidMiddleware
from ec_agents.agents.packing import LARGEST_STATE, _as_text, packed, unpacked
from ec_agents.agents.state import pack_candidates, unpack_candidates
from ec_agents.candidates import CandidateSet
from ec_agents.errors import StateError
from ec_agents.messages import SIGNALS_KEY, message_candidate
from ec_agents.testing import profile_logprobs


def nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


HUGE = 10**30
DEEP = nested(3000)
HALF = "st\ud800op"
LOGPROBS = profile_logprobs("!...")


def call(args: Any) -> dict[str, Any]:
    return {"name": "f", "args": {"x": args}, "id": "1", "type": "tool_call"}


def said(**metadata: Any) -> dict[str, Any]:
    return {"content": "hostile", "response_metadata": {"finish_reason": "stop", "logprobs": LOGPROBS, **metadata}}


FLAWED: dict[str, tuple[dict[str, Any], str]] = {
    "deep arguments": ({**said(), "tool_calls": [call(DEEP)]}, "invalid_action"),
    "huge argument": ({**said(), "tool_calls": [call(HUGE)]}, "invalid_action"),
    "finish_reason dict": (said(finish_reason={"type": "stop"}), "interrupted"),
    "finish_reason deep": (said(finish_reason=DEEP), "interrupted"),
    "finish_reason list": (said(finish_reason=["stop"]), "interrupted"),
    "finish_reason bool": (said(finish_reason=True), "interrupted"),
    "finish_reason number": (said(finish_reason=1), "interrupted"),
    "finish_reason half a pair": (said(finish_reason=HALF), "interrupted"),
    "error": (said(error={"code": 502, "message": HALF}), "interrupted"),
    "refusal deep": ({**said(), "additional_kwargs": {"refusal": DEEP}}, "refused"),
    "signals text": (said(**{SIGNALS_KEY: "packed"}), "no_signal"),
    "signals list": (said(**{SIGNALS_KEY: [1]}), "no_signal"),
    "signals number": (said(**{SIGNALS_KEY: {"packed": 5, "n_alternatives": 3}}), "no_signal"),
    "signals K": (said(**{SIGNALS_KEY: {"packed": "A" * 16, "n_alternatives": "20"}}), "no_signal"),
    "signals huge K": (said(**{SIGNALS_KEY: {"packed": "A" * 16, "n_alternatives": HUGE}}), "no_signal"),
    "signals excess": (said(**{SIGNALS_KEY: {"packed": "A" * 16, "n_alternatives": 2, "excess": "x"}}), "no_signal"),
    "signals missing": (said(**{SIGNALS_KEY: {"missing": DEEP}}), "no_signal"),
    "logprobs deep": (said(logprobs=DEEP), "no_signal"),
    "logprobs number": (said(logprobs={"content": [{"logprob": HUGE, "top_logprobs": []}]}), "no_signal"),
}
"""Messages, and the flaw that each has."""
HARMLESS: dict[str, dict[str, Any]] = {
    "huge fingerprint": said(system_fingerprint=HUGE),
    "deep fingerprint": said(system_fingerprint=DEEP),
    "huge usage": said(token_usage={"prompt_tokens": HUGE}),
    "half a pair": {**said(model_name=HALF), "content": HALF},
    "deep keywords": {**said(), "additional_kwargs": {"parsed": DEEP}},
    "metadata keys": said(**{HALF: 1}),
    "usage": {**said(), "usage_metadata": {"input_tokens": HUGE, "output_tokens": 1, "total_tokens": HUGE}},
    "content blocks": {
        **said(),
        "content": [{"type": "text"}, {"type": HALF, "a": DEEP}, {"type": "text", "text": None}],
    },
}
EVERY = {**{name: message for name, (message, _) in FLAWED.items()}, **HARMLESS}


class Answers(BaseChatModel):
    """Answers with messages in turn, whatever is asked."""

    _messages: list[AIMessage] = PrivateAttr()
    _calls: int = PrivateAttr(default=0)

    def __init__(self, messages: Sequence[AIMessage]) -> None:
        super().__init__()
        self._messages = list(messages)

    @property
    def _llm_type(self) -> str:
        return "answers"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        message = self._messages[self._calls % len(self._messages)]
        self._calls += 1
        return ChatResult(generations=[ChatGeneration(message=message.model_copy())])


def graph(model: Answers, n: int) -> AIMessage:
    agent = create_centroid_agent(model, n=n, top_logprobs=None, checkpointer=InMemorySaver(), interrupt_before=[])
    config: Any = {"configurable": {"thread_id": "a"}}
    agent.invoke({"messages": [HumanMessage("hi")]}, config)
    return agent.get_state(config).values["messages"][-1]


def middleware(model: Answers, n: int) -> AIMessage:
    centroid = EntropyCentroidMiddleware(n=n, top_logprobs=None, durable=True)
    agent = create_agent(model, middleware=[centroid], checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "a"}}
    agent.invoke({"messages": [HumanMessage("hi")]}, config)
    return agent.get_state(config).values["messages"][-1]


def chat_model(model: Answers, n: int) -> AIMessage:
    return CentroidChatModel(model, n=n, top_logprobs=None).invoke("hi")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("front_end", [graph, middleware, chat_model])
def test_hostile_message_costs_one_candidate(name: str, front_end: Any):
    """Beside sound ones it is one candidate, flawed where it cannot be what was meant, and the step ends."""
    sound = AIMessage("sound", response_metadata={"finish_reason": "stop", "logprobs": LOGPROBS})
    chosen = front_end(Answers([AIMessage(**EVERY[name]), sound, sound]), 3)
    record = chosen.response_metadata["ec_agents"]
    assert len(record["scores"]) == 3
    assert not any(record["failures"])
    if name in FLAWED:
        assert chosen.content == "sound"
        [flaws] = [found for found in record["flaws"] if found]
        assert FLAWED[name][1] in flaws


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"deep arguments", "huge argument"}))
@pytest.mark.parametrize("front_end", [graph, middleware, chat_model])
def test_nothing_but_hostile_messages(name: str, front_end: Any):
    """One of them is chosen, and goes into a checkpoint."""
    assert "ec_agents" in front_end(Answers([AIMessage(**EVERY[name])]), 2).response_metadata


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just(HALF)
    | st.builds(nested, st.just(3000))
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
METADATA = st.dictionaries(
    st.sampled_from(
        ["finish_reason", "stop_reason", "logprobs", SIGNALS_KEY, "error", "token_usage", "object", "status"]
    ),
    VALUES,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(METADATA, st.dictionaries(st.sampled_from(["refusal", "parsed"]), VALUES), st.dictionaries(st.text(), VALUES))
def test_any_message_becomes_a_candidate_that_a_checkpoint_holds(metadata: Any, more: Any, args: Any):
    message = AIMessage(
        "text",
        response_metadata=metadata,
        additional_kwargs=more,
        tool_calls=[{"name": "f", "args": args, "id": "1", "type": "tool_call"}],
    )
    candidate = message_candidate(message, 0)
    restored = unpack_candidates(pack_candidates(CandidateSet(candidates=[candidate], messages={0: message})))
    again = restored.candidates[0].to_builtins()
    assert str(again) == str(candidate.to_builtins())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_state_is_a_state_error(data: st.DataObject):
    """A changed character, or a changed field of what is packed, is read or raises StateError."""
    message = AIMessage(**said())
    candidate = message_candidate(message, 0)
    state = pack_candidates(CandidateSet(candidates=[candidate], messages={0: message}))
    if data.draw(st.booleans()):
        text = state["packed"]
        at = data.draw(st.integers(0, len(text) - 1))
        state["packed"] = text[:at] + data.draw(st.characters()) + text[at + 1 :]
    else:
        [[[fields, stored]], lengths, *planes] = unpacked(state["packed"], list[Any], list[Any], *[bytes] * 4)
        place = data.draw(st.sampled_from([fields, stored, stored["data"]]))
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(VALUES)
        lengths[0] = data.draw(VALUES | st.just(lengths[0]))
        state["packed"] = packed([(fields, stored)], lengths, *planes)
    with suppress(StateError):
        unpack_candidates(state)


def test_state_that_expands_without_end():
    """A few bytes that stand for gigabytes are refused before they are written out."""
    bomb = zlib.compressobj(9)
    data = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(LARGEST_STATE >> 20)) + bomb.compress(b"1")
    with pytest.raises(StateError, match=f"more than {LARGEST_STATE} bytes"):
        unpacked(_as_text(msgspec.msgpack.encode([data + bomb.flush()])), list[Any])
