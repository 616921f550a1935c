"""The middleware inside ``create_agent``: choice, streams, structured output, other middleware, humans, crashes."""

import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.adding import ASK, EARLY, LATE, THREAD, Dying, add, call_add, record, two_steps
from helpers.processes import run
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    HumanInTheLoopMiddleware,
    LLMToolSelectorMiddleware,
    ModelFallbackMiddleware,
    ModelRetryMiddleware,
    SummarizationMiddleware,
)
from langchain.agents.structured_output import (
    ProviderStrategy,
    StructuredOutputValidationError,
    ToolStrategy,
)
from langchain_core.callbacks import get_usage_metadata_callback
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from pydantic import BaseModel

from ec_agents.agents.middleware import EntropyCentroidMiddleware, _unpack
from ec_agents.errors import ConfigError, SamplingError, SelectionError, StateError
from ec_agents.policy import SamplingPolicy
from ec_agents.selection import Selector
from ec_agents.testing import Reply, ScriptedChatModel


def scripted(replies: Sequence[Reply]) -> ScriptedChatModel:
    return ScriptedChatModel(replies=replies)


def agent_of(
    replies: Sequence[Reply] | ScriptedChatModel,
    *,
    n: Any = 3,
    tools: Any = (add,),
    outside: Sequence[Any] = (),
    inside: Sequence[Any] = (),
    agent: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    model = replies if isinstance(replies, ScriptedChatModel) else scripted(replies)
    ours = EntropyCentroidMiddleware(n=n, **options)
    return create_agent(model, list(tools), middleware=[*outside, ours, *inside], **agent or {})


# The choice


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_only_the_winner_enters_the_messages_and_acts(way: str, *, durable: bool):
    agent = agent_of(two_steps(), durable=durable, agent={"checkpointer": InMemorySaver()})
    state = agent.invoke(ASK, THREAD) if way == "invoke" else await agent.ainvoke(ASK, THREAD)
    assert [type(message) for message in state["messages"]] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    _, action, result, final = state["messages"]
    assert action.tool_calls[0]["args"] == {"a": 1, "b": 2}
    assert (result.content, final.content) == ("3", "it is 3")


async def test_the_evidence_is_on_the_message_and_in_private_state():
    agent = agent_of(two_steps(), agent={"checkpointer": InMemorySaver()})
    state = await agent.ainvoke(ASK, THREAD)
    found = record(state["messages"][1])
    assert (found["chosen"], found["reason"]) == (1, "ranked")
    assert found["scores"] == [0.75, pytest.approx(0.15), 0.75]
    assert found["usage"] == {"input_tokens": 30, "output_tokens": 30, "total_tokens": 60}
    assert state["messages"][1].usage_metadata["total_tokens"] == 20
    assert "ec_decisions" not in state
    decisions = agent.get_state(THREAD).values["ec_decisions"]
    contents = [[outline["tool_calls"] or outline["content"] for outline in d.pop("candidates")] for d in decisions]
    assert [len(found) for found in contents] == [3, 3]
    assert decisions == [record(state["messages"][i]) for i in (1, 3)]


def test_requests():
    """Every request asks for log-probabilities and carries the tools and the prompt."""
    model = scripted(two_steps())
    agent_of(model, top_logprobs=7, agent={"system_prompt": "be brief"}).invoke(ASK)
    assert len(model.requests) == 6
    for messages, options in model.requests:
        assert messages[0] == SystemMessage("be brief")
        assert (options["logprobs"], options["top_logprobs"]) == (True, 7)
        assert options["tools"][0]["function"]["name"] == "add"


def test_none_asks_for_nothing():
    model = scripted([Reply()])
    agent_of(model, n=1, top_logprobs=None).invoke(ASK)
    assert "logprobs" not in model.requests[0][1]


@pytest.mark.parametrize("n", [1, 64])
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_any_number_of_candidates(way: str, n: int):
    agent = agent_of([Reply(content=f"{i}", profile="." * (70 - i) + "!" + "." * i) for i in range(n)], n=n)
    state = agent.invoke(ASK) if way == "invoke" else await agent.ainvoke(ASK)
    assert state["messages"][-1].content == f"{n - 1}"


def test_synchronous_calls_run_at_the_same_time():
    meet = threading.Barrier(12, timeout=20)

    class Meeting(ScriptedChatModel):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            meet.wait()
            return super()._generate(*args, **kwargs)

    agent = create_agent(Meeting(replies=[Reply(content="a")] * 12), middleware=[EntropyCentroidMiddleware(n=12)])
    assert agent.invoke(ASK)["messages"][-1].content == "a"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_a_failed_and_a_hung_call_take_no_other_down(way: str):
    hung = 2.0 if way == "invoke" else math.inf
    agent = agent_of([Reply(error=ConnectionError("reset")), Reply(delay=hung), Reply(content="fine")], policy=0.2)
    found = (agent.invoke(ASK) if way == "invoke" else await agent.ainvoke(ASK))["messages"][-1]
    assert found.content == "fine"
    failures = ["ConnectionError: reset", "TimeoutError: no answer within 0.2 s (timeout)"]
    assert sorted(filter(None, record(found)["failures"])) == failures


def test_too_few_successes_raise():
    with pytest.raises(SamplingError, match="1 of 2 calls succeeded, 2 needed"):
        agent_of([Reply(error=ConnectionError("reset")), Reply()], n=2, policy=SamplingPolicy(min_candidates=2)).invoke(
            ASK
        )


async def test_an_invalid_action_loses_to_a_valid_one():
    replies = [Reply(tool_calls=[("nope", {})], profile=EARLY), call_add(1, 2, LATE), *[Reply(content="3")] * 2]
    found = record((await agent_of(replies, n=2).ainvoke(ASK))["messages"][1])
    assert found["chosen"] == 1
    assert found["flaws"][0]["invalid_action"] == "unknown tool 'nope'; known: add"


def test_a_model_without_logprobs_can_be_an_error():
    with pytest.raises(SelectionError, match="none of 3 candidates could be scored"):
        agent_of([Reply(content="3", profile=None)] * 3, selector=Selector(fallback="raise")).invoke(ASK)


# N


def test_n_may_be_a_function_of_the_request():
    model = scripted([call_add(1, 2), *[Reply(content="3")] * 4])

    def n(request: Any) -> int:
        return 1 if isinstance(request.messages[-1], HumanMessage) else 4

    state = agent_of(model, n=n).invoke(ASK)
    assert [len(record(m)["scores"]) for m in state["messages"] if isinstance(m, AIMessage)] == [1, 4]


def test_a_function_may_give_more_than_the_default_number():
    model = scripted([Reply(content="3")] * 12)
    agent_of(model, n=lambda _: 12, policy=SamplingPolicy(min_candidates=10)).invoke(ASK)
    assert len(model.requests) == 12


class Context(BaseModel):
    ec_n: int | None = None


@pytest.mark.parametrize(
    ("schema", "run"),
    [
        (Context, {"context": Context(ec_n=2)}),
        (dict[str, Any], {"context": {"ec_n": 2}}),
        (None, {"config": {"configurable": {"ec_n": 2}}}),
    ],
)
def test_the_run_may_say_how_many(schema: Any, run: dict[str, Any]):
    model = scripted([Reply(content="3")] * 5)
    agent_of(model, n=5, agent={"context_schema": schema}).invoke(ASK, **run)
    assert len(model.requests) == 2


def test_a_context_that_says_nothing_leaves_n_as_it_is():
    model = scripted([Reply(content="3")] * 5)
    agent_of(model, n=5, agent={"context_schema": Context}).invoke(ASK, context=Context())
    assert len(model.requests) == 5


@pytest.mark.parametrize("given", [0, -1, "8", True, 2.0])
def test_a_run_that_asks_for_an_impossible_number_is_told(given: Any):
    with pytest.raises(ConfigError, match=r"n must be an integer, 1 or more|number of candidates .* must be an int"):
        agent_of([], n=lambda _: given).invoke(ASK)


@pytest.mark.parametrize(
    "options", [{"n": 0}, {"n": "8"}, {"policy": {}}, {"policy": -1}, {"policy": SamplingPolicy(min_candidates=9)}]
)
def test_arguments_out_of_range_are_refused_at_once(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"^(n|policy|timeout|min_candidates) must be"):
        EntropyCentroidMiddleware(**options)


class Seeded(ScriptedChatModel):
    temperature: float = 0.7


def test_equal_candidates_are_refused():
    with pytest.raises(ConfigError, match="temperature is 0, so all 3 candidates would be identical"):
        agent_of(Seeded(replies=two_steps(), temperature=0)).invoke(ASK)
    assert agent_of(Seeded(replies=[Reply(content="3")], temperature=0), n=1).invoke(ASK)


def test_every_candidate_has_a_seed_of_its_own():
    model = scripted([Reply(content="3")] * 3)

    class Seeding(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
            return handler(request.override(model_settings={"seed": 7}))

    agent_of(model, outside=[Seeding()]).invoke(ASK)
    assert sorted(options["seed"] for _, options in model.requests) == [7, 8, 9]


# Streams


@pytest.mark.parametrize("durable", [False, True])
async def test_every_stream_shows_one_answer_a_step(*, durable: bool):
    modes = ["messages", "updates", "values", "custom"]
    seen: dict[str, list[Any]] = {mode: [] for mode in modes}
    agent = agent_of(two_steps(), durable=durable, agent={"checkpointer": InMemorySaver()})
    async for mode, event in agent.astream(ASK, THREAD, stream_mode=modes):
        seen[mode].append(event)
    shown = [message for message, _ in seen["messages"] if isinstance(message, AIMessage)]
    assert [m.tool_calls[0]["args"] if m.tool_calls else m.content for m in shown] == [{"a": 1, "b": 2}, "it is 3"]
    updates = [update for update in seen["updates"] if "ec_sample" not in update]
    assert [next(iter(update)) for update in updates] == ["model", "tools", "model"]
    assert [len(values["messages"]) for values in seen["values"]] == [1, 2, 3, 4]
    events = [event["ec_agents"] for event in seen["custom"]]
    assert events == [*["candidate"] * 3, "choice", *["candidate"] * 3, "choice"]


@pytest.mark.filterwarnings("ignore:astream_events version='v1'")
@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_events_show_one_model_call_a_step(version: Any):
    stream = agent_of(two_steps()).astream_events(ASK, version=version)
    events = [event async for event in stream if "chat_model" in event["event"]]
    kinds = ["on_chat_model_start", "on_chat_model_stream", "on_chat_model_end"]
    assert [event["event"] for event in events] == kinds * 2
    assert {event["run_id"] for event in events[:3]} != {event["run_id"] for event in events[3:]}
    assert isinstance(events[4]["data"]["chunk"], AIMessageChunk)
    assert events[4]["data"]["chunk"].content == "it is 3"
    assert events[1]["data"]["chunk"].tool_calls[0]["args"] == {"a": 1, "b": 2}


@pytest.mark.filterwarnings("ignore:The v3 streaming protocol")
async def test_version_three_of_the_events_shows_one_message_a_step():
    stream = await agent_of(two_steps()).astream_events(ASK, version="v3")
    found = [event["params"]["data"][0] async for event in stream if event["method"] == "messages"]
    answers = [message for message in found if isinstance(message, AIMessage)]  # LangGraph 1.2.0 shows tools' too
    assert [m.tool_calls[0]["args"] if m.tool_calls else m.content for m in answers] == [{"a": 1, "b": 2}, "it is 3"]


# Structured output


class Answer(BaseModel):
    value: int


def test_unparsed_under_tool_strategy():
    """A candidate that does not parse loses."""
    model = scripted(
        [
            Reply(tool_calls=[("Answer", {"value": "three"})], profile=EARLY),
            Reply(tool_calls=[("Answer", {"value": 3})], profile=LATE),
        ]
    )
    state = agent_of(model, n=2, agent={"response_format": ToolStrategy(Answer)}).invoke(ASK)
    assert state["structured_response"] == Answer(value=3)
    assert len(model.requests) == 2
    [flaws] = [
        found for found in next(record(m) for m in state["messages"] if isinstance(m, AIMessage))["flaws"] if found
    ]
    assert "value" in flaws["invalid_action"]


def unparsable(n: int) -> list[Reply]:
    return [Reply(content="no json", profile=EARLY)] * n


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_unparsed_under_provider_strategy(way: str, *, durable: bool):
    """A candidate that does not parse loses."""
    options = {"response_format": ProviderStrategy(Answer), "checkpointer": InMemorySaver()}
    replies = [*unparsable(1), Reply(content='{"value": 3}', profile=LATE)]
    agent = agent_of(replies, n=2, tools=(), durable=durable, agent=options)
    state = agent.invoke(ASK, THREAD) if way == "invoke" else await agent.ainvoke(ASK, THREAD)
    assert state["structured_response"] == Answer(value=3)
    [flaws] = [found for found in record(state["messages"][-1])["flaws"] if found]
    assert "invalid_action" in flaws


@pytest.mark.parametrize("durable", [False, True])
def test_none_parses(*, durable: bool):
    """The error is that of the agent without the middleware."""
    options = {"response_format": ProviderStrategy(Answer), "checkpointer": InMemorySaver()}
    agent = agent_of(unparsable(2), n=2, tools=(), durable=durable, agent=options)
    with pytest.raises(StructuredOutputValidationError, match="no json|valid JSON|response"):
        agent.invoke(ASK, THREAD)


def test_if_no_tool_call_parses_the_model_is_asked_again():
    bad = Reply(tool_calls=[("Answer", {"value": "three"})])
    good = Reply(tool_calls=[("Answer", {"value": 3})])
    model = scripted([bad, bad, good, good])
    assert agent_of(model, n=2, agent={"response_format": ToolStrategy(Answer)}).invoke(ASK)[
        "structured_response"
    ] == Answer(value=3)
    assert len(model.requests) == 4


# Other middleware


def test_retry_inside_repeats_only_the_call_that_failed():
    model = scripted([Reply(error=ConnectionError("reset")), *[Reply(content="3")] * 4])
    retry = ModelRetryMiddleware(max_retries=1, initial_delay=0, jitter=False)
    found = record(agent_of(model, n=4, inside=[retry]).invoke(ASK)["messages"][-1])
    assert len(model.requests) == 5
    assert (len(found["scores"]), found["failures"]) == (4, [None] * 4)


def test_retry_outside_repeats_the_whole_step():
    model = scripted([Reply(error=ConnectionError("reset")), *[Reply(content="3")] * 7])
    retry = ModelRetryMiddleware(max_retries=1, initial_delay=0, jitter=False)
    agent_of(model, n=4, policy=SamplingPolicy(min_candidates=4), outside=[retry]).invoke(ASK)
    assert len(model.requests) == 8


def test_fallback_outside_replaces_all_candidates():
    spare = scripted([Reply(content=f"{i}") for i in range(3)])
    broken = scripted([Reply(error=ConnectionError("down"))] * 3)
    found = agent_of(broken, outside=[ModelFallbackMiddleware(spare)]).invoke(ASK)["messages"][-1]
    assert len(record(found)["scores"]) == 3
    assert all(options["logprobs"] for _, options in spare.requests)


def test_summarization_outside_sees_the_winners_own_usage():
    summaries = scripted([])
    model = scripted(two_steps() * 2)
    outside = [SummarizationMiddleware(summaries, trigger=("tokens", 50), keep=("messages", 1))]
    agent_of(model, outside=outside).invoke(ASK)
    assert summaries.requests == []


def test_summarization_outside_still_summarizes():
    summaries = scripted([Reply(content="a summary")])
    outside = [SummarizationMiddleware(summaries, trigger=("messages", 3), keep=("messages", 1))]
    state = agent_of(two_steps(), outside=outside).invoke(ASK)
    assert len(summaries.requests) == 1
    assert any("a summary" in message.text for message in state["messages"])
    assert state["messages"][-1].content == "it is 3"


def test_tool_selector_outside_is_asked_once_a_step():
    def sub(a: int, b: int) -> int:
        """Subtract."""
        return a - b

    chooser = scripted([Reply(tool_calls=[("ToolSelectionResponse", {"tools": ["add"]})])] * 2)
    model = scripted(two_steps())
    agent_of(model, tools=(add, sub), outside=[LLMToolSelectorMiddleware(model=chooser, max_tools=1)]).invoke(ASK)
    assert len(chooser.requests) == 2
    assert all([t["function"]["name"] for t in options["tools"]] == ["add"] for _, options in model.requests)


@pytest.mark.parametrize("decision", ["approve", "edit", "reject"])
def test_a_person_decides_about_the_very_action_that_runs(decision: str):
    done: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        done.append((a, b))
        return a + b

    model = scripted(two_steps())
    human = HumanInTheLoopMiddleware(interrupt_on={"add": True})
    agent = agent_of(model, tools=(add,), outside=[human], agent={"checkpointer": InMemorySaver()})
    asked = agent.invoke(ASK, THREAD)["__interrupt__"][0].value["action_requests"][0]
    assert asked["args"] == {"a": 1, "b": 2}
    assert not done
    answer: dict[str, Any] = {"type": decision}
    if decision == "edit":
        answer["edited_action"] = {"name": "add", "args": {"a": 2, "b": 2}}
    agent.invoke(Command(resume={"decisions": [answer]}), THREAD)
    assert done == {"approve": [(1, 2)], "edit": [(2, 2)], "reject": []}[decision]
    assert len(model.requests) == 6


def test_usage():
    """The message reports the winner's usage, the callback that of all candidates."""

    class Named(ScriptedChatModel):
        def _next(self, messages: Any, options: Any) -> Reply:
            return super()._next(messages, options)

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            result = super()._generate(*args, **kwargs)
            result.generations[0].message.response_metadata["model_name"] = "named"
            return result

    with get_usage_metadata_callback() as counted:
        state = agent_of(Named(replies=two_steps())).invoke(ASK)
    assert state["messages"][-1].usage_metadata["total_tokens"] == 20
    assert counted.usage_metadata["named"]["total_tokens"] == 6 * 20


def test_one_process_may_serve_many_runs():
    agent = agent_of([Reply(content="3")] * 40, n=2)
    results = agent.batch([ASK] * 20)
    assert all(result["messages"][-1].content == "3" for result in results)


# Durability


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_durable_candidates_are_not_drawn_again(way: str):
    model = scripted(two_steps())
    agent = agent_of(model, outside=[Dying()], durable=True, agent={"checkpointer": InMemorySaver()})
    with pytest.raises(RuntimeError, match="crash"):
        agent.invoke(ASK, THREAD) if way == "invoke" else await agent.ainvoke(ASK, THREAD)
    assert len(model.requests) == 3
    state = agent.invoke(None, THREAD) if way == "invoke" else await agent.ainvoke(None, THREAD)
    assert state["messages"][1].tool_calls[0]["args"] == {"a": 1, "b": 2}
    assert len(model.requests) == 6


CRASH = """
import asyncio, os, sqlite3, sys, time
from langchain.agents import create_agent
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from ec_agents import EntropyCentroidMiddleware
from ec_agents.testing import Reply, ScriptedChatModel

database, log, deadly = sys.argv[1:]

def stored():
    with sqlite3.connect(database) as connection:
        return connection.execute("select count(*) from writes where channel = '__return__'").fetchone()[0]

async def die_when_the_others_are_stored():
    while stored() < 3:
        await asyncio.sleep(0.01)
    os._exit(9)

class Counting(ScriptedChatModel):
    async def _agenerate(self, *args, **kwargs):
        with open(log, "a") as file:
            file.write("call\\n")
        if deadly and len(self.requests) == 3:
            await die_when_the_others_are_stored()
        return await super()._agenerate(*args, **kwargs)

async def main():
    replies = [Reply(content=f"answer {i}", profile="." * (7 - i) + "!" + "." * i) for i in range(4)]
    async with AsyncSqliteSaver.from_conn_string(database) as saver:
        middleware = [EntropyCentroidMiddleware(n=4, durable=True)]
        agent = create_agent(Counting(replies=replies), middleware=middleware, checkpointer=saver)
        ask = {"messages": [("user", "hi")]} if deadly else None
        state = await agent.ainvoke(ask, {"configurable": {"thread_id": "1"}})
        record = state["messages"][-1].response_metadata["ec_agents"]
        print(state["messages"][-1].content, len(record["scores"]))

asyncio.run(main())
"""


def test_a_killed_process_goes_on_with_the_missing_call_only(tmp_path: Path):
    log = tmp_path / "calls.txt"
    given = (CRASH, tmp_path / "state.db", log)
    assert run(*given, "deadly").returncode == 9
    assert log.read_text().count("call") == 4
    resumed = run(*given, "")
    # Of the resumed run's calls only one is made: it gets the script's first reply.
    assert resumed.stdout.strip() == "answer 2 4", resumed.stderr
    assert log.read_text().count("call") == 5


def test_candidates_of_another_version_are_a_clear_error():
    with pytest.raises(StateError, match="damaged"):
        _unpack(("no text", None), 0)


async def test_records_are_json():
    state = await agent_of(two_steps()).ainvoke(ASK)
    assert json.loads(json.dumps(record(state["messages"][1])))["chosen"] == 1
