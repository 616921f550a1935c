"""Spans of a step: what they are called, what they say, and that nothing is lost without opentelemetry."""

from typing import Any

import pytest
from helpers.processes import run as run_code
from langchain.agents import create_agent
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ec_agents.agents import telemetry
from ec_agents.agents.chat_model import CentroidChatModel
from ec_agents.agents.graph import create_centroid_agent
from ec_agents.agents.middleware import EntropyCentroidMiddleware
from ec_agents.errors import SamplingError
from ec_agents.testing import Reply, ScriptedChatModel

ASK: Any = {"messages": [("user", "hi")]}
REPLIES = [
    Reply(content="late", profile=".......!.."),
    Reply(content="early", profile=".!........"),
    Reply(error=ConnectionError("reset")),
    Reply(content="cut off", profile=".!........", finish_reason="length"),
]


class Named(ScriptedChatModel):
    def _get_ls_params(self, stop: Any = None, **kwargs: Any) -> Any:
        return {"ls_provider": "openai", "ls_model_name": "gpt-4o", "ls_temperature": kwargs.get("temperature", 0.7)}


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", lambda: provider.get_tracer("test"))
    return exporter


async def run(way: str, replies: list[Reply]) -> None:
    model = Named(replies=replies)
    n = len(replies)
    if way == "graph":
        await create_centroid_agent(model, n=n).ainvoke(ASK)
    elif way == "middleware":
        await create_agent(model, middleware=[EntropyCentroidMiddleware(n=n)]).ainvoke(ASK)
    elif way == "middleware, synchronous":
        create_agent(model, middleware=[EntropyCentroidMiddleware(n=n)]).invoke(ASK)
    else:
        await CentroidChatModel(model, n=n).ainvoke("hi")


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("way", ["graph", "middleware", "chat model"])
async def test_a_step_is_a_chat_span_and_a_select_span(way: str, exported: InMemorySpanExporter):
    await run(way, REPLIES)
    chat, select = exported.get_finished_spans()
    assert (chat.name, chat.kind) == ("chat gpt-4o", trace.SpanKind.CLIENT)
    assert attributes(chat) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o",
        "gen_ai.request.temperature": 0.7,
        "gen_ai.request.choice.count": 4,
        "gen_ai.usage.input_tokens": 30,
        "gen_ai.usage.output_tokens": 30,
        "gen_ai.response.finish_reasons": ("stop", "stop", "length"),
        "ec_agents.failures": 1,
    }
    assert select.name == "select"
    found = attributes(select)
    assert (found["ec_agents.chosen"], found["ec_agents.reason"]) == (1, "ranked")
    assert found["ec_agents.margin"] == pytest.approx(0.6)


async def test_every_candidate_is_an_evaluation_event_best_first(exported: InMemorySpanExporter):
    await run("middleware, synchronous", [reply for reply in REPLIES if reply.error is None])
    events = exported.get_finished_spans()[1].events
    assert {event.name for event in events} == {"gen_ai.evaluation.result"}
    found: list[dict[str, Any]] = [dict(event.attributes or {}) for event in events]
    assert [event["gen_ai.evaluation.score.label"] for event in found] == ["chosen", "passed", "flawed"]
    assert found[0]["gen_ai.evaluation.score.value"] == pytest.approx(0.15)
    assert "truncated" in found[2]["gen_ai.evaluation.explanation"]
    assert {event["gen_ai.evaluation.name"] for event in found} == {"centroid"}


async def test_a_failed_step_is_an_error_span(exported: InMemorySpanExporter):
    with pytest.raises(SamplingError):
        await run("middleware", [Reply(error=ConnectionError("reset"))])
    [chat] = exported.get_finished_spans()
    assert attributes(chat)["error.type"] == "SamplingError"
    assert chat.status.status_code is trace.StatusCode.ERROR


async def test_no_text_of_the_conversation_is_in_a_span(exported: InMemorySpanExporter):
    await run("middleware", [Reply(content="a secret"), Reply(content="a secret")])
    assert not any("secret" in span.to_json() for span in exported.get_finished_spans())


async def test_a_step_takes_the_span_around_it_as_parent(exported: InMemorySpanExporter):
    with telemetry._tracer().start_as_current_span("outer") as outer:
        await run("middleware, synchronous", [Reply(content="a")])
    chat, select, _ = exported.get_finished_spans()
    assert chat.parent is not None
    assert select.parent is not None
    assert chat.parent.span_id == select.parent.span_id == outer.get_span_context().span_id


def test_without_opentelemetry_everything_works():
    code = """
from ec_agents import create_centroid_agent
from ec_agents.testing import Reply, ScriptedChatModel
agent = create_centroid_agent(ScriptedChatModel(replies=[Reply(content="fine")]), n=1)
print(agent.invoke({"messages": [("user", "hi")]})["messages"][-1].content)
"""
    done = run_code(code, without=["opentelemetry"])
    assert done.stdout.strip() == "fine", done.stderr
