"""Time of thresholds, phases and centroid against the one np.percentile call that they cannot do without."""

import statistics
import time
from collections.abc import Callable

import numpy as np

from ec_agents.entropy import PRESETS, entropy_centroid, high_entropy_phases

N_TOKENS = 32_768
REPEATS = 200


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(name: str, entropies: np.ndarray) -> None:
    config = PRESETS["paper"]
    percents = (100.0 - config.top_percent, config.bottom_percent)

    def ours() -> float:
        return entropy_centroid(high_entropy_phases(entropies, config), len(entropies))

    def one_percentile() -> np.ndarray:
        return np.percentile(entropies, percents)

    pairs = [(seconds(ours), seconds(one_percentile)) for _ in range(REPEATS)]
    mine, base = (statistics.median(times) for times in zip(*pairs, strict=True))
    n_phases = len(high_entropy_phases(entropies, config))
    times = f"{mine * 1e3:7.3f} ms   percentile {base * 1e3:7.3f} ms   ratio {mine / base:5.2f}"
    print(f"{name:10} {n_phases:6} phases   {times}")


def main() -> None:
    rng = np.random.default_rng(0)
    random = rng.gamma(0.3, 0.6, N_TOKENS)
    bursts = np.where(np.sin(np.arange(N_TOKENS) / 40.0) > 0.9, 5.0, 0.2)
    with_missing = np.where(rng.random(N_TOKENS) < 0.01, np.nan, random)
    compare("random", random)
    compare("bursty", random * bursts)
    compare("constant", np.full(N_TOKENS, 0.5))
    compare("1% missing", with_missing)


if __name__ == "__main__":
    main()
