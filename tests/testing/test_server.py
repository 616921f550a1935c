"""The server: what it answers, its faults, and what it counts."""

import asyncio
import json
import time
from typing import Any

import aiohttp
import openai
import pytest
from helpers.waiting import until
from langchain_openai import ChatOpenAI
from pydantic import ValidationError

from ec_agents.embedded import EmbeddedChatModel
from ec_agents.errors import ConfigError
from ec_agents.responses import response_candidates
from ec_agents.testing import FAULTS, Fault, FaultServer, Reply, ScriptedChatModel

ASK: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": "hi"}]}
MEASURED: dict[str, Any] = {**ASK, "logprobs": True, "top_logprobs": 3}
CALC = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object", "properties": {}}}}


async def post(server: FaultServer, asked: dict[str, Any]) -> tuple[int, str, bytes]:
    url = f"{server.base_url}/chat/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=asked) as answer:
        return answer.status, answer.content_type, await answer.read()


def ask(server: FaultServer, asked: dict[str, Any] = MEASURED) -> dict[str, Any]:
    status, _, body = asyncio.run(post(server, asked))
    assert status == 200
    return json.loads(body)


def first_token(server: FaultServer) -> dict[str, Any]:
    return ask(server)["choices"][0]["logprobs"]["content"][0]


def test_replies_come_in_turn_again_and_again():
    with FaultServer([Reply(content="a"), Reply(tool_calls=[("f", {"x": 1})])]) as server:
        texts = [ask(server)["choices"][0]["message"]["content"] for _ in range(3)]
        assert texts == ["a", None, "a"]
        assert server.requests == [MEASURED] * 3


def test_the_sdk_understands_the_answers():
    with FaultServer([Reply(content="a", profile="!.")]) as server:
        with openai.OpenAI(base_url=server.base_url, api_key="none") as client:
            answer = client.chat.completions.create(**MEASURED, n=3)
            assert [model.id for model in client.models.list()] == ["any"]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 6)
        candidates = response_candidates(answer.model_dump())
        assert [c.signals and c.signals.n_alternatives for c in candidates] == [3, 3, 3]


def test_log_probabilities_come_only_when_asked_for():
    with FaultServer() as server:
        assert ask(server, ASK)["choices"][0]["logprobs"] is None


def test_the_embedded_model_can_be_served():
    with FaultServer(EmbeddedChatModel(seed=1)) as server:
        question = [{"role": "user", "content": "Ann has 12. Bob has 5 more than Ann. How many has Bob?"}]
        asked = {**MEASURED, "messages": question, "n": 2, "max_tokens": 30, "tools": [CALC]}
        candidates = response_candidates(ask(server, asked))
        assert len(candidates) == 2
        assert all(c.signals is not None and 0 < c.signals.n_tokens <= 30 for c in candidates)


def test_what_the_model_refuses_is_a_bad_request():
    with FaultServer(EmbeddedChatModel()) as server:
        status, _, body = asyncio.run(post(server, {**MEASURED, "temperature": -1}))
        assert status == 400
        assert "temperature" in json.loads(body)["error"]["message"]


def test_a_response_or_a_function_can_be_served():
    with FaultServer({"choices": []}) as server:
        assert ask(server) == {"choices": []}
    with FaultServer(lambda asked: {"echo": asked["model"]}) as server:
        assert ask(server) == {"echo": "any"}


def test_a_function_may_give_a_reply():
    with FaultServer(lambda asked: Reply(content=asked["messages"][0]["content"].upper())) as server:
        assert [choice["message"]["content"] for choice in ask(server, {**ASK, "n": 2})["choices"]] == ["HI", "HI"]


def test_errors_of_a_script_are_errors_of_the_server():
    with FaultServer([Reply(error=RuntimeError("boom"))]) as server:
        assert asyncio.run(post(server, ASK))[0] == 500


@pytest.mark.parametrize(
    ("name", "status"), [("status_429", 429), ("retry_after", 429), ("status_500", 500), ("status_503", 503)]
)
def test_errors_have_their_status(name: str, status: int):
    with FaultServer(faults=[name]) as server:
        found, kind, body = asyncio.run(post(server, ASK))
        assert (found, kind) == (status, "application/json")
        assert json.loads(body)["error"]["code"] == status


def test_retry_after_says_how_long():
    assert FAULTS["retry_after"].headers == {"Retry-After": "1"}
    assert not FAULTS["status_429"].headers


@pytest.mark.parametrize("name", ["latency", "straggler", "jitter"])
def test_delays(name: str):
    with FaultServer(faults=[name]) as server:
        start = time.monotonic()
        ask(server)
        assert time.monotonic() - start >= FAULTS[name].delay


def test_a_broken_connection_and_a_broken_body():
    with FaultServer(faults=["disconnect"]) as server, pytest.raises(aiohttp.ClientPayloadError):
        ask(server)
    for name in ("truncated_json", "html_page", "invalid_utf8"):
        with FaultServer(faults=[name]) as server, pytest.raises(ValueError):  # noqa: PT011 - JSON or text
            ask(server)


def test_content_types():
    for name, kind in (
        ("html_page", "text/html"),
        ("wrong_content_type", "text/plain"),
        ("length", "application/json"),
    ):
        with FaultServer(faults=[name]) as server:
            assert asyncio.run(post(server, ASK))[1] == kind


def test_choices_that_are_missing():
    for name, count in (("empty_choices", 0), ("fewer_choices", 1), ("unsorted", 4)):
        with FaultServer(faults=[name]) as server:
            assert len(ask(server, {**MEASURED, "n": 4})["choices"]) == count


def test_numbers_that_are_odd():
    with FaultServer(faults=["nan", "infinity", "sentinel"]) as server:
        nan, infinity, sentinel = [first_token(server)["top_logprobs"][-1]["logprob"] for _ in range(3)]
        assert nan != nan  # noqa: PLR0124 - only NaN differs from itself
        assert (infinity, sentinel) == (-float("inf"), -9999.0)


def test_alternatives_that_are_odd():
    with FaultServer(faults=["unsorted", "absent_token", "duplicate_token", "no_top_logprobs"]) as server:
        unsorted, absent, duplicate, without = [first_token(server) for _ in range(4)]
        values = [a["logprob"] for a in unsorted["top_logprobs"]]
        assert values == sorted(values)
        assert absent["token"] not in [a["token"] for a in absent["top_logprobs"]]
        assert [a["token"] for a in duplicate["top_logprobs"]].count(duplicate["token"]) == 2
        assert "top_logprobs" not in without


def test_messages_that_are_odd():
    names = ["tool_calls", "unmeasured_tool_calls", "reasoning", "refusal", "length", "null_logprobs"]
    with FaultServer(faults=names) as server:
        found = dict(zip(names, [ask(server)["choices"][0] for _ in names], strict=True))
    assert found["tool_calls"]["message"]["tool_calls"][0]["function"]["name"] == "calc"
    assert found["tool_calls"]["logprobs"]["content"]
    assert found["unmeasured_tool_calls"]["logprobs"] is None
    assert found["reasoning"]["message"]["reasoning_content"]
    assert (found["refusal"]["message"]["content"], found["refusal"]["logprobs"]["content"]) == (None, None)
    assert found["length"]["finish_reason"] == "length"
    assert found["null_logprobs"]["logprobs"] is None


def test_bodies_that_are_big():
    with FaultServer(faults=["big_body"]) as server:
        _, _, body = asyncio.run(post(server, MEASURED))
        assert len(body) >= 20_000_000
        assert len(json.loads(body)["choices"][0]["logprobs"]["content"]) > 10_000


def test_faults_leave_the_served_response_as_it_was():
    canned = {"choices": [{"message": {"content": "a"}, "logprobs": None}]}
    with FaultServer(canned, faults=["refusal", None]) as server:
        ask(server)
        assert ask(server) == canned


async def test_a_client_that_gives_up_is_counted():
    with FaultServer(faults=["hang"]) as server:
        call = asyncio.create_task(post(server, ASK))
        await until(lambda: server.in_flight == 1)
        assert server.connections == 1
        call.cancel()
        await until(lambda: not server.in_flight and not server.connections)
        assert server.abandoned == 1


def test_faults_of_ones_own():
    teapot = Fault(about="a teapot", status=418, headers={"X-Tea": "green"})
    with FaultServer(faults=[teapot]) as server:
        status, _, body = asyncio.run(post(server, ASK))
        assert (status, json.loads(body)["error"]["message"]) == (418, "a teapot")


def test_wrong_orders_are_refused():
    with pytest.raises(ConfigError, match="unknown fault 'hangs'; known: latency, jitter"):
        FaultServer(faults=["hangs"])
    with pytest.raises(ConfigError, match="the script of the server must have at least one reply; found none"):
        FaultServer([])


# Streams


def streamed(server: FaultServer, **fields: Any) -> tuple[Any, Any]:
    """What LangChain's own client gathers from a stream, and what it gets in one piece."""
    model: Any = ChatOpenAI(model="any", base_url=server.base_url, api_key="none", max_retries=0, **fields)  # type: ignore[arg-type]
    chunks = list(model.bind(logprobs=True, top_logprobs=2).stream("hi"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole, model.bind(logprobs=True, top_logprobs=2).invoke("hi")


@pytest.mark.parametrize(
    "reply", [Reply(content="hello"), Reply(tool_calls=[("add", {"a": 1}), ("add", {"a": 2})]), Reply(profile=None)]
)
def test_a_streaming_client_gets_what_another_one_gets(reply: Reply):
    with FaultServer([reply]) as server:
        whole, expected = streamed(server)
        assert (whole.text, whole.tool_calls) == (expected.text, expected.tool_calls)
        assert whole.response_metadata["finish_reason"] == expected.response_metadata["finish_reason"]
        assert whole.usage_metadata["output_tokens"] == expected.usage_metadata["output_tokens"]
        found, wanted = (message.response_metadata.get("logprobs") or {} for message in (whole, expected))
        assert found.get("content") == wanted.get("content")


def test_a_stream_has_every_choice_and_ends_with_done():
    with FaultServer([Reply(content="a"), Reply(content="b")]) as server:
        with openai.OpenAI(base_url=server.base_url, api_key="none") as client:
            asked: Any = {"model": "any", "messages": [{"role": "user", "content": "hi"}], "n": 2, "stream": True}
            chunks = list(client.chat.completions.create(**asked))
        texts = {choice.index: choice.delta.content for c in chunks for choice in c.choices if choice.delta.content}
        assert texts == {0: "a", 1: "b"}
        assert chunks[-1].usage is not None


@pytest.mark.parametrize("fault", ["status_500", "disconnect", "truncated_json", "empty_choices", "html_page"])
def test_faults_affect_streams(fault: str):
    with FaultServer([Reply(content="hello")], faults=[fault]) as server, pytest.raises(Exception) as caught:  # noqa: PT011 - as the client raises it
        streamed(server)
    assert not isinstance(caught.value, AssertionError)


def test_paths_of_azure_are_served():
    with FaultServer([Reply(content="hello")]) as server:
        options: Any = {"base_url": server.base_url, "api_version": "1", "api_key": "none"}
        with openai.AzureOpenAI(**options) as client:
            found = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "hi"}])
        assert found.choices[0].message.content == "hello"


def test_a_misspelt_argument_of_the_scripted_model_is_refused():
    with pytest.raises(ValidationError, match="reply"):
        ScriptedChatModel(reply=[Reply()])  # type: ignore[call-arg]
