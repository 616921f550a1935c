"""Stage 5 - act: LangGraph nodes, edges and the prebuilt agent.

``START → sample → score ⇢ tools → sample``, ``score ⇢ END``. The candidates stay in the state between the two nodes, so
a crash there does not pay for the N calls again; only the chosen message enters ``messages``.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import (
    AIMessage,
    AnyMessage,
    BaseMessage,
    SystemMessage,
    message_to_dict,
    messages_from_dict,
)
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, merge_configs
from langchain_core.tools import BaseTool
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.constants import END, START
from langgraph.graph import StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode
from langgraph.store.base import BaseStore

from ec_agents.agents.at_most_once import once_where_destructive
from ec_agents.agents.quiet_model import is_configurable
from ec_agents.agents.step import (
    Write,
    announce,
    chosen_message,
    decide,
    describe_failure,
    packed,
    reading_state,
    record_step,
    stream_writer,
    unpacked,
    without_logprobs,
)
from ec_agents.agents.step_request import StepModel, StepRequest, calling, check_action_format
from ec_agents.candidates import FORMAT, Candidate, CandidateSet
from ec_agents.errors import FailedCall, StateError
from ec_agents.messages import invalid_action, message_candidate
from ec_agents.policy import SamplingPolicy, as_policy
from ec_agents.sampling import run_blocking
from ec_agents.scoring import Scorer
from ec_agents.selection import Selector, as_selector
from ec_agents.servers.json_actions import ActionFormat
from ec_agents.trace import TraceWriter, as_trace_writer

Tool = BaseTool | Callable[..., Any] | dict[str, Any]
State = Mapping[str, Any]


class CentroidState(TypedDict, total=False):
    """The state that the nodes work on; extend it with keys of your own."""

    messages: Annotated[list[AnyMessage], add_messages]
    """The conversation; of each step's candidates only the chosen one."""
    ec_candidates: dict[str, Any] | None
    """Between ``sample`` and ``score``: the candidates, packed (``unpack_candidates`` reads them). Otherwise None."""
    ec_decision: dict[str, Any]
    """After ``score``: the selection, and what each candidate would have done."""


class SamplingNode(Runnable[Any, dict[str, Any]]):
    """The node that draws N candidates from the model.

    Args:
        model: A chat model whose messages carry log-probabilities in OpenAI's form; ``.bind(...)`` is fine.
        n: How many candidates.
        tools: Tools to bind. Calls of other tools, or with arguments that do not fit, become flaws.
        top_logprobs: Alternatives to ask for at each token; None asks for nothing and leaves the model as it is.
        system_prompt: Put before the messages, not stored in them.
        action_format: ``native`` tool calls; ``json``: actions as JSON in the content, where their tokens are measured;
            ``auto``: ``json`` where tool calls carry no log-probabilities.
        policy: Timeouts, retries, hedging and limits of a step; a number is the timeout of a call in seconds.

    Raises:
        ConfigError: An argument is out of range, the model is no chat model, or its temperature is 0 with several
            candidates.
        UnsupportedLogprobs: The provider cannot return what is to be measured; also at run time.
        LogprobsMissing: At run time: the first responses of a server show that it does not return it.
        ActionError: At run time: no answer is the JSON that was asked for, or the server refuses to be asked for it.
        SamplingError: At run time: fewer than ``min_candidates`` calls succeeded.
    """

    def __init__(
        self,
        model: Runnable[LanguageModelInput, AIMessage],
        *,
        n: int,
        tools: Sequence[Tool] = (),
        top_logprobs: int | None = 20,
        system_prompt: str | SystemMessage | None = None,
        action_format: ActionFormat = "auto",
        policy: SamplingPolicy | float | None = None,
    ) -> None:
        policy = as_policy(policy)
        policy.check(n)
        self.name = "sample"
        self.n = n
        self._bound, self._policy = tools, policy
        self._tools = _tools_by_name(tools)
        check_action_format(action_format)
        self._prepare = partial(StepModel, model, top_logprobs=top_logprobs, action_format=action_format)
        # Which model a configurable one stands for is known only in a run.
        self._fixed = None if is_configurable(model) else self._prepared(None)
        self._prompt = [SystemMessage(system_prompt)] if isinstance(system_prompt, str) else [system_prompt]

    def invoke(self, input: State, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:  # noqa: A002, ARG002
        """Draw the candidates from synchronous code."""
        write = stream_writer()
        return run_blocking(lambda: self._draw(input, config, write))

    async def ainvoke(self, input: State, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:  # noqa: A002, ARG002
        """Draw the candidates."""
        return await self._draw(input, config, stream_writer())

    async def _draw(self, state: State, config: RunnableConfig | None, write: Write) -> dict[str, Any]:
        started = time.perf_counter()
        prompt = [message for message in self._prompt if message is not None]
        messages: list[BaseMessage] = [*prompt, *state["messages"]]
        model, request = self._fixed or self._prepared(config)
        drawn = await request.draw(calling(messages, merge_configs(model.config, config)), write=write)
        return {"ec_candidates": {**pack_candidates(drawn), "seconds": time.perf_counter() - started}}

    def _prepared(self, run: RunnableConfig | None) -> tuple[StepModel, StepRequest]:
        """Return the model and what to ask it, refusing what cannot work."""
        model = self._prepare(run)
        options = model.with_tools(self._bound) if self._bound else model.options
        request = StepRequest(model, options, self.n, policy=self._policy, parse=self._parse)
        request.refuse()
        return model, request

    def _parse(self, response: AIMessage, index: int) -> Candidate:
        candidate = message_candidate(response, index)
        problem = invalid_action(candidate, self._tools) if self._tools else None
        if problem is None or "invalid_action" in candidate.flaws:
            return candidate
        return replace(candidate, flaws={**candidate.flaws, "invalid_action": problem})


class CentroidScorerNode(Runnable[Any, dict[str, Any]]):
    """The node that ranks the candidates and lets the chosen message, and only that one, into ``messages``.

    The message's ``response_metadata["ec_agents"]`` says scores, chosen, margin, reason, and the usage of all N.

    Args:
        selector: A ``Selector``, a scorer or vote, or a name such as ``"majority"``; by default the lowest entropy
            centroid.
        trace: Records every step: a ``TraceWriter`` or the path of a file. ``metadata`` of the configuration may name
            the run (``ec_run``) and its task (``ec_task``).

    Raises:
        SelectionError: At run time: nothing could be scored, and the selector's fallback is ``"raise"``.
        StateError: At run time: the state holds no candidates, or another version's.
    """

    def __init__(
        self, selector: Selector | Scorer | str | None = None, *, trace: TraceWriter | str | Path | None = None
    ) -> None:
        self.name = "score"
        self.selector = as_selector(selector)
        self.trace = as_trace_writer(trace)

    def invoke(self, input: State, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:  # noqa: A002, ARG002
        """Choose among the candidates in the state."""
        drawn = unpack_candidates(input.get("ec_candidates"))
        selection, record, decision = decide(self.selector, drawn, stream_writer())
        if self.trace is not None:
            seconds = input["ec_candidates"].get("seconds")
            previous = input.get("ec_decision")
            decision |= record_step(self.trace, drawn, selection, config=config, previous=previous, seconds=seconds)
        message = chosen_message(drawn.messages[selection.chosen], record)
        callbacks = ensure_config(config).get("callbacks")
        run_blocking(lambda: announce(message, input.get("messages", []), callbacks))
        return {"messages": [message], "ec_candidates": None, "ec_decision": decision}


def route_selected(state: State) -> Literal["tools", "__end__"]:
    """The edge after the choice: to ``tools`` if the chosen message calls any, otherwise to the end."""
    last = state["messages"][-1] if state["messages"] else None
    return "tools" if isinstance(last, AIMessage) and last.tool_calls else "__end__"


def create_centroid_agent(
    model: Runnable[LanguageModelInput, AIMessage],
    tools: Sequence[Tool] | ToolNode = (),
    *,
    n: int = 8,
    selector: Selector | Scorer | str | None = None,
    top_logprobs: int | None = 20,
    system_prompt: str | SystemMessage | None = None,
    action_format: ActionFormat = "auto",
    policy: SamplingPolicy | float | None = None,
    trace: TraceWriter | str | Path | None = None,
    state_schema: type[Any] = CentroidState,
    context_schema: type[Any] | None = None,
    checkpointer: BaseCheckpointSaver[Any] | bool | None = None,
    store: BaseStore | None = None,
    interrupt_before: Sequence[str] = (),
    interrupt_after: Sequence[str] = (),
    recursion_limit: int | None = None,
    name: str | None = None,
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """An agent that draws N answers at every step and acts on the one with the lowest entropy centroid.

    Args:
        model: A chat model whose messages carry log-probabilities in OpenAI's form.
        tools: Tools, functions or provider tool dicts; or a ``ToolNode`` of one's own. A tool that raises is answered
            with its error, so that the model can react; a ``ToolNode`` of one's own decides for itself.
        n: Candidates a step.
        selector: A ``Selector``, a scorer or vote, or a name such as ``"majority"``; by default the lowest entropy
            centroid.
        top_logprobs: Alternatives to ask for at each token; None asks for nothing and leaves the model as it is.
        system_prompt: Put before the messages at every step, not stored in them.
        action_format: ``native`` tool calls; ``json``: actions as JSON in the content, where their tokens are measured;
            ``auto``: ``json`` where the provider's tool calls carry no log-probabilities.
        policy: Timeouts, first k, hedging, retries and limits of a step; a number is the timeout of a call in seconds.
        trace: Records every step; see ``CentroidScorerNode``.
        state_schema: ``CentroidState`` or an extension of it.
        context_schema: Type of the run-time context that tools may read.
        checkpointer: Keeps the state of each thread; needed for interrupts and for going on after a crash.
        store: Long-term store that tools may read.
        interrupt_before: Nodes to stop before; ``["tools"]`` lets a person see ``ec_decision`` before anything is done.
        interrupt_after: Nodes to stop after.
        recursion_limit: Supersteps a run may take; one step of the agent is three: sample, score, tools.
        name: Name of the graph.

    Returns:
        A compiled graph: ``invoke``, ``ainvoke``, ``stream``, …

    Raises:
        ConfigError: An argument is out of range, or the model is no chat model.
        UnsupportedLogprobs: The provider cannot return what is to be measured.

    Example:
        >>> from ec_agents import create_centroid_agent
        >>> from ec_agents.embedded import EmbeddedChatModel, make_tasks
        >>> agent = create_centroid_agent(EmbeddedChatModel(seed=1), n=4)
        >>> state = agent.invoke({"messages": [("user", make_tasks("play", 1)[0].prompt)]})
        >>> sorted(state["messages"][-1].response_metadata["ec_agents"]["scores"])
        ['0', '1', '2', '3']
    """
    node = tools if isinstance(tools, ToolNode) else _tool_node(tools)
    bound = list(tools.tools_by_name.values()) if isinstance(tools, ToolNode) else tools
    sampling = SamplingNode(
        model,
        n=n,
        tools=bound,
        top_logprobs=top_logprobs,
        system_prompt=system_prompt,
        action_format=action_format,
        policy=policy,
    )
    graph = StateGraph[Any, Any, Any, Any](state_schema, context_schema)
    graph.add_node("sample", sampling).add_node("score", CentroidScorerNode(selector, trace=trace))
    graph.add_edge(START, "sample").add_edge("sample", "score")
    if node is None:
        graph.add_edge("score", END)
    else:
        graph.add_node("tools", node).add_edge("tools", "sample")
        graph.add_conditional_edges("score", route_selected, ["tools", END])
    agent = graph.compile(
        checkpointer=checkpointer,
        store=store,
        interrupt_before=list(interrupt_before),
        interrupt_after=list(interrupt_after),
        name=name,
    )
    return agent if recursion_limit is None else agent.with_config(recursion_limit=recursion_limit)


def pack_candidates(drawn: CandidateSet) -> dict[str, Any]:
    """Candidates, their messages without log-probabilities, and the failures, as builtins for the state."""
    rows = [(c.to_builtins(), message_to_dict(without_logprobs(drawn.messages[c.index]))) for c in drawn.candidates]
    failures = {str(i): describe_failure(failure) for i, failure in drawn.failures.items()}
    return {
        "format": FORMAT,
        "failures": failures,
        "spent": dict(drawn.spent),
        "packed": packed(rows),
    }


def unpack_candidates(state: Mapping[str, Any] | None) -> CandidateSet:
    """Undo ``pack_candidates``; failures come back as ``FailedCall``.

    Raises:
        StateError: There are no candidates, another version packed them, or they are damaged.
    """
    if not state:
        raise StateError("no candidates found in the state (ec_candidates); a SamplingNode must run before this node")
    if state.get("format") != FORMAT:
        raise StateError(
            f"candidates in format {state.get('format')!r} found in the state, {FORMAT} needed: another version of "
            "ec_agents wrote this checkpoint; finish the run with that version, or start the step again"
        )
    with reading_state():
        rows = unpacked(state.get("packed", b""), list[tuple[dict[str, Any], dict[str, Any]]])
        candidates = [Candidate.from_builtins(data) for data, _ in rows]
        messages = messages_from_dict([message for _, message in rows])
        return CandidateSet(
            candidates=candidates,
            messages={c.index: message for c, message in zip(candidates, messages, strict=True)},
            failures={int(i): FailedCall(text) for i, text in state.get("failures", {}).items()},
            spent=state.get("spent", {}),
        )


def _tool_node(tools: Sequence[Tool]) -> ToolNode | None:
    own = once_where_destructive([tool for tool in tools if not isinstance(tool, dict)])
    return ToolNode(own, handle_tool_errors=True) if own else None


def _tools_by_name(tools: Sequence[Tool]) -> Mapping[str, BaseTool]:
    node = _tool_node(tools)
    return {} if node is None else node.tools_by_name
