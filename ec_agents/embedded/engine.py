"""Continuous batching: every response in progress advances by one token per step, whichever call it belongs to.

Callers submit requests from any thread and get futures. One worker thread admits waiting rows between steps, runs the
network on all rows at once, samples a token for each, and ends when no row is left.
"""

import os
import threading
from collections import OrderedDict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from langchain_core.exceptions import ContextOverflowError
from numpy.typing import NDArray

from ec_agents.embedded import vocabulary as v
from ec_agents.embedded.transformer import CONTEXT, Cache, Floats, Ints, Prefill, Transformer
from ec_agents.errors import ConfigError

GREEDY = 1e-6
"""Below this temperature the likeliest token is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, and how to sample the responses."""

    prompt: tuple[int, ...]
    """Token ids, at least one and fewer than ``CONTEXT``."""
    seed: int
    """Seed, 0 or more; row i has its own generator, seeded with ``(seed, i)``."""
    n: int = 1
    """Number of responses."""
    max_tokens: int = CONTEXT
    """Most tokens of one response."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: int = 0
    """Alternatives to report per token, up to the whole vocabulary."""
    stop: tuple[bytes, ...] = ()
    """A response ends once its text contains one of these."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """One response of T tokens; log-probabilities are those at temperature 1."""

    tokens: list[int]
    """Token ids, including the end token."""
    logprobs: Floats
    """Log-probability of each token, ``(T,)``, nats."""
    top_ids: Ints
    """The likeliest tokens, ``(T, top_k)``, likeliest first."""
    top_logprobs: Floats
    """Their log-probabilities, ``(T, top_k)``, nats."""
    finish_reason: Literal["stop", "length"]
    """``length``: cut off at ``max_tokens`` or at the end of the context."""


@dataclass(slots=True, eq=False)
class _Job:
    request: Request
    future: Future[list[Completion]] = field(default_factory=Future[list[Completion]])
    completions: dict[int, Completion] = field(default_factory=dict[int, Completion])

    def finish(self, row: int, completion: Completion) -> None:
        """Keep one response; the last one resolves the future."""
        self.completions[row] = completion
        # A future that was cancelled in the meantime refuses to run, and from here on it cannot be cancelled.
        if len(self.completions) == self.request.n and self.future.set_running_or_notify_cancel():
            self.future.set_result([self.completions[i] for i in range(self.request.n)])

    def fail(self, error: Exception) -> None:
        """Resolve the future with an error, unless it is resolved."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class _Row:
    """One response in progress."""

    job: _Job
    index: int
    rng: np.random.Generator
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[np.float32] = field(default_factory=list[np.float32])
    top_ids: list[Ints] = field(default_factory=list[Ints])
    top_logprobs: list[Floats] = field(default_factory=list[Floats])
    text: bytes = b""

    def append(self, token: int, logprob: np.float32, top_ids: Ints, top_logprobs: Floats) -> None:
        top_k = self.job.request.top_k
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top_ids.append(top_ids[:top_k])
        self.top_logprobs.append(top_logprobs[:top_k])
        if self.job.request.stop:
            self.text += v.token_bytes(token)

    def finish_reason(self) -> Literal["stop", "length"] | None:
        request = self.job.request
        if self.tokens[-1] == v.END or any(stop in self.text for stop in request.stop):
            return "stop"
        length = len(self.tokens)
        return "length" if length >= request.max_tokens or length + len(request.prompt) >= CONTEXT else None

    def completion(self, finish_reason: Literal["stop", "length"]) -> Completion:
        return Completion(
            tokens=self.tokens,
            logprobs=np.array(self.logprobs, np.float32),
            top_ids=np.stack(self.top_ids),
            top_logprobs=np.stack(self.top_logprobs),
            finish_reason=finish_reason,
        )


class Engine:
    """Runs the requests of one process.

    Args:
        transformer: The network.
        max_rows: Responses in progress at once; others wait their turn.
        max_prompts: Prompts whose keys and values are kept for requests to come.
    """

    steps: int
    """Token steps run so far, each for all rows in progress."""
    prefills: int
    """Prompts read so far."""

    def __init__(self, transformer: Transformer, *, max_rows: int = 64, max_prompts: int = 16) -> None:
        self.steps = self.prefills = 0
        self._transformer = transformer
        self._max_rows, self._max_prompts = max_rows, max_prompts
        self._lock = threading.Lock()
        self._waiting: deque[_Row] = deque()
        self._worker: threading.Thread | None = None
        # What follows belongs to the worker alone.
        self._rows: list[_Row] = []
        self._cache = Cache(transformer.shape, max_rows)
        self._logits = np.empty((max_rows, transformer.shape.vocabulary), np.float32)
        self._prompts: OrderedDict[tuple[int, ...], Prefill] = OrderedDict()

    def submit(self, request: Request) -> Future[list[Completion]]:
        """Queue a request.

        Returns:
            A future of its n responses, in row order. Cancelling it stops their generation at the next step.

        Raises:
            ConfigError: The prompt is empty.
            ContextOverflowError: It leaves no room in the context.
        """
        length = len(request.prompt)
        if not length:
            raise ConfigError("the prompt is empty, and at least one token is needed")
        if length >= CONTEXT:
            raise ContextOverflowError(
                f"the prompt has {length} tokens, and {CONTEXT - 1} fit into the context of {CONTEXT}, with room for "
                "a response: shorten the conversation"
            )
        job = _Job(request)
        rows = [_Row(job, i, np.random.default_rng((request.seed, i))) for i in range(request.n)]
        with self._lock:
            self._waiting.extend(rows)
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._work, name="ec-agents-embedded", daemon=True)
                self._worker.start()
        return job.future

    def _work(self) -> None:
        while self._admit():
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 - it reaches the callers through their futures
                for row in self._rows:
                    row.job.fail(error)
                self._rows.clear()
                self._cache.count = 0

    def _admit(self) -> bool:
        """Start waiting rows while there is room; False if there are none at all, so that the worker ends."""
        with self._lock:
            room = self._max_rows - len(self._rows)
            admitted = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            if not (admitted or self._rows):
                self._worker = None
                return False
        for row in admitted:
            if not row.job.future.done():
                self._start(row)
        return True

    def _start(self, row: _Row) -> None:
        try:
            prompt = self._prefill(row.job.request.prompt)
        except Exception as error:  # noqa: BLE001 - it reaches the caller through the future
            row.job.fail(error)
            return
        self._logits[len(self._rows)] = prompt.logits
        self._cache.add(prompt)
        self._rows.append(row)

    def _prefill(self, prompt: tuple[int, ...]) -> Prefill:
        known = self._prompts.pop(prompt, None)
        if known is None:
            known = self._transformer.prefill(prompt)
            self.prefills += 1
        self._prompts[prompt] = known
        if len(self._prompts) > self._max_prompts:
            self._prompts.popitem(last=False)
        return known

    def _step(self) -> None:
        """Advance every row by one token: drop cancelled rows, sample, drop finished rows, run the network."""
        for i in reversed(range(len(self._rows))):
            if self._rows[i].job.future.done():
                self._drop(i)
        if not self._rows:
            return
        self._draw()
        for i in reversed(range(len(self._rows))):
            row = self._rows[i]
            reason = row.finish_reason()
            if reason is not None:
                row.job.finish(row.index, row.completion(reason))
                self._drop(i)
        if self._rows:
            tokens = [row.tokens[-1] for row in self._rows]
            self._logits[: len(tokens)] = self._transformer.step(tokens, self._cache)
            self.steps += 1

    def _drop(self, i: int) -> None:
        """Take a row out of the batch; the last one takes its place, so going backwards visits every row."""
        last = self._rows.pop()
        if i < len(self._rows):
            self._rows[i] = last
            self._logits[i] = self._logits[len(self._rows)]
        self._cache.remove(i)

    def _draw(self) -> None:
        """Sample the next token of every row and record it with its log-probabilities."""
        rows = self._rows
        logprobs = log_softmax(self._logits[: len(rows)])
        temperatures = np.array([row.job.request.temperature for row in rows])
        tokens = draw(logprobs, temperatures, np.array([row.rng.random() for row in rows]))
        top_ids, top_logprobs = top(logprobs, max(row.job.request.top_k for row in rows))
        drawn = logprobs[np.arange(len(rows)), tokens]
        for i, row in enumerate(rows):
            row.append(int(tokens[i]), drawn[i], top_ids[i], top_logprobs[i])


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities along the last axis, nats."""
    shifted = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def draw(logprobs: Floats, temperatures: NDArray[np.float64], uniforms: NDArray[np.float64]) -> Ints:
    """Sample one token per row by inverting the cumulative distribution.

    Args:
        logprobs: ``(B, V)``, nats.
        temperatures: ``(B,)``.
        uniforms: Uniform numbers from [0, 1), ``(B,)``; they alone decide the outcome.

    Returns:
        Token ids, ``(B,)``.
    """
    likeliest = logprobs.argmax(1)
    greedy = temperatures < GREEDY
    if greedy.all():
        return likeliest
    peak = logprobs.max(1, keepdims=True)
    scaled = (logprobs - peak) / np.where(greedy, 1.0, temperatures)[:, None]
    cumulative = np.exp(scaled).cumsum(1)
    reached = cumulative[:, :-1] <= (uniforms * cumulative[:, -1])[:, None]
    drawn: Ints = np.count_nonzero(reached, axis=1)
    return np.where(greedy, likeliest, drawn)


def top(logprobs: Floats, k: int) -> tuple[Ints, Floats]:
    """Ids and log-probabilities of the k likeliest tokens, each ``(B, k)``, likeliest first."""
    k = min(k, logprobs.shape[1])
    ids = np.argpartition(-logprobs, max(k - 1, 0), axis=1)[:, :k]
    values = np.take_along_axis(logprobs, ids, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)


# By process id, and without a lock: a forked child has no worker thread, and could inherit a lock that is held.
_engines: dict[int, Engine] = {}


def default_engine() -> Engine:
    """Return the engine that all models of this process share, so that their calls run in one batch.

    Raises:
        FileNotFoundError: The package was installed without its weights.
    """
    process = os.getpid()
    return _engines.get(process) or _engines.setdefault(process, Engine(Transformer.load()))
