"""``ec-agents pilot`` and ``ec-agents compare``."""

import asyncio
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ec_agents.cli.evaluate import prepared, run_evaluation, token_prices
from ec_agents.cli.options import EvalOptions
from ec_agents.errors import ConfigError
from ec_agents.evaluation.learning import Learning
from ec_agents.evaluation.pilot import Recommendation, compare, recommend, step_seconds
from ec_agents.evaluation.table import Difference, Evaluation, load_evaluation
from ec_agents.scoring.answers import answer_key
from ec_agents.scoring.learned import save_selector
from ec_agents.servers.probe import probe_endpoint


def run_pilot(options: EvalOptions, console: Console, *, command: str = "") -> tuple[Evaluation, Recommendation]:
    """Check the endpoint, evaluate every selector, and write ``selector.json`` for the recommended one.

    Raises:
        ConfigError: The endpoint cannot be used, an option does not fit, or the tasks need several steps.
        SamplingError: The runs ended in errors.
        WriteError: A file cannot be written.
    """
    run, _ = prepared(options)
    if run.is_multi_step:
        raise ConfigError("a pilot needs one-step tasks, where all selectors see the same candidates")
    if options.base_url is not None and not options.regrade:
        key = os.environ.get(options.api_key_env or "OPENAI_API_KEY", "none")
        report = asyncio.run(
            probe_endpoint(options.base_url, options.model or "", api_key=key, top_logprobs=options.top_logprobs or 20)
        )
        if not report.usable:
            raise ConfigError(f"{options.base_url} cannot be used: {'; '.join(report.lines())}")
    evaluation = run_evaluation(options, console, command=command)
    learning, calls = Learning(key=answer_key(run.answer)), list[list[float]]()
    for graded in run.graded():
        learning.add(graded, ())
        calls.append([c.seconds for c in graded.step.candidates if c.seconds is not None])
    found = recommend(evaluation, seconds=step_seconds(calls, options.n), prices=token_prices(options.prices))
    about = {"answer": evaluation.answer, "n": found.n, "model": options.model or ""}
    if found.selector == "learned":
        learning.fitted(evaluation.tasks, model=options.model or "", answer=evaluation.answer).save(
            options.out / "selector.json"
        )
    else:
        save_selector(options.out / "selector.json", found.selector, about)
    return evaluation, found


def compared(a: Path, b: Path) -> Table:
    """The table of two evaluations: b minus a, on the tasks that both have.

    Raises:
        ConfigError: A directory holds no evaluation, or the two share nothing.
    """
    found = compare(*(load_evaluation(one / "evaluation.json" if one.is_dir() else one) for one in (a, b)))
    table = Table(title=f"{b} minus {a}, on the tasks of both", title_justify="left", box=None)
    for column in ("selector", "difference", "p"):
        table.add_column(column, justify="left" if column == "selector" else "right", no_wrap=True)
    for name, difference in found.items():
        table.add_row(name, _points(difference), f"{difference.p_holm:.2g}")
    table.caption = "points, 95% interval of a single comparison; p Holm-corrected"
    return table


def _points(one: Difference) -> str:
    return f"{100 * one.value:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
