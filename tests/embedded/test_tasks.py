"""The embedded model's tokens, chat template, tasks and training data."""

import random
import re

import pytest
from hypothesis import given, settings, strategies as st

from ec_agents.embedded import FAMILIES, Task, make_task, make_tasks, vocabulary as v
from ec_agents.embedded.tasks import LARGEST, apply, find_solution, is_held_out, moves, operate, replay, stated_number
from ec_agents.embedded.template import Turn, call_text, render
from ec_agents.embedded.traces import BUDGET, make_example

seeds = st.integers(0, 10_000)
texts = st.lists(st.one_of(st.text(), st.sampled_from(v.PHRASES + v.CONTROL))).map("".join)
puzzles = st.builds(
    lambda family, seed: make_task(family, random.Random(seed)), st.sampled_from(["solve", "play"]), seeds
)
CONTROL_IDS = frozenset(range(256, 256 + len(v.CONTROL)))


def solution_of(task: Task) -> list[str]:
    found = find_solution(task.numbers, task.goal, random.Random(0))
    assert found
    return [str(operation) for operation in found]


# Vocabulary and template


@given(texts)
def test_vocabulary(text: str):
    """Any text survives it, and none forges a control token."""
    ids = v.encode(text)
    assert v.decode(ids) == text
    assert not CONTROL_IDS & set(ids)


def test_phrases():
    """Every phrase is one token, and tokens stand for their bytes."""
    assert [len(v.encode(phrase)) for phrase in v.PHRASES] == [1] * len(v.PHRASES)
    assert [v.decode([i]).encode() for i in range(256, v.SIZE)] == [v.token_bytes(i) for i in range(256, v.SIZE)]
    assert v.token_bytes(200) == b"\xc8"
    assert v.decode([200]) == "\ufffd"


def test_names_of_control_tokens_are_their_texts():
    names = (v.END, v.USER, v.ASSISTANT, v.TOOL, v.TOOLS, v.THINK, v.END_THINK, v.CALL, v.END_CALL)
    assert tuple(map(v.decode, ([i] for i in names))) == v.CONTROL


def test_a_conversation_is_rendered_as_in_training():
    turns = [Turn("user", "hi"), Turn("assistant", "", [("calc", {"expression": "1+2"})]), Turn("tool", "3 left: 3")]
    assert v.decode(render(turns, ["calc"])) == (
        '<|tools|>calc<|user|>hi<|assistant|><tool_call>{"name": "calc", "arguments": {"expression": "1+2"}}'
        "</tool_call><|end|><|tool|>3 left: 3<|assistant|>"
    )


@given(texts)
def test_a_message_cannot_forge_a_turn(text: str):
    assert [i for i in render([Turn("user", text)]) if i in CONTROL_IDS] == [v.USER, v.ASSISTANT]


def test_tool_calls_of_the_training_data_are_few_tokens():
    assert len(v.encode(call_text("calc", {"expression": "9*7"}))) == 5


# Tasks


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_are_reproducible_and_held_out(family: str):
    assert family in ("solve", "play", "plain")
    tasks = make_tasks(family, 20, seed=3)
    assert tasks == make_tasks(family, 20, seed=3)
    assert tasks != make_tasks(family, 20, seed=4)
    assert all(is_held_out(task) and task.family == family for task in tasks)


@given(puzzles)
def test_a_solution_is_right_and_anything_less_is_wrong(task: Task):
    steps = solution_of(task)
    if task.family == "solve":
        assert task.check("answer " + " ".join(steps))
        assert not task.check("answer " + " ".join(steps[:-1]))
        assert not task.check("answer " + " ".join([*steps, steps[-1]]))
        assert not task.check(f"answer {task.goal}")
    else:
        assert task.check(f"answer {task.goal}", steps)
        assert task.check(f"answer {task.goal}", ["0/0", *steps])
        assert not task.check(f"answer {task.goal + 1}", steps)
        assert not task.check(f"answer {task.goal}", steps[:-1])
        assert not task.check("", steps)


@pytest.mark.parametrize(("answer", "right"), [("answer 51", True), ("answer 50", False), ("51", False), ("", False)])
def test_word_problems_ask_for_a_number(answer: str, *, right: bool):
    assert Task(family="plain", prompt="", goal=51).check(answer) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [("answer 7", 7), ("answer: **12**.", 12), ("answer 1, no, answer 2", 2), ("7", None), ("answer x 7", None)],
)
def test_the_number_after_the_last_answer_counts(text: str, number: int | None):
    assert stated_number(text) == number


@given(seeds)
def test_a_word_problem_can_be_worked_out(seed: int):
    task = make_task("plain", random.Random(seed))
    amounts: dict[str, int] = {}
    for name, amount, more, other in re.findall(r"(\w+) has (\d+)(?: (more|fewer) than (\w+))?\.", task.prompt):
        amounts[name] = int(amount) if not other else amounts[other] + (int(amount) if more == "more" else -int(amount))
    assert amounts[re.findall(r"How many has (\w+)\?", task.prompt)[0]] == task.goal > 0


def test_the_calc_tool_keeps_count():
    calc = Task(family="play", prompt="", numbers=(9, 7, 1), goal=64).calc_tool()
    assert calc("9*7") == "63 left: 1 63"
    assert calc(" 63 + 1 = 64 ") == "64 left: 64"


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("9*8", "8 is not left"),
        ("9*9", "9 is not left"),
        ("7-9", "not a whole number"),
        ("9/7", "not a whole number"),
        ("9-9", "9 is not left"),
        ("1/0", "0 is not left"),
        ("9*7=64", "wrong"),
        ("9*7*1", "not one operation"),
        ("__import__('os')", "not one operation"),
        ("", "not one operation"),
    ],
)
def test_the_calc_tool_refuses_without_changing_anything(expression: str, reason: str):
    calc = Task(family="play", prompt="", numbers=(9, 7, 1), goal=64).calc_tool()
    answer = calc(expression)
    assert answer.startswith("error: ")
    assert reason in answer
    assert answer.endswith(" left: 9 7 1")
    assert calc("9*7") == "63 left: 1 63"


def test_each_run_has_a_calc_tool_of_its_own():
    task = Task(family="play", prompt="", numbers=(9, 7), goal=63)
    assert task.calc_tool()("9*7") == task.calc_tool()("9*7")


@given(st.integers(0, 500), st.sampled_from("+-*/"), st.integers(0, 500))
def test_operations_are_exact_and_in_range(left: int, sign: str, right: int):
    operation = operate(left, sign, right)
    if operation is not None:
        assert 1 <= operation.result <= LARGEST
        assert eval(operation.expression) == operation.result  # noqa: S307


@given(st.lists(st.integers(1, 25), min_size=2, max_size=4))
def test_moves_are_legal_and_use_up_two_numbers(numbers: list[int]):
    for operation, rest in moves(numbers):
        left, same = apply(numbers, str(operation))
        assert (sorted(left), same) == (sorted(rest), operation)
        assert replay(numbers, [operation.expression]) == left


# Training data


def task_in(prompt: str) -> Task:
    """The task that a prompt states."""
    text = prompt.split("<|user|>")[1].split("<|assistant|>", maxsplit=1)[0]
    puzzle = re.search(r"numbers ([\d ]+) .*(?:to make |until only )(\d+)", text)
    if puzzle is None:
        return Task(family="plain", prompt=text, goal=0)
    family = "play" if "calc" in text else "solve"
    return Task(family=family, prompt=text, numbers=tuple(map(int, puzzle[1].split())), goal=int(puzzle[2]))


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32))
def test_training_never_sees_a_held_out_task(seed: int):
    assert not is_held_out(task_in(v.decode(make_example(random.Random(seed)).prompt)))


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32))
def test_a_puzzle_response_does_what_its_thought_says(seed: int):
    example = make_example(random.Random(seed))
    prompt, response = v.decode(example.prompt), v.decode(example.response)
    task = task_in(prompt)
    assert response.endswith("<|end|>")
    if task.family == "plain":
        return
    left = replay(task.numbers, re.findall(r'"expression": "(.*?)"', prompt))
    if len(left) == 1:
        assert response == f"answer {left[0]}<|end|>"
        return
    thought, acted = response.removeprefix("<think>").split("</think>")
    attempts = [line.rsplit(" ", 1) for line in thought.splitlines()]
    ends = [play_out(left, steps) for steps, _ in attempts]
    assert 1 <= len(attempts) <= BUDGET[len(left)]
    assert [verdict for _, verdict in attempts] == ["yes" if end == task.goal else "no" for end in ends]
    assert task.goal not in ends[:-1]
    closest = min(range(len(ends)), key=lambda i: abs(ends[i] - task.goal))
    steps = attempts[closest][0]
    if task.family == "solve":
        assert acted == f"answer {steps}<|end|>"
        assert task.check(acted.removesuffix("<|end|>")) is (ends[closest] == task.goal)
    else:
        call = call_text("calc", {"expression": steps.split("=")[0]})
        assert acted == f"<tool_call>{call}</tool_call><|end|>"


def play_out(left: tuple[int, ...], steps: str) -> int:
    """The one number that an attempt ends with; a ValueError if a step is not allowed."""
    for step in steps.split():
        left, _ = apply(left, step)
    (end,) = left
    return end


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_a_plain_response_states_the_right_number(seed: int):
    rng = random.Random(seed)
    example = make_example(rng)
    prompt, response = v.decode(example.prompt), v.decode(example.response)
    if task_in(prompt).family == "plain":
        lines = response.removeprefix("<think>").split("</think>")[0].splitlines()
        for line in lines:
            stated = re.fullmatch(r"\w+ (\d+)(?:([-+])(\d+)=(\d+))?", line)
            assert stated
            if stated[2]:
                assert int(stated[4]) == int(stated[1]) + int(stated[2] + stated[3])
        assert response.endswith(f"</think>answer {re.findall(r'[0-9]+', lines[-1])[-1]}<|end|>")


def test_examples_fit_the_context_and_are_reproducible():
    rng, again = random.Random(1), random.Random(1)
    for _ in range(200):
        example = make_example(rng)
        assert example == make_example(again)
        assert len(example.prompt) + len(example.response) <= 512
