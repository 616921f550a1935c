"""The table of an evaluation, as plain data that is saved as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ec_agents.errors import ConfigError
from ec_agents.evaluation.stats import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A selector minus a baseline, on the same tasks."""

    value: float
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    p: float
    """Paired, two-sided."""
    p_holm: float = 1.0
    """Corrected for all comparisons of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginBin:
    """Steps with margins of about one size: how often their choice was right."""

    margin: float
    """Mean margin."""
    right: float
    """Share of right choices."""
    random: float
    """Expected share of right choices of a random sound candidate on the same steps."""
    count: int
    """Steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Histogram of the scores of right and of wrong candidates; high = better."""

    edges: tuple[float, ...]
    """One more than there are bins."""
    right: tuple[int, ...]
    """Right candidates in each bin."""
    wrong: tuple[int, ...]
    """Wrong candidates in each bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way of choosing."""

    selector: str
    """Its name."""
    accuracy: Estimate
    """Share of right choices; errors and failures count as not right."""
    pass_hat: Mapping[int, Estimate]
    """k → chance that k trials of a task are all right."""
    regret: Estimate | None = None
    """Oracle minus accuracy."""
    versus: Mapping[str, Difference] = field(default_factory=dict[str, Difference])
    """Baseline → difference."""
    auroc_within: Estimate | None = None
    """How often a right candidate scores above a wrong one of the same step."""
    auroc: float | None = None
    """The same over all candidates of all steps."""
    margin_auroc: float | None = None
    """How often a right choice has a larger margin than a wrong one."""
    margins: tuple[MarginBin, ...] = ()
    """Reliability of the margin, from small to large."""
    unscored: float | None = None
    """Share of candidates without a score."""
    flawed: float | None = None
    """Share of candidates in which a guard found a flaw."""
    fallback: float | None = None
    """Share of steps with nothing to rank by."""
    agreement: float | None = None
    """Share of steps in which the recorded choice is this one."""
    tokens: float | None = None
    """Tokens a step or run, input and output; None where they are not reported."""
    tokens_per_solved: float | None = None
    """Tokens for each right outcome."""
    cost_per_solved: float | None = None
    """Price of them, in the currency of the prices."""
    curve: Mapping[int, float] = field(default_factory=dict[int, float])
    """n → expected accuracy if only n candidates had been drawn."""
    by_length: tuple[Estimate | None, ...] = ()
    """Accuracy in the thirds of steps, or of tasks, with short, middling and long candidates or runs."""
    scores: Distribution | None = None
    """Scores of right and wrong candidates."""
    note: str = ""
    """What a reader must know about this row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A table of results."""

    rows: tuple[Row, ...]
    n_tasks: int
    """Problems; intervals and tests treat whatever belongs to one as one."""
    n_draws: int
    """Graded steps, or runs of each selector."""
    n_candidates: int
    """The largest N; 0 for whole runs."""
    n_failed: int
    """Calls that failed, or runs that ended in an infrastructure error; they count as not right."""
    lengths: tuple[float, ...]
    """Median tokens of a candidate, or mean output tokens of a task's runs, that separate ``by_length``."""
    level: float
    """Coverage of the intervals."""
    resamples: int
    seed: int
    """Seed of resampling and subsets."""
    baselines: tuple[str, ...] = ()
    """Rows that the others are compared with."""
    n_restarted: int = 0
    """Of whole runs: how often one was cut off, could not go on, and was begun again."""
    n_repeated: int = 0
    """Calls that were made again because of that, as far as the trace tells."""

    def row(self, selector: str) -> Row:
        """The row of a selector.

        Raises:
            ConfigError: There is none of that name.
        """
        for row in self.rows:
            if row.selector == selector:
                return row
        raise ConfigError(f"no row is called {selector!r}; known: {', '.join(row.selector for row in self.rows)}")

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; ``load_evaluation`` reads it."""
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))


def load_evaluation(path: str | Path) -> Evaluation:
    """A saved evaluation.

    Raises:
        ConfigError: The file is not one.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Evaluation)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is not a saved evaluation: {error}") from error
