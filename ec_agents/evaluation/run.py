"""Run an evaluation: every task and trial once, saved as it ends, so that an interrupted evaluation can be resumed."""

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import msgspec
import numpy as np
from langchain_core.exceptions import ContextOverflowError
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.errors import GraphRecursionError

from ec_agents.agents.step import describe_failure
from ec_agents.candidates import Candidate, CandidateSet, Step, add_usage
from ec_agents.errors import ConfigError, SamplingError, TraceError, UnsupportedLogprobs, WriteError
from ec_agents.evaluation.checkers import Checker, name_of
from ec_agents.evaluation.comparison import evaluate, evaluate_runs, voting
from ec_agents.evaluation.factories import (
    AgentRun,
    Factory,
    answer_of,
    asker,
    described,
    make,
    makes_agents,
    seed_of,
    token_text,
    usage_of,
)
from ec_agents.evaluation.grading import (
    CHECKER_RAISED,
    begun,
    graded,
    graded_run,
    graded_step,
    is_right,
    refuse_other_grading,
    refuse_other_prompts,
    usage,
)
from ec_agents.evaluation.outcomes import Graded, RunOutcome
from ec_agents.evaluation.settings import ALWAYS, CONCURRENCY, EvalSettings
from ec_agents.evaluation.store import (
    TRACE,
    OutcomeLine,
    UnderWay,
    Unit,
    check_settings,
    checkpoints,
    locked,
    read_outcome_lines,
    recorded_steps,
    recorded_trajectories,
    steps_under_way,
    write_outcome_line,
)
from ec_agents.evaluation.table import Evaluation
from ec_agents.evaluation.tasks import EvalTask
from ec_agents.files import make_folder
from ec_agents.sampling import sample
from ec_agents.scoring import RandomScorer, Scores, action_key
from ec_agents.scoring.answers import ANSWERS, Extract, answer_key
from ec_agents.selection import Selector
from ec_agents.trace import TraceWriter

ERRORS_IN_A_ROW = 20
"""Consecutive errors that end an evaluation."""
ERRORS_AT_FIRST = 5
"""Consecutive errors that end an evaluation of which no run has succeeded yet."""

_FATAL = (ConfigError, TraceError, UnsupportedLogprobs, WriteError)
"""Errors that every other run would meet too."""


@dataclass(slots=True, kw_only=True)
class UnitRunner:
    """Does the runs of an evaluation, one at a time."""

    settings: EvalSettings
    factory: Factory
    check: Checker
    selectors: Mapping[str, Selector]
    out: Path
    """The directory."""
    trace: TraceWriter
    saver: BaseCheckpointSaver[Any] | None
    """Store of the agents' states."""
    recorded: Mapping[str, Mapping[int, Step]]
    """Recorded steps of the agents' unfinished runs: run → number → step."""
    answer: Extract | None
    """Finds the answers that votes compare; None compares whole texts."""

    async def outcome(self, unit: Unit, task: EvalTask) -> OutcomeLine:
        """Sample or run, and grade; an exception of the agent, the server or the checker becomes ``error``.

        Raises:
            ConfigError: The task, the factory or the checker does not fit.
            TraceError: The trace cannot be written.
            UnsupportedLogprobs: The model cannot return log-probabilities.
            WriteError: Another file cannot be written.
        """
        name, trial, selector = unit
        run = f"{name}/{trial}/{selector or 'all'}#{uuid4().hex[:8]}"
        seed = seed_of(self.settings.seed, name, trial)
        start = begun(task, self.check, run=run, trial=trial, selector=selector, seed=seed)
        under_way = UnderWay(self.out, unit)
        try:
            if selector is None:
                return await self._one_step(start, task, under_way)
            return await self._whole_run(start, task, under_way, selector)
        except _FATAL:
            raise
        except Exception as error:  # noqa: BLE001 - see above
            return msgspec.structs.replace(start, error=f"{type(error).__name__}: {error}")

    async def _one_step(self, start: OutcomeLine, task: EvalTask, under_way: UnderWay) -> OutcomeLine:
        """Sample the candidates that are still missing, and grade all of them."""
        before = {i: s for i, s in under_way.steps().items() if s.info.get("prompt") in {None, start.prompt}}
        began = time.perf_counter()
        run = next((step.run for step in before.values()), start.run)
        drawn, texts = await self._sampled(msgspec.structs.replace(start, run=run), task, under_way, before)
        step = Step(
            run=run,
            task=task.id,
            candidates=drawn.candidates,
            selection=next(iter(self.selectors.values()), Selector())(drawn.candidates),
            failures={i: describe_failure(failure) for i, failure in drawn.failures.items()},
            seconds=None if before else time.perf_counter() - began,
            info={
                "trial": start.trial,
                "seed": start.seed,
                "prompt": start.prompt,
                "tokens": texts,
                **self._answers(drawn.candidates),
            },
        )
        self.trace.write(step)
        return await graded(self.check, msgspec.structs.replace(start, run=run), task, step)

    async def _sampled(
        self, start: OutcomeLine, task: EvalTask, under_way: UnderWay, before: Mapping[int, Step]
    ) -> tuple[CandidateSet, dict[str, Any]]:
        """All candidates, each saved as it arrives, and the texts of their tokens."""
        texts: dict[int, Any] = {index: step.info["tokens"] for index, step in before.items()}
        settings, n = self.settings, self.settings.n
        ask = asker(
            make(self.factory, n=n, task=task, seed=start.seed),
            n=n,
            top_logprobs=settings.top_logprobs,
            seed_calls=settings.seed_calls,
            system_prompt=settings.system_prompt,
        )

        async def call(index: int) -> object:
            if index in before:
                return before[index].candidates[0]
            response = await ask(task.prompt, seed_of(start.seed, index))
            texts[index] = token_text(response)
            return response

        with under_way.writer() as saved:

            def save(index: int, result: Candidate | BaseException) -> None:
                if isinstance(result, Candidate) and index not in before:
                    info = {"tokens": texts[index], "prompt": start.prompt}
                    saved.write(Step(run=start.run, number=index, candidates=[result], info=info))

            drawn = await sample(call, n=n, on_result=save)
        return drawn, {str(index): texts[index] for index in drawn.messages if texts[index] is not None}

    def _answers(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """The answers that votes compare, by candidate, and how they were found; nothing for whole texts."""
        if self.answer is None:
            return {}
        found = {str(candidate.index): self.answer(candidate.content) for candidate in candidates}
        return {"answer": {"by": name_of(self.answer, ANSWERS), "found": found}}

    async def _whole_run(self, start: OutcomeLine, task: EvalTask, under_way: UnderWay, selector: str) -> OutcomeLine:
        """Run an agent to its end, resuming an interrupted run if possible."""
        n = 1 if selector == "first" else self.settings.n
        chooses = _seeded(self.selectors[selector], start.seed)
        given = {"n": n, "selector": chooses, "task": task, "seed": start.seed, "trace": self.trace}
        start, run = await self._begun(start, task, make(self.factory, **given), under_way)
        records_itself = "trace" in inspect.signature(self.factory).parameters
        usages = [usage(step) for step in run.taken]
        if run.taken and not records_itself:
            self.trace.write(run.taken[-1])  # the kill may have come before; a step recorded twice counts once
        try:
            async for step in run.steps():
                usages.append(usage(step))
                if not records_itself:
                    self.trace.write(step)
        except (GraphRecursionError, ContextOverflowError):  # the agent's own failure
            start, right = msgspec.structs.replace(start, gave_up=True), False
        except SamplingError as error:
            if not all(isinstance(failure, ContextOverflowError) for failure in error.failures.values()):
                raise
            start, right = msgspec.structs.replace(start, gave_up=True), False
        else:
            right = await is_right(self.check, task, *answer_of(run.state))
        spent = add_usage(usages) or usage_of(run.state)
        if isinstance(right, str):
            return msgspec.structs.replace(start, error=right, usage=spent)
        return msgspec.structs.replace(start, right=right, usage=spent)

    async def _begun(
        self, start: OutcomeLine, task: EvalTask, agent: Any, under_way: UnderWay
    ) -> tuple[OutcomeLine, AgentRun]:
        """The interrupted run if it can be resumed; otherwise a new one, with a count of what it repeats."""
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
        with under_way.writer() as saved:
            saved.write(Step(run=start.run, info={"restarts": start.restarts, "repeated": start.repeated}))
        return start, AgentRun(agent, task, start.run, self.saver)


class _RunRandom(RandomScorer):
    """Random scores that a repeated or resumed run gets again: they depend on the run's seed and the candidates."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._seed = seed

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """A uniform number for each candidate, ``(N,)``."""
        return np.random.default_rng(seed_of(self._seed, *map(action_key, candidates))).random(len(candidates))


def _seeded(selector: Selector, seed: int) -> Selector:
    """The selector for one run: a random one gets the run's seed."""
    is_random = type(selector.scorer) is RandomScorer
    return replace(selector, scorer=_RunRandom(seed)) if is_random else selector


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress of an evaluation."""

    done: int
    total: int
    errors: int
    """Runs among those done that ended in an error; running the same command again retries them."""


@dataclass(slots=True, kw_only=True)
class EvalRun:
    """An evaluation in a directory: ``trace.jsonl``, ``outcomes.jsonl`` and ``settings.json``.

    A run is done when its outcome is written, and is not repeated. The candidates of a one-step task are saved as they
    arrive, and those that were sampled but not graded are graded from the trace. An agent that is a compiled graph is
    resumed from its last superstep; any other agent starts over, and its outcome counts that.
    """

    settings: EvalSettings
    tasks: Sequence[EvalTask]
    factory: Factory
    check: Checker
    selectors: Mapping[str, Selector]
    """All are replayed on the same candidates of one-step tasks; each gets its own runs of an agent."""
    out: Path
    """The directory."""
    trials: int = 1
    """Runs of each task."""
    concurrency: int = CONCURRENCY
    """Concurrent runs; each samples its N candidates at once."""
    answer: Extract | None = None
    """Finds in a text the answer that votes compare; None compares whole texts."""
    regrade: bool = False
    """Whether to grade the recorded answers again and to ask nothing."""
    on_progress: Callable[[Progress], None] = lambda _: None
    _done: dict[Unit, OutcomeLine] = field(default_factory=dict[Unit, OutcomeLine])
    _errors_in_a_row: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        """Check the numbers, and let votes compare answers."""
        self.selectors = {name: voting(one, answer_key(self.answer)) for name, one in self.selectors.items()}
        if min(self.trials, self.concurrency, self.settings.n) < 1:
            raise ConfigError("n, trials and concurrency must be 1 or more")

    @property
    def is_multi_step(self) -> bool:
        """Whether whole runs of an agent are graded."""
        return makes_agents(self.factory)

    @property
    def units(self) -> list[Unit]:
        """All runs of the evaluation, in order."""
        selectors = list(self.selectors) if self.is_multi_step else [None]
        return [(task.id, trial, name) for trial in range(self.trials) for task in self.tasks for name in selectors]

    async def run(self) -> None:
        """Do the runs that are not done yet.

        Raises:
            ConfigError: The directory belongs to an evaluation with other settings, tasks or another model or checker,
                another process works on it, or the checker raises.
            SamplingError: Every run ended in an error, or too many in a row did; everything done is kept.
            TraceError: The trace cannot be written.
            WriteError: Another file of the directory cannot be written.
        """
        make_folder(self.out)
        with locked(self.out), TraceWriter(self.out / TRACE) as trace:
            check_settings(self.out, {**asdict(self.settings), **self._model()})
            self._done = {unit: outcome for unit, outcome in read_outcome_lines(self.out) if outcome.error is None}
            await self._compare_with_now()
            if not self.is_multi_step:
                await self._grade_what_was_sampled()
            missing = [unit for unit in self.units if unit not in self._done and not self.regrade]
            self._report()
            async with checkpoints(self.out) if self.is_multi_step and missing else nullcontext() as saver:
                await self._work_on(iter(missing), self._runner(missing, trace, saver))
            if self._errors_in_a_row and not self._has_succeeded:
                raise self._failure(f"all {len(self._errors_in_a_row)} runs")

    def graded(self) -> Iterator[Graded]:
        """The graded steps of one-step tasks; a step in which everything failed has no candidate."""
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
        """Compute the table; ``options`` are those of ``evaluate`` or ``evaluate_runs``."""
        if self.is_multi_step:
            order = list(self.selectors)
            wanted = sorted(self._wanted(), key=lambda entry: order.index(entry[0][2] or ""))
            runs = [_run_outcome(outcome) for _, outcome in wanted]
            return evaluate_runs(runs, seed=self.settings.seed, answer=self.answer, **options)
        selectors = {name: selector for name, selector in self.selectors.items() if name not in ALWAYS}
        return evaluate(self.graded(), selectors, seed=self.settings.seed, answer=self.answer, **options)

    def _model(self) -> dict[str, Any]:
        """The model of one-step tasks, as far as it describes itself."""
        if self.is_multi_step or not self.tasks:
            return {}
        try:
            return {"model": described(make(self.factory, n=self.settings.n, task=self.tasks[0], seed=0))}
        except _FATAL:
            raise
        except Exception:  # noqa: BLE001 - the factory is the user's code; the runs report what it raises
            return {}

    async def _compare_with_now(self) -> None:
        """Refuse outcomes that rest on other tasks or another checker, or grade the recorded answers again."""
        tasks = {task.id: task for task in self.tasks}
        now = {name: begun(task, self.check, run="", trial=0) for name, task in tasks.items()}
        wanted = set(self.units)
        known = {unit: outcome for unit, outcome in self._done.items() if unit in wanted}
        refuse_other_prompts(list(known.values()), now, self.out)
        if not self.regrade:
            refuse_other_grading(list(known.values()), now, self.out)
            return
        names = {outcome.run: unit for unit, outcome in known.items()}
        for trajectory in recorded_trajectories(self.out / TRACE):
            if (unit := names.pop(trajectory.run, None)) is not None:
                fresh = now[unit[0]]
                start = msgspec.structs.replace(
                    known[unit], prompt=fresh.prompt, answer=fresh.answer, checker=fresh.checker
                )
                grade = graded_run if self.is_multi_step else graded_step
                self._finish(unit, await grade(self.check, start, tasks[unit[0]], trajectory.steps))
        for unit in names.values():
            await graded_run(self.check, known[unit], tasks[unit[0]], ())

    def _wanted(self) -> list[tuple[Unit, OutcomeLine]]:
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
            answer=self.answer,
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

    async def _grade_what_was_sampled(self) -> None:
        """Grade the recorded steps of one-step tasks that have no outcome."""
        tasks = {task.id: task for task in self.tasks}
        finished = {outcome.run for _, outcome in read_outcome_lines(self.out) if outcome.error is None}
        for step in recorded_steps(self.out / TRACE):
            unit = (step.task or "", int(step.info.get("trial", 0)), None)
            if step.run not in finished and unit not in self._done and step.task in tasks:
                seed = step.info.get("seed", 0)
                start = begun(tasks[step.task], self.check, run=step.run, trial=unit[1], seed=seed)
                if step.info.get("prompt") not in {None, start.prompt}:
                    continue  # an answer to another prompt
                self._finish(unit, await graded(self.check, start, tasks[step.task], step))

    def _finish(self, unit: Unit, outcome: OutcomeLine) -> None:
        write_outcome_line(self.out, outcome)
        self._done[unit] = outcome
        self._report()
        if outcome.error is None:
            UnderWay(self.out, unit).forget()
            self._errors_in_a_row.clear()
            return
        self._errors_in_a_row.append(outcome.error)
        limit = ERRORS_IN_A_ROW if self._has_succeeded else ERRORS_AT_FIRST
        if len(self._errors_in_a_row) >= limit:
            raise self._failure(f"{limit} runs in a row")

    @property
    def _has_succeeded(self) -> bool:
        return any(outcome.error is None for outcome in self._done.values())

    def _failure(self, which: str) -> ConfigError | SamplingError:
        """What ends an evaluation whose runs fail, with the first error."""
        first = self._errors_in_a_row[0]
        text = f"{which} ended in an error, the first with: {first}; everything done is kept in {self.out}: "
        if first.startswith(CHECKER_RAISED):
            return ConfigError(f"{text}correct the checker and run the same command again, which samples nothing twice")
        return SamplingError(f"{text}remove the cause and run the same command again", {})

    def _report(self) -> None:
        units = set(self.units)
        done = [outcome for unit, outcome in self._done.items() if unit in units]
        errors = sum(outcome.error is not None for outcome in done)
        self.on_progress(Progress(done=len(done), total=len(units), errors=errors))


def _run_outcome(outcome: OutcomeLine) -> RunOutcome:
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
