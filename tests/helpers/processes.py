"""Run code in a process of its own, without the seconds that its imports take: a fork of one that has made them."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "ec_agents.agents.middleware",
        "ec_agents.agents.telemetry",
        "ec_agents.cli.main",
        "ec_agents.embedded",
        "ec_agents.evaluation.html",
        "ec_agents.evaluation.run",
        "ec_agents.servers",
        "ec_agents.testing",
        "langchain_openai",
        "langgraph.checkpoint.sqlite.aio",
        "rich.console",
    ]
)
COMMAND = "from ec_agents.cli.main import main; main()"
"""What the program ``ec-agents`` does."""


def start(
    code: str,
    *arguments: object,
    output: Path,
    without: Sequence[str] = (),
    anew: Sequence[str] = (),
    cwd: Path | None = None,
    **variables: str,
) -> ForkServerProcess:
    """Start what ``python -c code arguments`` does, in the directory and with the environment variables given.

    It prints into the files ``stdout`` and ``stderr`` of the directory ``output``. Packages named in ``without`` count
    as not installed; the package under test is then imported anew, and so are those named in ``anew``. What an import
    costs, and what Python does at the end of a process, takes a new interpreter to see.
    """
    forgotten = [*anew, *without, "ec_agents"] if anew or without else []
    given = (output, code, list(map(str, arguments)), forgotten, without, cwd, variables)
    child = FORKS.Process(target=_execute, args=given)
    child.start()
    return child


def run(code: str, *arguments: object, timeout: float = 300, **options: object) -> subprocess.CompletedProcess[str]:
    """Do what ``start`` starts, to its end."""
    with TemporaryDirectory() as folder:
        child = start(code, *arguments, output=Path(folder), **options)  # type: ignore[arg-type]
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(code, timeout)
        printed = [Path(folder, name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(code, child.exitcode, *printed)


def _execute(  # noqa: PLR0917 - what a process is started with
    output: Path,
    code: str,
    arguments: list[str],
    forgotten: Sequence[str],
    without: Sequence[str],
    cwd: Path | None,
    variables: dict[str, str],
) -> None:
    for descriptor, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), descriptor)
        setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", closefd=False))
    os.environ.update(variables)
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    sys.path.insert(0, "")
    for module in list(sys.modules):
        if any(module == package or module.startswith(f"{package}.") for package in forgotten):
            del sys.modules[module]
    sys.modules.update(dict.fromkeys(without))  # type: ignore[arg-type] - None makes the import fail
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)  # noqa: S102
