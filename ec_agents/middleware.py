"""Stage 5 - act: the steps of an agent of ``langchain.agents.create_agent``.

Put it last in the list of middleware. Only what repeats a failed call, such as ``ModelRetryMiddleware``, may come after
it: whatever comes after it runs once for each of the N candidates.
"""

import asyncio
import operator
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NotRequired, cast

import msgspec
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage, message_to_dict, messages_from_dict
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from langgraph.func import task
from langgraph.types import Command

from ec_agents.candidates import Candidate, CandidateSet
from ec_agents.drawing import refuse_equal_candidates, seeded
from ec_agents.errors import ConfigError, StateError
from ec_agents.messages import invalid_action, logprobs_settings, message_candidate, without_logprobs
from ec_agents.models import SIGNALS_KEY, silent_model
from ec_agents.sampling import check_sampling, run_blocking, sample
from ec_agents.selection import Selector
from ec_agents.step import Write, announce, chosen_message, decide, draw, stream_writer
from ec_agents.waiting import SamplingPolicy

try:
    from langchain.agents import AgentState
    from langchain.agents.middleware import AgentMiddleware, ExtendedModelResponse, ModelRequest, ModelResponse
    from langchain.agents.middleware.types import PrivateStateAttr
    from langchain.agents.structured_output import StructuredOutputError, StructuredOutputValidationError
except ImportError as error:
    raise ImportError("the middleware needs langchain: pip install 'ec-agents[langchain]'") from error

Request = ModelRequest[Any]
Response = ModelResponse[Any]
Stored = tuple[bytes, Any]

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
        selector: How to choose; by default the lowest entropy centroid.
        top_logprobs: Alternatives to ask for at each token; None asks for nothing and leaves the model as it is.
        policy: What a step needs and how long it waits.
        min_candidates: Instead of the policy's: fewer successful calls than this are an error.
        timeout: Instead of the policy's: seconds that one call may take. Synchronous calls cannot be cut off: the agent
            goes on, and the thread ends with its call.
        max_concurrency: Instead of the policy's: at most so many calls at once.
        durable: Make each call a LangGraph task, so that a run that crashed repeats only the missing calls, and an
            interrupt in the same step does not draw again. Needs a checkpointer.

    Raises:
        ConfigError: An argument is out of range. At run time: so is the number of candidates; the temperature is 0 with
            several; ``durable`` cannot work; the step is run again after a person was asked; a middleware after this
            one changes the state.
        SamplingError: At run time: fewer than ``min_candidates`` calls succeeded.
        SelectionError: At run time: nothing could be scored, and the selector's fallback is ``"raise"``.

    Example:
        >>> from langchain.agents import create_agent
        >>> from ec_agents import EntropyCentroidMiddleware
        >>> from ec_agents.embedded import EmbeddedChatModel
        >>> agent = create_agent(EmbeddedChatModel(seed=1), middleware=[EntropyCentroidMiddleware(n=4)])
        >>> state = agent.invoke({"messages": [("user", "Ann has 12. Bob has 5 more than Ann. How many has Bob?")]})
        >>> sorted(state["messages"][-1].response_metadata["ec_agents"]["scores"])
        ['0', '1', '2', '3']
    """

    state_schema = CentroidAgentState

    def __init__(
        self,
        n: int | Callable[[Request], int] = 8,
        selector: Selector | None = None,
        *,
        top_logprobs: int | None = 20,
        policy: SamplingPolicy | None = None,
        min_candidates: int | None = None,
        timeout: float | None = None,
        max_concurrency: int | None = None,
        durable: bool = False,
    ) -> None:
        super().__init__()
        limits = {"min_candidates": min_candidates, "timeout": timeout, "max_concurrency": max_concurrency}
        self.n = n
        self.selector = selector or Selector()
        self.durable = durable
        self._settings = logprobs_settings(top_logprobs)
        self._check = partial(check_sampling, policy=policy, **limits)
        self._sample = partial(sample, policy=policy, **limits)
        self._check(sys.maxsize if callable(n) else n)

    async def awrap_model_call(  # noqa: D102 - inherited
        self, request: Request, handler: Callable[[Request], Awaitable[Response]]
    ) -> ExtendedModelResponse[Any]:
        n, write, prepared, callbacks = self._prepare(request)

        async def answer(index: int) -> _Answer:
            try:
                return _answer(request, await handler(prepared[index % len(prepared)]), index)
            except StructuredOutputError as error:
                return _unparsed(error, index)

        async def stored(index: int) -> Stored:
            return _pack(await answer(index))

        async def restored(index: int) -> _Answer:
            return _unpack(await task(name="ec_sample")(stored)(index), index)

        call = restored if self.durable else answer
        drawn = await draw(self._sample, call, n=n, model=prepared[0].model, write=write, parse=_candidate)
        return await self._conclude(request, handler, drawn, write, callbacks)

    def wrap_model_call(  # noqa: D102 - inherited
        self, request: Request, handler: Callable[[Request], Response]
    ) -> ExtendedModelResponse[Any]:
        n, write, prepared, callbacks = self._prepare(request)

        def answer(index: int) -> _Answer:
            try:
                return _answer(request, handler(prepared[index % len(prepared)]), index)
            except StructuredOutputError as error:
                return _unparsed(error, index)

        def stored(index: int) -> Stored:
            return _pack(answer(index))

        def restored(index: int) -> _Answer:
            return _unpack(task(name="ec_sample")(stored)(index).result(), index)

        pool = ThreadPoolExecutor(n, thread_name_prefix="ec_agents-sample")

        async def call(index: int) -> _Answer:
            context, work = copy_context(), restored if self.durable else answer
            return await asyncio.get_running_loop().run_in_executor(pool, lambda: context.run(work, index))

        async def step() -> ExtendedModelResponse[Any]:
            drawn = await draw(self._sample, call, n=n, model=prepared[0].model, write=write, parse=_candidate)
            return await self._conclude(request, handler, drawn, write, callbacks)

        try:
            return run_blocking(step)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, request: Request) -> tuple[int, Write, list[Request], Any]:
        """N, the stream of events, the request to send (with a seed, one for each candidate), and the callbacks."""
        config = ensure_config()
        _check_durability(config) if self.durable else _check_first_time(config)
        model, bound, _ = silent_model(request.model)
        settings = {**self._settings, **bound, **request.model_settings}
        n = self._n_of(request, config)
        refuse_equal_candidates(settings.get("temperature", getattr(model, "temperature", None)), n)
        variants = seeded(model, settings, n)
        prepared = [request.override(model=model, model_settings=dict(settings)) for model, settings in variants]
        return n, stream_writer(), prepared, config.get("callbacks")

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
        self._check(n)
        return n

    async def _conclude(
        self, request: Request, handler: object, drawn: CandidateSet, write: Write, callbacks: Any
    ) -> ExtendedModelResponse[Any]:
        """Choose; the response is the chosen one, whole."""
        _check_inner_commands(handler)
        selection, record, _ = decide(self.selector, drawn, write)
        answer: _Answer = drawn.messages[selection.chosen]
        if answer.error is not None:
            raise answer.error
        message = chosen_message(answer.message, record)
        await announce(message, request.messages, callbacks)
        result: list[BaseMessage] = [message if found is answer.message else found for found in answer.response.result]
        response = replace(answer.response, result=result)
        return ExtendedModelResponse(response, Command(update={"ec_decisions": [record]}))


def _candidate(answer: _Answer, _: int) -> Candidate:
    return answer.candidate


def _answer(request: Request, response: Response, index: int) -> _Answer:
    """A response with what is wrong with it; its log-probabilities are dropped here."""
    message = next(found for found in response.result if isinstance(found, AIMessage))
    candidate = message_candidate(message, index)
    flaws: dict[str, str] = {}
    if SIGNALS_KEY not in message.response_metadata:
        flaws["foreign"] = _FOREIGN
    problem = _action_problem(request, response, candidate)
    if problem is not None:
        flaws["invalid_action"] = problem
    kept = without_logprobs(message)
    result: list[BaseMessage] = [kept if found is message else found for found in response.result]
    return _Answer(
        candidate=replace(candidate, flaws={**flaws, **candidate.flaws}),
        message=kept,
        response=replace(response, result=result),
    )


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


def _action_problem(request: Request, response: Response, candidate: Candidate) -> str | None:
    """What is wrong with the tool calls, those for structured output included."""
    if response.structured_response is not None:
        return None
    refused = [str(found.text) for found in response.result if isinstance(found, ToolMessage)]
    if refused:
        return refused[0]
    tools = {tool.name: tool for tool in request.tools if isinstance(tool, BaseTool)}
    # A tool that the provider runs is known to the provider only.
    is_complete = len(tools) == len(request.tools) and tools
    return invalid_action(candidate, tools) if is_complete else None


def _pack(answer: _Answer) -> Stored:
    """An answer for the checkpoint. Bytes, because LangGraph would stream messages in a task's result to the user."""
    rows = (
        answer.candidate.to_builtins(),
        [message_to_dict(without_logprobs(m) if isinstance(m, AIMessage) else m) for m in answer.response.result],
        None if answer.error is None else str(answer.error),
    )
    return msgspec.msgpack.encode(rows, enc_hook=str), answer.response.structured_response


def _unpack(stored: Stored, index: int) -> _Answer:
    """Undo ``_pack``.

    Raises:
        StateError: It is damaged, or another version's.
    """
    try:
        data, found, problem = msgspec.msgpack.decode(stored[0], type=tuple[dict[str, Any], list[Any], str | None])
    except (msgspec.DecodeError, TypeError, IndexError) as error:
        raise StateError(f"a candidate in the checkpoint is damaged: {error}") from error
    messages = messages_from_dict(found)
    message = next(m for m in messages if isinstance(m, AIMessage))
    return _Answer(
        candidate=replace(Candidate.from_builtins(data), index=index),
        message=message,
        response=ModelResponse(result=messages, structured_response=stored[1]),
        error=None if problem is None else StructuredOutputValidationError("response", ValueError(problem), message),
    )


def _check_durability(config: RunnableConfig) -> None:
    # LangGraph has no public name for these keys; the tests say so if they change.
    found = config.get("configurable", {})
    if found.get("__pregel_checkpointer", True) is None:
        raise ConfigError("durable=True needs a checkpointer to keep the candidates in: create_agent(checkpointer=...)")
    if found.get("__pregel_durability") == "exit":
        raise ConfigError("durable=True keeps nothing with durability='exit': run with 'async' or 'sync'")


def _check_first_time(config: RunnableConfig) -> None:
    """Refuse to draw other candidates than those on which a person has decided."""
    scratchpad = config.get("configurable", {}).get("__pregel_scratchpad")
    if scratchpad is not None and (scratchpad.resume or scratchpad.get_null_resume(consume=False) is not None):
        raise ConfigError(
            "the model step is run again after an interrupt() in it, and would act on other candidates than those that "
            "the person saw: pass durable=True with a checkpointer, or ask in after_model, before_model or a tool"
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
