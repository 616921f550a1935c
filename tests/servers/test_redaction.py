"""Keys stay inside the process: in representations, dumps, tracer runs and errors."""

import asyncio
import json
import traceback
from typing import Any

import openai
import pytest
from langchain_core.load import dumps
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import ValidationError

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.servers.redaction import HIDDEN, hide_secrets, redacted, secrets_of
from ec_agents.testing import Fault, FaultServer

KEY, TEAM, OTHER = "sk-argument-0123456789", "team-secret-0123456789", "sk-environment-0123456789"
KEYS = (KEY, TEAM, OTHER)


def echo(text: str) -> Fault:
    """A server that repeats the key that it refuses."""
    error = {"error": {"message": f"Incorrect API key provided: {text}", "code": "invalid_api_key"}}
    return Fault(about=f"Incorrect API key provided: {text}", status=401, payload=lambda _: error)


@pytest.fixture(autouse=True)
def key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", OTHER)


def model_at(url: str, **fields: Any) -> OpenAIChatModel:
    headers: Any = {"X-Team": TEAM}
    return OpenAIChatModel(model="any", base_url=url, api_key=KEY, default_headers=headers, max_retries=0, **fields)  # type: ignore[arg-type]


def texts(error: BaseException) -> str:
    body = getattr(error, "body", "")
    return "".join(traceback.format_exception(error)) + repr(error) + json.dumps(body, default=repr)


def test_headers_are_sent_but_not_shown():
    with FaultServer() as server:
        model, tracer = model_at(server.base_url), RunCollectorCallbackHandler()
        options: Any = {"config": {"callbacks": [tracer]}, "extra_headers": {"X-Other": OTHER}}
        assert model.invoke("hi", **options).content == "hello"
        assert (server.headers[0]["x-team"], server.headers[0]["x-other"]) == (TEAM, OTHER)
        shown = [repr(model), str(model), dumps(model), repr(model.model_dump()), model.model_dump_json()]
        shown += [run.model_dump_json() for run in tracer.traced_runs]
        assert not any(key in text for key in KEYS for text in shown)


def test_headers_among_the_parameters_are_refused():
    with pytest.raises(ValidationError, match="headers belong in default_headers"):
        model_at("http://127.0.0.1:1/v1", model_kwargs={"extra_headers": {"Authorization": KEY}})


@pytest.mark.parametrize("echoed", KEYS)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("run", ["sync", "async"])
def test_an_echoed_key_is_in_no_error_and_no_run(run: str, n: int, echoed: str):
    with FaultServer(faults=[echo(f"Bearer {echoed}")]) as server:
        model, tracer = model_at(server.base_url), RunCollectorCallbackHandler()
        config: Any = {"callbacks": [tracer]}
        with pytest.raises(openai.AuthenticationError) as caught:
            model.invoke("hi", config, n=n) if run == "sync" else asyncio.run(model.ainvoke("hi", config, n=n))
        assert caught.value.status_code == 401
        assert HIDDEN in caught.value.message
        assert echoed not in texts(caught.value)
        assert tracer.traced_runs
        assert all(echoed not in found.model_dump_json() for found in tracer.traced_runs)


def test_the_key_of_a_client_of_the_users_own_is_hidden():
    with FaultServer(faults=[echo("sk-client-0123456789")]) as server:
        options: Any = {"base_url": server.base_url, "api_key": "sk-client-0123456789", "max_retries": 0}
        model = OpenAIChatModel(model="any", client=lambda: openai.OpenAI(**options))
        with pytest.raises(openai.AuthenticationError) as caught:
            model.invoke("hi")
        assert "sk-client" not in texts(caught.value)


def test_causes_groups_and_notes_are_searched():
    inner = ValueError(f"bad {KEY}")
    inner.add_note(f"with {KEY}")
    group = ExceptionGroup("several", [inner, RuntimeError({"key": [KEY, 1]})])
    outer = RuntimeError("outer")
    outer.__cause__ = group
    hide_secrets(outer, model_at("http://127.0.0.1:1/v1"))
    assert KEY not in texts(outer)
    assert group.exceptions[1].args == ({"key": [HIDDEN, 1]},)


def test_short_values_and_other_variables_are_no_keys(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ANOTHER_API_KEY", "none")
    monkeypatch.setenv("MODEL_NAME", "claude-something")
    found = secrets_of(model_at("http://127.0.0.1:1/v1"))
    assert {"none", "claude-something"}.isdisjoint(found)
    assert set(KEYS) <= set(found)


def test_the_longest_key_is_replaced_first():
    assert redacted("abcdefgh-ij", sorted(["abcdefgh", "abcdefgh-ij"], key=len, reverse=True)) == HIDDEN


def chat_openai(url: str) -> ChatOpenAI:
    return ChatOpenAI(model="any", base_url=url, api_key=KEY, default_headers={"X-Api-Token": TEAM}, max_retries=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [model_at, chat_openai], ids=["OpenAIChatModel", "ChatOpenAI"])
@pytest.mark.parametrize("echoed", [KEY, TEAM])
def test_an_agent_keeps_the_keys_of_any_model(make: Any, echoed: str):
    """Errors of a step, checkpoints and tracer runs have none, whichever model is sampled."""
    with FaultServer(faults=[echo(echoed)]) as server:
        tracer, saver = RunCollectorCallbackHandler(), InMemorySaver()
        agent: Any = create_centroid_agent(make(server.base_url), [], n=2, checkpointer=saver)
        config: Any = {"callbacks": [tracer], "configurable": {"thread_id": "1"}}
        with pytest.raises(Exception, match="Incorrect API key") as caught:
            agent.invoke({"messages": [("user", "hi")]}, config)
        assert echoed not in texts(caught.value)
        runs = [run.model_dump_json() for run in tracer.traced_runs]
        assert all(echoed not in text for text in (*runs, repr(saver.storage), repr(saver.writes)))
