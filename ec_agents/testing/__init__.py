"""For tests of one's own agents: a chat model that answers from a script, and a server with every fault on order."""

from ec_agents.testing.faults import FAULTS as FAULTS, Fault as Fault
from ec_agents.testing.scripted import (
    Reply as Reply,
    ScriptedChatModel as ScriptedChatModel,
    profile_logprobs as profile_logprobs,
)
from ec_agents.testing.server import FaultServer as FaultServer, completion as completion
