"""Outgoing messages against ChatOpenAI and against the types of the OpenAI SDK; incoming tool calls."""

import asyncio
from typing import Any, get_args

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    content as blocks,
)
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import TypeAdapter

from ec_agents.errors import ConfigError
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.servers.wire_messages import choice_message, wire_messages
from ec_agents.testing import FaultServer

THEIRS = ChatOpenAI(model="any", api_key="none", base_url="http://127.0.0.1:1/v1", output_version="v0")  # type: ignore[arg-type]
CALL: Any = {"type": "tool_call", "name": "f", "args": {"a": "é"}, "id": "c1"}
BAD: Any = {"type": "invalid_tool_call", "name": "f", "args": "{", "id": "c2", "error": ""}
SOURCE = {"type": "base64", "media_type": "image/png", "data": "AA=="}

BLOCKS: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": "hi"},
    "text of the Responses API": {"type": "text", "text": "hi", "id": "msg_1", "index": 0, "annotations": []},
    "cited text": {"type": "text", "text": "hi", "annotations": [{"type": "citation", "url": "https://x"}]},
    "text-plain": {"type": "text-plain", "text": "a file", "mime_type": "text/plain"},
    "reasoning": {"type": "reasoning", "reasoning": "first this"},
    "refusal": {"type": "refusal", "refusal": "No."},
    "empty refusal": {"type": "refusal"},
    "tool_call": CALL,
    "tool_call_chunk": {"type": "tool_call_chunk", "name": "f", "args": "{", "id": "c1", "index": 0},
    "invalid_tool_call": BAD,
    "server_tool_call": {"type": "server_tool_call", "name": "web_search", "args": {}, "id": "s1"},
    "server_tool_call_chunk": {"type": "server_tool_call_chunk", "name": "web_search", "args": "{", "id": "s1"},
    "server_tool_result": {"type": "server_tool_result", "tool_call_id": "s1", "status": "success", "output": 1},
    "image by url": {"type": "image", "url": "https://x/y.png"},
    "image": {"type": "image", "base64": "AA==", "mime_type": "image/png"},
    "audio": {"type": "audio", "base64": "AA==", "mime_type": "audio/wav"},
    "video": {"type": "video", "url": "https://x/y.mp4"},
    "file": {"type": "file", "base64": "AA==", "mime_type": "application/pdf", "filename": "a.pdf"},
    "file by id": {"type": "file", "file_id": "file-1"},
    "non_standard": {"type": "non_standard", "value": {"type": "redacted_thinking", "data": "xx"}},
    # Of other models and interfaces
    "thinking": {"type": "thinking", "thinking": "first this", "signature": "s"},
    "redacted_thinking": {"type": "redacted_thinking", "data": "xx"},
    "reasoning_content": {"type": "reasoning_content", "reasoning_content": {"text": "first this"}},
    "tool_use": {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": "é"}},
    "function_call": {"type": "function_call", "call_id": "c1", "id": "fc", "name": "f", "arguments": '{"a": "é"}'},
    "code_interpreter_call": {"type": "code_interpreter_call", "id": "ci", "code": "1", "outputs": []},
    "image of Anthropic": {"type": "image", "source": SOURCE},
    "image_url": {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
    "input_audio": {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    "cached text": {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}},
}

BETTER: dict[str, str] = {
    "text of the Responses API": "ChatOpenAI sends its own keys with a user's text",
    "cited text": "ChatOpenAI sends its own keys with a user's text",
    "text-plain": "ChatOpenAI raises ValueError",
    "video": "ChatOpenAI raises ValueError",
    "reasoning": "ChatOpenAI sends it in the messages of a user",
    "empty refusal": "ChatOpenAI sends it in the messages of a user",
    "tool_call": "ChatOpenAI sends it in the messages of a user, and loses a call that only a block holds",
    "tool_call_chunk": "ChatOpenAI sends it raw",
    "invalid_tool_call": "ChatOpenAI sends it in the messages of a user",
    "server_tool_call": "ChatOpenAI sends it raw",
    "server_tool_call_chunk": "ChatOpenAI sends it raw",
    "server_tool_result": "ChatOpenAI sends it raw",
    "non_standard": "ChatOpenAI sends it raw",
    "redacted_thinking": "ChatOpenAI sends it raw",
    "thinking": "ChatOpenAI sends an empty list",
    "reasoning_content": "ChatOpenAI sends an empty list",
    "tool_use": "ChatOpenAI sends an empty list, and loses a call that only a block holds",
    "function_call": "ChatOpenAI sends an empty list, and loses a call that only a block holds",
    "code_interpreter_call": "ChatOpenAI sends an empty list",
    "cached text": "ChatOpenAI drops cache_control in an answer",
}
"""Blocks with which ours differs from ChatOpenAI where they stand alone, and why."""

MESSAGES: dict[str, Any] = {
    "user": HumanMessage,
    "system": SystemMessage,
    "tool": lambda content: ToolMessage(content, tool_call_id="c1", name="f"),
    "assistant": AIMessage,
    "assistant with a call": lambda content: AIMessage(content, tool_calls=[CALL]),
}
EXAMPLES: list[Any] = [
    SystemMessage("be brief"),
    SystemMessage("be brief", additional_kwargs={"__openai_role__": "developer"}),
    HumanMessage("hi", name="Bob"),
    AIMessage("", tool_calls=[CALL], name="agent"),
    AIMessage("", invalid_tool_calls=[BAD]),
    AIMessage("", additional_kwargs={"function_call": {"name": "f", "arguments": "{}"}}),
    AIMessage("", additional_kwargs={"audio": {"id": "audio_1", "data": "AA=="}}),
    AIMessage([{"type": "audio", "id": "audio_1"}, {"type": "text", "text": "hi"}]),
    AIMessage("done", additional_kwargs={"refusal": None, "reasoning_content": "x"}, response_metadata={"a": 1}),
    ToolMessage("42", tool_call_id="c1", name="f"),
    ChatMessage(content="hi", role="critic"),
    FunctionMessage(content="42", name="f"),
]


def theirs(message: BaseMessage) -> Any:
    try:
        return THEIRS._get_request_payload([message])["messages"][0]
    except ValueError as error:
        return error


def test_the_list_holds_every_content_block_of_langchain_core():
    known = {get_args(kind.__annotations__["type"]) for kind in get_args(blocks.ContentBlock)}
    names = {str(name) for args in known for name in (get_args(args[0]) or args)}
    assert {name.split("'")[1] if "'" in name else name for name in names} <= {b["type"] for b in BLOCKS.values()}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: f"{message.type} {message.content!r:.12}")
def test_messages_are_those_of_chat_openai(message: BaseMessage):
    expected = theirs(message)
    found = wire_messages([message])[0]
    assert (
        found == {**expected, "content": [p for p in expected["content"] if p.get("type") != "audio"]}
        if isinstance(expected["content"], list)
        else expected
    )


@pytest.mark.parametrize("role", MESSAGES)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str, role: str):
    """Each block is sent as ChatOpenAI sends it unless it is a listed deviation, and always in a form of the API."""
    (sent,) = wire_messages([MESSAGES[role]([BLOCKS[name]])])
    if name not in BETTER:
        assert sent == theirs(MESSAGES[role]([BLOCKS[name]]))
    assert sent["content"] != []
    if name != "video" and not (role in ("system", "tool", "assistant", "assistant with a call") and "image" in name):
        strict_for_parts(sent)


def strict_for_parts(message: Any) -> None:
    """The types of the SDK take it; they forbid no unknown keys, so that those of LangChain are looked for besides."""
    parts = message["content"] if isinstance(message["content"], list) else []
    kinds = {part["type"] for part in parts}
    assert kinds <= {"text", "refusal", "image_url", "input_audio", "file"}
    assert not any({"id", "index", "annotations", "extras"} & part.keys() for part in parts)
    if kinds <= {"text"} or message["role"] == "user":
        TypeAdapter(ChatCompletionMessageParam).validate_python(message)


def test_deviations_are_deviations():
    """Whatever is listed as better differs from ChatOpenAI in some role; otherwise it does not belong there."""
    for name in BETTER:
        messages = [make([BLOCKS[name]]) for make in MESSAGES.values()]
        assert any(wire_messages([message])[0] != theirs(message) for message in messages), name


@pytest.mark.parametrize("kind", ["tool_call", "tool_use", "function_call"])
def test_a_call_that_only_a_block_holds_is_sent_once(kind: str):
    calls = [{"type": "function", "id": "c1", "function": {"name": "f", "arguments": '{"a": "é"}'}}]
    for message in (AIMessage([BLOCKS[kind]]), AIMessage([BLOCKS[kind]], tool_calls=[CALL])):
        assert wire_messages([message]) == [{"role": "assistant", "content": None, "tool_calls": calls}]


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("hi", additional_kwargs={"reasoning_content": "first this"}),
        AIMessage([BLOCKS["reasoning"], BLOCKS["text"]]),
        AIMessage([BLOCKS["thinking"], BLOCKS["redacted_thinking"], BLOCKS["text"]]),
    ],
)
def test_reasoning_is_sent_back_where_it_is_wanted(message: AIMessage):
    assert wire_messages([message], with_reasoning=True)[0]["reasoning_content"] == "first this"
    assert "reasoning_content" not in wire_messages([message])[0]


@pytest.mark.parametrize(
    ("where", "switch", "sent"),
    [("deepseek", None, True), ("deepseek", False, False), ("", None, False), ("", True, True)],
)
def test_the_table_says_who_needs_reasoning(where: str, switch: bool | None, sent: bool):  # noqa: FBT001
    url = "https://api.deepseek.com" if where else "http://127.0.0.1:1/v1"
    model = OpenAIChatModel(model="deepseek-chat", base_url=url, api_key="none", send_reasoning=switch)  # type: ignore[arg-type]
    answer = AIMessage("", tool_calls=[CALL], additional_kwargs={"reasoning_content": "first this"})
    payload = model._payload([HumanMessage("hi"), answer, ToolMessage("42", tool_call_id="c1")], None, {})
    assert ("reasoning_content" in payload["messages"][1]) is sent


@pytest.mark.parametrize(
    "block",
    [
        {"type": "video", "base64": "AA==", "mime_type": "video/mp4"},
        {"type": "file", "url": "https://x/a.pdf"},
        {"type": "audio", "url": "https://x/a.wav"},
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(block: Any):
    with pytest.raises(ConfigError, match=f"type '{block['type']}' cannot be sent"):
        wire_messages([HumanMessage([block])])


@pytest.mark.parametrize("run", ["sync", "async"])
def test_a_second_step_with_content_blocks_as_output(run: str):
    """With ``output_version="v1"`` the answer of the first step is a list of blocks; the second step sends it back."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    fields = {"role": "assistant", "content": "so", "reasoning_content": "first this", "tool_calls": [call]}
    choice = {"index": 0, "message": fields, "finish_reason": "tool_calls"}
    with FaultServer({"id": "x", "model": "any", "choices": [choice]}) as server:
        model = OpenAIChatModel(model="any", base_url=server.base_url, output_version="v1")
        history: list[Any] = [HumanMessage("hi")]
        for _ in range(2):
            answer = model.invoke(history) if run == "sync" else asyncio.run(model.ainvoke(history))
            history += [answer, ToolMessage("42", tool_call_id="c1")]
        assert isinstance(history[1].content, list)
        sent = server.requests[1]["messages"][1]
        assert sent["tool_calls"] == [call]
        assert sent["content"] == [{"type": "text", "text": "so"}]
        strict_for_parts(sent)


@pytest.mark.parametrize("arguments", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": {}}])
def test_a_call_without_arguments_has_none(arguments: Any):
    message = {
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", **arguments}}],
    }
    found = choice_message({"message": message}, {})
    assert [(call["name"], call["args"]) for call in found.tool_calls] == [("f", {})]
