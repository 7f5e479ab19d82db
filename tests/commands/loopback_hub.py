"""A hub on this machine: what `huggingface_hub` asks of one when it makes a repository and uploads a folder.

Small files come in the commit itself; large ones, here the safetensors, are put beside it first by the protocol of Git
LFS, and the commit names them by their SHA-256, which is compared with what arrived.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_loopbackSecret"


@dataclass
class Hub:
    """What a hub was asked, and has now; `refuses` is what it answers to whoever writes."""

    url: str = ""
    refuses: tuple[int, str] | None = None
    public: bool = False  # whether the repository is there already
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> what it was made with
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})  # branch -> path -> content
    objects: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> large file
    cards: list[str] = field(default_factory=list)  # that were validated


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *words: object) -> None: ...

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if name in self.hub.repositories or self.hub.public:
            self._answer({"id": name, "private": not self.hub.public})
        else:
            self._answer({"error": "Repository not found"}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/large/")
        self.hub.objects[self.path.removeprefix("/large/")] = content
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if not self._allowed():
            return
        if self.hub.refuses is not None and self.path != "/api/validate-yaml":
            code, message = self.hub.refuses
            self._answer({"error": message.format(token=self.headers["Authorization"])}, code)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.hub.cards.append(json.loads(body)["content"])
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], **_how(file["path"])} for file in json.loads(body)["files"]]
            self._answer({"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._upload(each) for each in json.loads(body)["objects"]]})
        elif "/branch/" in self.path:
            self.hub.branches[self.path.rpartition("/")[2]] = {}
            self._answer({})
        else:
            self._commit(body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or 'somebody'}/{asked['name']}"
        self.hub.repositories[name] = asked
        self._answer({"url": f"{self.hub.url}/{name}", "name": name}, 409 if self.hub.public else 200)

    def _upload(self, each: dict[str, Any]) -> dict[str, Any]:
        return each | {"actions": {"upload": {"href": f"{self.hub.url}/large/{each['oid']}"}}}

    def _commit(self, body: bytes) -> None:
        branch = self.hub.branches[self.path.partition("/commit/")[2]]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                branch[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                branch[value["path"]] = self.hub.objects[value["oid"]]
        self._answer({"commitUrl": f"{self.hub.url}/somebody/x/commit/{'0' * 40}", "commitOid": "0" * 40})

    def _allowed(self) -> bool:
        if self.headers["Authorization"] == f"Bearer {TOKEN}":
            return True
        self._answer({"error": "Invalid username or password."}, 401)
        return False

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, told: dict[str, Any], code: int = 200) -> None:
        content = json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _how(path: str) -> dict[str, Any]:
    return {"uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}


@contextmanager
def loopback_hub(**how: Any) -> Iterator[Hub]:
    """A hub that answers at its `url` inside."""
    hub = Hub(**how)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
