"""Settings of the user's model that contradict sampling: taken over, used or refused, never lost silently."""

from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.runnables import ConfigurableField
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from ec_agents import CentroidChatModel, EntropyCentroidMiddleware, create_centroid_agent, fast_logprobs
from ec_agents.errors import ConfigError
from ec_agents.testing import FaultServer, Reply, ScriptedChatModel

ASK = {"messages": [("user", "hi")]}


def graph(model: Any) -> Any:
    return create_centroid_agent(model, n=2)


def middleware(model: Any) -> Any:
    return create_agent(model, middleware=[EntropyCentroidMiddleware(n=2)])


def chat_model(model: Any) -> Any:
    return create_agent(CentroidChatModel(model, n=2))


EVERYWHERE = pytest.mark.parametrize("make", [graph, middleware, chat_model])


def chat(server: FaultServer, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model="any", base_url=server.base_url, api_key=SecretStr("k"), max_retries=0, **options)


@EVERYWHERE
@pytest.mark.parametrize("client", [lambda model: model, fast_logprobs], ids=["plain", "fast"])
async def test_streaming_model(make: Callable[[Any], Any], client: Callable[[Any], Any]):
    """A model that streams by default is sampled without streams."""
    with FaultServer([Reply(content="hello")] * 4) as server:
        model = client(chat(server, streaming=True))
        assert (await make(model).ainvoke(ASK))["messages"][-1].content == "hello"
        assert make(model.bind(stream=True)).invoke(ASK)["messages"][-1].content == "hello"
        assert [request.get("stream") or False for request in server.requests] == [False] * 4


@EVERYWHERE
@pytest.mark.parametrize("bound", [False, True])
def test_n_of_the_model(make: Callable[[Any], Any], *, bound: bool):
    """An ``n`` of the model's own would pay for answers that nobody uses: it is refused before anything is sent."""
    with FaultServer([Reply(content="hello")]) as server:
        model: Any = chat(server).bind(n=4) if bound else chat(server, n=4)
        with pytest.raises(
            ConfigError, match="n=4 is set on the model, so each of the 2 calls would pay for 4 answers"
        ):
            make(model).invoke(ASK)
        assert not server.requests


@EVERYWHERE
def test_retries_and_fallbacks(make: Callable[[Any], Any]):
    """Wrappers that sampling cannot keep are refused with the remedy."""
    model = ScriptedChatModel(replies=[Reply(content="hello")] * 2)
    with pytest.raises(ConfigError, match=r"policy=SamplingPolicy\(retries=\.\.\.\)"):
        make(model.with_retry()).invoke(ASK)
    with pytest.raises(ConfigError, match="ModelFallbackMiddleware"):
        make(model.with_fallbacks([model])).invoke(ASK)
    assert not model.requests


def configurable(server: FaultServer, **given: Any) -> Any:
    return init_chat_model(
        model_provider="openai", configurable_fields=("model",), base_url=server.base_url, api_key="k", **given
    )


@pytest.mark.parametrize("make", [graph, middleware])
@pytest.mark.parametrize("default", [{}, {"model": "small"}], ids=["no default", "default"])
async def test_configurable_model(make: Callable[[Any], Any], default: dict[str, str]):
    """The configuration of each run decides which model answers."""
    with FaultServer([Reply(content="hello")] * 4) as server:
        agent = make(configurable(server, **default))
        await agent.ainvoke(ASK, {"configurable": {"model": "large"}})
        agent.invoke(ASK, {"configurable": {"model": "huge"}})
        assert [request["model"] for request in server.requests] == ["large", "large", "huge", "huge"]


@pytest.mark.parametrize("make", [graph, middleware])
def test_configurable_model_without_a_name(make: Callable[[Any], Any]):
    """A run that names no model is told to."""
    with FaultServer([Reply()]) as server, pytest.raises(ConfigError, match='pass config={"configurable": {"model"'):
        make(configurable(server)).invoke(ASK)


@pytest.mark.parametrize("make", [graph, middleware])
def test_configurable_fields(make: Callable[[Any], Any]):
    """So it is with LangChain's configurable fields of any model."""
    with FaultServer([Reply(content="hello")] * 2) as server:
        model = chat(server).configurable_fields(model_name=ConfigurableField(id="model"))
        make(model).invoke(ASK, {"configurable": {"model": "large"}})
        assert {request["model"] for request in server.requests} == {"large"}


def test_configurable_model_in_a_chat_model():
    """A chat model asks one model; the remedy is named."""
    with FaultServer([Reply()]) as server, pytest.raises(ConfigError, match="configurable_alternatives"):
        CentroidChatModel(configurable(server, model="small"))
