"""An agent on any OpenAI-compatible server: vLLM, SGLang, llama-server, OpenAI and others.

Run it with the base URL and the name of a model: ``python examples/openai_server.py http://localhost:8000/v1 mine``.
Without them, the model that ships with the package is served locally.
"""

import sys
from contextlib import ExitStack

from ec_agents import create_centroid_agent
from ec_agents.embedded import EmbeddedChatModel
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.testing import FaultServer

QUESTION = "Ann has 12. Bob has 5 more than Ann. How many has Bob?"


def main(base_url: str = "", model: str = "any") -> None:
    """Ask one question, with eight candidates, and show how they were ranked."""
    with ExitStack() as stack:
        base_url = base_url or stack.enter_context(FaultServer(EmbeddedChatModel())).base_url
        chat = OpenAIChatModel(model=model, base_url=base_url, temperature=1.0, timeout=120)
        agent = create_centroid_agent(chat, n=8, top_logprobs=20)
        state = agent.invoke({"messages": [("user", QUESTION)]})
    for index, candidate in state["ec_decision"]["candidates"].items():
        score = state["ec_decision"]["scores"][index]
        mark = "→" if int(index) == state["ec_decision"]["chosen"] else " "
        print(f"{mark} {'unscored' if score is None else f'{score:8.3f}'}  {candidate['content'][-60:]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
