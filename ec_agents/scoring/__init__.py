"""Stage 4 - score: candidates → one number each, by the entropy centroid, a baseline or a vote."""

from collections.abc import Callable, Mapping
from functools import partial

from ec_agents.errors import ConfigError
from ec_agents.scoring.answers import ANSWERS, answer_key, voting_on
from ec_agents.scoring.base import (
    Best,
    CountsVotes,
    FindsPhases,
    KnowsChance,
    KnowsNoise,
    Scorer,
    Scores,
    SignalScorer,
)
from ec_agents.scoring.baselines import (
    FirstScorer,
    RandomScorer,
    TailEntropyScorer,
    bottom_groups,
    groups_odds,
    lowest_group,
    max_entropy,
    max_entropy_odds,
    mean,
    mean_entropy,
    mean_logprob,
    self_certainty,
    standard_error,
    sum_logprob,
    sum_logprob_odds,
    tail,
    tail_mean,
    top_k_certainty,
)
from ec_agents.scoring.centroids import CentroidScorer, StandardizedCentroidScorer, raw_centroid, raw_centroid_noise
from ec_agents.scoring.learned import Learned, read_selector
from ec_agents.scoring.noise import Chance, chance_of_margin, normal_chance
from ec_agents.scoring.votes import (
    BordaVote,
    CentroidVote,
    CentroidWeightedVote,
    DeepConfVote,
    MajorityVote,
    action_key,
)

__all__ = [
    "ANSWERS",
    "SCORERS",
    "Best",
    "BordaVote",
    "CentroidScorer",
    "CentroidVote",
    "CentroidWeightedVote",
    "Chance",
    "CountsVotes",
    "DeepConfVote",
    "FindsPhases",
    "FirstScorer",
    "KnowsChance",
    "KnowsNoise",
    "Learned",
    "MajorityVote",
    "RandomScorer",
    "Scorer",
    "Scores",
    "SignalScorer",
    "StandardizedCentroidScorer",
    "TailEntropyScorer",
    "action_key",
    "chance_of_margin",
    "normal_chance",
    "scorer_named",
    "self_certainty",
]

RAW_ENTROPY_CENTROID = SignalScorer("raw-entropy-centroid", "lowest", raw_centroid, raw_centroid_noise)
"""Mean position of the tokens weighted by entropy, without phases."""
MEAN_ENTROPY = SignalScorer("mean-entropy", "lowest", mean_entropy, lambda s: standard_error(s.entropies))
"""Mean token entropy."""
MAX_ENTROPY = SignalScorer("max-entropy", "lowest", max_entropy, odds=max_entropy_odds)
"""Highest token entropy."""
SELF_CERTAINTY = SignalScorer("self-certainty", "highest", top_k_certainty, lambda s: standard_error(s.confidences))
"""Self-Certainty over the K alternatives: mean confidence - ln K, exact if K is the whole vocabulary."""
DEEPCONF_MEAN = SignalScorer(
    "deepconf-mean", "highest", lambda s: mean(s.confidences), lambda s: standard_error(s.confidences)
)
"""DeepConf's mean confidence."""
DEEPCONF_TAIL = SignalScorer(
    "deepconf-tail", "highest", lambda s: tail_mean(s.confidences), lambda s: standard_error(tail(s.confidences))
)
"""DeepConf's mean confidence of the last 2048 tokens."""
DEEPCONF_LOWEST_GROUP = SignalScorer(
    "deepconf-lowest-group", "highest", lambda s: lowest_group(s.confidences), odds=groups_odds()
)
"""DeepConf's least confident 2048 consecutive tokens."""
DEEPCONF_BOTTOM_10 = SignalScorer(
    "deepconf-bottom-10", "highest", lambda s: bottom_groups(s.confidences), odds=groups_odds(0.1)
)
"""DeepConf's mean over the least confident tenth of all groups of 2048 tokens."""
MEAN_LOGPROB = SignalScorer("mean-logprob", "highest", mean_logprob, lambda s: standard_error(s.logprobs))
"""Mean log-probability of the drawn tokens: the lowest perplexity wins."""
SUM_LOGPROB = SignalScorer("sum-logprob", "highest", sum_logprob, odds=sum_logprob_odds)
"""Log-probability of the whole response; favours short ones."""
SHORTEST = SignalScorer("shortest", "lowest", lambda s: s.n_tokens)
"""Fewest tokens."""
LONGEST = SignalScorer("longest", "highest", lambda s: s.n_tokens)
"""Most tokens."""

_FIXED = (
    RAW_ENTROPY_CENTROID,
    MEAN_ENTROPY,
    MAX_ENTROPY,
    SELF_CERTAINTY,
    DEEPCONF_MEAN,
    DEEPCONF_TAIL,
    DEEPCONF_LOWEST_GROUP,
    DEEPCONF_BOTTOM_10,
    MEAN_LOGPROB,
    SUM_LOGPROB,
    SHORTEST,
    LONGEST,
)


def _itself(scorer: Scorer) -> Scorer:
    return scorer


SCORERS: Mapping[str, Callable[[], Scorer]] = {
    "centroid": CentroidScorer,
    "centroid-short": lambda: CentroidScorer("short"),
    "standardized-centroid": StandardizedCentroidScorer,
    "standardized-centroid-short": lambda: StandardizedCentroidScorer("short"),
    **{scorer.name: partial(_itself, scorer) for scorer in _FIXED},
    "tail-entropy": TailEntropyScorer,
    "first": FirstScorer,
    "random": RandomScorer,
    "majority": MajorityVote,
    "majority-tool-names": lambda: MajorityVote(partial(action_key, names_only=True)),
    "majority-then-centroid": lambda: MajorityVote(tie_break=CentroidScorer()),
    "centroid-vote": lambda: CentroidVote(CentroidScorer()),
    "centroid-weighted-vote": lambda: CentroidWeightedVote(CentroidScorer()),
    "borda": lambda: BordaVote(SELF_CERTAINTY),
    "deepconf-vote": lambda: DeepConfVote(DEEPCONF_BOTTOM_10),
    "deepconf-vote-10": lambda: DeepConfVote(DEEPCONF_BOTTOM_10, keep_percent=10.0),
}
"""The scorers by name, for command lines and configuration files."""


def scorer_named(name: str) -> Scorer:
    """A fresh scorer by its name in ``SCORERS``, or the one in a ``.json`` file that ``ec-agents pilot`` wrote.

    Raises:
        ConfigError: There is none of that name, or the file is not a saved selector.
    """
    if name.endswith(".json"):
        return _saved_scorer(name)
    if name not in SCORERS:
        raise ConfigError(f"no scorer is called {name!r}; known: {', '.join(SCORERS)}")
    return SCORERS[name]()


def _saved_scorer(path: str) -> Scorer:
    """The scorer in a file: a learned one, or the name of another and what its votes compare."""
    name, data = read_selector(path)
    if name == "learned":
        return Learned.load(path)
    answer = str(data.get("answer", "text"))
    if name not in SCORERS or answer not in {"text", *ANSWERS}:
        raise ConfigError(
            f"{path} names the scorer {name!r} and answers found by {answer!r}, which only your code knows: give "
            "selector= a scorer made there"
        )
    return voting_on(SCORERS[name](), answer_key(ANSWERS.get(answer)))
