"""Provider knowledge: the table, who serves a model, early refusals, verdicts on first responses."""

import math
import re
from typing import Any

import numpy as np
import pytest
from helpers.candidates import candidate
from helpers.paths import DOCS
from hypothesis import given, strategies as st
from langchain_openai import AzureChatOpenAI, ChatOpenAI

from ec_agents.candidates import Candidate, TokenSignals
from ec_agents.embedded import EmbeddedChatModel
from ec_agents.errors import UnsupportedLogprobs
from ec_agents.logprobs import pack_logprobs, token_signals
from ec_agents.servers.providers import (
    Endpoint,
    capabilities,
    complaint,
    endpoint_of,
    forget_verdicts,
    identical,
    provider_of,
    refuse_unsupported,
    remember,
    remember_without_schemas,
    table,
    takes_schemas,
    verdict_on,
    verify,
)
from ec_agents.testing import ScriptedChatModel, profile_logprobs

ROWS = table().row
PAGE = DOCS / "providers.md"


def endpoint(provider: str, model: str = "m", base_url: str = "http://x/v1") -> Endpoint:
    return Endpoint(provider=provider, base_url=base_url, model=model)


# The table


def test_hosts_and_classes_lead_to_rows():
    providers = {row.provider for row in ROWS}
    assert set(table().hosts.values()) <= providers
    assert {*table().classes.values(), *table().unverified.values()} <= providers
    assert not table().classes.keys() & table().unverified.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_can_be_reached_and_says_what_to_do(row: Any):
    re.compile(row.models)
    assert row.limitation
    assert row.remedy
    following = [other for other in ROWS if other.provider == row.provider]
    assert not following[-1].models, "the last row of a provider is for all models"


def test_the_documentation_has_the_table():
    found = PAGE.read_text(encoding="utf-8")
    for row in ROWS:
        k = {None: "set by server", 0: "0"}.get(row.k_max, str(row.k_max))
        cells = (row.name, row.status, k, row.tool_tokens, row.reasoning_tokens, row.distribution, row.limitation)
        assert f"| {' | '.join(cells)} | {row.remedy} |" in found


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4o", "OpenAI (gpt-4o, gpt-4.1)"),
        ("openai/gpt-4.1-mini", "OpenAI (gpt-4o, gpt-4.1)"),
        ("o3-mini", "OpenAI (reasoning models)"),
        ("gpt-5", "OpenAI (reasoning models)"),
        ("gpt-5-2025-08-07", "OpenAI (reasoning models)"),
        ("gpt-5.2", "OpenAI (gpt-5.1 to 5.4)"),
        ("gpt-5.2-pro", "OpenAI (reasoning models)"),
        ("gpt-5.5", "OpenAI (gpt-5.5 and later)"),
        ("gpt-6-sol", "OpenAI (gpt-5.5 and later)"),
        ("gpt-6.1-sol", "OpenAI (reasoning models)"),
    ],
)
def test_models_of_openai_fall_into_their_rows(model: str, name: str):
    row = capabilities("openai", model)
    assert row is not None
    assert row.name == name


# Who serves a model


@pytest.mark.parametrize(
    ("base_url", "provider"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://me.openai.azure.com/", "azure"),
        ("https://EastUS.api.cognitive.microsoft.com/", "azure"),
        ("https://me.openai.azure.us/openai", "azure"),
        ("https://us.api.openai.com/v1", "openai"),
        ("https://aiplatform.googleapis.com/v1", "gemini"),
        ("https://us-central1-aiplatform.googleapis.com/v1/projects/p", "gemini"),
        ("https://aiplatform.eu.rep.googleapis.com/v1", "gemini"),
        ("https://evil-aiplatform.googleapis.com.example.org/v1", ""),
        ("https://storage.googleapis.com/v1", ""),
        ("https://bedrock-runtime.us-east-1.amazonaws.com/openai/v1", "bedrock"),
        ("https://bedrock-runtime-fips.us-gov-west-1.amazonaws.com/openai/v1", "bedrock"),
        ("https://vpce-1.bedrock-runtime.us-east-1.vpce.amazonaws.com/v1", "bedrock"),
        ("https://bedrock-mantle.us-west-2.api.aws/v1", "bedrock"),
        ("http://vllm-123.us-east-1.elb.amazonaws.com/v1", ""),
        ("http://bedrock-runtime.us-east-1.elb.amazonaws.com/v1", ""),
        ("http://ec2-1-2-3-4.compute-1.amazonaws.com:8000/v1", ""),
        ("https://runtime.sagemaker.us-east-1.amazonaws.com/v1", ""),
        ("http://localhost:11434/v1", "ollama"),
        ("127.0.0.1:1234", "lmstudio"),
        ("http://127.0.0.1:8000/v1", ""),
        ("https://notapi.openai.com.example.org/v1", ""),
        ("https://xapi.groq.com/v1", ""),
        ("", ""),
    ],
)
def test_base_urls_tell_the_provider(base_url: str, provider: str):
    assert provider_of(base_url) == provider


@given(st.text(max_size=40))
def test_any_text_as_base_url_tells_a_known_provider_or_none(text: str):
    assert provider_of(text) in {"", *(row.provider for row in ROWS)}


def test_langchain_models_say_where_they_are_served():
    openai = endpoint_of(ChatOpenAI(model="gpt-4o", api_key="k"))  # type: ignore[arg-type]
    local = endpoint_of(ChatOpenAI(model="qwen", base_url="http://localhost:8000/v1/", api_key="k"))  # type: ignore[arg-type]
    azure = endpoint_of(
        AzureChatOpenAI(azure_endpoint="https://me.openai.azure.com", api_version="1", model="gpt-4o", api_key="k")  # type: ignore[arg-type]
    )
    assert openai == endpoint("openai", "gpt-4o", "https://api.openai.com/v1")
    assert local == endpoint("", "qwen", "http://localhost:8000/v1")
    assert azure is not None
    assert (azure.provider, azure.model) == ("azure", "gpt-4o")


def test_classes_of_one_provider_tell_it_without_a_base_url():
    class ChatAnthropic(ScriptedChatModel):
        model: str = "claude"

    class Mine(ChatAnthropic): ...

    assert endpoint_of(Mine()) == endpoint("anthropic", "claude", "anthropic")


@pytest.mark.parametrize("model", [ScriptedChatModel(), EmbeddedChatModel(), object()])
def test_models_without_a_server_have_no_endpoint(model: object):
    assert endpoint_of(model) is None


# Early refusals


@pytest.mark.parametrize(
    ("provider", "model", "request_", "message"),
    [
        ("anthropic", "claude", {}, r"Anthropic \(claude\): the API has no log-probabilities; use another provider"),
        ("groq", "m", {}, "refuses logprobs, top_logprobs and n above 1"),
        ("lmstudio", "m", {}, "serve the same GGUF file with llama-server"),
        ("openai", "o3", {}, "reasoning models refuse the parameter logprobs; use gpt-4.1"),
        ("openai", "gpt-4o", {"tools": True}, "no log-probabilities for tool calls .* action_format='json'"),
        ("azure", "mine", {"tools": True}, "no log-probabilities for tool calls"),
        ("cohere", "m", {}, "entropy cannot be computed"),
        ("fireworks", "m", {}, "at most 5 alternatives, and 20 are asked for; top_logprobs=5"),
        ("xai", "m", {"top_logprobs": 9}, "at most 8 alternatives, and 9 are asked for"),
        ("openai", "gpt-5.5", {}, "reasoning_effort='none' is needed; found None"),
        ("openai", "gpt-5.2", {"options": {"reasoning_effort": "high"}}, "reasoning_effort='none' is needed; found 'h"),
        ("openai", "gpt-4o", {"options": {"use_responses_api": True}}, "use_responses_api=False is needed; found True"),
        ("together", "m", {"options": {"top_p": 0.9}}, "top_p=1 is needed; found 0.9"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(provider: str, model: str, request_: dict[str, Any], message: str):
    asked: dict[str, Any] = {"top_logprobs": 20, "tools": False, **request_}
    with pytest.raises(UnsupportedLogprobs, match=message) as caught:
        refuse_unsupported(endpoint(provider, model), **asked)
    assert "top_logprobs=None" in str(caught.value)


@pytest.mark.parametrize(
    ("provider", "model", "request_"),
    [
        ("openai", "gpt-4o", {}),
        ("openai", "gpt-5.2", {"options": {"reasoning_effort": "none"}}),
        ("openai", "gpt-5.5", {"options": {"reasoning_effort": "none", "use_responses_api": False}}),
        ("vllm", "m", {"tools": True}),
        ("fireworks", "m", {"top_logprobs": 5}),
        ("together", "m", {"options": {"top_p": 1.0}}),
        ("openrouter", "m", {"tools": True}),
        ("", "m", {"tools": True}),
    ],
)
def test_what_may_work_is_let_through(provider: str, model: str, request_: dict[str, Any]):
    asked: dict[str, Any] = {"top_logprobs": 20, "tools": False, **request_}
    refuse_unsupported(endpoint(provider, model), **asked)


# Verdicts


def signals(n: int = 30, k: int = 20, entropy: float = 0.5, logprob: float = -0.3, excess: float = 0) -> TokenSignals:
    def array(value: float) -> Any:
        return np.full(n, value, dtype=np.float32)

    arrays = {"entropies": array(entropy), "logprobs": array(logprob), "confidences": array(1.0)}
    return TokenSignals(**arrays, n_alternatives=k, excess=excess)


def response(index: int = 0, *, call: bool = False, measured: Any = None, tokens: int = 30, **fields: Any) -> Candidate:
    """What came back from a provider: an answer or a tool call, with or without signals."""
    shown: dict[str, Any] = {"content": "", "tool_calls": [{"name": "add", "args": {"a": index}}]} if call else {}
    given: dict[str, Any] = {"signals": measured, "usage": {"output_tokens": tokens}, **shown, **fields}
    return candidate(index, **given)


def test_sound_responses_have_no_problems():
    verdict = verify([response(i, measured=signals()) for i in range(3)], top_logprobs=20)
    assert verdict is not None
    assert (verdict.usable, verdict.coverage, verdict.n_alternatives, verdict.tool_tokens) == (True, 1.0, 20, "unknown")
    assert verdict.problems == {}
    assert complaint(endpoint("vllm"), verdict, tools=True) is None


def test_an_end_of_text_token_without_a_number_is_no_problem():
    verdict = verify([response(measured=signals(29))], top_logprobs=20)
    assert verdict is not None
    assert verdict.coverage == 1.0


@pytest.mark.parametrize(
    ("candidates", "name", "text"),
    [
        ([response()], "missing", "1 of 1 responses without log-probabilities"),
        ([response(measured=signals(k=4))], "alternatives", "4 alternatives per token, 20 were asked for"),
        ([response(measured=signals(11), tokens=30)], "coverage", "only 40% of the output tokens"),
        ([response(measured=signals(entropy=0.0))], "degenerate", "30 of 30 tokens have entropy 0: is it temperature"),
        (
            [response(i, measured=signals(), content="same") for i in range(3)],
            "identical",
            "3 responses are the same: a fixed seed",
        ),
    ],
)
def test_problems_are_found_and_said(candidates: list[Candidate], name: str, text: str):
    verdict = verify(candidates, top_logprobs=20)
    assert verdict is not None
    assert text in verdict.problems[name]


def test_certain_answers_may_well_be_the_same():
    sure = signals(logprob=-0.001)
    verdict = verify([response(i, measured=sure, content="same") for i in range(3)], top_logprobs=20)
    assert verdict is not None
    assert "identical" not in verdict.problems


def test_numbers_that_are_no_probabilities_are_found():
    payload: Any = profile_logprobs("!...")
    payload["content"][0]["top_logprobs"].append({"token": "x", "logprob": -0.01})
    payload["content"][1]["logprob"] = -9999.0
    verdict = verify([response(measured=token_signals(payload)), response()], top_logprobs=20)
    assert verdict is not None
    assert verdict.problems["sums"] == "the alternatives of a token have a total probability of 1.99"
    assert verdict.problems["sentinels"] == "1 of 4 drawn tokens have no number of their own"


@given(st.integers(1, 200), st.floats(0.02, 1.0))
def test_sums_above_one_are_found_and_survive_every_packing(n: int, excess: float):
    alternatives = [{"logprob": math.log(p)} for p in (0.5, 0.5, excess)]
    found = token_signals({"content": [{"logprob": -0.7, "top_logprobs": alternatives}] * n})
    assert found.excess == pytest.approx(excess, abs=1e-6)
    assert token_signals(pack_logprobs(lambda: found)).excess == found.excess
    kept = Candidate.from_builtins(response(measured=found).to_builtins()).signals
    assert kept is not None
    assert kept.excess == found.excess


@pytest.mark.parametrize(
    ("candidates", "covered"),
    [
        ([response(call=True, measured=signals())], "all"),
        ([response(call=True)], "none"),
        ([response(0, measured=signals()), response(1, call=True)], "none"),
        ([response(0, call=True, measured=signals()), response(1, call=True)], "partial"),
        ([response(call=True, measured=signals(5))], "partial"),
        ([response(measured=signals())], "unknown"),
    ],
)
def test_tool_calls_are_judged_by_their_own(candidates: list[Candidate], covered: str):
    verdict = verify(candidates, top_logprobs=20)
    assert verdict is not None
    assert verdict.tool_tokens == covered
    assert (complaint(endpoint(""), verdict, tools=True) is not None) == (covered == "none")


def test_responses_that_show_nothing_give_no_verdict():
    refused = response(flaws={"refused": "no"})
    assert verify([response(content=""), refused], top_logprobs=20) is None
    assert verify([], top_logprobs=20) is None


def test_truncated_reasoning_is_evidence():
    """Reasoning cut off by the token limit shows as much as an answer."""
    verdict = verify([response(content="", measured=signals()) for _ in range(2)], top_logprobs=20)
    assert verdict is not None
    assert verdict.usable
    assert "identical" not in verdict.problems


def test_bad_verdict():
    """It stops the next request and can be forgotten."""
    where = endpoint("", base_url="http://127.0.0.1:1/v1")
    verdict = verify([response(i) for i in range(3)], top_logprobs=20)
    assert verdict is not None
    remember(where, verdict, tools=False)
    assert verdict_on(where, tools=True) is None
    with pytest.raises(UnsupportedLogprobs, match="an earlier response showed: m at http.*: 3 of 3 responses without"):
        refuse_unsupported(where, top_logprobs=20, tools=False)
    forget_verdicts()
    refuse_unsupported(where, top_logprobs=20, tools=False)


def test_verdicts_expire(monkeypatch: pytest.MonkeyPatch):
    """That nothing can be measured is believed for a while only."""
    where, verdict = endpoint(""), verify([response(i) for i in range(3)], top_logprobs=20)
    calls = verify([response(i, call=True) for i in range(3)], top_logprobs=20)
    assert verdict is not None
    assert calls is not None
    remember(where, verdict, tools=False)
    remember(where, calls, tools=True)
    assert verdict_on(where, tools=True) is calls
    monkeypatch.setattr("ec_agents.servers.providers._BELIEVED", 0.0)
    assert verdict_on(where, tools=False) is verdict_on(where, tools=True) is None


def test_a_good_verdict_outweighs_the_table():
    where = endpoint("openai", "gpt-4o")
    verdict = verify([response(call=True, measured=signals())], top_logprobs=20)
    assert verdict is not None
    remember(where, verdict, tools=True)
    refuse_unsupported(where, top_logprobs=20, tools=True)


UNMEASURED = [response(i, call=True) for i in range(3)]


def judged(candidates: list[Candidate]) -> Any:
    verdict = verify(candidates, top_logprobs=20)
    assert verdict is not None
    return verdict


def test_one_answer_is_no_verdict():
    """Only concordant answers are believed, whether they come in one step or in several."""
    where = endpoint("")
    for count in (1, 2):
        remember(where, judged(UNMEASURED[:1]), tools=True)
        assert verdict_on(where, tools=True) is None, count
    remember(where, judged(UNMEASURED[:1]), tools=True)
    assert verdict_on(where, tools=True) is not None


def test_answers_that_were_not_tool_calls_do_not_count_for_them():
    where = endpoint("")
    remember(where, judged([UNMEASURED[0], *(response(i, measured=signals()) for i in range(7))]), tools=True)
    assert verdict_on(where, tools=True) is None


@pytest.mark.parametrize("before", [1, 2, 3])
def test_the_first_contradiction_withdraws_a_verdict(before: int):
    where = endpoint("")
    for _ in range(before):
        remember(where, judged(UNMEASURED[:1]), tools=True)
    measured = judged([response(call=True, measured=signals())])
    remember(where, measured, tools=True)
    assert verdict_on(where, tools=True) is measured
    remember(where, judged(UNMEASURED[:2]), tools=True)
    assert verdict_on(where, tools=True) is None


def test_an_explicit_choice_is_not_overridden():
    where = endpoint("")
    remember(where, judged(UNMEASURED), tools=True)
    with pytest.raises(UnsupportedLogprobs):
        refuse_unsupported(where, top_logprobs=20, tools=True)
    refuse_unsupported(where, top_logprobs=20, tools=True, learned=False)


def test_servers_without_schemas_are_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch):
    where = endpoint("")
    assert takes_schemas(where)
    remember_without_schemas(where)
    assert not takes_schemas(where)
    monkeypatch.setattr("ec_agents.servers.providers._BELIEVED", 0.0)
    assert takes_schemas(where)


# Answers that are the same


@given(st.integers(2, 64), st.integers(1, 200), st.floats(0.001, 3.0))
def test_equal_answers(n: int, tokens: int, surprise: float):
    """They are an alarm only where chance cannot explain them."""
    same = [response(i, measured=signals(tokens, logprob=-surprise), content="same") for i in range(n)]
    by_chance = math.exp(-float(np.float32(surprise)) * tokens * (n - 1))
    if not 0.9e-4 < by_chance < 1.1e-4:
        assert (identical(same) is not None) == (by_chance < 1e-4)


def test_tool_calls_may_well_agree():
    """Four equal calls after different reasoning, or of nearly certain tokens, are not a fixed seed."""
    call: Any = {"content": "", "tool_calls": [{"name": "add", "args": {"a": 1}}]}
    reasoned = [response(i, measured=signals(30 + i), **call) for i in range(4)]
    certain = [response(i, measured=signals(logprob=-0.01), **call) for i in range(4)]
    assert identical(reasoned) is identical(certain) is None
    fixed = [response(i, measured=signals(logprob=-0.5), **call) for i in range(4)]
    assert "4 responses are the same" in str(identical(fixed))


def test_no_alarm():
    """A single answer, or answers without numbers, raise no alarm."""
    assert identical([response(measured=signals())]) is None
    assert identical([response(i, content="same") for i in range(4)]) is None
