"""Candidates and signals made by hand."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ec_agents.candidates import Candidate, TokenSignals


def signals(entropies: ArrayLike, n_alternatives: int = 20, *, confidences: ArrayLike | None = None) -> TokenSignals:
    """Signals with these entropies; the three arrays differ, so that a mix-up shows."""
    values = np.array(entropies, dtype=np.float32)
    given = values + 1 if confidences is None else np.array(confidences, dtype=np.float32)
    return TokenSignals(entropies=values, logprobs=-values, confidences=given, n_alternatives=n_alternatives)


def candidate(index: int, entropies: ArrayLike | None = None, **fields: Any) -> Candidate:
    """A candidate with a text and these entropies, or without signals."""
    own: dict[str, Any] = {"content": f"answer {index}", "signals": None if entropies is None else signals(entropies)}
    return Candidate(index=index, **{**own, **fields})
