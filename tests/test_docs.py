"""The documentation: code runs and prints what it says, imports are public, links and tables hold."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.processes import run

from ec_agents.testing import FAULTS

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
CODE = re.compile(r"^```python( no-run)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"^prints\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
WINGS = ("agents", "servers", "evaluation", "scoring", "embedded", "testing")
PUBLIC = ("ec_agents", *(f"ec_agents.{wing}" for wing in WINGS))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_ports(text: str) -> str:
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)


def printed_by(code: str) -> str:
    done = run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_code_blocks(page: Path):
    """The blocks of a page run in one process, top to bottom, and print what the page says they print."""
    blocks = [code for no_run, code in CODE.findall(text_of(page)) if not no_run]
    if not blocks:
        pytest.skip("no code to run")
    printed = without_ports(printed_by("\n".join(blocks)))
    for output in OUTPUT.findall(text_of(page)):
        assert without_ports(output) in printed


def test_readme_without_the_middleware():
    """Without the middleware, the model of the README's example does what the README says."""
    [code] = [code for _, code in CODE.findall(text_of(ROOT / "README.md")) if "EntropyCentroidMiddleware(n=8)" in code]
    printed = printed_by(code.replace("middleware=[EntropyCentroidMiddleware(n=8)]", "middleware=[]"))
    assert "'72-13'" in printed
    assert printed.rstrip().endswith("answer 59")


@pytest.mark.parametrize("example", EXAMPLES, ids=names(EXAMPLES))
def test_examples(example: Path):
    assert printed_by(text_of(example))


@pytest.mark.parametrize("path", [*PAGES, *EXAMPLES], ids=names([*PAGES, *EXAMPLES]))
def test_public_imports(path: Path):
    """Documentation and examples import nothing but the public packages of ours."""
    code = text_of(path) if path.suffix == ".py" else "\n".join(code for _, code in CODE.findall(text_of(path)))
    nodes = list(ast.walk(ast.parse(code)))
    imported = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {name for name in imported if name.split(".")[0] == "ec_agents"} <= set(PUBLIC)


def test_api_reference():
    """Every public name is in the reference, once, and each entry exists."""
    pages = "".join(text_of(page) for page in ROOT.glob("docs/api/*.md"))
    entries = re.findall(r"^\.\. (?:auto\w+|py:data):: (ec_agents[\w.]*)\.(\w+)$", pages, re.MULTILINE)
    assert [entry for entry in entries if not hasattr(importlib.import_module(entry[0]), entry[1])] == []
    documented = [name for _, name in entries]
    public = {name for package in PUBLIC for name in exported(package)}
    assert sorted(documented) == sorted(public)


def exported(package: str) -> list[str]:
    """The public names of a package, of those that need an extra too."""
    stub = ROOT / package.replace(".", "/") / "__init__.pyi"
    if stub.exists():
        imports = [node for node in ast.parse(text_of(stub)).body if isinstance(node, ast.ImportFrom)]
        return [alias.name for node in imports for alias in node.names]
    tree = ast.parse(text_of(ROOT / package.replace(".", "/") / "__init__.py"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    everything = [alias.name for node in imports for alias in node.names]
    return getattr(importlib.import_module(package), "__all__", everything)


def test_module_map():
    """The map for contributors has a row for each module of the core and for each wing, and no others."""
    modules = {path.stem for path in ROOT.glob("ec_agents/[a-z]*.py")}
    wings = {f"{path.parent.name}/" for path in ROOT.glob("ec_agents/*/__init__.py")}
    rows = re.findall(r"^\| `([a-z_]+/?)` \|", text_of(ROOT / "docs/contributing.md"), re.MULTILINE)
    assert sorted(rows) == sorted(modules | wings)


def test_faults():
    """The table of faults has a row for each fault that the server knows."""
    rows = re.findall(r"^\| `(\w+)` \|", text_of(ROOT / "docs/testing.md"), re.MULTILINE)
    assert rows == list(FAULTS)


def test_traps():
    """Each trap of the list has a test of its number."""
    listed = re.findall(r"^(\d+)\. ", text_of(ROOT / "docs/traps.md"), re.MULTILINE)
    tests = re.findall(r"^(?:async )?def test_trap_(\d+)", text_of(ROOT / "tests/agents/test_traps.py"), re.MULTILINE)
    assert listed == tests


def test_troubleshooting():
    """Each message that the page explains is one that the package can give; ``…`` stands for what varies."""
    source = "".join(text_of(path) for path in sorted(ROOT.glob("ec_agents/**/*.py")))
    source += text_of(ROOT / "ec_agents/servers/providers.toml")
    source = re.sub(r"\"\s*\n\s*f?\"", "", source)
    messages = re.findall(r"^### `(.*)`$", text_of(ROOT / "docs/troubleshooting.md"), re.MULTILINE)
    patterns = {message: re.escape(message).replace("…", r"\{[^{}]*\}") for message in messages}
    assert [message for message, pattern in patterns.items() if not re.search(pattern, source)] == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links(page: Path):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_ci_runs_the_readme_command():
    """CI runs the test command of the README word for word, and not the demo's."""
    pattern = re.search(r"grep -m1 -E '([^']+)' README\.md", text_of(ROOT / ".ci" / "run"))
    assert pattern
    commands = re.findall(r"^python3 -m venv .*$", text_of(ROOT / "README.md"), re.MULTILINE)
    assert [bool(re.match(pattern[1], command)) for command in commands] == [False, True]
