"""How requests travel: through the OpenAI SDK, one choice to each or several, with the bodies decoded here."""

import asyncio
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import openai
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from ec_agents.errors import ConfigError
from ec_agents.logprobs import packed_length
from ec_agents.servers.body_reader import decode_off_loop
from ec_agents.servers.completions import decode_response, split_usage
from ec_agents.servers.http_clients import MAX_BODY_BYTES, ResponseLimits
from ec_agents.servers.per_loop import PerLoop

GATHERING = 0.002
"""Seconds for which equal calls are collected into one request."""
MOST_THREADS = 32
"""Requests that one synchronous call has under way at once."""

Payload = Mapping[str, Any]

PARAMETERS = frozenset(CompletionCreateParamsBase.__annotations__)
"""What the SDK's ``create`` puts into the body, but for ``stream``."""

_OPTIONS = {"extra_headers": "headers", "extra_query": "params", "extra_body": "extra_json", "timeout": "timeout"}
"""Arguments of the SDK's ``create`` that are not part of the body, and their names in ``post``."""


class Answer(NamedTuple):
    """One choice of a response."""

    choice: dict[str, Any]
    """``message``, ``finish_reason``, packed ``logprobs``; and its share of the ``usage`` where it is not alone."""
    response: dict[str, Any]
    """The other fields of the response, which all its choices have in common."""


@dataclass(slots=True)
class _Batch:
    """Equal calls that become one request."""

    slots: list[asyncio.Future[Answer | None]] = field(default_factory=list[asyncio.Future[Answer | None]])
    """One per call; None tells the call to send its own request."""
    task: asyncio.Task[None] | None = None
    """Sends the request; set as soon as the batch is open."""


class Transport:
    """What a chat model and its copies send their requests through.

    Args:
        clients: Asynchronous clients.
        make_client: Makes the synchronous client.
        max_body_bytes: Largest response in bytes; clients that the user made do not check it themselves.
    """

    def __init__(
        self,
        clients: PerLoop[openai.AsyncOpenAI],
        make_client: Callable[[], openai.OpenAI],
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._clients = clients
        self._make_client = make_client
        self._limits = ResponseLimits(max_body_bytes=max_body_bytes)
        self._client: openai.OpenAI | None = None
        self._lock = threading.Lock()
        self._open: dict[Any, _Batch] = {}
        self._ignores_n = False

    async def answer(self, payload: Payload, *, n_max: int = 1) -> Answer:
        """One choice; with ``n_max`` > 1, equal calls at the same time share a request for up to so many choices."""
        if n_max > 1 and not self._ignores_n:
            answer = await self._share(payload, n_max)
            if answer is not None:
                return answer
        return (await self._fetch(payload, 1))[0]

    def answers_blocking(self, payload: Payload, n: int, *, n_max: int = 1) -> list[Answer]:
        """``n`` choices, synchronously; with ``n_max`` > 1, up to so many from one request."""
        answers: list[Answer] = []
        if n > 1 and n_max > 1 and not self._ignores_n:
            asked = min(n, n_max)
            try:
                answers = self._fetch_blocking(payload, asked)
            except openai.BadRequestError as error:
                if not is_about_n(error):
                    raise
                self._ignores_n = True
            self._ignores_n |= len(answers) < 2
        missing = n - len(answers)
        if missing == 1:
            return [*answers, *self._fetch_blocking(payload, 1)]
        with ThreadPoolExecutor(min(missing, MOST_THREADS) or 1) as pool:
            pending = [pool.submit(copy_context().run, self._fetch_blocking, payload, 1) for _ in range(missing)]
            return [*answers, *(answer for future in pending for answer in future.result())]

    async def _fetch(self, payload: Payload, n: int) -> list[Answer]:
        client = await self._clients.get()
        body = await client.post(**_asking(payload, n))
        self._limits.check_size(len(body))
        return _answers(await decode_off_loop(body, n), n)

    def _fetch_blocking(self, payload: Payload, n: int) -> list[Answer]:
        with self._lock:
            self._client = client = self._client or self._make_client()
        body = client.post(**_asking(payload, n))
        self._limits.check_size(len(body))
        return _answers(decode_response(body, n), n)

    async def _share(self, payload: Payload, n_max: int) -> Answer | None:
        """A choice of the request that all equal calls share; None if it returned too few."""
        loop = asyncio.get_running_loop()
        key = loop, msgspec.json.encode(payload, enc_hook=repr)
        batch = self._open.get(key)
        if batch is None:
            batch = self._open[key] = _Batch()
            batch.task = loop.create_task(self._send(key, payload, batch, n_max))
            # Not at the end of the coroutine, which never runs if its task is cancelled before it starts.
            batch.task.add_done_callback(lambda _, batch=batch: self._release(key, batch))
        slot: asyncio.Future[Answer | None] = loop.create_future()
        batch.slots.append(slot)
        try:
            return await slot
        except asyncio.CancelledError:
            if batch.task is not None and all(other.done() for other in batch.slots):
                self._close(key, batch)  # a call that joined from here on would never be answered
                batch.task.cancel()
                await asyncio.wait([batch.task])
            raise

    def _close(self, key: Any, batch: _Batch) -> None:
        """Let no further call join the batch."""
        if self._open.get(key) is batch:
            del self._open[key]

    def _release(self, key: Any, batch: _Batch) -> None:
        """Let the calls that are still waiting for the batch send their own requests."""
        self._close(key, batch)
        for slot in batch.slots:
            if not slot.done():
                slot.set_result(None)

    async def _send(self, key: Any, payload: Payload, batch: _Batch, n_max: int) -> None:
        """Wait for more equal calls, send one request for all, and give each call its choice."""
        await asyncio.sleep(GATHERING)
        self._close(key, batch)
        await self._distribute(payload, [slot for slot in batch.slots if not slot.done()], n_max)

    async def _distribute(self, payload: Payload, waiting: list[asyncio.Future[Answer | None]], n_max: int) -> None:
        """Send one request for the calls that are waiting; all of them get its failure, if it fails."""
        answers: list[Answer] = []
        failure: Exception | None = None
        try:
            answers = await self._fetch(payload, min(n_max, len(waiting)))
        except Exception as error:  # noqa: BLE001 - it is raised where the calls wait
            failure = error
        if len(waiting) > 1:
            refused = isinstance(failure, openai.BadRequestError) and is_about_n(failure)
            failure = None if refused else failure
            self._ignores_n |= refused or (failure is None and len(answers) < 2)
        for number, slot in enumerate(waiting):
            if failure is not None and not slot.done():
                slot.set_exception(failure)
            elif not slot.done():
                slot.set_result(answers[number] if number < len(answers) else None)


def post_arguments(payload: Payload) -> dict[str, Any]:
    """The arguments with which the SDK's ``post`` sends what ``create`` makes of a payload that is plain JSON.

    ``create`` spends as much CPU again on copying the request.
    """
    body = dict(payload)
    given = {name: body.pop(name) for name in _OPTIONS if name in body}
    options = {_OPTIONS[name]: value for name, value in given.items() if value is not None or name == "timeout"}
    # Without this, the SDK takes the key of an administrator where there is no other.
    options["security"] = {"bearer_auth": True}
    return {"path": "/chat/completions", "body": body, "options": options, "cast_to": bytes}


def _asking(payload: Payload, n: int) -> dict[str, Any]:
    """The arguments of the SDK's ``post``.

    Raises:
        ConfigError: The payload has a parameter that ``create`` does not know.
    """
    arguments = post_arguments({**payload, "n": n} if n > 1 else payload)
    body = arguments["body"]
    if not body.get("stream", True):
        del body["stream"]
    if unknown := body.keys() - PARAMETERS:
        raise ConfigError(
            f"the OpenAI SDK knows no parameter {min(unknown)!r}; pass what only the server knows in extra_body"
        )
    return arguments


def _answers(response: dict[str, Any], n: int) -> list[Answer]:
    """The choices of a response, at most ``n``, with the usage shared out."""
    choices: list[dict[str, Any]] = response.pop("choices")[:n]
    if len(choices) > 1:
        lengths = [packed_length(choice["logprobs"]) for choice in choices]
        shares = split_usage(response.get("usage"), lengths)
        choices = [{**choice, "usage": share} for choice, share in zip(choices, shares, strict=True)]
    return [Answer(choice, response) for choice in choices]


_ABOUT_N = re.compile(
    r"(?<![\w'])[\"'`]?n[\"'`]?(?!\w|')|best_of|number of (choices|completions)|completion choice", re.IGNORECASE
)


def is_about_n(error: openai.APIStatusError) -> bool:
    """Tell whether a server refuses several choices, as opposed to the request for another reason."""
    return error.param == "n" or (error.param is None and bool(_ABOUT_N.search(error.message)))
