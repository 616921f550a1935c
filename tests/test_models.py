"""The silent copy of a chat model: it tells whoever listens, and takes the short way where nobody does."""

from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, get_usage_metadata_callback
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import RunnableConfig, RunnableLambda

from ec_agents.embedded import EmbeddedChatModel
from ec_agents.models import SIGNALS_KEY, silent_model
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
    assert heard.id is not None
    assert unheard.id is None  # LangChain names runs that somebody hears of
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
