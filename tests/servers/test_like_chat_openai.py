"""OpenAIChatModel beside ChatOpenAI: attributes, constructor, tools and structured output, keyword by keyword."""

from inspect import Parameter, signature
from typing import Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.exceptions import ModelRefusalError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ValidationError

from ec_agents.errors import ConfigError
from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.testing import FaultServer, Reply

URL = "http://127.0.0.1:1/v1"

NAMES = {
    "openai_api_key": "api_key",
    "openai_api_base": "base_url",
    "request_timeout": "timeout",
    "model_name": "model_name",
    "model": "model",
    **{name: name for name in ("temperature", "seed", "logprobs", "top_logprobs", "top_p", "stop", "max_tokens")},
    **{name: name for name in ("model_kwargs", "max_retries", "default_headers", "extra_body", "streaming")},
    **{name: name for name in ("client", "async_client")},
}
"""Attributes of ChatOpenAI, and their names here."""

THROUGH_KWARGS = {
    *("presence_penalty", "frequency_penalty", "logit_bias", "reasoning_effort", "verbosity", "service_tier", "store"),
    "prompt_cache_options",
}
"""Parameters of a request that belong in ``model_kwargs``."""

REFUSED = {
    **dict.fromkeys(("root_client", "root_async_client"), "async_client and client make clients"),
    **dict.fromkeys(("http_client", "http_async_client", "http_socket_options", "openai_proxy"), "as above"),
    **dict.fromkeys(("openai_organization", "default_query"), "as above"),
    **dict.fromkeys(("reasoning", "include", "truncation", "context_management"), "of the Responses API"),
    **dict.fromkeys(("use_previous_response_id", "use_responses_api"), "of the Responses API"),
    **dict.fromkeys(("stream_usage", "stream_chunk_timeout"), "responses arrive as one chunk, with usage"),
    "n": "whoever samples asks for n per call",
    "tiktoken_model_name": "tokens are counted by the server",
    "include_response_headers": "not kept",
    "disabled_params": "nothing is sent that was not set",
}
"""Attributes of ChatOpenAI that are refused as arguments, and why they are not here."""


def ours(**fields: Any) -> OpenAIChatModel:
    given: Any = {"model": "gpt-4o", "base_url": URL, "api_key": "none", **fields}
    return OpenAIChatModel(**given)


def theirs(**fields: Any) -> ChatOpenAI:
    given: Any = {"model": "gpt-4o", "base_url": URL, "api_key": "none", **fields}
    return ChatOpenAI(**given)


# Attributes and the constructor


def test_every_attribute_of_chat_openai_has_its_place():
    own = set(ChatOpenAI.model_fields) - set(BaseChatModel.model_fields)
    properties = {name for name, value in vars(ChatOpenAI.__mro__[1]).items() if isinstance(value, property)}
    asked_for = own | {name for name in properties if not name.startswith("_")}
    assert asked_for - {"lc_attributes", "lc_secrets"} == {*NAMES, *THROUGH_KWARGS, *REFUSED}


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.5}, {"top_p": 0.5, "seed": 1}, {"stop": ["x"]}, {"max_tokens": 7}, {"logprobs": True}],
)
def test_attributes_hold_the_same(fields: dict[str, Any]):
    one, other = ours(**fields), theirs(**fields)
    plain = set(NAMES) - {"openai_api_key", "client", "async_client", "request_timeout", "max_retries", "model_kwargs"}
    for name in plain:
        assert getattr(one, NAMES[name]) == getattr(other, name), name
    assert one.model == other.model == one.model_name


def test_the_profile_says_whether_schemas_are_known_to_work():
    at_openai = {"base_url": "https://api.openai.com/v1"}
    expected: Any = theirs(**at_openai).profile
    found: Any = ours(**at_openai).profile
    assert found["structured_output"] is expected["structured_output"] is True
    assert ours().profile is None
    assert ours(profile={"max_input_tokens": 10}).profile == {"max_input_tokens": 10}


@pytest.mark.parametrize(
    "name", [*sorted(THROUGH_KWARGS), *sorted(REFUSED), "baseurl", "max_completion_tokens", "stop_sequences"]
)
def test_what_is_not_an_argument_is_refused_by_name(name: str):
    with pytest.raises(ValidationError, match=f"OpenAIChatModel has no argument '{name}'.*model_kwargs"):
        ours(**{name: None})


def test_a_misspelt_argument_is_refused_with_the_right_one():
    with pytest.raises(ValidationError, match="did you mean 'base_url'"):
        OpenAIChatModel(model="any", baseurl=URL)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", sorted(THROUGH_KWARGS - {"prompt_cache_options"}))
def test_parameters_of_a_request_reach_the_server(name: str):
    with FaultServer() as server:
        values: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"1": 1}}
        values |= {"reasoning_effort": "low", "verbosity": "low", "service_tier": "flex", "store": False}
        ours(base_url=server.base_url, model_kwargs={name: values[name]}).invoke("hi")
        theirs(base_url=server.base_url, **{name: values[name]}).invoke("hi")
        assert server.requests[0][name] == server.requests[1][name] == values[name]


# Tools


@tool
def add(a: int, b: int = 0) -> int:
    """Add two numbers."""
    return a + b


class Answer(BaseModel):
    """An answer."""

    value: int
    why: str = ""


class Typed(TypedDict):
    """An answer."""

    value: int


SCHEMA = {
    "title": "Answer",
    "description": "An answer.",
    "type": "object",
    "properties": {"value": {"type": "integer"}},
}
CALLED: Any = {"type": "function", "function": {"name": "add"}}


def test_the_keywords_are_those_of_chat_openai():
    for method in ("bind_tools", "with_structured_output"):
        mine, other = (signature(getattr(kind, method)).parameters for kind in (OpenAIChatModel, ChatOpenAI))
        missing = {name for name in other if name not in mine and other[name].kind is not Parameter.VAR_KEYWORD}
        assert missing == ({"tools"} if method == "with_structured_output" else set())
        assert {n: p.default for n, p in mine.items()}.items() <= {n: p.default for n, p in other.items()}.items()


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"tool_choice": choice} for choice in (None, False, True, "any", "required", "auto", "none", "add", CALLED)),
        *({"strict": strict} for strict in (None, True, False)),
        *({"parallel_tool_calls": parallel} for parallel in (None, True, False)),
        {"response_format": SCHEMA},
        {"response_format": SCHEMA, "strict": False},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "A", "schema": SCHEMA, "strict": True}}},
    ],
    ids=str,
)
def test_tools_are_bound_as_chat_openai_binds_them(options: Any):
    found: Any = ours().bind_tools([add], **options)
    expected: Any = theirs().bind_tools([add], **options)
    form, wanted = (bound.kwargs.pop("response_format", None) for bound in (found, expected))
    assert found.kwargs == expected.kwargs
    assert (form is None) == (wanted is None)
    if form is not None and "json_schema" not in options["response_format"]:
        assert form == wanted


@pytest.mark.parametrize("choice", ["ad", 1.5, ["add"]])
def test_a_choice_of_no_tool_is_refused(choice: Any):
    with pytest.raises(ConfigError, match="tool_choice must be one of any, auto, none, required, add or a dict"):
        ours().bind_tools([add], tool_choice=choice)


# Structured output

GIVEN = [
    {},
    {"method": "json_schema"},
    {"method": "json_schema", "strict": True},
    {"method": "function_calling"},
    {"method": "function_calling", "strict": True},
    {"method": "function_calling", "strict": False},
    {"method": "json_mode"},
]


def play(given: dict[str, Any]) -> Reply:
    if given.get("method") == "function_calling":
        return Reply(tool_calls=[("Answer", {"value": 42})])
    return Reply(content='{"value": 42, "why": ""}')


@pytest.mark.parametrize("include_raw", [False, True])
@pytest.mark.parametrize("schema", [Answer, SCHEMA], ids=["class", "dict"])
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_structured_output_is_that_of_chat_openai(given: Any, schema: Any, *, include_raw: bool):
    """Both send the same request, and give the same result."""
    with FaultServer([play(given)]) as server:
        results: list[Any] = []
        for make in (ours, theirs):
            model: Any = make(base_url=server.base_url)
            results.append(model.with_structured_output(schema, include_raw=include_raw, **given).invoke("hi"))
        one, other = server.requests
        assert {k: v for k, v in one.items() if k != "stream"} == {k: v for k, v in other.items() if k != "stream"}
        mine, theirs_ = ([r["parsed"], r["parsing_error"]] if include_raw else r for r in results)
        assert mine == theirs_
        assert isinstance(results[0]["raw"], AIMessage) if include_raw else mine


def test_a_typed_dict_gives_a_dict():
    with FaultServer([Reply(content='{"value": 42}')]) as server:
        assert ours(base_url=server.base_url).with_structured_output(Typed).invoke("hi") == {"value": 42}


def test_a_class_may_be_left_loose():
    """``strict=False`` is honoured; ChatOpenAI ignores it with a class."""
    bound: Any = ours().with_structured_output(Answer, strict=False).first  # type: ignore[attr-defined]
    form = bound.kwargs["response_format"]["json_schema"]
    assert form["strict"] is False
    assert form["schema"]["required"] == ["value"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "yaml"}, "method must be json_schema, function_calling or json_mode; found 'yaml'"),
        ({"schema": None}, "needs a schema"),
        ({"method": "json_mode", "strict": True}, "leave strict out"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        ours().with_structured_output(options.pop("schema", Answer), **options)


@pytest.mark.parametrize("include_raw", [False, True])
def test_a_refusal_is_that_of_langchain(*, include_raw: bool):
    with FaultServer([Reply(content="No.")], faults=["refusal"]) as server:
        model = ours(base_url=server.base_url).with_structured_output(Answer, include_raw=include_raw)
        if include_raw:
            found: Any = model.invoke("hi")
            assert isinstance(found["parsing_error"], ModelRefusalError)
        else:
            with pytest.raises(ModelRefusalError, match="I cannot help with that"):
                model.invoke("hi")


def test_broken_output_is_an_error_or_a_field():
    with FaultServer([Reply(content="{")]) as server:
        found: Any = ours(base_url=server.base_url).with_structured_output(Answer, include_raw=True).invoke("hi")
        assert found["parsed"] is None
        assert found["parsing_error"] is not None


def test_create_agent_takes_a_response_format():
    with FaultServer([Reply(content='{"value": 42, "why": "x"}')]) as server:
        model = ours(base_url=server.base_url, profile={"structured_output": True})
        agent: Any = create_agent(model, [add], response_format=Answer)
        state = agent.invoke({"messages": [HumanMessage("hi")]})
        assert state["structured_response"] == Answer(value=42, why="x")
        assert server.requests[0]["response_format"]["type"] == "json_schema"
