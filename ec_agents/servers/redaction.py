"""Keep keys out of whatever leaves the process: messages of errors end in traces, checkpoints, spans and outcomes.

Servers echo the key that they refuse. Every key that is known here is replaced: of the model (arguments, headers,
clients) and of the environment.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from pydantic import SecretStr

HIDDEN = "**********"
"""Stands in place of a key, as pydantic writes it."""

_SHORTEST = 8
"""Characters; whatever is shorter, such as the placeholder ``none``, is not a key."""
_NAMES = re.compile(r"(api[-_]?key|token|secret|password|authorization|credential|cookie)s?$", re.IGNORECASE)
"""Names of headers and environment variables that hold keys."""
_CLIENTS = ("async_client", "client", "root_async_client", "root_client")


def sdk_clients(model: object) -> list[Any]:
    """Return the clients of the OpenAI SDK that a chat model sends through, the asynchronous one first."""
    parts = [getattr(model, name, None) for name in _CLIENTS]
    clients = [getattr(part, "_client", part) for part in parts]
    return [client for client in clients if hasattr(client, "base_url")]


def secrets_of(model: object) -> list[str]:
    """Collect the keys that a model and the environment hold, the longest first."""
    private: Mapping[str, Any] = getattr(model, "__pydantic_private__", None) or {}
    holders: list[Mapping[str, Any]] = [getattr(model, "__dict__", {}), private, os.environ]
    holders += [client_keys(client) for client in sdk_clients(model)]
    found = {part for holder in holders for key in _keys(holder) for part in (key, *key.split())}
    return sorted((key for key in found if len(key) >= _SHORTEST), key=len, reverse=True)


def client_keys(client: object) -> dict[str, Any]:
    """Return the key and the headers of a client of the OpenAI SDK."""
    return {"api_key": getattr(client, "api_key", None), "headers": getattr(client, "_custom_headers", {})}


def _keys(holder: Mapping[str, Any]) -> Iterable[str]:
    for name, value in list(holder.items()):
        if isinstance(value, SecretStr):
            yield value.get_secret_value()
        elif isinstance(value, Mapping):
            yield from _keys(cast("Mapping[str, Any]", value))
        elif isinstance(value, str) and _NAMES.search(str(name)):
            yield value


def redacted(value: Any, secrets: Iterable[str]) -> Any:
    """Replace the secrets in a text, or in the texts of a JSON value."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return value
    if isinstance(value, dict):
        fields = cast("dict[Any, Any]", value).items()
        return {redacted(name, secrets): redacted(item, secrets) for name, item in fields}
    if isinstance(value, list | tuple):
        items = [redacted(item, secrets) for item in cast("list[Any]", value)]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def hide_secrets(error: BaseException, model: object) -> None:
    """Replace the model's keys in an error, in its causes and in its members, in place."""
    secrets, seen, waiting = secrets_of(model), set[int](), [error]
    while waiting:
        found: Any = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        _hide(found, secrets)
        waiting += [found.__cause__, found.__context__, *getattr(found, "exceptions", ())]


def _hide(error: Any, secrets: list[str]) -> None:
    for name in ("args", "message", "body", "__notes__"):
        value = getattr(error, name, None)
        if value and (hidden := redacted(value, secrets)) != value:
            try:
                setattr(error, name, hidden)
            except AttributeError:  # an exception group computes its message
                continue
    response: Any = getattr(error, "response", None)
    if isinstance(content := getattr(response, "_content", None), bytes):  # LangChain copies it into the run
        response._content = redacted(content.decode(errors="replace"), secrets).encode()  # noqa: SLF001 - see above
