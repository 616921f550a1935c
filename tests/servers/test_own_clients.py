"""Clients of the user's own: the server is read from them, and everything that depends on the server follows."""

import asyncio
from typing import Any

import openai
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import ValidationError

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.errors import ConfigError, UnsupportedLogprobs
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.servers.providers import endpoint_of
from ec_agents.testing import FaultServer, Reply

AZURE: Any = {"azure_endpoint": "https://me.openai.azure.com", "api_version": "2024-10-21", "api_key": "none"}
BEHIND_A_GATEWAY: Any = {"base_url": "https://gateway.example.org/azure", "api_version": "1", "api_key": "none"}


def of_azure(options: Any = AZURE, **fields: Any) -> OpenAIChatModel:
    make = {"async_client": lambda: openai.AsyncAzureOpenAI(**options), "client": lambda: openai.AzureOpenAI(**options)}
    return OpenAIChatModel(model="gpt-4o", **make, **fields)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.mark.parametrize("options", [AZURE, BEHIND_A_GATEWAY], ids=["host", "class"])
def test_the_server_is_that_of_the_client(options: Any):
    """By its host or, behind a gateway, by its class; table, fan-out and the name of the limit follow from it."""
    model = of_azure(options, max_tokens=5)
    endpoint = endpoint_of(model)
    assert endpoint is not None
    assert (endpoint.provider, endpoint.model) == ("azure", "gpt-4o")
    assert endpoint.base_url.startswith(options.get("azure_endpoint") or options["base_url"])
    assert model._options() == {"max_completion_tokens": 5}
    assert model._n_max == 128


def test_ruled_out():
    """What the provider table rules out is refused before anything is sent."""
    with pytest.raises(UnsupportedLogprobs, match="Azure OpenAI"):
        create_centroid_agent(of_azure(), [add], n=2, action_format="native")


def test_auto_writes_json_where_the_client_is_that_of_azure():
    reply = Reply(content='{"thought": "", "action": {"final_answer": "42"}}')
    with FaultServer([reply]) as server:
        options: Any = {"base_url": server.base_url, "api_version": "1", "api_key": "none"}
        agent = create_centroid_agent(of_azure(options), [add], n=2, action_format="auto")
        state = asyncio.run(agent.ainvoke({"messages": [("user", "hi")]}))
        assert state["messages"][-1].text == "42"
        assert all("response_format" in request for request in server.requests)


def test_a_client_of_openai_under_chat_openai_is_looked_at_too():
    own = openai.AsyncAzureOpenAI(**AZURE)
    model = ChatOpenAI(model="gpt-4o", api_key="none", async_client=own.chat.completions)  # type: ignore[arg-type]
    endpoint = endpoint_of(model)
    assert endpoint is not None
    assert endpoint.provider == "azure"


def test_each_client_is_used_and_none_is_made_for_nothing():
    made: list[Any] = []
    with FaultServer() as server:

        def make() -> openai.AsyncOpenAI:
            made.append(openai.AsyncOpenAI(base_url=server.base_url, api_key="mine"))
            return made[-1]

        model = OpenAIChatModel(model="any", async_client=make)
        assert asyncio.run(model.ainvoke("hi")).content == "hello"
        assert len(made) == 1
        assert asyncio.run(model.ainvoke("hi")).content == "hello"
        assert len(made) == 2


def test_contradictions_are_refused():
    with pytest.raises(ValidationError, match="must name one server; found http://a/v1 and http"):
        of_azure(base_url="http://a/v1")


def test_calls_of_the_other_kind_do_not_go_to_the_default_host():
    with FaultServer() as server:
        options: Any = {"base_url": server.base_url, "api_key": "none"}
        model = OpenAIChatModel(model="any", async_client=lambda: openai.AsyncOpenAI(**options))
        with pytest.raises(ConfigError, match="pass client=… too"):
            model.invoke("hi")
        model = OpenAIChatModel(model="any", client=lambda: openai.OpenAI(**options))
        with pytest.raises(ConfigError, match="pass async_client=… too"):
            asyncio.run(model.ainvoke("hi"))
        assert not server.requests
