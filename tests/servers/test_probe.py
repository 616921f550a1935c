"""``ec-agents check``: what it finds out about endpoints of several kinds, in plain words."""

import itertools
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from ec_agents.cli.main import app
from ec_agents.errors import ConfigError
from ec_agents.servers.probe import ProbeReport, probe_endpoint
from ec_agents.servers.providers import Endpoint, verdict_on
from ec_agents.testing import Fault, FaultServer, Reply
from ec_agents.testing.server import completion

LONG = "!..!" * 8
_number = itertools.count()


class Endpoints:
    """A server's behaviour: which parts it measures, and what it refuses."""

    def __init__(
        self, *, plain: str | None = LONG, tools: str | None = LONG, schemas: bool = True, n: int = 9, k: int = 20
    ) -> None:
        self.plain, self.tools, self.schemas, self.n, self.k = plain, tools, schemas, n, k

    def __call__(self, request: Any) -> Any:
        if request["top_logprobs"] > self.k:
            raise ValueError(f"top_logprobs must be at most {self.k}")
        if "tools" in request:
            replies = [Reply(tool_calls=[("get_weather", {"city": "Oslo"})], profile=self.tools)]
        elif "response_format" in request and self.schemas:
            text = {"thought": "look", "action": {"tool": "get_weather", "arguments": {"city": "Oslo"}}}
            replies = [Reply(content=json.dumps(text), profile=self.plain)]
        else:
            count = min(request.get("n", 1), self.n)
            replies = [Reply(content=f"wave {next(_number)}", profile=self.plain) for _ in range(count)]
        return completion([reply.message() for reply in replies], request)


async def report_on(source: Any, faults: Any = (), **options: Any) -> ProbeReport:
    with FaultServer(source, faults=faults) as server:
        return await probe_endpoint(server.base_url, "m", **options)


def marks(report: ProbeReport) -> list[bool | None]:
    return [finding.works for finding in report.findings]


async def test_a_sound_endpoint():
    report = await report_on(Endpoints())
    assert marks(report) == [True, True, True, True]
    assert report.usable
    assert report.lines()[-1] == "Nothing to change."


async def test_tool_calls_without_numbers():
    report = await report_on(Endpoints(tools=None))
    assert marks(report) == [True, True, False, True]
    assert report.lines()[-1] == "  - with tools, use action_format='json'; 'auto' does so by itself"


async def test_schemas_that_are_ignored():
    report = await report_on(Endpoints(schemas=False))
    assert marks(report) == [True, True, True, False]
    assert "found 'wave" in report.findings[3].found


async def test_n_that_is_ignored():
    report = await report_on(Endpoints(n=1))
    assert marks(report) == [True, False, True, True]
    assert report.findings[1].found == "1 came; one request each works all the same"


async def test_numbers_that_are_dropped_in_silence_end_the_check():
    report = await report_on(Endpoints(plain=None))
    assert marks(report) == [False]
    assert not report.usable
    assert "2 of 2 responses without log-probabilities" in report.findings[0].found


async def test_a_server_that_gives_few_alternatives():
    report = await report_on(Endpoints(k=5))
    assert marks(report) == [True, True, True, True]
    assert "20 alternatives are refused" in report.findings[0].found
    assert report.lines()[-1] == "  - top_logprobs=5"


async def test_a_server_that_refuses_log_probabilities():
    report = await report_on(Endpoints(k=0))
    assert marks(report) == [False]
    assert "top_logprobs must be at most 0" in report.findings[0].found


def refusal(status: int, message: str = "no", **fields: Any) -> Any:
    """A fault: an error in OpenAI's form, with these fields."""
    body = json.dumps({"error": {"message": message, **fields}}).encode()
    return Fault(about=message, status=status, body=lambda _: body)


INPUT = {"model": "m", "logprobs": True, "top_logprobs": 20}
INVALID = json.dumps({"detail": [{"loc": ["body", "temperature"], "msg": "too high", "input": INPUT}]}).encode()


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("status_429", "try again later"),
        (refusal(503), "try again later"),
        (refusal(401, "bad key"), "set OPENAI_API_KEY"),
        (refusal(400, "API key not valid. Please pass a valid API key."), "set OPENAI_API_KEY"),
        (refusal(404, "no such model"), "check the model name"),
        (refusal(400, "The model `m` does not exist", code="model_not_found"), "check the model name"),
        (refusal(403, "your plan does not include this"), "use a key that may use this model"),
        (refusal(402), "add credit"),
        (refusal(429, "You exceeded your current quota", code="insufficient_quota"), "add credit"),
        (refusal(403, "Insufficient Balance"), "add credit"),
        (refusal(400, "This model's maximum context length is 128 tokens", code="context_length_exceeded"), "context"),
        (refusal(400, "The prompt was filtered", code="content_filter", param="prompt"), "content filter"),
        (refusal(400, "temperature does not support 1", param="temperature"), "another reason"),
        (refusal(400, "max_tokens is too large for logprobs", param="max_tokens"), "another reason"),
        (Fault(about="validation", status=422, body=lambda _: INVALID), "another reason"),
        ("html_page", "is this an OpenAI-compatible server?"),
        ("empty_choices", "is this an OpenAI-compatible server?"),
    ],
)
async def test_errors_that_say_nothing_about_log_probabilities(fault: Any, advice: str):
    report = await report_on(Endpoints(), [fault])
    assert marks(report) == [None]
    assert advice in report.findings[0].advice


@pytest.mark.parametrize(
    "fault",
    [
        refusal(400, "logprobs is not supported with this model"),
        refusal(403, "You are not allowed to request logprobs from this model"),
        refusal(400, "unsupported", param="top_logprobs"),
        refusal(422, "Extra inputs: LogProbs"),
        refusal(501, "no log_probs here"),
    ],
)
async def test_refusals_of_log_probabilities(fault: Any):
    report = await report_on(Endpoints(), [fault])
    assert marks(report) == [False]
    assert "serve the model with vLLM" in report.findings[0].advice


@pytest.mark.parametrize(
    ("message", "works"),
    [
        ("n must be 1", [True, False, None, None]),
        ("tools are not supported", [True, None, False, None]),
        ("response_format is not supported", [True, None, None, False]),
        ("maximum context length is 128 tokens", [True, None, None, None]),
    ],
)
async def test_refusals_of_other_parameters(message: str, works: Any):
    """An error counts against the part of the request that it is about, and leaves the others unknown."""
    faults = [None, None, *[refusal(400, message)] * 3]
    assert marks(await report_on(Endpoints(), faults)) == works


async def test_an_endpoint_that_gives_the_same_answer_again_and_again():
    fixed = completion([Reply(content="wave", profile=LONG).message()], {"logprobs": True, "top_logprobs": 4})
    report = await report_on(fixed)
    assert report.findings[0].works
    assert "2 responses are the same" in report.findings[0].found
    assert "send no fixed seed" in report.findings[0].advice


async def test_a_model_that_calls_no_tool():
    def without_tools(request: Any) -> Any:
        return Endpoints()({name: value for name, value in request.items() if name != "tools"})

    report = await report_on(without_tools)
    assert marks(report) == [True, True, None, True]


async def test_the_verdicts_are_remembered():
    with FaultServer(Endpoints(tools=None)) as server:
        await probe_endpoint(server.base_url, "m")
        where = Endpoint(provider="", base_url=server.base_url, model="m")
    plain, tools = (verdict_on(where, tools=tools) for tools in (False, True))
    assert plain is not None
    assert plain.usable
    assert tools is None, "one answer is no verdict"


async def test_nobody_answers():
    report = await probe_endpoint("http://127.0.0.1:9/v1", "m")
    assert marks(report) == [None]
    assert "check that the server runs" in report.lines()[-1]


@pytest.mark.parametrize(("base_url", "k"), [("localhost:8000", 20), ("http://127.0.0.1:9", 0)])
async def test_arguments_out_of_range(base_url: str, k: int):
    with pytest.raises(ConfigError, match="must be"):
        await probe_endpoint(base_url, "m", top_logprobs=k)


@pytest.mark.parametrize(
    ("source", "code", "word"), [(Endpoints(), 0, "Nothing to change"), (Endpoints(plain=None), 1, "does not work")]
)
def test_the_command(source: Any, code: int, word: str):
    """It prints the report, and its exit status says whether the server works."""
    with FaultServer(source) as server:
        done = CliRunner().invoke(app, ["check", "--base-url", server.base_url, "--model", "m"])
        assert f"m at {server.base_url}" in done.output
    assert done.exit_code == code
    assert word in done.output
