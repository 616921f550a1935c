"""Factories of models and agents, and how an evaluation calls them and reads their answers."""

import hashlib
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, cast

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.prebuilt import InjectedState
from langgraph.pregel import Pregel
from langgraph.types import StateSnapshot
from pydantic import PrivateAttr

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.quiet_model import logprobs_settings, sampling_model
from ec_agents.agents.state import unpack_candidates
from ec_agents.agents.step import describe_failure
from ec_agents.agents.step_request import StepModel, StepRequest
from ec_agents.candidates import Selection, Step, add_usage
from ec_agents.embedded import EmbeddedChatModel
from ec_agents.embedded.engine import Request
from ec_agents.embedded.tasks import call_calc, replay
from ec_agents.evaluation.tasks import EvalTask, embedded_task
from ec_agents.messages import as_candidate
from ec_agents.policy import SamplingPolicy
from ec_agents.selection import Selector

RECURSION_LIMIT = 40
"""Supersteps of the embedded agent, enough for 13 steps."""

Factory = Callable[..., Any]
"""Makes the model or agent to evaluate, from those of ``n``, ``selector``, ``task``, ``seed`` and ``trace`` it accepts.

A factory that accepts ``selector`` makes an agent, a new one for each run, and whole runs are graded. Any other factory
makes a chat model or an async function of a prompt, and all N answers to each task are graded.
"""


class _Seeded(EmbeddedChatModel):
    """The embedded model with a separate seed for each call.

    The seed derives from the run's seed, the number of messages and the position of the call among those with as many
    messages, so that a resumed run samples what it would have sampled; a step starts its calls in order.
    """

    _run_seed: int = PrivateAttr(default=0)
    _calls: Counter[int] = PrivateAttr(default_factory=Counter[int])

    def _request(
        self, messages: Sequence[BaseMessage], stop: Sequence[str], kwargs: Mapping[str, Any]
    ) -> tuple[Request, bool]:
        number = self._calls[len(messages)]
        self._calls[len(messages)] += 1
        seed = seed_of(self._run_seed, len(messages), number)
        return super()._request(messages, stop, {**kwargs, "seed": seed})


def embedded_model() -> EmbeddedChatModel:
    """The model of the one-step families, ``solve`` and ``plain``."""
    return EmbeddedChatModel()


def embedded_agent(*, n: int, selector: Selector, task: EvalTask, seed: int) -> Any:
    """The agent of the family ``play``.

    Its tool derives the remaining numbers from the conversation, so that an interrupted run can be resumed.
    """
    numbers = embedded_task(task).numbers

    def calc(expression: str, state: Annotated[Any, InjectedState]) -> str:
        """Combine two of the numbers left, e.g. ``9*7``. Signs: + - * /. Says the result and the numbers left."""
        calls = [call for message in state["messages"][:-1] for call in getattr(message, "tool_calls", ())]
        left = replay(numbers, [str(call["args"].get("expression")) for call in calls])
        return call_calc(left, expression)[1]

    model = _Seeded()
    model._run_seed = seed  # noqa: SLF001 - a class of this module
    return create_centroid_agent(model, [calc], n=n, selector=selector, recursion_limit=RECURSION_LIMIT)


def makes_agents(factory: Factory) -> bool:
    """Whether the factory makes agents, whose whole runs are graded."""
    return "selector" in inspect.signature(factory).parameters


def make(factory: Factory, **given: Any) -> Any:
    """Call the factory with those arguments that it accepts."""
    parameters = inspect.signature(factory).parameters
    return factory(**{name: value for name, value in given.items() if name in parameters})


def described(made: Any) -> dict[str, Any]:
    """The fields of a chat model, also a bound one, that its answers depend on; empty if nothing is known."""
    bound = getattr(made, "bound", None)
    fields = {} if bound is None else described(bound)
    for name in ("model", "model_name", "temperature", "top_p", "max_tokens", "extra_body"):
        value = getattr(made, name, None)
        if isinstance(value, str | int | float | Mapping):
            fields[name.removesuffix("_name")] = value
    given: Any = getattr(made, "kwargs", None)
    return {**fields, **given} if isinstance(given, Mapping) and bound is not None else fields


def asker(
    made: Any, *, n: int, top_logprobs: int | None, seed_calls: bool, system_prompt: str | None = None
) -> Callable[[str, int], Awaitable[Any]]:
    """Return a function of prompt and seed that samples one response.

    Raises:
        ConfigError: The temperature is 0 with several candidates, or ``made`` is not a chat model.
        UnsupportedLogprobs: This model cannot return log-probabilities.
    """
    if not hasattr(made, "ainvoke"):
        return lambda prompt, _: made(prompt)
    step_model = StepModel(made, top_logprobs=top_logprobs, action_format="native")
    StepRequest(step_model, step_model.options, n, policy=SamplingPolicy(), parse=as_candidate).refuse()
    if isinstance(made, BaseChatModel):  # unlike a sampling model, it keeps the texts of the tokens
        model: Any = made.model_copy(update={"cache": False, "disable_streaming": True})
        model = model.bind(**logprobs_settings(top_logprobs))
    else:
        model = sampling_model(made, (), top_logprobs)

    def messages(prompt: str) -> Any:
        return prompt if system_prompt is None else [("system", system_prompt), ("user", prompt)]

    if seed_calls:
        return lambda prompt, seed: model.ainvoke(messages(prompt), seed=seed)
    return lambda prompt, _: model.ainvoke(messages(prompt))


class AgentRun:
    """A run of an agent, new or resumed.

    A compiled graph without a checkpointer keeps its state in ``saver``; one compiled with a checkpointer, or with
    ``False``, is left as it is.

    Args:
        agent: A graph, any other object with ``ainvoke``, or an async function of a prompt.
        task: The task.
        name: Name of the run, and of its thread.
        saver: Store of the states; None keeps none.
    """

    def __init__(self, agent: Any, task: EvalTask, name: str, saver: BaseCheckpointSaver[Any] | None) -> None:
        is_ours = isinstance(agent, Pregel) and agent.checkpointer is None and saver is not None
        self._agent: Any = cast("Any", agent).copy({"checkpointer": saver}) if is_ours else agent
        self._task = task
        self._config: Any = {"configurable": {"thread_id": name}, "metadata": {"ec_run": name, "ec_task": task.id}}
        self.has_states = isinstance(getattr(self._agent, "checkpointer", None), BaseCheckpointSaver)
        """Whether the run can be resumed."""
        self._name = name
        self._before: StateSnapshot | None = None
        self.taken: list[Step] = []
        """Steps that were taken before the run was resumed."""
        self.state: Any = None
        """The last state, or whatever the agent returned."""

    async def find(self) -> bool:
        """Load the saved states of the run; False if the agent keeps none, so that the run has to start over."""
        if not self.has_states:
            return False
        states: list[StateSnapshot] = [state async for state in self._agent.aget_state_history(self._config)]
        self._before = states[0] if states else None
        drawn: Any = None
        for state in reversed(states):
            decision = _value(state.values, "ec_decision")
            if packed := _value(state.values, "ec_candidates"):
                drawn = packed
            elif drawn and decision:
                self.taken.append(self._step(len(self.taken), drawn, decision))
                drawn = None
        return True

    async def steps(self) -> AsyncIterator[Step]:
        """Run to the end, and yield the steps of a sampling agent as they are taken."""
        if self._before is not None and not self._before.tasks:
            self.state = self._before.values
        elif hasattr(self._agent, "astream"):
            async for step in self._stream():
                yield step
        elif hasattr(self._agent, "ainvoke"):
            self.state = await self._agent.ainvoke(self._asked())
        else:
            self.state = await self._agent(self._task.prompt)

    def _asked(self) -> Any:
        return {"messages": [("user", self._task.prompt)]}

    async def _stream(self) -> AsyncIterator[Step]:
        number = len(self.taken)
        drawn: Any = None if self._before is None else _value(self._before.values, "ec_candidates")
        options: dict[str, Any] = {"durability": "sync"} if self.has_states else {}
        asked = self._asked() if self._before is None else None
        stream = self._agent.astream(asked, self._limited(), stream_mode=["updates", "values"], **options)
        async for mode, update in stream:
            if mode == "values":
                self.state = update
                continue
            for change in cast("dict[str, Any]", update).values():  # other nodes may return anything
                drawn = _value(change, "ec_candidates") or drawn
                decision = _value(change, "ec_decision")
                if drawn and decision:
                    yield self._step(number, drawn, decision)
                    drawn, number = None, number + 1

    def _limited(self) -> Any:
        """The configuration with the remaining supersteps: LangGraph counts them from where a run is resumed."""
        limit = (self._agent.config or {}).get("recursion_limit") if isinstance(self._agent, Pregel) else None
        if self._before is None or limit is None:
            return self._config
        taken = (self._before.metadata or {}).get("step", 0)
        return {**self._config, "recursion_limit": max(1, limit - taken)}

    def _step(self, number: int, packed: Mapping[str, Any], decision: Mapping[str, Any]) -> Step:
        drawn = unpack_candidates(packed)
        return Step(
            run=self._name,
            number=number,
            task=self._task.id,
            candidates=drawn.candidates,
            failures={i: describe_failure(failure) for i, failure in drawn.failures.items()},
            selection=Selection.from_builtins(decision),
            seconds=packed.get("seconds"),
            info={"spent": dict(drawn.spent)} if drawn.spent else {},
        )


def _value(state: Any, key: str) -> Any:
    return cast("Mapping[str, Any]", state).get(key) if isinstance(state, Mapping) else None


def answer_of(state: Any) -> tuple[str, list[Mapping[str, Any]]]:
    """Text of the last message and all tool calls of a run; anything without messages is read as a response."""
    if isinstance(state, str):
        return state, []
    if not isinstance(state, Mapping) or "messages" not in state:
        answer = as_candidate(cast("object", state), 0)
        return answer.content, list(answer.tool_calls)
    messages = cast("Mapping[str, list[Any]]", state)["messages"]
    calls = [call for message in messages if isinstance(message, AIMessage) for call in message.tool_calls]
    return str(messages[-1].text), [{"name": call["name"], "args": call["args"]} for call in calls]


def usage_of(state: Any) -> dict[str, int]:
    """Tokens of all candidates of a run, from the records on the chosen messages."""
    messages = cast("Mapping[str, list[Any]]", state).get("messages", []) if isinstance(state, Mapping) else []
    records: list[Any] = [m.response_metadata.get("ec_agents") or {} for m in messages if isinstance(m, AIMessage)]
    return add_usage(record.get("usage") for record in records)


def token_text(response: object) -> dict[str, Any] | None:
    """The whole text of a response and the length of each token; None if the model reports no tokens.

    Lengths rather than tokens, so that the redaction of secrets sees the whole text.
    """
    metadata = cast("dict[str, Any]", response.response_metadata) if isinstance(response, AIMessage) else {}
    logprobs: dict[str, Any] = metadata.get("logprobs") or {}
    entries: list[dict[str, Any]] = logprobs.get("content") or []
    tokens = [str(entry.get("token", "")) for entry in entries]
    return {"text": "".join(tokens), "lengths": [len(token) for token in tokens]} if tokens else None


def seed_of(*parts: object) -> int:
    """Derive a seed below 2³¹ from names and numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1
