"""The checkers that grade answers, and what votes compare if one of them is used."""

import ast
import inspect
from collections.abc import Awaitable, Callable, Mapping
from fractions import Fraction
from textwrap import dedent
from typing import Any, cast

from ec_agents.errors import ConfigError
from ec_agents.evaluation.python_tests import check_python_tests
from ec_agents.evaluation.tasks import EvalTask, ToolCalls, digest, embedded_task, load
from ec_agents.scoring.answers import ANSWERS, Extract, choice, last_number

Checker = Callable[[EvalTask, str, ToolCalls], bool | Awaitable[bool]]
"""Takes the task, the text of the answer and all tool calls made (``name``, ``args``); returns whether it is right."""


def check_embedded(task: EvalTask, text: str, tool_calls: ToolCalls) -> bool:
    """Check an answer to a task of an embedded family."""
    expressions = [str(call["args"].get("expression")) for call in tool_calls if call["name"] == "calc"]
    return embedded_task(task).check(text, expressions)


def check_exact(task: EvalTask, text: str, tool_calls: ToolCalls) -> bool:  # noqa: ARG001 - the form of a checker
    """Whether the text equals the answer, ignoring case and spacing."""
    return _plain(text) == _plain(_answer(task))


def check_math(task: EvalTask, text: str, tool_calls: ToolCalls) -> bool:  # noqa: ARG001 - the form of a checker
    r"""Whether the last mathematical expression of the text, or the content of ``\boxed``, equals the answer.

    Raises:
        ConfigError: The task has no answer, the answer is not mathematics, or the extra ``math`` is not installed.
    """
    parse, verify = _math_verify()
    gold = parse(f"${_answer(task)}$")
    if not gold:
        raise ConfigError(f"task {task.id!r}: the answer {task.answer!r} is not a mathematical expression")
    return bool(verify(gold, parse(text)))


def check_number(task: EvalTask, text: str, tool_calls: ToolCalls) -> bool:  # noqa: ARG001 - the form of a checker
    """Whether the last number of the text is the last number of the answer, to within a millionth.

    Raises:
        ConfigError: The task has no answer, or no number is in it.
    """
    gold, found = last_number(_answer(task)), last_number(text)
    if gold is None:
        raise ConfigError(f"task {task.id!r}: the answer {task.answer!r} holds no number")
    right = Fraction(gold)
    return found is not None and abs(Fraction(found) - right) <= Fraction(1, 10**6) * max(1, abs(right))


def check_choice(task: EvalTask, text: str, tool_calls: ToolCalls) -> bool:  # noqa: ARG001 - the form of a checker
    """Whether the last option that the text names, as in ``(B)`` or ``Answer: B``, is that of the answer.

    Raises:
        ConfigError: The task has no answer, or no option is in it.
    """
    gold = choice(_answer(task))
    if gold is None:
        raise ConfigError(f"task {task.id!r}: the answer {task.answer!r} names no option such as (B)")
    return choice(text) == gold


CHECKERS: Mapping[str, Checker] = {
    "exact": check_exact,
    "math": check_math,
    "number": check_number,
    "choice": check_choice,
    "python-tests": check_python_tests,
    "embedded": check_embedded,
}
"""Built-in checkers by name."""

ANSWER_OF_CHECKER: Mapping[str, str] = {"number": "last-number", "choice": "choice", "python-tests": "code"}
"""Checkers that look at one part of a text → the name of that part, which votes then compare as well."""


def answer_finder(name: str | None, check: str | None) -> Extract | None:
    """What votes compare: one of ``ANSWERS``, ``module:function`` of a text, or by default what the checker looks at.

    Args:
        name: The name; ``text`` and, where nothing can be guessed, None compare whole texts.
        check: Name of the checker.

    Raises:
        ConfigError: No function has that name.
    """
    name = name or ANSWER_OF_CHECKER.get(check or "", "text")
    if name == "text":
        return None
    return ANSWERS[name] if name in ANSWERS else load(name, f"--answer, if it is not one of {', '.join(ANSWERS)},")


def name_of(function: Callable[..., Any], known: Mapping[str, Callable[..., Any]]) -> str:
    """Name of a built-in function, or place and digest of another one, which change with its source."""
    for name, one in known.items():
        if one is function:
            return name
    place = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"
    try:
        source = ast.dump(ast.parse(dedent(inspect.getsource(function))))
    except (OSError, TypeError, SyntaxError):  # made at run time, or not a plain function
        return place
    return f"{place} ({digest(source)})"


def checker(name: str) -> Checker:
    """Find a checker by name: one of ``CHECKERS``, or ``module:function`` for a custom one.

    Raises:
        ConfigError: No checker has that name, or it needs an extra that is not installed.
    """
    if name == "math":
        _math_verify()
    return CHECKERS[name] if name in CHECKERS else load(name, "--check")


def _math_verify() -> tuple[Callable[[str], Any], Callable[[Any, Any], bool]]:
    try:
        from math_verify import parse, verify  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ConfigError(f"--check math needs the extra 'math' ({error}): pip install 'ec-agents[math]'") from error
    return cast("Any", parse), cast("Any", verify)


def _answer(task: EvalTask) -> str:
    if task.answer is None:
        raise ConfigError(f"task {task.id!r} has no 'answer' to compare with; add one, or use a custom checker")
    return task.answer


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
