"""Messages of a chat completion: what a server sends → LangChain's, and LangChain's → what a server takes.

Both directions follow langchain-openai, so that the two can be exchanged; the tests compare them. An ``AIMessage`` of
any other model, in any of LangChain's content forms, is reduced to what a chat completion can hold.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    UsageMetadata,
    convert_to_openai_data_block,
    is_data_content_block,
)
from langchain_core.messages.tool import invalid_tool_call
from langchain_core.output_parsers.openai_tools import parse_tool_call
from pydantic import ValidationError

from ec_agents.errors import ConfigError, LogprobsMalformed

Json = Mapping[str, Any]

_REASONING = {"reasoning": "reasoning", "thinking": "thinking", "reasoning_content": "reasoning_content"}
"""Content blocks that hold reasoning, and the key of its text."""
_CALLS = frozenset(("tool_call", "tool_use", "function_call"))
"""Content blocks that hold a call of one of the user's tools."""
_OF_SERVERS = ("server_tool_call", "server_tool_call_chunk", "server_tool_result", "code_interpreter_call")
_NEVER_SENT = frozenset(
    (*_REASONING, *_CALLS, *_OF_SERVERS, "redacted_thinking", "invalid_tool_call", "tool_call_chunk")
)
"""Content blocks that belong elsewhere in a chat completion, or have no place in one."""
_OF_ASSISTANTS = frozenset(("text", "refusal", "image_url", "input_audio", "file"))
_OF_LANGCHAIN = frozenset(("id", "index", "annotations", "extras"))
"""Keys of LangChain's text blocks that no server knows."""


def choice_message(choice: Json, response: Json) -> AIMessage:
    """Build the message of a choice, as langchain-openai would.

    ``additional_kwargs`` holds a refusal, and the reasoning that some servers send as ``reasoning_content`` or
    ``reasoning``. Tool calls whose arguments cannot be decoded are in ``invalid_tool_calls``.

    Args:
        choice: One of the choices of ``decode_response``; its own ``usage`` takes precedence over the response's.
        response: The other fields of the response.

    Raises:
        LogprobsMalformed: A field has a type that no chat completion has.
    """
    metadata = {name: choice.get(name) for name in ("finish_reason", "logprobs")}
    if choice.get("error"):
        metadata["error"] = choice["error"]
    usage = choice.get("usage", response.get("usage"))
    shared = {
        "token_usage": usage,
        "model_provider": "openai",
        "model_name": response.get("model"),
        "system_fingerprint": response.get("system_fingerprint"),
        **{name: response[name] for name in ("id", "service_tier") if response.get(name)},
    }
    fields: dict[str, Any] = choice["message"]
    try:
        calls = [_read_call(call) for call in fields.get("tool_calls") or ()]
        return AIMessage(
            content=fields.get("content") or "",
            additional_kwargs=_additional(fields),
            name=fields.get("name"),
            tool_calls=[call for call in calls if call["type"] == "tool_call"],
            invalid_tool_calls=[call for call in calls if call["type"] != "tool_call"],
            response_metadata={**shared, **metadata},
            usage_metadata=usage_metadata(usage, response.get("service_tier")) if usage else None,
        )
    except (ValidationError, TypeError, AttributeError, KeyError) as error:
        raise LogprobsMalformed(
            f"the message is not that of a chat completion: {error}; found {fields!r:.300}"
        ) from error


def _additional(message: Json) -> dict[str, Any]:
    """What a message holds besides content and tool calls."""
    kept: dict[str, Any] = {name: message[name] for name in ("function_call", "audio") if message.get(name)}
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    kept |= {"reasoning_content": reasoning} if reasoning else {}
    return {"refusal": message.get("refusal"), **kept}


def _read_call(call: dict[str, Any]) -> Any:
    """A tool call; an invalid one where its arguments are not a JSON object. Without arguments it has none, ``{}``."""
    function: dict[str, Any] = {"arguments": None, **call["function"]}
    arguments: Any = function["arguments"]
    if isinstance(arguments, dict):
        return {
            "name": function["name"],
            "args": cast("dict[str, Any]", arguments),
            "id": call.get("id"),
            "type": "tool_call",
        }
    try:
        parsed = parse_tool_call({**call, "function": function}, return_id=True)
        if parsed is not None and isinstance(parsed["args"], dict):
            return {**parsed, "type": "tool_call"}
        problem = "the arguments are not a JSON object"
    except (ValueError, TypeError, RecursionError) as error:
        problem = str(error)
    return invalid_tool_call(name=function["name"], args=arguments, id=call.get("id"), error=problem)


def usage_metadata(usage: Json, service_tier: object = None) -> UsageMetadata:
    """Convert the usage of a response to LangChain's form; ``priority`` and ``flex`` tokens are counted separately."""
    tier = f"{service_tier}_" if service_tier in ("priority", "flex") else ""
    read: dict[str, Any] = usage.get("prompt_tokens_details") or {}
    written: dict[str, Any] = usage.get("completion_tokens_details") or {}
    inputs, outputs = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    total = usage.get("total_tokens")
    input_details: dict[str, int | None] = {
        "audio": read.get("audio_tokens"),
        f"{tier}cache_read": read.get("cached_tokens"),
        f"{tier}cache_creation": read.get("cache_write_tokens"),
    }
    output_details: dict[str, int | None] = {
        "audio": written.get("audio_tokens"),
        f"{tier}reasoning": written.get("reasoning_tokens"),
    }
    if tier:
        input_details[str(service_tier)] = inputs - (read.get("cached_tokens") or 0)
        output_details[str(service_tier)] = outputs - (written.get("reasoning_tokens") or 0)
    return UsageMetadata(
        input_tokens=inputs,
        output_tokens=outputs,
        total_tokens=inputs + outputs if total is None else total,
        input_token_details=cast("Any", {k: v for k, v in input_details.items() if v is not None}),
        output_token_details=cast("Any", {k: v for k, v in output_details.items() if v is not None}),
    )


def wire_messages(messages: Sequence[BaseMessage], *, with_reasoning: bool = False) -> list[dict[str, Any]]:
    """Convert messages to those of a request.

    Tool calls that could not be decoded are sent back as they came.

    Args:
        messages: The conversation; its answers may be those of any model.
        with_reasoning: Whether the reasoning of answers is sent back, as ``reasoning_content``.

    Raises:
        ConfigError: A content block has no form that a chat completion can hold, or a message no role.
    """
    return [_wire_message(message, with_reasoning=with_reasoning) for message in messages]


def _wire_message(message: BaseMessage, *, with_reasoning: bool) -> dict[str, Any]:
    if isinstance(message, AIMessage):
        return _assistant(message, with_reasoning=with_reasoning)
    content = _content(message.content)
    if isinstance(message, ToolMessage):
        return {"content": content, "role": "tool", "tool_call_id": message.tool_call_id}
    name = message.name or message.additional_kwargs.get("name")
    named = {} if name is None else {"name": str(name)}
    return {"content": content, "role": _role(message), **named}


def _role(message: BaseMessage) -> str:
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, SystemMessage):
        return str(message.additional_kwargs.get("__openai_role__", "system"))
    if isinstance(message, ChatMessage):
        return message.role
    if isinstance(message, FunctionMessage):
        return "function"
    raise ConfigError(f"a message of a known role is needed; found {type(message).__name__}")


def _assistant(message: AIMessage, *, with_reasoning: bool) -> dict[str, Any]:
    """An answer as part of the history: text, refusal, tool calls, and reasoning where the server needs it."""
    fields: dict[str, Any] = {"content": _content(message.content, only=_OF_ASSISTANTS), "role": "assistant"}
    if name := message.name or message.additional_kwargs.get("name"):
        fields["name"] = name
    if calls := _written_calls(message):
        fields |= {"tool_calls": calls, "content": fields["content"] or None}
    elif call := message.additional_kwargs.get("function_call"):
        fields |= {"function_call": call, "content": fields["content"] or None}
    if audio := _audio(message):
        fields["audio"] = audio
    if with_reasoning and (reasoning := _reasoning(message)):
        fields["reasoning_content"] = reasoning
    return fields


def _written_calls(message: AIMessage) -> list[dict[str, Any]]:
    """The tool calls; only where the message lists none, those of its content blocks."""
    calls = [_written_call(call["id"], call["name"], call["args"]) for call in message.tool_calls]
    calls += [_written_call(call["id"], call["name"], call["args"]) for call in message.invalid_tool_calls]
    raw: list[dict[str, Any]] = message.additional_kwargs.get("tool_calls") or []
    return (
        calls
        or [{key: call[key] for key in ("id", "type", "function") if key in call} for call in raw]
        or [
            _written_call(block.get("call_id", block.get("id")), block["name"], _arguments(block))
            for block in _blocks(message)
            if block.get("type") in _CALLS
        ]
    )


def _written_call(identity: str | None, name: str | None, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return {"type": "function", "id": identity, "function": {"name": name, "arguments": text}}


def _arguments(block: Json) -> Any:
    return next((block[key] for key in ("args", "input", "arguments") if key in block), None)


def _audio(message: AIMessage) -> Any:
    """The id of spoken answers, which is all of them that is sent back."""
    spoken = [block["id"] for block in _blocks(message) if block.get("type") == "audio" and block.get("id")]
    found: Any = {"id": spoken[-1]} if spoken else message.additional_kwargs.get("audio")
    return {"id": found["id"]} if found and "id" in found else found


def _reasoning(message: AIMessage) -> str:
    kept = message.additional_kwargs.get("reasoning_content")
    parts = [block.get(_REASONING.get(block.get("type", ""), "")) for block in _blocks(message)]
    return kept or "".join(part for part in parts if isinstance(part, str))


def _blocks(message: BaseMessage) -> list[dict[str, Any]]:
    return [block for block in message.content if isinstance(block, dict)]


def _content(content: str | Sequence[str | Json], *, only: frozenset[str] | None = None) -> Any:
    """Content as a server takes it; blocks that have no place in it are left out.

    Args:
        content: A text, or content blocks of LangChain, OpenAI or Anthropic.
        only: The types of parts that the role may have; None: any, because servers know more of them than OpenAI.
    """
    if isinstance(content, str):
        return content
    parts = [part for block in content if (part := _part(block)) is not None]
    return [part for part in parts if only is None or part.get("type") in only] or ""


def _part(block: str | Json) -> dict[str, Any] | None:
    """One content block as a part of OpenAI's; None if it has no place there."""
    if isinstance(block, str):
        return {"type": "text", "text": block} if block else None
    kind = block.get("type")
    if kind in _NEVER_SENT or (kind == "refusal" and not block.get("refusal")):
        return None
    if kind == "non_standard":
        return _part(block["value"])
    if kind == "text-plain" and block.get("text"):
        return {"type": "text", "text": block["text"]}
    if kind == "text" and "text" in block:
        kept = {key: value for key, value in block.items() if key not in _OF_LANGCHAIN}
        extras: Json = block.get("extras") or {}
        return kept | {key: extras[key] for key in ("cache_control", "prompt_cache_breakpoint") if key in extras}
    if kind == "image" and block.get("source"):
        return _anthropic_image(block["source"])
    return _data_part(dict(block)) if is_data_content_block(dict(block)) else dict(block)


def _anthropic_image(source: Json) -> dict[str, Any] | None:
    url = source.get("url") or f"data:{source.get('media_type')};base64,{source.get('data')}"
    return {"type": "image_url", "image_url": {"url": url}}


def _data_part(block: dict[str, Any]) -> dict[str, Any]:
    if block["type"] == "video" and block.get("url"):  # as vLLM, SGLang and OpenRouter take it
        return {"type": "video_url", "video_url": {"url": block["url"]}}
    try:
        return convert_to_openai_data_block(block)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"a content block of type {block['type']!r} cannot be sent in a chat completion: {error}; found an object "
            f"with keys {sorted(block)}; send its data as base64, or leave it out"
        ) from error
