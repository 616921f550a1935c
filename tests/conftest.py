"""Shared by all tests: nothing outside this machine can be reached."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tests run in parallel processes, each with one thread
# No test uses TLS, and every new client would read all certificates of the machine (30 ms): a folder that has none.
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)
os.environ.pop("SSL_CERT_FILE", None)

settings.register_profile("any-machine", deadline=None)  # a busy machine is no failure
settings.load_profile("any-machine")


def pytest_configure(config: pytest.Config) -> None:
    """Switch off the timing of pytest-benchmark, which langchain-tests brings along; its fixture is needed."""
    config.option.benchmark_disable = True


_LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def no_verdicts() -> None:
    """Forget what other tests' servers, perhaps on the same port, showed about themselves."""
    from ec_agents.servers.providers import forget_verdicts  # noqa: PLC0415 - numpy reads the environment when it is imported

    forget_verdicts()


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to anything but this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
