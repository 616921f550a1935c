"""Test helpers for agents: a scripted chat model, and a server with fault injection."""

from ec_agents.testing.faults import FAULTS as FAULTS, Fault as Fault
from ec_agents.testing.scripted import (
    Reply as Reply,
    ScriptedChatModel as ScriptedChatModel,
    profile_logprobs as profile_logprobs,
)
from ec_agents.testing.server import FaultServer as FaultServer, completion as completion
