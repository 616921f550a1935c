"""Stage 5 - act: the steps of an agent of ``langchain.agents.create_agent``.

Put it last in the list of middleware. Only what repeats a failed call, such as ``ModelRetryMiddleware``, may come after
it: whatever comes after it runs once for each of the N candidates.
"""

import asyncio
import math
import operator
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage, message_to_dict, messages_from_dict
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from langgraph.func import task
from langgraph.types import Command

from ec_agents.agents.packing import packed, reading_state, unpacked
from ec_agents.agents.running_task import check_durability, refuse_other_candidates, unanswered
from ec_agents.agents.step import (
    Write,
    announce,
    chosen_message,
    decide,
    record_step,
    step_view,
    stream_writer,
    without_logprobs,
)
from ec_agents.agents.step_request import Options, StepModel, StepRequest, check_action_format, remembering
from ec_agents.agents.tool_calls import ToolChecks, ToolSets, answered
from ec_agents.candidates import Candidate, CandidateSet
from ec_agents.effort import Effort, StepView, check_effort
from ec_agents.errors import ConfigError
from ec_agents.messages import SIGNALS_KEY, message_candidate
from ec_agents.policy import SamplingPolicy, as_policy, respond
from ec_agents.sampling import in_thread, run_blocking, timed, with_seconds
from ec_agents.scoring import Scorer
from ec_agents.selection import Selector, as_selector
from ec_agents.servers.json_actions import ActionFormat
from ec_agents.trace import TraceWriter, as_trace_writer

try:
    from langchain.agents import AgentState
    from langchain.agents.middleware import AgentMiddleware, ExtendedModelResponse, ModelRequest, ModelResponse
    from langchain.agents.middleware.types import PrivateStateAttr
    from langchain.agents.structured_output import (
        AutoStrategy,
        ProviderStrategy,
        StructuredOutputError,
        StructuredOutputValidationError,
    )
except ImportError as error:
    raise ImportError("the middleware needs langchain: pip install 'ec-agents[langchain]'") from error

Request = ModelRequest[Any]
Response = ModelResponse[Any]
Stored = tuple[str, Any]

_TASK = "ec_sample"
"""Name of the LangGraph tasks of a durable step."""

_CALL_LIMITS: Mapping[str, Any] = {
    "timeout": None,
    "hedge_after": None,
    "retries": 0,
    "max_concurrency": None,
    "limiter": None,
}
"""The fields of a policy that limit single calls, switched off."""

_FOREIGN = (
    "it is not from the model that was sampled: a middleware after EntropyCentroidMiddleware answered, or changed the "
    "model; put EntropyCentroidMiddleware last"
)


class CentroidAgentState(AgentState[Any]):
    """The state of the agent, with the evidence of every choice, which neither input nor output shows."""

    # LangGraph finds a reducer only in the last place.
    ec_decisions: NotRequired[Annotated[list[dict[str, Any]], PrivateStateAttr, operator.add]]
    """One record a step; the same is in the message's ``response_metadata["ec_agents"]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What a step has from its beginning to its end."""

    request: Request
    asks: StepRequest
    n: int
    tools: ToolChecks
    outputs: ToolChecks
    config: RunnableConfig
    write: Write
    started: float

    @property
    def view(self) -> StepView:
        """What an effort may know."""
        named = {tool.name: tool for tool in self.request.tools if isinstance(tool, BaseTool)}
        return step_view(self.request.messages, named)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What one call gave: the whole response, for its structured output and tool messages belong to it."""

    candidate: Candidate
    message: AIMessage
    response: Response
    error: StructuredOutputError | None = None


class EntropyCentroidMiddleware(AgentMiddleware[AgentState[Any], Any, Any]):
    """The middleware that draws N responses at every step and lets only the chosen one into the conversation.

    The message's ``response_metadata["ec_agents"]`` says scores, chosen, margin, reason, and the usage of all N; its
    ``usage_metadata`` is its own. The ``custom`` stream has an event for each candidate and each choice.

    Args:
        n: How many candidates; or a function of the request (its state, tools, messages). ``ec_n`` in the run's context
            or in ``config["configurable"]`` goes before both.
        selector: A ``Selector``, a scorer or vote, or a name such as ``"majority"``; by default the lowest entropy
            centroid.
        top_logprobs: Alternatives to ask for at each token; None asks for nothing and leaves the model as it is.
        action_format: ``native`` tool calls; ``json``: actions as JSON in the content, where their tokens are measured;
            ``auto``: ``json`` where tool calls carry no log-probabilities.
        policy: Timeouts, retries, hedging and limits of a step; a number is the timeout of a call in seconds.
            Calls that the step gives up are closed, in ``invoke`` too, unless the model has only a synchronous method:
            such a call runs on in a thread that does not keep the process alive.
        effort: Decides, up to ``n``, how many candidates each step draws: ``Agree()``, ``Escalate(...)``, ``ByRisk()``,
            ``Prime()``, or a function; None draws all at once.
        durable: Make each call a LangGraph task, so that a run that crashed repeats only the missing calls, and an
            interrupt in the same step does not draw again. Needs a checkpointer.
        trace: Records every step: a ``TraceWriter`` or the path of a file. ``metadata`` of the configuration may name
            the run (``ec_run``) and its task (``ec_task``).

    Raises:
        ConfigError: An argument is out of range. At run time: so is the number of candidates; the temperature is 0 with
            several; ``durable`` cannot work; the step is run again after a person was asked; a middleware after this
            one changes the state; there is no JSON form of the tools.
        UnsupportedLogprobs: At run time, before anything is sent: the provider cannot return what is to be measured.
        LogprobsMissing: At run time: the first responses of a server show that it does not return it.
        ActionError: At run time: no answer is the JSON that was asked for, or the server refuses to be asked for it.
        SamplingError: At run time: fewer than ``min_candidates`` calls succeeded.
        SelectionError: At run time: nothing could be scored, and the selector's fallback is ``"raise"``.

    Example:
        >>> from langchain.agents import create_agent
        >>> from ec_agents import EntropyCentroidMiddleware
        >>> from ec_agents.embedded import EmbeddedChatModel, make_tasks
        >>> agent = create_agent(EmbeddedChatModel(seed=1), middleware=[EntropyCentroidMiddleware(n=4)])
        >>> state = agent.invoke({"messages": [("user", make_tasks("play", 1)[0].prompt)]})
        >>> record = state["messages"][-1].response_metadata["ec_agents"]
        >>> record["scores"][record["chosen"]] == min(record["scores"])
        True
    """

    state_schema = CentroidAgentState

    def __init__(
        self,
        n: int | Callable[[Request], int] = 8,
        selector: Selector | Scorer | str | None = None,
        *,
        top_logprobs: int | None = 20,
        action_format: ActionFormat = "auto",
        policy: SamplingPolicy | float | None = None,
        effort: Effort | None = None,
        durable: bool = False,
        trace: TraceWriter | str | Path | None = None,
    ) -> None:
        super().__init__()
        self.n = n
        self.selector = as_selector(selector)
        self.durable = durable
        self.trace = as_trace_writer(trace)
        self.policy = as_policy(policy)
        self.policy.check(sys.maxsize if callable(n) else n)
        # A durable call is one task, whose position LangGraph remembers: its retries and its queueing happen inside.
        self._step_policy = replace(self.policy, **_CALL_LIMITS) if durable else self.policy
        self.effort = effort
        if effort is not None:
            check_effort(effort, sys.maxsize if callable(n) else n)
        check_action_format(action_format)
        self._tool_sets = ToolSets()
        self._prepared = remembering(partial(StepModel, top_logprobs=top_logprobs, action_format=action_format))

    async def awrap_model_call(  # noqa: D102 - inherited
        self, request: Request, handler: Callable[[Request], Awaitable[Response]]
    ) -> ExtendedModelResponse[Any]:
        step = self._begin(request)
        if not self.durable and (place := unanswered(step.config)):
            refuse_other_candidates(place, await place.saver.aget_tuple(place.checkpoint))

        async def answer(model: BaseChatModel, options: Options, index: int) -> _Answer:
            try:
                return _answer(await handler(_with_model(request, model, options)), index, step)
            except StructuredOutputError as error:
                return _unparsed(error, index)

        async def stored(model: BaseChatModel, options: Options, index: int) -> _Answer:
            async def work() -> Stored:
                return _pack(await _responded(partial(answer, model, options, index), self.policy, gate))

            return _unpack(await task(name=_TASK)(work)(), index)

        async def form() -> bool:
            return step.asks.writes_json()

        gate = self.policy.gate()
        as_json = await task(name=_TASK)(form)() if self._keeps_form(step) else None
        ask = stored if self.durable else answer
        drawn = await step.asks.draw(ask, write=step.write, view=step.view, begins_as_json=as_json)
        return await self._conclude(step, handler, drawn)

    def wrap_model_call(  # noqa: D102 - inherited
        self, request: Request, handler: Callable[[Request], Response]
    ) -> ExtendedModelResponse[Any]:
        step = self._begin(request)
        if not self.durable and (place := unanswered(step.config)):
            refuse_other_candidates(place, place.saver.get_tuple(place.checkpoint))

        def answer(model: BaseChatModel, options: Options, index: int) -> _Answer:
            try:
                return _answer(handler(_with_model(request, model, options)), index, step)
            except StructuredOutputError as error:
                return _unparsed(error, index)

        def stored(model: BaseChatModel, options: Options, index: int) -> _Answer:
            send = partial(in_thread, partial(answer, model, options, index))
            found = task(name=_TASK)(lambda: _pack(run_blocking(lambda: _responded(send, self.policy, gate))))()
            return _unpack(found.result(), index)

        def ask(model: BaseChatModel, options: Options, index: int) -> Awaitable[_Answer]:
            return in_thread(partial(stored if self.durable else answer, model, options, index))

        gate = self.policy.gate()
        as_json = task(name=_TASK)(step.asks.writes_json)().result() if self._keeps_form(step) else None

        async def work() -> ExtendedModelResponse[Any]:
            drawn = await step.asks.draw(ask, write=step.write, view=step.view, begins_as_json=as_json)
            return await self._conclude(step, handler, drawn)

        return run_blocking(work)

    def _begin(self, request: Request) -> _Step:
        config = ensure_config()
        if self.durable:
            check_durability(config)
        model = self._prepared(request.model)
        n = self._n_of(request, config)
        # A schema of the user's own may become a tool; which, LangChain decides when it binds the tools.
        acts = bool(request.tools) or not isinstance(request.response_format, ProviderStrategy | None)
        options = {**model.options, **request.model_settings}
        return _Step(
            request=request,
            asks=StepRequest(
                model, options, n, policy=self._step_policy, parse=_candidate, effort=self.effort, tools=acts
            ),
            n=n,
            tools=self._tool_sets.of(request.tools),
            outputs=self._outputs(request),
            config=config,
            write=stream_writer(),
            started=time.perf_counter(),
        )

    def _outputs(self, request: Request) -> ToolChecks:
        """Return the checks of structured output whose schema is a dict."""
        schemas = _json_schemas(request.response_format)
        forms = [{"name": name, "parameters": schema} for name, schema in schemas.items()]
        return self._tool_sets.of([*schemas.values()], lambda: ToolChecks(forms))

    def _keeps_form(self, step: _Step) -> bool:
        """Whether the form of the actions has to be the same if the step is run again, and might not be."""
        return self.durable and step.asks.may_learn

    def _n_of(self, request: Request, config: RunnableConfig) -> int:
        context: Any = getattr(request.runtime, "context", None)
        get = cast("Any", context).get if isinstance(context, Mapping) else partial(getattr, context)
        n: Any = get("ec_n", None)
        if n is None:
            n = config.get("configurable", {}).get("ec_n")
        if n is None:
            n = self.n(request) if callable(self.n) else self.n
        if not isinstance(n, int) or isinstance(n, bool):
            raise ConfigError(f"the number of candidates (n, or ec_n of the run) must be an int; found {n!r}")
        self.policy.check(n)
        return n

    async def _conclude(self, step: _Step, handler: object, drawn: CandidateSet) -> ExtendedModelResponse[Any]:
        """Choose; the response is the chosen one, whole."""
        _check_inner_commands(handler)
        seconds = time.perf_counter() - step.started
        selection, record, decision = decide(self.selector, drawn, step.write)
        if self.trace is not None:
            previous = (step.request.state.get("ec_decisions") or [None])[-1]
            named = partial(record_step, config=step.config, previous=previous, seconds=seconds)
            name = await asyncio.to_thread(named, self.trace, drawn, selection)
            record, decision = record | name, decision | name
        answer: _Answer = drawn.messages[selection.chosen]
        if answer.error is not None:
            raise answer.error
        message = chosen_message(answer.message, record)
        await announce(message, step.request.messages, step.config.get("callbacks"))
        result: list[BaseMessage] = []
        for found in answer.response.result:
            result += answered(message) if found is answer.message else [found]
        response = replace(answer.response, result=result)
        return ExtendedModelResponse(response, Command(update={"ec_decisions": [decision]}))


async def _responded(
    send: Callable[[], Awaitable[_Answer]], policy: SamplingPolicy, gate: AbstractAsyncContextManager[Any]
) -> _Answer:
    """Return the answer to one call, with the limits that the policy sets for calls."""
    answer, seconds = await respond(partial(timed, send), policy, gate, math.inf)
    return replace(answer, candidate=with_seconds(answer.candidate, seconds))


def _with_model(request: Request, model: BaseChatModel, options: Options) -> Request:
    return request.override(model=model, model_settings=dict(options))


def _candidate(answer: _Answer, _: int) -> Candidate:
    return answer.candidate


def _answer(response: Response, index: int, step: _Step) -> _Answer:
    """A response with what is wrong with it."""
    message = next(found for found in response.result if isinstance(found, AIMessage))
    candidate = message_candidate(message, index)
    flaws: dict[str, str] = {}
    if SIGNALS_KEY not in message.response_metadata:
        flaws["foreign"] = _FOREIGN
    problem = _action_problem(response, candidate, step)
    if problem is not None:
        flaws["invalid_action"] = problem
    if flaws:
        candidate = replace(candidate, flaws={**flaws, **candidate.flaws})
    return _Answer(candidate=candidate, message=message, response=response)


def _unparsed(error: StructuredOutputError, index: int) -> _Answer:
    """A response whose structured output does not parse: flawed, and an error only if it is chosen all the same."""
    message = error.ai_message
    candidate = message_candidate(message, index)
    return _Answer(
        candidate=replace(candidate, flaws={**candidate.flaws, "invalid_action": str(error)}),
        message=message,
        response=ModelResponse(result=[message]),
        error=error,
    )


def _action_problem(response: Response, candidate: Candidate, step: _Step) -> str | None:
    """Explain what is wrong with the tool calls, or with the structured output."""
    if isinstance(response.structured_response, Mapping):
        named = [call["name"] for call in candidate.tool_calls if call["name"] in step.outputs.names]
        given = cast("Any", response.structured_response)
        written = [{"name": n, "args": given} for n in named or step.outputs.names]
        return step.outputs.problem(replace(candidate, tool_calls=written[:1]))
    if response.structured_response is not None:
        return None
    refused = [str(found.text) for found in response.result if isinstance(found, ToolMessage)]
    return refused[0] if refused else step.tools.problem(candidate)


def _json_schemas(response_format: Any) -> dict[str, Mapping[str, Any]]:
    """The schemas of structured output that are dicts, by name: LangChain does not validate against those."""
    specs: list[Any] = [*getattr(response_format, "schema_specs", ())]
    specs += [spec] if (spec := getattr(response_format, "schema_spec", None)) is not None else []
    found = {spec.name: spec.schema for spec in specs}
    if isinstance(response_format, AutoStrategy):
        found["response"] = cast("Any", response_format).schema
    return {name: cast("Any", schema) for name, schema in found.items() if isinstance(schema, Mapping)}


def _pack(answer: _Answer) -> Stored:
    """An answer for the checkpoint. Text, because LangGraph would stream messages in a task's result to the user."""
    rows = (
        answer.candidate.to_builtins(),
        [message_to_dict(without_logprobs(m) if isinstance(m, AIMessage) else m) for m in answer.response.result],
        None if answer.error is None else str(answer.error),
    )
    return packed(rows), answer.response.structured_response


def _unpack(stored: Stored, index: int) -> _Answer:
    """Undo ``_pack``.

    Raises:
        StateError: It is damaged, or another version's.
    """
    with reading_state():
        [(data, found, problem)] = unpacked(stored[0], tuple[dict[str, Any], list[Any], str | None])
        messages = messages_from_dict(found)
        message = next(m for m in messages if isinstance(m, AIMessage))
        return _Answer(
            candidate=replace(Candidate.from_builtins(data), index=index),
            message=message,
            response=ModelResponse(result=messages, structured_response=stored[1]),
            error=None
            if problem is None
            else StructuredOutputValidationError("response", ValueError(problem), message),
        )


def _check_inner_commands(handler: object) -> None:
    """Refuse state updates of middleware inside this one: those of all N candidates would be applied."""
    names = getattr(getattr(handler, "__code__", None), "co_freevars", ())
    cells: Sequence[Any] = getattr(handler, "__closure__", None) or ()
    commands = [cell.cell_contents for name, cell in zip(names, cells, strict=False) if name == "accumulated_commands"]
    if any(commands):
        raise ConfigError(
            "a middleware after EntropyCentroidMiddleware returned a state update, which would be applied for the "
            "losing candidates too: put EntropyCentroidMiddleware last"
        )
