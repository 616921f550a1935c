"""Settings of an evaluation, and the names of the rows that every table has."""

from dataclasses import dataclass

ALWAYS = ("avg@1", "random", "oracle")
"""Rows of every table that are computed exactly and belong to no selector."""

BASELINES = ("first", "random", "majority")
"""The rows that every selector is compared with by default."""

REFERENCES = ("oracle", "majority", "random")
"""The rows that every chart shows beside the selectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """The settings that must stay the same when an evaluation is resumed."""

    tasks: str
    """Source of the tasks: a file or an embedded family."""
    agent: str
    """Name of the factory."""
    n: int = 8
    """Candidates per step."""
    seed: int = 0
    """Every run and every call gets a seed of its own, derived from this one."""
    seed_calls: bool = False
    """Whether to send each call of a one-step task its seed; not every server accepts one."""
    top_logprobs: int | None = 20
    """Alternatives per token that each call of a one-step task asks for; None requests no log-probabilities."""
    system_prompt: str | None = None
    """Sent before the prompt of each one-step task."""


CONCURRENCY = 4
"""Concurrent runs by default."""
