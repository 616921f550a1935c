"""The rest of a response: usage."""

from typing import Any

import pytest
from langchain_core.messages import AIMessage
from openai.types.completion_usage import CompletionUsage

from ec_agents import Budget, Price, as_candidate, sample
from ec_agents.budget import calls_of
from ec_agents.responses import usage_counts

OPENAI = {
    "prompt_tokens": 1000,
    "completion_tokens": 10,
    "total_tokens": 1010,
    "prompt_tokens_details": {"cached_tokens": 400},
}
LANGCHAIN: Any = {
    "input_tokens": 1000,
    "output_tokens": 10,
    "total_tokens": 1010,
    "input_token_details": {"cache_read": 400},
}


@pytest.mark.parametrize(
    "usage", [OPENAI, LANGCHAIN, CompletionUsage.model_validate(OPENAI)], ids=["dict", "message", "sdk"]
)
def test_cached_tokens(usage: Any):
    """Input that the provider read from its cache is counted in every form of usage."""
    assert usage_counts(usage) == {
        "input_tokens": 1000,
        "output_tokens": 10,
        "total_tokens": 1010,
        "cached_tokens": 400,
    }


@pytest.mark.parametrize(
    "details", [None, {}, {"cached_tokens": 0}, {"cached_tokens": None}, {"cached_tokens": "x"}, [4]]
)
def test_nothing_cached(details: Any):
    """Without such tokens, or with damaged details, the other counts stand."""
    found = usage_counts({**OPENAI, "prompt_tokens_details": details})
    assert found == {"input_tokens": 1000, "output_tokens": 10, "total_tokens": 1010}


async def test_cached_tokens_have_their_price():
    """From a LangChain message to the budget around it."""

    async def call(index: int) -> AIMessage:
        return AIMessage("a", usage_metadata=LANGCHAIN)

    price = Price(input=10.0, output=100.0, cached=1.0)
    with Budget(cost=1.0, prices={"m": price}) as budget, calls_of("m"):
        found = await sample(call, n=2)
    assert as_candidate(found.messages[0], 0).usage == found.candidates[0].usage
    assert budget.spent.cached_tokens == 800
    assert budget.spent.cost == pytest.approx(2 * (600 * 10 + 400 * 1 + 10 * 100) / 1e6)
