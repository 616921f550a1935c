"""A chat model that answers from a script, with real-looking log-probabilities."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, ToolCall
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr

_SURE = [math.log(0.97), math.log(0.01), math.log(0.01), math.log(0.01)]
_UNSURE = [math.log(0.25)] * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One scripted answer."""

    content: str = ""
    """Text of the answer."""
    tool_calls: Sequence[tuple[str, Mapping[str, Any]]] = ()
    """Name and arguments of each tool call."""
    profile: str | None = "!..."
    """One character per token: ``!`` uncertain, anything else confident. None: no log-probabilities."""
    finish_reason: str | None = None
    """By default ``tool_calls`` or ``stop``."""
    delay: float = 0.0
    """Seconds before the answer; ``math.inf`` hangs until cancelled (asynchronous calls only)."""
    error: BaseException | None = None
    """Raised instead of answering."""

    def message(self) -> AIMessage:
        """The answer as a message, with log-probabilities in OpenAI's form and made-up usage."""
        calls = [
            ToolCall(name=name, args=dict(args), id=f"call_{i}", type="tool_call")
            for i, (name, args) in enumerate(self.tool_calls)
        ]
        metadata: dict[str, Any] = {"finish_reason": self.finish_reason or ("tool_calls" if calls else "stop")}
        if self.profile is not None:
            metadata["logprobs"] = profile_logprobs(self.profile)
        count = len(self.profile or "")
        usage = {"input_tokens": 10, "output_tokens": count, "total_tokens": 10 + count}
        return AIMessage(self.content, tool_calls=calls, response_metadata=metadata, usage_metadata=usage)


def profile_logprobs(profile: str) -> dict[str, Any]:
    """Log-probabilities in OpenAI's form: ``!`` is a token with four equal alternatives, anything else a sure one."""
    return {"content": [_entry(_UNSURE if character == "!" else _SURE) for character in profile]}


def _entry(logprobs: Sequence[float]) -> dict[str, Any]:
    alternatives = [
        {"token": token, "bytes": [ord(token)], "logprob": p} for token, p in zip("abcd", logprobs, strict=True)
    ]
    return {**alternatives[0], "top_logprobs": alternatives}


class ScriptedChatModel(BaseChatModel):
    """A chat model that gives the replies of a script in turn, one per call, and records what it was asked.

    Example:
        >>> from ec_agents.testing import Reply, ScriptedChatModel
        >>> ScriptedChatModel(replies=[Reply(content="hello")]).invoke("hi").content
        'hello'
    """

    model_config = ConfigDict(extra="forbid")

    replies: Sequence[Reply] = Field(default_factory=list[Reply])
    """The script. A call beyond its end raises ``IndexError``."""
    _requests: list[tuple[list[BaseMessage], dict[str, Any]]] = PrivateAttr(
        default_factory=list[tuple[list[BaseMessage], dict[str, Any]]]
    )

    @property
    def requests(self) -> list[tuple[list[BaseMessage], dict[str, Any]]]:
        """Messages and keyword arguments of each call so far; copies of the model share the list."""
        return self._requests

    @property
    def _llm_type(self) -> str:
        return "ec-agents-scripted"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools bound in OpenAI's form."""
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    def _next(self, messages: list[BaseMessage], options: dict[str, Any]) -> Reply:
        self._requests.append((messages, options))
        if len(self._requests) > len(self.replies):
            raise IndexError(f"the script has {len(self.replies)} replies; this is call {len(self._requests)}")
        return self.replies[len(self._requests) - 1]

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> ChatResult:
        reply = self._next(messages, {"stop": stop, **kwargs})
        time.sleep(reply.delay)
        return _result(reply)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> ChatResult:
        reply = self._next(messages, {"stop": stop, **kwargs})
        if math.isinf(reply.delay):
            await asyncio.Event().wait()
        await asyncio.sleep(reply.delay)
        return _result(reply)


def _result(reply: Reply) -> ChatResult:
    if reply.error is not None:
        raise reply.error
    return ChatResult(generations=[ChatGeneration(message=reply.message())])
