"""Servers of other forms than OpenAI's: a model that calls ``add`` and then answers, in the API of its provider."""

import json
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.helpers.serving import respond

Json = dict[str, Any]


class NativeServer(ThreadingHTTPServer):
    """A server on 127.0.0.1 that answers POST requests by the end of their path; ``requests`` are their bodies."""

    daemon_threads = True

    def __init__(self, measured: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[Json] = []
        self.measured = measured
        """Profile of native tool calls; None: they carry no log-probabilities."""

    @property
    def url(self) -> str:
        """Address of the server, without a path."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: NativeServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        asked: Json = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(asked)
        answer = next(answer for end, answer in _APIS.items() if self.path.partition("?")[0].endswith(end))
        body = answer(asked, self.server.measured)
        self.send_response(200)
        self.send_header("content-type", "application/x-ndjson" if answer is _ollama else "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the signature of the base class
        """Say nothing."""


@contextmanager
def native_server(measured: str | None = None) -> Generator[NativeServer]:
    """Run a server while the block runs."""
    with NativeServer(measured) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _openai(asked: Json, measured: str | None) -> bytes:
    return json.dumps({**respond(asked, measured=measured), "system_fingerprint": None}).encode()


def _ollama(asked: Json, measured: str | None) -> bytes:
    """``/api/chat`` as Ollama streams it: one line per token, then the tool calls, then the counts."""
    form = {"response_format": asked["format"]} if asked.get("format") else {}
    response = respond({**{k: v for k, v in asked.items() if v is not None}, **form}, measured=measured)
    (choice,) = response["choices"]
    message = choice["message"]
    shared = {"model": asked["model"], "created_at": "2026-11-28T00:00:00Z"}
    tokens: list[Json] = (choice["logprobs"] or {"content": []})["content"]
    texts = [message["content"] or "", *[""] * max(len(tokens) - 1, 0)]
    lines: list[Json] = [_line(text, {"logprobs": [token]}) for text, token in zip(texts, tokens, strict=False)]
    if not tokens:
        lines.append(_line(texts[0], {}))
    calls = [
        {"function": {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    if calls:
        lines.append({"message": {"role": "assistant", "content": "", "tool_calls": calls}, "done": False})
    counts = {"prompt_eval_count": 5, "eval_count": len(tokens) or 4}
    lines.append({**_line("", {}), "done": True, "done_reason": "stop", **counts})
    return "".join(json.dumps({**shared, **line}) + "\n" for line in lines).encode()


def _line(text: str, more: Mapping[str, Any]) -> Json:
    return {"message": {"role": "assistant", "content": text}, "done": False, **more}


def _gemini(asked: Json, _: str | None) -> bytes:
    done = any("functionResponse" in part for content in asked["contents"] for part in content["parts"])
    part = {"text": "it is 3"} if done else {"functionCall": {"name": "add", "args": {"a": 1, "b": 2}}}
    candidate = {"content": {"role": "model", "parts": [part]}, "finishReason": "STOP"}
    usage = {"promptTokenCount": 3, "candidatesTokenCount": 2, "totalTokenCount": 5}
    return json.dumps({"candidates": [candidate], "usageMetadata": usage, "modelVersion": "m"}).encode()


def _converse(asked: Json, _: str | None) -> bytes:
    done = any("toolResult" in part for part in asked["messages"][-1]["content"])
    call = {"toolUse": {"toolUseId": "call_1", "name": "add", "input": {"a": 1, "b": 2}}}
    message = {"role": "assistant", "content": [{"text": "it is 3"} if done else call]}
    usage = {"inputTokens": 3, "outputTokens": 2, "totalTokens": 5}
    reason = "end_turn" if done else "tool_use"
    found = {"output": {"message": message}, "stopReason": reason, "usage": usage, "metrics": {"latencyMs": 1}}
    return json.dumps(found).encode()


def _anthropic(asked: Json, _: str | None) -> bytes:
    last = asked["messages"][-1]["content"]
    done = isinstance(last, list) and any(part["type"] == "tool_result" for part in last)
    call = {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1, "b": 2}}
    content = [{"type": "text", "text": "it is 3"} if done else call]
    message = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": content}
    usage = {"input_tokens": 3, "output_tokens": 2}
    reason = "end_turn" if done else "tool_use"
    return json.dumps({**message, "stop_reason": reason, "stop_sequence": None, "usage": usage}).encode()


_APIS: Mapping[str, Callable[[Json, str | None], bytes]] = {
    "/chat/completions": _openai,
    "/api/chat": _ollama,
    ":generateContent": _gemini,
    "/converse": _converse,
    "/v1/messages": _anthropic,
}
