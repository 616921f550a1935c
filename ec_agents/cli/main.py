"""The command line, ``ec-agents``: argument parsing only."""

import asyncio
import os
import shlex
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from langchain_core.language_models import BaseChatModel
from pydantic import SecretStr

from ec_agents.errors import ConfigError, EcAgentsError

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise SystemExit(f"ec-agents needs the extra 'cli' ({error}): pip install 'ec-agents[cli]'") from error

from ec_agents.cli import demo as demonstration
from ec_agents.cli.score import DEFAULT_SCORERS, score_rows, write_file, write_rows
from ec_agents.embedded import EmbeddedChatModel
from ec_agents.servers.probe import check_endpoint
from ec_agents.trace import read_steps

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Sample N answers at every agent step, rank them by entropy centroid, let only the best one act."""


@app.command()
def demo(
    *,
    n: Annotated[int, typer.Option(help="Candidates a step.", min=1)] = 8,
    shown: Annotated[int, typer.Option(help="Tasks to show step by step.", min=0)] = 3,
    tasks: Annotated[int, typer.Option(help="Tasks of each family in the summary; 0 for none.", min=0)] = 30,
    seed: Annotated[int, typer.Option(help="Which tasks.")] = 0,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.", min=0.0)] = 1.0,
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server instead of the embedded model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model on that server.")] = None,
) -> None:
    """Watch an agent choose among N answers at every step, on a real model, without a key or a network."""
    chat = _chat_model(base_url, model, temperature)
    asyncio.run(demonstration.run(chat, Console(), shown=shown, count=tasks, n=n, seed=seed))


@app.command()
def check(
    *,
    base_url: Annotated[str, typer.Option(help="An OpenAI-compatible server, for example http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="Name of the model on that server.")],
    top_logprobs: Annotated[int, typer.Option(help="Alternatives to ask for at each token.", min=1)] = 20,
) -> None:
    """Ask a live endpoint what sampling needs: what works, what does not, what to change. The key: OPENAI_API_KEY."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    report = asyncio.run(check_endpoint(base_url, model, api_key=key, top_logprobs=top_logprobs))
    typer.echo("\n".join(report.lines()))
    raise typer.Exit(0 if report.usable else 1)


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="A trace, or responses of another program: .jsonl, .json, also .zst.")],
    *,
    scorer: Annotated[list[str], typer.Option(help="A scorer's name, repeatable; the first one chooses.")] = [  # noqa: B006 - typer copies it
        *DEFAULT_SCORERS
    ],
    group_by: Annotated[str | None, typer.Option(help="Field whose value responses to one problem share.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write all rows here: .csv or .jsonl.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to print without --out; 0 for all.", min=0)] = 50,
) -> None:
    """Score every response in a file and mark the chosen ones; files of any size."""
    table = score_rows(file, scorer, group_by=group_by)
    if out is not None:
        typer.echo(f"{write_file(out, table, scorer)} rows written to {out}")
    elif write_rows(islice(table, rows or None), scorer, sys.stdout, "table") == rows and next(table, None) is not None:
        typer.echo("… and more: --rows 0 prints all, --out FILE.csv writes them")


@app.command(name="eval")
def evaluate(
    tasks: Annotated[str, typer.Argument(help="solve, play, plain, a JSONL file, or with --outcomes a trace.")],
    *,
    out: Annotated[Path, typer.Option(help="Directory; the same command again goes on where it was.")],
    agent: Annotated[str | None, typer.Option(help="module:factory of a model or an agent.")] = None,
    check: Annotated[str | None, typer.Option(help="exact, math, or module:function.")] = None,
    outcomes: Annotated[Path | None, typer.Option(help="CSV or JSONL, if TASKS is a trace.")] = None,
    n: Annotated[int, typer.Option(help="Candidates a step.", min=1)] = 8,
    trials: Annotated[int, typer.Option(help="Runs of each task.", min=1)] = 1,
    selector: Annotated[list[str], typer.Option(help="A scorer's name, repeatable, or all.")] = ["centroid"],  # noqa: B006
    baseline: Annotated[list[str], typer.Option(help="What to compare with, repeatable.")] = [  # noqa: B006 - typer copies it
        "first",
        "random",
        "majority",
    ],
    tune: Annotated[list[str], typer.Option(help="a,b,…: the best of these, found by cross-fitting; repeatable.")] = [],  # noqa: B006
    prices: Annotated[str | None, typer.Option(help="Of a million input and output tokens: 0.15,0.60.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many tasks.", min=1)] = None,
    concurrency: Annotated[int, typer.Option(help="Runs at once.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of tasks, calls and resampling.")] = 0,
    seed_calls: Annotated[bool | None, typer.Option(help="Send each call its own seed.")] = None,
    top_logprobs: Annotated[int, typer.Option(help="Alternatives to ask for; 0 asks for nothing.", min=0)] = 20,
) -> None:
    """Say whether choosing helps on tasks with known answers, against every baseline, and what it costs."""
    command = _extra("cli.evaluate")
    request = command.Request(
        tasks=tasks,
        out=out,
        agent=agent,
        check=check,
        selectors=selector,
        baselines=baseline,
        tuned=tune,
        prices=prices,
        limit=limit,
        trials=trials,
        concurrency=concurrency,
        n=n,
        seed=seed,
        seed_calls=seed_calls,
        top_logprobs=top_logprobs,
        command=shlex.join(["ec-agents", *sys.argv[1:]]),
    )
    console = Console()
    table = (
        command.run_request(request, console) if outcomes is None else command.replay_request(tasks, outcomes, request)
    )
    console.print(command.table_of(table))
    typer.echo(f"{out / 'report.html'} shows it in full")


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="A trace, or the evaluation.json of an evaluation.")],
    *,
    out: Annotated[Path, typer.Option(help="The HTML file; .md for tables of an evaluation.")] = Path("report.html"),
    limit: Annotated[int, typer.Option(help="Steps of a trace to show; 0 for all.", min=0)] = 500,
    phases: Annotated[str, typer.Option(help="How phases are found: paper or short.")] = "paper",
    plots: Annotated[Path | None, typer.Option(help="Also write an evaluation's charts as PNG and SVG here.")] = None,
) -> None:
    """Show a trace or an evaluation as one HTML file that needs nothing else."""
    if source.name.endswith("evaluation.json"):
        table, title = _extra("evaluation.table").load_evaluation(source), source.parent.resolve().name
        if out.suffix == ".md":
            _extra("evaluation.markdown").write_markdown(table, out, title=title)
        else:
            _extra("evaluation.html").write_evaluation_report(table, out, title=title)
        written: list[Path] = [out, *(() if plots is None else _extra("evaluation.plots").write_plots(table, plots))]
    elif plots is None and out.suffix != ".md":
        steps = islice(read_steps(source), limit or None)
        _extra("evaluation.html").write_trace_report(steps, out, title=source.name, phases=phases)
        written = [out]
    else:
        raise ConfigError("--plots and .md files are of evaluations; give the evaluation.json of one")
    typer.echo("\n".join(map(str, written)))


def _extra(name: str) -> Any:
    """A module of the package that needs an optional extra; without it, its own error says which."""
    try:
        return import_module(f"ec_agents.{name}")
    except ImportError as error:
        raise SystemExit(str(error)) from error


def _chat_model(base_url: str | None, model: str | None, temperature: float) -> BaseChatModel:
    if base_url is None and model is None:
        return EmbeddedChatModel(temperature=temperature)
    if base_url is None or model is None:
        raise ConfigError("--base-url and --model are needed together; only one was given")
    try:
        from langchain_openai import ChatOpenAI  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise SystemExit(
            f"--base-url needs the extra 'langchain' ({error}): pip install 'ec-agents[langchain]'"
        ) from error
    key = SecretStr(os.environ.get("OPENAI_API_KEY", "none"))
    return ChatOpenAI(model=model, base_url=base_url, api_key=key, temperature=temperature, timeout=120)


def main() -> None:
    """Run the command line; errors of the package become one line."""
    try:
        app()
    except EcAgentsError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
