"""Runs one untrusted program. Started by ``python_tests`` as a process of its own, without the package."""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x00020000  # user, network, process and mount namespaces
_READ_ONLY = 1
_DIE_WITH_PARENT = 1
_MOUNT_SETATTR = 442  # of every architecture, since Linux 5.12


def main() -> None:
    """Read the order, give up every right, run the program, and write the token if its end is reached."""
    order: dict[str, Any] = json.load(sys.stdin)
    report = os.dup(1)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    missing = isolate(order["folder"])
    child = os.fork() if hasattr(os, "fork") else 0
    if child:
        os.close(report)

        def kill(number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a handler
            os.kill(child, signal.SIGKILL)

        signal.signal(signal.SIGALRM, kill)
        signal.setitimer(signal.ITIMER_REAL, order["seconds"])
        os.waitpid(child, 0)
        return
    if not missing:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    missing += limit(order)
    os.write(report, ", ".join(missing).encode() + b"\n")
    exec(compile(order["source"], "answer", "exec"), {"__name__": "answer"})  # noqa: S102 - what it is for
    os.write(report, order["token"].encode())
    os._exit(0)


def isolate(folder: str) -> list[str]:
    """Leave the network and make every file system read-only, except the folder; return what cannot be done."""
    if not sys.platform.startswith("linux"):
        return ["it can reach the network", "it can write to your files"]
    libc = ctypes.CDLL(None, use_errno=True)
    ids = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    if libc.unshare(_NEW_NAMESPACES):
        return ["it can reach the network", "it can write to your files"]
    for name, text in ids.items():  # a file system of its own takes files only from users with a name
        Path(f"/proc/self/{name}").write_text(text, encoding="ascii")
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 1 << 18, 0)  # set, clear, MS_PRIVATE, no user namespace
    recursive = 0x8000
    if libc.syscall(_MOUNT_SETATTR, -100, b"/", recursive, attributes, 32):
        return ["it can write to your files"]
    if libc.mount(b"none", folder.encode(), b"tmpfs", 0, b"size=64m"):
        return ["it has no folder of its own"]
    os.chdir(folder)
    return []


def limit(order: dict[str, Any]) -> list[str]:
    """Limit processor time, memory, files and processes; return what cannot be done."""
    try:
        import resource  # noqa: PLC0415 - Unix only
    except ImportError:
        return ["its memory is not limited"]
    seconds = max(1, round(order["seconds"]))
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: order["memory"],
        resource.RLIMIT_FSIZE: order["file"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    return []


if __name__ == "__main__":
    main()
