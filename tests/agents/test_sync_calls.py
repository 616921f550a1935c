"""Synchronous calls that a step gives up: closed on the wire, without a thread or a file left, and the process ends."""

import gc
import subprocess
import sys
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.adding import ASK, THREAD, add, record
from helpers.serving import CLIENTS, chat, own
from helpers.waiting import settle
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRetryMiddleware
from langchain_core.language_models import BaseChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langgraph.checkpoint.memory import InMemorySaver

from ec_agents.agents.middleware import EntropyCentroidMiddleware
from ec_agents.errors import SamplingError
from ec_agents.policy import SamplingPolicy
from ec_agents.testing import FaultServer, Reply, ScriptedChatModel


def agent_of(model: Any, *, inside: Any = (), tools: Any = (add,), **options: Any) -> Any:
    ours = EntropyCentroidMiddleware(**options)
    return create_agent(model, list(tools), middleware=[ours, *inside], checkpointer=InMemorySaver())


def calls() -> int:
    """Threads of calls that are still running."""
    return sum(thread.name == "ec_agents-call" for thread in threading.enumerate())


# On the wire


@CLIENTS
@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("policy", [{"timeout": 0.3}, {"deadline": 0.3}, {"first": 1}, {"hedge_after": 0.1}], ids=str)
def test_a_call_that_was_given_up_is_closed(client: Any, policy: Any, *, durable: bool):
    with FaultServer([Reply(content="fine")], faults=["hang", *[None] * 9]) as server:
        state = agent_of(client(server), n=2, policy=SamplingPolicy(**policy), durable=durable).invoke(ASK, THREAD)
        assert state["messages"][-1].content == "fine"
        settle(lambda: server.in_flight == 0 and not calls())
        assert server.abandoned == 1


@CLIENTS
def test_a_soak_leaves_no_thread_and_no_file(client: Any):
    """Steps with every kind of failure keep nothing: not a thread, a connection or a call at the server."""
    faults = ["hang", None, "status_500", "stall", None, "disconnect", None]
    with FaultServer([Reply(content="fine")], faults=faults) as server:
        agent = agent_of(client(server), n=4, policy=SamplingPolicy(timeout=0.05))

        def steps(number: int) -> tuple[int, int]:
            for i in range(number):
                with suppress(SamplingError):
                    agent.invoke(ASK, {"configurable": {"thread_id": str(i)}})
            settle(lambda: server.in_flight == 0 and not calls())
            gc.collect()
            return threading.active_count(), sum(1 for _ in Path("/proc/self/fd").iterdir())

        threads, files = steps(10)
        more_threads, more_files = steps(40)
        assert server.abandoned >= 20
    assert more_threads <= threads
    assert more_files <= files + 16  # both ends of a few more connections in a pool, but not those of 40 steps


def test_a_retry_inside_does_not_repeat_a_call_that_was_given_up():
    retry = ModelRetryMiddleware(max_retries=3, initial_delay=0, jitter=False)
    with FaultServer([Reply(content="fine")], faults=["hang", *[None] * 9]) as server:
        agent_of(own(server), n=2, inside=[retry], policy=SamplingPolicy(first=1)).invoke(ASK, THREAD)
        settle(lambda: server.in_flight == 0 and not calls())
        assert len(server.requests) == 2


def test_a_call_after_the_step_gave_up_is_not_sent():
    """A thread that was busy elsewhere when the step ended does not send its request."""
    turns, given_up = count(), threading.Event()

    class Late(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            if next(turns):
                assert given_up.wait(60)
            return handler(request)

    with FaultServer([Reply(content="fine")]) as server:
        agent_of(own(server), n=3, inside=[Late()], policy=SamplingPolicy(first=1)).invoke(ASK, THREAD)
        given_up.set()
        settle(lambda: not calls())
        assert len(server.requests) == 1


# Models


class Synchronous(ScriptedChatModel):
    """A model whose asynchronous method calls the synchronous one, which waits for all others."""

    @property
    def meet(self) -> threading.Barrier:
        return self.metadata["meet"]  # type: ignore[index]

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self.meet.wait()
        return super()._generate(*args, **kwargs)

    async def _agenerate(self, *args: Any, **kwargs: Any) -> Any:
        return self._generate(*args, **kwargs)


class OnlySynchronous(Synchronous):
    """A model with LangChain's own asynchronous method."""

    _agenerate = BaseChatModel._agenerate


class Overridden(ScriptedChatModel):
    """A model whose synchronous method is newer than its asynchronous one."""

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._generate(*args, **kwargs)
        result.generations[0].message.content += ", overridden"
        return result


class WithoutManager(BaseChatModel):
    """A synchronous model that takes no run manager."""

    @property
    def _llm_type(self) -> str:
        return "without-manager"

    def _generate(self, messages: Any, stop: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return ChatResult(generations=[ChatGeneration(message=Reply(content="fine").message())])


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_a_synchronous_model_needs_no_run_manager(way: str):
    agent = agent_of(WithoutManager(), n=2, tools=())
    state = agent.invoke(ASK, THREAD) if way == "invoke" else await agent.ainvoke(ASK, THREAD)
    assert record(state["messages"][-1])["failures"] == [None, None]


@pytest.mark.parametrize("kind", [Synchronous, OnlySynchronous])
def test_synchronous_models_answer_at_the_same_time(kind: Any):
    """Twelve calls run at once, in one step after the other."""
    model = kind(replies=[Reply(content="fine")] * 24, metadata={"meet": threading.Barrier(12, timeout=60)})
    agent = agent_of(model, n=12)
    for thread in ("1", "2"):
        state = agent.invoke(ASK, {"configurable": {"thread_id": thread}})
        assert not any(record(state["messages"][-1])["failures"])


async def test_many_calls_of_a_synchronous_model():
    """It answers many asynchronous calls at once."""
    model = OnlySynchronous(replies=[Reply(content="fine")] * 64, metadata={"meet": threading.Barrier(64, timeout=60)})
    state = await agent_of(model, n=64).ainvoke(ASK, THREAD)
    assert not any(record(state["messages"][-1])["failures"])


def test_an_overridden_method_is_called():
    state = agent_of(Overridden(replies=[Reply(content="fine")]), n=1).invoke(ASK, THREAD)
    assert state["messages"][-1].content == "fine, overridden"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_a_model_that_runs_out_of_answers_is_an_error(way: str):
    """A StopIteration, which no future can hold, neither hangs nor ends the step."""
    model = GenericFakeChatModel(messages=iter([AIMessage("fine")]))
    agent = agent_of(model, n=2, tools=())
    state = agent.invoke(ASK, THREAD) if way == "invoke" else await agent.ainvoke(ASK, THREAD)
    [failure] = filter(None, record(state["messages"][-1])["failures"])
    assert "StopIteration" in failure


def test_a_client_for_synchronous_calls_is_used():
    """What the user set on it, such as certificates or a proxy, would be lost in another client."""
    with FaultServer([Reply(content="fine")]) as server, httpx.Client(headers={"x-mine": "yes"}) as client:
        state = agent_of(chat(server, http_client=client), n=2).invoke(ASK, THREAD)
        assert state["messages"][-1].content == "fine"
        assert [headers.get("x-mine") for headers in server.headers] == ["yes", "yes"]


# The end of the process

HUNG = """
import asyncio, time
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from ec_agents import CentroidChatModel, EntropyCentroidMiddleware, SamplingPolicy, create_centroid_agent

class Synchronous(BaseChatModel):
    calls: list = []
    @property
    def _llm_type(self): return "hung"
    def _generate(self, *args, **kwargs):
        self.calls.append(1)
        if len(self.calls) == 1:
            time.sleep(3600)
        return ChatResult(generations=[ChatGeneration(message=AIMessage("fine"))])

class InAnExecutor(Synchronous):
    async def _agenerate(self, *args, **kwargs):
        return await asyncio.get_running_loop().run_in_executor(None, self._generate)

policy = SamplingPolicy(deadline=0.3)
ask = {"messages": [("user", "hi")]}

def agents(kind):
    yield create_centroid_agent(kind(), n=2, policy=policy)
    yield create_agent(kind(), middleware=[EntropyCentroidMiddleware(n=2, policy=policy)])
    yield create_agent(CentroidChatModel(kind(), n=2, policy=policy))

for kind in (Synchronous, InAnExecutor):
    for agent in agents(kind):
        print(agent.invoke(ask)["messages"][-1].content)
for agent in agents(Synchronous):
    print(asyncio.run(agent.ainvoke(ask))["messages"][-1].content)
"""


def test_the_process_ends_with_calls_that_cannot_be_cut():
    """In each front end a call hangs in a thread: of ours, of the loop's executor, and in the user's own loop."""
    done = subprocess.run([sys.executable, "-c", HUNG], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("fine\n" * 9, 0), done.stderr
