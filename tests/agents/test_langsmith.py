"""What LangSmith gets to see of a step: the runs that are documented, and no log-probabilities.

A local server stands for LangSmith's.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from helpers.adding import ASK, add, call_add
from langchain.agents import create_agent
from langsmith import Client, tracing_context  # pyright: ignore[reportUnknownVariableType]

from ec_agents.agents.chat_model import CentroidChatModel
from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.middleware import EntropyCentroidMiddleware
from ec_agents.testing import Reply, ScriptedChatModel

N = 8
TOKENS = 400
PROFILE = "!..." * (TOKENS // 4)
INFO = {
    "batch_ingest_config": {
        "use_multipart_endpoint": False,
        "size_limit": 100,
        "size_limit_bytes": 20_000_000,
        "scale_up_nthreads_limit": 1,
        "scale_up_qsize_trigger": 1000,
        "scale_down_nempty_trigger": 4,
    }
}
"""What LangSmith's server would say of itself: one batch of JSON after the other is welcome."""


class LangSmith:
    """What was posted."""

    def __init__(self) -> None:
        self.posted = 0
        """Bytes."""
        self._runs: dict[str, dict[str, Any]] = {}
        self.client: Client

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The runs with what was added to them later, the outermost first."""
        return sorted(self._runs.values(), key=lambda run: run["dotted_order"])

    def take(self, body: bytes) -> None:
        self.posted += len(body)
        batch = json.loads(body)
        for run in [*batch.get("post", []), *batch.get("patch", [])]:
            self._runs.setdefault(run["id"], {}).update(run)


@pytest.fixture
def langsmith() -> Iterator[LangSmith]:
    """A local LangSmith that is told of everything."""
    seen = LangSmith()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(202)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - inherited
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        seen.client = Client(f"http://127.0.0.1:{server.server_port}", api_key="none", info=INFO)
        with tracing_context(enabled=True, client=seen.client):
            yield seen
        seen.client.close()
        server.shutdown()


def logprobs(value: Any) -> int:
    """How many log-probabilities there are at any depth: under their name, or as floats in a list."""
    if isinstance(value, dict):
        return ("logprob" in value) + sum(logprobs(found) for name, found in value.items() if name != "scores")
    if isinstance(value, list):
        return sum(isinstance(item, float) or logprobs(item) for item in value)
    return 0


def two_steps(n: int) -> ScriptedChatModel:
    return ScriptedChatModel(replies=[call_add(1, 2, PROFILE)] * n + [Reply(content="it is 3", profile=PROFILE)] * n)


AGENTS: dict[str, Callable[[], Any]] = {
    "graph": lambda: create_centroid_agent(two_steps(N), [add], n=N),
    "middleware": lambda: create_agent(two_steps(N), [add], middleware=[EntropyCentroidMiddleware(n=N)]),
}


async def posted_by(agent: Any, langsmith: LangSmith) -> int:
    state = await agent.ainvoke(ASK)
    assert state["messages"][-1].text == "it is 3"
    langsmith.client.flush()
    return langsmith.posted


@pytest.mark.parametrize("name", AGENTS)
async def test_runs(name: str, langsmith: LangSmith):
    """Every call of an agent is a run without log-probabilities."""
    await posted_by(AGENTS[name](), langsmith)
    kinds = Counter(run["run_type"] for run in langsmith.runs)
    assert (kinds["llm"], kinds["tool"]) == (2 * N, 1)
    assert sum(map(logprobs, langsmith.runs)) == 0
    # What is measured stays, packed: 12 bytes a token, 16 as text.
    for run in langsmith.runs:
        tokens = TOKENS if run["run_type"] == "llm" else 0
        assert len(json.dumps(run["outputs"])) < 16 * tokens + 24_000, run["name"]


async def test_n_calls_post_less_than_one_call_without_us(langsmith: LangSmith):
    theirs = await posted_by(create_agent(two_steps(1), [add]), langsmith)
    assert sum(map(logprobs, langsmith.runs)) > TOKENS
    both = await posted_by(AGENTS["graph"](), langsmith)
    assert both - theirs < theirs


async def test_a_chat_model_is_one_run(langsmith: LangSmith):
    await CentroidChatModel(two_steps(N), n=N).ainvoke("hi")
    langsmith.client.flush()
    [run] = langsmith.runs
    assert run["name"] == "CentroidChatModel"
    assert logprobs(run) == 0
    assert langsmith.posted < 20_000


async def test_its_candidates_are_children_if_that_is_wanted(langsmith: LangSmith):
    await CentroidChatModel(two_steps(N), n=N, trace_candidates=True).ainvoke("hi")
    langsmith.client.flush()
    outer, *inner = langsmith.runs
    assert [run["parent_run_id"] for run in inner] == [outer["id"]] * N
    assert sum(map(logprobs, langsmith.runs)) == 0
