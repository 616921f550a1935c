"""``ec-agents eval``: the run with its progress bar, the table, the files."""

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from pydantic import SecretStr
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

from ec_agents.cli.options import EvalOptions
from ec_agents.embedded.tasks import FAMILIES
from ec_agents.errors import ConfigError
from ec_agents.evaluation.checkers import answer_finder, checker
from ec_agents.evaluation.comparison import evaluate
from ec_agents.evaluation.factories import Factory, embedded_agent, embedded_model
from ec_agents.evaluation.html import write_evaluation_report
from ec_agents.evaluation.markdown import write_markdown
from ec_agents.evaluation.outcomes import grade, read_outcomes
from ec_agents.evaluation.run import EvalRun, Progress
from ec_agents.evaluation.settings import ALWAYS, EvalSettings
from ec_agents.evaluation.table import Evaluation, Row
from ec_agents.evaluation.tasks import load, read_tasks
from ec_agents.files import make_folder
from ec_agents.scoring import SCORERS
from ec_agents.selection import Selector, as_selector
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.trace import read_steps

SERVER_OPTIONS = ("model", "api_key_env", "temperature", "max_tokens", "system_prompt", "extra_body")
"""Options that describe the model of ``--base-url``."""

FOLDS = 5
"""Folds of the cross-fitting of --tune."""


def run_evaluation(options: EvalOptions, console: Console, *, command: str = "") -> Evaluation:
    """Do the missing runs and compute the table; write ``evaluation.json``, ``results.md`` and ``report.html``.

    Args:
        options: The options of the command.
        console: Shows the progress.
        command: The whole command, for readers of the table.

    Raises:
        ConfigError: An option does not fit.
        SamplingError: The runs ended in errors.
        WriteError: A file cannot be written.
    """
    prices, grids = token_prices(options.prices), _grids(options.tune)
    run, n_tasks = prepared(options)
    if run.is_multi_step and grids:
        raise ConfigError("--tune needs one-step tasks, where all settings see the same candidates")
    if grids and n_tasks < FOLDS:
        raise ConfigError(f"--tune needs {FOLDS} tasks or more, one for each fold; found {n_tasks}")
    with _bar(console) as bar:
        run.on_progress = _progress(bar)
        asyncio.run(run.run())
    tuned = {} if run.is_multi_step else {"tuned": grids, "folds": FOLDS}
    return _saved(run.evaluation(baselines=options.baseline, prices=prices, **tuned), options, command)


def replay_evaluation(options: EvalOptions, outcomes: Path, *, command: str = "") -> Evaluation:
    """Compute the table of a trace whose outcomes are in a file; no model is called.

    Raises:
        ConfigError: An option does not fit, or no step has outcomes.
        TraceError: A file cannot be read.
        WriteError: A file cannot be written.
    """
    prices, grids = token_prices(options.prices), _grids(options.tune)
    selectors = named_selectors([*options.selector, *options.baseline])
    make_folder(options.out)
    evaluation = evaluate(
        grade(read_steps(options.tasks), read_outcomes(outcomes)),
        {name: selector for name, selector in selectors.items() if name not in ALWAYS},
        baselines=options.baseline,
        tuned=grids,
        prices=prices,
        answer=answer_finder(options.answer, options.check),
        seed=options.seed,
        folds=FOLDS,
    )
    return _saved(evaluation, options, command)


def prepared(options: EvalOptions) -> tuple[EvalRun, int]:
    """The evaluation, and the number of its tasks."""
    tasks, is_embedded = read_tasks(options.tasks, limit=options.limit, seed=options.seed)
    if options.agent is None and options.base_url is None and not is_embedded:
        raise ConfigError(
            "--base-url and --model, or --agent, are needed for tasks of a file; without them only "
            f"{', '.join(FAMILIES)} can be run"
        )
    check = options.check or ("embedded" if is_embedded else "exact")
    run = EvalRun(
        settings=EvalSettings(
            tasks=options.tasks,
            agent=options.agent or options.model or "embedded",
            n=options.n,
            seed=options.seed,
            seed_calls=_is_embedded_model(options) if options.seed_calls is None else options.seed_calls,
            top_logprobs=options.top_logprobs or None,
            system_prompt=options.system_prompt,
        ),
        tasks=tasks,
        factory=_factory(options),
        check=checker(check),
        answer=answer_finder(options.answer, check),
        regrade=options.regrade,
        selectors=named_selectors([*options.selector, *options.baseline]),
        out=options.out,
        trials=options.trials,
        concurrency=options.concurrency,
    )
    return run, len(tasks)


def named_selectors(names: Iterable[str]) -> dict[str, Selector]:
    """Make selectors by name; ``all`` stands for every one.

    Raises:
        ConfigError: No scorer has that name.
    """
    wanted = dict.fromkeys(one for name in names for one in (SCORERS if name == "all" else (name,)))
    return {name: as_selector(name) for name in wanted if name not in {"avg@1", "oracle"}}


def table_of(evaluation: Evaluation) -> Table:
    """The table for the terminal: percent, points, and a star if the corrected p-value is below 0.05."""
    unit = "steps" if evaluation.n_candidates else "runs of each selector"
    title = f"{evaluation.n_tasks} tasks, {evaluation.n_draws} {unit}, {evaluation.n_failed} failed calls or runs"
    if evaluation.n_restarted:
        title += f", {evaluation.n_restarted} runs started over ({evaluation.n_repeated} calls repeated)"
    caption = f"{evaluation.level:.0%} intervals over tasks; * p < 0.05, paired, Holm-corrected"
    if evaluation.effective_n is not None:
        caption += f"; votes compare {evaluation.answer}, effective N {evaluation.effective_n.value:.1f}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=None)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    baselines = evaluation.compared
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


def _is_embedded_model(options: EvalOptions) -> bool:
    return options.agent is None and options.base_url is None


def _factory(options: EvalOptions) -> Factory:
    """What makes the model or agent.

    Raises:
        ConfigError: The options name several, or a server incompletely.
    """
    server = {name: getattr(options, name) for name in SERVER_OPTIONS}
    given = [f"--{name.replace('_', '-')}" for name, value in server.items() if value is not None]
    if options.base_url is None and given:
        raise ConfigError(f"{', '.join(given)}: only with --base-url; a model of --agent has its own settings")
    if options.base_url is not None:
        if options.agent is not None:
            raise ConfigError("--base-url and --agent both name a model; give one of them")
        return _served(options)
    if options.agent is not None:
        return load(options.agent, "--agent")
    return embedded_agent if options.tasks == "play" else embedded_model


def _served(options: EvalOptions) -> Factory:
    """Make the model of a server once; what does not fit is an error before anything is sent."""
    if options.model is None:
        raise ConfigError("--base-url needs --model, the name of the model on that server")
    key = os.environ.get(options.api_key_env or "OPENAI_API_KEY")
    if options.api_key_env is not None and not key:
        raise ConfigError(f"--api-key-env: the environment variable {options.api_key_env} is not set")
    model = OpenAIChatModel(
        model=options.model,
        base_url=options.base_url or "",
        api_key=None if key is None else SecretStr(key),
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        extra_body=_extra_body(options.extra_body),
    )
    return lambda: model


def _extra_body(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--extra-body must be a JSON object; found {text!r:.80} ({error})") from error


def _grids(texts: Sequence[str]) -> dict[str, dict[str, Selector]]:
    """``--tune a,b`` → a row for the better of a and b, chosen by cross-fitting."""
    return {f"tuned({text})": named_selectors(text.split(",")) for text in texts}


def token_prices(text: str | None) -> tuple[float, float] | None:
    """Read the option ``--prices``.

    Raises:
        ConfigError: It is not two numbers of 0 or more.
    """
    if text is None:
        return None
    try:
        given, taken = (float(part) for part in text.split(","))
        if not (0 <= given < float("inf") and 0 <= taken < float("inf")):
            raise ValueError(text)  # noqa: TRY301 - one message for both faults
    except ValueError as error:
        raise ConfigError(
            f"--prices must be two numbers, per million input and output tokens, such as 0.15,0.60; found {text!r}"
        ) from error
    return given, taken


def _saved(evaluation: Evaluation, options: EvalOptions, command: str) -> Evaluation:
    evaluation.save(options.out / "evaluation.json")
    write_markdown(evaluation, options.out / "results.md", title=Path(options.tasks).name, command=command)
    write_evaluation_report(evaluation, options.out / "report.html")
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
