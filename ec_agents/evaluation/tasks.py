"""Tasks, from a file or an embedded family."""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from typing import Any

import msgspec

from ec_agents.embedded.tasks import FAMILIES, Task, make_tasks
from ec_agents.errors import ConfigError, TraceError
from ec_agents.jsonl import Records

ToolCalls = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalTask:
    """A problem for an agent to solve."""

    id: str
    """Name of the task; unique in an evaluation."""
    prompt: str
    """Prompt for the agent."""
    answer: str | None = None
    """The right answer, if it is a text to compare with."""
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Anything else that the checker or the agent needs."""


def read_tasks(source: str, *, limit: int | None = None, seed: int = 0) -> tuple[list[EvalTask], bool]:
    """Read tasks, and tell whether they belong to an embedded family.

    Args:
        source: Name of an embedded family (``solve``, ``play``, ``plain``), or a JSONL file with ``prompt`` and, where
            known, ``id`` and ``answer`` on each line.
        limit: Most tasks to return; an embedded family has 100 by default.
        seed: Selects the tasks of an embedded family.

    Raises:
        ConfigError: The file cannot be read, a line is not a task, or two tasks have the same id.
    """
    if source in FAMILIES:
        tasks = make_tasks(source, 100 if limit is None else limit, seed=seed)
        return [_embedded(task, f"{source}-{seed}-{i}") for i, task in enumerate(tasks)], True
    tasks = list(islice(_tasks_of_file(source), limit))
    if not tasks or len({task.id for task in tasks}) < len(tasks):
        raise ConfigError(f"{source}: one or more tasks with different ids are needed; found {len(tasks)} tasks")
    return tasks, False


def _tasks_of_file(source: str) -> Iterator[EvalTask]:
    try:
        with Records(source) as records:
            for _, number, text in records.scan():
                yield _task(bytes(text), f"{source}, line {number}", str(number))
    except TraceError as error:
        families = ", ".join(FAMILIES)
        raise ConfigError(
            f"tasks must be one of {families} or a readable JSONL file with one or more tasks: {error}"
        ) from error


def _embedded(task: Task, name: str) -> EvalTask:
    info = {"family": task.family, "numbers": list(task.numbers), "goal": task.goal}
    return EvalTask(id=name, prompt=task.prompt, answer=str(task.goal), info=info)


def embedded_task(task: EvalTask) -> Task:
    """Convert an evaluation task back to the task of an embedded family."""
    info = task.info
    return Task(family=info["family"], prompt=task.prompt, numbers=tuple(info["numbers"]), goal=info["goal"])


def _task(line: bytes, where: str, name: str) -> EvalTask:
    try:
        data = msgspec.json.decode(line, type=dict[str, Any])
        answer = data.pop("answer", None)
        return EvalTask(
            id=str(data.pop("id", data.get("task_id", name))),
            prompt=msgspec.convert(data.pop("prompt"), str),
            answer=None if answer is None else str(answer),
            info=data,
        )
    except (KeyError, msgspec.MsgspecError) as error:
        found = line[:80].decode(errors="replace").strip()
        raise ConfigError(f"{where}: an object with a text 'prompt' is needed ({error}); found {found}") from error


def load(name: str, what: str) -> Any:
    """Import ``module:attribute``, also from the current directory.

    Raises:
        ConfigError: The name has another form, or cannot be imported.
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


def digest(*parts: object) -> str:
    """A short digest of texts and numbers, to see whether they changed."""
    return hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=6).hexdigest()
