"""Stage 5 - act: N responses, one chosen, behind LangChain's chat model interface."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any, NamedTuple, cast

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    BaseCallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig, RunnableParallel, RunnableSequence
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from langchain_core.tracers.context import _configure_hooks
from langsmith import tracing_context  # pyright: ignore[reportUnknownVariableType]
from pydantic import ConfigDict, Field, PrivateAttr

from ec_agents.agents.quiet_model import is_configurable
from ec_agents.agents.step import (
    chosen_message,
    decide,
    record_step,
    step_name,
    step_view,
    stream_writer,
    total_usage_metadata,
)
from ec_agents.agents.step_request import StepModel, StepRequest, calling
from ec_agents.agents.tool_calls import ToolChecks, ToolSets
from ec_agents.candidates import Candidate, CandidateSet, Selection
from ec_agents.effort import check_effort
from ec_agents.errors import ConfigError
from ec_agents.messages import message_candidate
from ec_agents.policy import as_policy
from ec_agents.sampling import run_blocking
from ec_agents.selection import as_selector
from ec_agents.servers.json_actions import ActionFormat
from ec_agents.servers.model_classes import OneChunkModel, unknown_argument
from ec_agents.trace import as_trace_writer

_REMEMBERED = 1000
"""Runs whose last number is remembered, and messages whose usage is."""

RunManager = AsyncCallbackManagerForLLMRun | CallbackManagerForLLMRun


class _Usage(NamedTuple):
    """The two places where a message reports its usage."""

    metadata: Any
    token_usage: Any


class CentroidChatModel(OneChunkModel):
    """A chat model that samples N responses from another chat model and answers with the chosen one.

    It works wherever a chat model is expected. Inside ``create_agent``, prefer ``EntropyCentroidMiddleware``, which
    sees whether the structured output of each candidate parses.

    The message's ``usage_metadata`` is that of the chosen response; the usage of all N is in
    ``response_metadata["ec_agents"]["usage"]``. Callbacks and tracers get the usage of all N, each once: on the run of
    this model or, with ``trace_candidates``, on the runs of the candidates. The answer streams as a single chunk.

    Raises:
        ConfigError: An argument is unknown or out of range, or ``model`` is not a chat model. On a call: the
            temperature is 0 with several candidates, or the tools have no JSON form.
        UnsupportedLogprobs: On a call, before anything is sent: the provider cannot return log-probabilities.
        LogprobsMissing: On a call: the first responses of a server carry none.
        ActionError: On a call: no response is the requested JSON, or the server refuses ``response_format``.
        SamplingError: On a call: fewer than ``min_candidates`` calls succeeded.
        SelectionError: On a call: nothing could be scored, and the selector's fallback is ``"raise"``.

    Example:
        >>> from ec_agents import CentroidChatModel
        >>> from ec_agents.embedded import EmbeddedChatModel, make_tasks
        >>> message = CentroidChatModel(EmbeddedChatModel(seed=1), n=4).invoke(make_tasks("play", 1)[0].prompt)
        >>> record = message.response_metadata["ec_agents"]
        >>> record["scores"][record["chosen"]] == min(record["scores"])
        True
    """

    model_config = ConfigDict(populate_by_name=True)

    asked: Any = Field(alias="model")
    """The chat model to sample from, or a binding of one."""
    n: int = 8
    """Candidates per call."""
    selector: Any = None
    """A ``Selector``, a scorer or vote, or a name such as ``"majority"``; by default the lowest entropy centroid."""
    effort: Any = None
    """Decides, up to ``n``, how many candidates each call draws: ``Agree()``, ``Escalate(...)``, …; None draws all."""
    top_logprobs: int | None = 20
    """Alternatives to request per token; None requests nothing."""
    action_format: str = "auto"
    """With tools: ``native`` tool calls; ``json``: actions as JSON in the content, where their tokens are measured;
    ``auto``: ``json`` where tool calls carry no log-probabilities."""
    policy: Any = None
    """A ``SamplingPolicy``, or the timeout of a call in seconds; None waits for all N."""
    temperature: float | None = None
    """Sent with each call; None leaves it to the model."""
    max_tokens: int | None = None
    """Sent with each call; None leaves it to the model."""
    stop: list[str] | None = None
    """Sent with each call; None leaves it to the model."""
    streaming: bool = False
    """Whether ``invoke`` streams inside, as with ``ChatOpenAI``; the answer arrives as one chunk either way."""
    trace_candidates: bool = False
    """Whether callbacks and tracers see the N calls, as children of this model's run. They then get the usage from
    those, and none from this model's run."""
    trace: Any = None
    """A ``TraceWriter`` or the path of a file: records every call as a step.

    ``metadata`` of the configuration may name the run (``ec_run``) and its task (``ec_task``). Without a name, a run is
    whatever shares a ``thread_id`` or a conversation. Steps are numbered in the order in which they are recorded."""

    _step: StepModel = PrivateAttr()
    _tool_sets: ToolSets = PrivateAttr(default_factory=ToolSets)
    _numbers: dict[str, Iterator[int]] = PrivateAttr(default_factory=dict[str, Iterator[int]])
    _usages: dict[str, _Usage] = PrivateAttr(default_factory=dict[str, _Usage])

    def __init__(self, model: Runnable[LanguageModelInput, AIMessage] | None = None, **fields: Any) -> None:
        if problem := unknown_argument(type(self), fields):
            raise ConfigError(
                f"{problem}Limits of calls belong in policy=SamplingPolicy(…), and other settings on the sampled model"
            )
        given: dict[str, Any] = {"asked": model, **fields}
        super().__init__(**given)
        # Here rather than in pydantic's validators, which would turn ConfigError into their own ValidationError, and
        # cannot describe the protocols that a selector holds.
        self.selector = as_selector(self.selector)
        self.trace = as_trace_writer(self.trace)
        self.policy = as_policy(self.policy)
        self.policy.check(self.n)
        if self.effort is not None:
            check_effort(self.effort, self.n)
        if is_configurable(self.asked):
            raise ConfigError(
                "model is configurable, and CentroidChatModel asks one model; make one for each alternative: "
                "CentroidChatModel(a).configurable_alternatives(ConfigurableField(...), b=CentroidChatModel(b))"
            )
        action_format = cast("ActionFormat", self.action_format)
        self._step = StepModel(self.asked, top_logprobs=self.top_logprobs, action_format=action_format)

    @property
    def model(self) -> str:
        """Name of the sampled model, by the name under which ``ChatOpenAI`` has it too."""
        return self.model_name

    @property
    def model_name(self) -> str:
        """Name of the sampled model, or of its class where it has none."""
        asked = self._step.model
        names = [self._step.options.get("model"), *(getattr(asked, name, None) for name in _NAMES)]
        return next((name for name in names if name and isinstance(name, str)), type(asked).__name__)

    def _resolve_model_profile(self) -> ModelProfile | None:
        found = self.asked
        while isinstance(found, RunnableBinding):
            found = cast("RunnableBinding[Any, Any]", found).bound
        return getattr(found, "profile", None)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the tokens of a text, as the sampled model counts them."""
        return self._step.model.get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, as the sampled model counts them."""
        return self._step.model.get_num_tokens(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Return the number of tokens of messages, as the sampled model counts them."""
        return self._step.model.get_num_tokens_from_messages(messages, tools)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools in the sampled model's own form; arguments are those of its ``bind_tools``."""
        options = {
            "tool_choice": tool_choice,
            "strict": strict,
            "parallel_tool_calls": parallel_tool_calls,
            "response_format": response_format,
        }
        given = {name: value for name, value in options.items() if value is not None}
        bound = self._step.with_tools(tools, **given, **kwargs)
        # The tools themselves say more than the form in which they are bound.
        self._tool_sets.of(bound.get("tools") or (), lambda: ToolChecks(tools))
        return self.bind(**bound)

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: str | None = None,
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Make the model answer in a schema, in the way of the sampled model, whose arguments and defaults hold.

        Args:
            schema: A class or JSON schema.
            method: One of the sampled model's methods, such as ``"json_schema"`` or ``"function_calling"``.
            include_raw: Whether to return ``{"raw": message, "parsed": …, "parsing_error": …}``.
            strict: Whether the server has to keep to the schema.
            **kwargs: Other arguments of the sampled model's ``with_structured_output``.

        Raises:
            ConfigError: The sampled model has no such method, or ignores ``strict``.
        """
        asked = self._step.model
        given = {name: value for name, value in (("method", method), ("strict", strict)) if value is not None}
        is_default = type(asked).with_structured_output is BaseChatModel.with_structured_output  # it ignores both
        if is_default and given and given != {"method": "function_calling"}:
            raise ConfigError(
                f"structured output of {type(asked).__name__} is a tool call: method must be 'function_calling', and "
                f"strict is not supported; found method={method!r}, strict={strict!r}"
            )
        structured = asked.with_structured_output(schema, include_raw=include_raw, **given, **kwargs)
        found, replaced = self._instead(structured)
        if not replaced:
            raise ConfigError(f"with_structured_output() of {type(asked).__name__} does not bind the model itself")
        return found

    def _instead(self, runnable: object) -> tuple[Any, bool]:
        """Return a chain with this model in place of the sampled one, and whether the chain had it."""
        part: Any = runnable
        if isinstance(runnable, RunnableBinding) and part.bound is self._step.model:
            return self.bind(**{**self._step.options, **part.kwargs}), True
        if isinstance(runnable, RunnableSequence):
            first, replaced = self._instead(part.first)
            return part.model_copy(update={"first": first}), replaced
        if isinstance(runnable, RunnableParallel):
            found = {name: self._instead(branch) for name, branch in part.steps__.items()}
            return RunnableParallel({name: one for name, (one, _) in found.items()}), any(r for _, r in found.values())
        return part, False

    @property
    def _llm_type(self) -> str:
        return "ec-agents-centroid"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        asked = self._step.model._identifying_params  # noqa: SLF001 - a wrapper passes them on
        return {**asked, "n": self.n}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        options = {**self._options(stop), **self._step.options, **kwargs}
        params = self._step.model._get_ls_params(**options)  # noqa: SLF001 - a wrapper passes them on
        known = {"ls_temperature": "temperature", "ls_max_tokens": "max_tokens", "ls_model_name": "model"}
        given = {key: options[name] for key, name in known.items() if options.get(name) is not None}
        return cast("LangSmithParams", {**params, **given})

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return run_blocking(lambda: self._choose(messages, run_manager, {**self._options(stop), **kwargs}))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await self._choose(messages, run_manager, {**self._options(stop), **kwargs})

    def generate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Answer; callbacks get the usage of all N, the caller that of the chosen response."""
        return self._with_own_usage(super().generate(*args, **kwargs))

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Answer; callbacks get the usage of all N, the caller that of the chosen response."""
        return self._with_own_usage(await super().agenerate(*args, **kwargs))

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Answer in one chunk; usage as with ``generate``."""
        for chunk in super().stream(*args, **kwargs):
            yield self._own_usage(chunk)

    async def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Answer in one chunk; usage as with ``agenerate``."""
        async for chunk in super().astream(*args, **kwargs):
            yield self._own_usage(chunk)

    def _with_own_usage(self, result: LLMResult) -> LLMResult:
        """Return the result of calls with copies of their messages, for callbacks keep the others."""
        generations = [
            [ChatGeneration(message=self._own_usage(cast("Any", one).message)) for one in generations]
            for generations in result.generations
        ]
        return result.model_copy(update={"generations": generations})

    def _own_usage(self, message: Any) -> Any:
        """Return the message with the usage of its own response, if callbacks got another."""
        usage = self._usages.pop(message.id, None)
        if usage is None:
            return message
        metadata = _with_token_usage(message.response_metadata, usage.token_usage)
        return message.model_copy(update={"usage_metadata": usage.metadata, "response_metadata": metadata})

    def _options(self, stop: list[str] | None) -> dict[str, Any]:
        """Return the options that are set, which are sent with each call."""
        options = {"temperature": self.temperature, "max_tokens": self.max_tokens, "stop": stop or self.stop or None}
        return {name: value for name, value in options.items() if value is not None}

    async def _choose(
        self, messages: list[BaseMessage], run_manager: RunManager | None, options: dict[str, Any]
    ) -> ChatResult:
        """Sample N responses and return the chosen message."""
        started = time.perf_counter()
        options = {**self._step.options, **options}
        # Not through a binding, which would add the callbacks of whatever runs around it.
        config: RunnableConfig = {**self._step.config, **self._callbacks(run_manager)}
        ask, write = calling(messages, config), stream_writer()

        checks = self._tool_sets.of(options.get("tools") or ())

        def parse(message: AIMessage, index: int) -> Candidate:
            return checks.checked(message_candidate(message, index))

        with nullcontext() if self.trace_candidates else _unheard():
            request = StepRequest(self._step, options, self.n, policy=self.policy, parse=parse, effort=self.effort)
            drawn = await request.draw(ask, write=write, view=step_view(messages, _named(options.get("tools") or ())))
        seconds = time.perf_counter() - started
        selection, record, _ = decide(self.selector, drawn, write)
        if self.trace is not None:
            record |= await self._recorded(messages, drawn, selection, run_manager, seconds)
        message = chosen_message(drawn.messages[selection.chosen], record)
        message.id = None if run_manager is None else f"lc_run--{run_manager.run_id}"
        return self._reported(message, drawn, run_manager)

    def _reported(self, message: AIMessage, drawn: CandidateSet, run_manager: RunManager | None) -> ChatResult:
        """Return the result as callbacks get it: with the usage of all N, or none where they see the candidates."""
        if run_manager is None or not run_manager.handlers:
            return ChatResult(generations=[ChatGeneration(message=message)])
        self._usages[str(message.id)] = _Usage(message.usage_metadata, message.response_metadata.get("token_usage"))
        if len(self._usages) > _REMEMBERED:
            self._usages.pop(next(iter(self._usages)), None)
        usage = None if self.trace_candidates else total_usage_metadata(drawn)
        counts = cast("dict[str, int] | None", usage)
        spent = None if counts is None else {name: counts[ours] for name, ours in _TOKEN_USAGE.items()}
        metadata = _with_token_usage(message.response_metadata, spent)
        shown = message.model_copy(update={"usage_metadata": usage, "response_metadata": metadata})
        output = {"model_name": metadata.get("model_name", self.model_name), "token_usage": spent or {}}
        return ChatResult(generations=[ChatGeneration(message=shown)], llm_output=output)

    async def _recorded(
        self,
        messages: list[BaseMessage],
        drawn: CandidateSet,
        selection: Selection,
        run_manager: RunManager | None,
        seconds: float,
    ) -> dict[str, Any]:
        """Write the step into the trace and return its name.

        The number follows that of the last step in the conversation, or the last one that this object recorded for the
        run.
        """
        around = ensure_config()
        metadata = {**around.get("metadata", {}), **(run_manager.metadata if run_manager else {})}
        config: RunnableConfig = {**around, "metadata": metadata}
        name = step_name(config, _shown_step(messages))
        numbers = self._numbers.setdefault(name["run"], count())
        name["step"] = next(number for number in numbers if number >= name["step"])
        if len(self._numbers) > _REMEMBERED:
            self._numbers.pop(next(iter(self._numbers)), None)
        before = {**name, "step": name["step"] - 1}
        write = partial(record_step, config=config, previous=before, seconds=seconds)
        return await asyncio.to_thread(write, self.trace, drawn, selection)

    def _callbacks(self, run_manager: RunManager | None) -> RunnableConfig:
        """Return the callbacks of the N calls: those bound to the sampled model and, if asked for, those of the run.

        A handler that is both hears of each token once, from the N calls or from this model's run.
        """
        bound = self._step.config.get("callbacks") or []
        own = list(bound.handlers if isinstance(bound, BaseCallbackManager) else bound)
        if run_manager is None:
            return {"callbacks": own}
        around = run_manager.handlers
        told = [handler for handler in own if handler not in around] + (around if self.trace_candidates else [])
        return {"callbacks": AsyncCallbackManager(told, told, run_manager.run_id)}


@contextmanager
def _unheard() -> Generator[None]:
    """Keep callbacks that the environment or the context adds, such as tracers and counters, from the calls inside."""
    added = [(hook[0], hook[0].set(None)) for hook in _configure_hooks if hook[0].get() is not None]
    try:
        with tracing_context(enabled=False):
            yield
    finally:
        for variable, token in added:
            variable.reset(token)


_NAMES = ("model_name", "model", "model_id")
"""Attributes in which integrations keep the name of the model."""

_TOKEN_USAGE = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens", "total_tokens": "total_tokens"}
"""OpenAI's names of token counts, and LangChain's."""


def _with_token_usage(metadata: dict[str, Any], usage: Any) -> dict[str, Any]:
    """Return the metadata with this usage under OpenAI's name; None removes it."""
    rest = {name: value for name, value in metadata.items() if name != "token_usage"}
    return rest if usage is None else {**rest, "token_usage": usage}


def _shown_step(messages: Sequence[BaseMessage]) -> dict[str, Any] | None:
    """Return the name of the last step in a conversation that has one."""
    records = (message.response_metadata.get("ec_agents", {}) for message in reversed(messages))
    return next((record for record in records if "run" in record), None)


def _named(tools: Sequence[Any]) -> dict[str, Any]:
    """Return bound tools by name."""
    functions: list[Any] = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return {str(function.get("name")): function for function in functions}
