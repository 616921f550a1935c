"""The checks of tool calls, alone and through all three front ends."""

from typing import Any, TypedDict

import pytest
from helpers.adding import ASK, EARLY, LATE, add
from hypothesis import given, settings, strategies as st
from langchain.agents import create_agent
from langchain.agents.structured_output import AutoStrategy, ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage
from langchain_core.tools import StructuredTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel

from ec_agents.agents.chat_model import CentroidChatModel
from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.middleware import EntropyCentroidMiddleware
from ec_agents.agents.tool_calls import ToolChecks, ToolSets
from ec_agents.candidates import Candidate
from ec_agents.testing import Reply, ScriptedChatModel

SCHEMA: Any = {
    "title": "book",
    "description": "Book a flight.",
    "type": "object",
    "properties": {
        "to": {"type": "string", "enum": ["Oslo", "Rome"]},
        "seats": {"type": "integer", "minimum": 1},
        "extras": {"type": "array", "items": {"$ref": "#/$defs/extra"}},
    },
    "required": ["to", "seats"],
    "additionalProperties": False,
    "$defs": {"extra": {"type": "object", "required": ["name"]}},
}
MCP = StructuredTool(name="book", description="Book a flight.", args_schema=SCHEMA, func=lambda **_: "booked")
GOOD: Any = {"to": "Oslo", "seats": 2, "extras": [{"name": "meal"}]}
BAD: list[tuple[Any, str]] = [
    ({"to": "Oslo"}, "'seats' is a required property"),
    ({"to": "Oslo", "seats": "two"}, "seats: 'two' is not of type 'integer'"),
    ({"to": "Bonn", "seats": 1}, "to: 'Bonn' is not one of"),
    ({"to": "Oslo", "seats": 0}, "seats: 0 is less than the minimum"),
    ({**GOOD, "extras": [{}]}, "extras.0: 'name' is a required property"),
    ({**GOOD, "x": 1}, "Additional properties are not allowed"),
]


def problem(tools: Any, name: str, args: Any) -> str | None:
    return ToolChecks(tools).problem(Candidate(index=0, tool_calls=[{"name": name, "args": args}]))


class Book(BaseModel):
    """Book a flight."""

    to: str
    seats: int


class BookDict(TypedDict):
    """Book a flight."""

    to: str
    seats: int


def book(to: str, seats: int) -> str:
    """Book a flight."""
    return to


def nameless(to: str, seats: int) -> str:
    return to


FUNCTION: Any = {"name": "book", "description": "Book.", "parameters": SCHEMA}
FORMS: dict[str, tuple[Any, str]] = {
    "MCP tool": (MCP, "book"),
    "OpenAI": ({"type": "function", "function": FUNCTION}, "book"),
    "OpenAI Responses": ({"type": "function", **FUNCTION}, "book"),
    "Anthropic": ({"name": "book", "input_schema": SCHEMA}, "book"),
    "Bedrock": ({"toolSpec": {"name": "book", "inputSchema": {"json": SCHEMA}}}, "book"),
    "Google": ({"function_declarations": [{"name": "book", "parameters_json_schema": SCHEMA}]}, "book"),
    "JSON schema": (SCHEMA, "book"),
    "function": (book, "book"),
    "function without a description": (nameless, "nameless"),
    "pydantic": (Book, "Book"),
    "TypedDict": (BookDict, "BookDict"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str):
    """The arguments are checked in whatever form the tool is given."""
    tool, name = FORMS[form]
    assert problem([tool], name, {"to": "Oslo", "seats": 2}) is None
    assert "seats" in (problem([tool], name, {"to": "Oslo", "seats": "two"}) or "")
    assert "seats" in (problem([tool], name, {"to": "Oslo"}) or "")
    assert "unknown tool 'x'" in (problem([tool], "x", {}) or "")


PROVIDERS: list[Any] = [
    {"type": "web_search_preview"},
    {"type": "computer_20250124", "name": "computer", "display_width_px": 100},
    {"google_search": {}},
    {"type": "custom", "custom": {"name": "code"}},
    {"function_declarations": [{"name": "look", "parameters": {"type": "OBJECT"}}]},
]


@pytest.mark.parametrize(
    ("tool", "name"),
    list(zip(PROVIDERS, ["web_search_preview", "computer", "google_search", "code", "look"], strict=True)),
)
def test_provider_tools(tool: Any, name: str):
    """A tool of the provider is accepted by name, and switches off no check of the others."""
    assert problem([add, tool], name, {"anything": 1}) is None
    assert "b: Field required" in (problem([add, tool], "add", {"a": 1}) or "")
    assert problem([add, tool], "nope", {}) is not None


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "OBJECT"},
        {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/schema.json"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
        {"type": "object", "properties": 5},
    ],
)
def test_unusable_schema(schema: Any):
    """A schema that cannot be used, or points to another document, accepts every argument."""
    assert problem([{"name": "f", "input_schema": schema}], "f", {"a": "x"}) is None


VALUES = st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)


@given(st.dictionaries(st.sampled_from(["to", "seats", "extras", "x"]), VALUES))
@settings(max_examples=100, deadline=None)
def test_any_arguments(args: Any):
    """Whatever the arguments, they are accepted or explained briefly."""
    found = problem([MCP], "book", args)
    assert found is None or len(found) < 400


def test_made_once():
    """The checks of a set of tools are made once, and again for another set."""
    sets, tools = ToolSets(), [MCP, add]
    assert sets.of(tools) is sets.of([MCP, add])
    assert sets.of(tools) is not sets.of([MCP])


# Front ends


def graph(replies: list[Reply], tools: list[Any]) -> AIMessage:
    return create_centroid_agent(ScriptedChatModel(replies=replies), tools, n=2).invoke(ASK)["messages"][1]


def middleware(replies: list[Reply], tools: list[Any]) -> AIMessage:
    agent = create_agent(ScriptedChatModel(replies=replies), tools, middleware=[EntropyCentroidMiddleware(n=2)])
    return agent.invoke(ASK)["messages"][1]


def chat_model(replies: list[Reply], tools: list[Any]) -> AIMessage:
    return CentroidChatModel(ScriptedChatModel(replies=replies), n=2).bind_tools(tools).invoke("1 + 2?")


FRONT_ENDS = pytest.mark.parametrize("ask", [graph, middleware, chat_model])


def rivals(name: str, bad: Any, good: Any) -> list[Reply]:
    """A flawed candidate with the better score, a sound one, and answers for a second step."""
    action = [Reply(tool_calls=[(name, bad)], profile=EARLY), Reply(tool_calls=[(name, good)], profile=LATE)]
    return [*action, Reply(content="done"), Reply(content="done")]


@FRONT_ENDS
@pytest.mark.parametrize(("bad", "text"), BAD)
def test_json_schema_loses(ask: Any, bad: Any, text: str):
    """Arguments that do not fit the JSON schema of an MCP tool lose, in every front end."""
    message = ask(rivals("book", bad, GOOD), [MCP])
    assert message.tool_calls[0]["args"] == GOOD
    assert text in message.response_metadata["ec_agents"]["flaws"][0]["invalid_action"]


@FRONT_ENDS
@pytest.mark.parametrize("bad", [{"a": "x", "b": 1}, {"a": 1}, {"a": 1.5, "b": 1}])
def test_wrong_type_loses(ask: Any, bad: Any):
    """Arguments of the wrong type lose, in every front end."""
    message = ask(rivals("add", bad, {"a": 1, "b": 2}), [add])
    assert message.tool_calls[0]["args"] == {"a": 1, "b": 2}


@FRONT_ENDS
def test_what_the_tool_accepts(ask: Any):
    """Text that the tool reads as a number is no flaw, in any front end."""
    message = ask(rivals("add", {"a": "1", "b": 2}, {"a": 9, "b": 9}), [add])
    assert message.tool_calls[0]["args"] == {"a": "1", "b": 2}
    assert not any(message.response_metadata["ec_agents"]["flaws"])


@FRONT_ENDS
def test_provider_tool_beside(ask: Any):
    """A provider tool beside the others switches off no check, in any front end."""
    message = ask(rivals("add", {"a": "x", "b": 1}, {"a": 1, "b": 2}), [add, {"type": "web_search_preview"}])
    assert message.tool_calls[0]["args"] == {"a": 1, "b": 2}


def test_bound_form():
    """A chat model that is given tools in their bound form checks them too."""
    model = CentroidChatModel(ScriptedChatModel(replies=rivals("add", {"a": "x", "b": 1}, {"a": 1, "b": 2})), n=2)
    assert model.invoke("?", tools=[convert_to_openai_tool(add)]).tool_calls[0]["args"] == {"a": 1, "b": 2}


@pytest.mark.parametrize("strategy", [ToolStrategy, AutoStrategy])
def test_structured_output_from_a_dict(strategy: Any):
    """Structured output that does not fit a schema given as a dict loses: LangChain does not validate it."""
    replies = rivals("book", {"to": "Oslo", "seats": "two"}, GOOD)
    ours = EntropyCentroidMiddleware(n=2)
    agent = create_agent(ScriptedChatModel(replies=replies), [add], middleware=[ours], response_format=strategy(SCHEMA))
    state: Any = agent.invoke(ASK)
    assert state["structured_response"] == GOOD


def test_structured_output_of_the_provider():
    """So does structured output in the text."""
    replies = [
        Reply(content='{"to": "Oslo", "seats": "two"}', profile=EARLY),
        Reply(content='{"to": "Oslo", "seats": 2}', profile=LATE),
    ]
    ours = EntropyCentroidMiddleware(n=2)
    strategy: Any = ProviderStrategy(SCHEMA)
    agent = create_agent(ScriptedChatModel(replies=replies), [], middleware=[ours], response_format=strategy)
    state: Any = agent.invoke(ASK)
    assert state["structured_response"] == {"to": "Oslo", "seats": 2}
