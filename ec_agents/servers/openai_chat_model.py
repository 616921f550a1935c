"""A chat model for OpenAI-compatible servers, made for responses with log-probabilities.

The OpenAI SDK sends the requests, with its retries, timeouts and errors; its response objects are never built.
"""

import os
import sys
from asyncio import TaskGroup
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Generic, Literal, NoReturn, TypeVar, cast

import openai
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import ModelRefusalError
from langchain_core.language_models import LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_openai_function, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from ec_agents.errors import ConfigError
from ec_agents.logprobs import pack_logprobs, token_signals
from ec_agents.servers.http_clients import MAX_BODY_BYTES, ResponseLimits, async_http_client, http_client
from ec_agents.servers.model_classes import OneChunkModel, unknown_argument
from ec_agents.servers.per_loop import PerLoop
from ec_agents.servers.providers import Endpoint, capabilities, provider_of, provider_of_client
from ec_agents.servers.redaction import HIDDEN, client_keys, hide_secrets
from ec_agents.servers.transport import Answer, Transport
from ec_agents.servers.wire_messages import choice_message, wire_messages

DEFAULT_BASE_URL = "https://api.openai.com/v1"

_OPTIONS = ("temperature", "top_p", "seed", "stop", "logprobs", "top_logprobs", "extra_body")
_CHOICES = ("auto", "none", "required")
_Client = TypeVar("_Client", openai.OpenAI, openai.AsyncOpenAI)


class OpenAIChatModel(OneChunkModel):
    """A chat model of an OpenAI-compatible server, made to sample many candidates with log-probabilities.

    ``response_metadata["logprobs"]`` of its messages takes 16 bytes per token instead of the server's 2 kB;
    ``token_signals``, and everything built on it, reads that. The other fields are those of langchain-openai, plus
    ``additional_kwargs["reasoning_content"]``. Responses are not streamed, because several servers lose
    log-probabilities when they stream.

    An instance may be used from any thread, and in one event loop after the other. With ``aiohttp`` installed (extra
    ``fast``), large responses cost about a third less CPU, and are not all in memory together.

    Raises:
        pydantic.ValidationError: An argument is unknown or of the wrong type, or the clients and ``base_url`` name
            different servers.
        LogprobsMalformed: On a call: the response is not a chat completion.
        openai.OpenAIError: On a call: what the SDK raises once its retries are used up. Keys are removed from it.

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
    """Base URL of the server; by default that of the client below, ``OPENAI_BASE_URL``, or OpenAI."""
    api_key: SecretStr | None = None
    """By default ``OPENAI_API_KEY``; a local server without a key gets ``none``."""
    default_headers: Mapping[str, SecretStr] | None = None
    """Sent with every request."""
    timeout: float | None = None
    """Seconds that one request may take, from the wait for a connection to the last byte; by default what the SDK
    allows, 600. A retry is another request. Clients that you make yourself keep their own time limits."""
    max_body_bytes: int = MAX_BODY_BYTES
    """Largest response in bytes, decompressed; a larger one is a ``ResponseTooLarge``."""
    redirect_hosts: frozenset[str] = frozenset()
    """Other hosts, with their ports if these are not the usual ones, that the server may redirect a request to, with
    the prompt and the key; a redirect to any other host is a ``RedirectRefused``."""
    max_retries: int = 2
    """How often the SDK sends a failed request again."""
    temperature: float | None = None
    """Divides the logits before sampling; by default the server's."""
    top_p: float | None = None
    """Share of the probability mass that is sampled from; by default the server's."""
    max_tokens: int | None = None
    """Most tokens of a response; sent to OpenAI and Azure as ``max_completion_tokens``, which all their models know."""
    seed: int | None = None
    """The same seed may give the same response; None samples afresh."""
    stop: list[str] | None = None
    """Texts that end a response."""
    logprobs: bool | None = None
    """Whether to ask for log-probabilities; agents that sample from the model do so by themselves."""
    top_logprobs: int | None = None
    """Alternatives to ask for at each token."""
    extra_body: Mapping[str, Any] | None = None
    """Parameters that the SDK does not know: ``top_k``, ``min_p``, ``chat_template_kwargs``, …"""
    model_kwargs: Mapping[str, Any] = Field(default_factory=dict[str, Any])
    """Other parameters of the SDK's ``create``."""
    streaming: bool = False
    """Whether ``invoke`` streams inside, as with ``ChatOpenAI``; the answer arrives as one chunk either way."""
    send_reasoning: bool | None = None
    """Whether the reasoning of earlier answers is sent back; by default where the provider table says that the server
    needs it in a tool loop (DeepSeek)."""
    reasoning_logprobs: Literal["joined", "apart"] = "joined"
    """Where to put log-probabilities of reasoning that the server reports in a field of their own (DeepSeek, Cerebras).

    ``joined``: before those of the answer, as one response. ``apart``: in ``response_metadata["reasoning_logprobs"]``,
    so that candidates are ranked by their answers.
    """
    fan_out: Literal["auto", "requests", "n"] = "auto"
    """How several candidates are requested.

    ``requests``: one request each; each can be cancelled separately. ``n``: equal calls at the same time become one
    request with ``n=N``, which bills the prompt once; choices missing from the response are requested one by one.
    ``auto``: ``n`` where the provider is known to support it, otherwise ``requests``.
    """
    async_client: Callable[[], openai.AsyncOpenAI] | None = Field(default=None, exclude=True)
    """Makes the SDK's client for an event loop, for example ``lambda: AsyncAzureOpenAI(…)``; by default from the fields
    above. The server is read from the first one, made at once. Each is closed when its loop ends."""
    client: Callable[[], openai.OpenAI] | None = Field(default=None, exclude=True)
    """Makes the SDK's client for synchronous calls."""

    _transport: Transport = PrivateAttr()
    _limits: ResponseLimits = PrivateAttr()

    _provider: str = PrivateAttr()
    _client_keys: dict[str, dict[str, Any]] = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _known_arguments(cls, given: Any) -> Any:
        """Refuse misspelt arguments: without a ``base_url``, the prompt would go to the default host."""
        if problem := unknown_argument(cls, cast("Any", given) if isinstance(given, dict) else ()):
            raise ConfigError(
                f"{problem}Other parameters of a request belong in model_kwargs={{…}}, and those that only the server "
                "knows in extra_body={…}"
            )
        return cast("Any", given)

    def model_post_init(self, context: Any, /) -> None:  # noqa: ARG002 - pydantic's signature
        """Find the server, and refuse clients of different ones."""
        if "extra_headers" in self.model_kwargs:
            raise ConfigError("headers belong in default_headers, which keeps their values secret; found extra_headers")
        make_async = None if self.async_client is None else _OwnClient(self.async_client)
        make = None if self.client is None else _OwnClient(self.client)
        own = [found for found in (make_async, make) if found is not None]
        urls = {url.rstrip("/") for url in (self.base_url, *(client.base_url for client in own)) if url}
        if len(urls) > 1:
            raise ConfigError(f"base_url and the clients must name one server; found {' and '.join(sorted(urls))}")
        built = bool(self.base_url) or not own
        default = os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL
        self.base_url = self.base_url or next(iter(urls), default)
        self._provider = next((client.provider for client in own), "") or provider_of(self.base_url)
        self._client_keys = {str(number): client.keys for number, client in enumerate(own)}
        self._limits = ResponseLimits(max_body_bytes=self.max_body_bytes, redirect_hosts=self.redirect_hosts)
        make_async = make_async or (self._make_async_client if built else _needs_async)
        clients = PerLoop[openai.AsyncOpenAI](make_async, lambda client: client.close())
        make = make or (self._make_client if built else _needs_sync)
        self._transport = Transport(clients, make, max_body_bytes=self.max_body_bytes)

    @property
    def model(self) -> str:
        """Name of the model, by the name under which ``ChatOpenAI`` has it too."""
        return self.model_name

    @property
    def endpoint(self) -> Endpoint:
        """Where requests are sent."""
        return Endpoint(provider=self._provider, base_url=self.base_url.rstrip("/"), model=self.model_name)

    def _resolve_model_profile(self) -> ModelProfile | None:
        known = self.endpoint.capabilities
        return ModelProfile(structured_output=True) if known is not None and known.json_schema == "yes" else None

    def bind_tools(
        self,
        tools: Sequence[Any],
        *,
        tool_choice: Any = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools to the model.

        Args:
            tools: LangChain tools, functions, classes or OpenAI's dicts.
            tool_choice: A tool's name, ``"auto"``, ``"none"``, ``"any"`` (or ``"required"``, True), or OpenAI's dict.
            strict: Whether the server has to keep to the schemas of the arguments; by default it does where there is a
                ``response_format``, because OpenAI demands that.
            parallel_tool_calls: Whether one response may hold several tool calls; by default the server's choice.
            response_format: Schema of a final answer, as for ``with_structured_output``.
            **kwargs: Other parameters of the request.

        Raises:
            ConfigError: ``tool_choice`` is none of these.
        """
        strict = True if strict is None and response_format else strict
        formatted = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        names = [tool["function"]["name"] for tool in formatted if "function" in tool]
        bound = {
            "tool_choice": _tool_choice(tool_choice, names),
            "parallel_tool_calls": parallel_tool_calls,
            "response_format": None if response_format is None else _response_format(response_format, strict=strict),
        }
        given = {name: value for name, value in bound.items() if value is not None}
        return self.bind(tools=formatted, **given, **kwargs)

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Make the model answer in a schema, with the methods and defaults of ``ChatOpenAI``.

        Args:
            schema: A pydantic class, which gives instances, or a TypedDict or JSON schema, which gives dicts.
            method: ``json_schema``: the content, measured by every server that measures any content;
                ``function_calling``: a tool call; ``json_mode``: JSON that the prompt has to describe.
            include_raw: Whether to give ``{"raw": message, "parsed": …, "parsing_error": …}``.
            strict: Whether the server has to keep to the schema; by default it does for pydantic classes with
                ``json_schema``.
            **kwargs: Other parameters of the request.

        Raises:
            ConfigError: The method is unknown, or does not go with the other arguments.
            ModelRefusalError: On a call: the model refused.
        """
        if method not in ("json_schema", "function_calling", "json_mode"):
            raise ConfigError(f"method must be json_schema, function_calling or json_mode; found {method!r}")
        if schema is None and method != "json_mode":
            raise ConfigError(f"method {method!r} needs a schema; found None")
        if strict is not None and method == "json_mode":
            raise ConfigError("json_mode has no schema for the server to keep to; leave strict out")
        shown = {"ls_structured_output_format": {"kwargs": {"method": method, "strict": strict}, "schema": schema}}
        if method == "function_calling":
            name = convert_to_openai_tool(cast("Any", schema))["function"]["name"]
            options: dict[str, Any] = {
                "tool_choice": name,
                "parallel_tool_calls": False,
                "strict": strict,
                **shown,
                **kwargs,
            }
            return _parsed(self.bind_tools([schema], **options), _tool_parser(schema, name), include_raw=include_raw)
        form = {"type": "json_object"} if method == "json_mode" else _response_format(schema, strict=strict)
        model = self.bind(response_format=form, **shown, **kwargs)
        return _parsed(model, RunnableLambda(_answered) | _json_parser(schema), include_raw=include_raw)

    @property
    def _llm_type(self) -> str:
        return "ec-agents-openai"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.model_name, "base_url": self.base_url, **self._options()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = self._provider or "openai"
        params["ls_model_name"] = kwargs.get("model", self.model_name)
        return params

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        if headers := kwargs.get("extra_headers"):  # a tracer gets these
            kwargs["extra_headers"] = dict.fromkeys(headers, HIDDEN)
        return super()._get_invocation_params(stop=stop, **kwargs)

    def _options(self) -> dict[str, Any]:
        given = {name: value for name in _OPTIONS if (value := getattr(self, name)) is not None}
        if self.max_tokens is not None:
            hosted = self._provider in ("openai", "azure")
            given["max_completion_tokens" if hosted else "max_tokens"] = self.max_tokens
        return {**given, **self.model_kwargs}

    def _payload(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        stopping = {} if stop is None else {"stop": stop}
        options = {"model": self.model_name, **self._options(), **stopping, **kwargs}
        if isinstance(form := options.get("response_format"), type):
            options["response_format"] = _response_format(form, strict=None)
        return {**options, "messages": wire_messages(messages, with_reasoning=self._sends_reasoning)}

    @property
    def _sends_reasoning(self) -> bool:
        known = capabilities(self._provider, self.model_name)
        return (known is not None and known.needs_reasoning) if self.send_reasoning is None else self.send_reasoning

    @property
    def _n_max(self) -> int:
        """How many choices one request may ask for."""
        return _n_max(self.fan_out, self._provider, self.model_name)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> ChatResult:
        payload = self._payload(messages, stop, kwargs)
        n = payload.pop("n", None) or 1
        try:
            return self._result(self._transport.answers_blocking(payload, n, n_max=self._n_max))
        except Exception as error:
            hide_secrets(error, self)
            raise

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> ChatResult:
        payload = self._payload(messages, stop, kwargs)
        n = payload.pop("n", None) or 1
        try:
            if n == 1:
                return self._result([await self._transport.answer(payload, n_max=self._n_max)])
            async with TaskGroup() as group:
                tasks = [group.create_task(self._transport.answer(payload, n_max=self._n_max)) for _ in range(n)]
            return self._result([task.result() for task in tasks])
        except BaseExceptionGroup as failures:
            hide_secrets(failures, self)
            raise failures.exceptions[0] from None
        except Exception as error:
            hide_secrets(error, self)
            raise

    def _result(self, answers: Sequence[Answer]) -> ChatResult:
        """The answers as LangChain's result, with the sum of their usages."""
        messages = [choice_message(answer.choice, answer.response) for answer in answers]
        metadata: list[dict[str, Any]] = [message.response_metadata for message in messages]
        if self.reasoning_logprobs == "apart":
            for fields in metadata:
                fields.update(_apart(fields["logprobs"]))
        usage = _sum(shares["token_usage"] or {} for shares in metadata)
        output = {"token_usage": usage, "model_name": metadata[0]["model_name"], "model_provider": "openai"}
        return ChatResult(generations=[_generation(message) for message in messages], llm_output=output)

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        known = [output for output in llm_outputs if output]
        usage = _sum(output["token_usage"] for output in known)
        return {**known[0], "token_usage": usage} if known else {}

    def _make_async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._client_options(), http_client=async_http_client(self._limits))

    def _make_client(self) -> openai.OpenAI:
        return openai.OpenAI(**self._client_options(), http_client=http_client(self._limits))

    def _client_options(self) -> dict[str, Any]:
        local = self.base_url != DEFAULT_BASE_URL and "OPENAI_API_KEY" not in os.environ
        options: dict[str, Any] = {"base_url": self.base_url or None, "max_retries": self.max_retries}
        if self.api_key is not None or local:
            options["api_key"] = "none" if self.api_key is None else self.api_key.get_secret_value()
        if self.timeout is not None:
            options["timeout"] = self.timeout
        headers = {name: value.get_secret_value() for name, value in (self.default_headers or {}).items()}
        return {**options, "default_headers": headers or None}


class _OwnClient(Generic[_Client]):
    """A factory of the user's. Its first client is made at once, because only that tells where requests go."""

    def __init__(self, make: Callable[[], _Client]) -> None:
        first = make()
        self.base_url, self.provider = str(first.base_url), provider_of_client(first)
        self.keys = client_keys(first)
        self._make, self._spare = make, [first]

    def __call__(self) -> _Client:
        try:
            return self._spare.pop()
        except IndexError:  # several threads may ask
            return self._make()


def _needs_async() -> NoReturn:
    raise ConfigError("client makes clients for synchronous calls only; pass async_client=… too, or call invoke()")


def _needs_sync() -> NoReturn:
    raise ConfigError("async_client makes clients for asynchronous calls only; pass client=… too, or await ainvoke()")


def _tool_choice(choice: Any, names: Sequence[str]) -> Any:
    """A ``tool_choice`` in OpenAI's form; None where it says nothing."""
    if choice is None or choice is False:
        return None
    if choice is True or choice == "any":
        return "required"
    if isinstance(choice, str) and choice in names:
        return {"type": "function", "function": {"name": choice}}
    if choice in _CHOICES or isinstance(choice, dict):
        return cast("Any", choice)
    raise ConfigError(f"tool_choice must be one of any, {', '.join((*_CHOICES, *names))} or a dict; found {choice!r}")


def _response_format(schema: Any, *, strict: bool | None) -> dict[str, Any]:
    """A schema as the ``response_format`` of a request; one that is a ``response_format`` already stays as it is."""
    if _is_class(schema) and issubclass(schema, BaseModel) and strict is not False:
        function: Any = openai.pydantic_function_tool(schema)["function"]
        form = {"name": schema.__name__, "schema": function["parameters"], "strict": True}
        return {"type": "json_schema", "json_schema": form}
    if isinstance(schema, dict) and schema.get("type") in ("json_schema", "json_object", "text"):
        return cast("dict[str, Any]", schema)
    if isinstance(schema, dict) and {"name", "schema"} <= cast("dict[str, Any]", schema).keys():
        return {"type": "json_schema", "json_schema": schema}
    if strict is None:
        strict = bool(cast("dict[str, Any]", schema).get("strict")) if isinstance(schema, dict) else False
    function = convert_to_openai_function(cast("Any", schema), strict=strict)
    parameters = function.pop("parameters")
    return {"type": "json_schema", "json_schema": {**function, "schema": parameters}}


def _tool_parser(schema: Any, name: str) -> Any:
    if _is_class(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    return JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _json_parser(schema: Any) -> Any:
    return PydanticOutputParser(pydantic_object=schema) if _is_class(schema) else JsonOutputParser()


def _is_class(schema: Any) -> bool:
    """Whether it is a class of pydantic, version 1 or 2."""
    return isinstance(schema, type) and is_basemodel_subclass(schema)


def _answered(message: AIMessage) -> AIMessage:
    if refusal := message.additional_kwargs.get("refusal"):
        raise ModelRefusalError(str(refusal), raw_message=message)
    if message.response_metadata.get("finish_reason") == "content_filter":
        raise ModelRefusalError("a content filter stopped the answer", raw_message=message)
    return message


def _parsed(model: Any, parser: Any, *, include_raw: bool) -> Any:
    if not include_raw:
        return model | parser
    sound = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | sound.with_fallbacks([failed], exception_key="parsing_error")


@lru_cache(maxsize=64)
def _n_max(fan_out: str, provider: str, model: str) -> int:
    if fan_out == "requests":
        return 1
    known = capabilities(provider, model)
    most = 1 if known is None else known.n_max or 1
    return most if fan_out == "auto" or most > 1 else sys.maxsize


def _sum(usages: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for usage in usages:
        for name, count in usage.items():
            total |= {name: total.get(name, 0) + count} if isinstance(count, int) else {}
    return total


def _apart(packed: dict[str, Any]) -> dict[str, Any]:
    """Packed log-probabilities as those of the answer and, if the server reports them separately, of the reasoning."""
    if not packed.get("n_reasoning"):
        return {"logprobs": packed}
    answer = pack_logprobs(lambda: token_signals(packed, part="answer"))
    return {"logprobs": answer, "reasoning_logprobs": pack_logprobs(lambda: token_signals(packed, part="reasoning"))}


def _generation(message: AIMessage) -> ChatGeneration:
    return ChatGeneration(
        message=message, generation_info={"finish_reason": message.response_metadata["finish_reason"]}
    )
