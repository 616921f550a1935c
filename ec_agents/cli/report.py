"""``ec-agents report``: a trace or an evaluation as a page, tables or charts."""

from importlib import import_module
from itertools import islice
from pathlib import Path

from ec_agents.errors import ConfigError
from ec_agents.evaluation.html import write_evaluation_report, write_trace_report
from ec_agents.evaluation.markdown import write_markdown
from ec_agents.evaluation.table import load_evaluation
from ec_agents.trace import read_steps

FORMS = (".html", ".htm", ".md")


def write_report(source: Path, out: Path, *, limit: int, phases: str, plots: Path | None) -> list[Path]:
    """Write the report, and the charts if ``plots`` is a folder.

    Args:
        source: A trace, an ``evaluation.json``, or the directory of an evaluation.
        out: The file.
        limit: Most steps of a trace; 0 for all.
        phases: Preset of the phases.
        plots: Folder of the charts.

    Returns:
        The files written.

    Raises:
        ConfigError: The file name has another suffix, or the options fit evaluations only.
        TraceError: The trace cannot be read.
        WriteError: A file cannot be written.
    """
    if out.suffix not in FORMS:
        raise ConfigError(f"--out must end in .html or .md; found {out.name!r}")
    source = _found(source)
    if not source.name.endswith("evaluation.json"):
        if plots is not None or out.suffix == ".md":
            raise ConfigError("--plots and .md files need an evaluation; give its evaluation.json or its directory")
        steps = islice(read_steps(source), limit or None)
        write_trace_report(steps, out, title=source.name, phases=phases)
        return [out]
    evaluation, title = load_evaluation(source), source.parent.resolve().name
    write = write_markdown if out.suffix == ".md" else write_evaluation_report
    write(evaluation, out, title=title)
    if plots is None:
        return [out]
    return [out, *import_module("ec_agents.evaluation.plots").write_plots(evaluation, plots)]


def _found(source: Path) -> Path:
    """The file to show, of a directory its evaluation or its trace."""
    if not source.is_dir():
        return source
    for name in ("evaluation.json", "trace.jsonl", "trace.jsonl.zst"):
        if (source / name).exists():
            return source / name
    raise ConfigError(f"{source} has neither evaluation.json nor trace.jsonl; give the directory of an evaluation")
