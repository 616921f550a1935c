"""Write files so that a crash, a full disk or a bad path never damages what was there."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, cast

from ec_agents.errors import WriteError


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Generator[IO[Any]]:
    """Open a file that takes the place of ``path`` when the block ends without an exception.

    The content goes to a temporary file in the same folder, is flushed to disk and renamed, so that readers see the old
    content or the new one. A new file can be read by its owner only; an existing one keeps its mode. Text is UTF-8 with
    unchanged line ends; half a surrogate pair becomes a question mark.

    Args:
        path: The file; a symbolic link is followed.
        mode: ``"w"`` for text, ``"wb"`` for bytes.

    Raises:
        WriteError: The folder is missing or read-only, the disk is full, or ``path`` is a folder.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "errors": "replace", "newline": ""}
    with explained(path):
        target = Path(path).resolve()
        if target.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        options: dict[str, Any] = {"dir": target.parent, "prefix": ".tmp-", "delete": False, **text}
        file = cast("IO[Any]", NamedTemporaryFile(mode, **options))  # noqa: SIM115 - closed before it is renamed
    written = Path(file.name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            written.chmod(target.stat().st_mode & 0o777)
        written.replace(target)
    except BaseException as error:
        written.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in {None, str(written)}:
            raise WriteError.of(path, error) from error
        raise


@contextmanager
def explained(path: str | Path) -> Generator[None]:
    """Turn an error of the system into one line that names the file.

    Raises:
        WriteError: The block raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise WriteError.of(path, error) from error


def replace_text(path: str | Path, text: str) -> None:
    """Write a text file in one piece; see ``replacing``."""
    with replacing(path) as file:
        file.write(text)


def make_folder(path: str | Path) -> None:
    """Make a folder, with its parents, unless it exists.

    Raises:
        WriteError: It cannot be made.
    """
    with explained(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def private(path: str, flags: int) -> int:
    """Open a file for its owner only; an ``opener`` for ``open``."""
    return os.open(path, flags, 0o600)
