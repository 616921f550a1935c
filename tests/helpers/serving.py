"""Models on a local server: the clients that ask it, and a model that calls ``add`` and then answers."""

import json
from typing import Any

import pytest
from langchain_openai import ChatOpenAI

from ec_agents.servers.fast_logprobs import fast_logprobs
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.testing import FaultServer, Reply
from ec_agents.testing.server import completion


def chat(server: FaultServer, **options: Any) -> Any:
    return ChatOpenAI(model="m", base_url=server.base_url, api_key="none", max_retries=0, **options)  # type: ignore[arg-type]


def fast(server: FaultServer, **options: Any) -> Any:
    return fast_logprobs(chat(server, **options))


def own(server: FaultServer, **options: Any) -> Any:
    return OpenAIChatModel(model="m", base_url=server.base_url, max_retries=0, fan_out="requests", **options)  # type: ignore[call-arg]


CLIENTS = pytest.mark.parametrize("client", [chat, fast, own])


def action(thought: str, action: Any) -> str:
    """A response that writes its action as JSON."""
    return json.dumps({"thought": thought, "action": action})


def respond(request: Any, *, measured: str | None = None, json_schema: bool = True) -> Any:
    """Call ``add``, then answer, natively or as JSON; native calls carry no log-probabilities unless ``measured``."""
    last = request["messages"][-1]
    done = last["role"] == "tool" or "Result of add: 3" in str(last["content"])
    if "response_format" in request and json_schema:
        text = {"final_answer": "it is 3"} if done else {"tool": "add", "arguments": {"a": 1, "b": None}}
        reply = Reply(content=action("I think", text), profile="!...")
    elif done or "tools" not in request:
        reply = Reply(content="it is 3")
    else:
        reply = Reply(tool_calls=[("add", {"a": 1})], profile=measured)
    return completion([reply.message()], request)


def refusing(request: Any) -> Any:
    """The same model on a server that refuses JSON schemas."""
    if "response_format" in request:
        raise ValueError("response_format is not supported")
    return respond(request)
