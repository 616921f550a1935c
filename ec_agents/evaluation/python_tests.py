"""The checker ``python-tests``: run the program of an answer against its tests, in a process that can do no harm.

Forms of a task: HumanEval (``test`` defines ``check``, ``entry_point`` names the function, ``stub`` is the head that
the answer may leave out) and MBPP (``test_list``, ``test_imports`` or ``test_setup_code``).
"""

import asyncio
import json
import secrets
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from typing import Any, cast

from ec_agents.errors import ConfigError
from ec_agents.evaluation.tasks import EvalTask, ToolCalls
from ec_agents.scoring.answers import code_block

SECONDS = 10
"""Processor time and, with some slack, time that a program may take."""
MEMORY_BYTES = 1 << 30
"""Address space of a program."""
FILE_BYTES = 1 << 24
"""Largest file that a program may write, in a folder that is deleted afterwards."""

SLACK_SECONDS = 10
"""Added to ``SECONDS`` where the machine is busy."""


async def check_python_tests(task: EvalTask, text: str, tool_calls: ToolCalls) -> bool:  # noqa: ARG001 - see Checker
    """Whether the program in the text passes the tests of the task.

    The program runs in a process of its own, with limits on time, memory, processes and files. On Linux with user
    namespaces it has no network and can write only to a temporary folder; see ``missing_isolation``.

    Raises:
        ConfigError: The task has no tests of a known form.
    """
    verdict, _ = await run_program(program(task, text))
    return verdict


def program(task: EvalTask, text: str) -> str:
    """The program of an answer, followed by the tests of its task.

    Raises:
        ConfigError: The task has no tests of a known form.
    """
    info, source = task.info, code_block(text)
    if isinstance(info.get("test"), str) and isinstance(info.get("entry_point"), str):
        name, stub = info["entry_point"], str(info.get("stub", ""))
        head = stub[: max(0, stub.find("def "))] if f"def {name}" in source else stub
        return f"{head}\n{source}\n{info['test']}\ncheck({name})\n"
    if isinstance(info.get("test_list"), list):
        setup: Any = info.get("test_imports") or info.get("test_setup_code") or []
        before = [setup] if isinstance(setup, str) else cast("list[str]", setup)
        return "\n".join([*map(str, before), source, *map(str, cast("list[Any]", info["test_list"]))]) + "\n"
    raise ConfigError(
        f"task {task.id!r}: 'test' and 'entry_point' (HumanEval) or 'test_list' (MBPP) are needed; found "
        f"{', '.join(info) or 'no field besides id, prompt and answer'}"
    )


async def missing_isolation() -> Sequence[str]:
    """What this system does not keep from a program under test, in words; empty if nothing."""
    _, missing = await run_program("")
    return missing


async def run_program(source: str, *, seconds: float = SECONDS) -> tuple[bool, Sequence[str]]:
    """Run a program to its end in isolation; return whether it got there, and which isolation was not to be had.

    A program that ends early, as by ``sys.exit(0)``, did not get to its end.
    """
    token = secrets.token_hex(16)
    runner = (resources.files("ec_agents.evaluation") / "sandbox.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="ec-agents-") as folder:
        order = {
            "source": source,
            "token": token,
            "folder": folder,
            "seconds": seconds,
            "memory": MEMORY_BYTES,
            "file": FILE_BYTES,
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-c", runner),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(seconds + SLACK_SECONDS):
                said = await _conversation(process, json.dumps(order).encode())
        except TimeoutError:
            return False, ()
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
    missing, _, reached = said.partition("\n")
    return reached.strip() == token, [part for part in missing.split(", ") if part]


async def _conversation(process: asyncio.subprocess.Process, order: bytes) -> str:
    """The first 4096 bytes of what the process says, once it has ended or said so much."""
    if process.stdin is None or process.stdout is None:
        raise AssertionError("both are pipes")
    try:
        process.stdin.write(order)
        await process.stdin.drain()
        process.stdin.close()
    except (BrokenPipeError, ConnectionResetError):
        pass  # it ended before it had read everything: it did not get to its end
    said = b""
    while len(said) < 4096 and (part := await process.stdout.read(4096)):
        said += part
    return said.decode(errors="replace")
