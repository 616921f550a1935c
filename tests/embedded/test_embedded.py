"""The embedded model: network, engine and chat model."""

import asyncio
import multiprocessing
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import as_file, files
from typing import Any, cast

import numpy as np
import pytest
from helpers.waiting import settle
from hypothesis import given, strategies as st
from langchain_core.exceptions import ContextOverflowError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import BaseTool
from langchain_tests.unit_tests import ChatModelUnitTests
from numpy.typing import ArrayLike, NDArray

from ec_agents.embedded import EmbeddedChatModel, chat_model, make_tasks, vocabulary as v
from ec_agents.embedded.engine import Completion, Engine, Request, default_engine, draw, log_softmax, top
from ec_agents.embedded.template import Turn, render
from ec_agents.embedded.transformer import CONTEXT, Cache, Floats, Prefill, Shape, Transformer
from ec_agents.errors import ConfigError

Arrays = Mapping[str, NDArray[np.floating]]
SHAPE = Shape(vocabulary=v.SIZE)
SOLVE = make_tasks("solve", 1)[0]
THINKING = (*render([Turn("user", SOLVE.prompt)]), v.THINK)
"""A prompt whose next token is uncertain."""


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    with as_file(files("ec_agents.embedded") / "weights.npz") as path, np.load(path) as loaded:
        return dict(loaded)


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return Transformer.load()


@pytest.fixture
def engine(transformer: Transformer, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine of this test alone, which chat models use too."""
    engine = Engine(transformer)
    monkeypatch.setattr(chat_model, "default_engine", lambda: engine)
    return engine


def reference(arrays: Arrays, ids: Sequence[int]) -> NDArray[np.float64]:
    """Logits at every position, ``(T, V)``: the whole forward pass, in float64, with loops over heads."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    size = SHAPE.width // SHAPE.heads
    angles = np.arange(len(ids))[:, None] * SHAPE.frequencies()

    def norm(x: NDArray[np.float64], gains: NDArray[np.float64]) -> NDArray[np.float64]:
        return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * gains

    def turn(x: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b = np.split(x, 2, axis=1)
        return np.hstack((a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)))

    x = w["embed"][list(ids)]
    for i in range(SHAPE.layers):
        layer = {name: w[f"layers.{i}.{name}"] for name in ("attn_norm", "qkv", "out", "mlp_norm", "gate_up", "down")}
        q, k, val = np.split(norm(x, layer["attn_norm"]) @ layer["qkv"].T, 3, axis=1)
        mixed: list[NDArray[np.float64]] = []
        for head in (slice(h * size, (h + 1) * size) for h in range(SHAPE.heads)):
            scores = np.exp(turn(q[:, head]) @ turn(k[:, head]).T / np.sqrt(size)) * np.tri(len(ids))
            mixed.append(scores / scores.sum(1, keepdims=True) @ val[:, head])
        x = x + np.hstack(mixed) @ layer["out"].T
        gate, up = np.split(norm(x, layer["mlp_norm"]) @ layer["gate_up"].T, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["down"].T
    return norm(x, w["norm"]) @ w["embed"].T


def complete(engine: Engine, request: Request) -> list[Completion]:
    return engine.submit(request).result(60)


def metadata(message: BaseMessage) -> dict[str, Any]:
    return cast("dict[str, Any]", message.response_metadata)


# Network


def test_prefill_and_steps_agree_with_the_plain_forward_pass(transformer: Transformer, arrays: Arrays):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, v.SIZE, length).tolist() for length in (90, 40, 25)]
    starts = [60, 1, 20]
    expected = [reference(arrays, ids) for ids in rows]
    cache = Cache(SHAPE, 4)
    for ids, start, logits in zip(rows, starts, expected, strict=True):
        prompt = transformer.prefill(ids[:start])
        np.testing.assert_allclose(prompt.logits, logits[start - 1], atol=2e-4)
        cache.add(prompt)
    active, at = [0, 1, 2], list(starts)
    while active:
        logits = transformer.step([rows[r][at[r]] for r in active], cache)
        for i, r in enumerate(active):
            np.testing.assert_allclose(logits[i], expected[r][at[r]], atol=2e-4)
            at[r] += 1
        for i in reversed(range(len(active))):
            if at[active[i]] == len(rows[active[i]]):
                active[i] = active[-1]
                active.pop()
                cache.remove(i)


def test_weights_that_do_not_fit_are_refused(arrays: Arrays):
    with pytest.raises(ConfigError, match=r"lack layers\.1\.qkv, norm"):
        Transformer({name: a for name, a in arrays.items() if name not in ("norm", "layers.1.qkv")}, SHAPE)
    with pytest.raises(ConfigError, match=r"weight embed has shape \(5, 128\), and \(296, 128\) is needed"):
        Transformer({**arrays, "embed": np.zeros((5, 128), np.float16)}, SHAPE)


# Drawing


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 99), st.floats(0.05, 5.0))
def test_drawing_inverts_the_cumulative_distribution(rows: int, size: int, seed: int, temperature: float):
    rng = np.random.default_rng(seed)
    logprobs = log_softmax(rng.normal(size=(rows, size)).astype(np.float32) * 5)
    np.testing.assert_allclose(np.exp(logprobs).sum(1), 1, rtol=1e-5)
    uniforms = rng.random(rows)
    tokens = draw(logprobs, np.full(rows, temperature), uniforms)
    p = np.exp(logprobs.astype(np.float64) / temperature)
    cumulative = np.cumsum(p / p.sum(1, keepdims=True), axis=1)
    picked = np.arange(rows), tokens
    assert (uniforms < cumulative[picked] + 1e-9).all()
    assert (uniforms > cumulative[picked] - (p / p.sum(1, keepdims=True))[picked] - 1e-9).all()


def test_temperature_zero():
    """It takes the likeliest token, beside rows of the batch that sample."""
    logprobs = log_softmax(np.array([[0, 1, 3], [0, 1, 3], [3, 1, 0]], np.float32))
    assert draw(logprobs, np.zeros(3), np.zeros(3)).tolist() == [2, 2, 0]
    assert draw(logprobs, np.array([0, 1, 1e-300]), np.array([0, 0, 0.999])).tolist() == [2, 0, 0]
    assert draw(logprobs, np.full(3, np.inf), np.array([0.1, 0.5, np.nextafter(1, 0)])).tolist() == [0, 1, 2]


@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 40), st.integers(0, 99))
def test_top_is_the_head_of_the_sorted_row(rows: int, size: int, k: int, seed: int):
    logprobs = log_softmax(np.random.default_rng(seed).normal(size=(rows, size)).astype(np.float32))
    ids, values = top(logprobs, k)
    np.testing.assert_array_equal(values, -np.sort(-logprobs, axis=1)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(logprobs, ids, 1), values)


# Engine


def test_logprobs_are_those_of_the_plain_forward_pass(engine: Engine, arrays: Arrays):
    (completion,) = complete(engine, Request(prompt=THINKING, seed=1, temperature=0.7, top_k=v.SIZE))
    ids = [*THINKING, *completion.tokens]
    logits = reference(arrays, ids)[len(THINKING) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    steps = np.arange(len(completion.tokens))
    np.testing.assert_allclose(completion.logprobs, expected[steps, completion.tokens], atol=1e-3)
    np.testing.assert_allclose(completion.top_logprobs, np.take_along_axis(expected, completion.top_ids, 1), atol=1e-3)
    np.testing.assert_allclose(np.exp(completion.top_logprobs).sum(1), 1, rtol=1e-4)
    assert (np.diff(completion.top_logprobs, axis=1) <= 0).all()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(
    engine: Engine, transformer: Transformer, temperature: float
):
    request = Request(prompt=THINKING, seed=5, n=400, max_tokens=1, temperature=temperature)
    counts = np.bincount([c.tokens[0] for c in complete(engine, request)], minlength=v.SIZE)
    scaled = transformer.prefill(THINKING).logits.astype(np.float64) / temperature
    expected = 400 * np.exp(scaled) / np.exp(scaled).sum()
    common = expected > 5
    distance = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert distance < common.sum() + 5 * np.sqrt(2 * common.sum())
    assert abs(counts[~common].sum() - expected[~common].sum()) < 30


def test_a_row_does_not_depend_on_the_rest_of_the_batch(engine: Engine):
    request = Request(prompt=THINKING, seed=3, n=2, top_k=4, max_tokens=30)
    alone = complete(engine, request)
    others = [Request(prompt=tuple(range(30, 30 + 9 * i)), seed=i, n=3, max_tokens=40, top_k=i) for i in range(1, 7)]
    futures = [engine.submit(r) for r in [*others[:3], request, *others[3:]]]
    mixed = futures[3].result(60)
    for a, b in zip(alone, mixed, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)
        np.testing.assert_allclose(a.top_logprobs, b.top_logprobs, atol=1e-3)
        assert a.top_logprobs.shape == b.top_ids.shape == (len(a.tokens), 4)
    assert alone[0].tokens != alone[1].tokens
    assert [f.result(60)[0].top_ids.shape[1] for f in futures[:3]] == [1, 2, 3]


def test_more_rows_than_fit_wait_their_turn(transformer: Transformer):
    engine = Engine(transformer, max_rows=4)
    prompts = [tuple(range(40, 50 + i)) for i in range(20)]
    futures = [engine.submit(Request(prompt=p, seed=0, n=3, max_tokens=5, temperature=2)) for p in prompts]
    wide = Engine(transformer)
    for prompt, future in zip(prompts, futures, strict=True):
        again = complete(wide, Request(prompt=prompt, seed=0, n=3, max_tokens=5, temperature=2))
        assert [c.tokens for c in future.result(60)] == [c.tokens for c in again]
    assert engine.prefills >= 20
    assert len(engine._prompts) == 16


def test_responses_end_at_the_end_token_the_limit_or_the_context(engine: Engine):
    (stopped,) = complete(engine, Request(prompt=THINKING, seed=1, temperature=0))
    assert (stopped.finish_reason, stopped.tokens[-1]) == ("stop", v.END)
    (cut,) = complete(engine, Request(prompt=THINKING, seed=1, temperature=0, max_tokens=3))
    assert (cut.finish_reason, cut.tokens) == ("length", stopped.tokens[:3])
    prompt = (v.USER, *b"x" * (CONTEXT - 4), v.ASSISTANT, v.THINK)
    assert len(prompt) == CONTEXT - 1
    for full in complete(engine, Request(prompt=prompt, seed=1, n=8)):
        assert (full.finish_reason, len(full.tokens)) == ("stop" if full.tokens[-1] == v.END else "length", 1)


def test_greedy_takes_the_likeliest_token_at_each_step(engine: Engine):
    first, second = complete(engine, Request(prompt=THINKING, seed=1, n=2, temperature=0, top_k=1))
    assert first.tokens == second.tokens == first.top_ids[:, 0].tolist()


def test_too_long():
    """A conversation that is too long is refused as by other models."""
    with pytest.raises(ContextOverflowError, match="has 602 tokens, and 511 fit"):
        EmbeddedChatModel().invoke([HumanMessage("x" * 600)])


@pytest.mark.parametrize("length", [CONTEXT, 600])
def test_prompts_that_leave_no_room_are_refused(engine: Engine, length: int):
    with pytest.raises(ContextOverflowError, match=f"has {length} tokens, and 511 fit"):
        engine.submit(Request(prompt=(65,) * length, seed=0))


def test_an_empty_prompt_is_refused(engine: Engine):
    with pytest.raises(ConfigError, match="the prompt is empty"):
        engine.submit(Request(prompt=(), seed=0))


class Stubborn(Transformer):
    """Never ends a response by itself, takes a step only when allowed to, and can be told to fail."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__(arrays, SHAPE)
        self.allowed = threading.Event()
        self.failures = 0

    def prefill(self, ids: ArrayLike) -> Prefill:
        if np.asarray(ids)[0] == 0:
            raise ValueError("a bad prompt")
        return super().prefill(ids)

    def step(self, tokens: ArrayLike, cache: Cache) -> Floats:
        assert self.allowed.wait(60)
        if self.failures:
            self.failures -= 1
            raise MemoryError("a bad step")
        logits = super().step(tokens, cache)
        logits[:, v.END] = -50
        return logits


@pytest.fixture
def stubborn(arrays: Arrays) -> Stubborn:
    return Stubborn(arrays)


def test_cancelling_frees_the_rows_for_others(stubborn: Stubborn):
    engine = Engine(stubborn, max_rows=4)
    endless = engine.submit(Request(prompt=THINKING, seed=1, n=6))
    short = engine.submit(Request(prompt=THINKING, seed=1, n=2, max_tokens=3))
    assert endless.cancel()
    stubborn.allowed.set()
    assert [len(c.tokens) for c in short.result(60)] == [3, 3]
    assert engine.steps <= 4


def test_a_failing_step_fails_the_rows_in_progress_and_no_others(stubborn: Stubborn):
    engine = Engine(stubborn, max_rows=2)
    stubborn.failures = 1
    failing = engine.submit(Request(prompt=THINKING, seed=1, n=3, max_tokens=4))
    waiting = engine.submit(Request(prompt=THINKING, seed=1, max_tokens=4))
    stubborn.allowed.set()
    with pytest.raises(MemoryError, match="a bad step"):
        failing.result(60)
    assert len(waiting.result(60)[0].tokens) == 4
    assert complete(engine, Request(prompt=THINKING, seed=1, max_tokens=4))[0].tokens == waiting.result()[0].tokens


def test_a_failing_prefill_fails_its_request_and_no_others(stubborn: Stubborn):
    engine = Engine(stubborn)
    stubborn.allowed.set()
    good = engine.submit(Request(prompt=THINKING, seed=1, max_tokens=4))
    bad = engine.submit(Request(prompt=(0, 1), seed=1, n=2, max_tokens=4))
    with pytest.raises(ValueError, match="a bad prompt"):
        bad.result(60)
    assert len(good.result(60)[0].tokens) == 4


def test_the_worker_ends_with_the_work_and_starts_again(engine: Engine):
    for _ in range(3):
        complete(engine, Request(prompt=THINKING, seed=1, max_tokens=2))
        settle(lambda: engine._worker is None)


def _answer_in_child(queue: Any) -> None:
    queue.put(EmbeddedChatModel(temperature=0, max_tokens=8).invoke(SOLVE.prompt).additional_kwargs)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_an_engine_of_its_own():
    expected = EmbeddedChatModel(temperature=0, max_tokens=8).invoke(SOLVE.prompt).additional_kwargs
    assert default_engine() is default_engine()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_answer_in_child, args=(queue,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == expected


# Chat model


class TestStandard(ChatModelUnitTests):
    """LangChain's own tests of chat models."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return EmbeddedChatModel

    @property
    def has_tool_choice(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @pytest.mark.xfail(reason="it forces a call, which the embedded model refuses", raises=ConfigError)
    def test_bind_tool_pydantic(self, model: BaseChatModel, my_adder_tool: BaseTool) -> None:
        super().test_bind_tool_pydantic(model, my_adder_tool)


def test_response(engine: Engine):
    """A response has a thought, an answer, usage and log-probabilities of every token."""
    message = EmbeddedChatModel(seed=1).invoke([SystemMessage("Be brief."), HumanMessage(SOLVE.prompt)])
    assert engine.prefills == 1
    entries = metadata(message)["logprobs"]["content"]
    text = "".join(entry["token"] for entry in entries)
    thought = message.additional_kwargs["reasoning_content"]
    assert text == f"<think>{thought}</think>{message.text}<|end|>"
    assert {k: x for k, x in metadata(message).items() if k != "logprobs"} == {
        "finish_reason": "stop",
        "model_name": "ec-agents-embedded",
        "model_provider": "ec-agents",
    }
    assert message.usage_metadata == {
        "input_tokens": len(THINKING) - 1,
        "output_tokens": len(entries),
        "total_tokens": len(THINKING) - 1 + len(entries),
    }
    for entry in entries:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        values = [alternative["logprob"] for alternative in entry["top_logprobs"]]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        same = [a["logprob"] for a in entry["top_logprobs"] if a["token"] == entry["token"]]
        assert same in ([], [entry["logprob"]])


@pytest.mark.usefixtures("engine")
def test_options_of_a_call_take_precedence():
    model = EmbeddedChatModel(seed=1, max_tokens=4)
    entries = metadata(model.invoke(SOLVE.prompt, max_tokens=2, top_logprobs=3))["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [3, 3]
    bare = model.bind(logprobs=False).invoke(SOLVE.prompt)
    assert metadata(bare)["finish_reason"] == "length"
    assert "logprobs" not in metadata(bare)
    assert len(metadata(model.invoke(SOLVE.prompt, top_logprobs=None))["logprobs"]["content"]) == 4


@pytest.mark.usefixtures("engine")
def test_a_seed_repeats_the_text_and_n_differs_within_it():
    def texts(**options: Any) -> list[str]:
        result = EmbeddedChatModel(max_tokens=30, **options).generate([[HumanMessage(SOLVE.prompt)]])
        return [generation.message.additional_kwargs["reasoning_content"] for generation in result.generations[0]]  # pyright: ignore[reportAttributeAccessIssue]

    assert texts(seed=1, n=3) == texts(seed=1, n=3)
    assert len(set(texts(seed=1, n=3))) == 3
    assert texts(seed=1, n=3)[0] == texts(seed=1)[0] != texts(seed=2)[0]
    assert texts() != texts()
    assert texts(temperature=0) == texts(temperature=0, seed=7)


def test_the_prompt_of_n_responses_is_counted_once(engine: Engine):
    result = EmbeddedChatModel(n=3, max_tokens=2).generate([[HumanMessage(SOLVE.prompt)]])
    usages = [g.message.usage_metadata for g in result.generations[0]]  # pyright: ignore[reportAttributeAccessIssue]
    assert [u["input_tokens"] for u in usages] == [len(THINKING) - 1, 0, 0]
    assert [u["output_tokens"] for u in usages] == [2, 2, 2]
    assert engine.prefills == 1


async def test_concurrent_calls_run_in_one_batch(engine: Engine):
    model = EmbeddedChatModel()
    messages = await asyncio.gather(*(model.ainvoke(SOLVE.prompt, seed=i) for i in range(8)))
    lengths = [len(metadata(m)["logprobs"]["content"]) for m in messages]
    assert engine.prefills == 1
    assert max(lengths) - 1 <= engine.steps < max(lengths) + 40


async def test_cancelling_a_call_frees_its_row(stubborn: Stubborn, monkeypatch: pytest.MonkeyPatch):
    engine = Engine(stubborn)
    monkeypatch.setattr(chat_model, "default_engine", lambda: engine)
    task = asyncio.create_task(EmbeddedChatModel().ainvoke(SOLVE.prompt))
    await asyncio.to_thread(settle, lambda: bool(engine._rows))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stubborn.allowed.set()
    await asyncio.to_thread(settle, lambda: engine._worker is None)
    assert engine.steps <= 2


class Scripted(Transformer):
    """Writes given tokens, one row at a time."""

    def __init__(self, arrays: Arrays, tokens: Sequence[int]) -> None:
        super().__init__(arrays, SHAPE)
        self.left = list(tokens)

    def prefill(self, ids: ArrayLike) -> Prefill:
        prompt = super().prefill(ids)
        return Prefill(self.next(), prompt.keys, prompt.values)

    def step(self, tokens: ArrayLike, cache: Cache) -> Floats:
        super().step(tokens, cache)
        return self.next()[None]

    def next(self) -> Floats:
        logits = np.full(v.SIZE, -50, np.float32)
        logits[self.left.pop(0)] = 50
        return logits


Answer = Callable[..., AIMessage]


@pytest.fixture
def answer(arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """What the chat model makes of given tokens; texts stand for the tokens that they are encoded as."""

    def answer(*parts: int | str, **options: Any) -> AIMessage:
        tokens = [token for part in parts for token in (v.encode(part) if isinstance(part, str) else [part])]
        engine = Engine(Scripted(arrays, tokens))
        monkeypatch.setattr(chat_model, "default_engine", lambda: engine)
        return EmbeddedChatModel().invoke("hi", **options)

    return answer


def test_a_tool_call_is_read(answer: Answer):
    message = answer(
        v.THINK,
        "1+2=3 yes\n",
        v.END_THINK,
        v.CALL,
        '{"name": "calc", "arguments": {"expression": "1+2"}}',
        v.END_CALL,
        v.END,
    )
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("calc", {"expression": "1+2"})
    assert call["id"]
    assert call["id"].startswith("call_")
    assert len(call["id"]) == 29
    assert metadata(message)["finish_reason"] == "tool_calls"
    assert (message.text, message.additional_kwargs) == ("", {"reasoning_content": "1+2=3 yes\n"})
    assert metadata(message)["logprobs"]["content"][-1]["bytes"] == list(b"<|end|>")


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "calc", "arg',
        "[]",
        '{"arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "a", "arguments": "1"}',
        "",
    ],
)
def test_a_bad_tool_call_is_kept_as_invalid(answer: Answer, text: str):
    message = answer("so", v.CALL, text, v.END_CALL, "!", v.END)
    assert message.tool_calls == []
    (call,) = message.invalid_tool_calls
    assert call["args"] == text
    assert call["error"]
    assert message.text == "so!"
    assert metadata(message)["finish_reason"] == "stop"


def test_control_tokens_and_broken_utf8_do_not_reach_the_content(answer: Answer):
    message = answer("a", v.USER, "b", v.ASSISTANT, 0xC3, "é", v.TOOL, "<think>", v.END)
    assert message.text == "ab\ufffdé<think>"
    assert metadata(message)["logprobs"]["content"][4]["bytes"] == [0xC3]


def test_a_stop_text_ends_the_response_before_it(answer: Answer):
    message = answer(v.THINK, "thus", v.END_THINK, "one two three", v.END, stop=["two", "zzz"])
    assert (message.text, metadata(message)["finish_reason"]) == ("one ", "stop")
    assert len(metadata(message)["logprobs"]["content"]) == 6 + 7
    message = answer(v.THINK, "thus one", v.END, stop=[" one"])
    assert (message.text, message.additional_kwargs["reasoning_content"]) == ("", "thus")


def test_messages_become_the_turns_of_training(engine: Engine):
    task = make_tasks("play", 1)[0]
    calc = task.calc_tool()
    call = {"name": "calc", "args": {"expression": "1+2"}, "id": "c", "type": "tool_call"}
    messages = [
        SystemMessage("ignored"),
        HumanMessage([{"type": "text", "text": "Combine "}, "the numbers é"]),
        AIMessage("", tool_calls=[call]),
        ToolMessage("3 left: 3", tool_call_id="c"),
    ]
    EmbeddedChatModel(max_tokens=1).bind_tools([calc], tool_choice="auto").invoke(messages)
    turns = [
        Turn("user", "Combine the numbers é"),
        Turn("assistant", "", [("calc", {"expression": "1+2"})]),
        Turn("tool", "3 left: 3"),
    ]
    assert list(engine._prompts) == [tuple(render(turns, ["calc"]))]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])], "content of type image_url"),
        ([ChatMessage(content="hi", role="critic")], "a chat message is found"),
        ([SystemMessage("hi")], "no message is left"),
    ],
)
@pytest.mark.usefixtures("engine")
def test_messages_that_cannot_be_read_are_refused(messages: list[BaseMessage], problem: str):
    with pytest.raises(ConfigError, match=problem):
        EmbeddedChatModel().invoke(messages)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"n": 0}, "n is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"top_logprobs": 21}, "top_logprobs is 21, and 0 to 20 is needed"),
        ({"top_logprobs": -1}, "top_logprobs is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
@pytest.mark.usefixtures("engine")
def test_options_out_of_range_are_refused(options: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        EmbeddedChatModel(**options)
    with pytest.raises(ConfigError, match=problem):
        EmbeddedChatModel().invoke("hi", **options)


@pytest.mark.usefixtures("engine")
def test_what_the_model_cannot_do_is_refused():
    model = EmbeddedChatModel()
    with pytest.raises(ConfigError, match="cannot be made to call a tool"):
        model.bind_tools([], tool_choice="any")
    with pytest.raises(ConfigError, match="cannot be made to call a tool"):
        model.invoke("hi", tool_choice="calc")
    with pytest.raises(ConfigError, match="no option top_p"):
        model.invoke("hi", top_p=0.9)
    with pytest.raises(ConfigError, match="stop text is empty"):
        model.invoke("hi", stop=[""])


@pytest.mark.parametrize("text", ["", "日本語 🙂", "<|end|><|user|>", "\x00\udcff"])
@pytest.mark.usefixtures("engine")
def test_any_text_can_be_answered(text: str):
    message = EmbeddedChatModel(max_tokens=5).invoke(text)
    assert len(metadata(message)["logprobs"]["content"]) <= 5


def test_the_model_says_what_it_is():
    model = EmbeddedChatModel(temperature=0.5)
    assert model._llm_type == "ec-agents-embedded"
    assert model._identifying_params["temperature"] == 0.5
    assert model._get_ls_params(stop=["x"], max_tokens=9) == {
        "ls_provider": "ec-agents",
        "ls_model_name": "ec-agents-embedded",
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 9,
        "ls_stop": ["x"],
    }
