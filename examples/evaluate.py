"""Does choosing help on these tasks? Draw once, grade every answer, replay every selector. Runs offline in seconds."""

import asyncio
import tempfile
from pathlib import Path

from rich.console import Console

from ec_agents import Selector
from ec_agents.cli.evaluate import table_of
from ec_agents.evaluation.factories import embedded_model
from ec_agents.evaluation.html import write_evaluation_report
from ec_agents.evaluation.run import EvalRun, EvalSettings
from ec_agents.evaluation.tasks import check_embedded, read_tasks
from ec_agents.scoring import scorer_named

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
    Console().print(table_of(evaluation))
    write_evaluation_report(evaluation, folder / "report.html")
    print(folder / "report.html")


if __name__ == "__main__":
    main()
