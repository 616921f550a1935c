from ec_agents.servers.json_actions import (
    ActionFormat as ActionFormat,
    JsonActions as JsonActions,
    strict_schema as strict_schema,
)
from ec_agents.servers.openai_chat_model import OpenAIChatModel as OpenAIChatModel
from ec_agents.servers.probe import (
    ProbeFinding as ProbeFinding,
    ProbeReport as ProbeReport,
    probe_endpoint as probe_endpoint,
)
from ec_agents.servers.providers import (
    Capabilities as Capabilities,
    Endpoint as Endpoint,
    Verdict as Verdict,
    capabilities as capabilities,
    endpoint_of as endpoint_of,
    forget_verdicts as forget_verdicts,
    provider_of as provider_of,
)
