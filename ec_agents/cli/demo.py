"""``ec-agents demo``: agents at work step by step, then the accuracy of each selection strategy."""

import asyncio
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal, Self, cast

import numpy as np
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langgraph.errors import GraphRecursionError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.state import unpack_candidates
from ec_agents.candidates import Candidate, TokenSignals
from ec_agents.cli.terminal import printable
from ec_agents.embedded.tasks import Task, find_solution, make_tasks, replay
from ec_agents.errors import SamplingError
from ec_agents.sampling import sample
from ec_agents.scoring import CentroidScorer, FirstScorer, Scores
from ec_agents.selection import Selector

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32
"""Characters of the bar that shows a candidate's uncertainty."""
RECURSION_LIMIT = 40

Strategy = Literal["first", "centroid", "centroid-short", "oracle"]
STRATEGIES: Mapping[Strategy, str] = {
    "first": "first candidate",
    "centroid": "lowest centroid, paper (1, 80, 2)",
    "centroid-short": "lowest centroid, short (5, 50, 3)",
    "oracle": "oracle",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The outcomes of each strategy on the tasks of a family."""

    family: str
    right: Mapping[Strategy, list[bool]] = field(
        default_factory=lambda: {strategy: list[bool]() for strategy in STRATEGIES}
    )
    failures: list[SamplingError] = field(default_factory=list[SamplingError])
    """Errors of the runs in which too few calls succeeded; these count as not right."""

    def check(self, n_runs: int) -> Self:
        """Return these results if anything was measured.

        Raises:
            SamplingError: Every run failed.
        """
        if self.failures and len(self.failures) == n_runs:
            raise self.failures[0]
        return self


class PlayOracle:
    """Scores an action by knowledge of the task: whether the goal can still be reached after it."""

    name = "oracle"
    best: Literal["lowest", "highest"] = "highest"

    def __init__(self, task: Task) -> None:
        self.task = task
        self.expressions: list[str] = []
        """Expressions that the run has calculated so far."""

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """1 for an action that keeps the goal in reach, otherwise 0; ``(N,)``."""
        return np.array([self._is_good(candidate) for candidate in candidates], dtype=np.float64)

    def _is_good(self, candidate: Candidate) -> bool:
        if not candidate.tool_calls:
            return self.task.check(candidate.content, self.expressions)
        tried = [*self.expressions, *(str(call["args"].get("expression")) for call in candidate.tool_calls)]
        left = replay(self.task.numbers, tried)
        return len(left) < len(replay(self.task.numbers, self.expressions)) and _reachable(left, self.task.goal)


def picture(signals: TokenSignals | None, width: int = WIDTH) -> str:
    """The highest token entropy in each of ``width`` equal parts of a response, as bars; blank where unknown."""
    if signals is None or not signals.n_tokens:
        return ""
    parts = np.array_split(signals.entropies, min(width, signals.n_tokens))
    peaks = [float(np.nanmax(part)) if not np.isnan(part).all() else math.nan for part in parts]
    top = math.log(max(signals.n_alternatives, 2)) / 2
    return "".join(" " if math.isnan(peak) else BARS[min(int(peak / top * 8), 7)] for peak in peaks)


def wilson(right: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson interval of a share, both ends in 0..1.

    Source:
        E. B. Wilson, JASA 22 (1927) 209-212.
    """
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / total / 4) / (1 + spread)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p-value of ``better`` against ``worse`` under even odds."""
    total = better + worse
    tail = sum(math.comb(total, i) for i in range(min(better, worse) + 1)) / 2**total
    return min(1.0, 2 * tail)


async def show_task(model: BaseChatModel, task: Task, console: Console, *, n: int) -> None:
    """Let an agent solve one ``play`` task and print every step."""
    console.rule(Text(task.prompt))
    selector = Selector()
    agent = create_centroid_agent(model, [task.calc_tool()], n=n, selector=selector, recursion_limit=RECURSION_LIMIT)
    messages: list[AnyMessage] = [HumanMessage(task.prompt)]
    step = 0
    candidates: Sequence[Candidate] = []
    try:
        async for update in agent.astream({"messages": messages}, stream_mode="updates"):
            node, change = next(iter(cast("dict[str, dict[str, Any]]", update).items()))
            if node == "sample":
                step += 1
                candidates = unpack_candidates(change["ec_candidates"]).candidates
            elif node == "score":
                console.print(_step_table(step, candidates, change["ec_decision"]))
            for message in change.get("messages", []):
                messages.append(message)
                if isinstance(message, ToolMessage):
                    console.print(Text(printable(f"  tool: {message.text}")))
    except GraphRecursionError:
        console.print(Text(f"  given up after {step} steps"))
    except SamplingError as error:
        if step == 0:
            raise  # nothing works at all
        console.print(Text(printable(f"  failed after {step} steps: {error}"), "red"))
        return
    final = messages[-1].text
    right = task.check(final, _expressions(messages))
    console.print(
        Text(printable(f"  final answer: {final}  "), end=""), Text("right", "green") if right else Text("wrong", "red")
    )


async def measure(model: BaseChatModel, *, count: int, n: int, seed: int, on_done: Callable[[], None]) -> list[Results]:
    """Measure each strategy on ``count`` held-out tasks of each family; ``on_done`` is called after each task."""
    return [
        await _measure_play(model, make_tasks("play", count, seed=seed), n, on_done),
        await _measure_one_step(model, make_tasks("solve", count, seed=seed), n, on_done),
        await _measure_one_step(model, make_tasks("plain", count, seed=seed), n, on_done),
    ]


async def run(model: BaseChatModel, console: Console, *, shown: int, count: int, n: int, seed: int) -> None:
    """Show ``shown`` tasks step by step, then a summary over ``count`` tasks of each family."""
    for task in make_tasks("play", shown, seed=seed + 1):
        await show_task(model, task, console, n=n)
    if count == 0:
        return
    console.rule(Text(f"Summary: {count} other tasks of each family, {n} candidates per step"))
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("running", total=3 * count)
        results = await measure(model, count=count, n=n, seed=seed, on_done=lambda: progress.advance(bar))
    console.print(_summary_table(results))
    for result in results:
        console.print(Text(verdict(result)))
        if result.failures:
            failed = f"{len(result.failures)} runs failed and count as not right, the first with: {result.failures[0]}"
            console.print(Text(printable(f"{result.family}: {failed}"), "red"))


def verdict(result: Results) -> str:
    """Say in one sentence whether the lowest centroid beat the first candidate on these tasks."""
    pairs = list(zip(result.right["centroid"], result.right["first"], strict=True))
    better = sum(ours and not first for ours, first in pairs)
    worse = sum(first and not ours for ours, first in pairs)
    p = sign_test(better, worse)
    if p < 0.05:
        said = "the lowest centroid helps here" if better > worse else "the lowest centroid hurts here"
    else:
        said = "these tasks do not show that the lowest centroid helps"
    counts = f"right where the first is wrong: {better}, the reverse: {worse}; sign test p = {p:.2g}"
    return f"{result.family}: {said} ({counts})"


async def _measure_play(model: BaseChatModel, tasks: Sequence[Task], n: int, on_done: Callable[[], None]) -> Results:
    results = Results(family="play")

    async def one(task: Task) -> dict[Strategy, bool]:
        right = await asyncio.gather(*(_play(model, task, strategy, n, results.failures) for strategy in STRATEGIES))
        on_done()
        return dict(zip(STRATEGIES, right, strict=True))

    for outcome in await asyncio.gather(*map(one, tasks)):
        for strategy, right in outcome.items():
            results.right[strategy].append(right)
    return results.check(len(tasks) * len(STRATEGIES))


async def _play(model: BaseChatModel, task: Task, strategy: Strategy, n: int, failures: list[SamplingError]) -> bool:
    """Run the task under one strategy, and return whether it was solved; a failure is added to ``failures``."""
    oracle = PlayOracle(task)
    calc = task.calc_tool()

    def counted(expression: str) -> str:
        oracle.expressions.append(expression)
        return calc(expression)

    counted.__name__, counted.__doc__ = calc.__name__, calc.__doc__
    scorer = {**_scorers(), "oracle": oracle}[strategy]
    width = 1 if strategy == "first" else n
    agent = create_centroid_agent(
        model, [counted], n=width, selector=Selector(scorer=scorer), recursion_limit=RECURSION_LIMIT
    )
    try:
        state = await agent.ainvoke({"messages": [HumanMessage(task.prompt)]})
    except GraphRecursionError:
        return False
    except SamplingError as error:
        failures.append(error)
        return False
    return task.check(state["messages"][-1].text, oracle.expressions)


async def _measure_one_step(
    model: BaseChatModel, tasks: Sequence[Task], n: int, on_done: Callable[[], None]
) -> Results:
    results = Results(family=tasks[0].family if tasks else "")
    asked = model.bind(logprobs=True, top_logprobs=20)

    async def one(task: Task) -> tuple[Task, Sequence[Candidate]]:
        try:
            return task, (await sample(lambda _: asked.ainvoke(task.prompt), n=n)).candidates
        except SamplingError as error:
            results.failures.append(error)
            return task, ()
        finally:
            on_done()

    for task, candidates in await asyncio.gather(*map(one, tasks)):
        right = {candidate.index: task.check(candidate.content) for candidate in candidates}
        for strategy, scorer in _scorers().items():
            chosen = Selector(scorer=scorer)(candidates).chosen if candidates else None
            results.right[strategy].append(chosen is not None and right[chosen])
        results.right["oracle"].append(any(right.values()))
    return results.check(len(tasks))


def _scorers() -> dict[Strategy, Any]:
    return {"first": FirstScorer(), "centroid": CentroidScorer("paper"), "centroid-short": CentroidScorer("short")}


def _reachable(left: Sequence[int], goal: int) -> bool:
    return find_solution(left, goal, random.Random(0)) is not None


def _expressions(messages: Sequence[AnyMessage]) -> list[str]:
    calls = [call for message in messages if isinstance(message, AIMessage) for call in message.tool_calls]
    return [str(call["args"].get("expression")) for call in calls]


def _step_table(step: int, candidates: Sequence[Candidate], decision: Mapping[str, Any]) -> Table:
    """The candidates of one step, best first."""
    table = Table(title=f"step {step}", title_justify="left", box=None, pad_edge=True)
    for column in ("", "#", "centroid", "tokens", "uncertainty, start → end", "action"):
        table.add_column(column, no_wrap=column != "action")
    by_index = {candidate.index: candidate for candidate in candidates}
    for index in decision["order"]:
        candidate, chosen = by_index[index], index == decision["chosen"]
        score = decision["scores"][index]
        flaws = " ".join(f"[{name}]" for name in decision["flaws"][index])
        table.add_row(
            "→" if chosen else "",
            str(index),
            "-" if score is None else f"{score:.3f}",
            "-" if candidate.signals is None else str(candidate.signals.n_tokens),
            picture(candidate.signals),
            Text(printable(f"{_action(candidate)} {flaws}").strip()),
            style="bold green" if chosen else "",
        )
    return table


def _action(candidate: Candidate) -> str:
    calls = [f"{call['name']}({', '.join(map(str, call['args'].values()))})" for call in candidate.tool_calls]
    return " ".join(calls) or candidate.content


def _summary_table(results: Sequence[Results]) -> Table:
    table = Table(title="right answers, with 95 % intervals (Wilson)", title_justify="left")
    table.add_column("family")
    table.add_column("strategy")
    table.add_column("right", justify="right")
    table.add_column("share", justify="right")
    table.add_column("95 %", justify="right")
    for result in results:
        for strategy, outcomes in result.right.items():
            low, high = wilson(sum(outcomes), len(outcomes))
            table.add_row(
                result.family,
                STRATEGIES[strategy],
                f"{sum(outcomes)}/{len(outcomes)}",
                f"{sum(outcomes) / len(outcomes):.0%}",
                f"{low:.0%} - {high:.0%}",
            )
        table.add_section()
    return table
