"""Stage 2 - fetch: a chat model for OpenAI-compatible servers, made for answers with log-probabilities.

The OpenAI SDK sends the requests, with its retries, timeouts and errors; no object of the SDK is built from the bodies.
"""

import os
import sys
from asyncio import TaskGroup
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import openai
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr

from ec_agents.messages import OneChunkModel
from ec_agents.servers.body_reader import async_http_client
from ec_agents.servers.providers import capabilities, provider_of
from ec_agents.servers.transport import Answer, ClientPerLoop, Transport
from ec_agents.servers.wire_messages import choice_message, wire_messages

DEFAULT_BASE_URL = "https://api.openai.com/v1"

_OPTIONS = ("temperature", "top_p", "seed", "stop", "logprobs", "top_logprobs", "extra_body")


class OpenAIChatModel(OneChunkModel):
    """A chat model of an OpenAI-compatible server, made for drawing many candidates with log-probabilities.

    ``response_metadata["logprobs"]`` of its messages has 16 bytes a token in place of the server's 2 kB;
    ``token_signals``, and all that is built on it, reads that. The other fields are those that langchain-openai
    delivers, and ``additional_kwargs["reasoning_content"]``. Responses do not stream, because several servers lose
    log-probabilities when they do.

    An object may be used from any thread, and in one event loop after the other. With ``aiohttp`` installed (extra
    ``fast``), large responses cost about a third less CPU, and are not all in memory together.

    Raises:
        LogprobsMalformed: On a call: the answer is no chat completion.
        openai.OpenAIError: On a call: what the SDK raises once its retries are used up.

    Example:
        >>> from ec_agents.servers.openai_chat_model import OpenAIChatModel
        >>> from ec_agents.testing import FaultServer, Reply
        >>> with FaultServer([Reply(content="hello")]) as server:
        ...     OpenAIChatModel(model="any", base_url=server.base_url, api_key="none").invoke("hi").content
        'hello'
    """

    model_config = ConfigDict(populate_by_name=True)

    model_name: str = Field(alias="model")
    """Name of the model, as the server knows it."""
    base_url: str = ""
    """Where the server is; by default ``OPENAI_BASE_URL``, or OpenAI."""
    api_key: SecretStr | None = None
    """By default ``OPENAI_API_KEY``; a server of one's own that needs none gets ``none``."""
    default_headers: Mapping[str, str] | None = None
    """Sent with every request."""
    timeout: float | None = None
    """Seconds that one request may take; by default what the SDK allows, 600."""
    max_retries: int = 2
    """How often the SDK sends a failed request again."""
    temperature: float | None = None
    """Divides the logits before drawing; by default the server's."""
    top_p: float | None = None
    """Share of the probability that is drawn from; by default the server's."""
    max_tokens: int | None = None
    """Most tokens of a response; OpenAI and Azure get it as ``max_completion_tokens``, the only name they all know."""
    seed: int | None = None
    """The same seed may give the same response; None draws afresh."""
    stop: list[str] | None = None
    """Texts that end a response."""
    logprobs: bool | None = None
    """Whether to ask for log-probabilities; whatever samples from the model does so by itself."""
    top_logprobs: int | None = None
    """Alternatives to ask for at each token."""
    extra_body: Mapping[str, Any] | None = None
    """Parameters that the SDK does not know: ``top_k``, ``min_p``, ``chat_template_kwargs``, …"""
    model_kwargs: Mapping[str, Any] = Field(default_factory=dict[str, Any])
    """Other parameters of the SDK's ``create``."""
    send_reasoning: bool | None = None
    """Whether the reasoning of earlier answers is sent back; by default where the provider table says that the server
    needs it in a tool loop (DeepSeek)."""
    fan_out: Literal["auto", "requests", "n"] = "auto"
    """How several candidates are asked for.

    ``requests``: one request each; each can be cancelled by itself. ``n``: equal calls at the same time become one
    request with ``n=N``, which bills the prompt once; choices that are missing in the response are asked for one by
    one. ``auto``: ``n`` where the provider is known to take it, otherwise ``requests``.
    """
    async_client: Callable[[], openai.AsyncOpenAI] | None = Field(default=None, exclude=True)
    """Makes the SDK's client for an event loop, for example ``lambda: AsyncAzureOpenAI(…)``; by default from the fields
    above. It is closed when the loop ends."""
    client: Callable[[], openai.OpenAI] | None = Field(default=None, exclude=True)
    """Makes the SDK's client for synchronous calls."""

    _transport: Transport = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:  # noqa: ARG002 - pydantic's signature
        """Find the server."""
        if not self.base_url and self.async_client is None and self.client is None:
            self.base_url = os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL
        clients = ClientPerLoop(self.async_client or self._make_async_client)
        self._transport = Transport(clients, self.client or self._make_client)

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: Any = None, strict: bool | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools bound.

        Args:
            tools: LangChain tools, functions, classes or OpenAI's dicts.
            tool_choice: A tool's name, ``"auto"``, ``"none"``, ``"any"`` (or ``"required"``, True), or OpenAI's dict.
            strict: Whether the server has to keep to the schemas of the arguments.
            **kwargs: Bound too, for example ``parallel_tool_calls``.
        """
        formatted = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        names = [tool["function"]["name"] for tool in formatted if "function" in tool]
        if tool_choice in ("any", True):
            tool_choice = "required"
        elif isinstance(tool_choice, str) and tool_choice in names:
            tool_choice = {"type": "function", "function": {"name": tool_choice}}
        chosen = {"tool_choice": tool_choice} if tool_choice else {}
        return self.bind(tools=formatted, **chosen, **kwargs)

    @property
    def _llm_type(self) -> str:
        return "ec-agents-openai"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.model_name, "base_url": self.base_url, **self._options()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = provider_of(self.base_url) or "openai"
        params["ls_model_name"] = kwargs.get("model", self.model_name)
        return params

    def _options(self) -> dict[str, Any]:
        given = {name: value for name in _OPTIONS if (value := getattr(self, name)) is not None}
        if self.max_tokens is not None:
            hosted = provider_of(self.base_url) in ("openai", "azure")
            given["max_completion_tokens" if hosted else "max_tokens"] = self.max_tokens
        return {**given, **self.model_kwargs}

    def _payload(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        stopping = {} if stop is None else {"stop": stop}
        options = {"model": self.model_name, **self._options(), **stopping, **kwargs}
        return {**options, "messages": wire_messages(messages, with_reasoning=self._sends_reasoning)}

    @property
    def _sends_reasoning(self) -> bool:
        known = capabilities(provider_of(self.base_url), self.model_name)
        return (known is not None and known.needs_reasoning) if self.send_reasoning is None else self.send_reasoning

    @property
    def _n_max(self) -> int:
        """How many choices one request may ask for."""
        return _n_max(self.fan_out, self.base_url, self.model_name)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> ChatResult:
        payload = self._payload(messages, stop, kwargs)
        n = payload.pop("n", None) or 1
        return _result(self._transport.answers_blocking(payload, n, n_max=self._n_max))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> ChatResult:
        payload = self._payload(messages, stop, kwargs)
        n = payload.pop("n", None) or 1
        if n == 1:
            return _result([await self._transport.answer(payload, n_max=self._n_max)])
        try:
            async with TaskGroup() as group:
                tasks = [group.create_task(self._transport.answer(payload, n_max=self._n_max)) for _ in range(n)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return _result([task.result() for task in tasks])

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        known = [output for output in llm_outputs if output]
        usage = _sum(output["token_usage"] for output in known)
        return {**known[0], "token_usage": usage} if known else {}

    def _make_async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._client_options(), http_client=async_http_client())

    def _make_client(self) -> openai.OpenAI:
        return openai.OpenAI(**self._client_options())

    def _client_options(self) -> dict[str, Any]:
        local = self.base_url != DEFAULT_BASE_URL and "OPENAI_API_KEY" not in os.environ
        options: dict[str, Any] = {"base_url": self.base_url or None, "max_retries": self.max_retries}
        if self.api_key is not None or local:
            options["api_key"] = "none" if self.api_key is None else self.api_key.get_secret_value()
        if self.timeout is not None:
            options["timeout"] = self.timeout
        return {**options, "default_headers": self.default_headers}


@lru_cache(maxsize=64)
def _n_max(fan_out: str, base_url: str, model: str) -> int:
    if fan_out == "requests":
        return 1
    known = capabilities(provider_of(base_url), model)
    most = 1 if known is None else known.n_max or 1
    return most if fan_out == "auto" or most > 1 else sys.maxsize


def _result(answers: Sequence[Answer]) -> ChatResult:
    """The answers as LangChain's result; what it says of the whole is the sum of their usages."""
    messages = [choice_message(answer.choice, answer.response) for answer in answers]
    metadata: list[dict[str, Any]] = [message.response_metadata for message in messages]
    usage = _sum(shares["token_usage"] or {} for shares in metadata)
    output = {"token_usage": usage, "model_name": metadata[0]["model_name"], "model_provider": "openai"}
    return ChatResult(generations=[_generation(message) for message in messages], llm_output=output)


def _sum(usages: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for usage in usages:
        for name, count in usage.items():
            total |= {name: total.get(name, 0) + count} if isinstance(count, int) else {}
    return total


def _generation(message: AIMessage) -> ChatGeneration:
    return ChatGeneration(
        message=message, generation_info={"finish_reason": message.response_metadata["finish_reason"]}
    )
