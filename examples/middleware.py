"""The middleware in agents of ``langchain.agents.create_agent``: one line, human in the loop, resuming after a crash.

Offline, on the embedded model: ``python examples/middleware.py``
Live: ``python examples/middleware.py --base-url http://localhost:8000/v1 --model my-model`` (needs langchain-openai)
"""

import argparse
import os
from typing import Any

from langchain.agents import create_agent  # pyright: ignore[reportUnknownVariableType]
from langchain.agents.middleware import HumanInTheLoopMiddleware, ModelCallLimitMiddleware
from langchain_core.language_models import BaseChatModel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from pydantic import SecretStr

from ec_agents import EntropyCentroidMiddleware
from ec_agents.embedded import EmbeddedChatModel, make_tasks

TASK = next(task for task in make_tasks("play", 50) if len(task.numbers) == 3)
LIMIT = 6
THREAD: Any = {"configurable": {"thread_id": "1"}}
ASK: Any = {"messages": [("user", TASK.prompt)]}


def one_line(model: BaseChatModel) -> None:
    """Add one line to an existing agent."""
    middleware: list[Any] = [ModelCallLimitMiddleware(run_limit=LIMIT), EntropyCentroidMiddleware(n=8)]
    agent: Any = create_agent(model, [TASK.calc_tool()], middleware=middleware)
    print(f"question: {TASK.prompt}")
    for mode, event in agent.stream(ASK, stream_mode=["custom", "messages"]):
        if mode == "custom" and event["ec_agents"] == "choice":
            scores = [score if score is None else round(score, 3) for score in event["scores"]]
            print(f"  chosen {event['chosen']} ({event['reason']}) of {scores}")
        elif mode == "messages":
            message, _ = event
            print(f"  {message.type}: {[call['args'] for call in getattr(message, 'tool_calls', [])] or message.text}")


def approval(model: BaseChatModel) -> None:
    """A person approves the chosen action, and exactly that one runs; nothing is sampled again."""
    middleware: list[Any] = [
        ModelCallLimitMiddleware(thread_limit=LIMIT),
        HumanInTheLoopMiddleware(interrupt_on={"calc": True}),
        EntropyCentroidMiddleware(n=4),
    ]
    agent: Any = create_agent(model, [TASK.calc_tool()], middleware=middleware, checkpointer=InMemorySaver())
    state = agent.invoke(ASK, THREAD)
    while "__interrupt__" in state:
        requests = state["__interrupt__"][0].value["action_requests"]
        print(f"approved: {[request['args'] for request in requests]}")
        state = agent.invoke(Command(resume={"decisions": [{"type": "approve"}] * len(requests)}), THREAD)
    print(f"answer: {state['messages'][-1].text}")


def crash(model: BaseChatModel) -> None:
    """A run that fails in a tool resumes from the chosen action."""
    work, failures = TASK.calc_tool(), [RuntimeError("the machine went down")]

    def calc(expression: str) -> str:
        """Apply one operation to two of the remaining numbers."""
        if failures:
            raise failures.pop()
        return work(expression)

    middleware: list[Any] = [ModelCallLimitMiddleware(thread_limit=LIMIT), EntropyCentroidMiddleware(n=4, durable=True)]
    agent: Any = create_agent(model, [calc], middleware=middleware, checkpointer=InMemorySaver())
    try:
        state = agent.invoke(ASK, THREAD)
    except RuntimeError as error:
        print(f"crashed: {error}; resuming")
        state = agent.invoke(None, THREAD)
    print(f"answer: {state['messages'][-1].text}")


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", help="an OpenAI-compatible server; without it, the embedded model answers")
    parser.add_argument("--model", default="default")
    options = parser.parse_args()
    model: BaseChatModel = EmbeddedChatModel(seed=1)
    if options.base_url:
        from langchain_openai import ChatOpenAI  # noqa: PLC0415 - only live

        model = ChatOpenAI(
            base_url=options.base_url, model=options.model, api_key=SecretStr(os.environ.get("OPENAI_API_KEY", "none"))
        )
    one_line(model)
    approval(model)
    crash(model)


if __name__ == "__main__":
    main()
