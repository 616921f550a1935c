"""One run of an evaluation: drawn or run, from where it was, and graded."""

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from langchain_core.exceptions import ContextOverflowError
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.errors import GraphRecursionError

from ec_agents.candidates import Candidate, CandidateSet, Step
from ec_agents.errors import ConfigError, SamplingError
from ec_agents.evaluation.factories import AgentRun, Factory, added, answer_of, asker, make, seed_of, token_text, usage_of
from ec_agents.evaluation.store import EvalSettings, Outcome, UnderWay, Unit
from ec_agents.evaluation.tasks import Checker, EvalTask
from ec_agents.messages import describe_failure
from ec_agents.sampling import sample
from ec_agents.selection import Selector
from ec_agents.trace import TraceWriter


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
