"""The embedded model's tokens: 256 bytes, control tokens, and the phrases that its tasks repeat.

Any text can be encoded, because every byte is a token. Control tokens come from the chat template only: text that
spells one out is encoded as bytes, so a message cannot forge a role or a tool call.
"""

import re
from collections.abc import Iterable

CONTROL = (
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|tools|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
)
PHRASES = (
    "Combine the numbers ",
    " with the calc tool, two at a time, until only ",
    " is left. Then say 'answer' and the number left.",
    "Use each of the numbers ",
    " exactly once with + - * / to make ",
    ". Say 'answer' and the steps, such as 'answer 2+3=5 5*4=20'.",
    " has ",
    " more than ",
    " fewer than ",
    "How many has ",
    "? Say 'answer' and the number.",
    "answer ",
    " no\n",
    " yes\n",
    '{"name": "calc", "arguments": {"expression": "',
    '"}}',
    " left: ",
    "error: ",
    "calc",
    "Ann",
    "Bob",
    "Cleo",
    "Dan",
    "Eve",
    "Finn",
    "Gus",
    "Hana",
    "Ida",
    "Jon",
    "Kim",
    "Liv",
)
SIZE = 256 + len(CONTROL) + len(PHRASES)

END, USER, ASSISTANT, TOOL, TOOLS, THINK, END_THINK, CALL, END_CALL = range(256, 256 + len(CONTROL))

_FIRST_PHRASE = 256 + len(CONTROL)
_PHRASE_IDS = {phrase: _FIRST_PHRASE + i for i, phrase in enumerate(PHRASES)}
_SPLIT = re.compile("(" + "|".join(re.escape(p) for p in sorted(PHRASES, key=len, reverse=True)) + ")")
_BYTES = [bytes([i]) for i in range(256)] + [text.encode() for text in CONTROL + PHRASES]


def encode(text: str) -> list[int]:
    """Token ids of plain text: the longest phrases first, bytes for the rest, never a control token."""
    ids: list[int] = []
    for piece in _SPLIT.split(text):
        phrase = _PHRASE_IDS.get(piece)
        ids.extend(piece.encode("utf-8", "surrogatepass") if phrase is None else (phrase,))
    return ids


def decode(ids: Iterable[int]) -> str:
    """Text of token ids, control tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
    return b"".join(_BYTES[i] for i in ids).decode("utf-8", "replace")


def token_bytes(token: int) -> bytes:
    """The bytes that one token stands for."""
    return _BYTES[token]
