"""Stage 5 - act: N answers, one chosen, behind LangChain's chat model interface."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
    UsageMetadataCallbackHandler,
)
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langsmith import tracing_context  # pyright: ignore[reportUnknownVariableType]
from pydantic import PrivateAttr

from ec_agents.candidates import Candidate
from ec_agents.drawing import refuse_equal_candidates, seeded
from ec_agents.errors import ConfigError
from ec_agents.loops import loop_safe
from ec_agents.messages import bound_action_problem, logprobs_settings, message_candidate
from ec_agents.models import silent_model
from ec_agents.sampling import check_sampling, run_blocking, sample
from ec_agents.selection import Selector
from ec_agents.step import chosen_message, decide, draw, stream_writer
from ec_agents.waiting import SamplingPolicy

RunManager = AsyncCallbackManagerForLLMRun | CallbackManagerForLLMRun


class CentroidChatModel(BaseChatModel):
    """A chat model that asks another one N times and answers with the chosen response.

    Any code that takes a chat model can take it. Inside ``create_agent``, ``EntropyCentroidMiddleware`` is the better
    choice, because it sees which candidates' structured output parses.

    The message's ``usage_metadata`` is its own; the usage of all N is in ``response_metadata["ec_agents"]["usage"]``,
    and LangChain's usage callback counts all N. Streaming gives the chosen answer in one piece.

    Raises:
        ConfigError: A field is out of range, or ``model`` is no chat model. On a call: the temperature is 0 with
            several candidates.
        SamplingError: On a call: fewer than ``min_candidates`` calls succeeded.
        SelectionError: On a call: nothing could be scored, and the selector's fallback is ``"raise"``.

    Example:
        >>> from ec_agents import CentroidChatModel
        >>> from ec_agents.embedded import EmbeddedChatModel
        >>> message = CentroidChatModel(EmbeddedChatModel(seed=1), n=4).invoke("Ann has 12. How many has Ann?")
        >>> sorted(message.response_metadata["ec_agents"]["scores"])
        ['0', '1', '2', '3']
    """

    model: Any
    """The chat model to ask, or a binding of one."""
    n: int = 8
    """How many candidates."""
    selector: Any = None
    """A ``Selector``: how to choose; None takes the lowest entropy centroid."""
    top_logprobs: int | None = 20
    """Alternatives to ask for at each token; None asks for nothing."""
    policy: Any = None
    """A ``SamplingPolicy``: what a call needs and how long it waits; None waits for all N."""
    min_candidates: int | None = None
    """Instead of the policy's: fewer successful calls than this are an error."""
    max_concurrency: int | None = None
    """Instead of the policy's: at most so many calls at once."""
    timeout: float | None = None
    """Instead of the policy's: seconds that one call may take."""
    max_retries: int | None = None
    """Instead of the policy's ``retries``: how often a failed call is sent again."""
    temperature: float | None = None
    """Sent with each call; None leaves it to the model."""
    max_tokens: int | None = None
    """Sent with each call; None leaves it to the model."""
    stop: list[str] | None = None
    """Sent with each call; None leaves it to the model."""
    trace_candidates: bool = False
    """Whether tracers see the N calls, as children of this one."""

    _asked: BaseChatModel = PrivateAttr()
    _bound: dict[str, Any] = PrivateAttr()
    _config: RunnableConfig = PrivateAttr()

    def __init__(self, model: Runnable[LanguageModelInput, AIMessage] | None = None, **fields: Any) -> None:
        fields |= {"model": model}
        super().__init__(**fields)
        # Here rather than in pydantic's validators, which would turn ConfigError into their own ValidationError, and
        # cannot describe the protocols that a selector holds.
        for name, kind in (("selector", Selector), ("policy", SamplingPolicy)):
            found = getattr(self, name)
            if not isinstance(found, kind | None):
                raise ConfigError(f"{name} must be a {kind.__name__} or None; found {type(found).__name__}")
        model, self._bound, self._config = silent_model(self.model)
        self._asked = loop_safe(model)
        self._policy()

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools, in the form that the asked model binds them in."""
        choice = {} if tool_choice is None else {"tool_choice": tool_choice}
        prepared: Any = self._asked.bind_tools(tools, **choice, **kwargs)
        return self.bind(**{**self._bound, **prepared.kwargs})

    @property
    def _llm_type(self) -> str:
        return "ec-agents-centroid"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        asked = self._asked._identifying_params  # noqa: SLF001 - a wrapper passes them on
        return {**asked, "n": self.n}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        options = {**self._options(stop), **self._bound, **kwargs}
        params = self._asked._get_ls_params(**options)  # noqa: SLF001 - a wrapper passes them on
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

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        chunk = _chunk(self._generate(messages, stop, run_manager, **kwargs))
        if run_manager:
            run_manager.on_llm_new_token(str(chunk.text), chunk=chunk)
        yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        chunk = _chunk(await self._agenerate(messages, stop, run_manager, **kwargs))
        if run_manager:
            await run_manager.on_llm_new_token(str(chunk.text), chunk=chunk)
        yield chunk

    def _options(self, stop: list[str] | None) -> dict[str, Any]:
        """What is sent with each call, as far as it is given."""
        options = {"temperature": self.temperature, "max_tokens": self.max_tokens, "stop": stop or self.stop or None}
        return {name: value for name, value in options.items() if value is not None}

    def _policy(self) -> SamplingPolicy:
        policy = check_sampling(self.n, self.min_candidates, self.timeout, self.max_concurrency, self.policy)
        return policy if self.max_retries is None else replace(policy, retries=self.max_retries)

    async def _choose(
        self, messages: list[BaseMessage], run_manager: RunManager | None, options: dict[str, Any]
    ) -> ChatResult:
        """Ask N times, and give the chosen message."""
        model = self._asked
        options = {**logprobs_settings(self.top_logprobs), **self._bound, **options}
        refuse_equal_candidates(options.get("temperature", getattr(model, "temperature", None)), self.n)
        # Not through a binding, which would add the callbacks of whatever runs around it.
        config: RunnableConfig = {**self._config, **self._callbacks(run_manager)}
        variants = seeded(model, options, self.n)

        def call(index: int) -> Any:
            asked, sent = variants[index % len(variants)]
            return asked.ainvoke(messages, config, **sent)

        def parse(message: AIMessage, index: int) -> Candidate:
            return _checked(message_candidate(message, index), options.get("tools") or ())

        write = stream_writer()
        # Without this, tracing that the environment switches on would show the N calls as runs of their own.
        with tracing_context(enabled=None if self.trace_candidates else False):
            sampling = partial(sample, policy=self._policy())
            drawn = await draw(sampling, call, n=self.n, model=model.bind(**options), write=write, parse=parse)
        selection, record, _ = decide(self.selector or Selector(), drawn, write)
        message = chosen_message(drawn.messages[selection.chosen], record)
        message.id = None if run_manager is None else f"lc_run--{run_manager.run_id}"
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _callbacks(self, run_manager: RunManager | None) -> RunnableConfig:
        """Who is told of the N calls.

        Usage counters are told of the N calls and not of this one, which repeats the usage of one of them.
        """
        if run_manager is None:
            return {"callbacks": []}
        counters = [h for h in run_manager.handlers if isinstance(h, UsageMetadataCallbackHandler)]
        others = [handler for handler in run_manager.handlers if handler not in counters]
        run_manager.handlers = others
        told = [*counters, *(others if self.trace_candidates else ())]
        return {"callbacks": AsyncCallbackManager(told, told, run_manager.run_id)}


def _chunk(result: ChatResult) -> ChatGenerationChunk:
    """The chosen message as a stream of one chunk."""
    message = cast("AIMessage", result.generations[0].message)
    fields = {name: getattr(message, name) for name in type(message).model_fields if name != "type"}
    return ChatGenerationChunk(message=AIMessageChunk(**fields, chunk_position="last"))


def _checked(candidate: Candidate, tools: Sequence[Any]) -> Candidate:
    """The candidate with the flaw of an action that does not fit the bound tools."""
    problem = bound_action_problem(candidate, tools)
    if problem is None or "invalid_action" in candidate.flaws:
        return candidate
    return replace(candidate, flaws={**candidate.flaws, "invalid_action": problem})
