"""One directory, other tasks, another checker or model: refused with what differs, or graded again without a call."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.errors import ConfigError
from ec_agents.evaluation.checkers import check_exact, check_number
from ec_agents.evaluation.run import EvalRun
from ec_agents.evaluation.settings import EvalSettings
from ec_agents.evaluation.store import TRACE
from ec_agents.evaluation.tasks import EvalTask, ToolCalls
from ec_agents.scoring.answers import last_number
from ec_agents.selection import Selector, as_selector
from ec_agents.testing import Reply, ScriptedChatModel, profile_logprobs
from ec_agents.trace import read_steps

TASKS = [EvalTask(id=f"t{i}", prompt=f"{i}?", answer="4") for i in range(3)]
TEXTS = ("two and two: 4", "so 4", "I say 5")


def factory() -> Any:
    seen = iter(TEXTS)

    async def answer(prompt: str) -> dict[str, Any]:
        return {"message": {"content": next(seen)}, "finish_reason": "stop", "logprobs": profile_logprobs("!..")}

    return answer


def silent() -> Any:
    async def answer(prompt: str) -> dict[str, Any]:
        raise AssertionError("nothing is asked")

    return answer


def run_in(out: Path, make: Callable[..., Any] = factory, tasks: Sequence[EvalTask] = TASKS, **changes: Any) -> EvalRun:
    given: dict[str, Any] = {"check": check_number, **changes}
    return EvalRun(
        settings=EvalSettings(tasks="file", agent="mine", n=3),
        tasks=tasks,
        factory=make,
        out=out,
        selectors={"majority": as_selector("majority")},
        **given,
    )


def right(run: EvalRun) -> float:
    return run.evaluation(resamples=10).row("avg@1").accuracy.value


async def test_another_checker(tmp_path: Path):
    """It is refused, and grades again without a call if it is wanted."""
    await run_in(tmp_path).run()
    other = run_in(tmp_path, silent, check=check_exact)
    with pytest.raises(ConfigError, match=r"the checker: number there, exact now\. Grade .* --regrade"):
        await other.run()
    other = run_in(tmp_path, silent, check=check_exact, regrade=True)
    await other.run()
    assert right(other) == 0
    await run_in(tmp_path, silent, check=check_exact).run()
    with pytest.raises(ConfigError, match="exact there, number now"):
        await run_in(tmp_path, silent).run()


async def test_an_edited_checker_is_another(tmp_path: Path):
    def check(task: EvalTask, text: str, calls: ToolCalls) -> bool:  # pyright: ignore[reportRedeclaration]
        return "4" in text

    await run_in(tmp_path, check=check).run()

    def check(task: EvalTask, text: str, calls: ToolCalls) -> bool:
        return "5" in text

    with pytest.raises(ConfigError, match="the checker: .*check"):
        await run_in(tmp_path, silent, check=check).run()


async def test_edited_tasks(tmp_path: Path):
    await run_in(tmp_path).run()
    edited = [EvalTask(id="t0", prompt="0?", answer="5"), *TASKS[1:]]
    with pytest.raises(ConfigError, match="the answer or another field of task t0"):
        await run_in(tmp_path, silent, edited).run()
    again = run_in(tmp_path, silent, edited, regrade=True)
    await again.run()
    assert right(again) == pytest.approx((1 / 3 + 2 / 3 + 2 / 3) / 3)
    prompted = [EvalTask(id="t0", prompt="what?", answer="5"), *TASKS[1:]]
    with pytest.raises(ConfigError, match="holds answers to other prompts of task t0"):
        await run_in(tmp_path, silent, prompted, regrade=True).run()


async def test_more_tasks_are_no_difference(tmp_path: Path):
    await run_in(tmp_path, tasks=TASKS[:2]).run()
    await run_in(tmp_path).run()
    await run_in(tmp_path, silent, TASKS[:1]).run()


@pytest.mark.parametrize("changed", [{"temperature": 0.5}, {"model_name": "other"}])
async def test_another_model_is_refused(tmp_path: Path, changed: dict[str, Any]):
    def made(**fields: Any) -> Callable[[], Any]:
        class Described(ScriptedChatModel):
            model_name: str = "m"
            temperature: float = 1.0

        replies = [Reply(content="4", profile="!..")] * 9
        return lambda: Described(replies=replies, **fields)

    await run_in(tmp_path, made()).run()
    await run_in(tmp_path, made()).run()
    with pytest.raises(ConfigError, match="model: .* there"):
        await run_in(tmp_path, made(**changed)).run()


async def test_whole_runs_are_graded_again(tmp_path: Path):
    """The answer of an agent is the last choice in its trace."""

    def agent(*, n: int, selector: Selector) -> Any:
        replies = [Reply(content=text, profile="!..") for text in TEXTS[:n]]
        return create_centroid_agent(ScriptedChatModel(replies=replies), n=n, selector=selector)

    await run_in(tmp_path, agent).run()
    again = run_in(tmp_path, agent, check=check_exact, regrade=True)
    await again.run()
    assert again.evaluation(resamples=10).row("majority").accuracy.value == 0
    assert len(list(read_steps(tmp_path / TRACE))) == 3


async def test_votes_compare_answers_and_the_trace_says_so(tmp_path: Path):
    run = run_in(tmp_path, answer=last_number)
    await run.run()
    step = next(read_steps(tmp_path / TRACE))
    assert step.info["answer"] == {"by": "last-number", "found": {"0": "4", "1": "4", "2": "5"}}
    table = run.evaluation(resamples=10)
    assert table.answer == "last-number"
    assert table.row("majority").accuracy.value == 1
    assert not table.notes
    assert "--answer" in run_in(tmp_path).evaluation(resamples=10).notes[0]
