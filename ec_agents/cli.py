"""The command line, ``ec-agents``: argument parsing only."""

import asyncio
import os
from typing import Annotated

from langchain_core.language_models import BaseChatModel
from pydantic import SecretStr

from ec_agents.errors import ConfigError, EcAgentsError

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise SystemExit(f"ec-agents needs the extra 'cli' ({error}): pip install 'ec-agents[cli]'") from error

from ec_agents import demo as demonstration
from ec_agents.embedded import EmbeddedChatModel

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
