from ec_agents.agents.at_most_once import IdempotencyKey as IdempotencyKey, UnknownCall as UnknownCall, once as once
from ec_agents.agents.chat_model import CentroidChatModel as CentroidChatModel
from ec_agents.agents.graph import (
    CentroidScorerNode as CentroidScorerNode,
    SamplingNode as SamplingNode,
    create_centroid_agent as create_centroid_agent,
    route_selected as route_selected,
)
from ec_agents.agents.middleware import EntropyCentroidMiddleware as EntropyCentroidMiddleware
from ec_agents.agents.state import CentroidState as CentroidState
from ec_agents.budget import Budget as Budget, Price as Price, Spent as Spent
from ec_agents.candidates import (
    Candidate as Candidate,
    CandidateSet as CandidateSet,
    Selection as Selection,
    Step as Step,
    TokenSignals as TokenSignals,
    Trajectory as Trajectory,
)
from ec_agents.effort import (
    Agree as Agree,
    ByRisk as ByRisk,
    Effort as Effort,
    Escalate as Escalate,
    Prime as Prime,
    StepView as StepView,
)
from ec_agents.entropy import (
    PRESETS as PRESETS,
    PhaseConfig as PhaseConfig,
    concatenate_turns as concatenate_turns,
    entropy_centroid as entropy_centroid,
    entropy_thresholds as entropy_thresholds,
    high_entropy_phases as high_entropy_phases,
    raw_entropy_centroid as raw_entropy_centroid,
    standardized_centroid as standardized_centroid,
    token_entropies as token_entropies,
)
from ec_agents.errors import (
    ActionError as ActionError,
    BudgetExceeded as BudgetExceeded,
    ConfigError as ConfigError,
    EcAgentsError as EcAgentsError,
    LogprobsError as LogprobsError,
    LogprobsMalformed as LogprobsMalformed,
    LogprobsMissing as LogprobsMissing,
    RedirectRefused as RedirectRefused,
    ResponseTooLarge as ResponseTooLarge,
    SamplingError as SamplingError,
    SelectionError as SelectionError,
    ServerError as ServerError,
    StateError as StateError,
    TraceError as TraceError,
    UnsupportedLogprobs as UnsupportedLogprobs,
    WriteError as WriteError,
)
from ec_agents.logprobs import (
    token_signals as token_signals,
)
from ec_agents.messages import as_candidate as as_candidate, message_candidate as message_candidate
from ec_agents.policy import Limiter as Limiter, SamplingPolicy as SamplingPolicy
from ec_agents.responses import (
    choice_candidate as choice_candidate,
    response_candidates as response_candidates,
)
from ec_agents.sampling import sample as sample
from ec_agents.scoring import (
    SCORERS as SCORERS,
    BordaVote as BordaVote,
    CentroidScorer as CentroidScorer,
    CentroidVote as CentroidVote,
    CentroidWeightedVote as CentroidWeightedVote,
    DeepConfVote as DeepConfVote,
    FirstScorer as FirstScorer,
    MajorityVote as MajorityVote,
    RandomScorer as RandomScorer,
    Scorer as Scorer,
    SignalScorer as SignalScorer,
    StandardizedCentroidScorer as StandardizedCentroidScorer,
    TailEntropyScorer as TailEntropyScorer,
    scorer_named as scorer_named,
    self_certainty as self_certainty,
)
from ec_agents.selection import (
    DEFAULT_GUARDS as DEFAULT_GUARDS,
    Selector as Selector,
    action_key as action_key,
    select as select,
)
from ec_agents.servers.fast_logprobs import fast_logprobs as fast_logprobs
from ec_agents.servers.openai_chat_model import OpenAIChatModel as OpenAIChatModel
from ec_agents.trace import (
    TraceWriter as TraceWriter,
    read_steps as read_steps,
    read_trajectories as read_trajectories,
)

__version__: str
__all__: list[str]
