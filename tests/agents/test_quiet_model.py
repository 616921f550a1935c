"""The silent copy of a chat model: it tells whoever listens, and takes the short way where nobody does."""

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import AsyncCallbackHandler, get_usage_metadata_callback
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import tool

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.middleware import EntropyCentroidMiddleware
from ec_agents.agents.quiet_model import silent_model
from ec_agents.embedded import EmbeddedChatModel
from ec_agents.messages import SIGNALS_KEY
from ec_agents.servers.json_actions import acting_in_json
from ec_agents.testing import Reply, ScriptedChatModel

ASK = [HumanMessage("Ann has 2. How many has Ann?")]


class Listener(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.starts: list[Any] = []
        self.ends: list[Any] = []

    async def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.starts.append(messages)

    async def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.ends.append(response)


def model(**fields: Any) -> Any:
    return silent_model(ScriptedChatModel(replies=[Reply(content="four tokens", profile=".!..")], **fields))[0]


def told(message: AIMessage) -> dict[str, Any]:
    return message.model_dump(exclude={"id"})


async def test_both_ways_give_the_same_message():
    listener = Listener()
    heard = await model().ainvoke(ASK, {"callbacks": [listener]})
    unheard = await model().ainvoke(ASK)
    assert len(listener.starts) == len(listener.ends) == 1
    assert told(heard) == told(unheard)
    assert all(str(message.id).startswith("lc_run--") for message in (heard, unheard))
    assert SIGNALS_KEY in unheard.response_metadata


@pytest.mark.parametrize("place", ["config", "binding", "model", "surroundings"])
async def test_a_listener_is_told_wherever_it_was_given(place: str):
    listener = Listener()
    silent = model(callbacks=[listener] if place == "model" else None)
    bound = silent.bind(stop=["x"])
    config: RunnableConfig = {"callbacks": [listener]}
    if place == "binding":
        await bound.with_config(config).ainvoke(ASK)
    elif place == "surroundings":
        await RunnableLambda(bound.ainvoke).ainvoke(ASK, config)
    else:
        await bound.ainvoke(ASK, config if place == "config" else None)
    assert len(listener.starts) == len(listener.ends) == 1


async def test_a_usage_counter_of_the_context_counts():
    with get_usage_metadata_callback() as counter:
        await EmbeddedChatModel(seed=1).ainvoke(ASK)
        once = counter.usage_metadata["ec-agents-embedded"]["input_tokens"]
        await silent_model(EmbeddedChatModel(seed=1))[0].ainvoke(ASK)
    assert counter.usage_metadata["ec-agents-embedded"]["input_tokens"] == 2 * once


async def test_a_rate_limiter_is_waited_for():
    class Counting(InMemoryRateLimiter):
        taken = 0

        async def aacquire(self, *, blocking: bool = True) -> bool:
            Counting.taken += 1
            return True

    await model(rate_limiter=Counting(requests_per_second=1)).ainvoke(ASK)
    assert Counting.taken == 1


async def test_a_text_and_a_prompt_are_messages_too():
    assert (await model().ainvoke("hi")).content == "four tokens"


async def test_content_in_parts_is_prepared_by_langchain():
    image = {"type": "image", "base64": "AA==", "mime_type": "image/png"}
    parts: Any = [{"type": "text", "text": "what is it?"}, image]
    assert (await model().ainvoke([HumanMessage(content=parts)])).content == "four tokens"


class Own(BaseChatModel):
    """A model of the user's own: it shows what it is given."""

    @property
    def _llm_type(self) -> str:
        return "own"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        found = [ChatGeneration(message=AIMessage(text), generation_info={"finish_reason": "stop"}) for text in "ab"]
        return ChatResult(generations=found, llm_output={"token_usage": 2})


class OwnAinvoke(Own):
    async def ainvoke(self, *args: Any, **kwargs: Any) -> Any:
        return (await super().ainvoke(*args, **kwargs)).model_copy(update={"content": "own"})


class OwnAgenerate(Own):
    async def agenerate(self, *args: Any, **kwargs: Any) -> Any:
        result = await super().agenerate(*args, **kwargs)
        result.generations[0][0].message.content = "own"  # type: ignore[union-attr]
        return result


class NeedsManager(Own):
    async def _agenerate(self, messages: Any, stop: Any, run_manager: Any, **kwargs: Any) -> ChatResult:  # type: ignore[override]
        await run_manager.on_llm_new_token("a")
        return self._generate(messages, stop, **kwargs)


class TakesNoManager(Own):
    async def _agenerate(self, messages: Any, stop: Any = None, **kwargs: Any) -> ChatResult:  # type: ignore[override]
        return ChatResult(generations=[ChatGeneration(message=AIMessage(str(sorted(kwargs))))])


class Asks(Own):
    """A model that asks another one."""

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        message = EmbeddedChatModel(seed=1).invoke(messages, **kwargs)
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        message = await EmbeddedChatModel(seed=1).ainvoke(messages, **kwargs)
        return ChatResult(generations=[ChatGeneration(message=message)])


@pytest.mark.parametrize("kind", [Own, OwnAinvoke, OwnAgenerate, NeedsManager, TakesNoManager])
@pytest.mark.parametrize("prepare", [lambda silent: silent, acting_in_json])
async def test_models_of_ones_own_answer_alike_both_ways(kind: Any, prepare: Any):
    silent = prepare(silent_model(kind())[0])
    unheard = await silent.ainvoke(ASK)
    heard = await silent.ainvoke(ASK, {"callbacks": [Listener()]})
    assert told(heard) == told(unheard)
    assert unheard.content == {Own: "a", NeedsManager: "a", TakesNoManager: "[]"}.get(kind, "own")


@pytest.mark.parametrize("way", ["stream", "astream"])
@pytest.mark.parametrize("make", ["graph", "middleware"])
async def test_the_stream_is_hidden_from_a_model_that_the_model_asks(make: str, way: str):
    if make == "graph":
        agent: Any = create_centroid_agent(Asks(), n=3)
    else:
        agent = create_agent(Asks(), middleware=[EntropyCentroidMiddleware(n=3)])
    ask = {"messages": ASK}
    if way == "stream":
        shown = [message for message, _ in agent.stream(ask, stream_mode="messages")]
    else:
        shown = [message async for message, _ in agent.astream(ask, stream_mode="messages")]
    assert len({message.id for message in shown}) == len(shown) == 1


def test_a_tool_that_changes_is_bound_again():
    @tool
    def add(a: int) -> int:
        """Old."""
        return a

    silent = model()
    first = silent.bind_tools([add])
    assert silent.bind_tools([add]) is first
    add.description = "New."
    assert silent.bind_tools([add]).kwargs["tools"][0]["function"]["description"] == "New."
