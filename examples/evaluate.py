"""Does selection help on these tasks? Sample once, grade every response, replay every selector; offline, in seconds."""

import asyncio
import tempfile
from pathlib import Path

from ec_agents import Selector, scorer_named
from ec_agents.evaluation import (
    EvalRun,
    EvalSettings,
    check_embedded,
    embedded_model,
    read_tasks,
    write_evaluation_report,
)

SELECTORS = ("centroid", "centroid-short", "mean-entropy", "shortest", "majority-then-centroid")


def main() -> None:
    """Evaluate five selectors on twelve puzzles."""
    folder = Path(tempfile.mkdtemp())
    run = EvalRun(
        settings=EvalSettings(tasks="solve", agent="embedded", n=6, seed_calls=True),
        tasks=read_tasks("solve", limit=12)[0],
        factory=embedded_model,
        check=check_embedded,
        selectors={name: Selector(scorer=scorer_named(name)) for name in SELECTORS},
        out=folder,
    )
    asyncio.run(run.run())
    evaluation = run.evaluation(prices=(0.15, 0.60))
    for row in evaluation.rows:
        right = row.accuracy
        print(f"{row.selector:24} {right.value:.0%} right [{right.low:.0%}, {right.high:.0%}]")
    write_evaluation_report(evaluation, folder / "report.html")
    print(folder / "report.html")


if __name__ == "__main__":
    main()
