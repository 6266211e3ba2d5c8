"""A small stand-in for the Hugging Face hub: one data set over real HTTP, and the ways in which a hub fails."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`refusal`: (status, X-Error-Code) for every request. `cut_at`: bytes after which a download breaks off
    (`stall`: hangs instead), as long as `cuts` lasts."""

    repo_id: str
    files: dict[str, bytes]
    refusal: tuple[int, str] | None = None
    announced: dict[str, bytes] = field(default_factory=dict)
    cut_at: int = 0
    cuts: int = 0
    stall: bool = False
    ended: Event = field(default_factory=Event)
    downloads: list[tuple[str, str | None]] = field(default_factory=list)
    """(file, Range header) of every download that was asked for."""
    endpoint: str = ""


class HubServer(ThreadingHTTPServer):
    daemon_threads = True
    hub: Any


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_: object) -> None:
        pass

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"X-Error-Code": code}, b"{}")

    def _answer(self, status: int, headers: dict[str, str], body: bytes, announced_length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if announced_length is None else announced_length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        info, files = f"/api/datasets/{self.hub.repo_id}", f"/datasets/{self.hub.repo_id}/resolve/{COMMIT}/"
        path = self.path.split("?")[0]
        if self.hub.refusal is not None:
            self._refuse(*self.hub.refusal)
        elif path in (f"{info}/revision/main", info):
            self._answer(200, {"Content-Type": "application/json"}, json.dumps(self._info()).encode())
        elif path.startswith(f"{info}/revision/"):
            self._refuse(404, "RevisionNotFound")
        elif path.startswith(files) and path.removeprefix(files) in self.hub.files:
            self._file(path.removeprefix(files))
        else:
            self._refuse(404, "EntryNotFound" if path.startswith(files) else "RepoNotFound")

    def _info(self) -> dict[str, object]:
        siblings = []
        for name, content in {**self.hub.files, **self.hub.announced}.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": "b"}
            if name.endswith(".jsonl"):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": self.hub.repo_id, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    def _file(self, name: str) -> None:
        whole = self.hub.files[name]
        headers = {"ETag": f'"{hashlib.sha256(whole).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.command == "HEAD":
            self._answer(200, headers, whole)
            return
        wanted = self.headers.get("Range")
        self.hub.downloads.append((name, wanted))
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        body = whole[start:]
        if self.hub.cuts and start < self.hub.cut_at < len(whole):
            self.hub.cuts -= 1
            self._answer(206 if start else 200, headers, body[: self.hub.cut_at - start], announced_length=len(body))
            self.wfile.flush()
            if self.hub.stall:
                self.hub.ended.wait()
            self.close_connection = True
        else:
            self._answer(206 if start else 200, headers, body)


@contextmanager
def serving_over_http(hub: Any, handler: type[BaseHTTPRequestHandler]) -> Iterator[Any]:
    """Serve a hub on a free local port; the handler finds it as `server.hub`, the hub its address as `endpoint`."""
    server = HubServer(("127.0.0.1", 0), handler)
    server.hub = hub
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free local port."""
    with serving_over_http(hub, Handler):
        try:
            yield hub
        finally:
            hub.ended.set()
