"""A ``ChatOpenAI`` that may be used in one event loop after the other.

Its pooled connections belong to the loop that opened them, so that it fails in a second ``asyncio.run``, or
asynchronously after a synchronous call.
"""

from typing import Any, TypeVar

import openai
from langchain_core.language_models import BaseChatModel
from openai.resources.chat.completions import AsyncCompletions

from ec_agents.servers.fast_logprobs import fast_logprobs
from ec_agents.servers.transport import ClientPerLoop

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
