"""The decoder of the fast path under ``ChatOpenAI`` of langchain-openai."""

from types import MethodType, NoneType
from typing import Any, TypeVar, cast

import openai
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableBinding
from openai._constants import RAW_RESPONSE_HEADER
from openai.resources.chat import AsyncCompletions, Completions
from openai.types.chat import ChatCompletion, ParsedChatCompletion
from pydantic import ValidationError

from ec_agents.servers.body_reader import async_http_client, decoded
from ec_agents.servers.completions import decode_response
from ec_agents.servers.transport import PARAMETERS, ClientPerLoop, post_arguments


def fast_logprobs(model: Any) -> Any:
    """The same ``ChatOpenAI`` of langchain-openai, with responses decoded like those of ``OpenAIChatModel``.

    Requests, retries, headers and callbacks stay as they are; only the pool of connections is another, so that the
    object may be used in one event loop after the other. Streams, the Responses API and structured output by a pydantic
    class go the ordinary way, and so does every model that is not recognised: it is returned unchanged.

    Args:
        model: A chat model, or one with ``.bind(…)``.
    """
    if isinstance(model, RunnableBinding):
        binding = cast("RunnableBinding[Any, Any]", model)
        return binding.model_copy(update={"bound": fast_logprobs(binding.bound)})
    if not isinstance(model, BaseChatModel):
        return model
    clients = _own_clients(model)
    parts = {name: _fast_part(getattr(model, name, None), clients) for name in _PARTS}
    replaced = {name: part for name, part in parts.items() if part is not None}
    return model.model_copy(update=replaced) if replaced else model


_PARTS = ("client", "async_client", "root_client", "root_async_client")
_FIELDS = PARAMETERS | {"stream"}
_JSON = (str, int, float, dict, list, tuple, NoneType)


def _own_clients(model: Any) -> ClientPerLoop | None:
    """Clients like that of a ``ChatOpenAI``, one a loop; None where the user has chosen the connections."""
    root = getattr(model, "root_async_client", None)
    if not isinstance(root, openai.AsyncOpenAI) or getattr(model, "http_async_client", None) is not None:
        return None
    return ClientPerLoop(lambda: root.copy(http_client=async_http_client()))


def _fast_part(part: Any, clients: ClientPerLoop | None) -> Any:
    """What to put in place of one of the clients of a ``ChatOpenAI``; None where it is not what is expected."""
    if isinstance(part, Completions | AsyncCompletions):
        return _Replaced(part, with_raw_response=_FastCompletions(part, clients))
    if isinstance(part, openai.OpenAI | openai.AsyncOpenAI):
        completions = _fast_part(part.chat.completions, clients)
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
    """Stands for ``completions.with_raw_response``."""

    def __init__(self, completions: Completions | AsyncCompletions, clients: ClientPerLoop | None) -> None:
        self._real: Any = completions
        self._clients = clients

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
        raw = _raw_response(self._real, payload)
        return _FastResponse(raw.headers, _typed(kind, decode_response(raw.content, payload.get("n") or 1)))

    async def _send_async(self, payload: dict[str, Any], kind: Any) -> "_FastResponse":
        completions: Any = self._real if self._clients is None else (await self._clients.get()).chat.completions
        raw = await _raw_response(completions, payload)
        return _FastResponse(raw.headers, _typed(kind, await decoded(raw.content, payload.get("n") or 1)))


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
    """The model with connections of its own in each event loop.

    Models that are no ``ChatOpenAI``, or have an HTTP client of the user's, stay as they are.
    """
    part: Any = getattr(model, "async_client", None)
    real = getattr(part, "_real", part)  # what fast_logprobs put its own in front of
    custom = getattr(model, "http_async_client", None)
    if custom is not None or not isinstance(real, AsyncCompletions) or isinstance(real, _CompletionsPerLoop):
        return model
    safe = model.model_copy(update={"async_client": _CompletionsPerLoop(real)})
    return safe if real is part else fast_logprobs(safe)


class _CompletionsPerLoop(AsyncCompletions):
    """The SDK's ``chat.completions``, sent through the client of the running loop."""

    def __init__(self, real: AsyncCompletions) -> None:
        super().__init__(real._client)  # noqa: SLF001 - the SDK has no public way from a resource to its client
        self._clients = ClientPerLoop(lambda: self._client.with_options(http_client=openai.DefaultAsyncHttpxClient()))

    async def create(self, **payload: Any) -> Any:
        """As the SDK's."""
        client: Any = await self._clients.get()
        return await client.chat.completions.create(**payload)
