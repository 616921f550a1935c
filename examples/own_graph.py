"""Nodes in your own graph: four candidates per step, and sixteen more where the choice was close.

Offline, on the embedded model: ``python examples/own_graph.py``
Live: ``python examples/own_graph.py --base-url http://localhost:8000/v1 --model my-model``
"""

import argparse
from typing import Any, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import RemoveMessage
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command

from ec_agents import CentroidScorerNode, CentroidState, OpenAIChatModel, SamplingNode, route_selected
from ec_agents.embedded import EmbeddedChatModel, make_tasks

TASK = make_tasks("play", 1)[0]
CLOSE = 0.05
"""A margin below this, with no other candidate doing the same, samples more."""


class State(CentroidState, total=False):
    """The conversation, the evidence, and whether this step was sampled twice."""

    again: bool


def weigh(state: State) -> Command[Literal["more", "tools", "__end__"]]:
    """Act on a clear choice; take a close one back, once per step."""
    chosen, decision = state.get("messages", [])[-1], state.get("ec_decision", {})
    margin, n_agree = decision["margin"], decision["n_agree"]
    calls = [call["args"] for call in getattr(chosen, "tool_calls", [])]
    print(f"{calls or chosen.text}: margin {margin or 0:.3f}, {n_agree} candidates agree")
    is_close = n_agree == 1 and margin is not None and margin < CLOSE
    if is_close and not state.get("again") and chosen.id:
        return Command(goto="more", update={"messages": [RemoveMessage(chosen.id)], "again": True})
    return Command(goto=route_selected(state), update={"again": False})


def build(model: BaseChatModel) -> Any:
    """``sample → score → weigh ⇢ more → score``, ``weigh ⇢ tools → sample``, ``weigh ⇢ END``."""
    tools = [TASK.calc_tool()]
    graph = StateGraph[Any, Any, Any, Any](State)
    graph.add_node("sample", SamplingNode(model, n=4, tools=tools)).add_edge(START, "sample")
    graph.add_node("more", SamplingNode(model, n=16, tools=tools)).add_edge("more", "score")
    graph.add_node("score", CentroidScorerNode()).add_edge("sample", "score").add_edge("score", "weigh")
    graph.add_node("weigh", weigh)
    graph.add_node("tools", ToolNode(tools, handle_tool_errors=True)).add_edge("tools", "sample")
    return graph.compile()


def main() -> None:
    """Solve one puzzle."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", help="an OpenAI-compatible server; without it, the embedded model answers")
    parser.add_argument("--model", default="default")
    options = parser.parse_args()
    live = options.base_url and OpenAIChatModel(base_url=options.base_url, model=options.model)
    agent = build(live or EmbeddedChatModel(seed=3))
    print(TASK.prompt)
    state = agent.invoke({"messages": [("user", TASK.prompt)]}, {"recursion_limit": 60})
    print(f"answer: {state['messages'][-1].text}")


if __name__ == "__main__":
    main()
