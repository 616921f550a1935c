"""Cost of N answers with log-probabilities: this package, a bare loop, and others, on the same bytes.

Every client runs in a process of its own against one local server. ``floor`` is the least that anybody has to do:
aiohttp reads the body, msgspec decodes the numbers, numpy computes the entropies. Rows of packages that are not
installed are left out.

    python tests/benchmarks/bench_client.py [rounds [row ...]]
"""

# ruff: noqa: PLC0415 - a client pays only for what it imports
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import asyncio
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import msgspec
import numpy as np

TOP_K = 20
ROWS = {
    "floor": "aiohttp",
    "ours": "openai",
    "ours, n=N": "openai",
    "fast_logprobs(ChatOpenAI)": "langchain_openai",
    "its_hub": "its_hub",
    "AsyncOpenAI": "openai",
    "ChatOpenAI.abatch": "langchain_openai",
}
CASES = (("127.0.0.1", 64, 500, 0.0), ("localhost", 64, 500, 0.2), ("127.0.0.1", 8, 2000, 0.0))
FEW = 8
"""With more answers than this, stalls are not measured."""
SLOW = ("AsyncOpenAI", "ChatOpenAI.abatch", "its_hub")
"""Measured in one round."""
TITLES = ("CPU ms/response", "wall s", "peak MB", "rise MB", "stall ms")
MESSAGES = [{"role": "user", "content": "hi"}]

Step = Callable[[int], Awaitable[Any]]


def body(n_tokens: int, n: int = 1) -> bytes:
    """A chat completion with n choices, TOP_K alternatives a token, with bytes."""
    rng = np.random.default_rng(0)
    rows = np.sort(np.log(rng.dirichlet(np.full(TOP_K, 0.2), n_tokens) + 1e-9))[:, ::-1].tolist()

    def token(rank: int, logprob: float) -> dict[str, Any]:
        return {"token": f"tok{rank}", "logprob": logprob, "bytes": list(b"tok%d" % rank)}

    tokens = [[token(rank, logprob) for rank, logprob in enumerate(row)] for row in rows]
    content = [{**row[0], "top_logprobs": row} for row in tokens]
    message = {"role": "assistant", "content": "word " * n_tokens}
    choice = {"index": 0, "message": message, "logprobs": {"content": content}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": n_tokens * n, "total_tokens": 10 + n_tokens * n}
    head = {"id": "x", "object": "chat.completion", "created": 0, "model": "any", "choices": [], "usage": usage}
    choices = b",".join([json.dumps(choice).encode()] * n)
    return json.dumps(head).encode().replace(b"[]", b"[" + choices + b"]")


async def serve(n_tokens: int, latency: float) -> None:
    from aiohttp import web

    bodies: dict[int, bytes] = {1: body(n_tokens)}

    async def chat(request: web.Request) -> web.Response:
        n = (await request.json()).get("n") or 1
        if n not in bodies:
            bodies[n] = body(n_tokens, n)
        await asyncio.sleep(latency)
        return web.Response(body=bodies[n], content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def floor(url: str) -> tuple[Step, Callable[[], Awaitable[Any]]]:
    import aiohttp

    from ec_agents.entropy import token_entropies

    alternative = msgspec.defstruct("alternative", [("logprob", float)], gc=False)
    token = msgspec.defstruct("token", [("top_logprobs", list[alternative])], gc=False)
    logprobs = msgspec.defstruct("logprobs", [("content", list[token])])
    choice = msgspec.defstruct("choice", [("logprobs", logprobs)])
    decoder = msgspec.json.Decoder(msgspec.defstruct("response", [("choices", list[choice])]))
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def one() -> Any:
        async with session.post(f"{url}/chat/completions", json={"model": "any", "messages": MESSAGES}) as answer:
            tokens = decoder.decode(await answer.read()).choices[0].logprobs.content
        return token_entropies(np.array([[a.logprob for a in token.top_logprobs] for token in tokens]))

    return lambda n: asyncio.gather(*[one() for _ in range(n)]), session.close


def ours(url: str, fan_out: Any) -> tuple[Step, Callable[[], Awaitable[Any]]]:
    from ec_agents.servers.openai_chat_model import OpenAIChatModel

    return scored(OpenAIChatModel(model="any", base_url=url, api_key="none", fan_out=fan_out))


def scored(model: Any) -> tuple[Step, Callable[[], Awaitable[Any]]]:
    """The model's N answers, drawn as agents draw them, as candidates ranked by their centroids."""
    from ec_agents.agents.quiet_model import sampling_model
    from ec_agents.messages import message_candidate
    from ec_agents.sampling import sample
    from ec_agents.scoring import CentroidScorer

    asking = sampling_model(model, top_logprobs=TOP_K)

    async def step(n: int) -> Any:
        drawn = await sample(lambda _: asking.ainvoke("hi"), n=n, parse=message_candidate)
        return CentroidScorer()(drawn.candidates)

    return step, nothing


async def nothing() -> None: ...


def fast(url: str) -> tuple[Step, Callable[[], Awaitable[Any]]]:
    from langchain_openai import ChatOpenAI

    from ec_agents.servers.fast_logprobs import fast_logprobs

    return scored(fast_logprobs(ChatOpenAI(model="any", base_url=url, api_key="none")))


def async_openai(url: str) -> tuple[Step, Callable[[], Awaitable[Any]]]:
    import openai

    client = openai.AsyncOpenAI(base_url=url, api_key="none")
    create = client.chat.completions.create
    asked: Any = {"model": "any", "messages": MESSAGES, "logprobs": True, "top_logprobs": TOP_K}
    return lambda n: asyncio.gather(*[create(**asked) for _ in range(n)]), client.close


def abatch(url: str) -> tuple[Step, Callable[[], Awaitable[Any]]]:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="any", base_url=url, api_key="none", logprobs=True, top_logprobs=TOP_K)
    return lambda n: model.abatch(["hi"] * n), nothing


def its_hub(url: str) -> tuple[Step, Callable[[], Awaitable[Any]]]:
    from its_hub.api.types import ChatMessage  # pyright: ignore[reportMissingImports]
    from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel  # pyright: ignore[reportMissingImports]
    from its_hub.core.orchestrator import LMOrchestrator  # pyright: ignore[reportMissingImports]

    model = OpenAICompatibleLanguageModel(endpoint=url, api_key="none", model_name="any")
    messages = [ChatMessage(role="user", content="hi")]
    return lambda n: LMOrchestrator(max_concurrency=-1).agenerate(model, [messages] * n), model.close


CLIENTS: dict[str, Callable[[str], tuple[Step, Callable[[], Awaitable[Any]]]]] = {
    "floor": floor,
    "ours": lambda url: ours(url, "requests"),
    "ours, n=N": lambda url: ours(url, "n"),
    "fast_logprobs(ChatOpenAI)": fast,
    "its_hub": its_hub,
    "AsyncOpenAI": async_openai,
    "ChatOpenAI.abatch": abatch,
}


async def longest_stall(step: Awaitable[Any]) -> float:
    """Longest time in which the event loop ran nothing else, seconds."""
    longest, last = 0.0, time.perf_counter()
    task = asyncio.ensure_future(step)
    while not task.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    await task
    return longest


async def measure(name: str, url: str, n: int, rounds: int) -> dict[str, float]:
    step, close = CLIENTS[name](url)
    await step(1)
    resting = rss()
    await step(min(n, FEW))
    cpu, wall = list[float](), list[float]()
    for _ in range(rounds):
        busy, start = time.process_time(), time.perf_counter()
        await step(n)
        cpu.append(time.process_time() - busy)
        wall.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    stall = [await longest_stall(step(n)) for _ in range(rounds if n <= FEW else 0)]
    await close()
    median = statistics.median
    times = {"cpu": median(cpu) / n, "wall": median(wall), "stall": median(stall or [0])}
    return {**times, "peak": peak, "rise": peak - resting}


def rss() -> float:
    """Resident memory now, MB."""
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20


def run(name: str, url: str, n: int, rounds: int) -> dict[str, float] | None:
    """What one client needs, measured in a process of its own."""
    command = [sys.executable, __file__, "client", name, url, str(n), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def main(rounds: int, rows: list[str]) -> None:
    names = [name for name in rows or ROWS if importlib.util.find_spec(ROWS[name])]
    for host, n, n_tokens, latency in CASES:
        command = [sys.executable, __file__, "serve", str(n_tokens), str(latency)]
        size = f"{n_tokens} tokens x {TOP_K} alternatives ({len(body(n_tokens)) / 1e3:.0f} kB)"
        print(f"\nN={n}, {size}, {latency * 1e3:.0f} ms, {host}")
        print(f"{'':26}" + "".join(f"{title:>17}" for title in TITLES), flush=True)
        base: dict[str, float] | None = None
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            url = f"http://{host}:{server.stdout.readline().strip()}/v1"
            for name in names:
                found = run(name, url, n, 1 if name in SLOW else rounds)
                base = base or found
                if found and base:
                    print(row(name, found, base), flush=True)
            server.terminate()


def row(name: str, found: dict[str, float], base: dict[str, float]) -> str:
    """One line of the table; in brackets, how many times the first row."""
    columns = (("cpu", 1e3, 2), ("wall", 1.0, 3), ("peak", 1.0, 0), ("rise", 1.0, 0), ("stall", 1e3, 0))
    cells = [f"{found[key] * unit:8.{digits}f} ({found[key] / (base[key] or 1):5.2f})" for key, unit, digits in columns]
    return f"{name:26}" + "".join(cells)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", n_tokens, latency]:
            asyncio.run(serve(int(n_tokens), float(latency)))
        case ["client", name, url, n, rounds]:
            print(json.dumps(asyncio.run(measure(name, url, int(n), int(rounds)))))
        case [*rest]:
            main(int(rest[0]) if rest else 3, rest[1:])
