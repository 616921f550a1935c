"""The package as a whole: its public names, and what importing it costs."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ec_agents

PACKAGE = Path(ec_agents.__file__).parent
STUBS = sorted(PACKAGE.rglob("__init__.pyi"))
FRAMEWORKS = ("langchain_core", "langgraph", "openai", "asyncio", "pydantic")


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def names_in(stub: Path) -> dict[str, str]:
    """The public names that a stub lists, each with the module it comes from."""
    imports = [node for node in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in imports for alias in node.names), "re-exports are `x as x`"
    return {alias.name: str(node.module) for node in imports for alias in node.names}


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.parent.name)
def test_public_names(stub: Path):
    """What type checkers read in a stub is what the package gives at run time, name by name."""
    package = importlib.import_module(".".join(stub.parent.relative_to(PACKAGE.parent).parts))
    names = names_in(stub)
    assert set(dir(package)) == set(names)
    for name, module in names.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


def test_star_import_leaves_out_what_needs_an_extra():
    assert set(ec_agents.__all__) == names_in(PACKAGE / "__init__.pyi").keys() - {"EntropyCentroidMiddleware"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = ec_agents.nonsense  # type: ignore[attr-defined]


def test_the_bare_import_loads_next_to_nothing():
    assert not {"numpy", *FRAMEWORKS} & modules_after("import ec_agents")


def test_the_numbers_know_no_framework():
    assert not set(FRAMEWORKS) & modules_after("from ec_agents import select, token_signals, entropy_centroid")


def test_sampling_needs_no_agent_framework():
    """``sample`` and ``select`` load neither LangGraph nor LangChain; four fifths of their import time."""
    loaded = modules_after("from ec_agents import Agree, SamplingPolicy, as_candidate, sample, select")
    assert not set(FRAMEWORKS) - {"asyncio"} & loaded


def test_the_command_line_names_the_extra_that_it_needs():
    code = "import sys; sys.modules['typer'] = None; import ec_agents.cli.main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'ec-agents[cli]'" in done.stderr


def test_functions_are_short_and_modules_are_not_long():
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= 500, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1 - (ast.get_docstring(node) or "").count("\n")
                assert lines <= 62, f"{path.name}: {node.name} has {lines} lines"
