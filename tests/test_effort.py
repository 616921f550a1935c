"""How many candidates a step deserves."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, strategies as st
from scipy.stats import beta

from ec_agents import Agree, ByRisk, Candidate, ConfigError, Escalate, Prime, SamplingPolicy, StepView, sample
from ec_agents.effort import Effort, effort_for, lead_probability
from ec_agents.errors import SamplingError
from ec_agents.testing import profile_logprobs

CERTAIN, UNCERTAIN = "........", "!!!!!!!!"


def response(text: str, profile: str = CERTAIN) -> dict[str, Any]:
    return {"message": {"content": text}, "logprobs": profile_logprobs(profile), "finish_reason": "stop"}


def calls(*names: str) -> dict[str, Any]:
    functions = [{"id": f"c{i}", "function": {"name": name, "arguments": "{}"}} for i, name in enumerate(names)]
    return {"message": {"content": "", "tool_calls": functions}, "logprobs": None, "finish_reason": "tool_calls"}


async def drawn(responses: Sequence[Any], effort: Effort, n: int = 8, **policy: Any) -> Any:
    """Sample from a script by index; an exception in it is raised."""

    async def call(index: int) -> Any:
        await asyncio.sleep(0)
        if isinstance(responses[index], Exception):
            raise responses[index]
        return responses[index]

    return await sample(call, n=n, effort=effort, policy=SamplingPolicy(**policy))


@given(st.integers(0, 200), st.integers(0, 200))
def test_lead_probability(leader: int, second: int):
    """The tail of the binomial is the mass of the Beta posterior above one half."""
    assert lead_probability(leader, second) == pytest.approx(beta.sf(0.5, leader + 1, second + 1), abs=1e-9)


@given(st.lists(st.sampled_from("abc"), min_size=8, max_size=8), st.floats(0.6, 0.99), st.integers(1, 8))
def test_agree_draws_no_more_than_needed(texts: list[str], confidence: float, first: int):
    """It stops when the vote is beyond doubt or cannot be overturned, and not before."""
    effort = Agree(first=first, confidence=confidence)
    found = asyncio.run(drawn([response(text) for text in texts], effort))
    assert sum(found.waves) == len(found.candidates) <= 8
    assert found.waves[0] == first or first == 1
    assert effort(found.candidates, 8 - len(found.candidates)) == 0


@pytest.mark.parametrize(("texts", "waves"), [("aaaaaaaa", (2, 2)), ("abaaaaaa", (2, 5)), ("abcdefgh", (2, 5, 1))])
async def test_waves(texts: str, waves: tuple[int, ...]):
    """Each wave is the smallest that could settle the vote."""
    found = await drawn([response(text) for text in texts], Agree())
    assert tuple(found.waves) == waves


async def test_calls_in_flight_are_cancelled():
    """A vote that is settled while calls are in flight cancels them."""
    cancelled: list[int] = []

    async def call(index: int) -> Any:
        if index < 4:
            return response("a")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(index)
            raise

    found = await sample(call, n=8, effort=Agree(first=8))
    assert [c.index for c in found.candidates] == [0, 1, 2, 3]
    assert sorted(cancelled) == [4, 5, 6, 7]
    assert "not needed: Agree: 4 candidates agree" in str(found.failures[7])


async def test_flawed_candidates_do_not_vote():
    """Candidates that were cut off agree on nothing."""
    cut = {**response("a"), "finish_reason": "length"}
    assert len((await drawn([cut] * 8, Agree())).candidates) == 8


async def test_failures_are_replaced():
    """A failed call counts as none: another one is drawn instead, up to N."""
    found = await drawn([ValueError("x"), *[response("a")] * 7], Agree())
    assert (len(found.candidates), len(found.failures)) == (4, 1)
    with pytest.raises(SamplingError, match="0 of 8 calls succeeded"):
        await drawn([ValueError("x")] * 8, Agree())


@pytest.mark.parametrize(("profile", "count"), [(CERTAIN, 1), (UNCERTAIN, 8)])
async def test_escalate(profile: str, count: int):
    """The first candidate's score decides about the rest."""
    found = await drawn([response("a", profile)] * 8, Escalate(threshold=0.5))
    assert len(found.candidates) == count
    assert ("is certain" in found.stopped) == (count == 1)


async def test_escalate_without_signals():
    """What cannot be scored is uncertain."""
    assert len((await drawn([{**response("a"), "logprobs": None}] * 8, Escalate(threshold=0.5))).candidates) == 8
    assert len((await drawn([response("a")] * 8, Escalate(scorer="self-certainty", threshold=99.0))).candidates) == 8


async def test_prime():
    """The first call ends before the others begin; another effort may decide about them."""
    started: list[int] = []

    async def call(index: int) -> Any:
        started.append(index)
        await asyncio.sleep(0.01)
        assert index > 0 or started == [0]
        return response("a")

    assert (await sample(call, n=5, effort=Prime())).waves == (1, 4)
    found = await drawn([response("a")] * 8, Prime(then=Agree(confidence=0.8)))
    assert found.waves == (1, 1)


TOOLS = {
    "read": SimpleNamespace(metadata={"readOnlyHint": True}),
    "look": SimpleNamespace(metadata={"read_only": True}),
    "pay": SimpleNamespace(metadata={"destructiveHint": True}),
    "odd": SimpleNamespace(metadata=None),
}


@pytest.mark.parametrize(
    ("names", "count"),
    [(["read"], 2), (["look"], 2), (["pay"], 6), (["odd"], 6), (["unknown"], 6), (["read", "pay"], 6)],
)
async def test_by_risk(names: list[str], count: int):
    """Side effects, and tools that say nothing, get the risky number."""
    effort = effort_for(ByRisk(safe=2, risky=6), StepView(tools=TOOLS))
    assert len((await drawn([calls(*names)] * 8, effort)).candidates) == count


async def test_by_risk_looks_at_every_candidate():
    """A risky action is not taken on few candidates because a safe one came first."""
    effort = effort_for(ByRisk(safe=2, risky=6), StepView(tools=TOOLS))
    found = await drawn([calls("read"), calls("pay"), *[calls("read")] * 6], effort)
    assert len(found.candidates) == 6


async def test_by_risk_with_failures():
    """If calls fail, a risky action is refused rather than taken on fewer candidates."""
    effort = effort_for(ByRisk(safe=1, risky=6), StepView(tools=TOOLS))
    failing = [calls("pay"), *[ValueError("x")] * 3, *[calls("pay")] * 4]
    with pytest.raises(SamplingError, match="5 of 8 calls succeeded, 6 needed"):
        await drawn(failing, effort)


async def test_by_risk_over_agree():
    """Efforts nest."""
    effort = effort_for(Prime(then=ByRisk(safe=1, risky=Agree())), StepView(tools=TOOLS))
    assert (await drawn([calls("pay")] * 8, effort)).waves == (1, 1, 2)
    assert (await drawn([calls("read")] * 8, effort)).waves == (1,)


async def test_policy_and_effort():
    """``first`` ends a step early; ``min_candidates`` draws what an effort would leave."""
    assert len((await drawn([response(t) for t in "abcdefgh"], Agree(), first=3)).candidates) == 3
    found = await drawn([response("a")] * 8, Escalate(threshold=0.5), min_candidates=3)
    assert found.waves == (1, 2)


def test_own_function():
    """Any function is an effort."""
    found = asyncio.run(drawn([response("a")] * 8, lambda candidates, most: min(3 - len(candidates), most)))
    assert (found.waves, found.stopped) == ((3,), "<lambda>")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Agree(first=0), "first must be an integer, 1 or more; found 0"),
        (lambda: Agree(confidence=1.0), "confidence must be above 0.5 and below 1"),
        (lambda: Escalate(threshold=float("nan")), "threshold must be a number"),
        (lambda: Escalate(scorer="centriod", threshold=1.0), "no scorer is called 'centriod'"),
        (lambda: ByRisk(risky=0), "risky must be an integer"),
        (lambda: asyncio.run(drawn([], 3)), "effort must be Agree"),  # type: ignore[arg-type]
        (lambda: asyncio.run(drawn([], ByRisk(risky=9))), "risky of ByRisk must be at most n=8; found 9"),
        (lambda: asyncio.run(drawn([], lambda c, m: None)), "effort must return how many"),  # type: ignore[arg-type,return-value]
    ],
)
def test_refused(make: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


def test_why_needs_no_vote():
    """Nothing drawn is described too."""
    assert Agree().why([Candidate(index=0)]).startswith("0 candidates agree")
