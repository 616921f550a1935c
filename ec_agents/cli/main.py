"""The command line, ``ec-agents``: argument parsing only.

The modules that do the work are imported by the commands that need them, so that help appears at once.
"""

import asyncio
import os
import shlex
import sys
from dataclasses import replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from ec_agents import __version__
from ec_agents.errors import ConfigError, EcAgentsError

try:
    import typer

    from ec_agents.cli.options import DEFAULT_SCORERS, SCORER_NAMES, EvalOptions, command_of
    from ec_agents.cli.terminal import Terminal, log_printable, one_line, say
except ImportError as error:
    raise SystemExit(f"ec-agents needs the extra 'cli' ({error}): pip install 'ec-agents[cli]'") from error

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - the form of a callback
    if wanted:
        say(f"ec-agents {__version__}")
        raise typer.Exit


@app.callback()
def root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Sample N responses at every agent step, rank them by entropy centroid, let only the best one act."""


@app.command()
def demo(
    *,
    n: Annotated[int, typer.Option(help="Candidates per step.", min=1)] = 8,
    shown: Annotated[int, typer.Option(help="Tasks to show step by step.", min=0)] = 3,
    tasks: Annotated[int, typer.Option(help="Tasks of each family in the summary; 0 for none.", min=0)] = 30,
    seed: Annotated[int, typer.Option(help="Seed that selects the tasks.")] = 0,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.", min=0.0)] = 1.0,
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server to use instead of the embedded model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model on that server.")] = None,
) -> None:
    """Watch an agent choose among N responses at every step. Runs offline, no API key needed."""
    chat = _chat_model(base_url, model, temperature)
    showing = _load("cli.demo").run(chat, Terminal(), shown=shown, count=tasks, n=n, seed=seed)
    asyncio.run(showing)


@app.command()
def check(
    *,
    base_url: Annotated[str, typer.Option(help="OpenAI-compatible server, for example http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="Name of the model on that server.")],
    top_logprobs: Annotated[int, typer.Option(help="Alternatives per token to request.", min=1)] = 20,
) -> None:
    """Test whether a live endpoint supports sampling: what works, what does not, what to change.

    The API key is read from OPENAI_API_KEY.
    """
    key = os.environ.get("OPENAI_API_KEY", "none")
    checking = _load("servers.probe").probe_endpoint(base_url, model, api_key=key, top_logprobs=top_logprobs)
    report = asyncio.run(checking)
    say("\n".join(report.lines()))
    raise typer.Exit(0 if report.usable else 1)


@app.command()
def score(
    file: Annotated[
        Path, typer.Argument(help="A trace, or saved responses of another program: .jsonl or .json, also with .zst.")
    ],
    *,
    scorer: Annotated[
        list[str], typer.Option(help=f"Scorer, repeatable; the first one chooses. One of {SCORER_NAMES}.")
    ] = [*DEFAULT_SCORERS],  # noqa: B006 - typer copies it
    group_by: Annotated[str | None, typer.Option(help="Field shared by the responses to one problem.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write all rows to this .csv or .jsonl file.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to print without --out; 0 for all.", min=0)] = 50,
) -> None:
    """Score every response in a file and mark the chosen ones. Files may be of any size."""
    command = _load("cli.score")
    table = command.score_rows(file, scorer, group_by=group_by)
    if out is not None:
        say(f"{command.write_file(out, table, scorer)} rows written to {out}")
        return
    count = command.write_rows(islice(table, rows or None), scorer, sys.stdout, "table")
    if count == rows and next(table, None) is not None:
        say("… and more: --rows 0 prints all, --out FILE.csv writes them")


def evaluate(options: EvalOptions) -> None:
    """Measure on tasks with known answers whether selection helps, against every baseline, and what it costs."""
    command = _load("cli.evaluate")
    line, terminal = shlex.join(["ec-agents", *sys.argv[1:]]), Terminal()
    if options.outcomes is None:
        evaluation = command.run_evaluation(options, terminal, command=line)
    else:
        evaluation = command.replay_evaluation(options, options.outcomes, command=line)
    terminal.print(command.table_of(evaluation))
    for note in evaluation.notes:
        say(f"Note: {note}")
    say(f"Full report: {options.out / 'report.html'}")


def pilot(options: EvalOptions) -> None:
    """Find out whether selection pays for a model and tasks: which selector, which N, at what cost."""
    command = _load("cli.pilot")
    options = replace(options, selector=["all"])
    line, terminal = shlex.join(["ec-agents", *sys.argv[1:]]), Terminal()
    evaluation, found = command.run_pilot(options, terminal, command=line)
    terminal.print(_load("cli.evaluate").table_of(evaluation))
    for note in evaluation.notes:
        say(f"Note: {note}")
    say("\n".join(found.sentences))
    say(f"Selector: {options.out / 'selector.json'}; full report: {options.out / 'report.html'}")


app.command(name="eval")(command_of(EvalOptions, evaluate))
app.command(name="pilot")(command_of(EvalOptions, pilot))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Directory of an evaluation, or its evaluation.json.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Compare two evaluations selector by selector, paired on the tasks that both have."""
    Terminal().print(_load("cli.pilot").compared(a, b))


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="A trace, an evaluation.json, or the directory of an evaluation.")],
    *,
    out: Annotated[Path, typer.Option(help="The .html file to write; .md for the tables of an evaluation.")] = Path(
        "report.html"
    ),
    limit: Annotated[int, typer.Option(help="Most steps of a trace to show; 0 for all.", min=0)] = 500,
    phases: Annotated[str, typer.Option(help="Preset of the high-entropy phases: paper or short.")] = "paper",
    plots: Annotated[Path | None, typer.Option(help="Folder for the charts of an evaluation, as PNG and SVG.")] = None,
) -> None:
    """Show a trace or an evaluation as one self-contained HTML file."""
    written = _load("cli.report").write_report(source, out, limit=limit, phases=phases, plots=plots)
    say("\n".join(map(str, written)))


def _load(name: str) -> Any:
    """Import a module of the package for the command that needs it; a missing extra is named in one line."""
    try:
        return import_module(f"ec_agents.{name}")
    except ImportError as error:
        raise SystemExit(str(error)) from error


def _chat_model(base_url: str | None, model: str | None, temperature: float) -> Any:
    if base_url is None and model is None:
        return _load("embedded").EmbeddedChatModel(temperature=temperature)
    if base_url is None or model is None:
        raise ConfigError("--base-url and --model are needed together; only one was given")
    try:
        chat_openai = import_module("langchain_openai").ChatOpenAI
    except ImportError as error:
        raise SystemExit(
            f"--base-url needs the extra 'langchain' ({error}): pip install 'ec-agents[langchain]'"
        ) from error
    key = os.environ.get("OPENAI_API_KEY", "none")
    return chat_openai(model=model, base_url=base_url, api_key=key, temperature=temperature, timeout=120)


def main() -> None:
    """Run the command line; an error of the package becomes one line."""
    log_printable()
    try:
        app()
    except EcAgentsError as error:
        raise SystemExit(one_line(f"{type(error).__name__}: {error}")) from error
