"""For tests of one's own agents: a chat model that answers from a script, and a server with every fault on order."""

from ec_agents.testing.faults import FAULTS as FAULTS
from ec_agents.testing.faults import Fault as Fault
from ec_agents.testing.scripted import Reply as Reply
from ec_agents.testing.scripted import ScriptedChatModel as ScriptedChatModel
from ec_agents.testing.scripted import profile_logprobs as profile_logprobs
from ec_agents.testing.server import FaultServer as FaultServer
