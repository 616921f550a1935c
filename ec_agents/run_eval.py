"""Runs of an evaluation: every task and trial once, on disk as it ends, so that a killed one goes on where it was."""

import asyncio
import hashlib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import msgspec
from langgraph.errors import GraphRecursionError

from ec_agents.candidates import Candidate, Step
from ec_agents.errors import ConfigError, SamplingError
from ec_agents.eval_agents import Factory, answer_of, asker, make, makes_agents, steps_of, token_texts
from ec_agents.eval_store import TRACE, Outcome, Unit, check_settings, locked, read_outcome_lines, write_outcome
from ec_agents.eval_tasks import Checker, EvalTask
from ec_agents.evaluate import ALWAYS, evaluate, evaluate_runs
from ec_agents.messages import describe_failure
from ec_agents.outcomes import Graded, RunOutcome
from ec_agents.results import Evaluation
from ec_agents.sampling import sample
from ec_agents.selection import Selector
from ec_agents.trace import TraceWriter, read_steps

ERRORS_IN_A_ROW = 20
"""So many infrastructure errors without a success between them end an evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """What must not change when an evaluation goes on."""

    tasks: str
    """Where they come from."""
    agent: str
    """Name of the factory."""
    n: int = 8
    """Candidates a step."""
    seed: int = 0
    """Every run and call has its own seed made from this one."""
    seed_calls: bool = False
    """Whether each call of a one-step task is sent its seed; not every server takes one."""
    top_logprobs: int | None = 20
    """Alternatives that each call of a one-step task asks for; None asks for nothing."""


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

    A run is done when its outcome is written. What is done is not done again; a one-step task that was drawn but not
    graded when the program was killed is graded from the trace.
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
            await self._grade_what_was_drawn()
            tasks = {task.id: task for task in self.tasks}
            missing = iter([unit for unit in self.units if unit not in self._done])
            self._report()
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.concurrency):
                        group.create_task(self._work(missing, tasks, trace))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None

    def graded(self) -> Iterator[Graded]:
        """The graded steps of one-step tasks; one in which everything failed has no candidate that is right."""
        outcomes = {o.run: o for _, o in self._wanted() if isinstance(o.right, dict)}
        if outcomes:
            for step in read_steps(self.out / TRACE):
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

    async def _work(self, units: Iterator[Unit], tasks: Mapping[str, EvalTask], trace: TraceWriter) -> None:
        for unit in units:
            task, trial, arm = unit
            seed = seed_of(self.settings.seed, task, trial)
            start = Outcome(
                run=f"{task}/{trial}/{arm or 'all'}#{uuid4().hex[:8]}", task=task, trial=trial, selector=arm, seed=seed
            )
            began = time.perf_counter()
            try:
                draw = self._one_step if arm is None else self._whole_run
                outcome = await draw(start, tasks[task], trace)
            except ConfigError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever an agent or a server raises is a result
                outcome = msgspec.structs.replace(start, error=f"{type(error).__name__}: {error}")
            self._finish(unit, msgspec.structs.replace(outcome, seconds=time.perf_counter() - began))

    async def _one_step(self, start: Outcome, task: EvalTask, trace: TraceWriter) -> Outcome:
        model = make(self.factory, n=self.settings.n, task=task, seed=start.seed)
        ask = asker(model, top_logprobs=self.settings.top_logprobs, seed_calls=self.settings.seed_calls)
        began = time.perf_counter()
        drawn = await sample(lambda i: ask(task.prompt, seed_of(start.seed, i)), n=self.settings.n, min_candidates=1)
        step = Step(
            run=start.run,
            task=task.id,
            candidates=drawn.candidates,
            selection=next(iter(self.selectors.values()), Selector())(drawn.candidates),
            failures={i: describe_failure(failure) for i, failure in drawn.failures.items()},
            seconds=time.perf_counter() - began,
            info={"trial": start.trial, "seed": start.seed, "tokens": token_texts(drawn)},
        )
        trace.write(step)
        return await self._graded(start, task, step)

    async def _graded(self, start: Outcome, task: EvalTask, step: Step) -> Outcome:
        right = {c.index: await self._is_right(task, c.content, c.tool_calls) for c in step.candidates}
        return msgspec.structs.replace(start, right=right, usage=_usage(step.candidates))

    async def _whole_run(self, start: Outcome, task: EvalTask, trace: TraceWriter) -> Outcome:
        arm = cast("str", start.selector)
        n = 1 if arm == "first" else self.settings.n
        agent = make(self.factory, n=n, selector=self.selectors[arm], task=task, seed=start.seed)
        usage: dict[str, int] = {}
        state: Any = None
        try:
            async for found in steps_of(agent, task, start.run):
                if isinstance(found, Step):
                    trace.write(found)
                    usage = _sum(usage, _usage(found.candidates))
                else:
                    state = found
        except GraphRecursionError:  # the agent's own failure
            return msgspec.structs.replace(start, right=False, usage=usage)
        text, calls = answer_of(state)
        return msgspec.structs.replace(start, right=await self._is_right(task, text, calls), usage=usage)

    async def _is_right(self, task: EvalTask, text: str, calls: Sequence[Mapping[str, Any]]) -> bool:
        verdict = self.check(task, text, calls)
        return bool(await verdict if inspect.isawaitable(verdict) else verdict)

    async def _grade_what_was_drawn(self) -> None:
        """Grade the steps that were recorded but have no outcome, of one-step tasks."""
        tasks = {task.id: task for task in self.tasks}
        if self.is_multi_step or not (self.out / TRACE).stat().st_size:
            return
        graded = {outcome.run for _, outcome in read_outcome_lines(self.out) if outcome.error is None}
        for step in read_steps(self.out / TRACE):
            unit = (step.task or "", int(step.info.get("trial", 0)), None)
            if step.run not in graded and unit not in self._done and step.task in tasks:
                start = Outcome(run=step.run, task=step.task, trial=unit[1], seed=step.info.get("seed", 0))
                self._finish(unit, await self._graded(start, tasks[step.task], step))

    def _finish(self, unit: Unit, outcome: Outcome) -> None:
        write_outcome(self.out, outcome)
        self._done[unit] = outcome
        self._report()
        if outcome.error is None:
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


def seed_of(*parts: object) -> int:
    """A seed made of names and numbers: the same for the same ones, below 2³¹."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1


def _run_outcome(outcome: Outcome) -> RunOutcome:
    right = outcome.right if isinstance(outcome.right, bool) else None
    return RunOutcome(
        task=outcome.task,
        selector=outcome.selector or "",
        trial=outcome.trial,
        right=right,
        usage=outcome.usage,
        error=outcome.error,
    )


def _usage(candidates: Iterable[Candidate]) -> dict[str, int]:
    total: dict[str, int] = {}
    for candidate in candidates:
        total = _sum(total, candidate.usage or {})
    return total


def _sum(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {key: left.get(key, 0) + right.get(key, 0) for key in {**left, **right}}
