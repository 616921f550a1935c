"""What is evaluated: factories of models and agents, and how their answers and steps are read."""

import inspect
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from pydantic import PrivateAttr

from ec_agents.candidates import CandidateSet, Selection, Step
from ec_agents.embedded import EmbeddedChatModel
from ec_agents.eval_tasks import EvalTask, embedded_task
from ec_agents.graph import create_centroid_agent, unpack_candidates
from ec_agents.messages import as_candidate, describe_failure, logprobs_settings, sampling_model
from ec_agents.selection import Selector

RECURSION_LIMIT = 40
"""Supersteps of the embedded agent: 13 steps."""

Factory = Callable[..., Any]
"""Makes what is evaluated; is given those of ``n``, ``selector``, ``task`` and ``seed`` that it takes.

One that takes ``selector`` makes an agent, a new one for each run: whole runs are graded. One that does not makes a
chat model or an async function of a prompt: all N answers to each task are graded.
"""


class _Seeded(EmbeddedChatModel):
    """The embedded model with a seed of its own for each call, all made from one; a step starts its calls in order."""

    _source: random.Random = PrivateAttr(default_factory=random.Random)

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        options = super()._options(given)
        return options if options["seed"] is not None else {**options, "seed": self._source.getrandbits(31)}


def embedded_model() -> EmbeddedChatModel:
    """The model of the one-step families, ``solve`` and ``plain``."""
    return EmbeddedChatModel()


def embedded_agent(*, n: int, selector: Selector, task: EvalTask, seed: int) -> Any:
    """The agent of the family ``play``, with the tool of its task."""
    model = _Seeded()
    model._source.seed(seed)  # noqa: SLF001 - a class of this module
    tools = [embedded_task(task).calc_tool()]
    return create_centroid_agent(model, tools, n=n, selector=selector, recursion_limit=RECURSION_LIMIT)


def makes_agents(factory: Factory) -> bool:
    """Whether whole runs of what it makes are graded."""
    return "selector" in inspect.signature(factory).parameters


def make(factory: Factory, **given: Any) -> Any:
    """What the factory makes of those arguments that it takes."""
    parameters = inspect.signature(factory).parameters
    return factory(**{name: value for name, value in given.items() if name in parameters})


def asker(made: Any, *, top_logprobs: int | None, seed_calls: bool) -> Callable[[str, int], Awaitable[Any]]:
    """Prompt and seed → one response."""
    if not hasattr(made, "ainvoke"):
        return lambda prompt, _: made(prompt)
    if isinstance(made, BaseChatModel):  # keeps the texts of tokens, which a sampling model does not
        model: Any = made.model_copy(update={"cache": False, "disable_streaming": True})
        model = model.bind(**logprobs_settings(top_logprobs))
    else:
        model = sampling_model(made, (), top_logprobs)
    if seed_calls:
        return lambda prompt, seed: model.ainvoke(prompt, seed=seed)
    return lambda prompt, _: model.ainvoke(prompt)


async def steps_of(agent: Any, task: EvalTask, run: str) -> AsyncIterator[Any]:
    """The steps of a run as they are taken, and last what came of it."""
    asked = {"messages": [("user", task.prompt)]}
    if not hasattr(agent, "astream"):
        yield await agent.ainvoke(asked) if hasattr(agent, "ainvoke") else await agent(task.prompt)
        return
    candidates: CandidateSet | None = None
    number, state = 0, None
    async for mode, update in agent.astream(asked, stream_mode=["updates", "values"]):
        if mode == "values":
            state = update
            continue
        for change in cast("dict[str, dict[str, Any] | None]", update).values():
            if change and change.get("ec_candidates"):
                candidates = unpack_candidates(change["ec_candidates"])
            if change and candidates is not None and change.get("ec_decision"):
                failures = {i: describe_failure(failure) for i, failure in candidates.failures.items()}
                selection = Selection.from_builtins(change["ec_decision"])
                step = Step(run=run, number=number, task=task.id, candidates=candidates.candidates, failures=failures)
                yield replace(step, selection=selection)
                candidates, number = None, number + 1
    yield state


def answer_of(state: Any) -> tuple[str, list[Mapping[str, Any]]]:
    """Text of the last message and all tool calls of a run; what is no state with messages is read as a candidate."""
    if isinstance(state, str):
        return state, []
    if not isinstance(state, Mapping) or "messages" not in state:
        found = as_candidate(cast("object", state), 0)
        return found.content, list(found.tool_calls)
    messages = cast("Mapping[str, list[Any]]", state)["messages"]
    calls = [call for message in messages if isinstance(message, AIMessage) for call in message.tool_calls]
    return str(messages[-1].text), [{"name": call["name"], "args": call["args"]} for call in calls]


def token_texts(drawn: CandidateSet) -> dict[str, Any]:
    """The whole text of each response and the length of each of its tokens, by index, where the model reports tokens.

    Lengths rather than tokens, so that what hides secrets in a text sees the whole text.
    """
    found: dict[str, Any] = {}
    for index, message in drawn.messages.items():
        metadata = cast("dict[str, Any]", message.response_metadata) if isinstance(message, AIMessage) else {}
        logprobs: dict[str, Any] = metadata.get("logprobs") or {}
        entries: list[dict[str, Any]] = logprobs.get("content") or []
        tokens = [str(entry.get("token", "")) for entry in entries]
        if tokens:
            found[str(index)] = {"text": "".join(tokens), "lengths": [len(token) for token in tokens]}
    return found
