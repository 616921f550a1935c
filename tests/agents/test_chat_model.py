"""The chat model: LangChain's standard suites, the choice, usage, tracing, tools, streams."""

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest
from helpers.adding import EARLY, LATE, add
from helpers.waiting import until
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler, get_usage_metadata_callback
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult, LLMResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from pydantic import BaseModel

from ec_agents.agents.chat_model import CentroidChatModel
from ec_agents.embedded import EmbeddedChatModel
from ec_agents.errors import ConfigError, SamplingError
from ec_agents.policy import SamplingPolicy
from ec_agents.testing import Reply, ScriptedChatModel


class Obliging(ScriptedChatModel):
    """A model that calls the first tool it is given with arguments that fit, texts being the question; or talks."""

    def _answer(self, messages: Sequence[BaseMessage], options: dict[str, Any]) -> AIMessage:
        tools = options.get("tools") or ()
        answered = isinstance(messages[-1], ToolMessage)
        functions = sorted((t["function"] for t in tools), key=lambda f: f["name"] != options.get("tool_choice"))
        calls = () if answered or not tools else [_fitting(functions[0], str(messages[-1].text))]
        message = Reply(content="" if calls else "It is as you say.", tool_calls=calls).message()
        message.response_metadata["model_name"] = options.get("model", "obliging")
        return message

    def with_structured_output(self, schema: Any, *, method: Any = None, strict: Any = None, **kwargs: Any) -> Any:
        """Take every method, as LangChain's suite demands; all are tool calls here."""
        return super().with_structured_output(schema, **kwargs)

    def _next(self, messages: list[BaseMessage], options: dict[str, Any]) -> Reply:
        self._requests.append((messages, options))
        return Reply()

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        return {**super()._get_ls_params(stop, **kwargs), "ls_model_name": "obliging"}

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        self._next(messages, kwargs)
        return ChatResult(generations=[ChatGeneration(message=self._answer(messages, kwargs))])

    async def _agenerate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Any:
        return self._generate(messages, stop, run_manager, **kwargs)


def _fitting(function: dict[str, Any], question: str) -> tuple[str, dict[str, Any]]:
    values = {"integer": 3, "number": 3.0, "string": question, "boolean": True, "array": [], "object": {}}
    properties: dict[str, Any] = function["parameters"].get("properties", {})
    return function["name"], {name: values[schema.get("type", "string")] for name, schema in properties.items()}


class Standard:
    @property
    def chat_model_class(self) -> type[CentroidChatModel]:
        return CentroidChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # At temperature 0 all candidates would be equal.
        return {"model": Obliging(), "n": 3, "temperature": 0.7}

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "another"


class TestUnit(Standard, ChatModelUnitTests):
    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """LangChain's, without the limits of a call, which belong in the policy, and without a key."""
        given = super().standard_chat_model_params
        return {name: value for name, value in given.items() if name not in ("timeout", "max_retries", "api_key")}


class TestIntegration(Standard, ChatModelIntegrationTests): ...


def scripted(*profiles: str | None, **fields: Any) -> list[Reply]:
    return [Reply(content=f"answer {i}", profile=profile, **fields) for i, profile in enumerate(profiles)]


def three(**options: Any) -> CentroidChatModel:
    return CentroidChatModel(ScriptedChatModel(replies=scripted(LATE, EARLY, LATE)), n=3, **options)


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream", "batch", "abatch"])
async def test_the_answer_is_the_chosen_one(way: str):
    model = three()
    if way == "invoke":
        message: Any = model.invoke("hi")
    elif way == "ainvoke":
        message = await model.ainvoke("hi")
    elif way == "stream":
        [message] = list(model.stream("hi"))
    elif way == "astream":
        [message] = [chunk async for chunk in model.astream("hi")]
    else:
        [message] = model.batch(["hi"]) if way == "batch" else await model.abatch(["hi"])
    assert message.content == "answer 1"
    assert message.response_metadata["ec_agents"]["chosen"] == 1
    assert not {"logprobs", "ec_signals"} & message.response_metadata.keys()
    assert isinstance(message, AIMessageChunk) == (way in ("stream", "astream"))
    assert message.usage_metadata["total_tokens"] == 20
    assert message.response_metadata["ec_agents"]["usage"]["total_tokens"] == 60


def test_a_chain_takes_it_as_any_chat_model():
    chain = ChatPromptTemplate.from_messages([("system", "be brief"), ("user", "{question}")]) | three()
    assert chain.invoke({"question": "why?"}).content == "answer 1"


def test_it_works_on_the_embedded_model():
    message = CentroidChatModel(EmbeddedChatModel(seed=None), n=3).invoke("Ann has 12. How many has Ann?")
    assert all(score is not None for score in message.response_metadata["ec_agents"]["scores"])


def test_tools_are_bound_in_the_form_of_the_asked_model():
    model = ScriptedChatModel(replies=[Reply(tool_calls=[("add", {"a": 1, "b": 2})])])
    message = CentroidChatModel(model.bind(user="me"), n=1).bind_tools([add]).invoke("1 + 2?")
    assert message.tool_calls[0]["args"] == {"a": 1, "b": 2}
    options = model.requests[0][1]
    assert options["tools"][0]["function"]["name"] == "add"
    assert (options["user"], options["logprobs"], options["top_logprobs"]) == ("me", True, 20)


@pytest.mark.parametrize(
    ("call", "problem"), [(("sub", {}), "unknown tool 'sub'; known: add"), (("add", {"a": 1}), "b: Field required")]
)
def test_an_invalid_action_loses(call: Any, problem: str):
    replies = [Reply(tool_calls=[call], profile=EARLY), Reply(tool_calls=[("add", {"a": 1, "b": 2})], profile=LATE)]
    message = CentroidChatModel(ScriptedChatModel(replies=replies), n=2).bind_tools([add]).invoke("1 + 2?")
    assert message.tool_calls[0]["name"] == "add"
    assert problem in message.response_metadata["ec_agents"]["flaws"][0]["invalid_action"]


class Answer(BaseModel):
    """An answer."""

    value: int


def test_structured_output():
    replies = [
        Reply(tool_calls=[("Answer", {"wrong": 1})], profile=EARLY),
        Reply(tool_calls=[("Answer", {"value": 3})], profile=LATE),
    ]
    model = CentroidChatModel(ScriptedChatModel(replies=replies), n=2)
    assert model.with_structured_output(Answer).invoke("1 + 2?") == Answer(value=3)


# Usage and tracing


class Runs(BaseCallbackHandler):
    """Keeps the runs of chat models and their results."""

    def __init__(self) -> None:
        self.parents: dict[UUID, UUID | None] = {}
        self.results: list[str] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.parents[run_id] = kwargs["parent_run_id"]

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.results.append(response.model_dump_json())


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
@pytest.mark.parametrize("explicit", [False, True])
async def test_the_usage_callback_counts_each_call_once(way: str, *, explicit: bool):
    model = CentroidChatModel(Obliging(), n=3)
    with get_usage_metadata_callback() as counted:
        own = UsageMetadataCallbackHandler()
        config: Any = {"callbacks": [own]} if explicit else {}
        message = model.invoke("hi", config) if way == "invoke" else await model.ainvoke("hi", config)
    assert message.usage_metadata
    single = message.usage_metadata["total_tokens"]
    assert (own if explicit else counted).usage_metadata["obliging"]["total_tokens"] == 3 * single


async def test_tracers_see_one_run_and_no_logprobs():
    runs = Runs()
    await three().ainvoke("hi", {"callbacks": [runs]})
    assert list(runs.parents.values()) == [None]
    assert "top_logprobs" not in "".join(runs.results)


async def test_tracers_see_the_candidates_as_children_when_asked():
    runs = Runs()
    await three(trace_candidates=True).ainvoke("hi", {"callbacks": [runs]})
    parent, *children = runs.parents
    assert [runs.parents[child] for child in children] == [parent] * 3
    assert len(runs.results) == 4
    assert "top_logprobs" not in "".join(runs.results)


# Faults and arguments


async def test_the_limits_of_a_call_hold():
    replies = [Reply(error=ConnectionError("reset")), Reply(content="fine")]
    model = CentroidChatModel(ScriptedChatModel(replies=replies), n=2, policy=SamplingPolicy(min_candidates=2))
    with pytest.raises(SamplingError, match="1 of 2 calls succeeded, 2 needed"):
        await model.ainvoke("hi")


async def test_cancelling_leaves_no_task():
    asked = ScriptedChatModel(replies=[Reply(delay=float("inf"))] * 4)
    run = asyncio.create_task(CentroidChatModel(asked, n=4).ainvoke("hi"))
    await until(lambda: len(asked.requests) == 4)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an integer, 1 or more"),
        ({"policy": SamplingPolicy(min_candidates=9)}, "min_candidates"),
        ({"selector": "centriod"}, "centriod.* known: centroid, "),
        ({"policy": "3"}, "policy must be a SamplingPolicy, the timeout of a call in seconds, or None; found str"),
        ({"model": "gpt"}, "found str"),
        ({"model": None}, "found NoneType"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        CentroidChatModel(**{"model": ScriptedChatModel(), **options})


def test_options():
    """Options of the model and of the call reach every candidate."""
    model = ScriptedChatModel(replies=scripted(LATE, LATE, LATE, LATE))
    asked = CentroidChatModel(model, n=2, temperature=0.5, max_tokens=9)
    asked.invoke([HumanMessage("hi")])
    asked.invoke("hi", temperature=0.9, stop=["END"])
    sent = [
        {name: options.get(name) for name in ("temperature", "max_tokens", "stop")} for _, options in model.requests
    ]
    assert sent[:2] == [{"temperature": 0.5, "max_tokens": 9, "stop": None}] * 2
    assert sent[2:] == [{"temperature": 0.9, "max_tokens": 9, "stop": ["END"]}] * 2


def test_equal_candidates_are_refused():
    with pytest.raises(ConfigError, match="temperature is 0, so all 3 candidates would be identical"):
        three(temperature=0).invoke("hi")
    with pytest.raises(ConfigError, match="temperature is 0"):
        three().invoke("hi", temperature=0)
