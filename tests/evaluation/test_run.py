"""Runs of evaluations: nothing lost or repeated after a kill, errors apart from wrong answers, the command itself."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import COMMAND, run, start
from helpers.waiting import settle
from langchain_core.exceptions import ContextOverflowError
from typer.testing import CliRunner

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.candidates import Candidate, Step
from ec_agents.cli.main import app, main
from ec_agents.embedded import EmbeddedChatModel, make_tasks
from ec_agents.errors import ConfigError, SamplingError, TraceError, UnsupportedLogprobs, WriteError
from ec_agents.evaluation.checkers import check_embedded, check_exact, check_math, checker
from ec_agents.evaluation.factories import embedded_agent, embedded_model, seed_of
from ec_agents.evaluation.grading import begun
from ec_agents.evaluation.run import ERRORS_AT_FIRST, EvalRun, Progress, usage
from ec_agents.evaluation.settings import EvalSettings
from ec_agents.evaluation.store import OUTCOMES, SETTINGS, TRACE, OutcomeLine, read_outcome_lines, write_outcome_line
from ec_agents.evaluation.table import load_evaluation
from ec_agents.evaluation.tasks import EvalTask, read_tasks
from ec_agents.scoring import CentroidScorer, FirstScorer, RandomScorer
from ec_agents.selection import Selector
from ec_agents.testing import FaultServer, Reply, ScriptedChatModel, profile_logprobs
from ec_agents.trace import read_steps

SELECTORS = {"centroid": Selector(scorer=CentroidScorer()), "first": Selector(scorer=FirstScorer())}

AGENT = """
import asyncio, itertools
from ec_agents.testing import profile_logprobs

counter = itertools.count()

def factory():
    async def answer(prompt):
        with open("calls.txt", "a") as file:
            file.write(prompt + "\\n")
        await asyncio.sleep(0.02)
        number = next(counter) % 3
        return {"message": {"content": "yes" if number else "no"}, "finish_reason": "stop",
                "logprobs": profile_logprobs("!" + "." * 9 if number else "." * 9 + "!")}
    return answer

def agent(*, selector, n):
    from ec_agents.agents.graph import create_centroid_agent
    from ec_agents.testing import Reply, ScriptedChatModel
    return create_centroid_agent(ScriptedChatModel(replies=[Reply(content="yes")] * n), n=n, selector=selector)

def broken():
    async def answer(prompt):
        raise ConnectionError("no route to host")
    return answer

def always(task, text, tool_calls):
    return True
"""


def a_task(name: str = "t") -> EvalTask:
    return EvalTask(id=name, prompt=f"is it {name}?", answer="yes")


def choice(content: str, profile: str = "!...") -> dict[str, Any]:
    return {"message": {"content": content}, "finish_reason": "stop", "logprobs": profile_logprobs(profile)}


def an_evaluation(out: Path, factory: Callable[..., Any], count: int = 3, **changes: Any) -> EvalRun:
    given: dict[str, Any] = {
        "settings": EvalSettings(tasks="file", agent="mine", n=changes.pop("n", 2)),
        "tasks": [a_task(f"t{i}") for i in range(count)],
        "factory": factory,
        "check": check_exact,
        "selectors": SELECTORS,
        "out": out,
        **changes,
    }
    return EvalRun(**given)


def answering(*contents: str, asked: list[str] | None = None) -> Callable[..., Any]:
    """A factory of an agent that gives these answers to each prompt in turn."""

    def factory() -> Any:
        seen = iter(contents)

        async def answer(prompt: str) -> dict[str, Any]:
            if asked is not None:
                asked.append(prompt)
            return choice(next(seen))

        return answer

    return factory


@pytest.fixture
def command(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command in this process, in the directory of the project."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["ec-agents", *arguments])
        main()

    return run


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with an agent and 24 tasks."""
    (tmp_path / "mine.py").write_text(AGENT)
    lines = [json.dumps({"id": f"t{i}", "prompt": f"question {i}", "answer": "yes"}) for i in range(24)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines))
    return tmp_path


async def test_every_candidate_of_a_one_step_task_is_graded(tmp_path: Path):
    run = an_evaluation(tmp_path, answering("yes", "no"), trials=2)
    await run.run()
    graded = list(run.graded())
    assert [one.right for one in graded] == [{0: True, 1: False}] * 6
    assert all(one.step.selection is not None for one in graded)
    found = run.evaluation(resamples=20)
    assert (found.n_tasks, found.n_draws, found.n_candidates) == (3, 6, 2)
    assert (found.row("avg@1").accuracy.value, found.row("oracle").accuracy.value) == (0.5, 1.0)


async def test_whole_runs_of_an_agent_are_graded_for_each_selector(tmp_path: Path):
    def factory(*, n: int, selector: Selector, task: EvalTask) -> Any:
        sure = Reply(content="yes" if task.id != "t1" else "no", profile="!.........")
        unsure = Reply(content="no", profile=".........!")
        model = ScriptedChatModel(replies=[unsure, sure][:n] if n > 1 else [unsure])
        return create_centroid_agent(model, n=n, selector=selector)

    run = an_evaluation(tmp_path, factory)
    await run.run()
    found = run.evaluation(resamples=20)
    assert {row.selector: row.accuracy.value for row in found.rows} == {"first": 0.0, "centroid": pytest.approx(2 / 3)}
    steps = list(read_steps(tmp_path / TRACE))
    assert Counter(len(step.candidates) for step in steps) == {1: 3, 2: 3}  # "first" draws no more than it needs
    assert all(step.selection is not None and step.task in {"t0", "t1", "t2"} for step in steps)
    assert found.row("centroid").tokens == 40


async def test_unending_and_unreachable_agents(
    tmp_path: Path,
):
    """An agent that does not end is wrong; one that cannot be reached is an error."""

    def calc(expression: str) -> str:
        """Calculate."""
        return "again"

    def factory(*, n: int, selector: Selector, task: EvalTask) -> Any:
        reply = Reply(tool_calls=[("calc", {"expression": "1"})])
        failing = Reply(error=ConnectionError("no route"))
        too_long = Reply(error=ContextOverflowError("513 tokens, and 512 fit"))
        replies = {"t0": [failing] * 50, "t1": [reply] * 50, "t2": [reply] * 2 + [too_long] * 50}
        model = ScriptedChatModel(replies=replies[task.id])
        return create_centroid_agent(model, [calc], n=n, selector=selector, recursion_limit=8)

    run = an_evaluation(tmp_path, factory, count=3, selectors={"centroid": SELECTORS["centroid"]})
    await run.run()
    outcomes = {outcome.task: outcome for _, outcome in read_outcome_lines(tmp_path)}
    for task in ("t1", "t2"):
        assert (outcomes[task].right, outcomes[task].error) == (False, None)
    assert outcomes["t0"].right is None
    assert outcomes["t0"].error is not None
    assert outcomes["t0"].error.startswith("SamplingError: 0 of 2 calls succeeded")
    found = run.evaluation(resamples=20)
    assert (found.n_failed, found.row("centroid").accuracy.value) == (1, 0.0)


async def test_second_start(tmp_path: Path):
    """What is done is not repeated, and errors are tried again."""
    asked: list[str] = []
    broken = {"is it t1?"}

    def factory() -> Any:
        async def answer(prompt: str) -> dict[str, Any]:
            asked.append(prompt)
            if prompt in broken:
                raise ConnectionError("no route")
            return choice("yes")

        return answer

    first: list[Progress] = []
    await an_evaluation(tmp_path, factory, on_progress=first.append).run()
    assert first[-1] == Progress(done=3, total=3, errors=1)
    halfway = an_evaluation(tmp_path, factory).evaluation(resamples=20)
    assert (halfway.n_failed, halfway.row("avg@1").accuracy.value) == (2, pytest.approx(2 / 3))
    broken.clear()
    asked.clear()
    again = an_evaluation(tmp_path, factory)
    await again.run()
    assert asked == ["is it t1?"] * 2
    assert again.evaluation(resamples=20).row("avg@1").accuracy.value == 1.0


async def test_more_trials_and_other_selectors_build_on_what_is_there(tmp_path: Path):
    asked: list[str] = []
    await an_evaluation(tmp_path, answering("yes", "no", asked=asked)).run()
    more = an_evaluation(tmp_path, answering("no", "no", asked=asked), trials=2, selectors={"x": Selector()})
    await more.run()
    assert len(asked) == 12
    found = more.evaluation(resamples=20)
    assert (found.n_draws, found.row("x").accuracy.value) == (6, 0.5)


async def test_ungraded_step(tmp_path: Path):
    """A step that was sampled but not graded is graded from the trace."""
    await an_evaluation(tmp_path, answering("yes", "no")).run()
    lines = (tmp_path / OUTCOMES).read_bytes().splitlines(keepends=True)
    (tmp_path / OUTCOMES).write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed inside the last line
    asked: list[str] = []
    again = an_evaluation(tmp_path, answering(asked=asked))
    await again.run()
    assert not asked
    assert [one.right for one in again.graded()] == [{0: True, 1: False}] * 3
    assert len({outcome.run for _, outcome in read_outcome_lines(tmp_path)}) == 3


async def test_a_checker_that_raises_costs_no_new_calls(tmp_path: Path):
    """It is named as the culprit, also when it raises again on recorded answers, and a repaired one grades them."""

    def bad(*_: object) -> bool:
        raise KeyError("goal")

    asked: list[str] = []
    message = "all 3 runs ended in an error, the first with: the checker raised KeyError: 'goal'.*correct the checker"
    for factory in (answering("yes", "no", asked=asked), answering(asked=asked)):
        with pytest.raises(ConfigError, match=message):
            await an_evaluation(tmp_path, factory, check=bad).run()
    assert {outcome.error for _, outcome in read_outcome_lines(tmp_path)} == {"the checker raised KeyError: 'goal'"}
    again = an_evaluation(tmp_path, answering(asked=asked))
    await again.run()
    assert len(asked) == 6
    assert again.evaluation(resamples=20).row("oracle").accuracy.value == 1.0


async def test_a_checker_that_raises_once_is_one_error(tmp_path: Path):
    def picky(task: EvalTask, text: str, tool_calls: object) -> bool:
        return {"t0": True, "t2": True}[task.id]

    run = an_evaluation(tmp_path, answering("yes", "no"), check=picky)
    await run.run()
    assert run.evaluation(resamples=20).row("avg@1").accuracy.value == pytest.approx(2 / 3)


async def test_a_checker_may_be_asynchronous(tmp_path: Path):
    async def check(task: EvalTask, text: str, tool_calls: object) -> bool:
        await asyncio.sleep(0)
        return text == task.answer

    run = an_evaluation(tmp_path, answering("yes", "no"), check=check)
    await run.run()
    assert run.evaluation(resamples=20).row("avg@1").accuracy.value == 0.5


async def test_no_more_runs_at_once_than_asked(tmp_path: Path):
    busy, most = 0, 0

    def factory() -> Any:
        async def answer(prompt: str) -> dict[str, Any]:
            nonlocal busy, most
            busy += 1
            most = max(most, busy)
            await asyncio.sleep(0.001)
            busy -= 1
            return choice("yes")

        return answer

    await an_evaluation(tmp_path, factory, count=12, concurrency=3).run()
    assert most == 3 * 2


async def test_error_after_error_ends_the_evaluation(tmp_path: Path):
    def factory() -> Any:
        raise ConnectionError("no route")

    run = an_evaluation(tmp_path, factory, count=100)
    with pytest.raises(SamplingError, match="5 runs in a row ended in an error, the first with: .*no route"):
        await run.run()
    assert ERRORS_AT_FIRST <= len(list(read_outcome_lines(tmp_path))) < ERRORS_AT_FIRST + run.concurrency
    write_outcome_line(tmp_path, begun(a_task("t99"), check_exact, run="r", trial=0, right={0: True}))
    with pytest.raises(SamplingError, match="20 runs in a row ended in an error, the first with: .*no route"):
        await an_evaluation(tmp_path, factory, count=100).run()


@pytest.mark.parametrize("count", [1, 3])
async def test_an_evaluation_without_a_success_is_an_error(tmp_path: Path, count: int):
    """However few the tasks are, a table of failures is not printed as if it were a result."""

    def factory() -> Any:
        async def answer(prompt: str) -> dict[str, Any]:
            raise ConnectionError("no route")

        return answer

    with pytest.raises(SamplingError, match=f"all {count} runs ended in an error, the first with: .*no route"):
        await an_evaluation(tmp_path, factory, count=count).run()


async def test_other_settings_are_refused(tmp_path: Path):
    await an_evaluation(tmp_path, answering("yes", "no")).run()
    with pytest.raises(ConfigError, match="n: 2 there, 3 now"):
        await an_evaluation(tmp_path, answering("yes"), n=3).run()
    with pytest.raises(ConfigError, match="1 or more"):
        an_evaluation(tmp_path, answering("yes"), trials=0)
    assert json.loads((tmp_path / SETTINGS).read_text())["n"] == 2


async def test_damaged_settings(tmp_path: Path):
    await an_evaluation(tmp_path, answering("yes", "no")).run()
    (tmp_path / SETTINGS).write_text("")
    with pytest.raises(ConfigError, match="settings.json is damaged"):
        await an_evaluation(tmp_path, answering()).run()


async def test_files_of_runs_are_private(tmp_path: Path):
    """Answers, prompts and states can be read by their owner only."""

    def factory(*, n: int, selector: Selector) -> Any:
        return create_centroid_agent(ScriptedChatModel(replies=[Reply(content="yes")] * n), n=n, selector=selector)

    for out, made in ((tmp_path / "steps", answering("yes", "no")), (tmp_path / "runs", factory)):
        run = an_evaluation(out, made)
        await run.run()
        run.evaluation(resamples=10).save(out / "evaluation.json")
        modes = {path.name: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
        assert {SETTINGS, OUTCOMES, TRACE, "evaluation.json"} <= modes.keys()
        assert set(modes.values()) == {0o600}, modes


@pytest.mark.parametrize("n", [1, 2])
async def test_temperature_0_is_refused_as_in_the_graph(tmp_path: Path, n: int):
    """N equal answers are not paid for; one answer is fine."""
    tasks = read_tasks("plain", limit=1)[0]
    made = lambda: EmbeddedChatModel(temperature=0)  # noqa: E731
    run = an_evaluation(tmp_path, made, n=n, tasks=tasks, check=check_embedded)
    if n == 1:
        await run.run()
    else:
        with pytest.raises(ConfigError, match="temperature is 0"):
            await run.run()
        assert not list(read_outcome_lines(tmp_path))


@pytest.mark.parametrize("error", [TraceError("full", "t"), WriteError("full", "o"), UnsupportedLogprobs("none")])
async def test_errors_that_every_run_would_meet_end_it(tmp_path: Path, error: Exception):
    asked: list[str] = []

    def factory() -> Any:
        asked.append("")
        raise error

    with pytest.raises(type(error)):
        await an_evaluation(tmp_path, factory, count=20, concurrency=1).run()
    assert len(asked) == 1


async def test_the_random_selector_obeys_the_seed(tmp_path: Path):
    """Two equal evaluations of an agent choose the same at random, run by run; another seed chooses otherwise."""

    def chosen(out: Path) -> list[tuple[str | None, int]]:
        return sorted((s.task, s.selection.chosen) for s in read_steps(out / TRACE) if s.selection is not None)

    def factory(*, n: int, selector: Selector) -> Any:
        replies = [Reply(content=f"answer {i}") for i in range(n)]
        return create_centroid_agent(ScriptedChatModel(replies=replies), n=n, selector=selector)

    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = an_evaluation(
            tmp_path / name,
            factory,
            count=12,
            settings=EvalSettings(tasks="file", agent="mine", n=4, seed=seed),
            selectors={"random": Selector(scorer=RandomScorer())},
        )
        await run.run()
        found[name] = chosen(tmp_path / name)
    assert found["a"] == found["b"] != found["c"]
    assert len({choice for _, choice in found["a"]}) > 1


async def test_two_processes_do_not_share_a_directory(tmp_path: Path):
    inside, outside = asyncio.Event(), asyncio.Event()

    def factory() -> Any:
        async def answer(prompt: str) -> dict[str, Any]:
            inside.set()
            await outside.wait()
            return choice("yes")

        return answer

    running = asyncio.create_task(an_evaluation(tmp_path, factory).run())
    await inside.wait()
    with pytest.raises(ConfigError, match="another process is working on"):
        await an_evaluation(tmp_path, factory).run()
    outside.set()
    await running


async def test_seeds_are_recorded_and_give_the_same_answers_again(tmp_path: Path):
    def embedded(out: Path) -> EvalRun:
        settings = EvalSettings(tasks="solve", agent="embedded", n=2, seed=3, seed_calls=True)
        tasks = read_tasks("solve", limit=2, seed=3)[0]
        return an_evaluation(out, embedded_model, settings=settings, tasks=tasks, check=check_embedded)

    texts: list[list[str]] = []
    for name in ("a", "b"):
        run = embedded(tmp_path / name)
        await run.run()
        steps = sorted(read_steps(tmp_path / name / TRACE), key=lambda step: step.task or "")
        texts.append([candidate.content for step in steps for candidate in step.candidates])
        assert [step.info["seed"] for step in steps] == [seed_of(3, step.task, 0) for step in steps]
        tokens = steps[0].info["tokens"]["0"]
        assert len(tokens["lengths"]) == steps[0].candidates[0].signals.n_tokens  # type: ignore[union-attr]
        assert sum(tokens["lengths"]) == len(tokens["text"])
    assert texts[0] == texts[1]


async def test_the_embedded_agent_plays(tmp_path: Path):
    tasks = read_tasks("play", limit=1)[0]
    run = an_evaluation(tmp_path, embedded_agent, tasks=tasks, check=check_embedded, selectors={"first": Selector()})
    await run.run()
    [(_, outcome)] = read_outcome_lines(tmp_path)
    assert outcome.error is None
    assert isinstance(outcome.right, bool)
    assert outcome.usage["output_tokens"] > 0


def test_tokens_of_candidates_that_were_asked_for_in_vain_count():
    drawn = [Candidate(index=0, usage={"output_tokens": 3}), Candidate(index=1)]
    assert usage(Step(run="r", candidates=drawn, info={"spent": {"output_tokens": 4}})) == {"output_tokens": 7}


def test_seeds_differ_and_repeat():
    seeds = [seed_of(0, f"t{i}", j) for i in range(30) for j in range(30)]
    assert len(set(seeds)) == len(seeds)
    assert seed_of(0, "t1", 2) == seed_of(0, "t1", 2) < 2**31


def test_an_outcome_after_a_torn_line_is_whole(tmp_path: Path):
    write_outcome_line(tmp_path, OutcomeLine(run="a", task="t", trial=0, right={0: True}))
    with (tmp_path / OUTCOMES).open("ab") as file:
        file.write(b'{"run": "b", "ta')
    write_outcome_line(tmp_path, OutcomeLine(run="c", task="t", trial=1, right=False))
    assert [outcome.run for _, outcome in read_outcome_lines(tmp_path)] == ["a", "c"]


def test_a_killed_evaluation_goes_on_where_it_was(project: Path):
    """Killed without warning, the same command again asks nothing twice that had an outcome, and ends with all."""
    arguments = ["eval", "tasks.jsonl", "--agent", "mine:factory", "--n", "3", "--out", "run", "--concurrency", "2"]
    process = start(COMMAND, *arguments, output=project, cwd=project)
    outcomes = project / "run" / OUTCOMES
    settle(lambda: outcomes.exists() and len(outcomes.read_bytes().splitlines()) >= 5)
    assert process.is_alive()
    process.kill()
    before = {outcome.task for _, outcome in read_outcome_lines(project / "run")}
    assert 5 <= len(before) < 24
    process.join()
    again = run(COMMAND, *arguments, cwd=project, COLUMNS="120")
    printed = again.stdout + again.stderr
    assert again.returncode == 0, printed
    assert "24/24" in printed
    assert "24 tasks, 24 steps, 0 failed" in printed
    counts = Counter(outcome.task for _, outcome in read_outcome_lines(project / "run"))
    assert counts == dict.fromkeys((f"t{i}" for i in range(24)), 1)
    calls = Counter((project / "calls.txt").read_text().splitlines())
    assert {calls[f"question {name[1:]}"] for name in before} == {3}
    assert set(calls.values()) <= {3, 4, 5, 6}  # what was under way when it was killed is asked again
    assert sum(count > 3 for count in calls.values()) <= 2
    assert (project / "run" / "evaluation.json").exists()
    assert (project / "run" / "report.html").exists()


def test_the_command_evaluates_an_agent_and_a_trace(
    project: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            command("eval", *arguments)
        assert ended.value.code == 0
        return capsys.readouterr().out

    options = ["--limit", "3", "--n", "2", "--trials", "2", "--out", "agent", "--check", "mine:always"]
    assert "3 tasks, 6 runs of each selector, 0 failed calls or runs" in run(
        "tasks.jsonl", "--agent", "mine:agent", *options
    )
    rows = [{"run": step.run, "right": step.number == 0} for step in read_steps(project / "agent" / TRACE)]
    (project / "outcomes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    replay = ["agent/trace.jsonl", "--outcomes", "outcomes.jsonl", "--out", "replay", "--prices", "1,2"]
    replayed = run(*replay, "--baseline", "mean-entropy")
    assert "$ ec-agents eval agent/trace.jsonl" in (project / "replay" / "results.md").read_text()
    assert "- mean-" in replayed
    assert "oracle" in replayed
    assert load_evaluation(project / "replay" / "evaluation.json").row("centroid").accuracy.value == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks.jsonl"], "ConfigError: --base-url and --model, or --agent, are needed"),
        (
            ["nothing.jsonl", "--agent", "mine:factory"],
            "ConfigError: tasks must be one of solve, play, plain or a",
        ),
        (["solve", "--agent", "mine"], "ConfigError: --agent must be module:name; found 'mine'"),
        (["solve", "--agent", "mine:nobody"], "ConfigError: --agent 'mine:nobody' cannot be loaded"),
        (["solve", "--selector", "centriod"], "ConfigError: no scorer is called 'centriod'"),
        (["tasks.jsonl", "--agent", "mine:broken", "--prices", "1"], "ConfigError: --prices must be two numbers"),
        (["tasks.jsonl", "--agent", "mine:broken", "--prices", "-1,nan"], "ConfigError: --prices must be two numbers"),
        (["solve", "--limit", "2", "--tune", "centroid,shortest"], "ConfigError: --tune needs 5 tasks or more"),
        (
            ["tasks.jsonl", "--agent", "mine:broken", "--n", "1", "--limit", "1"],
            "SamplingError: all 1 runs ended in an",
        ),
        (["play", "--tune", "centroid,shortest"], "ConfigError: --tune needs one-step tasks"),
        (
            ["tasks.jsonl", "--agent", "mine:broken", "--n", "1"],
            "SamplingError: 5 runs in a row ended in an error, the first with: SamplingError: 0 of 1 calls",
        ),
    ],
)
def test_wrong_use_of_the_command_is_one_line(command: Callable[..., None], arguments: list[str], message: str):
    with pytest.raises(SystemExit) as ended:
        command("eval", *arguments, "--out", "run")
    assert str(ended.value.code).startswith(message)
    assert "\n" not in str(ended.value.code)


def test_lines_end_at_line_feeds(tmp_path: Path):
    """Separators that Python's splitlines knows and JSON does not are part of a text, in tasks and in outcomes."""
    text = "a\u2028b\u2029c\x85d\x0c"
    path = tmp_path / "tasks.jsonl"
    lines = [json.dumps({"id": name, "prompt": text.strip("\x0c")}, ensure_ascii=False) for name in (text[:-1], "b")]
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert [task.id for task in read_tasks(str(path))[0]] == [text[:-1], "b"]
    write_outcome_line(tmp_path, OutcomeLine(run=text, task=text, trial=0, right=True))
    assert [outcome.run for _, outcome in read_outcome_lines(tmp_path)] == [text]


def test_tasks_of_a_file(tmp_path: Path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "1 + 1?", "answer": 2, "topic": "sums"}\n\n{"id": "b", "prompt": "?"}\n')
    tasks, is_embedded = read_tasks(str(path))
    assert tasks == [
        EvalTask(id="1", prompt="1 + 1?", answer="2", info={"topic": "sums"}),
        EvalTask(id="b", prompt="?"),
    ]
    assert not is_embedded
    assert read_tasks(str(path), limit=1)[0] == tasks[:1]
    for text, message in (
        ('{"id": "a"}', "line 1: an object with a text 'prompt'"),
        ("nonsense", "line 1: an object with a text 'prompt'"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', "with different ids"),
        ("", "one or more tasks"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_tasks(str(path))


def test_the_embedded_families_are_tasks():
    for family in ("solve", "play", "plain"):
        tasks, is_embedded = read_tasks(family, limit=3, seed=1)
        originals = make_tasks(family, 3, seed=1)  # type: ignore[arg-type]
        assert is_embedded
        assert [task.prompt for task in tasks] == [task.prompt for task in originals]
        assert not check_embedded(tasks[0], "answer 0", [])
    plain = read_tasks("plain", limit=1)[0][0]
    assert check_embedded(plain, f"so answer {plain.answer}", [])


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [("1/2", r"so it is \boxed{0.5}", True), ("12", "The answer is 13", False), ("12", "we get $12$.", True)],
)
def test_mathematics_is_checked_by_value(answer: str, text: str, right: bool):  # noqa: FBT001
    assert check_math(EvalTask(id="a", prompt="?", answer=answer), text, []) is right


def test_exact_answers_and_unknown_checkers():
    assert check_exact(a_task(), "  YES ", [])
    assert not check_exact(a_task(), "yes, surely", [])
    with pytest.raises(ConfigError, match="has no 'answer'"):
        check_exact(EvalTask(id="a", prompt="?"), "yes", [])
    with pytest.raises(ConfigError, match="--check must be module:name; found 'vibes'"):
        checker("vibes")
    assert checker("math") is check_math


def test_the_command_needs_no_python_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server, a model and tasks are enough; the settings reach every request, and a wrong one sends nothing."""
    (tmp_path / "tasks.jsonl").write_text('{"id": "a", "prompt": "2 + 2?", "answer": "4"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_KEY", "k-123")
    replies = [Reply(content=f"so {n}", profile="!..") for n in (4, 4, 5)]
    with FaultServer(replies * 2) as server:
        base = ["eval", "tasks.jsonl", "--base-url", server.base_url, "--model", "m", "--n", "3", "--out", "run"]
        usual = ["--check", "number", "--temperature", "0.7", "--max-tokens", "99", "--api-key-env", "MY_KEY"]
        for wrong, message in (
            (["--extra-body", "[1]"], "--extra-body must be a JSON object"),
            (["--api-key-env", "NO_SUCH"], "NO_SUCH is not set"),
            (["--agent", "mine:factory"], "both name a model"),
        ):
            ended = CliRunner().invoke(app, [*base, *wrong])
            assert message in str(ended.exception)
        assert not server.requests
        extra = ["--system-prompt", "Be brief.", "--extra-body", '{"min_p": 0.1}']
        ended = CliRunner().invoke(app, [*base, *usual, *extra])
        assert ended.exit_code == 0, ended.output
        body = server.requests[0]
    assert (body["temperature"], body["min_p"], body["messages"][0]["content"]) == (0.7, 0.1, "Be brief.")
    table = load_evaluation(tmp_path / "run" / "evaluation.json")
    assert (table.answer, table.row("majority").accuracy.value) == ("last-number", 1.0)
