"""The state schema as a public interface: JSON, schemas, other classes, agents in parallel."""

import base64
import json
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
from helpers.adding import ASK, THREAD, add, two_steps
from hypothesis import given, strategies as st
from langchain_core.messages import AnyMessage, BaseMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.message import add_messages
from pydantic import BaseModel

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.packing import _as_bytes, _as_text
from ec_agents.agents.state import CentroidState
from ec_agents.errors import ConfigError
from ec_agents.testing import Reply, ScriptedChatModel


def agent_of(**options: Any) -> Any:
    return create_centroid_agent(ScriptedChatModel(replies=two_steps()), [add], n=3, **options)


def test_json_schemas():
    """Input and output have JSON schemas."""
    agent = agent_of()
    assert {"messages", "ec_candidates", "ec_decision"} <= agent.get_output_jsonschema()["properties"].keys()
    assert "messages" in agent.get_input_jsonschema()["properties"]


def test_history_is_json():
    """Every state of a run can be sent as JSON."""
    agent = agent_of(checkpointer=InMemorySaver())
    agent.invoke(ASK, THREAD)
    states = [found.values for found in agent.get_state_history(THREAD)]
    assert any(state.get("ec_candidates") for state in states)
    json.dumps(states, default=lambda value: value.model_dump() if isinstance(value, BaseMessage) else 1 / 0)


class Pydantic(BaseModel):
    messages: Annotated[list[AnyMessage], add_messages]
    ec_candidates: dict[str, Any] | None = None
    ec_decision: dict[str, Any] | None = None


@dataclass
class Dataclass:
    messages: Annotated[list[AnyMessage], add_messages] = field(default_factory=list)
    ec_candidates: dict[str, Any] | None = None
    ec_decision: dict[str, Any] | None = None


@pytest.mark.parametrize("schema", [Pydantic, Dataclass])
def test_other_classes(schema: Any):
    """The state may be a pydantic model or a dataclass."""
    state = agent_of(state_schema=schema).invoke(ASK)
    assert [message.type for message in state["messages"]] == ["human", "ai", "tool", "ai"]
    assert state["messages"][-1].text == "it is 3"


@pytest.mark.parametrize("schema", [MessagesState, int, "CentroidState"])
def test_schemas_without_our_keys(schema: Any):
    """A schema that would lose the candidates is refused when the agent is made."""
    with pytest.raises(ConfigError, match="state_schema"):
        agent_of(state_schema=schema)


def test_agents_in_parallel():
    """Two agents work at the same time in one graph with their state."""

    def one(text: str) -> Any:
        return create_centroid_agent(ScriptedChatModel(replies=[Reply(content=text)] * 2), n=2, name=text)

    graph: Any = StateGraph(CentroidState)
    graph.add_node("a", one("a")).add_node("b", one("b"))
    graph.add_edge(START, "a").add_edge(START, "b").add_edge("a", END).add_edge("b", END)
    state = graph.compile(checkpointer=InMemorySaver()).invoke(ASK, THREAD)
    assert [message.text for message in state["messages"][1:]] == ["a", "b"]


@given(st.binary(max_size=50))
def test_base_85(data: bytes):
    """The text is what ``base64.b85encode`` writes."""
    assert _as_text(data) == base64.b85encode(data).decode()
    assert _as_bytes(_as_text(data)) == data
