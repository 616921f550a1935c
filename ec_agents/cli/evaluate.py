"""What ``ec-agents eval`` does: the run with its progress bar, the table, the files."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bar,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ec_agents.embedded.tasks import FAMILIES
from ec_agents.errors import ConfigError
from ec_agents.evaluation.comparison import BASELINES, evaluate
from ec_agents.evaluation.factories import Factory, embedded_agent, embedded_model
from ec_agents.evaluation.html import write_evaluation_report
from ec_agents.evaluation.markdown import write_markdown
from ec_agents.evaluation.outcomes import grade, read_outcomes
from ec_agents.evaluation.run import EvalRun, EvalSettings, Progress
from ec_agents.evaluation.table import ALWAYS, Evaluation, Row
from ec_agents.evaluation.tasks import checker, load, read_tasks
from ec_agents.scoring import SCORERS, scorer_named
from ec_agents.selection import Selector
from ec_agents.trace import read_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of the command that need thought."""

    tasks: str
    out: Path
    agent: str | None = None
    check: str | None = None
    selectors: Sequence[str] = ("centroid",)
    baselines: Sequence[str] = BASELINES
    tuned: Sequence[str] = ()
    prices: str | None = None
    limit: int | None = None
    trials: int = 1
    concurrency: int = 4
    n: int = 8
    seed: int = 0
    seed_calls: bool | None = None
    top_logprobs: int = 20
    command: str = ""
    """The whole command, for readers of the table."""


def run_request(request: Request, console: Console) -> Evaluation:
    """Run what is missing, then make the table; writes ``evaluation.json``, ``results.md`` and ``report.html``.

    Raises:
        ConfigError: An option does not fit.
        SamplingError: One infrastructure error came after another.
    """
    tasks, is_embedded = read_tasks(request.tasks, limit=request.limit, seed=request.seed)
    if request.agent is None and not is_embedded:
        raise ConfigError(f"--agent is needed for tasks of a file; without it only {', '.join(FAMILIES)} can be run")
    run = EvalRun(
        settings=EvalSettings(
            tasks=request.tasks,
            agent=request.agent or "embedded",
            n=request.n,
            seed=request.seed,
            seed_calls=request.agent is None if request.seed_calls is None else request.seed_calls,
            top_logprobs=request.top_logprobs or None,
        ),
        tasks=tasks,
        factory=_factory(request),
        check=checker(request.check or ("embedded" if is_embedded else "exact")),
        selectors=named_selectors([*request.selectors, *request.baselines]),
        out=request.out,
        trials=request.trials,
        concurrency=request.concurrency,
    )
    if run.is_multi_step and request.tuned:
        raise ConfigError("--tune works on one-step tasks, where all settings see the same candidates")
    with _bar(console) as bar:
        run.on_progress = _progress(bar)
        asyncio.run(run.run())
    tuned = {} if run.is_multi_step else {"tuned": _grids(request.tuned)}
    return _finished(run.evaluation(baselines=request.baselines, prices=_prices(request.prices), **tuned), request)


def replay_request(trace: str, outcomes: Path, request: Request) -> Evaluation:
    """The table of a trace whose outcomes are in a file; no model is called.

    Raises:
        ConfigError: An option does not fit, or no step has outcomes.
        TraceError: A file cannot be read.
    """
    names = [name for name in (*request.selectors, *request.baselines) if name not in ALWAYS]
    graded = grade(read_steps(trace), read_outcomes(outcomes))
    table = evaluate(
        graded,
        {name: selector for name, selector in named_selectors(names).items() if name not in ALWAYS},
        baselines=request.baselines,
        tuned=_grids(request.tuned),
        prices=_prices(request.prices),
        seed=request.seed,
    )
    request.out.mkdir(parents=True, exist_ok=True)
    return _finished(table, request)


def named_selectors(names: Iterable[str]) -> dict[str, Selector]:
    """Selectors by the names of their scorers; ``all`` stands for every one.

    Raises:
        ConfigError: There is no scorer of that name.
    """
    wanted = dict.fromkeys(found for name in names for found in (SCORERS if name == "all" else (name,)))
    return {name: Selector(scorer=scorer_named(name)) for name in wanted}


def table_of(evaluation: Evaluation) -> Table:
    """The table as the terminal shows it: percent, points, and a star where the corrected p-value is below 0.05."""
    title = f"{evaluation.n_tasks} tasks, {evaluation.n_draws} draws, {evaluation.n_failed} failed calls or runs"
    if evaluation.n_restarted:
        title += f", {evaluation.n_restarted} runs begun again ({evaluation.n_repeated} calls made twice)"
    caption = f"{evaluation.level:.0%} intervals over tasks; * p < 0.05, paired, Holm-corrected"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=None)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    baselines = [name for name in evaluation.baselines if any(name in row.versus for row in evaluation.rows)]
    table.add_column("selector", no_wrap=True, max_width=40)
    table.add_column("right", justify="right", no_wrap=True)
    for column in ("AUROC", *(f"- {name}" for name in baselines)):
        table.add_column(column, justify="right", overflow="fold", min_width=6)
    for row in evaluation.rows:
        table.add_row(*_cells(row, baselines))
    return table


def _cells(row: Row, baselines: Sequence[str]) -> list[str]:
    right = row.accuracy
    versus = [row.versus.get(name) for name in baselines]
    return [
        row.selector,
        f"{100 * right.value:.1f} [{100 * right.low:.1f}, {100 * right.high:.1f}]",
        "" if row.auroc_within is None else f"{row.auroc_within.value:.2f}",
        *("" if d is None else f"{100 * d.value:+.1f}{'*' if d.p_holm < 0.05 else ''}" for d in versus),
    ]


def _factory(request: Request) -> Factory:
    if request.agent is not None:
        return load(request.agent, "--agent")
    return embedded_agent if request.tasks == "play" else embedded_model


def _grids(texts: Sequence[str]) -> dict[str, dict[str, Selector]]:
    """``--tune a,b`` → a row that is the better of a and b, chosen by cross-fitting."""
    return {f"tuned({text})": named_selectors(text.split(",")) for text in texts}


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        given, taken = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--prices must be two numbers, per million input and output tokens; found {text!r}"
        ) from error
    return given, taken


def _finished(evaluation: Evaluation, request: Request) -> Evaluation:
    evaluation.save(request.out / "evaluation.json")
    write_markdown(evaluation, request.out / "results.md", title=Path(request.tasks).name, command=request.command)
    write_evaluation_report(evaluation, request.out / "report.html")
    return evaluation


def _bar(console: Console) -> Bar:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Bar(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)


def _progress(bar: Bar) -> Callable[[Progress], None]:
    number = bar.add_task("running")

    def show(progress: Progress) -> None:
        errors = f", {progress.errors} errors" if progress.errors else ""
        bar.update(number, completed=progress.done, total=progress.total, description=f"running{errors}")

    return show
