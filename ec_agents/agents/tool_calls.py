"""Tool calls of candidates: check them against the tools, and answer those that cannot be decoded.

The graph, the middleware and the chat model share the checks, so that a call that is invalid for one of them is invalid
for all.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from operator import is_
from typing import Any, cast
from uuid import uuid4

from langchain_core.messages import AIMessage, BaseMessage, InvalidToolCall, ToolCall, ToolMessage
from langchain_core.tools import BaseTool, tool as create_tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, ValidationError

from ec_agents.candidates import Candidate
from ec_agents.logprobs import quoted

Check = Callable[[Mapping[str, Any]], str | None]
"""Arguments of a call → what is wrong with them, or None."""

_KEPT = 128
"""Sets of tools whose checks ``ToolSets`` keeps."""

_SHOWN = 300
"""Most characters of a problem that flaws show."""

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")


class ToolChecks:
    """Checks of the tool calls of candidates against the tools that the model was given.

    Arguments are validated as the tool itself would validate them: by its pydantic class, or by its JSON schema. Tools
    of the provider have no schema; their calls are accepted by name.

    Args:
        tools: Tools, functions, pydantic classes, and dicts in the form of any provider. Without tools, nothing is
            checked.
    """

    def __init__(self, tools: Sequence[Any]) -> None:
        self._checks: dict[str, Check | None] = {name: check for tool in tools for name, check in _checks_of(tool)}

    @property
    def names(self) -> Collection[str]:
        """Names under which the tools are called."""
        return self._checks.keys()

    def problem(self, candidate: Candidate) -> str | None:
        """Explain the first tool call that does not fit the tools; None if all fit."""
        for call in candidate.tool_calls if self._checks else ():
            name = call["name"]
            if name not in self._checks:
                return f"unknown tool {name!r}; known: {', '.join(self._checks)}"
            check = self._checks[name]
            if check is not None and (problem := check(call["args"])) is not None:
                return f"arguments of {name!r} do not fit: {problem}"
        return None

    def checked(self, candidate: Candidate) -> Candidate:
        """Return the candidate, with the flaw ``invalid_action`` where a tool call does not fit."""
        problem = None if "invalid_action" in candidate.flaws else self.problem(candidate)
        return (
            candidate if problem is None else replace(candidate, flaws={**candidate.flaws, "invalid_action": problem})
        )


class ToolSets:
    """The checks of the sets of tools that a model was given lately; those of each set are made once."""

    def __init__(self) -> None:
        self._made: list[tuple[list[Any], ToolChecks]] = []

    def of(self, tools: Sequence[Any], make: Callable[[], ToolChecks] | None = None) -> ToolChecks:
        """Return the checks of these objects, which are tools unless ``make`` makes checks for them."""
        for known, checks in self._made:
            if len(known) == len(tools) and all(map(is_, known, tools)):
                return checks
        checks = ToolChecks(tools) if make is None else make()
        self._made[:] = [([*tools], checks), *self._made[: _KEPT - 1]]
        return checks


def schema_check(schema: Mapping[str, Any]) -> Check:
    """Return a check against a JSON schema. It accepts everything if the schema itself is invalid.

    References to other documents are not followed: a schema may come from a server that nobody trusts.
    """

    @cache
    def validator() -> Any:
        # Imported by the first check: most tools have a pydantic class.
        from jsonschema import SchemaError, validators  # noqa: PLC0415
        from referencing.jsonschema import EMPTY_REGISTRY  # noqa: PLC0415

        kind: Any = validators.validator_for(schema, default=validators.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except (SchemaError, RecursionError):
            return None
        return kind(schema, registry=EMPTY_REGISTRY)

    def check(args: Mapping[str, Any]) -> str | None:
        found = validator()
        return None if found is None else _first_error(found, args)

    return check


def _first_error(validator: Any, args: Mapping[str, Any]) -> str | None:
    from jsonschema import exceptions  # noqa: PLC0415 - see schema_check
    from referencing.exceptions import Unresolvable  # noqa: PLC0415

    best_match: Any = exceptions.best_match  # pyright: ignore[reportUnknownVariableType]
    try:
        error: Any = best_match(validator.iter_errors(args))
    except (Unresolvable, RecursionError, exceptions.UnknownType, re.error):
        return None
    if error is None:
        return None
    where = ".".join(map(str, error.absolute_path))
    return f"{where}: {error.message}"[:_SHOWN] if where else error.message[:_SHOWN]


def _model_check(model: type[BaseModel]) -> Check:
    def check(args: Mapping[str, Any]) -> str | None:
        try:
            model.model_validate(args)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "arguments"
            return f"{where}: {first['msg']}"[:_SHOWN]
        return None

    return check


def _checks_of(tool: Any) -> Iterator[tuple[str, Check | None]]:
    """Names under which a tool is called, each with its check, as far as it can be checked."""
    if isinstance(tool, Mapping):
        yield from _checks_of_dict(cast("Mapping[str, Any]", tool))
    elif isinstance(tool, BaseTool):
        yield tool.name, _check_of_schema(tool.tool_call_schema)
    elif isinstance(tool, type) and issubclass(tool, BaseModel):
        yield convert_to_openai_tool(tool)["function"]["name"], _model_check(tool)
    elif isinstance(tool, type):
        yield from _checks_of_dict(convert_to_openai_tool(tool))
    elif callable(tool):
        try:
            yield from _checks_of(create_tool(cast("Any", tool)))
        except ValueError:  # a function without a description can be bound, but is not a tool
            yield from _checks_of_dict(convert_to_openai_tool(tool))


def _check_of_schema(schema: Any) -> Check | None:
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return _model_check(schema)
    if isinstance(schema, Mapping):
        return schema_check(cast("Mapping[str, Any]", schema))
    describe: Any = getattr(cast("Any", schema), "schema", None)  # a class of pydantic 1
    return schema_check(cast("Any", describe())) if callable(describe) else None


def _checks_of_dict(tool: Mapping[str, Any]) -> Iterator[tuple[str, Check | None]]:
    """The tools in a dict: in the form of OpenAI, Anthropic, Bedrock or Google, as a JSON schema, or a provider's."""
    for declared in tool.get("function_declarations") or tool.get("functionDeclarations") or ():
        # Google's schemas are OpenAPI's, unless they are under another name.
        schema = declared.get("parameters_json_schema") or declared.get("parametersJsonSchema")
        yield declared["name"], _check_of_schema(schema)
    inner: Any = tool.get("function") or tool.get("toolSpec") or tool.get("custom") or tool
    schema = inner.get("parameters") or inner.get("input_schema")
    if "inputSchema" in inner:
        schema = inner["inputSchema"].get("json", inner["inputSchema"])
    if "properties" in inner and "title" in inner:
        schema = inner
    name = inner.get("name") or inner.get("title")
    if name:
        yield name, _check_of_schema(schema)
    elif "type" in inner:
        yield inner["type"], None
    else:
        yield from ((key, None) for key in inner)


def answered(message: AIMessage) -> list[BaseMessage]:
    """Return the message so that any server accepts it as history, then errors for its undecodable tool calls.

    An undecodable call becomes a call without arguments, answered by an error that quotes what was received: servers
    refuse calls without an answer, and some refuse arguments that are not JSON. Missing and repeated ids of calls are
    replaced.
    """
    broken = message.invalid_tool_calls
    ids = _distinct([call["id"] for call in [*broken, *message.tool_calls]])
    if not broken and ids == [call["id"] for call in message.tool_calls]:
        return [message]
    sent = [(_sent_name(call.get("name")), dict[str, Any]()) for call in broken]
    sent += [(call["name"], call["args"]) for call in message.tool_calls]
    calls = [
        ToolCall(name=name, args=args, id=id_, type="tool_call") for (name, args), id_ in zip(sent, ids, strict=True)
    ]
    update: dict[str, Any] = {"tool_calls": calls, "invalid_tool_calls": []}
    if broken:
        update["additional_kwargs"] = {k: v for k, v in message.additional_kwargs.items() if k != "tool_calls"}
        update["content"] = _without_broken_calls(message.content)
    errors = [
        ToolMessage(_explain(call), name=repaired["name"], tool_call_id=repaired["id"], status="error")
        for call, repaired in zip(broken, calls, strict=False)
    ]
    return [message.model_copy(update=update), *errors]


def _distinct(ids: Sequence[str | None]) -> list[str]:
    """The ids, with new ones for those that are missing or occur before."""
    return [id_ if id_ and id_ not in ids[:i] else f"call_{uuid4().hex}" for i, id_ in enumerate(ids)]


def _sent_name(name: str | None) -> str:
    """The name in the characters that OpenAI accepts; a call that cannot be decoded may be cut off anywhere."""
    return _NOT_IN_NAMES.sub("_", name or "unknown")[:64]


def _without_broken_calls(content: Any) -> Any:
    """The content without the blocks of undecodable calls, which are among the message's tool calls now."""
    if not isinstance(content, list):
        return content
    blocks = cast("list[Any]", content)
    return [b for b in blocks if not (isinstance(b, dict) and cast("Any", b).get("type") == "invalid_tool_call")]


def _explain(call: InvalidToolCall) -> str:
    """What the model is told about a call that cannot be decoded."""
    try:
        found = json.loads(call.get("args") or "")
        problem = f"they are of type {type(found).__name__}"
    except (ValueError, TypeError, RecursionError) as error:
        problem = str(error)
    return (
        f"Error: {call.get('name') or 'the tool'} was not called, because its arguments are not a JSON object "
        f"({problem}). Received: {quoted(call.get('args'), 500)}. Call it again with arguments that are one."
    )
