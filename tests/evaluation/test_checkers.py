"""Built-in checkers, and the isolation of programs under test."""

import sys
from pathlib import Path

import pytest

from ec_agents.errors import ConfigError
from ec_agents.evaluation.checkers import CHECKERS, answer_finder, check_choice, check_number, name_of
from ec_agents.evaluation.python_tests import check_python_tests, missing_isolation, run_program
from ec_agents.evaluation.tasks import EvalTask
from ec_agents.scoring.answers import last_number

HUMAN_EVAL = EvalTask(
    id="h",
    prompt="Complete.",
    info={
        "stub": "from typing import List\n\n\ndef twice(xs: List[int]) -> List[int]:\n",
        "entry_point": "twice",
        "test": "def check(f):\n    assert f([1]) == [2]\n",
    },
)
MBPP = EvalTask(
    id="m", prompt="?", info={"test_imports": ["import math"], "test_list": ["assert math.isclose(f(), 1)"]}
)


def numbered(answer: str | None) -> EvalTask:
    return EvalTask(id="a", prompt="?", answer=answer)


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [("#### 1,200", "so $1200.00", True), ("0.5", "1/2", True), ("3", "3 or 4", False), ("3", "three", False)],
)
def test_numbers(answer: str, text: str, right: bool):  # noqa: FBT001
    assert check_number(numbered(answer), text, []) is right


def test_choices():
    assert check_choice(numbered("(B)"), "Answer: B", [])
    assert not check_choice(numbered("B"), "Answer: C", [])
    for answer, message in ((None, "no 'answer'"), ("dunno", "names no option")):
        with pytest.raises(ConfigError, match=message):
            check_choice(numbered(answer), "B", [])
    with pytest.raises(ConfigError, match="holds no number"):
        check_number(numbered("x"), "1", [])


def test_what_votes_compare_follows_the_checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert answer_finder(None, "number") is last_number
    assert answer_finder(None, "exact") is None
    assert answer_finder("text", "number") is None
    (tmp_path / "finder_of_mine.py").write_text("def find(text): return text[-1:]")
    monkeypatch.syspath_prepend(tmp_path)
    found = answer_finder("finder_of_mine:find", None)
    assert found is not None
    assert name_of(found, CHECKERS).startswith("finder_of_mine:find (")
    with pytest.raises(ConfigError, match="--answer, if it is not one of last-number"):
        answer_finder("lastnumber", None)


@pytest.mark.parametrize(
    ("task", "text", "right"),
    [
        (HUMAN_EVAL, "```python\ndef twice(xs: List[int]):\n    return [2 * x for x in xs]\n```", True),
        (HUMAN_EVAL, "    return [2 * x for x in xs]", True),
        (HUMAN_EVAL, "def twice(xs): return xs", False),
        (HUMAN_EVAL, "import sys\ndef twice(xs): sys.exit(0)", False),
        (MBPP, "def f(): return 1.0\nif __name__ == '__main__': raise SystemExit", True),
    ],
)
async def test_programs(task: EvalTask, text: str, right: bool):  # noqa: FBT001
    assert await check_python_tests(task, text, []) is right


async def test_tasks_without_tests():
    with pytest.raises(ConfigError, match="'test_list'"):
        await check_python_tests(numbered("1"), "x", [])


@pytest.mark.skipif(sys.platform == "win32", reason="limits need Unix")
@pytest.mark.parametrize(
    "source", ["while True: pass", "x = bytearray(1 << 31)", "open('f', 'wb').write(bytes(1 << 25))"]
)
async def test_limits(source: str):
    assert (await run_program(source, seconds=1))[0] is False


async def test_isolation(tmp_path: Path):
    """Where namespaces are to be had, a program reaches neither the network nor the user's files."""
    victim = tmp_path / "mine.txt"
    victim.write_text("kept")
    if await missing_isolation():
        pytest.skip("no namespaces here")
    assert (await run_program("open('own', 'w').write('x')"))[0]
    assert not (await run_program(f"import os; os.unlink({str(victim)!r})"))[0]
    assert victim.read_text() == "kept"

    assert (await run_program("import socket; assert [n for _, n in socket.if_nameindex()] == ['lo']"))[0]
