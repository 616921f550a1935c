"""Graded draws made by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from helpers.candidates import candidate

from ec_agents.candidates import Candidate, Step
from ec_agents.evaluation.outcomes import Graded
from ec_agents.scoring import SignalScorer
from ec_agents.selection import Selector

SIZE = Selector(scorer=SignalScorer("entropy", "lowest", lambda s: float(s.entropies[0])))


def measured(index: int, score: float, *, tokens: int = 1, **fields: Any) -> Candidate:
    """A candidate of so many tokens, each with this entropy: its score under ``SIZE``."""
    usage = {"input_tokens": 5, "output_tokens": tokens, "total_tokens": 5 + tokens}
    return candidate(index, [score] * tokens, **{"finish_reason": "stop", "usage": usage, **fields})


def draw(
    task: str, right: Sequence[bool], scores: Sequence[float], *, failures: int = 0, texts: Sequence[str] = ()
) -> Graded:
    """One draw: candidates with these outcomes and scores, and some failed calls after them."""
    drawn = [measured(i, s, content=texts[i] if texts else f"answer {i}") for i, s in enumerate(scores)]
    failed = {len(scores) + i: "TimeoutError" for i in range(failures)}
    step = Step(run=f"{task}/{id(drawn)}", task=task, candidates=drawn, failures=failed)
    return Graded(step=step, right=dict(enumerate(right)))


def noise(tasks: int, n: int, rng: np.random.Generator) -> list[Graded]:
    """Draws whose scores know nothing of the outcomes; tasks are easy or hard."""
    chances = rng.random(tasks)
    return [draw(f"t{i}", (rng.random(n) < p).tolist(), rng.random(n).tolist()) for i, p in enumerate(chances)]
