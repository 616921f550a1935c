"""The chat template: a conversation as the token ids that the embedded model was trained on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ec_agents.embedded import vocabulary as v

Role = Literal["user", "assistant", "tool"]
_MARKER = {"user": v.USER, "assistant": v.ASSISTANT, "tool": v.TOOL}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: its role, its text, and the tool calls that an assistant made."""

    role: Role
    text: str
    calls: Sequence[tuple[str, Mapping[str, Any]]] = ()
    """Name and arguments of each tool call."""


def render(turns: Sequence[Turn], tools: Sequence[str] = ()) -> list[int]:
    """The prompt for the next assistant turn.

    Args:
        turns: The conversation so far. Thoughts of earlier turns are not part of it.
        tools: Names of the tools that the model may call.
    """
    ids = [v.TOOLS, *v.encode(" ".join(tools))] if tools else []
    for turn in turns:
        ids += [_MARKER[turn.role], *v.encode(turn.text)]
        for name, arguments in turn.calls:
            ids += [v.CALL, *v.encode(call_text(name, arguments)), v.END_CALL]
        if turn.role == "assistant":
            ids.append(v.END)
    return [*ids, v.ASSISTANT]


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """The JSON of a tool call as the model writes it."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
