"""Whatever a model or a server wrote, the terminal shows text and obeys nothing."""

import io
import logging
import unicodedata

import pytest
from hypothesis import given, strategies as st
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ec_agents.cli.terminal import Terminal, log_printable, one_line, printable, say

ATTACKS = [
    "\x1b]0;title\x07",
    "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "\x1b[2J\x1b[1;1H",
    "\x9b31m",
    "\x9d0;title\x9c",
    "safe\rrm -rf /",
    "abc\u202efdp.exe",
    "\u2066hidden\u2069",
    "a\u200bb\ufeff",
    "\u2028\u2029",
    "\x08\x08\x7f",
    "\U000e0041",
]


@given(st.text())
def test_nothing_unsafe_is_left(text: str):
    """Of control and format characters, only line feeds, tabs and the joiners of scripts and emoji are left."""
    left = {c for c in printable(text) if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"}}
    assert left <= {"\n", "\t"}
    bidi = {c for c in printable(text) if unicodedata.bidirectional(c) in {"RLO", "LRO", "RLE", "LRE", "RLI", "LRI"}}
    assert not bidi


@pytest.mark.parametrize("text", ["漢字 ünï", "👩‍👩‍👧", "می‌خواهم", "a\tb\nc", ""])
def test_ordinary_text_is_unchanged(text: str):
    assert printable(text) == text


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_way_to_print(attack: str, capsys: pytest.CaptureFixture[str]):
    """Text, tables, rules, markup and plain strings: the console filters them all, and keeps its own colours."""
    out = io.StringIO()
    console = Terminal(file=out, width=200, force_terminal=True, color_system="standard")
    table = Table(title=attack)
    table.add_column(attack)
    table.add_row(Text(attack, "red"), style="bold")
    for shown in (attack, Text("colour", "red"), f"[link=http://evil]{attack}[/link]", Text(attack), table):
        console.print(shown)
    console.rule(Text(attack))
    with Progress(console=console, transient=True) as progress:
        progress.add_task("running", total=1)
    assert "\x1b[31mcolour" in out.getvalue()
    assert attack not in out.getvalue()
    assert "[link=http://evil]" in out.getvalue()
    assert not set(attack) & set(out.getvalue()) & set("\x9b\x9d\x9c\x08\x07\u202e\u2066\u200b\u2028\U000e0041")
    say(attack)
    assert capsys.readouterr().out == printable(attack) + "\n"


def test_say_does_not_wrap(capsys: pytest.CaptureFixture[str]):
    say("word " * 100)
    assert capsys.readouterr().out == "word " * 100 + "\n"


def test_one_line():
    assert one_line("a\nb \x1b[31m\r\n c") == "a b �[31m� c"


def test_warnings_are_filtered(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    log_printable()
    logging.getLogger("ec_agents.x").warning("server said %s", "\x1b]0;title\x07")
    assert capsys.readouterr().err == "server said �]0;title�\n"
