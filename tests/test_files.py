"""Files are replaced as a whole, belong to their owner, and fail in one line."""

import errno
import os
from pathlib import Path

import pytest

from ec_agents.errors import WriteError
from ec_agents.files import explained, make_folder, replace_text, replacing


def test_new_private_existing_mode(tmp_path: Path):
    """A new file is readable by its owner only; an existing one keeps its mode."""
    path = tmp_path / "a.json"
    replace_text(path, "one\r\n")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"one\r\n", 0o600)
    path.chmod(0o644)
    replace_text(path, "two")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("two", 0o644)


def test_links_are_followed(tmp_path: Path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    replace_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_interrupted_block(tmp_path: Path, error: BaseException):
    """An exception in the middle leaves the old content and nothing else."""
    path = tmp_path / "a.txt"
    path.write_text("precious")

    def write() -> None:
        with replacing(path) as file:
            file.write("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The old content survives, and the error is one line that names the file."""
    path = tmp_path / "a.txt"
    path.write_text("precious")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError) as found:
        replace_text(path, "new")
    assert str(found.value) == f"{path} cannot be written: No space left on device"
    assert found.value.path == path
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing/a.txt", "No such file or directory"), ("file/a.txt", "Not a directory"), ("folder", "it is a folder")],
)
def test_bad_paths(tmp_path: Path, name: str, reason: str):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=f"{name} cannot be written: {reason}"):
        replace_text(tmp_path / name, "x")


def test_folders(tmp_path: Path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file/a cannot be written: Not a directory"):
        make_folder(tmp_path / "file" / "a")


def test_errors_of_others_pass(tmp_path: Path):
    """An error about another file, raised in the block, is not blamed on this one."""
    with pytest.raises(FileNotFoundError, match="nowhere"), replacing(tmp_path / "a.txt") as file:
        file.write(Path("nowhere").read_text())
    with pytest.raises(ValueError, match="x"), explained("a"):
        raise ValueError("x")
