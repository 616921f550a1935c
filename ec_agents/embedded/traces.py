"""Training data: tasks with the responses that the embedded model learns to write.

A puzzle's response searches on a budget: it tries complete attempts, most of them near misses, until one makes the goal
(`` yes``) or the budget is used up. Then it acts on the attempt that worked, or else on the closest one, which is a
wrong guess. Every response therefore terminates. The response to a word problem computes one person after the other.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ec_agents.embedded import vocabulary as v
from ec_agents.embedded.tasks import NARROW, Difficulty, Operation, Task, call_calc, find_solution, make_task, moves
from ec_agents.embedded.template import Turn, call_text, render

Attempt = Sequence[Operation]

BUDGET = {2: 4, 3: 6, 4: 5, 5: 4}
"""Attempts per response, by the number of remaining numbers."""
OUT_OF_BUDGET = 0.35
"""Share of the searches that exhaust their budget without finding the goal."""
WANDER = 0.3
"""Share of the ``play`` examples whose earlier steps followed a wrong attempt."""
REFUSED = 0.06
"""Share of the ``play`` examples with a refused call before the response."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and of the response to learn."""

    prompt: list[int]
    response: list[int]


def make_example(rng: random.Random, difficulty: Difficulty = NARROW) -> Example:
    """Generate one training example of any family."""
    family = rng.choices(("solve", "play", "plain"), (35, 45, 20))[0]
    task = make_task(family, rng, held_out=False, difficulty=difficulty)
    if family == "plain":
        return _plain(task)
    return _solve(task, rng) if family == "solve" else _play(task, rng)


def _plain(task: Task) -> Example:
    amounts: dict[str, int] = {}
    lines: list[str] = []
    for sentence in task.prompt.split(". "):
        words = sentence.rstrip(".").split()
        if words[1] != "has" or not words[2].isdigit():
            continue
        name, amount = words[0], int(words[2])
        if len(words) == 3:
            amounts[name] = amount
            lines.append(f"{name} {amount}\n")
            continue
        sign, base = ("+" if words[3] == "more" else "-"), amounts[words[5]]
        amounts[name] = base + (amount if sign == "+" else -amount)
        lines.append(f"{name} {base}{sign}{amount}={amounts[name]}\n")
    response = [v.THINK, *v.encode("".join(lines)), v.END_THINK, *v.encode(f"answer {task.goal}"), v.END]
    return Example(render([Turn("user", task.prompt)]), response)


def _solve(task: Task, rng: random.Random) -> Example:
    thought, taken = _search(task.numbers, task.goal, rng)
    answer = "answer " + " ".join(map(str, taken))
    return Example(render([Turn("user", task.prompt)]), [*thought, *v.encode(answer), v.END])


def _play(task: Task, rng: random.Random) -> Example:
    wander = _near_miss(task.numbers, task.goal, rng) if rng.random() < WANDER else None
    path = wander or find_solution(task.numbers, task.goal, rng) or []
    left = task.numbers
    turns = [Turn("user", task.prompt)]
    done = rng.randint(0, len(path))
    refused_at = rng.randint(0, done) if rng.random() < REFUSED else None
    for i in range(done + 1):
        if i == refused_at:
            left = _call(turns, left, _illegal(left, rng))
        if i < done:
            left = _call(turns, left, path[i].expression)
    prompt = render(turns, ["calc"])
    if len(left) == 1:
        return Example(prompt, [*v.encode(f"answer {left[0]}"), v.END])
    thought, taken = _search(left, task.goal, rng)
    call = call_text("calc", {"expression": taken[0].expression})
    return Example(prompt, [*thought, v.CALL, *v.encode(call), v.END_CALL, v.END])


def _call(turns: list[Turn], left: tuple[int, ...], expression: str) -> tuple[int, ...]:
    left, result = call_calc(left, expression)
    turns += [Turn("assistant", "", [("calc", {"expression": expression})]), Turn("tool", result)]
    return left


def _illegal(left: Sequence[int], rng: random.Random) -> str:
    missing = rng.choice([n for n in range(1, 60) if n not in left])
    return f"{rng.choice(left)}{rng.choice('+-*')}{missing}"


def _search(numbers: tuple[int, ...], goal: int, rng: random.Random) -> tuple[list[int], Attempt]:
    """A thought that searches, as token ids, and the attempt that it settles on."""
    budget = BUDGET[len(numbers)]
    found = find_solution(numbers, goal, rng)
    misses = budget if found is None or rng.random() < OUT_OF_BUDGET else rng.randrange(budget)
    tried = _near_misses(numbers, goal, misses, rng)
    lines = [" ".join(map(str, attempt)) + " no\n" for attempt in tried]
    if found is not None and (misses < budget or not tried):
        lines.append(" ".join(map(str, found)) + " yes\n")
        taken = found
    else:
        taken = min(tried, key=lambda attempt: abs(attempt[-1].result - goal))
    return [v.THINK, *v.encode("".join(lines)), v.END_THINK], taken


def _attempt(numbers: tuple[int, ...], rng: random.Random) -> Attempt:
    """A complete attempt; two numbers always have a move, so none gets stuck."""
    attempt: list[Operation] = []
    while len(numbers) > 1:
        operation, numbers = rng.choice(moves(numbers))
        attempt.append(operation)
    return attempt


def _near_miss(numbers: tuple[int, ...], goal: int, rng: random.Random, draws: int = 10) -> Attempt | None:
    """A complete attempt that misses the goal, close ones more likely; None if all generated attempts reach it."""
    drawn = [attempt for attempt in (_attempt(numbers, rng) for _ in range(draws)) if attempt[-1].result != goal]
    if not drawn:
        return None
    weights = [math.exp(-abs(attempt[-1].result - goal) / 6) + 1e-9 for attempt in drawn]
    return rng.choices(drawn, weights)[0]


def _near_misses(numbers: tuple[int, ...], goal: int, count: int, rng: random.Random) -> list[Attempt]:
    """Up to ``count`` different near misses."""
    tried: dict[str, Attempt] = {}
    for _ in range(3 * count):
        attempt = _near_miss(numbers, goal, rng) if len(tried) < count else None
        if attempt is not None:
            tried.setdefault(" ".join(map(str, attempt)), attempt)
    return list(tried.values())
