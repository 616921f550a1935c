from ec_agents.candidates import (
    Candidate as Candidate,
)
from ec_agents.candidates import (
    CandidateSet as CandidateSet,
)
from ec_agents.candidates import (
    Selection as Selection,
)
from ec_agents.candidates import (
    Step as Step,
)
from ec_agents.candidates import (
    TokenSignals as TokenSignals,
)
from ec_agents.candidates import (
    Trajectory as Trajectory,
)
from ec_agents.agents.chat_model import CentroidChatModel as CentroidChatModel
from ec_agents.servers.fast_logprobs import fast_logprobs as fast_logprobs
from ec_agents.entropy import (
    PRESETS as PRESETS,
)
from ec_agents.entropy import (
    PhaseConfig as PhaseConfig,
)
from ec_agents.entropy import (
    concatenate_turns as concatenate_turns,
)
from ec_agents.entropy import (
    entropy_centroid as entropy_centroid,
)
from ec_agents.entropy import (
    entropy_thresholds as entropy_thresholds,
)
from ec_agents.entropy import (
    high_entropy_phases as high_entropy_phases,
)
from ec_agents.entropy import (
    raw_entropy_centroid as raw_entropy_centroid,
)
from ec_agents.entropy import (
    standardized_centroid as standardized_centroid,
)
from ec_agents.entropy import (
    token_entropies as token_entropies,
)
from ec_agents.errors import (
    ConfigError as ConfigError,
)
from ec_agents.errors import (
    EcAgentsError as EcAgentsError,
)
from ec_agents.errors import (
    LogprobsError as LogprobsError,
)
from ec_agents.errors import (
    LogprobsMalformed as LogprobsMalformed,
)
from ec_agents.errors import (
    LogprobsMissing as LogprobsMissing,
)
from ec_agents.errors import (
    SamplingError as SamplingError,
)
from ec_agents.errors import (
    SelectionError as SelectionError,
)
from ec_agents.errors import (
    StateError as StateError,
)
from ec_agents.errors import (
    TraceError as TraceError,
)
from ec_agents.errors import (
    UnsupportedLogprobs as UnsupportedLogprobs,
)
from ec_agents.agents.graph import (
    CentroidScorerNode as CentroidScorerNode,
)
from ec_agents.agents.graph import (
    CentroidState as CentroidState,
)
from ec_agents.agents.graph import (
    SamplingNode as SamplingNode,
)
from ec_agents.agents.graph import (
    create_centroid_agent as create_centroid_agent,
)
from ec_agents.agents.graph import (
    route_selected as route_selected,
)
from ec_agents.logprobs import (
    choice_candidate as choice_candidate,
)
from ec_agents.logprobs import (
    response_candidates as response_candidates,
)
from ec_agents.logprobs import (
    token_signals as token_signals,
)
from ec_agents.messages import as_candidate as as_candidate
from ec_agents.messages import message_candidate as message_candidate
from ec_agents.agents.middleware import EntropyCentroidMiddleware as EntropyCentroidMiddleware
from ec_agents.servers.openai_chat_model import OpenAIChatModel as OpenAIChatModel
from ec_agents.sampling import sample as sample
from ec_agents.scoring import (
    SCORERS as SCORERS,
)
from ec_agents.scoring import (
    BordaVote as BordaVote,
)
from ec_agents.scoring import (
    CentroidScorer as CentroidScorer,
)
from ec_agents.scoring import (
    CentroidVote as CentroidVote,
)
from ec_agents.scoring import (
    CentroidWeightedVote as CentroidWeightedVote,
)
from ec_agents.scoring import (
    DeepConfVote as DeepConfVote,
)
from ec_agents.scoring import (
    FirstScorer as FirstScorer,
)
from ec_agents.scoring import (
    MajorityVote as MajorityVote,
)
from ec_agents.scoring import (
    RandomScorer as RandomScorer,
)
from ec_agents.scoring import (
    Scorer as Scorer,
)
from ec_agents.scoring import (
    SignalScorer as SignalScorer,
)
from ec_agents.scoring import (
    StandardizedCentroidScorer as StandardizedCentroidScorer,
)
from ec_agents.scoring import (
    TailEntropyScorer as TailEntropyScorer,
)
from ec_agents.scoring import (
    scorer_named as scorer_named,
)
from ec_agents.scoring import (
    self_certainty as self_certainty,
)
from ec_agents.selection import (
    DEFAULT_GUARDS as DEFAULT_GUARDS,
)
from ec_agents.selection import (
    Selector as Selector,
)
from ec_agents.selection import (
    action_key as action_key,
)
from ec_agents.selection import (
    select as select,
)
from ec_agents.trace import (
    TraceWriter as TraceWriter,
)
from ec_agents.trace import (
    read_steps as read_steps,
)
from ec_agents.trace import (
    read_trajectories as read_trajectories,
)
from ec_agents.policy import Limiter as Limiter
from ec_agents.policy import SamplingPolicy as SamplingPolicy

_HOME_OF: dict[str, str]
__all__: list[str]
