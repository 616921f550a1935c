"""What the chat models of the package share: copies with another class, and streams of one chunk."""

from collections.abc import AsyncIterator, Iterable, Iterator
from difflib import get_close_matches
from typing import Any, TypeVar, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import BaseModel

_Model = TypeVar("_Model", bound=BaseChatModel)


def copy_as(model: _Model, kind: type[BaseChatModel], **fields: Any) -> _Model:
    """Copy a chat model, with other fields and as an instance of a subclass of its class.

    Building the subclass anew would run the model's validators and open its clients again; pydantic forbids to set
    ``__class__``, hence ``object.__setattr__``.
    """
    copy = model.model_copy(update=fields)
    object.__setattr__(copy, "__class__", kind)
    return copy


def unknown_argument(cls: type[BaseModel], names: Iterable[str]) -> str | None:
    """Name an argument that the class does not have, with the one that was probably meant; None if it has all."""
    known = {name for key, field in cls.model_fields.items() for name in (key, field.alias) if name}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            return f"{cls.__name__} has no argument {name!r}; " + (f"did you mean {near[0]!r}? " if near else "")
    return None


class OneChunkModel(BaseChatModel):
    """A chat model that streams its whole answer as one chunk."""

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        chunk = _chunk(self._generate(messages, stop, run_manager, **kwargs))
        if run_manager:
            run_manager.on_llm_new_token(str(chunk.text), chunk=chunk)
        yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        chunk = _chunk(await self._agenerate(messages, stop, run_manager, **kwargs))
        if run_manager:
            await run_manager.on_llm_new_token(str(chunk.text), chunk=chunk)
        yield chunk


def _chunk(result: ChatResult) -> ChatGenerationChunk:
    """The first answer as a stream of one chunk."""
    message = cast("AIMessage", result.generations[0].message)
    fields = {name: getattr(message, name) for name in type(message).model_fields if name != "type"}
    return ChatGenerationChunk(message=AIMessageChunk(**fields, chunk_position="last"))
