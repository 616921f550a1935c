"""Time from log-probabilities to a score, for a short and a long text, against decoding the same payload from JSON."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from ec_agents.candidates import Candidate
from ec_agents.logprobs import pack_logprobs, token_signals
from ec_agents.scoring import CentroidScorer

SIZES, TOP_K = (20, 500), 20
REPEATS = 200


def choice(n_tokens: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = np.sort(np.log(rng.dirichlet(np.full(TOP_K, 0.2), n_tokens) + 1e-9))[:, ::-1].tolist()

    def token(rank: int, logprob: float) -> dict[str, Any]:
        return {"token": f"tok{rank}", "logprob": logprob, "bytes": list(f"tok{rank}".encode())}

    tokens = [[token(rank, logprob) for rank, logprob in enumerate(row)] for row in rows]
    content = [{**row[0], "top_logprobs": row} for row in tokens]
    return {"index": 0, "message": {"content": "…"}, "logprobs": {"content": content}, "finish_reason": "stop"}


def microseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


def compare(n_tokens: int) -> None:
    payload = choice(n_tokens)
    text = json.dumps(payload).encode()
    signals = token_signals(payload)
    packed = pack_logprobs(lambda: signals)
    works: dict[str, Callable[[], object]] = {
        "token_signals": lambda: token_signals(payload),
        "packing": lambda: pack_logprobs(lambda: signals),
        "unpacking": lambda: token_signals(packed),
        "unpacking, centroid": lambda: CentroidScorer()([Candidate(index=0, signals=token_signals(packed))]),
        "msgspec decode": lambda: msgspec.json.decode(text),
        "json decode": lambda: json.loads(text),
    }
    rounds = [[microseconds(work) for work in works.values()] for _ in range(REPEATS)]
    print(f"{n_tokens} tokens x {TOP_K} alternatives, {len(text) / 1e3:.0f} kB")
    for name, times in zip(works, zip(*rounds, strict=True), strict=True):
        print(f"{name:20} {statistics.median(times):9.1f} µs")


if __name__ == "__main__":
    for size in SIZES:
        compare(size)
