"""Traces: writing from many places at once, surviving damage, secrets, and reading what other programs write."""

import asyncio
import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adding import add
from helpers.candidates import signals
from helpers.paths import DATA
from hypothesis import given, settings, strategies as st
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver

from ec_agents.agents.graph import create_centroid_agent
from ec_agents.candidates import Candidate, Step
from ec_agents.cli.score import score_rows
from ec_agents.errors import ConfigError, TraceError
from ec_agents.responses import choice_candidate
from ec_agents.selection import select
from ec_agents.testing import Reply, ScriptedChatModel, profile_logprobs
from ec_agents.trace import REMOVED, TraceWriter, as_trace_writer, read_steps, read_trajectories

PAYLOADS = DATA / "payloads"


def step(run: str = "a", number: int = 0, content: str = "text", **fields: Any) -> Step:
    drawn = [
        Candidate(
            index=0, content=content, signals=signals([0.1, 2.0, math.nan]), usage={"output_tokens": 3}, seconds=0.7
        ),
        Candidate(index=1, tool_calls=[{"name": "f", "args": {"x": [1, "é"]}}], flaws={"refused": "no"}),
    ]
    given: dict[str, Any] = {"candidates": drawn, "selection": select(drawn), **fields}
    return Step(run=run, number=number, **given)


def assert_equal(after: Step, before: Step) -> None:
    for ours, theirs in zip(after.candidates, before.candidates, strict=True):
        assert (ours.signals is None) == (theirs.signals is None)
        if ours.signals is not None and theirs.signals is not None:
            assert ours.signals.n_alternatives == theirs.signals.n_alternatives
            for name in ("entropies", "logprobs", "confidences"):
                np.testing.assert_array_equal(getattr(ours.signals, name), getattr(theirs.signals, name))
        for name in ("index", "content", "tool_calls", "finish_reason", "usage", "flaws", "seconds"):
            assert getattr(ours, name) == getattr(theirs, name) or (name == "tool_calls" and not ours.tool_calls)
    for name in ("run", "number", "task", "selection", "failures", "seconds", "info"):
        assert getattr(after, name) == getattr(before, name), name


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.zst"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str):
    path = tmp_path / "deep" / name
    given = [
        step("a", 0, task="t", failures={2: "TimeoutError: no answer"}, seconds=1.5, info={"level": 3}),
        step("b", 0),
        step("a", 1, candidates=[], selection=None),
    ]
    with TraceWriter(path) as trace:
        for one in given[:2]:
            trace.write(one)
    with TraceWriter(path) as trace:
        trace.write(given[2])
    a, b = read_trajectories(path)
    assert (a.run, a.task, [s.number for s in a.steps]) == ("a", None, [0, 1])
    for after, before in zip([*a.steps, *b.steps], [given[0], given[2], given[1]], strict=True):
        assert_equal(after, before)
        assert after.time is not None
    assert a.steps[0].chosen is not None
    assert a.steps[0].chosen.content == "text"
    assert a.steps[1].chosen is None


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(
    st.text(max_size=60),
    st.dictionaries(st.text(max_size=8), _json, max_size=3),
    st.lists(st.floats(0, 9, width=32)),
    st.none() | st.floats(0, 1e6),
)
def test_any_text_arguments_and_timings_survive(
    tmp_path_factory: Any, content: str, args: dict[str, Any], values: list[float], seconds: float | None
):
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    call = {"name": "f", "args": args}
    drawn = [Candidate(index=0, content=content, tool_calls=[call], signals=signals(values), seconds=seconds)]
    before = Step(run="a", candidates=drawn, seconds=seconds)
    with TraceWriter(path) as trace:
        trace.write(before)
    assert path.read_bytes().count(b"\n") == 1
    assert_equal(next(read_steps(path)), before)


def test_half_a_surrogate_pair_is_no_obstacle(tmp_path: Path):
    with TraceWriter(tmp_path / "t.jsonl") as trace:
        trace.write(step(content="a\ud800b"))
    assert next(read_steps(tmp_path / "t.jsonl")).candidates[0].content == "a?b"


# Many writers, damage


async def test_many_agents_at_once_lose_and_tear_nothing(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    text = "x" * 20_000

    async def run(trace: TraceWriter, name: str) -> None:
        for number in range(5):
            await asyncio.to_thread(trace.write, step(name, number, text))
            await asyncio.sleep(0)

    with TraceWriter(path) as one, TraceWriter(path) as other:
        await asyncio.gather(*(run((one, other)[i % 2], f"run {i}") for i in range(12)))
    trajectories = list(read_trajectories(path))
    assert sorted(t.run for t in trajectories) == sorted(f"run {i}" for i in range(12))
    for trajectory in trajectories:
        assert [s.number for s in trajectory.steps] == [0, 1, 2, 3, 4]
        assert all(s.candidates[0].content == text for s in trajectory.steps)


def test_processes_may_share_a_file(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    program = (
        "import sys; from ec_agents.candidates import Candidate, Step; from ec_agents.trace import TraceWriter\n"
        "trace = TraceWriter(sys.argv[1])\n"
        "drawn = [Candidate(index=0, content='y' * 9999)]\n"
        "for i in range(20): trace.write(Step(run=sys.argv[2], number=i, candidates=drawn))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in "pq"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert {t.run: len(t.steps) for t in read_trajectories(path)} == {"p": 20, "q": 20}


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.zst"])
@pytest.mark.parametrize("cut", [1, 7, 150])
def test_a_torn_last_line_costs_only_itself(tmp_path: Path, name: str, cut: int, caplog: pytest.LogCaptureFixture):
    path = tmp_path / name
    with TraceWriter(path) as trace:
        trace.write(step("whole"))
        trace.write(step("torn", content="é" * 300))
    os.truncate(path, path.stat().st_size - cut)
    before = [s.run for s in read_steps(path)]
    with TraceWriter(path) as trace:
        trace.write(step("later"))
        trace.write(step("last"))
    with caplog.at_level(logging.WARNING):
        after = [s.run for s in read_steps(path)]
    if cut > 1:  # otherwise only a line feed or a byte of a checksum is missing
        assert "torn" not in {*before, *after}
        assert "torn" in caplog.text or "damaged" in caplog.text
    assert [run for run in before if run != "torn"] == ["whole"]
    assert [run for run in after if run != "torn"] == ["whole", "later", "last"]


def test_a_step_recorded_twice_counts_once_as_recorded_last(tmp_path: Path):
    with TraceWriter(tmp_path / "t.jsonl") as trace:
        for content in ("first", "again"):
            trace.write(step(content=content))
        trace.write(step(number=1))
    [trajectory] = read_trajectories(tmp_path / "t.jsonl")
    assert [s.candidates[0].content for s in trajectory.steps] == ["again", "text"]


def test_wrong_files_are_refused_with_their_line(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    for text, message in (
        ("", "is empty: one or more JSON records are needed"),
        ("no json\n", "holds no JSON record"),
        ("[1, 2]\n", "record 1: an object is needed; found 1"),
        ("3\n", "record 1: an object is needed; found 3"),
        ('{"choices": [{"message": {}}]}\n{"a": 1}\n', r"record 2: .* is needed; found an object with keys \['a'\]"),
        ('{"ec_agents": 2, "run": "a"}\n', "a step in format 2 found, 1 or lower needed"),
        ('{"ec_agents": 1, "run": "a"}\n', "record 1: .*missing required field `number`"),
    ):
        path.write_text(text)
        with pytest.raises(TraceError, match=message) as caught:
            list(read_trajectories(path))
        assert caught.value.path == path
    with pytest.raises(TraceError, match="nowhere.jsonl cannot be read: No such file"):
        list(read_steps(tmp_path / "nowhere.jsonl"))
    with pytest.raises(TraceError, match="cannot be opened for writing: Is a directory"):
        TraceWriter(tmp_path)


def test_a_closed_writer_says_so(tmp_path: Path):
    trace = TraceWriter(tmp_path / "t.jsonl")
    trace.close()
    trace.close()
    with pytest.raises(TraceError, match=r"t.jsonl is closed; a step of run 'a' came too late"):
        trace.write(step())


def test_a_full_disk_is_an_error_and_the_next_step_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "t.jsonl"
    write = os.write
    with TraceWriter(path) as trace:
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:40]))
        with pytest.raises(TraceError, match="only 40 of .* bytes fit; the step is lost"):
            trace.write(step("lost"))
        monkeypatch.undo()
        trace.write(step("kept"))
    assert [s.run for s in read_steps(path)] == ["kept"]


# Secrets and redaction


def test_secrets_are_removed_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOUSE_API_KEY", "correct-horse-battery")
    secrets = ["sk-proj-abcdefghijklmnop1234", "hf_abcdefghijklmnopqrst", "hunter2hunter2", "correct-horse-battery"]
    call = {"name": "get", "args": {"url": "https://x", "headers": {"Authorization": "Bearer hunter2hunter2"}}}
    drawn = [
        Candidate(index=0, content=f"use {secrets[0]} please; api_key = 'hunter2hunter2'", tool_calls=[call]),
        Candidate(index=1, flaws={"refused": f"Bearer {secrets[2]}"}),
    ]
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as trace:
        failures = {2: f"401: Incorrect API key provided: {secrets[1]}; {secrets[3]}"}
        trace.write(Step(run="a", candidates=drawn, failures=failures, info={"password": "hunter2hunter2", "n": 1}))
    text = path.read_text()
    assert not [secret for secret in secrets if secret in text]
    found = next(read_steps(path))
    assert found.candidates[0].content == f"use {REMOVED} please; {REMOVED}'"
    assert found.candidates[0].tool_calls[0]["args"]["url"] == "https://x"
    assert found.info == {"password": REMOVED, "n": 1}
    assert oct(path.stat().st_mode & 0o077) == "0o0"


def test_ordinary_texts_stay_as_they_are(tmp_path: Path):
    text = "task-list: password rules! basic maths; a sk-eleton key, api keys, a risk-free-approach-to-authorization."
    with TraceWriter(tmp_path / "t.jsonl") as trace:
        trace.write(step(content=text))
    assert next(read_steps(tmp_path / "t.jsonl")).candidates[0].content == text


def test_redaction_sees_every_text_and_nothing_else(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with TraceWriter(path, redact=lambda text: text.replace("Ann", "N.N.")) as trace:
        drawn = [Candidate(index=0, content="Ann", tool_calls=[{"name": "f", "args": {"to": ["Ann"]}}])]
        trace.write(
            Step(run="Ann", candidates=drawn, failures={1: "Ann"}, info={"for": "Ann"}, selection=select(drawn))
        )
    found = next(read_steps(path))
    assert (found.run, found.candidates[0].content) == ("Ann", "N.N.")
    assert found.candidates[0].tool_calls == [{"name": "f", "args": {"to": ["N.N."]}}]
    assert (found.failures, found.info) == ({1: "N.N."}, {"for": "N.N."})


# Through the graph


def replies() -> list[Reply]:
    return [
        Reply(tool_calls=[("add", {"a": 1, "b": 2})], profile="..!."),
        Reply(tool_calls=[("add", {"a": 1, "b": 1})], profile=".!.."),
        Reply(content="it is 2"),
        Reply(error=ConnectionError("reset")),
    ]


def test_the_graph_records_every_step(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as trace:
        agent = create_centroid_agent(ScriptedChatModel(replies=replies() * 2), [add], n=2, trace=trace)
        for task in ("one", "two"):
            state = agent.invoke({"messages": [HumanMessage("1 + 1?")]}, {"metadata": {"ec_task": task}})
    one, two = read_trajectories(path)
    assert (one.task, two.task) == ("one", "two")
    assert one.run != two.run
    assert state["ec_decision"]["run"] == two.run
    first, second = one.steps
    assert (first.number, second.number) == (0, 1)
    assert first.chosen is not None
    assert first.chosen.tool_calls[0]["args"] == {"a": 1, "b": 1}
    assert second.failures == {1: "ConnectionError: reset"}
    assert first.seconds is not None
    assert first.seconds > 0
    assert [c.signals.n_tokens for c in first.candidates if c.signals] == [4, 4]
    assert all(0 < c.seconds <= first.seconds for c in first.candidates if c.seconds is not None)
    assert None not in {c.seconds for c in (*first.candidates, *second.candidates)}


async def test_a_thread_is_one_run_and_its_steps_are_counted_on(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as trace:
        model = ScriptedChatModel(replies=[Reply(content="3"), Reply(content="4")])
        agent = create_centroid_agent(model, n=1, trace=trace, checkpointer=InMemorySaver())
        for _ in range(2):
            await agent.ainvoke({"messages": [HumanMessage("?")]}, {"configurable": {"thread_id": "7"}})
    [trajectory] = read_trajectories(path)
    assert (trajectory.run, [s.number for s in trajectory.steps]) == ("7", [0, 1])


def test_a_trace_that_cannot_be_written_does_not_stop_the_agent(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trace = TraceWriter(tmp_path / "t.jsonl")
    trace.close()
    agent = create_centroid_agent(ScriptedChatModel(replies=[Reply(content="3")]), n=1, trace=trace)
    assert agent.invoke({"messages": [HumanMessage("?")]})["messages"][-1].content == "3"
    assert "step 0 of run" in caplog.text
    assert "is closed" in caplog.text


# What other programs write


def choice(text: str, profile: str = ".!..") -> dict[str, Any]:
    return {"message": {"content": text}, "finish_reason": "stop", "logprobs": profile_logprobs(profile)}


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_plain_responses_one_a_line(tmp_path: Path):
    usage = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    records = [
        {"id": "same", "choices": [choice("a"), choice("b")], "usage": usage},
        {"id": "same", "choices": [choice("c")], "usage": usage},
        {"error": {"message": "rate limit"}},
    ]
    steps = list(read_steps(write_lines(tmp_path / "r.jsonl", records)))
    assert [[c.content for c in s.candidates] for s in steps] == [["a", "b"], ["c"], []]
    assert steps[0].candidates[1].index == 1
    assert steps[1].candidates[0].usage == {"input_tokens": 7, "output_tokens": 4, "total_tokens": 11}
    assert "rate limit" in steps[2].failures[0]
    assert all(c.signals is not None and c.signals.n_tokens == 4 for s in steps for c in s.candidates)


def test_grouping(tmp_path: Path):
    """Responses to one problem are grouped wherever they stand."""
    records = [{"problem": f"p{i % 3}", "choices": [choice(str(i))]} for i in range(7)]
    path = write_lines(tmp_path / "r.jsonl", records)
    found = {
        t.task: [(c.index, c.content) for c in t.steps[0].candidates]
        for t in read_trajectories(path, group_by="problem")
    }
    assert found == {"p0": [(0, "0"), (1, "3"), (2, "6")], "p1": [(0, "1"), (1, "4")], "p2": [(0, "2"), (1, "5")]}
    with pytest.raises(TraceError, match="record 1: it has no field 'task' to group by"):
        list(read_steps(path, group_by="task"))


def test_batch_results_and_recorded_requests(tmp_path: Path):
    records = [
        {"custom_id": "q1", "response": {"status_code": 200, "body": {"choices": [choice("a")]}}, "error": None},
        {"custom_id": "q2", "response": None, "error": {"code": "expired"}},
        {"request": {"n": 1}, "response": {"choices": [choice("b")]}},
    ]
    first, second, third = read_steps(write_lines(tmp_path / "r.jsonl", records))
    assert (first.run, first.candidates[0].content, third.candidates[0].content) == ("q1", "a", "b")
    assert "expired" in second.failures[0]


@pytest.mark.parametrize(
    "path", [path for path in sorted(PAYLOADS.glob("*.json")) if "stream" not in path.stem], ids=lambda path: path.stem
)
def test_every_recorded_payload_is_read(path: Path):
    [found] = read_steps(path)
    assert found.candidates or found.failures


def reference(problem: int, i: int, entropies: Sequence[float | None], **fields: Any) -> dict[str, Any]:
    tokens = [
        {
            "token": "t",
            "token_id": 5,
            "position": p,
            "entropy": e,
            "top_k_token_ids": [5, 6],
            "top_k_probs": [0.75, 0.25],
        }
        for p, e in enumerate(entropies)
    ]
    name = f"{problem}_traj_{i}"
    return {"id": name, "original_id": problem, "generated_text": f"text {i}", "entropy_sequence": tokens, **fields}


@pytest.mark.parametrize("form", ["json", "indented", "jsonl", "jsonl.zst", "nan"])
def test_results_of_the_reference_implementation(tmp_path: Path, form: str):
    items = [
        reference(1, 0, [0.5, 0.0, None], reward=1.0),
        reference(2, 0, [0.1]),
        reference(1, 1, [0.25, 1.5]),
        reference(1, 1, [0.25, 2.5], reward=0.0),  # resumed: written twice, the last one counts
    ]
    path = tmp_path / ("entropy_results." + {"indented": "json", "nan": "json"}.get(form, form))
    if form == "nan":
        items[0]["entropy_sequence"][2]["entropy"] = math.nan
    if form in {"json", "indented", "nan"}:
        path.write_text(json.dumps(items, indent=2 if form == "indented" else None))
    else:
        lines = "".join(json.dumps(item) + "\n" for item in items).encode()
        path.write_bytes(compressed(lines) if form.endswith("zst") else lines)
    one, two = read_trajectories(path)
    assert (one.task, two.task) == ("1", "2")
    first, second = one.steps[0].candidates
    assert (first.content, second.content, second.index) == ("text 0", "text 1", 1)
    assert first.signals is not None
    assert second.signals is not None
    np.testing.assert_array_equal(first.signals.entropies, np.array([0.5, 0.0, math.nan], dtype=np.float32))
    np.testing.assert_array_equal(second.signals.entropies, np.array([0.25, 2.5], dtype=np.float32))
    assert first.signals.logprobs[0] == pytest.approx(math.log(0.75))
    assert first.signals.confidences[0] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert one.steps[0].info["records"]["1"]["reward"] == 0.0


def test_what_the_reference_writes_for_masked_tokens_is_missing(tmp_path: Path):
    masked = {"token": "t", "token_id": 0, "entropy": 0.0, "top_k_token_ids": [], "top_k_probs": []}
    item = {**reference(1, 0, [0.5]), "entropy_sequence": [masked, *reference(1, 0, [0.5])["entropy_sequence"]]}
    del item["generated_text"]
    [found] = read_steps(write_lines(tmp_path / "entropy_results.jsonl", [item]))
    assert found.candidates[0].content == "tt"
    assert found.candidates[0].signals is not None
    assert np.isnan(found.candidates[0].signals.entropies).tolist() == [True, False]


def test_request_outputs_of_vllm(tmp_path: Path):
    def token(drawn: int, other: int) -> dict[str, Any]:
        rows = {drawn: -0.2, other: -1.8}
        return {str(i): {"logprob": p, "rank": r, "decoded_token": "x"} for r, (i, p) in enumerate(rows.items(), 1)}

    output = {"index": 0, "text": "hi", "token_ids": [4, 9], "finish_reason": "length"}
    record = {
        "request_id": "0",
        "prompt": "p",
        "outputs": [
            {**output, "logprobs": [token(4, 5), token(9, 1)]},
            {**output, "logprobs": [{"4": -0.2, "5": -1.8}, None]},
            {**output, "logprobs": None},
        ],
    }
    [found] = read_steps(write_lines(tmp_path / "r.jsonl", [record]))
    one, two, three = found.candidates
    assert one.signals is not None
    assert two.signals is not None
    assert one.signals.logprobs == pytest.approx([-0.2, -0.2])
    assert one.signals.n_alternatives == 2
    assert one.signals.entropies[0] == two.signals.entropies[0] > 0
    assert np.isnan(two.signals.entropies).tolist() == [False, True]
    assert (three.signals, three.content, three.finish_reason) == (None, "hi", "length")


def test_results_of_its_hub(tmp_path: Path):
    messages = [
        {"role": "assistant", "content": "a", "logprobs": profile_logprobs(".!")},
        {"role": "assistant", "content": "b", "_raw_choice": {"finish_reason": "stop", **choice("b")}},
    ]
    record = {"responses": messages, "scores": [0.5, 0.25], "selected_index": 1, "tail_window": 64}
    [found] = read_steps(write_lines(tmp_path / "r.jsonl", [record]))
    assert [c.signals.n_tokens for c in found.candidates if c.signals] == [2, 4]
    assert found.chosen is not None
    assert found.chosen.content == "b"
    assert found.selection is not None
    assert found.selection.scores == {0: 0.5, 1: 0.25}


def test_a_result_that_its_hub_wrote():
    """``BestOfN`` of its_hub 1.2.0 with ``include_raw_choices``, on responses of vLLM 0.32, written by ``asdict``."""
    path = PAYLOADS.parent / "its_hub_1.2.0__best_of_n.json"
    [found] = read_steps(path)
    raw = [response["_raw_choice"] for response in json.loads(path.read_text())["responses"]]
    for ours, theirs in zip(found.candidates, raw, strict=True):
        expected = choice_candidate(theirs, ours.index)
        assert expected.signals is not None
        assert ours.signals is not None
        np.testing.assert_array_equal(ours.signals.entropies, expected.signals.entropies)
        assert (ours.content, ours.finish_reason) == (theirs["message"]["content"], "stop")
    assert found.selection is not None
    assert (found.selection.chosen, found.selection.scores) == (0, {0: 1.0, 1: 0.0})
    assert found.info["records"]["0"]["usage"] == {"input_tokens": 28, "output_tokens": 474}


def test_a_request_output_that_vllm_wrote():
    """``LLM.generate`` of vLLM 0.32 with the embedded weights, top 20, written by ``vars`` and ``asdict``."""
    path = PAYLOADS.parent / "vllm_0.32.0__request_output.json"
    [found] = read_steps(path)
    outputs = json.loads(path.read_text())["outputs"]
    for ours, theirs in zip(found.candidates, outputs, strict=True):
        assert (ours.content, ours.finish_reason) == (theirs["text"], theirs["finish_reason"])
        assert ours.signals is not None
        assert (ours.signals.n_tokens, ours.signals.n_alternatives) == (len(theirs["token_ids"]), 20)
        assert float(ours.signals.logprobs.sum()) == pytest.approx(theirs["cumulative_logprob"], abs=1e-4)


def compressed(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def test_one_large_compressed_frame_with_its_end_missing(tmp_path: Path):
    lines = "".join(json.dumps({"choices": [choice(str(i) * 500)]}) + "\n" for i in range(400)).encode()
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(compressed(lines)[:-200])
    found = [s.candidates[0].content for s in read_steps(path)]
    assert found == [str(i) * 500 for i in range(len(found))]


def test_a_file_that_expands_beyond_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A bomb is refused before it fills memory or disk: 8 kB for 256 MB; no slice expands to more than 32 MB."""
    monkeypatch.setattr("ec_agents.jsonl.LARGEST_UNPACKED", 1 << 20)
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(compressed(bytes(1 << 28)))
    tracemalloc.start()
    with pytest.raises(TraceError, match="expands to more than"):
        list(read_steps(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 26


@pytest.mark.parametrize("frames", [1, 300])
def test_ordinary_compressed_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int):
    """Equal prompts compress well, in one frame or one per line, and slices end anywhere."""
    monkeypatch.setattr("ec_agents.jsonl.LARGEST_UNPACKED", 1 << 20)
    lines = [(json.dumps({"choices": [choice("x" * 900 + str(i))]}) + "\n").encode() for i in range(300)]
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(b"".join(map(compressed, lines)) if frames > 1 else compressed(b"".join(lines)))
    assert [s.candidates[0].content[900:] for s in read_steps(path)] == [str(i) for i in range(300)]


def test_reading_holds_one_run_at_a_time(tmp_path: Path):
    path = write_lines(tmp_path / "r.jsonl", [{"choices": [choice(str(i))]} for i in range(50)])
    steps = read_steps(path)
    assert next(steps).candidates[0].content == "0"
    steps.close()  # type: ignore[attr-defined]


def test_writing_needs_no_event_loop_and_no_framework(tmp_path: Path):
    program = (
        "import sys; from ec_agents.trace import TraceWriter, read_steps\n"
        "assert not {'langchain_core', 'langgraph', 'openai'} & set(sys.modules), 'a framework was imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    thread = threading.Thread(target=lambda: TraceWriter(tmp_path / "t.jsonl").write(step()))
    thread.start()
    thread.join()
    assert len(list(read_steps(tmp_path / "t.jsonl"))) == 1


@pytest.mark.parametrize("kind", [str, Path])
def test_writer_by_path(tmp_path: Path, kind: type[str] | type[Path]):
    """A path stands for a writer that appends to it."""
    path = tmp_path / "runs" / "trace.jsonl"
    for number in range(2):
        writer = as_trace_writer(kind(path))
        assert writer is not None
        with writer:
            writer.write(step(number=number))
    assert [found.number for found in read_steps(path)] == [0, 1]


def test_writer_as_it_is(tmp_path: Path):
    with TraceWriter(tmp_path / "trace.jsonl") as writer:
        assert as_trace_writer(writer) is writer
    assert as_trace_writer(None) is None


@pytest.mark.parametrize("wrong", [1, True, b"trace.jsonl", {}, TraceWriter, sys.stdout])
def test_writer_of_a_wrong_type(wrong: Any):
    """Anything else is refused with what was found."""
    with pytest.raises(ConfigError, match=f"trace must be a TraceWriter, the path .*found {type(wrong).__name__} "):
        as_trace_writer(wrong)


@pytest.mark.parametrize("directory", ["", "."])
def test_writer_that_cannot_be_opened(directory: str):
    with pytest.raises(TraceError, match="cannot be opened for writing"):
        as_trace_writer(directory)


def test_a_line_torn_by_another_writer_costs_only_itself(tmp_path: Path):
    """A writer ends whatever torn line it finds, also one that was torn after it opened the file."""
    path = tmp_path / "trace.jsonl"
    with TraceWriter(path) as writer:
        for number in range(3):
            writer.write(step(number=number))
            with path.open("ab") as other:
                other.write(b'{"ec_agents":1,"run":"b","num')
    assert [found.number for found in read_steps(path)] == [0, 1, 2]


def test_rare_line_breaks_do_not_end_a_line(tmp_path: Path):
    """Lines end at a line feed; raw U+2028, U+2029, U+0085 and the separators of ASCII are text."""
    path = tmp_path / "trace.jsonl"
    text = "a\u2028b\u2029c\u0085d"
    with TraceWriter(path) as writer:
        writer.write(step(content=text))
    assert text.encode() in path.read_bytes()
    assert [found.candidates[0].content for found in read_steps(path)] == [text]


DAMAGE = st.sampled_from([None, True, -1, 10**30, 0.5, "x", "", [], [1], {}, {"a": 1}, "\ud800"])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_trace_is_read_or_refused(data: st.DataObject):
    """Whatever stands in place of one of its fields, at any depth, reading and scoring raise at most TraceError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        with TraceWriter(path) as writer:
            writer.write(step())
        record = json.loads(path.read_text())
        place: Any = record
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                break
            place = inner
        place[key] = data.draw(DAMAGE)
        path.write_text(json.dumps(record))
        with contextlib.suppress(TraceError):
            list(score_rows(path))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_byte_of_a_trace(position: int, byte: int):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        with TraceWriter(path) as writer:
            writer.write(step())
        damaged = bytearray(path.read_bytes())
        damaged[position % len(damaged)] = byte
        path.write_bytes(damaged)
        with contextlib.suppress(TraceError):
            list(score_rows(path))


ENTRY = {
    "token": "a",
    "logprob": -0.7,
    "top_logprobs": [{"token": "a", "logprob": -0.7}, {"token": "b", "logprob": -0.7}],
}
NATIVE: dict[str, dict[str, Any]] = {
    "responses": {
        "object": "response",
        "status": "completed",
        "output": [
            {"type": "reasoning", "summary": []},
            {"type": "message", "content": [{"type": "output_text", "text": "42", "logprobs": [ENTRY]}]},
        ],
    },
    "ollama chat": {"message": {"content": "42"}, "done": True, "done_reason": "stop", "logprobs": [ENTRY]},
    "ollama generate": {"response": "42", "done": True, "done_reason": "stop", "logprobs": [ENTRY]},
    "sglang": {
        "text": "42",
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": 2},
            "output_token_logprobs": [[-0.7, 1, "42"]],
            "output_top_logprobs": [[[-0.7, 1, "42"], [-0.7, 2, "43"]]],
        },
    },
    "flat vllm": {
        "outputs": [
            {
                "text": "42",
                "token_ids": [1],
                "finish_reason": "stop",
                "logprobs": {
                    "start_indices": [0],
                    "end_indices": [2],
                    "token_ids": [1, 2],
                    "logprobs": [-0.7, -0.7],
                    "ranks": [1, 2],
                },
            }
        ]
    },
}


@pytest.mark.parametrize("name", NATIVE)
def test_native_form(tmp_path: Path, name: str):
    """Text, finish reason and entropies of the native forms of servers."""
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(NATIVE[name]))
    [found] = read_steps(path)
    [only] = found.candidates
    assert only.content == "42"
    assert select([only]).flaws == {}
    assert only.signals is not None
    assert only.signals.entropies == pytest.approx([math.log(2)], rel=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "no credit"}},
        {"object": "error", "message": "no credit", "code": 402},
        {"detail": "no credit"},
        {"response": {"error": {"message": "no credit"}}},
    ],
)
def test_error_body_is_one_failure(tmp_path: Path, error: dict[str, Any]):
    """It does not stop the file, and its text is kept."""
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(error) + "\n" + json.dumps(NATIVE["ollama chat"]))
    broken, sound = read_steps(path)
    assert "no credit" in broken.failures[0]
    assert sound.candidates[0].content == "42"


@pytest.mark.parametrize("n", [1, 3])
def test_indented_records(tmp_path: Path, n: int):
    """What ``jq .`` writes: objects over several lines each."""
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as writer:
        for number in range(n):
            writer.write(step(number=number))
    lines = [json.dumps(json.loads(line), indent=2) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    assert [found.number for found in read_steps(path)] == list(range(n))
    path.write_text("\n".join([*lines, lines[0][: len(lines[0]) // 2]]))
    with pytest.raises(TraceError, match="record"):
        list(read_steps(path))
