"""A local OpenAI-compatible server that can fail in every way that real ones do."""

import asyncio
import json
import math
import random
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import count, cycle
from types import TracebackType
from typing import Any, Self, cast

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, UsageMetadata, convert_to_messages, convert_to_openai_messages

from ec_agents.errors import ConfigError
from ec_agents.testing.faults import FAULTS, NO_FAULT, Fault, Json
from ec_agents.testing.scripted import Reply

_HELLO = Reply(content="hello")


class FaultServer:
    """An OpenAI-compatible server on 127.0.0.1 in its own thread: ``/v1/chat/completions`` and ``/v1/models``.

    Any path ending in ``chat/completions`` is served, so Azure's clients work too. Log-probabilities are sent only if
    requested, with as many alternatives as requested. With ``stream`` the response is sent as server-sent events.

    Args:
        source: What to answer: the replies of a script in turn, repeatedly; a chat model, for example
            ``EmbeddedChatModel()``; one response as it is; or a function from request to a reply or response.
        faults: The fault of each request, in order of arrival, repeatedly: a name in ``FAULTS``, a ``Fault``, or None.
            With ``n`` > 1 a fault affects all choices.
        latency: Seconds before every answer.

    Raises:
        ConfigError: No fault has that name, or the script is empty.
        ImportError: aiohttp, the extra ``testing``, is not installed.

    Example:
        >>> import openai
        >>> from ec_agents.testing import FaultServer, Reply
        >>> with FaultServer([Reply(content="hello")], faults=["status_503", None]) as server:
        ...     with openai.OpenAI(base_url=server.base_url, api_key="none") as client:
        ...         answer = client.chat.completions.create(model="any", messages=[{"role": "user", "content": "hi"}])
        >>> answer.choices[0].message.content, len(server.requests)
        ('hello', 2)
    """

    def __init__(
        self,
        source: Sequence[Reply] | BaseChatModel | Mapping[str, Any] | Callable[[Json], Any] = (_HELLO,),
        *,
        faults: Sequence[str | Fault | None] = (),
        latency: float = 0.0,
    ) -> None:
        self.requests: list[Json] = []
        """Bodies of the requests so far, in order of arrival."""
        self.headers: list[dict[str, str]] = []
        """Their headers, names in lower case."""
        self.abandoned = 0
        """Requests that the client gave up before they were answered."""
        self.in_flight = 0
        """Requests being answered now."""
        self._web: Any = _aiohttp_web()
        self._runner: Any = None
        self._complete = _source(source)
        self._faults = [_fault(fault) for fault in faults] or [NO_FAULT]
        self._latency = latency
        self._ids = count()
        self._rng = random.Random(0)
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="ec_agents-server", daemon=True)

    @property
    def base_url(self) -> str:
        """Base URL for a client."""
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._runner.server.connections)

    def __enter__(self) -> Self:
        """Start; returns once the server accepts requests."""
        self._thread.start()
        self._started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; requests under way are broken off."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        web = self._web
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/{prefix:.*}chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.0, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024).start()
        except BaseException as error:
            self._started.set_exception(error)
            raise
        self._started.set_result(None)
        await self._stop.wait()
        await self._runner.cleanup()

    async def _models(self, _: Any) -> Any:
        return self._web.json_response({"object": "list", "data": [{"id": "any", "object": "model"}]})

    async def _chat(self, request: Any) -> Any:
        asked: Json = await request.json()
        self.requests.append(asked)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        fault = self._faults[next(self._ids) % len(self._faults)]
        self.in_flight += 1
        try:
            return await self._respond(request, asked, fault)
        except (asyncio.CancelledError, ConnectionError) as gone:
            self.abandoned += not self._stop.is_set()
            raise asyncio.CancelledError from gone
        finally:
            self.in_flight -= 1

    async def _respond(self, request: Any, asked: Json, fault: Fault) -> Any:
        if math.isinf(fault.delay):
            await asyncio.Event().wait()
        await asyncio.sleep(self._latency + fault.delay + fault.jitter * self._rng.random())
        if fault.status >= 400:
            return await self._send(request, _error(fault.status, fault.about), fault)
        try:
            payload = await self._complete(asked)
        except Exception as error:  # noqa: BLE001 - a server answers with what went wrong
            status = 400 if isinstance(error, ValueError) else 500
            return await self._send(request, _error(status, str(error)), replace(NO_FAULT, status=status))
        return await self._send(request, payload, fault, streams=bool(asked.get("stream")))

    async def _send(self, request: Any, payload: Any, fault: Fault, *, streams: bool = False) -> Any:
        body = fault.spoil(payload)
        if streams and (events := _events(body)) is not None:
            body, fault = events, replace(fault, content_type="text/event-stream")
        if fault.sent < 1.0:
            return await self._break_off(request, body, fault)
        options = {"status": fault.status, "content_type": fault.content_type, "headers": fault.headers}
        return self._web.Response(body=body, **options)

    async def _break_off(self, request: Any, body: bytes, fault: Fault) -> Any:
        response = self._web.StreamResponse(headers={"Content-Type": fault.content_type})
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[: int(len(body) * fault.sent)])
        if fault.stalls:
            await asyncio.Event().wait()
        request.transport.close()
        return response


def _events(body: bytes) -> bytes | None:
    """A response as server-sent events: per choice its role, its message in one piece, and why it ended; then usage.

    None if the body is not a response, as after some faults: then it is sent as it is.
    """
    try:
        response: Json = json.loads(body)
        deltas = [chunk for choice in response["choices"] for chunk in _deltas(choice)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    shared = {**response, "object": "chat.completion.chunk", "usage": None}
    chunks: list[Json] = [{**shared, "choices": [delta]} for delta in deltas]
    chunks.append({**shared, "choices": [], "usage": response.get("usage")})
    lines = [f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


def _deltas(choice: Json) -> list[Json]:
    """A choice as the choices of three chunks."""
    message: Json = dict(choice["message"])
    calls: list[Json] = message.get("tool_calls") or []
    if calls:
        message["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
    shared = {"index": choice.get("index", 0), "logprobs": None, "finish_reason": None}
    return [
        {**shared, "delta": {"role": message.pop("role", "assistant"), "content": ""}},
        {**shared, "delta": message, "logprobs": choice.get("logprobs")},
        {**shared, "delta": {}, "finish_reason": choice.get("finish_reason")},
    ]


def _error(status: int, message: str) -> Json:
    return {"error": {"message": message, "type": "server_error", "code": status}}


def _aiohttp_web() -> Any:
    try:
        from aiohttp import web  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ImportError("FaultServer needs aiohttp: pip install 'ec-agents[testing]'") from error
    return web


def _source(source: Any) -> Callable[[Json], Awaitable[Any]]:
    """Return the function that answers a request, from any accepted form of ``source``."""
    if isinstance(source, BaseChatModel):
        return _from_model(source)
    if isinstance(source, Mapping):
        canned = cast("Json", source)
        return _from_function(lambda _: canned)
    if callable(source):
        return _from_function(source)
    if not source:
        raise ConfigError("the script of the server must have at least one reply; found none")
    script = cycle(source)
    return _from_messages(lambda _: _play(next(script)))


def _fault(fault: str | Fault | None) -> Fault:
    if not isinstance(fault, str):
        return fault or NO_FAULT
    if fault not in FAULTS:
        raise ConfigError(f"unknown fault {fault!r}; known: {', '.join(FAULTS)}")
    return FAULTS[fault]


def _from_function(answer: Callable[[Json], Any]) -> Callable[[Json], Awaitable[Any]]:
    async def complete(asked: Json) -> Any:
        found = answer(asked)
        return await _from_messages(lambda _: _play(found))(asked) if isinstance(found, Reply) else found

    return complete


def _from_messages(draw: Callable[[Json], Awaitable[AIMessage]]) -> Callable[[Json], Awaitable[Any]]:
    async def complete(asked: Json) -> Any:
        messages = await asyncio.gather(*[draw(asked) for _ in range(asked.get("n") or 1)])
        return completion(messages, asked)

    return complete


def _from_model(model: BaseChatModel) -> Callable[[Json], Awaitable[Any]]:
    async def draw(asked: Json) -> AIMessage:
        bound: Any = model.bind_tools(asked["tools"]) if asked.get("tools") else model
        options = {name: asked[name] for name in ("temperature", "seed", "stop", "top_logprobs") if name in asked}
        limit = asked.get("max_completion_tokens") or asked.get("max_tokens")
        options |= {} if limit is None else {"max_tokens": limit}
        return await bound.ainvoke(convert_to_messages(asked["messages"]), **options)

    return _from_messages(draw)


async def _play(reply: Reply) -> AIMessage:
    if math.isinf(reply.delay):
        await asyncio.Event().wait()
    await asyncio.sleep(reply.delay)
    if reply.error is not None:
        raise reply.error
    return reply.message()


def completion(messages: Sequence[AIMessage], asked: Mapping[str, Any]) -> Json:
    """Messages with log-probabilities as the chat completion that a server would send for a request."""
    usages = [message.usage_metadata or _NO_USAGE for message in messages]
    read, written = usages[0]["input_tokens"], sum(usage["output_tokens"] for usage in usages)
    return {
        "id": "chatcmpl-local",
        "object": "chat.completion",
        "created": 0,
        "model": asked.get("model", "any"),
        "choices": [_choice(message, index, asked) for index, message in enumerate(messages)],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


_NO_USAGE = UsageMetadata(input_tokens=0, output_tokens=0, total_tokens=0)


def _choice(message: AIMessage, index: int, asked: Mapping[str, Any]) -> Json:
    metadata: Json = message.response_metadata
    sent = convert_to_openai_messages(message)
    reasoning = message.additional_kwargs.get("reasoning_content")
    fields = {"role": "assistant", "content": sent["content"] or None, "refusal": None}
    fields |= {"tool_calls": sent["tool_calls"]} if sent.get("tool_calls") else {}
    fields |= {"reasoning_content": reasoning} if reasoning else {}
    logprobs = metadata.get("logprobs") if asked.get("logprobs") else None
    if logprobs is not None:
        k = asked.get("top_logprobs") or 0
        tokens = [{**token, "top_logprobs": token["top_logprobs"][:k]} for token in logprobs["content"]]
        logprobs = {"content": tokens, "refusal": None}
    return {"index": index, "message": fields, "logprobs": logprobs, "finish_reason": metadata.get("finish_reason")}
