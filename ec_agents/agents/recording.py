"""A step of a LangGraph run → a line of its trace."""

import logging
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config

from ec_agents.candidates import CandidateSet, Selection, Step
from ec_agents.errors import TraceError
from ec_agents.messages import describe_failure
from ec_agents.trace import TraceWriter

_log = logging.getLogger(__name__)


def record_step(
    trace: TraceWriter,
    drawn: CandidateSet,
    selection: Selection,
    *,
    config: RunnableConfig | None = None,
    previous: Mapping[str, Any] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Append a step to a trace. A trace that cannot be written is logged and does not stop the run.

    The run is named by ``metadata["ec_run"]`` of the configuration, or its ``thread_id``, or as the step before, or
    afresh; its task by ``metadata["ec_task"]``.

    Args:
        trace: Where to.
        drawn: The candidates.
        selection: The choice among them.
        config: Configuration of the run.
        previous: What this function returned for the step before; None at the first one.
        seconds: How long it took to draw the candidates.

    Returns:
        ``run`` and ``step``: the name of the run and the number of the step, for the next call.
    """
    name = step_name(config, previous)
    task = ensure_config(config).get("metadata", {}).get("ec_task")
    step = Step(
        run=name["run"],
        number=name["step"],
        task=None if task is None else str(task),
        candidates=drawn.candidates,
        selection=selection,
        failures={i: describe_failure(failure) for i, failure in drawn.failures.items()},
        seconds=seconds,
        info={"spent": dict(drawn.spent)} if drawn.spent else {},
    )
    try:
        trace.write(step)
    except TraceError:
        _log.exception("step %(step)d of run %(run)s is not in the trace", name)
    return name


def step_name(config: RunnableConfig | None, previous: Mapping[str, Any] | None) -> dict[str, Any]:
    """``run`` and ``step``: how the step of a run with this configuration is named; see ``record_step``."""
    settings = ensure_config(config)
    named, thread = settings.get("metadata", {}).get("ec_run"), settings.get("configurable", {}).get("thread_id")
    before = previous or {}
    run = str(named or thread or before.get("run") or uuid4())
    return {"run": run, "step": before["step"] + 1 if before.get("run") == run else 0}
