"""The options of ``ec-agents eval``, and what other commands share: names, defaults and help in one place.

Help imports this module, so it imports nothing that is slow.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ec_agents.evaluation.settings import BASELINES, CONCURRENCY, EvalSettings

_Options = TypeVar("_Options")

SCORER_NAMES = (
    "centroid, centroid-short, standardized-centroid, standardized-centroid-short, raw-entropy-centroid, "
    "mean-entropy, max-entropy, self-certainty, deepconf-mean, deepconf-tail, deepconf-lowest-group, "
    "deepconf-bottom-10, mean-logprob, sum-logprob, shortest, longest, tail-entropy, first, random, "
    "majority, majority-tool-names, majority-then-centroid, centroid-vote, centroid-weighted-vote, "
    "borda, deepconf-vote, deepconf-vote-10"
)
"""The names of SCORERS as help shows them; written out because importing the scorers would slow help down."""

DEFAULT_SCORERS = ("centroid", "centroid-short", "standardized-centroid", "mean-entropy", "mean-logprob")
"""The scorers of ``ec-agents score`` by default."""

_DEFAULTS = EvalSettings(tasks="", agent="")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """The options of one evaluation."""

    tasks: Annotated[
        str, typer.Argument(help="solve, play or plain; a JSONL file of tasks; or, with --outcomes, a trace.")
    ]
    out: Annotated[Path, typer.Option(help="Directory of the evaluation; the same command again resumes it.")]
    agent: Annotated[str | None, typer.Option(help="module:factory of a chat model or an agent.")] = None
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server to sample from, instead of --agent.")
    ] = None
    model: Annotated[str | None, typer.Option(help="Name of the model on that server.")] = None
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the API key; OPENAI_API_KEY by default.")
    ] = None
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; the server's by default.")] = None
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of a response.", min=1)] = None
    system_prompt: Annotated[str | None, typer.Option(help="Sent before the prompt of each task.")] = None
    extra_body: Annotated[str | None, typer.Option(help="Other parameters of the request, as a JSON object.")] = None
    check: Annotated[
        str | None,
        typer.Option(
            help="Checker of the answers: exact, number, choice, math, python-tests, embedded, or module:function."
        ),
    ] = None
    answer: Annotated[
        str | None,
        typer.Option(
            help="What votes compare: text, last-number, boxed, choice, last-line, code, or module:function of a text; "
            "by default the part that --check looks at, or the text."
        ),
    ] = None
    regrade: Annotated[
        bool, typer.Option("--regrade", help="Grade the recorded answers again, and ask the model nothing.")
    ] = False
    outcomes: Annotated[Path | None, typer.Option(help="CSV or JSONL file of outcomes, if TASKS is a trace.")] = None
    n: Annotated[int, typer.Option(help="Candidates per step.", min=1)] = _DEFAULTS.n
    trials: Annotated[int, typer.Option(help="Runs of each task.", min=1)] = 1
    selector: Annotated[
        list[str], typer.Option(help=f"Selector to evaluate, repeatable: all, or one of {SCORER_NAMES}.")
    ] = field(default_factory=lambda: ["centroid"])
    baseline: Annotated[
        list[str], typer.Option(help="Selector to compare the others with, repeatable; names as for --selector.")
    ] = field(default_factory=lambda: [*BASELINES])
    tune: Annotated[
        list[str], typer.Option(help="Selectors a,b,… of which the best is found by cross-fitting; repeatable.")
    ] = field(default_factory=list[str])
    prices: Annotated[
        str | None, typer.Option(help="Price per million input and output tokens, for example 0.15,0.60.")
    ] = None
    limit: Annotated[int | None, typer.Option(help="Most tasks to use.", min=1)] = None
    concurrency: Annotated[int, typer.Option(help="Concurrent runs.", min=1)] = CONCURRENCY
    seed: Annotated[int, typer.Option(help="Seed of tasks, calls and resampling.")] = _DEFAULTS.seed
    seed_calls: Annotated[
        bool | None, typer.Option(help="Send each call a seed of its own; by default only to the embedded model.")
    ] = None
    top_logprobs: Annotated[
        int, typer.Option(help="Alternatives per token to request; 0 requests no log-probabilities.", min=0)
    ] = _DEFAULTS.top_logprobs or 0


def command_of(kind: type[_Options], run: Callable[[_Options], None]) -> Callable[..., None]:
    """Make a command function whose parameters are the fields of a dataclass of options.

    Args:
        kind: The dataclass.
        run: Takes the options; its docstring becomes the help of the command.
    """

    def command(**given: Any) -> None:
        run(kind(**given))

    parameters = [_parameter(one) for one in fields(kind)]  # type: ignore[arg-type]
    command.__doc__ = run.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _parameter(one: Field[Any]) -> inspect.Parameter:
    default = one.default if one.default_factory is MISSING else one.default_factory()
    default = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=one.type)
