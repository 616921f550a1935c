"""Grading of recorded answers, and what an outcome rests on, so that a changed task or checker is noticed."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ec_agents.candidates import Step, add_usage
from ec_agents.errors import ConfigError
from ec_agents.evaluation.checkers import CHECKERS, Checker, name_of
from ec_agents.evaluation.store import OutcomeLine
from ec_agents.evaluation.tasks import EvalTask, ToolCalls, digest

CHECKER_RAISED = "the checker raised "
"""Begins the error of a run whose answer could not be graded."""


def begun(task: EvalTask, check: Checker, **fields: Any) -> OutcomeLine:
    """An outcome that is not known yet, with what it rests on."""
    return OutcomeLine(
        task=task.id,
        prompt=digest(task.prompt),
        answer=digest(task.answer, sorted(task.info.items())),
        checker=name_of(check, CHECKERS),
        **fields,
    )


def refuse_other_prompts(outcomes: Sequence[OutcomeLine], now: Mapping[str, OutcomeLine], where: object) -> None:
    """Refuse outcomes of prompts that were edited since.

    Raises:
        ConfigError: There is one.
    """
    edited = sorted({one.task for one in outcomes if one.prompt and one.prompt != now[one.task].prompt})
    if edited:
        raise ConfigError(
            f"{where} holds answers to other prompts of {_some(edited)}: restore the tasks, or use another directory"
        )


def refuse_other_grading(outcomes: Sequence[OutcomeLine], now: Mapping[str, OutcomeLine], where: object) -> None:
    """Refuse outcomes that another checker decided, or other fields of the task.

    Raises:
        ConfigError: There is one; the message names what differs.
    """
    found: list[str] = []
    checkers = sorted({one.checker or "not recorded" for one in outcomes if one.checker != now[one.task].checker})
    if checkers:
        current = next(iter(now.values())).checker
        found.append(f"the checker: {', '.join(checkers)} there, {current} now")
    edited = sorted({one.task for one in outcomes if one.checker and one.answer != now[one.task].answer})
    if edited:
        found.append(f"the answer or another field of {_some(edited)}")
    if found:
        raise ConfigError(
            f"{where} holds outcomes that were graded otherwise; what differs is {' and '.join(found)}. Grade the "
            "recorded answers again with --regrade, which asks the model nothing, or use another directory"
        )


def _some(tasks: Sequence[str]) -> str:
    shown = ", ".join(tasks[:3])
    return f"{len(tasks)} tasks ({shown}, …)" if len(tasks) > 3 else f"task {shown}"


def final_answer(steps: Sequence[Step]) -> tuple[str, ToolCalls] | None:
    """Text of the last chosen candidate of a run, and all tool calls made; None if the trace does not tell."""
    chosen = [step.chosen for step in steps]
    known = [candidate for candidate in chosen if candidate is not None]
    if not known or len(known) < len(chosen):
        return None
    return known[-1].content, [{"name": c["name"], "args": c["args"]} for one in known for c in one.tool_calls]


async def graded_run(check: Checker, start: OutcomeLine, task: EvalTask, steps: Sequence[Step]) -> OutcomeLine:
    """Grade the recorded answer of a whole run.

    Raises:
        ConfigError: The trace does not hold the answer.
    """
    if start.gave_up:
        return start
    found = final_answer(steps)
    if found is None:
        raise ConfigError(
            f"run {start.run!r} cannot be graded again: its answer is not in the trace, as the agent does not record "
            "its steps; use another directory"
        )
    right = await is_right(check, task, *found)
    return msgspec.structs.replace(start, **({"error": right} if isinstance(right, str) else {"right": right}))


async def graded_step(check: Checker, start: OutcomeLine, task: EvalTask, steps: Sequence[Step]) -> OutcomeLine:
    """Grade the candidates of the only step of a run."""
    return await graded(check, start, task, steps[-1])


async def graded(check: Checker, start: OutcomeLine, task: EvalTask, step: Step) -> OutcomeLine:
    """Grade every candidate of a step; an exception of the checker becomes ``error``."""
    right: dict[int, bool] = {}
    for candidate in step.candidates:
        verdict = await is_right(check, task, candidate.content, candidate.tool_calls)
        if isinstance(verdict, str):
            return msgspec.structs.replace(start, error=verdict, usage=usage(step))
        right[candidate.index] = verdict
    return msgspec.structs.replace(start, right=right, usage=usage(step))


async def is_right(check: Checker, task: EvalTask, text: str, calls: ToolCalls) -> bool | str:
    """Ask the checker, synchronous or not; a text describes the exception that it raised.

    Raises:
        ConfigError: The checker does not fit the task.
    """
    try:
        verdict = check(task, text, calls)
        return bool(await verdict if inspect.isawaitable(verdict) else verdict)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - a checker is the user's code, and may raise anything
        return f"{CHECKER_RAISED}{type(error).__name__}: {error}"


def usage(step: Step) -> dict[str, int]:
    """Tokens of all candidates of a step, and of the responses that were discarded before them."""
    return add_usage([step.info.get("spent"), *(candidate.usage for candidate in step.candidates)])
