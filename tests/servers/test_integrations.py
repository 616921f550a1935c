"""Every chat model of LangChain that the provider table knows, run in agents against a server of its native form."""

import gc
from collections.abc import Callable, Generator
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from langchain_core.messages import AIMessage
from langchain_openai import AzureChatOpenAI

from ec_agents import UnsupportedLogprobs, create_centroid_agent
from ec_agents.agents.quiet_model import sampling_model
from ec_agents.messages import message_candidate
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.servers.providers import table
from tests.helpers.native_servers import native_server
from tests.helpers.paths import DOCS

# The packages leave connections open and use what aiohttp discourages.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

AWS = {"region_name": "us-east-1", "aws_access_key_id": "a", "aws_secret_access_key": "b", "provider": "anthropic"}


@pytest.fixture(scope="module", autouse=True)
def collected() -> Generator[None]:
    """Let the connections that the packages left open be reported here, and not in a later test."""
    yield
    gc.collect()


def add(a: int, b: int | None = None) -> int:
    """Add two numbers."""
    return a + (2 if b is None else b)


def integration(module: str, name: str, options: Callable[[str], dict[str, Any]]) -> Any:
    """A maker of one chat model, from the address of its server; skips the test where its package is missing."""

    def make(url: str) -> Any:
        return getattr(pytest.importorskip(module), name)(model="m", **options(url))

    return make


MEASURED: dict[str, Callable[[str], Any]] = {
    "ChatDeepSeek": integration("langchain_deepseek", "ChatDeepSeek", lambda url: {"api_base": url, "api_key": "none"}),
    "ChatFireworks": integration(
        "langchain_fireworks", "ChatFireworks", lambda url: {"base_url": f"{url}/v1", "api_key": "none"}
    ),
    "ChatTogether": integration(
        "langchain_together", "ChatTogether", lambda url: {"base_url": f"{url}/v1", "api_key": "none"}
    ),
    "ChatCerebras": integration(
        "langchain_cerebras", "ChatCerebras", lambda url: {"base_url": f"{url}/v1", "api_key": "none"}
    ),
    "ChatXAI": integration("langchain_xai", "ChatXAI", lambda url: {"base_url": f"{url}/v1", "api_key": "none"}),
    "ChatOpenRouter": integration(
        "langchain_openrouter", "ChatOpenRouter", lambda url: {"base_url": f"{url}/v1", "api_key": "none"}
    ),
    "ChatOllama": integration("langchain_ollama", "ChatOllama", lambda url: {"base_url": url}),
}
REFUSED: dict[str, Callable[[str], Any]] = {
    "ChatAnthropic": integration(
        "langchain_anthropic", "ChatAnthropic", lambda url: {"base_url": url, "api_key": "none"}
    ),
    "ChatBedrockConverse": integration(
        "langchain_aws", "ChatBedrockConverse", lambda url: {"endpoint_url": url, **AWS}
    ),
    "ChatGoogleGenerativeAI": integration(
        "langchain_google_genai", "ChatGoogleGenerativeAI", lambda url: {"base_url": url, "api_key": "none"}
    ),
    "ChatGroq": integration("langchain_groq", "ChatGroq", lambda url: {"base_url": url, "api_key": "none"}),
    "ChatMistralAI": integration(
        "langchain_mistralai", "ChatMistralAI", lambda url: {"endpoint": f"{url}/v1", "api_key": "none"}
    ),
}


async def answers(model: Any, **options: Any) -> list[Any]:
    """The messages of an agent that is asked to add, with its record."""
    agent = create_centroid_agent(model, [add], n=3, **options)
    return (await agent.ainvoke({"messages": [("user", "what is 1 + 2?")]}))["messages"]


def is_measured(messages: list[Any]) -> bool:
    """Whether every candidate of every step was measured."""
    steps = [message.response_metadata["ec_agents"] for message in messages if message.type == "ai"]
    return len(steps) == 2 and all(len(step["n_tokens"]) == 3 and not any(step["flaws"]) for step in steps)


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("format_", ["native", "json"])
async def test_measured(name: str, format_: Any):
    """Tool calls and answers of what the table calls supported are measured, natively and as JSON."""
    with native_server("!...") as server:
        messages = await answers(MEASURED[name](server.url), top_logprobs=5, action_format=format_)
    assert [message.text for message in messages[-2:]] == ["3", "it is 3"]
    assert is_measured(messages)
    asked = server.requests[0]
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 5)


@pytest.mark.parametrize("name", MEASURED)
async def test_unmeasured_tool_calls(name: str):
    """``auto`` asks again in JSON, which every supported integration passes on."""
    with native_server(None) as server:
        messages = await answers(MEASURED[name](server.url), top_logprobs=5, action_format="auto")
    assert messages[-1].text == "it is 3"
    assert is_measured(messages)


@pytest.mark.parametrize("name", REFUSED)
async def test_refused(name: str):
    """What cannot be measured is refused before anything is sent, and can vote."""
    with native_server("!...") as server:
        model = REFUSED[name](server.url)
        with pytest.raises(UnsupportedLogprobs):
            await answers(model, top_logprobs=5)
        assert not server.requests
        messages = await answers(model, top_logprobs=None, selector="majority")
    assert [message.text for message in messages[-2:]] == ["3", "it is 3"]


async def test_mistral_drops_them():
    """The remedy of the table is right: the integration loses what the server sends, ``OpenAIChatModel`` does not."""
    with native_server("!...") as server:
        dropped = await sampling_model(REFUSED["ChatMistralAI"](server.url), top_logprobs=5).ainvoke("hi")
        own = OpenAIChatModel(model="m", base_url=f"{server.url}/v1")  # type: ignore[call-arg]
        kept = await sampling_model(own, top_logprobs=5).ainvoke("hi")
    assert [asked["top_logprobs"] for asked in server.requests] == [5, 5]
    assert message_candidate(dropped, 0).signals is None
    assert message_candidate(kept, 0).signals is not None


async def test_gemini_refuses_them():
    with native_server() as server:
        model = REFUSED["ChatGoogleGenerativeAI"](server.url)
        with pytest.raises(Exception, match="logprobs"):
            await sampling_model(model, top_logprobs=5).ainvoke("hi")
        assert not server.requests


async def test_azure():
    """Azure measures no tool calls, so that actions are JSON; its addresses differ from OpenAI's."""
    with native_server() as server:
        options: Any = {"azure_deployment": "m", "azure_endpoint": server.url, "api_key": "none", "api_version": "v"}
        messages = await answers(AzureChatOpenAI(**options), top_logprobs=5)
    assert is_measured(messages)
    assert all("response_format" in asked for asked in server.requests)


async def test_streamed_alternatives_of_ollama():
    """Objects of the ``ollama`` package are read as the JSON that they stand for."""
    ollama = pytest.importorskip("ollama")
    alternatives = [{"token": token, "logprob": -0.5} for token in "ab"]
    kind = ollama._types.Logprob  # the package does not export it
    entries = [kind.model_validate({**alternatives[0], "top_logprobs": alternatives})]
    plain = [entry.model_dump() for entry in entries]
    found, expected = (
        message_candidate(AIMessage("a", response_metadata={"logprobs": logprobs}), 0).signals
        for logprobs in (entries, plain)
    )
    assert found is not None
    assert expected is not None
    assert all(map(np.array_equal, astuple(found), astuple(expected)))


def test_the_table_knows_which_are_run():
    """Classes that the table calls verified are run here, and docs list the others."""
    of_langchain = {name for name in table().classes if name.startswith("Chat")}
    assert of_langchain == MEASURED.keys() | REFUSED.keys()
    page = (DOCS / "providers.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in (*of_langchain, *table().unverified))
