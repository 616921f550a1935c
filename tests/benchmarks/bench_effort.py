"""Accuracy against tokens: efforts and fixed N on recorded, graded answers.

    ec-agents eval solve --n 16 --limit 500 --out runs/solve16
    python tests/benchmarks/bench_effort.py runs/solve16 [--answer last-number] [--picture effort.svg]

The candidates of each task are replayed in the order in which they were drawn, so that no model is called. Differences
to fixed N = 8 are paired by task, with bootstrap intervals. Thresholds are not fitted here.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from ec_agents import Agree, Candidate, Effort, Escalate, MajorityVote, Selector, action_key, read_steps, select
from ec_agents.effort import replay_effort
from ec_agents.evaluation.stats import Resampling
from ec_agents.scoring import scorer_named

FIXED = (1, 2, 4, 8, 16)
CONFIDENCES = (0.8, 0.85, 0.9, 0.95)
ENTROPIES = (0.05, 0.1, 0.2, 0.3)


def last_number(candidate: Candidate) -> str | None:
    """Return the last number of a text, as a key for votes."""
    found = re.findall(r"-?\d[\d,]*\.?\d*", candidate.content)
    return found[-1].replace(",", "").rstrip(".") if found else None


KEYS: Mapping[str, Callable[[Candidate], str | None]] = {"action": action_key, "last-number": last_number}


def efforts(key: Callable[[Candidate], str | None], most: int) -> Iterator[tuple[str, Effort | int]]:
    """Yield what is compared."""
    yield from ((f"N = {n}", n) for n in FIXED if n <= most)
    yield from ((f"Agree({c:g})", Agree(confidence=c, key=key)) for c in CONFIDENCES)
    for entropy in ENTROPIES:
        yield f"Escalate(mean-entropy {entropy:g})", Escalate(threshold=entropy)
        yield (
            f"Escalate({entropy:g}) then Agree(0.85)",
            Escalate(threshold=entropy, then=Agree(confidence=0.85, key=key)),
        )


def read(run: Path) -> tuple[list[str], list[list[Candidate]], list[dict[int, bool]]]:
    """Return tasks, candidates and outcomes of a finished evaluation."""
    lines = map(msgspec.json.decode, (run / "outcomes.jsonl").read_bytes().split(b"\n")[:-1])
    right = {row["run"]: {int(i): bool(r) for i, r in row["right"].items()} for row in lines if row.get("right")}
    steps = [step for step in read_steps(run / "trace.jsonl") if len(right.get(step.run, {})) == len(step.candidates)]
    return [str(s.task) for s in steps], [list(s.candidates) for s in steps], [right[s.run] for s in steps]


def tokens(candidates: Sequence[Candidate]) -> int:
    """Return the output tokens of candidates."""
    return sum(c.usage["output_tokens"] if c.usage else c.signals.n_tokens if c.signals else 0 for c in candidates)


def main() -> None:
    """Print the table, and draw the picture if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--answer", choices=KEYS, default="action")
    parser.add_argument("--most", type=int, default=8, help="most candidates that an effort may draw")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    key = KEYS[given.answer]
    tasks, candidates, right = read(given.run)
    stats = Resampling(tasks, np.random.default_rng(0))
    selectors = {
        "majority, then mean entropy": Selector(scorer=MajorityVote(key, tie_break=scorer_named("mean-entropy"))),
        "mean-entropy": Selector(scorer=scorer_named("mean-entropy")),
        "centroid": Selector(),
    }
    print(f"{given.run}: {len(tasks)} tasks; efforts draw at most {given.most}")
    points: dict[str, list[tuple[str, float, float]]] = {}
    for name, selector in selectors.items():
        print(f"\n{name:44} {'drawn':>6} {'tokens':>7} {'of N=8':>7} {'right':>6}   points against N = 8")
        choose = partial(outcomes, candidates, right, selector)
        base, base_tokens, _ = choose(8, given.most)
        for label, effort in efforts(key, min(map(len, candidates))):
            hits, spent, drawn = choose(effort, given.most)
            gap = stats.mean(hits - base)
            low, high = (100 * gap.low, 100 * gap.high) if gap else (np.nan, np.nan)
            share, accuracy = spent.sum() / base_tokens.sum(), 100 * hits.mean()
            change = 100 * (hits - base).mean()
            print(
                f"{label:44} {drawn.mean():6.2f} {spent.mean():7.0f} {share:7.1%} {accuracy:6.1f}   "
                f"{change:+.1f} [{low:+.1f}, {high:+.1f}]"
            )
            points.setdefault(name, []).append((label, float(spent.mean()), float(accuracy)))
    if given.picture:
        draw(points, given.picture, f"{given.run.name}, {len(tasks)} tasks")


def outcomes(
    candidates: Sequence[Sequence[Candidate]],
    right: Sequence[Mapping[int, bool]],
    selector: Selector,
    effort: Effort | int,
    most: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each task whether the choice was right, the tokens spent and the candidates drawn."""
    rows: list[tuple[bool, int, int]] = []
    for drawable, truth in zip(candidates, right, strict=True):
        n = effort if isinstance(effort, int) else sum(replay_effort(effort, drawable[:most]))
        drawn = drawable[:n]
        rows.append((truth[select(drawn, selector).chosen], tokens(drawn), len(drawn)))
    hits, spent, counts = np.array(rows, dtype=float).T
    return hits, spent, counts


def draw(points: Mapping[str, Sequence[tuple[str, float, float]]], path: Path, title: str) -> None:
    """Draw accuracy over tokens, one panel per selector."""
    from matplotlib import pyplot as plt  # noqa: PLC0415 - an optional extra

    figure, panels = plt.subplots(1, len(points), figsize=(4.2 * len(points), 3.6), sharey=True, layout="constrained")
    for panel, (name, found) in zip(panels, points.items(), strict=True):
        fixed = [point for point in found if point[0].startswith("N =")]
        panel.plot([x for _, x, _ in fixed], [y for *_, y in fixed], "o-", color="0.5", label="fixed N")
        for kind, marker in (("Agree", "^"), ("Escalate(mean", "s"), ("Escalate(0", "d")):
            same = [point for point in found if point[0].startswith(kind)]
            label = {"Agree": "Agree", "Escalate(mean": "Escalate", "Escalate(0": "Escalate, then Agree"}[kind]
            panel.plot([x for _, x, _ in same], [y for *_, y in same], marker, label=label)
        panel.set(title=name, xlabel="output tokens per task", xscale="log")
    panels[0].set_ylabel("right, %")
    panels[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path)


if __name__ == "__main__":
    main()
