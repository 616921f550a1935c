"""The quiet copy of a chat model from which candidates are sampled.

It neither streams nor caches, and replaces the log-probabilities of a response by packed token signals before any
caller, tracer or stream sees it: 16 bytes per token instead of about 2 kB.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial, wraps
from inspect import signature
from operator import is_
from typing import Any, cast

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    BaseCallbackManager,
    CallbackManagerForLLMRun,
    Callbacks,
)
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig, RunnableWithFallbacks
from langchain_core.runnables.config import ensure_config, var_child_runnable_config
from langchain_core.runnables.configurable import DynamicRunnable
from langchain_core.runnables.retry import RunnableRetry
from langchain_core.tools import BaseTool
from langchain_core.tracers._streaming import _StreamingCallbackHandler
from langgraph.constants import TAG_NOSTREAM

from ec_agents.errors import ConfigError, UnsupportedLogprobs
from ec_agents.logprobs import is_packed, pack_logprobs, token_signals
from ec_agents.messages import SIGNALS_KEY
from ec_agents.sampling import in_thread, may_be_given_up, run_blocking
from ec_agents.servers.model_classes import copy_as
from ec_agents.servers.redaction import hide_secrets

_STREAM_OPTIONS = {"stream", "stream_options", "stream_usage"}

_FOR_LANGCHAIN = {"ls_structured_output_format", "structured_output_format"}
"""Arguments for LangChain that must not reach the model."""

_AROUND = ("ainvoke", "_convert_input", "agenerate_prompt", "agenerate", "_agenerate_with_cache")
"""LangChain's methods between a caller and ``_agenerate``."""

_TELLS: ContextVar[list[bool] | None] = ContextVar("ec_agents_tells", default=None)
"""Within ``one_step``: the cached result of ``_tells``."""

_BOUND = 128
"""Most bindings that a copy keeps: at least those of the last step."""

_LOGPROBS_REFUSED = "unexpected keyword argument 'logprobs'"


def silent_model(
    model: object, run: RunnableConfig | None = None
) -> tuple[BaseChatModel, dict[str, Any], RunnableConfig]:
    """Return the quiet copy of a model, and what was bound to the model: arguments and configuration.

    Streaming loses the log-probabilities of tool calls on several servers; a cache would give N identical candidates.

    Args:
        model: A chat model, a binding of one, or a configurable one.
        run: Configuration of the run, which resolves a configurable model.

    Raises:
        ConfigError: It is not a chat model, or it has retries or fallbacks.
    """
    bound: dict[str, Any] = {}
    config: RunnableConfig = {}
    found = model
    while not isinstance(found, BaseChatModel):
        _refuse_wrapped(found)
        if isinstance(found, RunnableBinding):
            binding = cast("RunnableBinding[Any, Any]", found)
            config = cast("RunnableConfig", {**binding.config, **config})
            bound, found = {**binding.kwargs, **bound}, binding.bound
        else:
            found = _resolved(found, ensure_config(run))
    quiet = {"tags": [*dict.fromkeys([*(found.tags or []), TAG_NOSTREAM])], "disable_streaming": True, "cache": False}
    if "streaming" in type(found).model_fields:
        quiet["streaming"] = False
    copy = copy_as(found, _silent(type(found)), **quiet)
    return copy, {name: value for name, value in bound.items() if name not in _STREAM_OPTIONS}, config


def is_configurable(model: object) -> bool:
    """Tell whether the configuration of each run decides which model this is."""
    while isinstance(model, RunnableBinding):
        model = cast("RunnableBinding[Any, Any]", model).bound
    return isinstance(model, DynamicRunnable) or callable(getattr(model, "_model", None))


def _resolved(model: Any, config: RunnableConfig) -> object:
    """Return the model that a configurable one stands for in a run."""
    if isinstance(model, DynamicRunnable):
        runnable, settings = cast("DynamicRunnable[Any, Any]", model).prepare(config)
        return runnable.with_config(settings) if isinstance(runnable, RunnableBinding) else runnable
    if not callable(getattr(model, "_model", None)):
        name = type(model).__name__
        raise ConfigError(f"model must be a LangChain BaseChatModel, or one with .bind(); found {name}")
    try:
        return model._model(config)  # noqa: SLF001 - init_chat_model has no public way to its model
    except TypeError as error:
        raise ConfigError(
            "model is configurable and has no default, and this run's configuration names none: pass "
            'config={"configurable": {"model": "..."}}'
        ) from error


def _refuse_wrapped(model: object) -> None:
    """Refuse wrappers whose behaviour sampling cannot keep.

    Raises:
        ConfigError: The model has retries or fallbacks.
    """
    if isinstance(model, RunnableRetry):
        raise ConfigError(
            "with_retry() around the model would be lost; leave it out and pass policy=SamplingPolicy(retries=...)"
        )
    if isinstance(model, RunnableWithFallbacks):
        raise ConfigError(
            "with_fallbacks() around the model would be lost, and candidates of different models cannot be compared; "
            "pass the model itself, and let ModelFallbackMiddleware before EntropyCentroidMiddleware, or a second "
            "agent, handle SamplingError"
        )


def is_stream(handler: object) -> bool:
    """Tell whether a callback handler feeds a stream of messages or events, as opposed to a tracer."""
    return isinstance(handler, _StreamingCallbackHandler)


class _Silent:
    """The methods in which every quiet copy differs from its model; comes before the model's class."""

    def bind(self, **kwargs: Any) -> Any:
        return _Binding(bound=cast("Any", self), kwargs=kwargs, config={})

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Any:
        parent: Any = super()
        return _bound_once(self, parent.bind_tools, tools, kwargs)

    def generate(self, messages: Any, stop: Any = None, callbacks: Callbacks = None, **kwargs: Any) -> LLMResult:
        parent: Any = super()
        return parent.generate(messages, stop, _without_streams(callbacks), **kwargs)

    async def agenerate(self, messages: Any, stop: Any = None, callbacks: Callbacks = None, **kwargs: Any) -> LLMResult:
        parent: Any = super()
        return await parent.agenerate(messages, stop, _without_streams(callbacks), **kwargs)


class _Quick(_Silent):
    """The quiet copy of a model that leaves everything around ``_agenerate`` to LangChain."""

    async def ainvoke(self, input: Any, config: Any = None, *, stop: Any = None, **kwargs: Any) -> AIMessage:  # noqa: A002
        """Answer, bypassing LangChain's callbacks where nobody listens: they cost more than everything else here."""
        model, parent = cast("Any", self), cast("Any", super())
        is_ordinary = model.rate_limiter is None and model.output_version in (None, "v0")
        messages = _plain(input)
        if not is_ordinary or messages is None or _FOR_LANGCHAIN & kwargs.keys() or _is_heard(model, config):
            return await parent.ainvoke(input, config, stop=stop, **kwargs)
        nobody = AsyncCallbackManagerForLLMRun.get_noop_manager()  # LangChain always gives one
        answering = model._agenerate(messages, stop=stop, run_manager=nobody, **kwargs)  # noqa: SLF001 - this model's own
        result: ChatResult = await answering
        generation = result.generations[0]
        message = cast("AIMessage", generation.message)
        shared = result.llm_output or {} if len(result.generations) == 1 else {}
        message.response_metadata = {**shared, **(generation.generation_info or {}), **message.response_metadata}
        message.id = message.id or f"lc_run--{nobody.run_id}-0"
        return message


class _Binding(RunnableBinding[Any, Any]):
    """A binding that skips merging configurations when there is nothing to merge."""

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002
        """Answer with the bound arguments."""
        if config or self.config or self.config_factories:
            return await super().ainvoke(input, config, **kwargs)
        return await self.bound.ainvoke(input, None, **{**self.kwargs, **kwargs})


@cache
def _silent(cls: type[BaseChatModel]) -> type[BaseChatModel]:
    """Return the class of the copies: the model's, with responses measured before any callback sees them."""
    if issubclass(cls, _Silent):
        return cls
    base: Any = cls
    generate_one = _taking(base._generate)  # noqa: SLF001 - it is overridden
    if base._agenerate is BaseChatModel._agenerate:  # noqa: SLF001 - as above
        agenerate_one = _in_thread(generate_one)
    else:
        agenerate_one = _taking(base._agenerate)  # noqa: SLF001 - as above
        if _definition(cls, "_agenerate") <= _definition(cls, "_generate"):
            generate_one = _interruptible(generate_one, agenerate_one)

    @wraps(generate_one)
    def _generate(self: Any, *args: Any, **kwargs: Any) -> ChatResult:
        try:
            with _streams_hidden():
                return _measured(generate_one(self, *args, **kwargs))
        except Exception as error:
            hide_secrets(error, self)
            _explain(error)
            raise

    @wraps(agenerate_one)
    async def _agenerate(self: Any, *args: Any, **kwargs: Any) -> ChatResult:
        try:
            with _streams_hidden():
                return _measured(await agenerate_one(self, *args, **kwargs))
        except Exception as error:
            hide_secrets(error, self)
            _explain(error)
            raise

    for method, original in ((_generate, generate_one), (_agenerate, agenerate_one)):
        cast("Any", method).__signature__ = signature(original)  # LangChain looks at it at every call
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)  # pydantic's
    usual = all(getattr(cls, way) is getattr(BaseChatModel, way) for way in _AROUND)
    bases = (_Quick if usual else _Silent, cls)
    return metaclass(cls.__name__, bases, {"_generate": _generate, "_agenerate": _agenerate, **names})


def _taking(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method, accepting a run manager even if the original does not."""
    if "run_manager" in signature(generate).parameters:
        return generate

    @wraps(generate)
    def dropping(*args: Any, run_manager: object = None, **kwargs: Any) -> Any:  # noqa: ARG001 - see above
        return generate(*args, **kwargs)

    return dropping


def _definition(cls: type, method: str) -> int:
    """Return how far up in the class's bases the method is defined."""
    return next(place for place, base in enumerate(cls.__mro__) if method in vars(base))


def _in_thread(generate: Callable[..., ChatResult]) -> Callable[..., Any]:
    """Return the asynchronous form of a synchronous method: LangChain's own uses threads that are joined at exit."""

    @wraps(generate)
    async def agenerate(
        self: Any,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        manager = None if run_manager is None else run_manager.get_sync()
        return await in_thread(partial(generate, self, messages, stop=stop, run_manager=manager, **kwargs))

    return agenerate


_ASKED: ContextVar[object] = ContextVar("ec_agents_asked", default=None)
"""The model whose asynchronous method answers a synchronous call."""


class _Synchronous(BaseException):
    """Raised where a model's asynchronous method turns out to call the synchronous one."""


def _interruptible(generate: Callable[..., ChatResult], agenerate: Callable[..., Any]) -> Callable[..., ChatResult]:
    """Return the synchronous method, which awaits the asynchronous one if whoever waits for it may stop waiting.

    Only an asynchronous request can be interrupted, which closes its connection. A model whose asynchronous method
    calls the synchronous one is asked synchronously.
    """
    synchronous: list[bool] = []

    @wraps(generate)
    def answer(self: Any, *args: Any, **kwargs: Any) -> ChatResult:
        if _ASKED.get() is self:
            raise _Synchronous
        if not may_be_given_up() or synchronous or _has_synchronous_client_only(self):
            return generate(self, *args, **kwargs)

        async def ask() -> ChatResult:
            _ASKED.set(self)
            named = {name: _asynchronous(value) for name, value in kwargs.items()}
            return await agenerate(self, *map(_asynchronous, args), **named)

        try:
            return run_blocking(ask)
        except _Synchronous:
            synchronous.append(True)
            return generate(self, *args, **kwargs)

    return answer


def _has_synchronous_client_only(model: Any) -> bool:
    """Tell whether the user gave the model an HTTP client for synchronous calls, and none for the others."""
    pairs = (("http_client", "http_async_client"), ("client", "async_client"))
    return any(getattr(model, one, None) is not None and getattr(model, other, None) is None for one, other in pairs)


def _asynchronous(argument: Any) -> Any:
    """Return the manager of the same run for asynchronous code; any other argument as it is."""
    if not isinstance(argument, CallbackManagerForLLMRun):
        return argument
    manager = argument
    return AsyncCallbackManagerForLLMRun(
        run_id=manager.run_id,
        handlers=manager.handlers,
        inheritable_handlers=manager.inheritable_handlers,
        parent_run_id=manager.parent_run_id,
        tags=manager.tags,
        inheritable_tags=manager.inheritable_tags,
        metadata=manager.metadata,
        inheritable_metadata=manager.inheritable_metadata,
    )


@contextmanager
def _streams_hidden() -> Generator[None]:
    """Hide users' streams from models that are called inside this one and inherit its callbacks."""
    around = var_child_runnable_config.get() or {}
    callbacks = around.get("callbacks")
    quiet = _without_streams(callbacks)
    if not callbacks or quiet is callbacks:
        yield
        return
    token = var_child_runnable_config.set({**around, "callbacks": quiet})
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)


def _plain(question: object) -> list[BaseMessage] | None:
    """Return the input as messages if it is plain text that needs no conversion; otherwise None."""
    messages = [HumanMessage(question)] if isinstance(question, str) else question
    is_plain = isinstance(messages, list) and all(
        isinstance(message, BaseMessage) and isinstance(message.content, str)
        for message in cast("list[object]", messages)
    )
    return cast("list[BaseMessage]", messages) if is_plain else None


@contextmanager
def one_step() -> Generator[None]:
    """Mark calls as one step: whether callbacks from the environment listen is looked up once."""
    token = _TELLS.set([])
    try:
        yield
    finally:
        _TELLS.reset(token)


def _is_heard(model: Any, config: RunnableConfig | None) -> bool:
    """Tell whether a tracer, a counter or another callback listens to a call."""
    callbacks = (config or {}).get("callbacks") or (var_child_runnable_config.get() or {}).get("callbacks")
    quiet = _without_streams(callbacks)
    if (quiet.handlers if isinstance(quiet, BaseCallbackManager) else quiet) or model.callbacks or model.verbose:
        return True
    known = _TELLS.get()
    return known[0] if known else _tells(known)


def _tells(known: list[bool] | None) -> bool:
    """Tell whether the environment or the context adds callbacks, such as LangSmith's; remember it in ``known``."""
    found = bool(AsyncCallbackManager.configure().handlers)
    if known is not None:
        known.append(found)
    return found


def _bound_once(model: Any, bind: Callable[..., Any], tools: Sequence[Any], options: dict[str, Any]) -> Any:
    """Return the model with its tools, cached: all calls of a step bind the same ones, the costliest part of a call."""
    made: list[tuple[Sequence[Any], dict[str, Any], Any]] = model.__dict__.setdefault("_ec_bound", [])
    asked = _parts(tools)
    for same, given, found in made:
        # A copy of the model has the list of the original.
        if found.bound is model and len(same) == len(asked) and all(map(is_, same, asked)) and given == options:
            return found
    bound = bind(tools, **options)
    if isinstance(bound, RunnableBinding):
        del made[:-_BOUND]
        made.append((_parts(tools), options, cast("Any", bound)))
    return cast("Any", bound)


def _parts(tools: Sequence[Any]) -> list[Any]:
    """Return the tools and their fields, any of which may change between steps."""
    return [*tools, *(value for tool in tools if isinstance(tool, BaseTool) for value in vars(tool).values())]


def _measured(result: ChatResult) -> ChatResult:
    """Return the result with packed signals in place of log-probabilities."""
    for generation in result.generations:
        message = generation.message
        info = generation.generation_info or {}
        metadata: dict[str, Any] = message.response_metadata
        if SIGNALS_KEY in metadata:
            continue
        logprobs = metadata.get("logprobs") or info.get("logprobs")
        found = logprobs if is_packed(logprobs) else pack_logprobs(partial(token_signals, logprobs))
        message.response_metadata = {**_rest(metadata), SIGNALS_KEY: found}
        if "logprobs" in info:
            generation.generation_info = _rest(info)
    return result


def _rest(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != "logprobs"}


def _explain(error: Exception) -> None:
    """Raise an error with the remedy if the client cannot request log-probabilities."""
    if isinstance(error, TypeError) and _LOGPROBS_REFUSED in str(error):
        raise UnsupportedLogprobs(
            "this model's client does not accept logprobs. ChatOpenAI does not while it uses the Responses API, which "
            "reasoning=, include= and, for some models, tools switch on: pass use_responses_api=False"
        ) from error


def _without_streams(callbacks: Callbacks) -> Callbacks:
    """Return the callbacks that may see every candidate: tracers and counters, but not users' streams."""
    if isinstance(callbacks, BaseCallbackManager):
        streams = list(filter(is_stream, callbacks.handlers))
        quiet = callbacks.copy() if streams else callbacks
        for handler in streams:
            quiet.remove_handler(handler)
        return quiet
    return [handler for handler in callbacks or () if not is_stream(handler)]


def sampling_model(
    model: Runnable[LanguageModelInput, AIMessage], tools: Sequence[Any] = (), top_logprobs: int | None = 20
) -> Runnable[LanguageModelInput, AIMessage]:
    """Return the quiet copy of a model, with tools bound and log-probabilities requested.

    Args:
        model: A chat model, or one with ``.bind(...)``.
        tools: Tools to bind.
        top_logprobs: Alternatives to request per token; None requests nothing.

    Raises:
        ConfigError: It is not a chat model.
    """
    silent, bound, config = silent_model(model)
    prepared: Any = silent.bind_tools(tools) if tools else silent
    # bind_tools on a binding drops what was bound before, so that is bound again here.
    return prepared.bind(**{**logprobs_settings(top_logprobs), **bound}).with_config(config)


def logprobs_settings(top_logprobs: int | None) -> dict[str, Any]:
    """Return the arguments that request log-probabilities; None requests nothing."""
    return {} if top_logprobs is None else {"logprobs": True, "top_logprobs": top_logprobs}
