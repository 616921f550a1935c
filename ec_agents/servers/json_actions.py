"""Actions as text: tools → a strict JSON schema, so that the tokens of an action are measured like any others.

OpenAI and Azure give no log-probabilities for tool calls, but they do for the content. Here the model writes a thought
and then its action, or its final answer, as JSON in the content. What comes back is an ordinary ``AIMessage`` with
``tool_calls``, and a conversation with tool calls is sent in a form that any chat endpoint takes.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from operator import is_
from typing import Any, Literal, TypeVar, cast

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.json_schema import dereference_refs

from ec_agents.candidates import FINISHED
from ec_agents.errors import ActionError, ConfigError
from ec_agents.servers.model_classes import copy_as
from ec_agents.servers.providers import endpoint_of

ActionFormat = Literal["native", "json", "auto"]
Json = Mapping[str, Any]

THOUGHT_KEY = "thought"
"""Where ``additional_kwargs`` of a final answer holds the thought before it."""

_INSTRUCTIONS = """Answer with one JSON object: first "thought", a text in which you think, then "action".
"action" is {forms}.
Arguments that are not needed are null. The tools:
{tools}"""
_ONE_CALL = '{"tool": name, "arguments": {…}}, to use a tool and see its result'
_CALLS = '{"calls": [{"tool": name, "arguments": {…}}, …]}, to use several at once'
_KEPT = ("type", "enum", "const", "description")
_TEXT: Json = {"type": "string"}


class JsonActions:
    """The tools of an agent as one strict JSON schema, with the way there and back.

    Args:
        tools: Tools, functions, or tool dicts in OpenAI's form.
        choice: As ``tool_choice``: ``"any"``, ``"required"`` or a tool's name leave no final answer; ``"none"``
            leaves nothing else.
        parallel: Whether one action may be several calls.
        answer: Form of the final answer, as ``response_format``; None: a text.

    Raises:
        ConfigError: A tool has no schema, as tools that the provider runs itself; ``choice`` names no tool; ``answer``
            has no schema.
    """

    def __init__(self, tools: Sequence[Any], *, choice: Any = None, parallel: bool = True, answer: Any = None) -> None:
        functions = [_function(tool) for tool in tools]
        self._parameters = {f["name"]: dereference_refs(dict(f.get("parameters") or {})) for f in functions}
        self._allowed, self._may_answer = _choice(choice, list(self._parameters))
        self._answer = None if answer is None else _answer_schema(answer)
        self._parallel = parallel and bool(self._allowed) and (self._may_answer or len(self._allowed) > 1)
        lines = [
            json.dumps(
                {
                    "tool": f["name"],
                    "description": f.get("description", ""),
                    "arguments": self._parameters[f["name"]].get("properties", {}),
                },
                ensure_ascii=False,
            )
            for f in functions
            if f["name"] in self._allowed
        ]
        self._instructions = _INSTRUCTIONS.format(forms=self._forms(), tools="\n".join(lines))
        self._encoded: tuple[list[BaseMessage], list[BaseMessage]] = ([], [])

    def _forms(self) -> str:
        """The kinds of actions, as the model is told of them."""
        text = "text" if self._answer is None else json.dumps(self._answer.get("properties", {}), ensure_ascii=False)
        forms = [_ONE_CALL] if self._allowed else []
        forms += [_CALLS] if self._parallel else []
        forms += [f'{{"final_answer": {text}}}'] if self._may_answer else []
        return ", or ".join(forms)

    @property
    def response_format(self) -> dict[str, Any]:
        """The ``response_format`` of the request."""
        kinds = [
            _object({"tool": {"type": "string", "enum": [name]}, "arguments": _strict_object(self._parameters[name])})
            for name in self._allowed
        ]
        if self._parallel:
            kinds.append(_object({"calls": {"type": "array", "items": {"anyOf": list(kinds)}}}))
        if self._may_answer:
            kinds.append(_object({"final_answer": _TEXT if self._answer is None else strict_schema(self._answer)}))
        schema = _object({"thought": _TEXT, "action": {"anyOf": kinds}})
        return {"type": "json_schema", "json_schema": {"name": "action", "strict": True, "schema": schema}}

    def encode(self, messages: Sequence[BaseMessage]) -> list[BaseMessage]:
        """The conversation with every action and result as text, and the instructions in the first message."""
        same, encoded = self._encoded  # of the N calls of a step, all but the first find their messages here
        if len(same) != len(messages) or not all(map(is_, same, messages)):
            encoded = self._encode(messages)
            self._encoded = list(messages), encoded
        return list(encoded)

    def _encode(self, messages: Sequence[BaseMessage]) -> list[BaseMessage]:
        first = messages[0].text if messages and isinstance(messages[0], SystemMessage) else None
        text = "\n\n".join(filter(None, (first, self._instructions)))
        encoded: list[BaseMessage] = [SystemMessage(text)]
        previous: BaseMessage | None = None
        for message in messages if first is None else messages[1:]:
            if isinstance(message, AIMessage):
                encoded.append(AIMessage(self._written(message)))
            elif isinstance(message, ToolMessage):
                results = encoded.pop() if isinstance(previous, ToolMessage) else None
                encoded.append(_with_result(results, message))
            else:
                encoded.append(message)
            previous = message
        return encoded

    def _written(self, message: AIMessage) -> str:
        """A message of the model as it would write it in JSON."""
        calls = [{"tool": call["name"], "arguments": call["args"]} for call in message.tool_calls]
        if calls:
            return _dump(message.text, calls[0] if len(calls) == 1 else {"calls": calls})
        answer: Any = message.text
        if self._answer is not None:
            with suppress(ValueError):
                answer = json.loads(answer)
        return _dump(message.additional_kwargs.get(THOUGHT_KEY, ""), {"final_answer": answer})

    def decode(self, message: AIMessage) -> AIMessage:
        """The message with its JSON turned into tool calls or a final answer; the rest of it stays.

        A refusal, and an answer that was cut off, stay as they are.

        Raises:
            ActionError: The content is not the JSON that was asked for.
        """
        if message.additional_kwargs.get("refusal") or message.response_metadata.get("finish_reason") == "length":
            return message
        thought, action = _read(message.text)
        if "final_answer" in action:
            answer = action["final_answer"]
            if self._answer is not None:
                answer = _restored(answer, self._answer)
            if self._answer is not None or not isinstance(answer, str):
                answer = json.dumps(answer, ensure_ascii=False)
            kept: dict[str, Any] = {**message.additional_kwargs, THOUGHT_KEY: thought}
            return message.model_copy(update={"content": answer, "additional_kwargs": kept})
        calls = [self._tool_call(call) for call in action.get("calls") or [action]]
        return message.model_copy(update={"content": thought, "tool_calls": calls})

    def _tool_call(self, call: Json) -> dict[str, Any]:
        name, arguments = call["tool"], call.get("arguments")
        schema = self._parameters.get(name, {})
        args: Any = _restored(arguments, {"properties": {}, **schema}) if isinstance(arguments, dict) else {}
        return {"name": name, "args": args, "id": f"call_{uuid.uuid4().hex}", "type": "tool_call"}


def strict_schema(schema: Json) -> dict[str, Any]:
    """The nearest schema in the subset that strict structured output takes.

    Every property is required, and null where it was optional; objects without known properties become JSON text.
    Limits of length, range and form are left to the check of the arguments.
    """
    kept = {key: schema[key] for key in _KEPT if key in schema}
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        return {**_without(kept, "type"), "anyOf": [strict_schema(branch) for branch in branches]}
    if len(schema.get("allOf", ())) == 1:
        return strict_schema({**schema["allOf"][0], **_without(schema, "allOf")})
    if _is_free(schema):
        hint = f"{schema.get('description', '')} (as JSON text)".strip()
        return {"type": "string", "description": hint}
    if "properties" in schema or schema.get("type") == "object":
        return {**_without(kept, "type"), **_strict_object(schema)}
    if schema.get("type") == "array":
        return {**kept, "items": strict_schema(schema.get("items") or {})}
    return kept


def _strict_object(schema: Json) -> dict[str, Any]:
    required = schema.get("required", ())
    properties: Json = schema.get("properties") or {}
    return _object(
        {
            name: strict_schema(value) if name in required else {"anyOf": [strict_schema(value), {"type": "null"}]}
            for name, value in properties.items()
        }
    )


def _object(properties: Json) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _restored(value: Any, schema: Json) -> Any:
    """A value that fits the strict schema as the tool's own schema wants it: no nulls for optional, no JSON text."""
    branches = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if branches:
        return _restored(value, next((branch for branch in branches if _fits(value, branch)), _TEXT))
    if isinstance(value, str) and _is_free(schema):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(value, dict):
        properties: Json = schema.get("properties") or {}
        required = schema.get("required", ())
        items = cast("dict[str, Any]", value).items()
        return {k: _restored(v, properties.get(k, _TEXT)) for k, v in items if v is not None or k in required}
    if isinstance(value, list):
        return [_restored(item, schema.get("items") or {}) for item in cast("list[Any]", value)]
    return value


def _fits(value: Any, schema: Json) -> bool:
    """Whether a value may come from this branch of a choice."""
    if isinstance(value, dict):
        return set(cast("dict[str, Any]", value)) <= set(schema.get("properties", ()))
    if isinstance(value, list):
        return schema.get("type") == "array"
    return isinstance(value, str) and (_is_free(schema) or schema.get("type") == "string")


def _is_free(schema: Json) -> bool:
    """Whether a schema allows objects or values that no strict schema can list."""
    if schema.get("properties"):
        return False
    kind = schema.get("type")
    return (kind == "object" and schema.get("additionalProperties") is not False and "properties" not in schema) or (
        kind is None and not any(key in schema for key in ("properties", "anyOf", "oneOf", "allOf", "enum", "const"))
    )


def _function(tool: Any) -> dict[str, Any]:
    converted: dict[str, Any] = convert_to_openai_tool(tool)
    if "function" not in converted:
        raise ConfigError(
            f"action_format='json' needs tools with a schema; found {converted.get('type')!r}, which the provider runs "
            "itself; leave it out, or use action_format='native'"
        )
    return converted["function"]


def _answer_schema(response_format: Any) -> Json:
    """The JSON schema of a ``response_format``."""
    if isinstance(response_format, type):
        return dereference_refs(convert_to_json_schema(response_format))
    try:
        return dereference_refs(response_format["json_schema"]["schema"])
    except (KeyError, TypeError):
        raise ConfigError(
            "actions as JSON are a response_format themselves, and take another one for the final answer if it has "
            f"a json_schema; found {response_format!r:.80}; give it one, or use action_format='native'"
        ) from None


def _choice(choice: Any, names: list[str]) -> tuple[list[str], bool]:
    """Which tools a ``tool_choice`` leaves, and whether it leaves the final answer."""
    if isinstance(choice, Mapping):
        found = cast("Mapping[str, Any]", choice)
        choice = found.get("function", found).get("name") or found.get("type")
    if not choice or choice == "auto":
        return names, True
    if choice == "none":
        return [], True
    if choice in (True, "any", "required"):
        return names, False
    if choice in names:
        return [choice], False
    raise ConfigError(f"tool_choice names no tool that is bound: {choice!r}; bound are {', '.join(names)}")


def _read(text: str) -> tuple[str, Json]:
    """Thought and action of an answer."""
    try:
        data = json.loads(text, strict=False)
        if "\\ud" in text.lower():  # half a surrogate pair is in no text that can be kept or sent
            data = json.loads(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))
        action = data["action"]
        calls = action.get("calls", [action])
        if "final_answer" in action or (calls and all(isinstance(call["tool"], str) for call in calls)):
            return str(data.get("thought") or ""), action
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ActionError(
        f"the JSON action that response_format asks for is needed; found {text!r:.120}; does this server support "
        "response_format json_schema? if not, use action_format='native' with a server that measures tool calls"
    )


def _dump(thought: str, action: Json) -> str:
    return json.dumps({"thought": thought, "action": action}, ensure_ascii=False)


def _with_result(results: BaseMessage | None, result: ToolMessage) -> HumanMessage:
    """What a tool gave as the user's words, after the results that came right before."""
    head = f"{'Error' if result.status == 'error' else 'Result'} of {result.name or 'the tool'}:"
    before: Any = None if results is None else results.content
    if isinstance(result.content, str) and not isinstance(before, list):
        return HumanMessage("\n".join(filter(None, (before, f"{head} {result.content}"))))
    blocks = [*_blocks(before or ""), *_blocks(head), *_blocks(result.content)]
    return HumanMessage(content=blocks)


def _blocks(content: Any) -> list[Any]:
    parts = [content] if isinstance(content, str) else content
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts if part]


def _without(schema: Json, key: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name != key}


_Model = TypeVar("_Model", bound=BaseChatModel)

_ACTING = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
"""The options of a call that the schema stands for."""


def acting_in_json(model: _Model) -> _Model:
    """A copy of a chat model that writes its actions as JSON wherever tools are bound to it.

    What goes in and what comes out is as with tool calls; only the request to the server differs. ``tool_choice``,
    ``parallel_tool_calls`` and a ``response_format`` for the final answer keep their meaning.
    """
    return copy_as(model, _acting(type(model)))


class _Acting:
    """What a copy does in another way than its model; stands before the model's class."""

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **options: Any) -> Any:
        parent: Any = super()
        actions, sent = json_request(self, options) if options.get("tools") else (None, options)
        encoded = messages if actions is None else actions.encode(messages)
        try:
            result: ChatResult = parent._generate(encoded, stop=stop, run_manager=run_manager, **sent)  # noqa: SLF001
        except Exception as error:
            _explain(self, error)
            raise
        return result if actions is None else _decoded(actions, result)

    async def _agenerate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **options: Any
    ) -> ChatResult:
        parent: Any = super()
        actions, sent = json_request(self, options) if options.get("tools") else (None, options)
        encoded = messages if actions is None else actions.encode(messages)
        try:
            result = await parent._agenerate(encoded, stop=stop, run_manager=run_manager, **sent)  # noqa: SLF001
        except Exception as error:
            _explain(self, error)
            raise
        return result if actions is None else _decoded(actions, result)


@cache
def _acting(cls: type[BaseChatModel]) -> type[BaseChatModel]:
    """The class of the copies."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)  # pydantic's
    return metaclass(cls.__name__, (_Acting, cls), names)


def json_request(model: Any, options: Mapping[str, Any]) -> tuple[JsonActions, dict[str, Any]]:
    """The actions that the options of a call stand for, and the options that ask for them as JSON.

    The model keeps the last ones, for the other candidates and the next step.

    Raises:
        ConfigError: There is no JSON form of these tools.
    """
    asked = [options.get(name) for name in _ACTING]
    known, actions, form = model.__dict__.get("_ec_actions", (None, None, None))
    if known is None or known[0] is not asked[0] or known[1:] != asked[1:]:
        tools, choice, parallel, answer = asked
        actions = JsonActions(cast("Any", tools), choice=choice, parallel=parallel is not False, answer=answer)
        form = actions.response_format
        model.__dict__["_ec_actions"] = asked, actions, form
    return actions, _asking(form, model, options)


def _asking(form: Mapping[str, Any], model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the form of response that they ask for in place of tools.

    ChatOpenAI turns ``response_format`` into a call that fails where an answer was cut off; in ``extra_body`` it
    reaches the server as it is.
    """
    rest = {name: value for name, value in options.items() if name not in _ACTING}
    if not hasattr(model, "extra_body"):
        return {**rest, "response_format": form}
    body: Mapping[str, Any] = options.get("extra_body") or model.extra_body or {}
    return {**rest, "extra_body": {**body, "response_format": form}}


def _decoded(actions: JsonActions, result: ChatResult) -> ChatResult:
    """The result with every message decoded, except for what was cut off."""
    result.generations = [
        found
        if (_finish_reason(found) or "stop") not in FINISHED
        else ChatGeneration(
            message=actions.decode(cast("AIMessage", found.message)), generation_info=found.generation_info
        )
        for found in result.generations
    ]
    return result


def _finish_reason(found: ChatGeneration) -> str:
    """Why the model stopped; ChatOpenAI does not say it in the message yet."""
    known: dict[str, Any] = {**(found.generation_info or {}), **found.message.response_metadata}
    return str(known.get("finish_reason") or known.get("stop_reason") or known.get("done_reason") or "").lower()


def _explain(model: object, error: Exception) -> None:
    """Raise what to do instead, if the error says that the server refuses the form of the response."""
    if getattr(error, "status_code", None) not in (400, 415, 422, 501):
        return
    if any(word in str(error) for word in ("response_format", "json_schema")):
        where = endpoint_of(model)
        raise ActionError(
            f"{where.base_url if where else 'this server'} refuses response_format json_schema, which actions as JSON "
            f"need: {error}; use action_format='native' with a server that measures tool calls: vLLM, SGLang or "
            "llama-server"
        ) from error
