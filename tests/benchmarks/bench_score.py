"""Speed and memory of ``ec-agents score`` on a large file of raw responses, against a bare msgspec decode of it.

Run as ``python tests/benchmarks/bench_score.py [MEGABYTES]``. Each response has 8 choices of about 250 tokens with 20
alternatives. Every figure comes from a process of its own; memory is the highest resident size.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ec_agents.cli.score import DEFAULT_SCORERS, score_rows, write_file

TOP_K, CHOICES = 20, 8


def response(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "object": "chat.completion",
        "choices": [choice(rng, i, int(rng.integers(50, 450))) for i in range(CHOICES)],
    }


def choice(rng: np.random.Generator, index: int, n_tokens: int) -> dict[str, Any]:
    rows = np.sort(np.log(rng.dirichlet(np.full(TOP_K, 0.2), n_tokens) + 1e-9))[:, ::-1].tolist()

    def token(rank: int, logprob: float) -> dict[str, Any]:
        return {"token": f"tok{rank}", "logprob": logprob, "bytes": list(f"tok{rank}".encode())}

    tokens = [[token(rank, logprob) for rank, logprob in enumerate(row)] for row in rows]
    content = [{**row[0], "top_logprobs": row} for row in tokens]
    message = {"role": "assistant", "content": f"The answer of candidate {index} is {rng.integers(100)}."}
    return {"index": index, "message": message, "logprobs": {"content": content}, "finish_reason": "stop"}


def generate(path: Path, megabytes: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("w") as out:
        while out.tell() < megabytes * 1e6:
            out.write(json.dumps(response(rng)) + "\n")


def decode(path: Path) -> None:
    decoder = msgspec.json.Decoder()
    with path.open("rb") as lines:
        for line in lines:
            decoder.decode(line)


def score(path: Path) -> None:
    write_file(path.with_suffix(".csv"), score_rows(path), DEFAULT_SCORERS)


def measure(work: str, path: Path) -> None:
    """Do the work and print seconds, CPU seconds and the highest resident size in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    {"decode": decode, "score": score}[work](path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps([time.perf_counter() - start, cpu, after.ru_maxrss / 1e3]))


def main(megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for size in (megabytes // 5, megabytes):
            path = Path(folder) / f"{size}.jsonl"
            generate(path, size)
            decode(path)  # once, so that both find the file in the page cache
            print(
                f"{path.stat().st_size / 1e6:.0f} MB, {sum(1 for _ in path.open('rb'))} responses of {CHOICES} choices"
            )
            cpu: dict[str, float] = {}
            for work in ("decode", "score", "decode", "score"):
                out = subprocess.run([sys.executable, __file__, work, str(path)], check=True, capture_output=True)
                seconds, now, peak = json.loads(out.stdout)
                cpu[work] = min(now, cpu.get(work, now))
                print(
                    f"  {work:6} {seconds:6.1f} s wall, {now:6.1f} s CPU, {size / now:5.1f} MB/s, peak {peak:4.0f} MB"
                )
            print(
                f"  score runs at {cpu['decode'] / cpu['score']:.2f} of the speed of the bare decode (best CPU times)"
            )
            path.unlink()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else 200)
