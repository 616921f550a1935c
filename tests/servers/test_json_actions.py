"""Actions as JSON: the schema, answers back to tool calls, conversations as text."""

import json
from typing import Any, Literal

import pytest
from helpers.adding import add
from hypothesis import given, strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel

from ec_agents.errors import ActionError, ConfigError
from ec_agents.servers.json_actions import JsonActions, strict_schema


class Place(BaseModel):
    name: str
    note: str | None = None


def search(
    query: str,
    limit: int = 10,
    kind: Literal["web", "news"] = "web",
    places: list[Place] | None = None,
    options: dict[str, Any] | None = None,
) -> str:
    """Search for something."""
    return query


ACTIONS = JsonActions([search, add])


def written(action: Any, thought: str = "hm") -> AIMessage:
    return AIMessage(json.dumps({"thought": thought, "action": action}))


def objects(schema: Any) -> list[dict[str, Any]]:
    """All objects within a schema."""
    if isinstance(schema, list):
        return [found for part in schema for found in objects(part)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if "properties" in schema and isinstance(schema.get("properties"), dict) else []
    return [*own, *(found for value in schema.values() for found in objects(value))]


def closed(schema: Any) -> bool:
    return all(
        found["additionalProperties"] is False and found["required"] == list(found["properties"])
        for found in objects(schema)
    )


def test_the_schema_is_strict_and_begins_with_the_thought():
    form = ACTIONS.response_format
    assert form["type"] == "json_schema"
    assert form["json_schema"]["strict"] is True
    schema = form["json_schema"]["schema"]
    assert list(schema["properties"]) == ["thought", "action"]
    assert [next(iter(kind["properties"])) for kind in kinds(form)] == ["tool", "tool", "calls", "final_answer"]
    assert closed(schema)
    assert "$ref" not in json.dumps(schema)
    assert "default" not in json.dumps(schema)


def kinds(form: Any) -> list[dict[str, Any]]:
    return form["json_schema"]["schema"]["properties"]["action"]["anyOf"]


@pytest.mark.parametrize(
    ("choice", "parallel", "expected"),
    [
        (None, False, ["search", "add", "final_answer"]),
        ("auto", True, ["search", "add", "calls", "final_answer"]),
        ("required", True, ["search", "add", "calls"]),
        ("any", False, ["search", "add"]),
        (True, False, ["search", "add"]),
        ({"type": "any"}, False, ["search", "add"]),
        ("add", True, ["add"]),
        ({"type": "function", "function": {"name": "add"}}, True, ["add"]),
        ({"type": "tool", "name": "add"}, True, ["add"]),
        ("none", True, ["final_answer"]),
    ],
)
def test_the_choice_of_tools_leaves_the_actions_that_it_allows(choice: Any, parallel: Any, expected: list[str]):
    actions = JsonActions([search, add], choice=choice, parallel=parallel)
    found = kinds(actions.response_format)
    names = [kind["properties"].get("tool", {"enum": list(kind["properties"])})["enum"][0] for kind in found]
    assert names == expected
    system = actions.encode([HumanMessage("hi")])[0].text
    assert ("calls" in system, "final_answer" in system) == ("calls" in expected, "final_answer" in expected)
    assert ('"tool": "search"' in system) == ("search" in expected)


def test_a_choice_of_an_unknown_tool_is_refused():
    with pytest.raises(ConfigError, match="'sub'; bound are search, add"):
        JsonActions([search, add], choice="sub")


class Sum(BaseModel):
    """A sum."""

    value: int
    note: str | None = None


RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "Sum", "schema": Sum.model_json_schema()}}


@pytest.mark.parametrize("answer", [RESPONSE_FORMAT, Sum])
def test_the_final_answer_may_have_a_schema_of_its_own(answer: Any):
    actions = JsonActions([add], answer=answer)
    schema = kinds(actions.response_format)[-1]["properties"]["final_answer"]
    assert closed(schema)
    assert list(schema["properties"]) == ["value", "note"]
    message = actions.decode(written({"final_answer": {"value": 3, "note": None}}))
    assert json.loads(message.text) == {"value": 3}
    shown = json.loads(actions.encode([message])[1].text)
    assert shown["action"] == {"final_answer": {"value": 3}}


@pytest.mark.parametrize("answer", [{"type": "json_object"}, "json", {"json_schema": {}}])
def test_a_response_format_without_a_schema_is_refused(answer: Any):
    with pytest.raises(ConfigError, match="it has a json_schema; found .*action_format='native'"):
        JsonActions([add], answer=answer)


KINDS = st.sampled_from(
    [{"type": "string"}, {"type": "integer", "minimum": 3}, {"enum": ["a", "b"]}, {}, {"type": "object"}]
)
SCHEMAS = st.recursive(
    KINDS,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items}, inner),
        st.builds(lambda a, b: {"anyOf": [a, b, {"type": "null"}]}, inner, inner),
        st.builds(
            lambda properties, take: {
                "type": "object",
                "properties": properties,
                "required": list(properties)[:take],
                "title": "T",
            },
            st.dictionaries(st.sampled_from("abcd"), inner, min_size=1),
            st.integers(0, 3),
        ),
    ),
    max_leaves=8,
)


@given(SCHEMAS)
def test_any_schema_becomes_strict(schema: Any):
    strict = strict_schema(schema)
    assert closed(strict)
    text = json.dumps(strict)
    assert '"title"' not in text
    assert '"minimum"' not in text


def test_an_action_becomes_a_tool_call():
    message = ACTIONS.decode(written({"tool": "add", "arguments": {"a": 1, "b": 2}}, "easy"))
    [call] = message.tool_calls
    assert (call["name"], call["args"], message.content) == ("add", {"a": 1, "b": 2}, "easy")
    assert call["id"]
    assert ACTIONS.decode(written({"tool": "add", "arguments": {}})).tool_calls[0]["id"] != call["id"]


def test_arguments_come_back_as_the_tool_wants_them():
    arguments = {
        "query": "ec",
        "limit": None,
        "kind": "news",
        "places": [{"name": "Oslo", "note": None}],
        "options": '{"deep": {"er": [1]}}',
    }
    [call] = ACTIONS.decode(written({"tool": "search", "arguments": arguments})).tool_calls
    assert call["args"] == {
        "query": "ec",
        "kind": "news",
        "places": [{"name": "Oslo"}],
        "options": {"deep": {"er": [1]}},
    }
    assert tool(search).invoke({**call, "type": "tool_call"}).content == "ec"


def test_several_calls_at_once():
    calls = [{"tool": "add", "arguments": {"a": 1, "b": 2}}, {"tool": "search", "arguments": {"query": "q"}}]
    message = ACTIONS.decode(written({"calls": calls}, "both"))
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [
        ("add", {"a": 1, "b": 2}),
        ("search", {"query": "q"}),
    ]
    assert len({call["id"] for call in message.tool_calls}) == 2
    assert json.loads(ACTIONS.encode([message])[1].text) == {"thought": "both", "action": {"calls": calls}}


def test_text_that_is_no_json_stays_text():
    [call] = ACTIONS.decode(written({"tool": "search", "arguments": {"query": "q", "options": "{"}})).tool_calls
    assert call["args"] == {"query": "q", "options": "{"}


def test_final_answer():
    """It becomes the content and keeps its thought."""
    message = ACTIONS.decode(written({"final_answer": "it is 3"}, "done"))
    assert (message.content, message.tool_calls) == ("it is 3", [])
    assert message.additional_kwargs["thought"] == "done"


def test_what_else_a_message_carries_stays():
    given_ = written({"final_answer": "3"}).model_copy(
        update={"response_metadata": {"logprobs": {"content": []}}, "id": "7", "usage_metadata": None}
    )
    message = ACTIONS.decode(given_)
    assert message.response_metadata == {"logprobs": {"content": []}}
    assert message.id == "7"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "it is 3",
        "[]",
        '{"thought": "x"}',
        '{"action": 3}',
        '{"action": {}}',
        '{"action": {"tool": 1}}',
        '{"action": {"calls": []}}',
        '{"action": {"calls": {"tool": "add"}}}',
        '{"action": {"calls": [{"tool": "add"}, 3]}}',
        '{"a',
    ],
)
def test_anything_else_is_an_error_that_says_what_to_do(text: str):
    with pytest.raises(ActionError, match="action_format='native'"):
        ACTIONS.decode(AIMessage(text))


@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.text(),
        lambda v: (
            st.lists(v)
            | st.dictionaries(st.sampled_from(["action", "tool", "calls", "arguments", "thought", "final_answer"]), v)
        ),
    ).map(json.dumps)
)
def test_any_text_is_an_answer_or_the_typed_error(text: str):
    try:
        message = ACTIONS.decode(AIMessage(text))
    except ActionError:
        return
    assert message.tool_calls or "thought" in message.additional_kwargs


@pytest.mark.parametrize(
    "message",
    [
        AIMessage('{"thought": "I', response_metadata={"finish_reason": "length"}),
        AIMessage("", additional_kwargs={"refusal": "no"}),
    ],
)
def test_cut_off_and_refused_answers_stay_as_they_are(message: AIMessage):
    assert ACTIONS.decode(message) is message


def conversation() -> list[Any]:
    calls = [{"name": "add", "args": {"a": 1, "b": 2}, "id": "1"}, {"name": "add", "args": {"a": 3, "b": 4}, "id": "2"}]
    return [
        SystemMessage("be brief"),
        HumanMessage("add"),
        AIMessage("thinking", tool_calls=calls),
        ToolMessage("3", tool_call_id="1", name="add"),
        ToolMessage("no such number", tool_call_id="2", name="add", status="error"),
        AIMessage("3 and no", additional_kwargs={"thought": "done"}),
        HumanMessage("thanks"),
    ]


def test_a_conversation_is_sent_as_text_in_turns():
    system, *rest = ACTIONS.encode(conversation())
    assert system.text.startswith("be brief\n\nAnswer with one JSON object")
    assert '{"tool": "add", "description": "Add two numbers."' in system.text
    assert [type(m).__name__ for m in rest] == [
        "HumanMessage",
        "AIMessage",
        "HumanMessage",
        "AIMessage",
        "HumanMessage",
    ]
    assert not any(m.tool_calls for m in rest if isinstance(m, AIMessage))
    acted = json.loads(rest[1].text)
    assert acted["thought"] == "thinking"
    assert [call["arguments"] for call in acted["action"]["calls"]] == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert rest[2].content == "Result of add: 3\nError of add: no such number"
    assert json.loads(rest[3].text) == {"thought": "done", "action": {"final_answer": "3 and no"}}


def test_what_the_model_wrote_is_what_it_is_shown():
    for action in ({"tool": "add", "arguments": {"a": 1, "b": 2}}, {"final_answer": "3"}):
        message = written(action)
        assert ACTIONS.encode([ACTIONS.decode(message)])[1].content == message.content


def test_without_a_system_message_the_instructions_come_first():
    system, human = ACTIONS.encode([HumanMessage("hi")])
    assert isinstance(system, SystemMessage)
    assert human.content == "hi"


def test_pictures_in_a_result_survive():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    results = [
        ToolMessage("text", tool_call_id="1", name="look"),
        ToolMessage([picture, "seen"], tool_call_id="2", name="look"),
        ToolMessage("more", tool_call_id="3", name="look"),
    ]
    encoded = ACTIONS.encode([HumanMessage("look"), AIMessage("", tool_calls=[]), *results])
    assert len(encoded) == 4
    blocks: Any = encoded[-1].content
    assert picture in blocks
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    assert texts == ["Result of look: text", "Result of look:", "seen", "Result of look:", "more"]


def test_tool_dicts_are_taken_and_tools_of_the_provider_are_not():
    taken = JsonActions([convert_to_openai_tool(add)])
    assert taken.response_format == JsonActions([add]).response_format
    with pytest.raises(ConfigError, match="found 'web_search'.*action_format='native'"):
        JsonActions([{"type": "web_search"}])


def test_tool_schemas():
    """Tools without arguments and tools with shared definitions are described."""

    def now() -> str:
        """The time."""
        return ""

    shared = {
        "type": "function",
        "function": {
            "name": "go",
            "description": "Go.",
            "parameters": {
                "type": "object",
                "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
                "properties": {"to": {"$ref": "#/$defs/Place"}},
                "required": ["to"],
            },
        },
    }
    actions = JsonActions([now, shared])
    assert closed(actions.response_format)
    assert "$ref" not in json.dumps(actions.response_format)
    assert actions.decode(written({"tool": "now", "arguments": {}})).tool_calls[0]["args"] == {}
    assert actions.decode(written({"tool": "go", "arguments": {"to": {"x": 1}}})).tool_calls[0]["args"] == {
        "to": {"x": 1}
    }
