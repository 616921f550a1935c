from ec_agents.agents.at_most_once import (
    IdempotencyKey as IdempotencyKey,
    UnknownCall as UnknownCall,
    once as once,
    once_where_destructive as once_where_destructive,
)
from ec_agents.agents.chat_model import CentroidChatModel as CentroidChatModel
from ec_agents.agents.graph import (
    CentroidScorerNode as CentroidScorerNode,
    SamplingNode as SamplingNode,
    create_centroid_agent as create_centroid_agent,
    route_selected as route_selected,
)
from ec_agents.agents.middleware import (
    CentroidAgentState as CentroidAgentState,
    EntropyCentroidMiddleware as EntropyCentroidMiddleware,
)
from ec_agents.agents.quiet_model import sampling_model as sampling_model
from ec_agents.agents.state import (
    CentroidState as CentroidState,
    pack_candidates as pack_candidates,
    unpack_candidates as unpack_candidates,
)
