"""What a step costs beside its model calls: CPU of the graph and the middleware, and what they write.

Run: ``python tests/benchmarks/bench_overhead.py [--repeats 25]``

The model answers at once, with 8 tokens for the CPU table. Every row of a table is measured in
the same run, the variants interleaved; numbers are medians of the CPU time of the process for one step.

Bars: the middleware at N=64 within 1.5 times the bare gather of the same calls; the database after 20 steps at N=8 no
larger than that of ``create_agent`` with one call, plus 60 kB a step.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from langchain.agents import create_agent
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from ec_agents import EntropyCentroidMiddleware, create_centroid_agent, message_candidate, select

CPU_BAR = 1.5
BYTES_BAR = 60_000
STEPS = 20
SIZES = (1, 8, 64)


class InstantModel(BaseChatModel):
    """Answers at once: ``steps - 1`` tool calls with a text each, then the end; with one after another of LOGPROBS."""

    tokens: int = 8
    steps: int = 1
    with_logprobs: bool = True

    @property
    def _llm_type(self) -> str:
        return "instant"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind(**{"tools": [convert_to_openai_tool(tool) for tool in tools], **kwargs})

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        done = sum(isinstance(message, ToolMessage) for message in messages)
        calls = [{"name": "look", "args": {"at": done}, "id": f"call_{done}"}] if done < self.steps - 1 else []
        metadata = {"logprobs": next(LOGPROBS[self.tokens])} if self.with_logprobs else {}
        message = AIMessage(TEXTS[self.tokens], tool_calls=calls, response_metadata=metadata)
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._generate(messages)


def random_logprobs(tokens: int, rng: np.random.Generator) -> dict[str, Any]:
    """Log-probabilities that no compression makes smaller, 20 alternatives a token."""
    rows = np.sort(np.log(rng.dirichlet(np.full(20, 0.2), tokens) + 1e-9))[:, ::-1].tolist()
    return {"content": [{"token": "t", "logprob": r[0], "top_logprobs": [{"logprob": x} for x in r]} for r in rows]}


def random_text(tokens: int, rng: np.random.Generator) -> str:
    return " ".join("".join(map(chr, rng.integers(97, 123, 4))) for _ in range(tokens))


RNG = np.random.default_rng(0)
LENGTHS = (50, 100, 200, 300, 500)
TEXTS = {tokens: random_text(tokens, RNG) for tokens in (8, *LENGTHS)}
LOGPROBS = {tokens: cycle([random_logprobs(tokens, RNG) for _ in range(16)]) for tokens in TEXTS}


def look(at: int) -> str:
    """Look at something."""
    return f"nothing at {at}"


def make_agent(kind: str, n: int, saver: Any, **model: Any) -> Any:
    if kind == "create_agent, one call":
        return create_agent(InstantModel(**model, with_logprobs=False), [look], checkpointer=saver)
    if kind == "graph":
        return create_centroid_agent(InstantModel(**model), [look], n=n, checkpointer=saver)
    ours = EntropyCentroidMiddleware(n=n, durable=kind == "middleware, durable")
    return create_agent(InstantModel(**model), [look], middleware=[ours], checkpointer=saver)


def config() -> Any:
    return {"configurable": {"thread_id": uuid.uuid4().hex}, "recursion_limit": 200}


def ask() -> Any:
    return {"messages": [HumanMessage("what do you see?")]}


async def gather(model: Any, n: int) -> list[AIMessage]:
    return await asyncio.gather(*(model.ainvoke(ask()["messages"]) for _ in range(n)))


async def gather_and_choose(model: Any, n: int) -> None:
    messages = await gather(model, n)
    select([message_candidate(message, index) for index, message in enumerate(messages)])


async def cpu_table(repeats: int) -> dict[tuple[str, int], float]:
    """Median CPU, seconds, of one step by variant and N."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        runs: dict[tuple[str, int], Callable[[], Awaitable[Any]]] = {}

        def runner(agent: Any) -> Callable[[], Awaitable[Any]]:
            return lambda: agent.ainvoke(ask(), config())

        bound = InstantModel().bind_tools([look], logprobs=True, top_logprobs=20)
        for n in SIZES:
            runs["bare gather", n] = lambda n=n: gather(bound, n)
            runs["bare gather, measured and chosen", n] = lambda n=n: gather_and_choose(bound, n)
            for place in ("", ", SQLite"):
                for kind in ("create_agent, one call", "graph", "middleware", "middleware, durable"):
                    if kind == "middleware, durable" and not place:
                        continue
                    path = f"{folder}/{uuid.uuid4().hex}.db"
                    saver = await stack.enter_async_context(AsyncSqliteSaver.from_conn_string(path)) if place else None
                    runs[kind + place, n] = runner(make_agent(kind, n, saver))
        taken: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
        for _ in range(repeats):
            for key, run in runs.items():
                start = time.process_time()
                await run()
                taken[key].append(time.process_time() - start)
    return {key: statistics.median(times[2:]) for key, times in taken.items()}


async def database_sizes(tokens: int) -> dict[str, int]:
    """Bytes of the SQLite file after a run of 20 steps at N=8, by variant."""
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("create_agent, one call", "graph", "middleware", "middleware, durable"):
            path = Path(folder) / f"{kind}.db"
            async with AsyncSqliteSaver.from_conn_string(str(path)) as saver:
                await make_agent(kind, 8, saver, tokens=tokens, steps=STEPS).ainvoke(ask(), config())
            sizes[kind] = path.stat().st_size
    return sizes


async def main(repeats: int) -> int:
    times = await cpu_table(repeats)
    print(f"CPU of one step, ms (times the bare gather), median of {repeats - 2}")
    print(f"{'':34}" + "".join(f"{f'N={n}':>16}" for n in SIZES))
    for name in dict.fromkeys(name for name, _ in times):
        cells = [f"{times[name, n] * 1e3:.2f} ({times[name, n] / times['bare gather', n]:.2f})" for n in SIZES]
        print(f"{name:34}" + "".join(f"{cell:>16}" for cell in cells))
    added: dict[str, list[float]] = {}
    for tokens in LENGTHS:
        sizes = await database_sizes(tokens)
        for kind, size in sizes.items():
            added.setdefault(kind, []).append((size - sizes["create_agent, one call"]) / STEPS)
    print(f"\nSQLite file after {STEPS} steps at N=8: kB a step more than with one call, by tokens a response")
    print(f"{'':34}" + "".join(f"{length:>8}" for length in LENGTHS))
    for kind, numbers in added.items():
        print(f"{kind:34}" + "".join(f"{number / 1e3:>+8.0f}" for number in numbers))
    ratio = times["middleware", 64] / times["bare gather", 64]
    bars = {
        f"middleware at N=64: {ratio:.2f} times the bare gather, bar {CPU_BAR}": ratio <= CPU_BAR,
        **{
            f"{kind}: {added[kind][-1] / 1e3:+.0f} kB a step at {LENGTHS[-1]} tokens, bar +60": added[kind][-1]
            <= BYTES_BAR
            for kind in ("graph", "middleware")
        },
    }
    print()
    for text, is_met in bars.items():
        print(f"{'met ' if is_met else 'MISSED'} {text}")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    raise SystemExit(asyncio.run(main(parser.parse_args().repeats)))
