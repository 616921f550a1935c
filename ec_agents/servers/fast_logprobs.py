"""The decoder of the fast path under ``ChatOpenAI`` of langchain-openai, and its connections for each event loop."""

from types import MethodType, NoneType
from typing import Any, TypeVar, cast

import openai
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableBinding
from openai._constants import RAW_RESPONSE_HEADER
from openai.resources.chat import AsyncCompletions, Completions
from openai.types.chat import ChatCompletion, ParsedChatCompletion
from pydantic import ValidationError

from ec_agents.servers.body_reader import decode_off_loop
from ec_agents.servers.completions import decode_response
from ec_agents.servers.http_clients import (
    MAX_BODY_BYTES,
    ResponseLimits,
    is_per_loop,
    per_loop,
    with_whole_responses,
)
from ec_agents.servers.transport import PARAMETERS, post_arguments


def fast_logprobs(model: Any, *, max_body_bytes: int = MAX_BODY_BYTES) -> Any:
    """The same ``ChatOpenAI`` of langchain-openai, with responses decoded like those of ``OpenAIChatModel``.

    Requests, timeouts, retries, headers, callbacks and everything set on the HTTP clients stay as they are; only the
    asynchronous connections are different, so that the object may be used in one event loop after another. Streams, the
    Responses API and structured output by a pydantic class take the ordinary path, and a model that is not recognised
    is returned unchanged.

    Args:
        model: A chat model, or one with ``.bind(…)``.
        max_body_bytes: Largest response in bytes, decompressed; a larger one is a ``ResponseTooLarge``.

    Raises:
        ConfigError: ``max_body_bytes`` is below 1.
    """
    if isinstance(model, RunnableBinding):
        binding = cast("RunnableBinding[Any, Any]", model)
        return binding.model_copy(update={"bound": fast_logprobs(binding.bound, max_body_bytes=max_body_bytes)})
    if not isinstance(model, BaseChatModel):
        return model
    limits = ResponseLimits(max_body_bytes=max_body_bytes, whole_request=False)
    safe = loop_safe(model)
    parts = {name: _fast_part(getattr(safe, name, None), limits) for name in _PARTS}
    replaced = {name: part for name, part in parts.items() if part is not None}
    return safe.model_copy(update=replaced) if replaced else model


_PARTS = ("client", "async_client", "root_client", "root_async_client")
_FIELDS = PARAMETERS | {"stream"}
_JSON = (str, int, float, dict, list, tuple, NoneType)


def _fast_part(part: Any, limits: ResponseLimits) -> Any:
    """What to put in place of one of the clients of a ``ChatOpenAI``; None where it is not what is expected."""
    if isinstance(part, Completions | AsyncCompletions):
        client = with_whole_responses(part._client, limits)  # noqa: SLF001 - the SDK has no public way to it
        return _Replaced(part, with_raw_response=_FastCompletions(part, client.chat.completions))
    if isinstance(part, openai.OpenAI | openai.AsyncOpenAI):
        completions = _fast_part(part.chat.completions, limits)
        return _Replaced(part, chat=_Replaced(part.chat, completions=completions))
    return None


class _Replaced:
    """An object of the SDK with some of its attributes replaced."""

    def __init__(self, real: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _real=real)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_real"], name)


class _FastCompletions:
    """Stands for ``completions.with_raw_response``.

    Args:
        real: What it stands for.
        whole: The same, with a client that reads whole responses.
    """

    def __init__(self, real: Completions | AsyncCompletions, whole: Completions | AsyncCompletions) -> None:
        self._real: Any = real
        self._whole: Any = whole

    def create(self, **payload: Any) -> Any:
        """The response to a request, or an awaitable of it."""
        ordinary = bool(payload.get("stream"))
        return self._real.with_raw_response.create(**payload) if ordinary else self._send(payload, ChatCompletion)

    def parse(self, **payload: Any) -> Any:
        """The response to a request for structured output, or an awaitable of it."""
        if isinstance(payload.get("response_format"), type):
            return self._real.with_raw_response.parse(**payload)
        return self._send({**payload, "stream": False}, ParsedChatCompletion)

    def _send(self, payload: dict[str, Any], kind: Any) -> Any:
        if isinstance(self._real, AsyncCompletions):
            return self._send_async(payload, kind)
        raw = _raw_response(self._whole, payload)
        return _FastResponse(raw.headers, _typed(kind, decode_response(raw.content, payload.get("n") or 1)))

    async def _send_async(self, payload: dict[str, Any], kind: Any) -> "_FastResponse":
        raw = await _raw_response(self._whole, payload)
        return _FastResponse(raw.headers, _typed(kind, await decode_off_loop(raw.content, payload.get("n") or 1)))


def _raw_response(completions: Any, payload: dict[str, Any]) -> Any:
    """The SDK's raw response to a request, or an awaitable of it.

    Past ``create``, which copies the whole request, where that would send just what it is given.
    """
    arguments = post_arguments(payload)
    body, options = arguments["body"], arguments["options"]
    is_plain = body.keys() <= _FIELDS and all(isinstance(value, _JSON) for value in body.values())
    if not (is_plain and _is_own(completions.create)):
        return completions.with_raw_response.create(**payload)
    options["headers"] = {**options.get("headers", {}), RAW_RESPONSE_HEADER: "true"}
    return completions._post(**arguments)  # noqa: SLF001 - what ``create`` calls


def _is_own(create: Any) -> bool:
    """Whether a method is the SDK's own, and not that of a tracer in its place."""
    module = getattr(create, "__globals__", {}).get("__name__", "")
    return type(create) is MethodType and module.startswith("openai.")


def _typed(kind: Any, response: dict[str, Any]) -> Any:
    """The SDK's object of a response; pydantic makes of a sound one what ``construct`` makes, much faster."""
    try:
        return kind.model_validate(response, strict=True)
    except ValidationError:
        return kind.construct(**response)


class _FastResponse:
    """Stands for the SDK's raw response; the body is not kept."""

    def __init__(self, headers: Any, completion: ChatCompletion) -> None:
        self.headers = headers
        self._completion = completion

    def parse(self) -> ChatCompletion:
        """The completion, its log-probabilities packed."""
        return self._completion


_Model = TypeVar("_Model", bound=BaseChatModel)


def loop_safe(model: _Model) -> _Model:
    """The model with its own connections in each event loop, and everything that is set on its HTTP client.

    Models other than ``ChatOpenAI``, and those with an HTTP client of the user's, stay as they are.
    """
    root: Any = getattr(model, "root_async_client", None)
    # The client of a proxy is made by langchain-openai, which refuses one of the user's beside it.
    custom = getattr(model, "http_async_client", None) is not None and not getattr(model, "openai_proxy", None)
    if custom or not isinstance(root, openai.AsyncOpenAI) or is_per_loop(root):
        return model
    safe = per_loop(root)
    if safe is None:
        return model
    return model.model_copy(update={"root_async_client": safe, "async_client": safe.chat.completions})
