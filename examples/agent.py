"""The prebuilt agent: it solves a puzzle with a tool and samples 8 candidates per step from the embedded model."""

from ec_agents import create_centroid_agent
from ec_agents.embedded import EmbeddedChatModel, make_tasks

task = make_tasks("play", 1)[0]
agent = create_centroid_agent(EmbeddedChatModel(seed=1), [task.calc_tool()], n=8)
for update in agent.stream({"messages": [("user", task.prompt)]}, stream_mode="updates"):
    for node, change in update.items():
        for message in change.get("messages", []):
            calls = [call["args"] for call in getattr(message, "tool_calls", [])]
            print(f"{node}: {message.text or calls}")
            if record := message.response_metadata.get("ec_agents"):
                print(f"   candidate {record['chosen']} of {len(record['scores'])}, {record['reason']}")
