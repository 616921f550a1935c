"""Time of token_signals on 500 tokens with 20 alternatives, against decoding the same payload from JSON."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from ec_agents.logprobs import token_signals

N_TOKENS, TOP_K = 500, 20
REPEATS = 50


def choice() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = np.sort(np.log(rng.dirichlet(np.full(TOP_K, 0.2), N_TOKENS) + 1e-9))[:, ::-1].tolist()

    def token(rank: int, logprob: float) -> dict[str, Any]:
        return {"token": f"tok{rank}", "logprob": logprob, "bytes": list(f"tok{rank}".encode())}

    tokens = [[token(rank, logprob) for rank, logprob in enumerate(row)] for row in rows]
    content = [{**row[0], "top_logprobs": row} for row in tokens]
    return {"index": 0, "message": {"content": "…"}, "logprobs": {"content": content}, "finish_reason": "stop"}


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    payload = choice()
    text = json.dumps(payload).encode()
    works: dict[str, Callable[[], object]] = {
        "token_signals": lambda: token_signals(payload),
        "msgspec decode": lambda: msgspec.json.decode(text),
        "json decode": lambda: json.loads(text),
    }
    rounds = [[milliseconds(work) for work in works.values()] for _ in range(REPEATS)]
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    print(f"{N_TOKENS} tokens x {TOP_K} alternatives, {len(text) / 1e3:.0f} kB")
    for name, median in zip(works, medians, strict=True):
        print(f"{name:15} {median:7.2f} ms   token_signals takes {medians[0] / median:5.2f} of it")


if __name__ == "__main__":
    main()
