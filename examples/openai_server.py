"""An agent on any OpenAI-compatible server: vLLM, SGLang, llama-server, OpenAI and others.

Offline, with the embedded model behind a local server: ``python examples/openai_server.py``
Live: ``python examples/openai_server.py http://localhost:8000/v1 my-model``
"""

import sys
from contextlib import ExitStack

from ec_agents import OpenAIChatModel, create_centroid_agent
from ec_agents.embedded import EmbeddedChatModel, make_tasks
from ec_agents.testing import FaultServer

TASK = make_tasks("play", 1)[0]


def main(base_url: str = "", model: str = "any") -> None:
    """Sample eight first steps of a puzzle and show how they were ranked."""
    with ExitStack() as stack:
        base_url = base_url or stack.enter_context(FaultServer(EmbeddedChatModel())).base_url
        chat = OpenAIChatModel(model=model, base_url=base_url, temperature=1.0, seed=1, timeout=120)
        agent = create_centroid_agent(chat, [TASK.calc_tool()], n=8, interrupt_before=["tools"])
        state = agent.invoke({"messages": [("user", TASK.prompt)]})
    decision = state["ec_decision"]
    for index, (candidate, score) in enumerate(zip(decision["candidates"], decision["scores"], strict=True)):
        mark = "→" if index == decision["chosen"] else " "
        action = [call["args"] for call in candidate["tool_calls"]] or candidate["content"]
        print(f"{mark} {'unscored' if score is None else f'{score:8.3f}'}  {action}")


if __name__ == "__main__":
    main(*sys.argv[1:])
