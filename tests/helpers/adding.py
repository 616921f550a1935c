"""What tests of agents share: an agent that is asked to add, and the script of its model."""

from collections.abc import Callable
from typing import Any

from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig

from ec_agents.testing import Reply

LATE, EARLY = ".......!..", ".!........"
"""Profiles with a high and with a low centroid."""
ASK: Any = {"messages": [HumanMessage("what is 1 + 2?")]}
THREAD: RunnableConfig = {"configurable": {"thread_id": "1"}}


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def call_add(a: Any, b: Any, profile: str | None = LATE, **fields: Any) -> Reply:
    """A candidate that calls the tool."""
    return Reply(tool_calls=[("add", {"a": a, "b": b})], profile=profile, **fields)


def two_steps() -> list[Reply]:
    """A step whose second of three candidates wins and acts, then a step whose first wins and ends the run."""
    return [
        call_add(1, 1),
        call_add(1, 2, EARLY),
        call_add(9, 9),
        Reply(content="it is 3", profile=EARLY),
        Reply(content="it is 4", profile=LATE),
        Reply(content="it is 5", profile=LATE),
    ]


def record(message: AIMessage) -> dict[str, Any]:
    """The evidence of the step that gave the message."""
    return message.response_metadata["ec_agents"]


class Dying(AgentMiddleware[Any, Any, Any]):
    """Fails the step once, after its candidates are drawn, as a crash would."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 1

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        response = handler(request)
        self._fail()
        return response

    async def awrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        response = await handler(request)
        self._fail()
        return response

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("crash")
