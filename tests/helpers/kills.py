"""Kill agents that pay, at given points or at random, resume them, and count what was paid.

In a process of its own, because each run of the agent is a fork of it that SIGKILL ends. ``main`` prints one JSON
object per run: what was paid and asked, and the settings.
"""

import asyncio
import json
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command

from ec_agents import (
    CentroidScorerNode,
    CentroidState,
    EntropyCentroidMiddleware,
    IdempotencyKey,
    SamplingNode,
    create_centroid_agent,
    once,
    route_selected,
)
from ec_agents.agents.journal import CheckpointJournal, Record
from ec_agents.testing.scripted import profile_logprobs

POINTS = (
    "before the intent",
    "before the effect",
    "before the result",
    "before the checkpoint",
    "after the checkpoint",
)
PLAIN_POINTS = POINTS[1:]


class Payer(BaseChatModel):
    """Pays 0, 1, … one amount per step, always under the tool call id ``call_0``, as some servers do; then says so."""

    payments: int

    @property
    def _llm_type(self) -> str:
        return "payer"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Runnable[Any, AIMessage]:
        return self.bind(**kwargs)

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        paid = sum(isinstance(message, ToolMessage) for message in messages)
        call = {"name": "pay", "args": {"amount": paid}, "id": "call_0", "type": "tool_call"}
        calls = [call] if paid < self.payments else []
        metadata = {"logprobs": profile_logprobs(".!.."), "finish_reason": "tool_calls" if calls else "stop"}
        message = AIMessage("" if calls else "all paid", tool_calls=calls, response_metadata=metadata)
        return ChatResult(generations=[ChatGeneration(message=message)])


class Shop:
    """The outside world, the agent that acts on it, and the point at which the process dies."""

    def __init__(self, home: Path, settings: dict[str, Any]) -> None:
        self.home = home
        self.settings = settings
        self.paid = home / "paid"
        self.report = home / "report"
        self.paid.touch()
        self.point: tuple[str, int] | None = None
        self.amount = 0

    def reach(self, point: str) -> None:
        """Die here, if this is where."""
        if self.point == (point, self.amount):
            os.kill(os.getpid(), signal.SIGKILL)

    def pay(self, amount: int, key: str) -> str:
        self.amount = amount
        self.reach("before the effect")
        time.sleep(self.settings["slow"])
        descriptor = os.open(self.paid, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, f"{amount} {key}\n".encode())
        os.close(descriptor)
        time.sleep(self.settings["slow"])
        self.reach("before the result")
        return f"paid {amount}"

    def pay_plainly(self, amount: int) -> str:
        return self.pay(amount, "")

    def tool(self) -> Any:
        if not self.settings["once"]:
            return tool("pay", description="Pay.")(self.pay_plainly)

        def pay(amount: int, key: IdempotencyKey) -> str:
            """Pay."""
            return self.pay(amount, key)

        return once(pay)

    def agent(self, saver: Any) -> Any:
        model, tools = Payer(payments=self.settings["payments"]), [self.tool()]
        match self.settings["front"]:
            case "create_centroid_agent":
                return create_centroid_agent(model, tools, n=2, checkpointer=saver)
            case "create_agent":
                return create_agent(model, tools, middleware=[EntropyCentroidMiddleware(n=2)], checkpointer=saver)
            case "sub-graph":
                outer: Any = StateGraph(MessagesState)
                outer.add_node("agent", create_centroid_agent(model, tools, n=2))
                return outer.add_edge(START, "agent").compile(checkpointer=saver)
            case _:
                graph: Any = StateGraph(CentroidState)
                graph.add_node("sample", SamplingNode(model, tools=tools, n=2)).add_node("score", CentroidScorerNode())
                graph.add_node("tools", ToolNode(tools)).add_edge("tools", "sample")
                graph.add_edge(START, "sample").add_edge("sample", "score")
                graph.add_conditional_edges("score", route_selected, ["tools", END])
                return graph.compile(checkpointer=saver)

    def watch(self, saver: Any) -> None:
        """Reach the points that lie in the checkpointer and in the journal."""

        put, aput = saver.put_writes, saver.aput_writes

        @contextmanager
        def watching(writes: Any) -> Generator[None]:
            paying = any(isinstance(m, ToolMessage) for _, value in writes if isinstance(value, list) for m in value)
            if paying:
                self.reach("before the checkpoint")
            yield
            if paying:
                self.reach("after the checkpoint")

        def put_writes(config: Any, writes: Any, *args: Any) -> None:
            with watching(writes):
                put(config, writes, *args)

        async def aput_writes(config: Any, writes: Any, *args: Any) -> None:
            with watching(writes):
                await aput(config, writes, *args)

        saver.put_writes, saver.aput_writes = put_writes, aput_writes
        encode = CheckpointJournal._checkpoint

        def watched(journal: CheckpointJournal, record: Record) -> Any:
            if record.status == "started":
                self.amount = record.args["amount"]
                self.reach("before the intent")
            return encode(journal, record)

        CheckpointJournal._checkpoint = watched  # type: ignore[method-assign]

    async def run(self, thread: str) -> None:
        """Run or resume the agent to its end; a person who knows what was paid answers its questions."""
        config: Any = {"configurable": {"thread_id": thread}, "recursion_limit": 100}
        durability = self.settings["durability"]
        asynchronous = self.settings["asynchronous"]
        async with AsyncExitStack() as stack:
            saver = await self.saver(stack)
            self.watch(saver)
            agent = self.agent(saver)
            state = await agent.aget_state(config) if asynchronous else agent.get_state(config)
            given: Any = None if state.values else {"messages": [("user", "pay")]}
            (self.home / "found").write_text(
                json.dumps([state.next, [task.name for task in state.tasks]]), encoding="utf-8"
            )
            if state.interrupts:
                given = self.answer(state.interrupts[0].value)
            while True:
                if asynchronous:
                    result = await agent.ainvoke(given, config, durability=durability)
                else:
                    result = agent.invoke(given, config, durability=durability)
                if "__interrupt__" not in result:
                    break
                given = self.answer(result["__interrupt__"][0].value)
        self.report.write_text(json.dumps([m.content for m in result["messages"]]), encoding="utf-8")

    async def saver(self, stack: AsyncExitStack) -> Any:
        kind, address = self.settings["database"]
        module, name = {"sqlite": ("sqlite", "SqliteSaver"), "postgres": ("postgres", "PostgresSaver")}[kind]
        if kind == "sqlite":
            address = str(self.home / "checkpoints.sqlite")
        if self.settings["asynchronous"]:
            saver: Any = getattr(import_module(f"langgraph.checkpoint.{module}.aio"), f"Async{name}")
            return await stack.enter_async_context(saver.from_conn_string(address))
        saver = getattr(import_module(f"langgraph.checkpoint.{module}"), name)
        return stack.enter_context(saver.from_conn_string(address))

    def answer(self, question: Any) -> Any:
        call = question["ec_once"]
        with (self.home / "asked").open("a", encoding="utf-8") as file:
            file.write(f"{call['args']['amount']}\n")
        known = f"{call['args']['amount']} {call['idempotency_key']}\n" in self.paid.read_text(encoding="utf-8")
        return Command(resume={"result": f"paid {call['args']['amount']}"} if known else "repeat")

    def fork(self, thread: str) -> int:
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            # Synchronous graphs and savers never suspend the coroutine, and need no event loop that some would refuse.
            if self.settings["asynchronous"]:
                asyncio.run(self.run(thread))
            else:
                with suppress(StopIteration):
                    self.run(thread).send(None)
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)

    def counts(self, kills: int) -> dict[str, Any]:
        lines = self.paid.read_text(encoding="utf-8").splitlines()
        effects = Counter(int(line.split()[0]) for line in lines)
        asked = self.home / "asked"
        questions = asked.read_text(encoding="utf-8").splitlines() if asked.exists() else []
        said = json.loads(self.report.read_text(encoding="utf-8")) if self.report.exists() else []
        return {
            "kills": kills,
            "twice": sum(count > 1 for count in effects.values()),
            "lost": sum(amount not in effects for amount in range(self.settings["payments"])),
            "asked": len(questions),
            "keys": len(set(lines)),
            "said": said[1:],
            "found": json.loads((self.home / "found").read_text(encoding="utf-8")),
        }


def ended(child: int) -> int:
    """Wait for the fork; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_points(shop: Callable[[], Shop], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Kill a run once, at each point of its last payment, and resume it."""
    for point in POINTS if settings["once"] else PLAIN_POINTS:
        here, amount = shop(), settings["payments"] - 1
        thread = f"{settings['front']} {point} {time.monotonic_ns()}"
        here.point = (point, amount)
        killed = ended(here.fork(thread))
        here.point = None
        resumed = ended(here.fork(thread))
        assert (killed, resumed) == (-signal.SIGKILL, 0), (killed, resumed, point, amount)
        yield {"point": point, **here.counts(1)}


def at_random(shop: Callable[[], Shop], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Kill a run again and again after random times, until it ends."""
    here, kills, chance = shop(), 0, random.Random(settings["seed"])
    thread = f"{settings['front']} {settings['seed']} {time.monotonic_ns()}"
    status = -signal.SIGKILL
    while status == -signal.SIGKILL:
        child = here.fork(thread)
        if kills < settings["kills"]:
            time.sleep(chance.uniform(0.0, settings["longest"]))
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        kills += status == -signal.SIGKILL
    assert status == 0, status
    yield {"point": "random", **here.counts(kills)}


def setup(kind: str, address: str) -> None:
    """Create the tables of a database server."""
    if kind == "postgres":
        with import_module("langgraph.checkpoint.postgres").PostgresSaver.from_conn_string(address) as saver:
            saver.setup()


DEFAULTS: dict[str, Any] = {
    "once": True,
    "payments": 2,
    "slow": 0.0,
    "durability": "async",
    "asynchronous": False,
    "random": False,
}


def main(home: str, *runs: str) -> None:
    for number, run in enumerate(runs):
        settings = {**DEFAULTS, "database": ["sqlite", ""], **json.loads(run)}
        setup(*settings["database"])
        places = (Path(home, f"{number}-{i}") for i in count())

        def shop(places: Iterator[Path] = places, settings: dict[str, Any] = settings) -> Shop:
            place = next(places)
            place.mkdir()
            return Shop(place, settings)

        for row in (at_random if settings["random"] else at_points)(shop, settings):
            print(json.dumps({**settings, **row}), flush=True)
