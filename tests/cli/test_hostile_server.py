"""Commands against a server that writes terminal commands into everything it can."""

import json
import sys
import unicodedata
from typing import Any

import pytest

from ec_agents.cli.main import main
from ec_agents.testing import Fault, FaultServer, Reply
from ec_agents.testing.server import completion

ATTACK = "\x1b]0;title\x07\x1b]8;;http://evil\x1b\\x\x1b[2J\x9b31m\x9d0;t\x9c\rgone\u202eexe\u2066\u2028\x08\x7f"
ATTACKED = f"{ATTACK}word{ATTACK}"


def unsafe(text: str) -> set[str]:
    """The control and format characters in what a command printed, besides line feeds and tabs."""
    return {c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp"}} - {"\n", "\t"}


def hostile(request: Any) -> Any:
    """Attacks in the answer, in tool names, arguments and results, and in everything around them."""
    if "tools" in request and request["messages"][-1]["role"] != "tool":
        name = request["tools"][0]["function"]["name"]
        calls: Any = [(name, {"word": ATTACKED, ATTACKED: ATTACKED}), (ATTACKED, {})]
        reply = Reply(tool_calls=calls, profile="!...")
    elif "response_format" in request:
        reply = Reply(content=json.dumps({"thought": ATTACKED, "action": {ATTACKED: ATTACKED}}), profile="!...")
    else:
        reply = Reply(content=ATTACKED, profile="!...")
    response = completion([reply.message()], request)
    return {**response, "model": ATTACKED, "id": ATTACKED, "system_fingerprint": ATTACKED}


def error(status: int) -> Fault:
    body = json.dumps({"error": {"message": f"logprobs {ATTACKED}", "code": ATTACKED, "type": ATTACKED}}).encode()
    return Fault(about="an attack", status=status, body=lambda _: body)


def damaged(body: bytes) -> Fault:
    return Fault(about="an attack", body=lambda _: body)


FAULTS = pytest.mark.parametrize(
    "fault",
    [None, error(400), error(401), error(404), damaged(ATTACKED.encode()), damaged(json.dumps([ATTACKED]).encode())],
)


@FAULTS
@pytest.mark.parametrize("command", ["check", "demo"])
def test_the_terminal(command: str, fault: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Only filtered text is printed, by a successful command and by one that fails."""
    options = [] if command == "check" else ["--n", "2", "--shown", "1", "--tasks", "1"]
    with FaultServer(hostile, faults=[fault]) as server:
        monkeypatch.setattr(
            sys, "argv", ["ec-agents", command, "--base-url", server.base_url, "--model", "m", *options]
        )
        with pytest.raises(SystemExit) as ended:  # and not a traceback, which nothing filters
            main()
        assert server.requests
    printed = "".join([*capsys.readouterr(), str(ended.value.code or "")])
    assert not unsafe(printed)
    assert "word" in printed or fault is None or fault.status == 200
