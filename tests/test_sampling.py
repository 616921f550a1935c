"""Sampling: concurrency, failures as results, cancellation, parsing of what calls return."""

import asyncio
import contextvars
import threading
from typing import Any

import pytest
from helpers.waiting import others, until
from langchain_core.messages import AIMessage
from langgraph.errors import GraphInterrupt
from openai.types.chat import ChatCompletion

from ec_agents.candidates import Candidate
from ec_agents.errors import ConfigError, LogprobsMalformed, SamplingError
from ec_agents.messages import as_candidate, message_candidate
from ec_agents.policy import SamplingPolicy
from ec_agents.sampling import run_blocking, sample
from ec_agents.testing import Reply, profile_logprobs


async def answer(index: int) -> AIMessage:
    return Reply(content=f"answer {index}").message()


async def hang(index: int) -> AIMessage:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr("ec_agents.policy._FIRST_WAIT", 0.0)


@pytest.mark.parametrize("n", [1, 8, 64])
async def test_results_are_in_index_order(n: int):
    """Results are in index order, whatever the order of completion."""
    done: list[int] = []
    ended = [asyncio.Event() for _ in range(n + 1)]
    ended[n].set()

    async def last_first(index: int) -> AIMessage:
        await ended[index + 1].wait()
        return await answer(index)

    def on_result(index: int, result: Any) -> None:
        done.append(index)
        ended[index].set()

    drawn = await sample(last_first, n=n, on_result=on_result)
    assert [c.index for c in drawn.candidates] == list(range(n))
    assert [c.content for c in drawn.candidates] == [f"answer {i}" for i in range(n)]
    assert done == list(reversed(range(n)))
    assert list(drawn.messages) == list(range(n))
    assert drawn.failures == {}


async def test_calls_run_at_the_same_time_up_to_max_concurrency():
    running = peak = 0

    async def call(index: int) -> AIMessage:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.005)
        running -= 1
        return await answer(index)

    await sample(call, n=8)
    assert peak == 8
    peak = 0
    await sample(call, n=8, policy=SamplingPolicy(max_concurrency=3))
    assert peak == 3


async def test_each_call_is_timed_without_what_it_waited_for_its_turn(monkeypatch: pytest.MonkeyPatch):
    clock = 0.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: clock)

    async def call(index: int) -> AIMessage:
        nonlocal clock
        clock += index + 1
        return Reply(content="a").message()

    drawn = await sample(call, n=3, policy=SamplingPolicy(max_concurrency=1))
    assert [c.seconds for c in drawn.candidates] == [1, 2, 3]


async def test_failures_are_kept_beside_the_results():
    async def call(index: int) -> AIMessage:
        if index % 2:
            raise ValueError(f"boom {index}")
        return await answer(index)

    drawn = await sample(call, n=4)
    assert [c.index for c in drawn.candidates] == [0, 2]
    assert {i: str(e) for i, e in drawn.failures.items()} == {1: "boom 1", 3: "boom 3"}


async def test_a_hung_call_is_given_up_after_its_timeout():
    async def call(index: int) -> AIMessage:
        return await (hang(index) if index == 0 else answer(index))

    drawn = await sample(call, n=3, policy=0.1)
    assert [c.index for c in drawn.candidates] == [1, 2]
    assert str(drawn.failures[0]) == "no answer within 0.1 s (timeout)"
    assert not others()


async def test_the_timeout_counts_from_when_a_call_is_under_way():
    async def call(index: int) -> AIMessage:
        await asyncio.sleep(0.05)
        return await answer(index)

    assert len((await sample(call, n=6, policy=SamplingPolicy(max_concurrency=1, timeout=0.2))).candidates) == 6


async def test_a_timeout_of_the_call_itself_keeps_its_message():
    async def call(index: int) -> AIMessage:
        if index:
            return await answer(index)
        raise TimeoutError("the server is slow")

    assert str((await sample(call, n=2, policy=5)).failures[0]) == "the server is slow"


async def test_too_few_successes_are_an_error_that_holds_every_failure():
    async def call(index: int) -> AIMessage:
        if index > 1:
            raise ValueError(f"boom {index}")
        return await answer(index)

    expected = r"2 of 4 calls succeeded, 3 needed \(min_candidates\); first failure: ValueError: boom 2"
    with pytest.raises(SamplingError, match=expected) as caught:
        await sample(call, n=4, policy=SamplingPolicy(min_candidates=3))
    assert {i: str(e) for i, e in caught.value.failures.items()} == {2: "boom 2", 3: "boom 3"}


async def test_call_cancelled_from_within():
    """It is a failed call and does not end the step."""

    async def call(index: int) -> AIMessage:
        if index == 0:
            raise asyncio.CancelledError
        return await answer(index)

    drawn = await sample(call, n=2)
    assert [c.index for c in drawn.candidates] == [1]
    assert isinstance(drawn.failures[0], asyncio.CancelledError)


async def test_cancelled_step():
    """Cancelling it reaches every call and leaves no task."""
    begun: list[int] = []
    cancelled: list[int] = []

    async def call(index: int) -> AIMessage:
        begun.append(index)
        try:
            return await hang(index)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            cancelled.append(index)
            raise

    step = asyncio.create_task(sample(call, n=8))
    await until(lambda: len(begun) == 8)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert sorted(cancelled) == list(range(8))
    assert not others()


async def test_interrupts_pass_and_take_the_other_calls_along():
    async def call(index: int) -> AIMessage:
        if index == 1:
            raise GraphInterrupt
        return await hang(index)

    with pytest.raises(GraphInterrupt):
        await sample(call, n=3)
    assert not others()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be an integer, 1 or more; found 0"),
        (
            {"n": 2, "policy": SamplingPolicy(min_candidates=3)},
            "min_candidates must be an integer from 1 to n=2; found 3",
        ),
        (
            {"n": 2, "policy": SamplingPolicy(min_candidates=0)},
            "min_candidates must be an integer from 1 to n=2; found 0",
        ),
        ({"n": 2, "policy": 0}, "timeout must be above 0 seconds, or None; found 0"),
        ({"n": 2, "policy": float("nan")}, "timeout must be above 0 seconds, or None; found nan"),
        ({"n": "8"}, "n must be an integer, 1 or more; found '8'"),
        (
            {"n": 2, "policy": {}},
            "policy must be a SamplingPolicy, the timeout of a call in seconds, or None; found dict",
        ),
        (
            {"n": 2, "policy": True},
            "policy must be a SamplingPolicy, the timeout of a call in seconds, or None; found bool",
        ),
    ],
)
async def test_arguments_out_of_range_are_refused_before_any_call(arguments: dict[str, Any], message: str):
    called: list[int] = []

    async def call(index: int) -> AIMessage:
        called.append(index)
        return await answer(index)

    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        await sample(call, **arguments)
    assert not called


async def test_unknown_response():
    """A response of an unknown kind is a failure that says what was received."""

    async def call(index: int) -> Any:
        return "text" if index == 0 else await answer(index)

    drawn = await sample(call, n=2)
    assert isinstance(drawn.failures[0], LogprobsMalformed)
    assert "found str" in str(drawn.failures[0])


CHOICE = {
    "index": 0,
    "message": {"role": "assistant", "content": "hello"},
    "logprobs": {**profile_logprobs("!..."), "refusal": None},
    "finish_reason": "stop",
}
RESPONSE = {"id": "r", "object": "chat.completion", "created": 1, "model": "m", "choices": [CHOICE]}


@pytest.mark.parametrize(
    "response",
    [
        CHOICE,
        RESPONSE,
        ChatCompletion.model_validate(RESPONSE),
        Reply(content="hello").message(),
        Candidate(
            index=0, content="hello", finish_reason="stop", signals=message_candidate(Reply().message(), 0).signals
        ),
    ],
)
def test_responses_of_every_kind_give_the_same_candidate(response: Any):
    found = as_candidate(response, 5)
    assert (found.index, found.content, found.finish_reason, found.flaws) == (5, "hello", "stop", {})
    assert found.signals is not None
    assert found.signals.n_tokens == 4


def test_flaws_of_a_message_are_recorded():
    message = AIMessage(
        "",
        invalid_tool_calls=[{"name": "f", "args": "{", "id": "1", "error": None, "type": "invalid_tool_call"}],
        additional_kwargs={"refusal": "I cannot"},
    )
    found = message_candidate(message, 0)
    assert set(found.flaws) == {"no_signal", "invalid_action", "refused"}
    assert "arguments of 'f' are not a JSON object: '{'" in found.flaws["invalid_action"]
    assert found.signals is None
    assert found.usage is None


@pytest.mark.parametrize("hedge_after", [None, 60.0])
@pytest.mark.parametrize(
    "broken",
    [
        {"error": {"message": "overloaded", "code": 503}},
        {**RESPONSE, "choices": [{**CHOICE, "error": {"message": "slow down", "type": "rate_limit_error"}}]},
        {"object": "error", "message": "worker died", "code": 500},
    ],
)
async def test_error_inside_a_success(broken: dict[str, Any], hedge_after: float | None, no_waiting: None):
    """Servers and routers report errors with status 200; a retry costs one call of the same index."""
    calls: list[int] = []

    async def call(index: int) -> dict[str, Any]:
        calls.append(index)
        return broken if calls in ([0, 1], [0]) else RESPONSE

    drawn = await sample(call, n=2, policy=SamplingPolicy(retries=1, hedge_after=hedge_after))
    assert [c.index for c in drawn.candidates] == [0, 1]
    assert sorted(calls) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "broken",
    [{"error": {"message": "no such model", "code": 404}}, {"error": {"type": "insufficient_quota"}}, "a text"],
)
async def test_what_a_retry_cannot_cure_is_not_retried(broken: Any):
    calls: list[int] = []

    async def call(index: int) -> Any:
        calls.append(index)
        return RESPONSE if index else broken

    drawn = await sample(call, n=2, policy=SamplingPolicy(retries=3))
    assert (calls, list(drawn.failures)) == ([0, 1], [0])


_value: contextvars.ContextVar[str] = contextvars.ContextVar("_value")


def test_blocking_callers_get_results_errors_and_their_context():
    _value.set("mine")

    async def work() -> str:
        await asyncio.sleep(0)
        return _value.get()

    async def fail() -> str:
        raise ValueError("boom")

    assert run_blocking(work) == "mine"
    with pytest.raises(ValueError, match="boom"):
        run_blocking(fail)


async def test_blocking_callers_may_sit_inside_a_running_loop():
    async def work() -> int:
        return 7

    assert run_blocking(work) == 7


def test_blocking_callers_in_many_threads_share_one_loop():
    loops: list[asyncio.AbstractEventLoop] = []

    async def work() -> None:
        loops.append(asyncio.get_running_loop())

    threads = [threading.Thread(target=run_blocking, args=(work,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loops) == 8
    assert len(set(loops)) == 1


def test_interrupting_a_blocking_caller_cancels_the_work(monkeypatch: pytest.MonkeyPatch):
    begun, cancelled = threading.Event(), threading.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupt(self: Any) -> None:
        assert begun.wait(5)
        raise KeyboardInterrupt

    monkeypatch.setattr("ec_agents.sampling.Future.result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_blocking(work)
    assert cancelled.wait(5)
