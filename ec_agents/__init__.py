"""Sample N answers at every agent step, rank them by entropy centroid, let only the best one act.

The names below are loaded when they are first used, so that ``import ec_agents`` stays light.
"""

from importlib import import_module

_HOMES = {
    "candidates": ("Candidate", "CandidateSet", "Selection", "Step", "TokenSignals", "Trajectory"),
    "chat_model": ("CentroidChatModel",),
    "chat_openai": ("fast_logprobs",),
    "entropy": (
        "PRESETS",
        "PhaseConfig",
        "concatenate_turns",
        "entropy_centroid",
        "entropy_thresholds",
        "high_entropy_phases",
        "raw_entropy_centroid",
        "standardized_centroid",
        "token_entropies",
    ),
    "errors": (
        "ConfigError",
        "EcAgentsError",
        "LogprobsError",
        "LogprobsMalformed",
        "LogprobsMissing",
        "SamplingError",
        "SelectionError",
        "StateError",
        "TraceError",
        "UnsupportedLogprobs",
    ),
    "graph": ("CentroidScorerNode", "CentroidState", "SamplingNode", "create_centroid_agent", "route_selected"),
    "logprobs": ("choice_candidate", "response_candidates", "token_signals"),
    "middleware": ("EntropyCentroidMiddleware",),
    "messages": ("as_candidate", "message_candidate"),
    "openai_client": ("OpenAIChatModel",),
    "sampling": ("sample",),
    "scoring": (
        "SCORERS",
        "BordaVote",
        "CentroidScorer",
        "CentroidVote",
        "CentroidWeightedVote",
        "DeepConfVote",
        "FirstScorer",
        "MajorityVote",
        "RandomScorer",
        "Scorer",
        "SignalScorer",
        "StandardizedCentroidScorer",
        "TailEntropyScorer",
        "scorer_named",
        "self_certainty",
    ),
    "trace": ("TraceWriter", "read_steps", "read_trajectories"),
    "selection": ("DEFAULT_GUARDS", "Selector", "action_key", "select"),
    "waiting": ("Limiter", "SamplingPolicy"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 # pyright: ignore[reportUnsupportedDunderAll] - __init__.pyi spells it out


def __getattr__(name: str) -> object:
    """Load a public name from its module."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ec_agents' has no attribute {name!r}")
    return getattr(import_module(f"ec_agents.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
