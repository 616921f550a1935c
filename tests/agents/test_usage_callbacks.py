"""Callbacks that count tokens: each of the N responses once, in every front end, whatever the counter reads."""

from typing import Any

import pytest
from helpers.serving import own, respond
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler, get_usage_metadata_callback
from langchain_core.outputs import LLMResult
from langchain_core.tracers.context import collect_runs

from ec_agents.agents.chat_model import CentroidChatModel
from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.middleware import EntropyCentroidMiddleware
from ec_agents.testing import FaultServer, Reply

ASK: Any = {"messages": [("user", "what is 1 + 2?")]}


def add(a: int, b: int | None = None) -> int:
    """Add two numbers."""
    return a + (2 if b is None else b)


class Counter(BaseCallbackHandler):
    """Adds up what the results of model runs report, in each of the two places."""

    def __init__(self) -> None:
        self.on_messages = 0
        self.on_results = 0

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        for generation in (one for generations in response.generations for one in generations):
            self.on_messages += (getattr(generation, "message").usage_metadata or {}).get("total_tokens", 0)  # noqa: B009
        usage = (response.llm_output or {}).get("token_usage") or {}
        self.on_results += usage.get("total_tokens", 0)


def agent_of(kind: str, model: Any) -> Any:
    if kind == "graph":
        return create_centroid_agent(model, [add], n=3)
    if kind == "middleware":
        return create_agent(model, [add], middleware=[EntropyCentroidMiddleware(n=3)])
    return create_agent(CentroidChatModel(model, n=3, trace_candidates=kind == "chat model, traced"), [add])


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
@pytest.mark.parametrize("kind", ["graph", "middleware", "chat model", "chat model, traced"])
async def test_every_counter_sees_each_response_once(kind: str, way: str):
    """A step that has to sample again as JSON is counted with both attempts."""
    with FaultServer(respond) as server, get_usage_metadata_callback() as around:
        counter, langchains = Counter(), UsageMetadataCallbackHandler()
        agent, config = agent_of(kind, own(server)), {"callbacks": [counter, langchains]}
        if way == "invoke":
            agent.invoke(ASK, config)
        else:
            await agent.ainvoke(ASK, config)
        formats = ["response_format" in request for request in server.requests]
    assert formats == [False] * 3 + [True] * 6
    total = 3 * 10 + 6 * 14  # unmeasured calls, calls as JSON, answers
    assert counter.on_messages == counter.on_results == total
    for found in (langchains, around):
        assert [usage["total_tokens"] for usage in found.usage_metadata.values()] == [total]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
async def test_the_caller_gets_the_usage_of_the_chosen_response(way: str, *, traced: bool):
    with FaultServer([Reply(content="hi")]) as server:
        model, config = CentroidChatModel(own(server), n=3, trace_candidates=traced), {"callbacks": [Counter()]}
        if way == "invoke":
            message: Any = model.invoke("hi", config)  # type: ignore[arg-type]
        elif way == "ainvoke":
            message = await model.ainvoke("hi", config)  # type: ignore[arg-type]
        elif way == "stream":
            [message] = list(model.stream("hi", config))  # type: ignore[arg-type]
        else:
            [message] = [chunk async for chunk in model.astream("hi", config)]  # type: ignore[arg-type]
    assert message.usage_metadata["total_tokens"] == 14
    assert message.response_metadata["token_usage"]["total_tokens"] == 14
    assert message.response_metadata["ec_agents"]["usage"]["total_tokens"] == 42
    assert model._usages == {}


@pytest.mark.parametrize("traced", [False, True])
def test_a_handler_of_the_sampled_model_and_of_the_run_counts_once(*, traced: bool):
    counter = Counter()
    with FaultServer([Reply(content="hi")]) as server:
        bound = own(server).with_config(callbacks=[counter])
        CentroidChatModel(bound, n=3, trace_candidates=traced).invoke("hi", {"callbacks": [counter]})
    assert counter.on_messages == counter.on_results == 42


def test_a_collector_of_runs_gets_one_run():
    with FaultServer([Reply(content="hi")]) as server, collect_runs() as collected:
        CentroidChatModel(own(server), n=3).invoke("hi")
    assert len(collected.traced_runs) == 1
