"""Stage 5 - act: N answers, one chosen, behind LangChain's chat model interface."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any, cast

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    BaseCallbackManager,
    CallbackManagerForLLMRun,
    UsageMetadataCallbackHandler,
)
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from langsmith import tracing_context  # pyright: ignore[reportUnknownVariableType]
from pydantic import PrivateAttr

from ec_agents.agents.quiet_model import is_configurable
from ec_agents.agents.step import chosen_message, decide, record_step, step_name, step_view, stream_writer
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
from ec_agents.servers.model_classes import OneChunkModel
from ec_agents.trace import as_trace_writer

_REMEMBERED = 1000
"""Runs whose last number is remembered."""

RunManager = AsyncCallbackManagerForLLMRun | CallbackManagerForLLMRun


class CentroidChatModel(OneChunkModel):
    """A chat model that asks another one N times and answers with the chosen response.

    Any code that takes a chat model can take it. Inside ``create_agent``, ``EntropyCentroidMiddleware`` is the better
    choice, because it sees which candidates' structured output parses.

    The message's ``usage_metadata`` is its own; the usage of all N is in ``response_metadata["ec_agents"]["usage"]``,
    and LangChain's usage callback counts all N. Streaming gives the chosen answer in one piece.

    Raises:
        ConfigError: A field is out of range, or ``model`` is no chat model. On a call: the temperature is 0 with
            several candidates, or there is no JSON form of the tools.
        UnsupportedLogprobs: On a call, before anything is sent: the provider cannot return what is to be measured.
        LogprobsMissing: On a call: the first responses of a server show that it does not return it.
        ActionError: On a call: no answer is the JSON that was asked for, or the server refuses to be asked for it.
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

    model: Any
    """The chat model to ask, or a binding of one."""
    n: int = 8
    """How many candidates."""
    selector: Any = None
    """How to choose: a ``Selector``, a scorer or vote, or a name; None takes the lowest entropy centroid."""
    effort: Any = None
    """Decides, up to ``n``, how many candidates each call draws: ``Agree()``, ``Escalate(...)``, …; None draws all."""
    top_logprobs: int | None = 20
    """Alternatives to ask for at each token; None asks for nothing."""
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
    trace_candidates: bool = False
    """Whether tracers see the N calls, as children of this one."""
    trace: Any = None
    """A ``TraceWriter`` or the path of a file: records every call as a step.

    ``metadata`` of the configuration may name the run (``ec_run``) and its task (``ec_task``); otherwise a run is what
    has one ``thread_id``, or one conversation. Its steps are numbered as they are recorded."""

    _step: StepModel = PrivateAttr()
    _tool_sets: ToolSets = PrivateAttr(default_factory=ToolSets)
    _numbers: dict[str, Iterator[int]] = PrivateAttr(default_factory=dict[str, Iterator[int]])

    def __init__(self, model: Runnable[LanguageModelInput, AIMessage] | None = None, **fields: Any) -> None:
        fields |= {"model": model}
        super().__init__(**fields)
        # Here rather than in pydantic's validators, which would turn ConfigError into their own ValidationError, and
        # cannot describe the protocols that a selector holds.
        self.selector = as_selector(self.selector)
        self.trace = as_trace_writer(self.trace)
        self.policy = as_policy(self.policy)
        self.policy.check(self.n)
        if self.effort is not None:
            check_effort(self.effort, self.n)
        if is_configurable(self.model):
            raise ConfigError(
                "model is configurable, and CentroidChatModel asks one model; make one for each alternative: "
                "CentroidChatModel(a).configurable_alternatives(ConfigurableField(...), b=CentroidChatModel(b))"
            )
        action_format = cast("ActionFormat", self.action_format)
        self._step = StepModel(self.model, top_logprobs=self.top_logprobs, action_format=action_format)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools, in the form that the asked model binds them in."""
        choice = {} if tool_choice is None else {"tool_choice": tool_choice}
        bound = self._step.with_tools(tools, **choice, **kwargs)
        # The tools themselves say more than the form in which they are bound.
        self._tool_sets.of(bound.get("tools") or (), lambda: ToolChecks(tools))
        return self.bind(**bound)

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

    def _options(self, stop: list[str] | None) -> dict[str, Any]:
        """What is sent with each call, as far as it is given."""
        options = {"temperature": self.temperature, "max_tokens": self.max_tokens, "stop": stop or self.stop or None}
        return {name: value for name, value in options.items() if value is not None}

    async def _choose(
        self, messages: list[BaseMessage], run_manager: RunManager | None, options: dict[str, Any]
    ) -> ChatResult:
        """Ask N times, and give the chosen message."""
        started = time.perf_counter()
        options = {**self._step.options, **options}
        # Not through a binding, which would add the callbacks of whatever runs around it.
        config: RunnableConfig = {**self._step.config, **self._callbacks(run_manager)}
        ask, write = calling(messages, config), stream_writer()

        checks = self._tool_sets.of(options.get("tools") or ())

        def parse(message: AIMessage, index: int) -> Candidate:
            return checks.checked(message_candidate(message, index))

        # Without this, tracing that the environment switches on would show the N calls as runs of their own.
        with tracing_context(enabled=None if self.trace_candidates else False):
            request = StepRequest(self._step, options, self.n, policy=self.policy, parse=parse, effort=self.effort)
            drawn = await request.draw(ask, write=write, view=step_view(messages, _named(options.get("tools") or ())))
        seconds = time.perf_counter() - started
        selection, record, _ = decide(self.selector, drawn, write)
        if self.trace is not None:
            record |= await self._recorded(messages, drawn, selection, run_manager, seconds)
        message = chosen_message(drawn.messages[selection.chosen], record)
        message.id = None if run_manager is None else f"lc_run--{run_manager.run_id}"
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _recorded(
        self,
        messages: list[BaseMessage],
        drawn: CandidateSet,
        selection: Selection,
        run_manager: RunManager | None,
        seconds: float,
    ) -> dict[str, Any]:
        """Write the step into the trace; its name.

        The step before is the last one that the conversation shows. Where it shows none, this object knows how many it
        has recorded of the run.
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
        """Who is told of the N calls.

        What is bound to the asked model is. Usage counters are told of the N calls and not of this one, which repeats
        the usage of one of them.
        """
        bound = self._step.config.get("callbacks") or []
        own = bound.handlers if isinstance(bound, BaseCallbackManager) else bound
        if run_manager is None:
            return {"callbacks": list(own)}
        counters = [h for h in run_manager.handlers if isinstance(h, UsageMetadataCallbackHandler)]
        others = [handler for handler in run_manager.handlers if handler not in counters]
        run_manager.handlers = others
        told = [*own, *(h for h in [*counters, *(others if self.trace_candidates else ())] if h not in own)]
        return {"callbacks": AsyncCallbackManager(told, told, run_manager.run_id)}


def _shown_step(messages: Sequence[BaseMessage]) -> dict[str, Any] | None:
    """The name of the last step in a conversation that has one."""
    records = (message.response_metadata.get("ec_agents", {}) for message in reversed(messages))
    return next((record for record in records if "run" in record), None)


def _named(tools: Sequence[Any]) -> dict[str, Any]:
    """Return bound tools by name."""
    functions: list[Any] = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return {str(function.get("name")): function for function in functions}
