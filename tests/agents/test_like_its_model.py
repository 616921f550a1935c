"""CentroidChatModel beside ChatOpenAI: attributes, constructor, tools and structured output, keyword by keyword."""

from inspect import Parameter, signature
from typing import Any

import pytest
from helpers.adding import add
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from ec_agents.agents.chat_model import CentroidChatModel
from ec_agents.errors import ConfigError
from ec_agents.testing import FaultServer, Reply, ScriptedChatModel

OWN = {"temperature", "max_tokens", "stop", "top_logprobs", "streaming", "n", "model"}
"""Arguments of ChatOpenAI that CentroidChatModel has too."""


class Answer(BaseModel):
    """An answer."""

    value: int


def asked(url: str = "http://127.0.0.1:1/v1", **fields: Any) -> ChatOpenAI:
    given: Any = {"model": "gpt-4o", "base_url": url, "api_key": "none", "max_retries": 0, **fields}
    return ChatOpenAI(**given)


def test_attributes_hold_those_of_the_sampled_model():
    model = CentroidChatModel(asked(), n=2)
    for name in ("model", "model_name", "profile"):
        assert getattr(model, name) == getattr(asked(), name), name
    assert CentroidChatModel(ScriptedChatModel()).model_name == "ScriptedChatModel"


@pytest.mark.parametrize(
    "name", sorted(set(ChatOpenAI.model_fields) - set(BaseChatModel.model_fields) - OWN - {"n", "model"})
)
def test_settings_of_the_sampled_model_are_refused(name: str):
    with pytest.raises(ConfigError, match=f"CentroidChatModel has no argument '{name}'.* on the sampled model"):
        CentroidChatModel(asked(), **{name: None})


def test_a_misspelt_argument_is_refused_with_the_right_one():
    with pytest.raises(ConfigError, match="did you mean 'selector'"):
        CentroidChatModel(asked(), selectors="majority")


@pytest.mark.parametrize("method", ["bind_tools", "with_structured_output"])
def test_the_keywords_are_those_of_chat_openai(method: str):
    mine, other = (signature(getattr(kind, method)).parameters for kind in (CentroidChatModel, ChatOpenAI))
    missing = {name for name in other if name not in mine and other[name].kind is not Parameter.VAR_KEYWORD}
    assert missing <= {"tools"}


@pytest.mark.parametrize("options", [{}, {"tool_choice": "any"}, {"strict": True}, {"parallel_tool_calls": False}])
def test_tools_are_bound_as_the_sampled_model_binds_them(options: Any):
    found: Any = CentroidChatModel(asked(), n=2).bind_tools([add], **options)
    expected: Any = asked().bind_tools([add], **options)
    assert expected.kwargs.items() <= found.kwargs.items()


@pytest.mark.parametrize("include_raw", [False, True])
@pytest.mark.parametrize(
    "given",
    [{}, {"method": "json_schema", "strict": True}, {"method": "function_calling"}, {"method": "json_mode"}],
    ids=str,
)
def test_structured_output_is_that_of_the_sampled_model(given: Any, *, include_raw: bool):
    calls = given.get("method") == "function_calling"
    reply = Reply(tool_calls=[("Answer", {"value": 42})]) if calls else Reply(content='{"value": 42}')
    with FaultServer([reply]) as server:
        model = CentroidChatModel(asked(server.base_url), n=2, action_format="native")
        found: Any = model.with_structured_output(Answer, include_raw=include_raw, **given).invoke("hi")
        asked(server.base_url).with_structured_output(Answer, include_raw=include_raw, **given).invoke("hi")
        *ours, theirs = server.requests
    assert len(ours) == 2
    assert all(theirs.items() <= request.items() for request in ours)
    assert (found["parsed"] if include_raw else found) == Answer(value=42)


@pytest.mark.parametrize("given", [{"method": "json_schema"}, {"strict": True}])
def test_what_the_sampled_model_would_swallow_is_refused(given: Any):
    with pytest.raises(ConfigError, match="structured output of ScriptedChatModel is a tool call"):
        CentroidChatModel(ScriptedChatModel()).with_structured_output(Answer, **given)


@pytest.mark.parametrize("profile", [None, {"structured_output": True}])
def test_create_agent_takes_a_response_format(profile: Any):
    """With the provider's structured output or with a tool, as the sampled model's profile says."""
    by_tool = profile is None
    reply = Reply(tool_calls=[("Answer", {"value": 42})]) if by_tool else Reply(content='{"value": 42}')
    with FaultServer([reply]) as server:
        sampled = asked(server.base_url, model="local", profile=profile)
        model = CentroidChatModel(sampled, n=2, action_format="native")
        state = create_agent(model, response_format=Answer).invoke({"messages": [HumanMessage("hi")]})
        assert state["structured_response"] == Answer(value=42)
        assert ("response_format" in server.requests[0]) is not by_tool
