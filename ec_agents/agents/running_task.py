"""What LangGraph knows about the running task: durability, and whether it was interrupted before.

LangGraph has no public names for the keys used here; the tests fail if they change.
"""

import re
from typing import Any, NamedTuple, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple

from ec_agents.errors import ConfigError


def check_durability(config: RunnableConfig) -> None:
    """Refuse a durable step that nothing would make durable.

    Raises:
        ConfigError: There is no checkpointer, or it is only written at the end of the run.
    """
    found = config.get("configurable", {})
    if found.get("__pregel_checkpointer", True) is None:
        raise ConfigError("durable=True needs a checkpointer to keep the candidates in: create_agent(checkpointer=...)")
    if found.get("__pregel_durability") == "exit":
        raise ConfigError("durable=True keeps nothing with durability='exit': run with 'async' or 'sync'")


class Place(NamedTuple):
    """Where LangGraph keeps what happened to the running task, and the answers that the task has by now."""

    saver: BaseCheckpointSaver[Any]
    checkpoint: RunnableConfig
    task: str
    answers: int
    asked: int
    """How many interrupts this attempt of the task has passed."""


def unanswered(config: RunnableConfig) -> Place | None:
    """Return where to look up the running task, if the run was resumed with an answer."""
    found = config.get("configurable", {})
    scratchpad, saver = found.get("__pregel_scratchpad"), found.get("__pregel_checkpointer")
    if scratchpad is None or not isinstance(saver, BaseCheckpointSaver):
        return None
    if not scratchpad.resume and scratchpad.get_null_resume(consume=False) is None:
        return None
    graph, _, task = str(found.get("checkpoint_ns", "")).rpartition("|")
    where = {"thread_id": found.get("thread_id"), "checkpoint_ns": graph}
    checkpoint: RunnableConfig = {"configurable": {**where, "checkpoint_id": found["checkpoint_map"][graph]}}
    return Place(cast("Any", saver), checkpoint, task, len(scratchpad.resume), _asked(scratchpad))


def _asked(scratchpad: Any) -> int:
    """Return how many interrupts the running attempt has passed; LangGraph's counter shows it only in its repr."""
    counter = getattr(scratchpad.interrupt_counter, "_counter", None)
    shown = re.search(r"\d+", repr(getattr(counter, "__self__", None)))
    return int(shown[0]) if shown else 0


def refuse_other_candidates(place: Place, checkpoint: CheckpointTuple | None) -> None:
    """Refuse to sample candidates other than those on which a person has decided.

    The task was interrupted before, and the answer is not for an interrupt that came before its candidates: those are
    answered by now, so that this attempt would have consumed one answer more than the checkpoint holds.

    Raises:
        ConfigError: The task was interrupted after its candidates were sampled.
    """
    writes = [
        (channel, value)
        for task, channel, value in (checkpoint and checkpoint.pending_writes) or ()
        if place.task.endswith(task)
    ]
    if not any(channel == "__interrupt__" for channel, _ in writes):
        return
    before = next(
        (
            len(cast("list[Any]", value)) if isinstance(value, list) else 1
            for channel, value in writes
            if channel == "__resume__"
        ),
        0,
    )
    if place.answers > place.asked or place.answers == before:
        raise ConfigError(
            "the model step runs again after an interrupt() in it, and would act on other candidates than those that "
            "the person saw: pass durable=True with a checkpointer, or ask in after_model, before_model or a tool"
        )
