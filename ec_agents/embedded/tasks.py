"""Three families of tasks with programmatic checkers: ``solve``, ``play`` and ``plain``.

- ``solve``: make a goal from 3 or 4 numbers with + - * /; one response with a worked search.
- ``play``: the same puzzle with 3 or 4 numbers and a ``calc`` tool, one operation per step: two or three tool calls,
  each using the results of the previous ones.
- ``plain``: a word problem of several sums; one response with a plain chain of thought.

A task is plain data and its checker is a pure function, so any model can work on the same tasks.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Family = Literal["solve", "play", "plain"]
FAMILIES: tuple[Family, ...] = ("solve", "play", "plain")
NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Liv")
LARGEST = 400
"""The largest result that one operation of a puzzle may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """Difficulty of the generated tasks."""

    solve: tuple[int, int, int]
    """Weights of 3, 4 and 5 numbers in ``solve``."""
    play: tuple[int, int, int]
    """Weights of 3, 4 and 5 numbers in ``play``."""
    people: int
    """``plain``: largest number of people, at least 3."""
    amount: int
    """``plain``: largest amount of the first person, at least 10."""
    difference: int
    """``plain``: largest difference, at least 2."""


NORMAL = Difficulty(solve=(3, 1, 0), play=(2, 1, 0), people=4, amount=40, difference=20)
"""Difficulty of ``make_tasks``."""
NARROW = replace(NORMAL, people=5)
"""The second stage of training."""
WIDE = Difficulty(solve=(1, 1, 0), play=(2, 2, 1), people=6, amount=60, difference=48)
"""The first stage of training."""

_OPERATION = re.compile(r"\s*(\d+)\s*([-+*/])\s*(\d+)\s*(?:=\s*(\d+)\s*)?")


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a puzzle, ``left sign right = result``; all are whole numbers of 0 or more."""

    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        """The operation with its result: ``9*7=63``."""
        return f"{self.expression}={self.result}"

    @property
    def expression(self) -> str:
        """The operation without its result: ``9*7``."""
        return f"{self.left}{self.sign}{self.right}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task with its right answer."""

    family: Family
    prompt: str
    """Prompt for the model."""
    numbers: tuple[int, ...] = ()
    """Puzzles: the numbers to use. Empty in ``plain``."""
    goal: int
    """Puzzles: the number to make. ``plain``: the number asked for."""

    def check(self, answer: str, expressions: Sequence[str] = ()) -> bool:
        """Decide whether a run solved the task.

        Args:
            answer: The text of the final answer.
            expressions: ``play`` only: the expressions given to the ``calc`` tool, in order; refused ones change
                nothing.
        """
        if self.family == "plain":
            return stated_number(answer) == self.goal
        if self.family == "play":
            return stated_number(answer) == self.goal and replay(self.numbers, expressions) == (self.goal,)
        steps = answer.rpartition("answer")[2].split()
        try:
            left = self.numbers
            for step in steps:
                left = apply(left, step)[0]
        except ValueError:
            return False
        return left == (self.goal,)

    def calc_tool(self) -> Callable[[str], str]:
        """Make a ``calc`` tool for one run of a ``play`` task; it tracks the remaining numbers."""
        left = self.numbers

        def calc(expression: str) -> str:
            """Combine two of the numbers left, e.g. ``9*7``. Signs: + - * /. Says the result and the numbers left."""
            nonlocal left
            left, text = call_calc(left, expression)
            return text

        return calc


def apply(numbers: Sequence[int], expression: str) -> tuple[tuple[int, ...], Operation]:
    """Apply one operation to two of the numbers; return the remaining numbers and the operation.

    Raises:
        ValueError: The expression is not an operation on two of the numbers, or its result is not allowed.
    """
    match = _OPERATION.fullmatch(expression)
    if match is None:
        raise ValueError("not one operation such as 9*7")
    left, sign, right = int(match[1]), match[2], int(match[3])
    rest = list(numbers)
    for number in (left, right):
        if number not in rest:
            raise ValueError(f"{number} is not left")
        rest.remove(number)
    operation = operate(left, sign, right)
    if operation is None or (match[4] is not None and int(match[4]) != operation.result):
        raise ValueError("wrong or not a whole number from 1 to 400")
    return (*rest, operation.result), operation


def call_calc(left: tuple[int, ...], expression: str) -> tuple[tuple[int, ...], str]:
    """The ``calc`` tool as a function: numbers left, expression → numbers left, text of the result."""
    try:
        left, operation = apply(left, expression)
    except ValueError as error:
        return left, f"error: {error} left: {_join(left)}"
    return left, f"{operation.result} left: {_join(left)}"


def operate(left: int, sign: str, right: int) -> Operation | None:
    """The operation if its result is a whole number from 1 to ``LARGEST``, otherwise None."""
    if sign == "+":
        result = left + right
    elif sign == "-":
        result = left - right
    elif sign == "*":
        result = left * right
    else:
        if right == 0 or left % right:
            return None
        result = left // right
    return Operation(left, sign, right, result) if 1 <= result <= LARGEST else None


def replay(numbers: Sequence[int], expressions: Sequence[str]) -> tuple[int, ...]:
    """The numbers left after a run's calls; calls that the tool refuses change nothing."""
    left = tuple(numbers)
    for expression in expressions:
        left = call_calc(left, expression)[0]
    return left


def stated_number(answer: str) -> int | None:
    """The first number after the last ``answer``, or None."""
    match = re.match(r"\W*(\d+)", answer.rpartition("answer")[2])
    return int(match[1]) if match and "answer" in answer else None


def find_solution(numbers: Sequence[int], goal: int, rng: random.Random) -> list[Operation] | None:
    """Find a solution of a puzzle by a search in random order; None if none exists."""
    if len(numbers) == 1:
        return [] if numbers[0] == goal else None
    options = moves(numbers)
    rng.shuffle(options)
    for operation, rest in options:
        tail = find_solution(rest, goal, rng)
        if tail is not None:
            return [operation, *tail]
    return None


def moves(numbers: Sequence[int]) -> list[tuple[Operation, tuple[int, ...]]]:
    """Every operation on two of the numbers, larger operand first, with the numbers left after it."""
    options: dict[Operation, tuple[int, ...]] = {}
    for i in range(len(numbers)):
        for j in range(i):
            high, low = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
            rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
            for sign in "+-*/":
                operation = operate(high, sign, low)
                if operation is not None and operation not in options:
                    options[operation] = (*rest, operation.result)
    return list(options.items())


def make_task(family: Family, rng: random.Random, *, held_out: bool = True, difficulty: Difficulty = NORMAL) -> Task:
    """Generate a task.

    Args:
        family: Which family.
        rng: Random generator.
        held_out: True takes the task from the tenth that training never sees, False from the rest.
        difficulty: Difficulty of the task.
    """
    while True:
        task = _draw_sums(rng, difficulty) if family == "plain" else _draw_puzzle(family, rng, difficulty)
        if task is not None and is_held_out(task) == held_out:
            return task


def make_tasks(family: Family, count: int, *, seed: int = 0) -> list[Task]:
    """Generate held-out tasks of one family; the same seed gives the same tasks."""
    rng = random.Random(f"{family}/{seed}")
    return [make_task(family, rng) for _ in range(count)]


def is_held_out(task: Task) -> bool:
    """Whether a task belongs to the tenth that training never sees; ``solve`` and ``play`` share their puzzles."""
    key = repr((sorted(task.numbers), task.goal)) if task.numbers else task.prompt
    return zlib.crc32(key.encode()) % 10 == 0


def _draw_puzzle(family: Literal["solve", "play"], rng: random.Random, difficulty: Difficulty) -> Task | None:
    count = rng.choices((3, 4, 5), difficulty.solve if family == "solve" else difficulty.play)[0]
    numbers = tuple(rng.randint(1, 25) for _ in range(count))
    left = numbers
    while len(left) != 1:
        options = moves(left)
        if not options:
            return None
        left = rng.choice(options)[1]
    goal = left[0]
    if not 10 <= goal <= 99:
        return None
    listed = _join(numbers)
    if family == "solve":
        prompt = (
            f"Use each of the numbers {listed} exactly once with + - * / to make {goal}. "
            "Say 'answer' and the steps, such as 'answer 2+3=5 5*4=20'."
        )
    else:
        prompt = (
            f"Combine the numbers {listed} with the calc tool, two at a time, until only {goal} is left. "
            "Then say 'answer' and the number left."
        )
    return Task(family=family, prompt=prompt, numbers=numbers, goal=goal)


def _draw_sums(rng: random.Random, difficulty: Difficulty) -> Task:
    names = rng.sample(NAMES, rng.randint(3, difficulty.people))
    amounts = {names[0]: rng.randint(10, difficulty.amount)}
    sentences = [f"{names[0]} has {amounts[names[0]]}."]
    for name in names[1:]:
        other = rng.choice(list(amounts))
        difference = rng.randint(2, difficulty.difference)
        fewer = amounts[other] > difference and rng.random() < 0.5
        amounts[name] = amounts[other] + (-difference if fewer else difference)
        sentences.append(f"{name} has {difference} {'fewer' if fewer else 'more'} than {other}.")
    asked = names[-1]
    prompt = f"{' '.join(sentences)} How many has {asked}? Say 'answer' and the number."
    return Task(family="plain", prompt=prompt, goal=amounts[asked])


def _join(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
