"""Every exception of the package.

```
EcAgentsError
├── ConfigError (also ValueError)     an argument is out of range
├── LogprobsError
│   ├── UnsupportedLogprobs           this model or mode cannot return them; the message names the remedy
│   ├── LogprobsMissing               the response carries none
│   └── LogprobsMalformed             the payload is not what the provider documents
│       └── ResponseTooLarge          the response exceeds a limit on its size, nesting or number of choices
├── RedirectRefused                   the server redirects the request to another host
├── ServerError                       the server reported an error inside a successful response; .status_code
├── ActionError                       an answer, or a server, does not follow the JSON form of actions
├── SamplingError                     fewer than min_candidates succeeded; .failures holds each
├── FailedCall                        a failed call of a step, as read back from a checkpoint
├── BudgetExceeded                    what was spent reached a limit of a Budget; .limit
├── SelectionError                    nothing could be scored and the policy is to raise
├── StateError                        a checkpoint holds candidates that this version cannot read, or a journal fails
├── TraceError                        a trace cannot be read or written; .path, .line
└── WriteError                        another file cannot be written; .path
```
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Self


class EcAgentsError(Exception):
    """Base of every error that the package raises on purpose."""


class ConfigError(EcAgentsError, ValueError):
    """An argument is out of range or does not fit the others."""


class LogprobsError(EcAgentsError):
    """Log-probabilities that are not there or not usable."""


class UnsupportedLogprobs(LogprobsError):
    """This model, server or mode cannot return log-probabilities."""


class LogprobsMissing(LogprobsError):
    """The response carries no log-probabilities."""


class LogprobsMalformed(LogprobsError):
    """The log-probabilities are not in the documented form."""


class ServerError(EcAgentsError):
    """The server reported an error inside a response with status 200; it is retried as that error would be."""

    status_code: int | None
    """The HTTP status that the error stands for; None if the server does not say."""
    code: str | None
    """The server's name or number of the error."""

    def __init__(self, message: str, status_code: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code


class ResponseTooLarge(LogprobsMalformed):
    """The response exceeds a limit on its size, its nesting or its number of choices."""


class RedirectRefused(EcAgentsError):
    """The server redirects the request, with the prompt and the key, to another host."""


class ActionError(EcAgentsError):
    """An answer, or a server, does not follow the JSON form of actions."""


class SamplingError(EcAgentsError):
    """Fewer than ``min_candidates`` calls succeeded."""

    failures: Mapping[int, BaseException]
    """What each failed call raised, keyed by candidate index."""

    def __init__(self, message: str, failures: Mapping[int, BaseException]) -> None:
        super().__init__(message)
        self.failures = failures


class BudgetExceeded(EcAgentsError):
    """A ``Budget`` allows no further call."""

    limit: str
    """Name of the limit: ``tokens``, ``cost``, ``seconds`` or ``calls``."""

    def __init__(self, message: str, limit: str) -> None:
        super().__init__(message)
        self.limit = limit


class FailedCall(EcAgentsError):
    """A failed call of a step, as read back from a checkpoint; its text says what was raised."""


class SelectionError(EcAgentsError):
    """No candidate could be scored, and the fallback is to raise."""


class StateError(EcAgentsError):
    """A checkpoint holds candidates that this version cannot read, or the journal of ``once`` fails."""


class TraceError(EcAgentsError):
    """A trace, or a file of responses, cannot be read or written."""

    path: Path
    """The file."""
    line: int | None
    """Number of the record from 1; in files of lines, the line. None: the file as a whole."""

    def __init__(self, message: str, path: str | Path, line: int | None = None) -> None:
        super().__init__(message)
        self.path = Path(path)
        self.line = line


class WriteError(EcAgentsError):
    """A file cannot be written: the disk is full, or its folder is missing or read-only."""

    path: Path
    """The file."""

    def __init__(self, message: str, path: str | Path) -> None:
        super().__init__(message)
        self.path = Path(path)

    @classmethod
    def of(cls, path: str | Path, error: OSError) -> Self:
        """What the system said about a file, in one line."""
        return cls(f"{path} cannot be written: {error.strerror or error}", path)
