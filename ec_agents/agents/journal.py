"""Where ``once`` records calls: beside the thread's checkpoints, or in a store.

A record is on disk when ``write`` returns: the ``put`` of checkpointers and stores commits. In a checkpointer, each
call has a namespace in the thread of the run: its record is deleted with the thread, and does not appear in the
history of the graph.
"""

import asyncio
import base64
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, Checkpoint
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.errors import GraphBubbleUp
from langgraph.store.base import BaseStore

from ec_agents.errors import ConfigError, StateError

NAMESPACE = "ec_once"
PATIENCE = 10.0
"""Seconds to wait for the checkpoint that holds a call, which LangGraph writes in the background."""


class Refused(ConfigError, GraphBubbleUp):
    """A ``ConfigError`` that ends the run: a ``ToolNode`` does not return it to the model."""


class NotRecorded(StateError, GraphBubbleUp):
    """A ``StateError`` that ends the run: a ``ToolNode`` does not return it to the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What the journal knows of one call."""

    status: Literal["started", "failed", "interrupted", "done"]
    """``interrupted``: the tool itself asked a person something, and waits."""
    args: Mapping[str, Any]
    started: str
    """Time of the last start, ISO 8601, UTC."""
    error: str | None = None
    """What a failed call raised."""
    result: Any = None
    """What a finished call returned."""
    used: int = 0
    """Answers to interrupts of this task that belong to earlier attempts."""
    asked: int | None = None
    """Answers to interrupts of this task that were there when the outcome was asked about; None: not asked yet."""

    @classmethod
    def start(cls, args: Mapping[str, Any], used: int) -> "Record":
        """The record of a call that starts now."""
        return cls(status="started", args=args, started=datetime.now(UTC).isoformat(timespec="seconds"), used=used)


@dataclass(frozen=True, slots=True)
class CheckpointJournal:
    """A journal in the thread's checkpointer.

    Args:
        saver: The checkpointer of the run.
        thread_id: The thread of the run.
        key: Identifies the call.
        held_by: Checkpoint id of the graph that makes the call and of each graph around it, by checkpoint namespace.
    """

    saver: BaseCheckpointSaver[Any]
    thread_id: str
    key: str
    held_by: Mapping[str, str]

    def read(self) -> Record | None:
        """Return the record of the call."""
        found = self.saver.get_tuple(self._config())
        return None if found is None else _decoded(self.saver.serde, found.checkpoint["channel_values"]["record"])

    async def aread(self) -> Record | None:
        """Return the record of the call."""
        found = await self.saver.aget_tuple(self._config())
        return None if found is None else _decoded(self.saver.serde, found.checkpoint["channel_values"]["record"])

    def write(self, record: Record) -> None:
        """Replace the record of the call."""
        checkpoint = self._checkpoint(record)
        self.saver.put(self._config(), checkpoint, _METADATA, checkpoint["channel_versions"])

    async def awrite(self, record: Record) -> None:
        """Replace the record of the call."""
        checkpoint = self._checkpoint(record)
        await self.saver.aput(self._config(), checkpoint, _METADATA, checkpoint["channel_versions"])

    def ensure_held(self) -> None:
        """Wait until the checkpoints that hold the call are written.

        Without them, a run that is killed would go on from before the call, and the model would make another one.
        """
        for namespace, checkpoint_id in self.held_by.items():
            for pause in _pauses(namespace):
                if self.saver.get_tuple(self._config(namespace, checkpoint_id)) is not None:
                    break
                time.sleep(pause)

    async def aensure_held(self) -> None:
        """Wait until the checkpoints that hold the call are written."""
        for namespace, checkpoint_id in self.held_by.items():
            for pause in _pauses(namespace):
                if await self.saver.aget_tuple(self._config(namespace, checkpoint_id)) is not None:
                    break
                await asyncio.sleep(pause)

    def _config(self, namespace: str | None = None, checkpoint_id: str | None = None) -> RunnableConfig:
        place = {"checkpoint_ns": f"{NAMESPACE}:{self.key}" if namespace is None else namespace}
        exact = {} if checkpoint_id is None else {"checkpoint_id": checkpoint_id}
        return {"configurable": {"thread_id": self.thread_id, **place, **exact}}

    def _checkpoint(self, record: Record) -> Checkpoint:
        """A checkpoint that replaces the last one of the call: one row per call.

        The record is a string, which checkpointers keep in the row itself rather than in a table that they only add to.
        """
        return {
            "v": 4,
            "id": self.key,
            "ts": datetime.now(UTC).isoformat(),
            "channel_values": {"record": _encoded(self.saver.serde, record)},
            "channel_versions": {"record": uuid.uuid4().hex},
            "versions_seen": {},
            "updated_channels": None,
        }


@dataclass(frozen=True, slots=True)
class StoreJournal:
    """A journal in a store, for graphs without a checkpointer.

    Args:
        store: The store of the run.
        key: Identifies the call.
    """

    store: BaseStore
    key: str

    def read(self) -> Record | None:
        """Return the record of the call."""
        found = self.store.get((NAMESPACE,), self.key)
        return None if found is None else _decoded(_SERDE, found.value["record"])

    async def aread(self) -> Record | None:
        """Return the record of the call."""
        found = await self.store.aget((NAMESPACE,), self.key)
        return None if found is None else _decoded(_SERDE, found.value["record"])

    def write(self, record: Record) -> None:
        """Replace the record of the call; it does not expire."""
        self.store.put((NAMESPACE,), self.key, {"record": _encoded(_SERDE, record)}, index=False, ttl=None)

    async def awrite(self, record: Record) -> None:
        """Replace the record of the call; it does not expire."""
        await self.store.aput((NAMESPACE,), self.key, {"record": _encoded(_SERDE, record)}, index=False, ttl=None)

    def ensure_held(self) -> None:
        """Return at once: the caller keeps the messages."""

    async def aensure_held(self) -> None:
        """Return at once: the caller keeps the messages."""


Journal = CheckpointJournal | StoreJournal

_SERDE = JsonPlusSerializer()
_METADATA: Any = {"source": "update", "step": 0, "parents": {}}


def _pauses(namespace: str) -> Iterator[float]:
    pause, end = 0.001, time.monotonic() + PATIENCE
    while time.monotonic() < end:
        yield pause
        pause = min(2 * pause, 0.25)
    graph = f"the sub-graph {namespace!r}" if namespace else "the graph"
    raise Refused(
        f"once() found no checkpoint of {graph} with this tool call within {PATIENCE:g} s, so a run that is killed "
        "would make the call again as a new one; compile a sub-graph without checkpointer=False"
    )


def _encoded(serde: SerializerProtocol, record: Record) -> str:
    """The record as text. Of a result that cannot be serialised its text is kept: the call is done either way."""
    try:
        kind, data = serde.dumps_typed(_fields(record))
    except Exception:  # noqa: BLE001 - whatever a serialiser raises at values of strange types
        kind, data = serde.dumps_typed(_fields(replace(record, result=_text(record.result))))
    return f"{kind}:{base64.b64encode(data).decode()}"


def _decoded(serde: SerializerProtocol, text: str) -> Record:
    kind, _, data = text.partition(":")
    return Record(**serde.loads_typed((kind, base64.b64decode(data))))


def _fields(record: Record) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _text(result: Any) -> str:
    return str(result.content if isinstance(result, ToolMessage) else result)
