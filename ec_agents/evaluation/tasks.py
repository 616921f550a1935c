"""What is asked and what is right: tasks from a file or of the embedded families, and checkers."""

import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import msgspec

from ec_agents.embedded.tasks import FAMILIES, Task, make_tasks
from ec_agents.errors import ConfigError

ToolCalls = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalTask:
    """A problem to put to an agent."""

    id: str
    """Its name; unique in an evaluation."""
    prompt: str
    """What the agent is asked."""
    answer: str | None = None
    """The right answer, if it is a text to compare with."""
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Whatever else the checker or the agent needs."""


Checker = Callable[[EvalTask, str, ToolCalls], bool | Awaitable[bool]]
"""Task, text of the answer and all tool calls made (``name``, ``args``) → whether it is right."""


def read_tasks(source: str, *, limit: int | None = None, seed: int = 0) -> tuple[list[EvalTask], bool]:
    """Tasks, and whether they are of an embedded family.

    Args:
        source: Name of an embedded family (``solve``, ``play``, ``plain``), or a JSONL file with ``prompt`` and, where
            known, ``id`` and ``answer`` on each line.
        limit: At most so many; of an embedded family 100 unless told.
        seed: Which tasks of an embedded family.

    Raises:
        ConfigError: The file cannot be read, a line is not a task, or two tasks have one id.
    """
    if source in FAMILIES:
        tasks = make_tasks(source, 100 if limit is None else limit, seed=seed)
        return [_embedded(task, f"{source}-{seed}-{i}") for i, task in enumerate(tasks)], True
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(FAMILIES)
        raise ConfigError(
            f"tasks must be one of {known} or a JSONL file that can be read; {source!r}: {error}"
        ) from error
    tasks = [_task(line, f"{source}, line {i}", str(i)) for i, line in enumerate(lines, start=1) if line.strip()][
        :limit
    ]
    if not tasks or len({task.id for task in tasks}) < len(tasks):
        raise ConfigError(f"{source}: one or more tasks with different ids are needed; found {len(tasks)} tasks")
    return tasks, False


def _embedded(task: Task, name: str) -> EvalTask:
    info = {"family": task.family, "numbers": list(task.numbers), "goal": task.goal}
    return EvalTask(id=name, prompt=task.prompt, answer=str(task.goal), info=info)


def embedded_task(task: EvalTask) -> Task:
    """The task of an embedded family that an evaluation task stands for."""
    info = task.info
    return Task(family=info["family"], prompt=task.prompt, numbers=tuple(info["numbers"]), goal=info["goal"])


def _task(line: str, where: str, name: str) -> EvalTask:
    try:
        data = msgspec.json.decode(line, type=dict[str, Any])
        answer = data.pop("answer", None)
        return EvalTask(
            id=str(data.pop("id", name)),
            prompt=msgspec.convert(data.pop("prompt"), str),
            answer=None if answer is None else str(answer),
            info=data,
        )
    except (KeyError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{where}: an object with a text 'prompt' is needed ({error}); found {line:.80}") from error


def check_embedded(task: EvalTask, text: str, tool_calls: ToolCalls) -> bool:
    """The checker of the embedded families."""
    expressions = [str(call["args"].get("expression")) for call in tool_calls if call["name"] == "calc"]
    return embedded_task(task).check(text, expressions)


def check_exact(task: EvalTask, text: str, tool_calls: ToolCalls) -> bool:  # noqa: ARG001 - the form of a checker
    """Whether the text is the answer, but for case and spaces."""
    return _plain(text) == _plain(_answer(task))


def check_math(task: EvalTask, text: str, tool_calls: ToolCalls) -> bool:  # noqa: ARG001 - the form of a checker
    r"""Whether the last mathematical expression of the text, or what is in ``\boxed``, equals the answer.

    Raises:
        ConfigError: The task has no answer, or none that is mathematics; or the extra ``math`` is not installed.
    """
    parse, verify = _math_verify()
    gold = parse(f"${_answer(task)}$")
    if not gold:
        raise ConfigError(f"task {task.id!r}: the answer {task.answer!r} is no mathematical expression")
    return bool(verify(gold, parse(text)))


def checker(name: str) -> Checker:
    """A checker by name: ``exact``, ``math``, or ``module:function`` for one's own.

    Raises:
        ConfigError: There is none of that name, or it needs an extra that is not installed.
    """
    if name == "math":
        _math_verify()
    known: dict[str, Checker] = {"exact": check_exact, "math": check_math, "embedded": check_embedded}
    return known[name] if name in known else load(name, "--check")


def load(name: str, what: str) -> Any:
    """What ``module:attribute`` names; modules of the current directory are found.

    Raises:
        ConfigError: It is not of this form, or cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{what} must be module:name; found {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what} {name!r} cannot be loaded: {error}") from error


def _math_verify() -> tuple[Callable[[str], Any], Callable[[Any, Any], bool]]:
    try:
        from math_verify import parse, verify  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ConfigError(f"--check math needs the extra 'math' ({error}): pip install 'ec-agents[math]'") from error
    return cast("Any", parse), cast("Any", verify)


def _answer(task: EvalTask) -> str:
    if task.answer is None:
        raise ConfigError(f"task {task.id!r} has no 'answer' to compare with; add one, or give a checker of your own")
    return task.answer


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
