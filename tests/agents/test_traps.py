"""What goes wrong when N model calls are put into one step of a LangGraph or LangChain agent, trap by trap."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
from helpers.adding import ASK, EARLY, LATE, THREAD, add, call_add, record, two_steps
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    ExtendedModelResponse,
    ModelCallLimitMiddleware,
    ModelFallbackMiddleware,
    ModelRetryMiddleware,
)
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.outputs import ChatGenerationChunk, LLMResult
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.config import get_config
from langgraph.types import Command, interrupt
from pydantic import Field

from ec_agents.agents.chat_model import CentroidChatModel
from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.middleware import EntropyCentroidMiddleware
from ec_agents.errors import ConfigError, UnsupportedLogprobs
from ec_agents.policy import SamplingPolicy
from ec_agents.testing import Reply, ScriptedChatModel


class Model(ScriptedChatModel):
    """A scripted model with a name that can stream, and then loses its log-probabilities, as several servers do."""

    streamed: list[str] = Field(default_factory=list)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._named(super()._generate(*args, **kwargs))

    async def _agenerate(self, *args: Any, **kwargs: Any) -> Any:
        return self._named(await super()._agenerate(*args, **kwargs))

    def _named(self, result: Any) -> Any:
        result.generations[0].message.response_metadata["model_name"] = "scripted"
        return result

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        self.streamed.append("sync")
        message: Any = super()._generate(*args, **kwargs).generations[0].message
        yield ChatGenerationChunk(message=AIMessageChunk(content=message.content, tool_calls=message.tool_calls))

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._stream(*args, **kwargs):
            yield chunk


def model_of(replies: Sequence[Reply]) -> Model:
    return Model(replies=replies, streamed=[])


def in_middleware(model: Any, *, n: int = 3, outside: Any = (), inside: Any = (), **options: Any) -> Any:
    ours = {name: options.pop(name) for name in ("durable", "policy") if name in options}
    middleware = [*outside, EntropyCentroidMiddleware(n=n, **ours), *inside]
    return create_agent(model, [add], middleware=middleware, **options)


def in_graph(model: Any, **options: Any) -> Any:
    given: dict[str, Any] = {"n": 3, **options}
    return create_centroid_agent(model, [add], **given)


EVERYWHERE = pytest.mark.parametrize("make", [in_middleware, in_graph])


@EVERYWHERE
async def test_trap_1_candidates_do_not_leak_into_the_messages_stream(make: Callable[..., Any]):
    stream = make(model_of(two_steps())).astream(ASK, stream_mode="messages")
    seen: list[Any] = [message async for message, _ in stream if message.type == "ai"]
    assert [m.tool_calls[0]["args"] if m.tool_calls else m.text for m in seen] == [{"a": 1, "b": 2}, "it is 3"]


@EVERYWHERE
async def test_trap_2_streaming(make: Callable[..., Any]):
    """A streaming caller does not make the model stream."""
    model = model_of(two_steps())
    async for _ in make(model).astream(ASK, stream_mode="messages"):
        pass
    again = model_of(two_steps())
    async for _ in make(again).astream_events(ASK, version="v2"):
        pass
    assert model.streamed == again.streamed == []


class Tags(BaseCallbackHandler):
    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def on_chat_model_start(self, *args: Any, tags: Any = None, **kwargs: Any) -> None:
        self.seen.append(tags)


@EVERYWHERE
def test_trap_3_binding_tools_keeps_the_tag(make: Callable[..., Any]):
    tags = Tags()
    make(model_of(two_steps())).invoke(ASK, {"callbacks": [tags]})
    assert len(tags.seen) == 6
    assert all("nostream" in seen for seen in tags.seen)


async def test_trap_4_the_reducer_keeps_the_decision_of_every_step():
    agent = in_middleware(model_of(two_steps()), checkpointer=InMemorySaver())
    await agent.ainvoke(ASK, THREAD)
    assert [d["chosen"] for d in agent.get_state(THREAD).values["ec_decisions"]] == [1, 0]


def builtins_only(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(k) is str and builtins_only(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(builtins_only, value))
    return value is None or type(value) in (str, int, float, bool, bytes)


@pytest.mark.parametrize("durable", [False, True])
def test_trap_5_no_numpy_scalar_enters_the_state(*, durable: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LANGGRAPH_STRICT_MSGPACK", "true")
    agent = in_middleware(model_of(two_steps()), durable=durable, checkpointer=InMemorySaver())
    state = agent.invoke(ASK, THREAD)
    found = [agent.get_state(THREAD).values["ec_decisions"], [record(state["messages"][i]) for i in (1, 3)]]
    assert builtins_only(found)


def long_replies() -> list[Reply]:
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(400)]
    return [Reply(content=" ".join(words), profile="".join(rng.choices("!...", k=2000))) for _ in range(8)]


@EVERYWHERE
def test_trap_6_state(make: Callable[..., Any]):
    """Neither candidates nor log-probabilities stay in the state."""
    saver = InMemorySaver()
    make(model_of(long_replies()), n=8, checkpointer=saver).invoke(ASK, THREAD)
    last = next(iter(saver.list(THREAD)))
    stored = JsonPlusSerializer().dumps_typed(last.checkpoint["channel_values"])[1]
    assert b"top_logprobs" not in stored
    assert b"ec_signals" not in stored
    assert len(stored) < 60_000


class Asking(AgentMiddleware[Any, Any, Any]):
    """Asks a person within the model step about the action that was chosen."""

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        response = handler(request)
        for message in response.result:
            if message.tool_calls:
                interrupt(message.tool_calls[0]["args"])
        return response


@pytest.mark.parametrize("durable", [False, True])
def test_trap_7_approval(*, durable: bool):
    """A person never approves one action while another runs."""
    done: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        done.append((a, b))
        return a + b

    model = model_of([*two_steps()[:3], call_add(6, 6, EARLY), *two_steps()[2:]] if not durable else two_steps())
    ours = EntropyCentroidMiddleware(n=3, durable=durable)
    agent = create_agent(model, [add], middleware=[Asking(), ours], checkpointer=InMemorySaver())
    shown = agent.invoke(ASK, THREAD)["__interrupt__"][0].value
    assert shown == {"a": 1, "b": 2}
    if not durable:
        with pytest.raises(ConfigError, match="other candidates than those that the person saw: pass durable=True"):
            agent.invoke(Command(resume=True), THREAD)
        assert (done, len(model.requests)) == ([], 3)
    else:
        agent.invoke(Command(resume=True), THREAD)
        assert (done, len(model.requests)) == ([(1, 2)], 6)


class AskingFirst(AgentMiddleware[Any, Any, Any]):
    """Asks a person before each call of the model."""

    async def awrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        interrupt("may I?")
        return await handler(request)


async def test_trap_8_an_interrupt_is_neither_a_failure_nor_lost():
    agent = in_middleware(model_of(two_steps()), inside=[AskingFirst()], checkpointer=InMemorySaver())
    assert (await agent.ainvoke(ASK, THREAD))["__interrupt__"][0].value == "may I?"


@EVERYWHERE
def test_trap_9_usage(make: Callable[..., Any]):
    """Every paid response is a candidate with its own usage."""
    model = model_of(two_steps())
    with get_usage_metadata_callback() as counted:
        state = make(model).invoke(ASK)
    assert not any("n" in options for _, options in model.requests)
    assert len(record(state["messages"][1])["scores"]) == 3
    assert record(state["messages"][1])["usage"]["total_tokens"] == 60
    assert counted.usage_metadata["scripted"]["total_tokens"] == 120


@EVERYWHERE
def test_trap_10_no_cache_makes_the_candidates_equal(make: Callable[..., Any]):
    model = model_of(two_steps())
    set_llm_cache(InMemoryCache())
    try:
        make(model).invoke(ASK)
    finally:
        set_llm_cache(None)
    assert len(model.requests) == 6


class Noting(AgentMiddleware[Any, Any, Any]):
    """Updates the state with every response of the model."""

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        return ExtendedModelResponse(handler(request), Command(update={"messages": [HumanMessage("noted")]}))


def test_trap_11_state_updates():
    """State updates of inner middleware are refused; those of outer middleware apply once."""
    with pytest.raises(ConfigError, match="returned a state update.* put EntropyCentroidMiddleware last"):
        in_middleware(model_of(two_steps()), inside=[Noting()]).invoke(ASK)
    state = in_middleware(model_of([Reply(content="3")] * 3), outside=[Noting()]).invoke(ASK)
    assert [message.text for message in state["messages"]].count("noted") == 1


@pytest.mark.parametrize("inner", ["retry", "fallback"])
def test_trap_12_what_is_not_from_the_sampled_model_loses(inner: str):
    spare = ScriptedChatModel(replies=[Reply(content="spare", profile=EARLY)])
    inside = {
        "retry": ModelRetryMiddleware(max_retries=0, on_failure="continue"),
        "fallback": ModelFallbackMiddleware(spare),
    }[inner]
    replies = [Reply(error=ConnectionError("reset")), Reply(content="own", profile=LATE)]
    found = in_middleware(model_of(replies), n=2, inside=[inside]).invoke(ASK)["messages"][-1]
    assert found.content == "own"
    [flaws] = [found for found in record(found)["flaws"] if found]
    assert "put EntropyCentroidMiddleware last" in flaws["foreign"]


def test_trap_13_a_model_call_limit_counts_steps():
    model = model_of([*[call_add(1, 2)] * 3, *[Reply(content="3")] * 3])
    state = in_middleware(model, outside=[ModelCallLimitMiddleware(run_limit=1)]).invoke(ASK)
    assert "Model call limits exceeded" in state["messages"][-1].text
    assert len(model.requests) == 3


@pytest.mark.parametrize("way", ["middleware", "graph", "chat model"])
def test_trap_14_usage(way: str):
    """The message reports its own usage, and the callback that of all."""
    model = model_of(two_steps()[3:])
    with get_usage_metadata_callback() as counted:
        if way == "chat model":
            message = CentroidChatModel(model, n=3).invoke("hi")
        else:
            make = in_middleware if way == "middleware" else in_graph
            message = make(model).invoke(ASK)["messages"][-1]
    assert message.usage_metadata
    assert message.usage_metadata["total_tokens"] == 20
    assert record(message)["usage"]["total_tokens"] == 60
    assert counted.usage_metadata["scripted"]["total_tokens"] == 60


@EVERYWHERE
def test_trap_15_the_responses_interface_is_named_as_the_reason(make: Callable[..., Any]):
    model = ChatOpenAI(model="gpt-4o", api_key="none", base_url="http://127.0.0.1:9", use_responses_api=True)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedLogprobs, match="pass use_responses_api=False"):
        make(model).invoke(ASK)


@EVERYWHERE
async def test_trap_16_tool_calls_without_logprobs_never_win(make: Callable[..., Any]):
    replies = [call_add(1, 1, None), Reply(content="3", profile=LATE), call_add(9, 9, None)]
    found = (await make(model_of(replies)).ainvoke(ASK))["messages"][-1]
    assert found.content == "3"
    assert record(found)["scores"] == [None, 0.75, None]


class Traced(BaseCallbackHandler):
    def __init__(self) -> None:
        self.results: list[str] = []

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.results.append(response.model_dump_json())


@EVERYWHERE
async def test_trap_17_tracers_are_not_flooded_with_logprobs(make: Callable[..., Any]):
    traced = Traced()
    replies = [Reply(content="3", profile="!" + "." * 1999)] * 3
    await make(model_of(replies)).ainvoke(ASK, {"callbacks": [traced]})
    assert len(traced.results) == 3
    assert not any("top_logprobs" in result for result in traced.results)
    assert max(map(len, traced.results)) < 40_000 < len(json.dumps(replies[0].message().response_metadata)) // 10


async def test_trap_18_tasks_show_no_message_to_any_stream():
    agent = in_middleware(model_of(two_steps()), durable=True, checkpointer=InMemorySaver())
    messages: list[Any] = []
    updates: list[Any] = []
    async for mode, event in agent.astream(ASK, THREAD, stream_mode=["messages", "updates"]):
        messages.extend([event[0]] if mode == "messages" else ())
        updates.extend([event] if mode == "updates" and "ec_sample" in event else ())
    assert [message.type for message in messages] == ["ai", "tool", "ai"]
    assert len(updates) == 6
    assert all(isinstance(update["ec_sample"][0], str) for update in updates)


@EVERYWHERE
async def test_trap_19_the_concurrency_limit_holds(make: Callable[..., Any]):
    running, peak = 0, 0

    class Counting(ScriptedChatModel):
        async def _agenerate(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            await asyncio.sleep(0.005)
            running -= 1
            return await super()._agenerate(*args, **kwargs)

    await make(Counting(replies=[Reply(content="3")] * 9), n=9, policy=SamplingPolicy(max_concurrency=2)).ainvoke(ASK)
    assert peak == 2


class Binding(AgentMiddleware[Any, Any, Any]):
    """Gives the model an argument."""

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        return handler(request.override(model=request.model.bind(temperature=0.5)))


@pytest.mark.parametrize("way", ["middleware", "graph", "chat model"])
def test_trap_20_neither_what_was_bound_nor_the_tools_are_lost(way: str):
    model = model_of(two_steps())
    if way == "middleware":
        in_middleware(model, outside=[Binding()]).invoke(ASK)
    elif way == "graph":
        in_graph(model.bind(temperature=0.5)).invoke(ASK)
    else:
        CentroidChatModel(model.bind(temperature=0.5), n=3).bind_tools([add]).invoke("hi")
    for _, options in model.requests:
        assert options["temperature"] == 0.5
        assert options["tools"][0]["function"]["name"] == "add"


def test_trap_21_durable_without_a_store():
    """Durable candidates are refused where nothing can keep them."""
    with pytest.raises(ConfigError, match="durable=True needs a checkpointer"):
        in_middleware(model_of(two_steps()), durable=True).invoke(ASK)
    agent = in_middleware(model_of(two_steps()), durable=True, checkpointer=InMemorySaver())
    with pytest.raises(ConfigError, match="durable=True keeps nothing with durability='exit'"):
        agent.invoke(ASK, THREAD, durability="exit")


@EVERYWHERE
def test_trap_22_every_tool_call_in_the_conversation_is_answered(make: Callable[..., Any]):
    messages = make(model_of(two_steps())).invoke(ASK)["messages"]
    called = [call["id"] for message in messages if isinstance(message, AIMessage) for call in message.tool_calls]
    assert called == [message.tool_call_id for message in messages if message.type == "tool"]


def test_private_names_of_langgraph():
    """The private names that the guards read are still there."""
    found: list[dict[str, Any]] = []

    def look(state: Any) -> dict[str, Any]:
        found.append(dict(get_config().get("configurable", {})))
        return {}

    class Looking(AgentMiddleware[Any, Any, Any]):
        def before_model(self, state: Any, runtime: Any) -> Any:
            return look(state)

    in_middleware(model_of([Reply()] * 3), outside=[Looking()]).invoke(ASK)
    assert found[0]["__pregel_scratchpad"].resume == []
    assert found[0]["__pregel_scratchpad"].get_null_resume(consume=False) is None
