"""The embedded model as a LangChain chat model, with real log-probabilities for every token.

It runs offline on any CPU, and can solve the tasks of ``ec_agents.embedded.tasks`` only.
"""

import asyncio
import math
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, cast

import msgspec
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from langchain_core.messages.tool import invalid_tool_call, tool_call
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from ec_agents.embedded import vocabulary as v
from ec_agents.embedded.engine import Completion, Request, default_engine
from ec_agents.embedded.template import Turn, render
from ec_agents.errors import ConfigError

MODEL_NAME = "ec-agents-embedded"
PROVIDER = "ec-agents"

_RANGES = (("temperature", 0, math.inf), ("max_tokens", 1, math.inf), ("n", 1, math.inf), ("top_logprobs", 0, 20))
_OPTIONS = ("temperature", "max_tokens", "seed", "n", "top_logprobs", "logprobs")
_TOKENS = [(v.decode([i]), list(v.token_bytes(i))) for i in range(v.SIZE)]
"""Text and bytes of each token; messages share the lists of bytes, which are never modified."""


class _Call(msgspec.Struct, frozen=True):
    """The JSON of a tool call."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    arguments: dict[str, Any]


_CALLS = msgspec.json.Decoder(_Call)


class EmbeddedChatModel(BaseChatModel):
    """A 1-million-parameter language model that ships with the package and runs in numpy.

    Concurrent calls of one process run in one batch and cost little more than one call. System messages are ignored,
    because the model was not trained on any. With ``n`` > 1, ``generate`` returns n generations; only the usage of the
    first includes the prompt, so that the sum is what was computed.

    Each field can also be set per call: ``model.invoke(messages, temperature=0.7, n=4)`` or ``model.bind(seed=1)``;
    None means the field's value. ``stop`` ends a response before one of the given texts; the log-probabilities
    include the tokens of the stop text.

    The message holds the thought in ``additional_kwargs["reasoning_content"]``, and the log-probabilities in
    ``response_metadata["logprobs"]["content"]`` in OpenAI's form, for all tokens: thought, tool call and end included.

    Raises:
        ConfigError: A field is out of range; on a call: the model cannot handle a message or an argument.
        ContextOverflowError: On a call: the prompt leaves no room for a response.

    Example:
        >>> from ec_agents.embedded import EmbeddedChatModel, make_tasks
        >>> task = make_tasks("solve", 1)[0]
        >>> message = EmbeddedChatModel(seed=0).invoke(task.prompt)
        >>> message.response_metadata["finish_reason"]
        'stop'
    """

    temperature: float = 1.0
    """Sampling temperature; 0 takes the likeliest token. Log-probabilities are reported at temperature 1."""
    max_tokens: int = 384
    """Most tokens of a response; with the prompt, at most 512."""
    seed: int | None = None
    """The same seed and request give the same text, up to rounding in other batches; None uses a fresh seed."""
    n: int = 1
    """Responses per request; they differ from each other even with a seed."""
    top_logprobs: int = 20
    """Alternatives reported per token, 0 to 20."""
    logprobs: bool = True
    """Whether to report log-probabilities."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        # Here rather than in a pydantic validator, which would turn ConfigError into its own ValidationError.
        _check(self._options({}))

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools to the model; it knows one, ``calc``, and sees only its name.

        Raises:
            ConfigError: ``tool_choice`` forces a call.
        """
        _check_tool_choice(tool_choice)
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    @property
    def _llm_type(self) -> str:
        return MODEL_NAME

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": MODEL_NAME, **self._options({})}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        options = self._options(kwargs)
        params = LangSmithParams(
            ls_provider=PROVIDER,
            ls_model_name=kwargs.get("model", MODEL_NAME),
            ls_model_type="chat",
            ls_temperature=options["temperature"],
            ls_max_tokens=options["max_tokens"],
        )
        if stop:
            params["ls_stop"] = stop
        return params

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a call: its arguments, and the fields for the rest."""
        return {name: getattr(self, name) if given.get(name) is None else given[name] for name in _OPTIONS}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - part of the interface
        **kwargs: Any,
    ) -> ChatResult:
        request, logprobs = self._request(messages, stop or (), kwargs)
        future = default_engine().submit(request)
        try:
            return _result(request, future.result(), logprobs=logprobs)
        finally:
            future.cancel()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - part of the interface
        **kwargs: Any,
    ) -> ChatResult:
        request, logprobs = self._request(messages, stop or (), kwargs)
        # Cancelling the task cancels the wrapped future and so frees the rows.
        completions = await asyncio.wrap_future(default_engine().submit(request))
        return _result(request, completions, logprobs=logprobs)

    def _request(
        self, messages: Sequence[BaseMessage], stop: Sequence[str], kwargs: Mapping[str, Any]
    ) -> tuple[Request, bool]:
        """The request for the engine, and whether to report log-probabilities."""
        unknown = kwargs.keys() - {*_OPTIONS, "tools", "tool_choice"}
        if unknown:
            raise ConfigError(f"the embedded model has no option {', '.join(sorted(unknown))}; it has {_OPTIONS}")
        _check_tool_choice(kwargs.get("tool_choice"))
        options = self._options(kwargs)
        _check(options)
        if "" in stop:
            raise ConfigError("a stop text is empty, and would end every response before it starts")
        tools = [convert_to_openai_tool(tool)["function"]["name"] for tool in kwargs.get("tools") or ()]
        request = Request(
            prompt=tuple(render(_turns(messages), tools)),
            seed=secrets.randbits(64) if options["seed"] is None else options["seed"],
            n=options["n"],
            max_tokens=options["max_tokens"],
            temperature=options["temperature"],
            top_k=options["top_logprobs"] if options["logprobs"] else 0,
            stop=tuple(text.encode() for text in stop),
        )
        return request, options["logprobs"]


def _check(options: Mapping[str, Any]) -> None:
    for name, low, high in _RANGES:
        if not low <= options[name] <= high:
            raise ConfigError(f"{name} is {options[name]}, and {low} to {high} is needed")
    if options["seed"] is not None and options["seed"] < 0:
        raise ConfigError(f"seed is {options['seed']}, and None or at least 0 is needed")


def _check_tool_choice(tool_choice: object) -> None:
    if tool_choice not in (None, "auto"):
        raise ConfigError(
            f"tool_choice is {tool_choice!r}, and the embedded model cannot be made to call a tool: leave it out"
        )


def _turns(messages: Sequence[BaseMessage]) -> list[Turn]:
    """The conversation in the form of the chat template."""
    turns: list[Turn] = []
    for message in messages:
        if isinstance(message, AIMessage):
            calls = [(call["name"], call["args"]) for call in message.tool_calls]
            turns.append(Turn("assistant", _text(message), calls))
        elif isinstance(message, ToolMessage):
            turns.append(Turn("tool", _text(message)))
        elif isinstance(message, HumanMessage):
            turns.append(Turn("user", _text(message)))
        elif not isinstance(message, SystemMessage):
            raise ConfigError(f"a {message.type} message is found, and human, ai, tool and system ones are understood")
    if not turns:
        raise ConfigError("no message is left for the model to answer; it needs at least one that is no system message")
    return turns


def _text(message: BaseMessage) -> str:
    content = cast("str | list[str | dict[str, Any]]", message.content)  # pyright: ignore[reportUnknownMemberType]
    if isinstance(content, str):
        return content
    blocks = [{"type": "text", "text": block} if isinstance(block, str) else block for block in content]
    others = {str(block.get("type")) for block in blocks} - {"text"}
    if others:
        raise ConfigError(
            f"a {message.type} message has content of type {', '.join(sorted(others))}; only text is read"
        )
    return "".join(block["text"] for block in blocks)


def _result(request: Request, completions: Sequence[Completion], *, logprobs: bool) -> ChatResult:
    generations = [
        _generation(request, completion, input_tokens=0 if i else len(request.prompt), logprobs=logprobs)
        for i, completion in enumerate(completions)
    ]
    return ChatResult(generations=generations, llm_output={"model_name": MODEL_NAME})


def _generation(request: Request, completion: Completion, *, input_tokens: int, logprobs: bool) -> ChatGeneration:
    thought, content, calls, invalid = _parse(completion.tokens)
    for stop in map(bytes.decode, request.stop):
        thought, content = thought.partition(stop)[0], content.partition(stop)[0]
    finish_reason = "tool_calls" if calls and completion.finish_reason == "stop" else completion.finish_reason
    metadata: dict[str, Any] = {
        "finish_reason": finish_reason,
        "model_name": MODEL_NAME,
        "model_provider": PROVIDER,
    }
    if logprobs:
        metadata["logprobs"] = {"content": _logprobs(completion)}
    output_tokens = len(completion.tokens)
    message = AIMessage(
        content=content,
        additional_kwargs={"reasoning_content": thought} if thought else {},
        tool_calls=calls,
        invalid_tool_calls=invalid,
        response_metadata=metadata,
        usage_metadata={
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "total_tokens": input_tokens + output_tokens,
        },
    )
    return ChatGeneration(message=message, generation_info={"finish_reason": finish_reason})


def _parse(tokens: Sequence[int]) -> tuple[str, str, list[ToolCall], list[InvalidToolCall]]:
    """Thought, content, tool calls and invalid tool calls of a response."""
    thought: list[int] = []
    content: list[int] = []
    written: list[list[int]] = []
    part = content
    for token in tokens:
        if token == v.THINK:
            part = thought
        elif token == v.CALL:
            written.append(part := [])
        elif token in (v.END_THINK, v.END_CALL):
            part = content
        elif not 256 <= token < 256 + len(v.CONTROL):
            part.append(token)
    calls: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    for text in map(v.decode, written):
        identity = f"call_{uuid.uuid4().hex[:24]}"
        try:
            call = _CALLS.decode(text)
        except msgspec.MsgspecError as error:
            invalid.append(invalid_tool_call(args=text, id=identity, error=str(error)))
        else:
            calls.append(tool_call(name=call.name, args=call.arguments, id=identity))
    return v.decode(thought), v.decode(content), calls, invalid


def _logprobs(completion: Completion) -> list[dict[str, Any]]:
    """The log-probabilities in OpenAI's form."""
    top = zip(completion.top_ids.tolist(), completion.top_logprobs.tolist(), strict=True)
    entries = _entries(completion.tokens, completion.logprobs.tolist())
    return [
        entry | {"top_logprobs": _entries(ids, logprobs)} for entry, (ids, logprobs) in zip(entries, top, strict=True)
    ]


def _entries(tokens: Sequence[int], logprobs: Sequence[float]) -> list[dict[str, Any]]:
    # One comprehension, because this makes 20 dictionaries per token.
    return [
        {"token": text, "bytes": utf8, "logprob": logprob}
        for (text, utf8), logprob in zip(map(_TOKENS.__getitem__, tokens), logprobs, strict=True)
    ]
