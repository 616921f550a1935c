"""What type checkers see of the names that ``__init__.py`` loads when they are first used."""

from ec_agents.candidates import (
    Candidate as Candidate,
    CandidateSet as CandidateSet,
    Selection as Selection,
    TokenSignals as TokenSignals,
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
    ConfigError as ConfigError,
    EcAgentsError as EcAgentsError,
    LogprobsError as LogprobsError,
    LogprobsMalformed as LogprobsMalformed,
    LogprobsMissing as LogprobsMissing,
    SamplingError as SamplingError,
    SelectionError as SelectionError,
    StateError as StateError,
    UnsupportedLogprobs as UnsupportedLogprobs,
)
from ec_agents.graph import (
    CentroidScorerNode as CentroidScorerNode,
    CentroidState as CentroidState,
    SamplingNode as SamplingNode,
    create_centroid_agent as create_centroid_agent,
    route_selected as route_selected,
)
from ec_agents.logprobs import (
    choice_candidate as choice_candidate,
    response_candidates as response_candidates,
    token_signals as token_signals,
)
from ec_agents.messages import as_candidate as as_candidate, message_candidate as message_candidate
from ec_agents.sampling import sample as sample
from ec_agents.scoring import (
    CentroidScorer as CentroidScorer,
    FirstScorer as FirstScorer,
    RandomScorer as RandomScorer,
    SCORERS as SCORERS,
    Scorer as Scorer,
    StandardizedCentroidScorer as StandardizedCentroidScorer,
)
from ec_agents.selection import (
    DEFAULT_GUARDS as DEFAULT_GUARDS,
    Selector as Selector,
    action_key as action_key,
    select as select,
)
from ec_agents.waiting import Limiter as Limiter, SamplingPolicy as SamplingPolicy
