"""The package as a whole: its public names, and what importing it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ec_agents

PACKAGE = Path(ec_agents.__file__).parent
FRAMEWORKS = ("langchain_core", "langgraph", "openai", "asyncio", "pydantic")


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_every_public_name_can_be_had():
    for name in ec_agents.__all__:
        assert getattr(ec_agents, name) is not None
    assert set(ec_agents.__all__) <= set(dir(ec_agents))


def test_type_checkers_see_the_same_names():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    found = {
        (alias.asname, node.module) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert found == {(name, f"ec_agents.{ec_agents._HOME_OF[name]}") for name in ec_agents.__all__}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = ec_agents.nonsense  # type: ignore[attr-defined]


def test_the_bare_import_loads_next_to_nothing():
    assert not {"numpy", *FRAMEWORKS} & modules_after("import ec_agents")


def test_the_numbers_know_no_framework():
    assert not set(FRAMEWORKS) & modules_after("from ec_agents import select, token_signals, entropy_centroid")


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
