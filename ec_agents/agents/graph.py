"""LangGraph nodes, edges and the prebuilt agent.

``START → sample → score ⇢ tools → sample``, ``score ⇢ END``. The candidates stay in the state between the two nodes, so
a crash there does not pay for the N calls again; only the chosen message enters ``messages``. Each tool call is a task
of its own: what a finished one did is not repeated when another one interrupts or fails.
"""

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from inspect import isawaitable
from pathlib import Path
from typing import Any, Literal, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, SystemMessage, ToolCall, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, merge_configs
from langchain_core.tools import BaseTool
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.constants import END, START
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode
from langgraph.store.base import BaseStore
from langgraph.types import Send

from ec_agents.agents.at_most_once import once_where_destructive
from ec_agents.agents.quiet_model import is_configurable
from ec_agents.agents.state import CentroidState, check_state_schema, pack_candidates, state_value, unpack_candidates
from ec_agents.agents.step import Write, announce, chosen_message, decide, record_step, step_view, stream_writer
from ec_agents.agents.step_request import StepModel, StepRequest, calling, check_action_format
from ec_agents.agents.tool_calls import ToolChecks, answered
from ec_agents.candidates import Candidate
from ec_agents.effort import Effort, check_effort
from ec_agents.errors import ConfigError
from ec_agents.messages import message_candidate
from ec_agents.policy import SamplingPolicy, as_policy
from ec_agents.sampling import run_blocking
from ec_agents.scoring import Scorer
from ec_agents.selection import Selector, as_selector
from ec_agents.servers.json_actions import ActionFormat
from ec_agents.trace import TraceWriter, as_trace_writer

End = Literal["__end__"]
Tool = BaseTool | Callable[..., Any] | dict[str, Any]
Model = Runnable[LanguageModelInput, AIMessage]
Prompt = str | SystemMessage | None


class SamplingNode(Runnable[Any, dict[str, Any]]):
    """The node that samples N candidates from the model.

    It reads ``messages`` from the state, or ``llm_input_messages`` where a node before it wrote any.

    Args:
        model: A chat model whose messages carry log-probabilities in OpenAI's form; ``.bind(...)`` is fine. Or a
            function of the state, synchronous or not, that returns the model of each step.
        n: How many candidates.
        tools: Tools to bind. Calls of other tools, or with arguments that do not fit, become flaws.
        top_logprobs: Alternatives to request per token; None requests nothing and leaves the model as it is.
        system_prompt: Sent before the messages, not stored in them; or a function of the state, synchronous or not,
            that returns it. The function may call LangGraph's ``get_runtime()`` for the context of the run.
        action_format: ``native`` tool calls; ``json``: actions as JSON in the content, where their tokens are measured;
            ``auto``: ``json`` where tool calls carry no log-probabilities.
        policy: Timeouts, retries, hedging and limits of a step; a number is the timeout of a call in seconds.
        effort: Decides, up to ``n``, how many candidates each step draws: ``Agree()``, ``Escalate(...)``, ``ByRisk()``,
            ``Prime()``, or a function; None draws all at once.

    Raises:
        ConfigError: An argument is out of range or of the wrong type, the model is not a chat model, or its temperature
            is 0 with several candidates; at run time, if a function returned the model.
        UnsupportedLogprobs: The provider cannot return what is to be measured; also at run time.
        LogprobsMissing: At run time: the first responses of a server show that it does not return it.
        ActionError: At run time: no response is the JSON that was requested, or the server refuses the request.
        SamplingError: At run time: fewer than ``min_candidates`` calls succeeded.
    """

    def __init__(
        self,
        model: Model | Callable[[Any], Model | Awaitable[Model]],
        *,
        n: int,
        tools: Sequence[Tool] = (),
        top_logprobs: int | None = 20,
        system_prompt: Prompt | Callable[[Any], Prompt | Awaitable[Prompt]] = None,
        action_format: ActionFormat = "auto",
        policy: SamplingPolicy | float | None = None,
        effort: Effort | None = None,
    ) -> None:
        self._policy = as_policy(policy)
        self._policy.check(n)
        check_action_format(action_format)
        if effort is not None:
            check_effort(effort, n)
        if not (system_prompt is None or isinstance(system_prompt, str | SystemMessage) or callable(system_prompt)):
            found = type(system_prompt).__name__
            raise ConfigError(f"system_prompt must be a str, a SystemMessage or a function of the state; found {found}")
        self.name = "sample"
        self.n = n
        self._prompt = system_prompt
        self._tools = tools
        self._effort = effort
        self._by_name = {tool.name: tool for tool in tools if isinstance(tool, BaseTool)}
        self._checks = ToolChecks(tools)
        self._prepare = partial(StepModel, top_logprobs=top_logprobs, action_format=action_format)
        self._model = model
        # Which model a configurable one, or a function of the state, stands for is known only in a run.
        varies = is_configurable(model) or (callable(model) and not isinstance(cast("Any", model), Runnable))
        self._fixed = None if varies else self._prepared(model)

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:  # noqa: A002, ARG002
        """Sample the candidates from synchronous code."""
        write = stream_writer()
        return run_blocking(lambda: self._draw(input, config, write))

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:  # noqa: A002, ARG002
        """Sample the candidates."""
        return await self._draw(input, config, stream_writer())

    async def _draw(self, state: Any, config: RunnableConfig | None, write: Write) -> dict[str, Any]:
        started = time.perf_counter()
        model, request = self._fixed or self._prepared(await _of_state(self._model, state), config)
        prompt = await _of_state(self._prompt, state)
        messages = [SystemMessage(prompt)] if isinstance(prompt, str) else [prompt] if prompt is not None else []
        messages += state_value(state, "llm_input_messages") or state_value(state, "messages") or []
        ask = calling(messages, merge_configs(model.config, config))
        drawn = await request.draw(ask, write=write, view=step_view(messages, self._by_name))
        return {"ec_candidates": {**pack_candidates(drawn), "seconds": time.perf_counter() - started}}

    def _prepared(self, model: object, run: RunnableConfig | None = None) -> tuple[StepModel, StepRequest]:
        """Return the model and what to ask it; refuse what cannot work."""
        prepared = self._prepare(model, run)
        options = prepared.with_tools(self._tools) if self._tools else prepared.options
        request = StepRequest(prepared, options, self.n, policy=self._policy, parse=self._parse, effort=self._effort)
        request.refuse()
        return prepared, request

    def _parse(self, response: AIMessage, index: int) -> Candidate:
        return self._checks.checked(message_candidate(response, index))


class CentroidScorerNode(Runnable[Any, dict[str, Any]]):
    """The node that ranks the candidates and lets the chosen message, and only that one, into ``messages``.

    The message's ``response_metadata["ec_agents"]`` holds scores, the chosen index, margin, reason, and the usage of
    all N. Tool calls of the message that cannot be decoded are answered with an error, which the model sees next.

    Args:
        selector: A ``Selector``, a scorer or vote, or a name such as ``"majority"``; by default the lowest entropy
            centroid.
        trace: Records every step: a ``TraceWriter`` or the path of a file. ``metadata`` of the configuration may name
            the run (``ec_run``) and its task (``ec_task``).
        author: The ``name`` of the chosen messages, for conversations of several agents.

    Raises:
        SelectionError: At run time: nothing could be scored, and the selector's fallback is ``"raise"``.
        StateError: At run time: the state holds no candidates, or another version's.
    """

    def __init__(
        self,
        selector: Selector | Scorer | str | None = None,
        *,
        trace: TraceWriter | str | Path | None = None,
        author: str | None = None,
    ) -> None:
        self.name = "score"
        self.selector = as_selector(selector)
        self.trace = as_trace_writer(trace)
        self.author = author

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:  # noqa: A002, ARG002
        """Choose among the candidates in the state."""
        waiting = state_value(input, "ec_candidates")
        drawn = unpack_candidates(waiting)
        selection, record, decision = decide(self.selector, drawn, stream_writer())
        if self.trace is not None:
            seconds, previous = waiting.get("seconds"), state_value(input, "ec_decision")
            decision |= record_step(self.trace, drawn, selection, config=config, previous=previous, seconds=seconds)
        chosen = chosen_message(drawn.messages[selection.chosen], record)
        if self.author is not None:
            chosen.name = self.author
        message, *errors = answered(chosen)
        callbacks = ensure_config(config).get("callbacks")
        run_blocking(lambda: announce(cast("AIMessage", message), state_value(input, "messages") or [], callbacks))
        return {"messages": [message, *errors], "ec_candidates": None, "ec_decision": decision}


def route_selected(state: Any, *, to: str = "tools", elsewhere: Collection[str] = ()) -> list[Send] | End:
    """The edge after the choice: each tool call of the chosen message to the tools, otherwise to the end.

    Each call is a task of its own, as in LangChain's agents. A message whose calls are all answered, because none could
    be decoded, passes through the tools without calling any, so that the model sees the errors.

    Args:
        state: The state of the graph.
        to: Name of the node that runs tools: a ``ToolNode``, or a node that takes a list of one tool call.
        elsewhere: Names of tools that run outside the graph, for example in the user interface. Their calls are left
            to the caller, who adds the results to ``messages``.
    """
    calls, answers = _last_calls(state)
    done = {answer.tool_call_id for answer in answers}
    pending = [call for call in calls if call["id"] not in done]
    here = [call for call in pending if call["name"] not in elsewhere]
    if calls and not pending:
        return [Send(to, {"messages": [AIMessage("")]})]
    return [Send(to, [call]) for call in here] or "__end__"


def create_centroid_agent(
    model: Model | Callable[[Any], Model | Awaitable[Model]],
    tools: Sequence[Tool] | ToolNode = (),
    *,
    n: int = 8,
    selector: Selector | Scorer | str | None = None,
    top_logprobs: int | None = 20,
    system_prompt: Prompt | Callable[[Any], Prompt | Awaitable[Prompt]] = None,
    action_format: ActionFormat = "auto",
    policy: SamplingPolicy | float | None = None,
    effort: Effort | None = None,
    trace: TraceWriter | str | Path | None = None,
    pre_model_hook: Runnable[Any, Any] | Callable[..., Any] | None = None,
    state_schema: type[Any] = CentroidState,
    context_schema: type[Any] | None = None,
    checkpointer: BaseCheckpointSaver[Any] | bool | None = None,
    store: BaseStore | None = None,
    interrupt_before: Sequence[str] = (),
    interrupt_after: Sequence[str] = (),
    recursion_limit: int | None = None,
    name: str | None = None,
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """Create an agent that samples N responses at every step and acts on the one with the lowest entropy centroid.

    Args:
        model: A chat model whose messages carry log-probabilities in OpenAI's form; or a function of the state that
            returns the model of each step.
        tools: Tools, functions or tool dicts; or a ``ToolNode``. Tools given as dicts run elsewhere: at the provider,
            or in the user interface, whose calls end the run, so that the caller can add their results. If a tool
            raises, the error is returned to the model; a ``ToolNode`` decides for itself.
        n: Candidates per step.
        selector: A ``Selector``, a scorer or vote, or a name such as ``"majority"``; by default the lowest entropy
            centroid.
        top_logprobs: Alternatives to request per token; None requests nothing and leaves the model as it is.
        system_prompt: Sent before the messages at every step, not stored in them; or a function of the state that
            returns it.
        action_format: ``native`` tool calls; ``json``: actions as JSON in the content, where their tokens are measured;
            ``auto``: ``json`` where the provider's tool calls carry no log-probabilities.
        policy: Timeouts, first k, hedging, retries and limits of a step; a number is the timeout of a call in seconds.
        effort: Decides, up to ``n``, how many candidates each step draws: ``Agree()``, ``Escalate(...)``, ``ByRisk()``,
            ``Prime()``, or a function; None draws all at once.
        trace: Records every step; see ``CentroidScorerNode``.
        pre_model_hook: A node before ``sample`` at every step. It may return ``llm_input_messages``, which the model
            receives in place of ``messages``, or update any other key.
        state_schema: ``CentroidState`` or an extension of it; a dataclass or pydantic model with the same keys.
        context_schema: Type of the run-time context that tools may read.
        checkpointer: Keeps the state of each thread; needed for interrupts and for resuming after a crash.
        store: Long-term store that tools may read.
        interrupt_before: Nodes to stop before; with ``["tools"]``, a person sees ``ec_decision`` before a tool runs.
        interrupt_after: Nodes to stop after.
        recursion_limit: Supersteps a run may take; one step of the agent takes three: sample, score, tools.
        name: Name of the graph, and ``name`` of the messages that the agent adds.

    Returns:
        A compiled graph: ``invoke``, ``ainvoke``, ``stream``, …

    Raises:
        ConfigError: An argument is out of range, the model is not a chat model, or the state schema lacks a key.
        UnsupportedLogprobs: The provider cannot return what is to be measured.

    Example:
        >>> from ec_agents import create_centroid_agent
        >>> from ec_agents.embedded import EmbeddedChatModel, make_tasks
        >>> agent = create_centroid_agent(EmbeddedChatModel(seed=1), n=4)
        >>> state = agent.invoke({"messages": [("user", make_tasks("play", 1)[0].prompt)]})
        >>> record = state["messages"][-1].response_metadata["ec_agents"]
        >>> record["scores"][record["chosen"]] == min(record["scores"])
        True
    """
    check_state_schema(state_schema, hook=pre_model_hook is not None)
    sampling = SamplingNode(
        model,
        n=n,
        tools=list(tools.tools_by_name.values()) if isinstance(tools, ToolNode) else tools,
        top_logprobs=top_logprobs,
        system_prompt=system_prompt,
        action_format=action_format,
        policy=policy,
        effort=effort,
    )
    graph = StateGraph[Any, Any, Any, Any](state_schema, context_schema)
    graph.add_node("sample", sampling).add_node("score", CentroidScorerNode(selector, trace=trace, author=name))
    graph.add_edge("sample", "score")
    first = "sample"
    if pre_model_hook is not None:
        first = "pre_model_hook"
        graph.add_node(first, pre_model_hook).add_edge(first, "sample")
    graph.add_edge(START, first)
    _add_tools(graph, tools, first)
    agent = graph.compile(
        checkpointer=checkpointer,
        store=store,
        interrupt_before=list(interrupt_before),
        interrupt_after=list(interrupt_after),
        name=name,
    )
    return agent if recursion_limit is None else agent.with_config(recursion_limit=recursion_limit)


def _add_tools(graph: StateGraph[Any, Any, Any, Any], tools: Sequence[Tool] | ToolNode, first: str) -> None:
    """Add the tools, the edges to them, and those back to the first node of a step."""
    elsewhere = () if isinstance(tools, ToolNode) else ToolChecks([t for t in tools if isinstance(t, dict)]).names
    node = tools if isinstance(tools, ToolNode) else _tool_node(tools)
    if node is None and not elsewhere:
        graph.add_edge("score", END)
        return
    if node is None:
        graph.add_conditional_edges("score", partial(_route_errors, to=first), [first, END])
        return
    graph.add_node("tools", node)
    graph.add_conditional_edges("score", partial(route_selected, elsewhere=elsewhere), ["tools", END])
    direct = {tool.name for tool in node.tools_by_name.values() if tool.return_direct}
    if direct or elsewhere:
        back = partial(_route_results, to=first, direct=direct, elsewhere=elsewhere)
        graph.add_conditional_edges("tools", back, [first, END])
    else:
        graph.add_edge("tools", first)


def _tool_node(tools: Sequence[Tool]) -> ToolNode | None:
    own = once_where_destructive([tool for tool in tools if not isinstance(tool, dict)])
    return ToolNode(own, handle_tool_errors=True) if own else None


def _last_calls(state: Any) -> tuple[list[ToolCall], list[ToolMessage]]:
    """The tool calls of the last message of the model, and the results after it."""
    answers: list[ToolMessage] = []
    for message in reversed(state_value(state, "messages") or []):
        if isinstance(message, AIMessage):
            return message.tool_calls, answers
        if not isinstance(message, ToolMessage):
            break
        answers.append(message)
    return [], []


def _route_results(state: Any, *, to: str, direct: Collection[str], elsewhere: Collection[str]) -> str:
    """The edge after the tools: to the end if all of them return directly, or a result is to come from elsewhere."""
    calls, answers = _last_calls(state)
    done = {answer.tool_call_id for answer in answers}
    waits = any(call["name"] in elsewhere and call["id"] not in done for call in calls)
    failed = any(answer.status == "error" for answer in answers)
    returns = bool(calls) and not failed and all(call["name"] in direct for call in calls)
    return END if waits or returns else to


def _route_errors(state: Any, *, to: str) -> str:
    """The edge after the choice where no tool runs in the graph: back to the model if no call could be decoded."""
    calls, answers = _last_calls(state)
    return to if calls and len(answers) == len(calls) else END


async def _of_state(given: Any, state: Any) -> Any:
    """What was given, or what the function that was given returns for the state."""
    if not callable(given) or isinstance(given, Runnable | BaseMessage):
        return cast("Any", given)
    found: Any = given(state)
    return await found if isawaitable(found) else found
