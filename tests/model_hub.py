"""A stand-in for the part of the Hugging Face hub that models are uploaded to, refusals included, over real HTTP."""

import base64
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from hub_server import HubServer, serving_over_http

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class ModelHub:
    """`refusal`: (status, message) for every request to this path, or to one that ends with it."""

    token: str | None = None
    refusal: tuple[str, int, str] | None = None
    created: list[dict[str, object]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    """By repository and path."""
    commits: int = 0
    endpoint: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: object, **headers: str) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        hub, path = self.server.hub, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if hub.refusal is not None and path.endswith(hub.refusal[0]):
            self._answer(hub.refusal[1], {"error": hub.refusal[2]}, X_Error_Message=hub.refusal[2])
        elif hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid token")
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            hub.created.append(asked)
            self._answer(200, {"url": f"{hub.endpoint}/{asked.get('organization')}/{asked['name']}"})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            self._answer(200, {"files": modes})
        elif path.endswith("/commit/main"):
            repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    hub.files[f"{repository}/{entry['value']['path']}"] = content
            hub.commits += 1
            url = f"{hub.endpoint}/{repository}/commit/{COMMIT}"
            self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self._answer(404, {"error": f"no such thing: {path}"})


def serving(hub: ModelHub) -> AbstractContextManager[ModelHub]:
    """Serve a hub on a free local port."""
    return serving_over_http(hub, _Handler)
