"""The documentation: every block of code runs, README says what the modules say, links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_block_of_code_runs(page: Path):
    """All blocks of a page run in one process, top to bottom, as a reader would type them."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    if not blocks:
        pytest.skip("no code to run")
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=names(EXAMPLES))
def test_every_example_runs(example: Path):
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_module_map():
    """The map for contributors has a row for each module of the core and for each wing, and no others."""
    modules = {path.stem for path in ROOT.glob("ec_agents/[a-z]*.py")}
    wings = {f"{path.parent.name}/" for path in ROOT.glob("ec_agents/*/__init__.py")}
    rows = re.findall(
        r"^\| `([a-z_]+/?)` \|", (ROOT / "docs/contributing.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(rows) == sorted(modules | wings)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_to_files_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_ci_runs_the_test_command_of_the_readme_word_for_word():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -m1 -E '([^']+)' README\.md", script)
    assert pattern
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    assert [bool(re.match(pattern[1], command)) for command in commands] == [False, True]
