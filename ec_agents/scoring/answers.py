"""Answers inside longer texts: what a vote compares, so that two derivations of one result stand together."""

import ast
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any, cast

from ec_agents.candidates import Candidate
from ec_agents.scoring.base import Scorer
from ec_agents.scoring.votes import Key, MajorityVote, action_key

Extract = Callable[[str], str | None]
"""Text of a response → its answer in canonical form; None = it holds none, and the candidate abstains."""

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?:\s*/\s*[1-9]\d*)?"
)
_BOX = "\\boxed{"
_CHOICE = re.compile(
    r"(?i:answer|option|choice)(?:\s+(?i:is))?\s*[:=]?\s*\**\s*\(?([A-Z])\)?(?![\w'\u2019])"
    r"|\(([A-Z])\)|^\W*([A-Z])\W*$",
    re.MULTILINE,
)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_LABEL = re.compile(r"(?i)^(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s*")


@lru_cache(4096)
def last_number(text: str) -> str | None:
    """The last number of a text in one spelling: ``1,200.50`` is ``1200.5``, ``3/4`` stays a fraction."""
    found = [match.group() for match in _NUMBER.finditer(text)]
    return None if not found else _plain_number(found[-1])


def _plain_number(text: str) -> str | None:
    top, _, bottom = text.replace(",", "").partition("/")
    try:
        value = Decimal(top.strip())
        if bottom:
            return str(Fraction(value) / int(bottom))
        if not value or not -30 < value.adjusted() < 30:  # a long row of zeros helps nobody
            return str(value.normalize()) if value else "0"
        return f"{value.normalize():f}"
    except (InvalidOperation, ValueError, OverflowError):
        return None


@lru_cache(4096)
def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{…}``, without spaces."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOX)
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return "".join(text[begin:place].split()) or None
    return None


@lru_cache(4096)
def choice(text: str) -> str | None:
    """The last option that a text names, as a letter: ``(B)``, ``Answer: B``, or ``B`` on a line."""
    found = [next(filter(None, match.groups())) for match in _CHOICE.finditer(text)]
    return found[-1] if found else None


@lru_cache(4096)
def last_line(text: str) -> str | None:
    """The last line that is not empty, in lower case, single-spaced, without emphasis or a label such as "Answer:"."""
    lines = [plain for line in text.splitlines() if (plain := " ".join(line.replace("*", "").casefold().split()))]
    return _LABEL.sub("", lines[-1]).rstrip(".") or None if lines else None


def code_block(text: str) -> str:
    """The first fenced block of a text; the whole text if it has none."""
    found = _FENCE.search(text)
    return text if found is None else found.group(1)


@lru_cache(4096)
def code(text: str) -> str | None:
    """The first code block as a Python program without comments, docstrings and layout; otherwise single-spaced."""
    source = code_block(text)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return " ".join(source.split()) or None
    for node in ast.walk(tree):
        body: Any = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(cast("list[Any]", body)[0]):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree) or None


def _is_text(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


ANSWERS: Mapping[str, Extract] = {
    "last-number": last_number,
    "boxed": boxed,
    "choice": choice,
    "last-line": last_line,
    "code": code,
}
"""Ways to find the answer in a text, by name."""


def answer_key(extract: Extract | None) -> Key:
    """The key of votes on answers: tool calls are compared as actions, texts by the answer in them.

    Args:
        extract: Finds the answer in a text; None compares whole texts.

    Example:
        >>> key = answer_key(last_number)
        >>> key(Candidate(index=0, content="6 * 7 = 42.")) == key(Candidate(index=1, content="It is **42**"))
        True
    """
    return action_key if extract is None else partial(_key, extract)


def _key(extract: Extract, candidate: Candidate) -> str | None:
    if candidate.tool_calls:
        return action_key(candidate)
    found = extract(candidate.content)
    return None if found is None else f"answer:{found}"


def voting_on(scorer: Scorer, key: Key) -> Scorer:
    """The scorer with this key, if it is a vote on whole actions; otherwise itself."""
    return scorer.on(key) if isinstance(scorer, MajorityVote) and scorer.votes_on is action_key else scorer


__all__ = [
    "ANSWERS",
    "Extract",
    "answer_key",
    "boxed",
    "choice",
    "code",
    "code_block",
    "last_line",
    "last_number",
    "voting_on",
]
