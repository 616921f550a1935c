"""Runs of an evaluation: every task and trial once, on disk as it ends, so that a killed one goes on where it was."""

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import msgspec
from langchain_core.exceptions import ContextOverflowError
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.errors import GraphRecursionError

from ec_agents.agents.step import describe_failure
from ec_agents.candidates import Candidate, CandidateSet, Step
from ec_agents.errors import ConfigError, SamplingError
from ec_agents.evaluation.comparison import evaluate, evaluate_runs
from ec_agents.evaluation.factories import (
    AgentRun,
    Factory,
    added,
    answer_of,
    asker,
    make,
    makes_agents,
    seed_of,
    token_text,
    usage_of,
)
from ec_agents.evaluation.outcomes import Graded, RunOutcome
from ec_agents.evaluation.store import (
    TRACE,
    EvalSettings,
    Outcome,
    UnderWay,
    Unit,
    check_settings,
    checkpoints,
    locked,
    read_outcome_lines,
    recorded_steps,
    steps_under_way,
    write_outcome,
)
from ec_agents.evaluation.table import ALWAYS, Evaluation
from ec_agents.evaluation.tasks import Checker, EvalTask
from ec_agents.sampling import sample
from ec_agents.selection import Selector
from ec_agents.trace import TraceWriter

ERRORS_IN_A_ROW = 20
"""So many infrastructure errors without a success between them end an evaluation."""


@dataclass(slots=True, kw_only=True)
class UnitRunner:
    """What all runs of an evaluation share."""

    settings: EvalSettings
    factory: Factory
    check: Checker
    selectors: Mapping[str, Selector]
    out: Path
    """The directory."""
    trace: TraceWriter
    saver: BaseCheckpointSaver[Any] | None
    """Where agents keep their state."""
    recorded: Mapping[str, Mapping[int, Step]]
    """What the trace has of agents' runs that have not ended: run → number → step."""

    async def outcome(self, unit: Unit, task: EvalTask) -> Outcome:
        """Draw or run, and grade; whatever an agent or a server raises is an infrastructure error.

        Raises:
            ConfigError: The task, the factory or the checker does not fit.
        """
        name, trial, arm = unit
        run = f"{name}/{trial}/{arm or 'all'}#{uuid4().hex[:8]}"
        start = Outcome(run=run, task=name, trial=trial, selector=arm, seed=seed_of(self.settings.seed, name, trial))
        under_way = UnderWay(self.out, unit)
        try:
            if arm is None:
                return await self._one_step(start, task, under_way)
            return await self._whole_run(start, task, under_way, arm)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - see above
            return msgspec.structs.replace(start, error=f"{type(error).__name__}: {error}")

    async def _one_step(self, start: Outcome, task: EvalTask, under_way: UnderWay) -> Outcome:
        """Draw the candidates that are not there yet, and grade all."""
        before = under_way.steps()
        began = time.perf_counter()
        run = next((step.run for step in before.values()), start.run)
        drawn, texts = await self._drawn(run, start.seed, task, under_way, before)
        step = Step(
            run=run,
            task=task.id,
            candidates=drawn.candidates,
            selection=next(iter(self.selectors.values()), Selector())(drawn.candidates),
            failures={i: describe_failure(failure) for i, failure in drawn.failures.items()},
            seconds=None if before else time.perf_counter() - began,
            info={"trial": start.trial, "seed": start.seed, "tokens": texts},
        )
        self.trace.write(step)
        return await graded(self.check, msgspec.structs.replace(start, run=run), task, step)

    async def _drawn(
        self, run: str, seed: int, task: EvalTask, under_way: UnderWay, before: Mapping[int, Step]
    ) -> tuple[CandidateSet, dict[str, Any]]:
        """All candidates, each on disk as it comes, and the texts of their tokens."""
        texts: dict[int, Any] = {index: step.info["tokens"] for index, step in before.items()}
        model = make(self.factory, n=self.settings.n, task=task, seed=seed)
        ask = asker(model, top_logprobs=self.settings.top_logprobs, seed_calls=self.settings.seed_calls)

        async def call(index: int) -> object:
            if index in before:
                return before[index].candidates[0]
            response = await ask(task.prompt, seed_of(seed, index))
            texts[index] = token_text(response)
            return response

        with under_way.writer() as drawing:

            def keep(index: int, result: Candidate | BaseException) -> None:
                if isinstance(result, Candidate) and index not in before:
                    drawing.write(Step(run=run, number=index, candidates=[result], info={"tokens": texts[index]}))

            drawn = await sample(call, n=self.settings.n, min_candidates=1, on_result=keep)
        return drawn, {str(index): texts[index] for index in drawn.messages if texts[index] is not None}

    async def _whole_run(self, start: Outcome, task: EvalTask, under_way: UnderWay, arm: str) -> Outcome:
        """Run an agent to its end, from where it was if it can go on."""
        n = 1 if arm == "first" else self.settings.n
        given = {"n": n, "selector": self.selectors[arm], "task": task, "seed": start.seed, "trace": self.trace}
        start, run = await self._begun(start, task, make(self.factory, **given), under_way)
        records_itself = "trace" in inspect.signature(self.factory).parameters
        usages = [usage(step) for step in run.taken]
        if run.taken and not records_itself:
            self.trace.write(run.taken[-1])  # it may have been cut off before; what is recorded twice counts once
        try:
            async for step in run.steps():
                usages.append(usage(step))
                if not records_itself:
                    self.trace.write(step)
        except (GraphRecursionError, ContextOverflowError):  # the agent's own failure
            right = False
        except SamplingError as error:
            if not all(isinstance(failure, ContextOverflowError) for failure in error.failures.values()):
                raise
            right = False
        else:
            right = await is_right(self.check, task, *answer_of(run.state))
        return msgspec.structs.replace(start, right=right, usage=added(*usages) or usage_of(run.state))

    async def _begun(self, start: Outcome, task: EvalTask, agent: Any, under_way: UnderWay) -> tuple[Outcome, AgentRun]:
        """The run that was under way, if it can go on; otherwise a new one, which counts what it repeats."""
        before = under_way.steps().get(0)
        if before is not None:
            counts = {name: before.info[name] for name in ("restarts", "repeated")}
            run = AgentRun(agent, task, before.run, self.saver)
            if await run.find():
                return msgspec.structs.replace(start, run=before.run, **counts), run
            lost = self.recorded.get(before.run, {}).values()
            counts["restarts"] += 1
            counts["repeated"] += sum(len(step.candidates) + len(step.failures) for step in lost)
            start = msgspec.structs.replace(start, **counts)
        with under_way.writer() as noted:
            noted.write(Step(run=start.run, info={"restarts": start.restarts, "repeated": start.repeated}))
        return start, AgentRun(agent, task, start.run, self.saver)


async def graded(check: Checker, start: Outcome, task: EvalTask, step: Step) -> Outcome:
    """The outcome of every candidate of a step."""
    right = {c.index: await is_right(check, task, c.content, c.tool_calls) for c in step.candidates}
    return msgspec.structs.replace(start, right=right, usage=usage(step))


async def is_right(check: Checker, task: EvalTask, text: str, calls: Any) -> bool:
    """What the checker says, asynchronous or not."""
    verdict = check(task, text, calls)
    return bool(await verdict if inspect.isawaitable(verdict) else verdict)


def usage(step: Step) -> dict[str, int]:
    """Tokens of the candidates together, with those that were asked for in vain before."""
    return added(*(candidate.usage or {} for candidate in step.candidates), step.info.get("spent", {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an evaluation is."""

    done: int
    total: int
    errors: int
    """Of those done, infrastructure errors; running the same command again tries these again."""


@dataclass(slots=True, kw_only=True)
class EvalRun:
    """An evaluation in a directory: ``trace.jsonl``, ``outcomes.jsonl`` and ``settings.json``.

    A run is done when its outcome is written. What is done is not done again. Of a one-step task each candidate is kept
    as it comes, and what was drawn but not graded when the program was killed is graded from the trace. An agent that
    is a compiled graph goes on from its last superstep; another one begins again, which its outcome says.
    """

    settings: EvalSettings
    tasks: Sequence[EvalTask]
    factory: Factory
    check: Checker
    selectors: Mapping[str, Selector]
    """Of one-step tasks all are replayed on the same candidates; of agents each has runs of its own."""
    out: Path
    """The directory."""
    trials: int = 1
    """Runs of each task."""
    concurrency: int = 4
    """Runs at once; each draws its N candidates at once."""
    on_progress: Callable[[Progress], None] = lambda _: None
    _done: dict[Unit, Outcome] = field(default_factory=dict[Unit, Outcome])
    _errors_in_a_row: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.trials, self.concurrency, self.settings.n) < 1:
            raise ConfigError("n, trials and concurrency must be 1 or more")

    @property
    def is_multi_step(self) -> bool:
        """Whether whole runs of an agent are graded."""
        return makes_agents(self.factory)

    @property
    def units(self) -> list[Unit]:
        """All there is to do, in order."""
        arms = list(self.selectors) if self.is_multi_step else [None]
        return [(task.id, trial, arm) for trial in range(self.trials) for task in self.tasks for arm in arms]

    async def run(self) -> None:
        """Do what is not done yet.

        Raises:
            ConfigError: The directory belongs to an evaluation with other settings, or another process works on it.
            SamplingError: One infrastructure error came after another; what was done is kept.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out), TraceWriter(self.out / TRACE) as trace:
            check_settings(self.out, asdict(self.settings))
            self._done = {unit: outcome for unit, outcome in read_outcome_lines(self.out) if outcome.error is None}
            if not self.is_multi_step:
                await self._grade_what_was_drawn()
            missing = [unit for unit in self.units if unit not in self._done]
            self._report()
            async with checkpoints(self.out) if self.is_multi_step and missing else nullcontext() as saver:
                await self._work_on(iter(missing), self._runner(missing, trace, saver))

    def graded(self) -> Iterator[Graded]:
        """The graded steps of one-step tasks; one in which everything failed has no candidate that is right."""
        outcomes = {o.run: o for _, o in self._wanted() if isinstance(o.right, dict)}
        if outcomes:
            for step in recorded_steps(self.out / TRACE):
                if step.run in outcomes:
                    yield Graded(step=step, right=cast("dict[int, bool]", outcomes[step.run].right))
        for _, outcome in self._wanted():
            if outcome.right is None:
                failures = dict.fromkeys(range(self.settings.n), outcome.error or "")
                yield Graded(step=Step(run=outcome.run, task=outcome.task, failures=failures), right={})

    def evaluation(self, **options: Any) -> Evaluation:
        """The table; ``options`` are those of ``evaluate`` or ``evaluate_runs``."""
        if self.is_multi_step:
            order = list(self.selectors)
            wanted = sorted(self._wanted(), key=lambda found: order.index(found[0][2] or ""))
            runs = [_run_outcome(outcome) for _, outcome in wanted]
            return evaluate_runs(runs, seed=self.settings.seed, **options)
        selectors = {name: selector for name, selector in self.selectors.items() if name not in ALWAYS}
        return evaluate(self.graded(), selectors, seed=self.settings.seed, **options)

    def _wanted(self) -> list[tuple[Unit, Outcome]]:
        latest, units = dict(read_outcome_lines(self.out)), set(self.units)
        return [(unit, outcome) for unit, outcome in latest.items() if unit in units]

    def _runner(self, units: Sequence[Unit], trace: TraceWriter, saver: BaseCheckpointSaver[Any] | None) -> UnitRunner:
        return UnitRunner(
            settings=self.settings,
            factory=self.factory,
            check=self.check,
            selectors=self.selectors,
            out=self.out,
            trace=trace,
            saver=saver,
            recorded=steps_under_way(self.out, units) if self.is_multi_step else {},
        )

    async def _work_on(self, units: Iterator[Unit], runner: UnitRunner) -> None:
        tasks = {task.id: task for task in self.tasks}
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.concurrency):
                    group.create_task(self._work(units, tasks, runner))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _work(self, units: Iterator[Unit], tasks: Mapping[str, EvalTask], runner: UnitRunner) -> None:
        for unit in units:
            began = time.perf_counter()
            outcome = await runner.outcome(unit, tasks[unit[0]])
            self._finish(unit, msgspec.structs.replace(outcome, seconds=time.perf_counter() - began))
            if runner.saver is not None and outcome.error is None:
                await runner.saver.adelete_thread(outcome.run)

    async def _grade_what_was_drawn(self) -> None:
        """Grade the steps that were recorded but have no outcome, of one-step tasks."""
        tasks = {task.id: task for task in self.tasks}
        finished = {outcome.run for _, outcome in read_outcome_lines(self.out) if outcome.error is None}
        for step in recorded_steps(self.out / TRACE):
            unit = (step.task or "", int(step.info.get("trial", 0)), None)
            if step.run not in finished and unit not in self._done and step.task in tasks:
                start = Outcome(run=step.run, task=step.task, trial=unit[1], seed=step.info.get("seed", 0))
                self._finish(unit, await graded(self.check, start, tasks[step.task], step))

    def _finish(self, unit: Unit, outcome: Outcome) -> None:
        write_outcome(self.out, outcome)
        self._done[unit] = outcome
        self._report()
        if outcome.error is None:
            UnderWay(self.out, unit).forget()
            self._errors_in_a_row.clear()
            return
        self._errors_in_a_row.append(outcome.error)
        if len(self._errors_in_a_row) >= ERRORS_IN_A_ROW:
            raise SamplingError(
                f"{ERRORS_IN_A_ROW} runs in a row ended in an infrastructure error, the first with: "
                f"{self._errors_in_a_row[0]}; what was done is kept in {self.out}: run the same command again",
                {},
            )

    def _report(self) -> None:
        units = set(self.units)
        done = [outcome for unit, outcome in self._done.items() if unit in units]
        errors = sum(outcome.error is not None for outcome in done)
        self.on_progress(Progress(done=len(done), total=len(units), errors=errors))


def _run_outcome(outcome: Outcome) -> RunOutcome:
    right = outcome.right if isinstance(outcome.right, bool) else None
    return RunOutcome(
        task=outcome.task,
        selector=outcome.selector or "",
        trial=outcome.trial,
        right=right,
        usage=outcome.usage,
        error=outcome.error,
        restarts=outcome.restarts,
        repeated=outcome.repeated,
    )
