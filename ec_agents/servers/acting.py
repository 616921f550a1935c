"""A chat model that acts in JSON: with tools bound to it, it asks the server for a JSON schema instead."""

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, cast

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from ec_agents.servers.json_actions import JsonActions
from ec_agents.errors import ActionError
from ec_agents.servers.providers import endpoint_of
from ec_agents.selection import REFUSED, TRUNCATED

_Model = TypeVar("_Model", bound=BaseChatModel)

_ACTING = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
"""The options of a call that the schema stands for."""


def acting_in_json(model: _Model) -> _Model:
    """A copy of a chat model that writes its actions as JSON wherever tools are bound to it.

    What goes in and what comes out is as with tool calls; only the request to the server differs. ``tool_choice``,
    ``parallel_tool_calls`` and a ``response_format`` for the final answer keep their meaning.
    """
    copy = model.model_copy()
    object.__setattr__(copy, "__class__", _acting(type(model)))
    return copy


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
        if _finish_reason(found) in TRUNCATED | REFUSED
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
