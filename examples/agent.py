"""An agent that solves a puzzle with a tool, choosing among 8 answers of the embedded model at every step."""

from ec_agents import create_centroid_agent
from ec_agents.embedded import EmbeddedChatModel, make_tasks

task = make_tasks("play", 1)[0]
agent = create_centroid_agent(EmbeddedChatModel(), [task.calc_tool()], n=8)
for update in agent.stream({"messages": [("user", task.prompt)]}, stream_mode="updates"):
    for node, change in update.items():
        for message in change.get("messages", []):
            print(f"{node}: {message.text or message.tool_calls}")
            if "ec_agents" in message.response_metadata:
                print("   scores:", message.response_metadata["ec_agents"]["scores"])
