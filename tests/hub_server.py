"""A local server that speaks as much of a model hub's protocol as uploads need, and keeps what arrives."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """The hub: repositories with their files, objects by their SHA-256, and what it refuses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.refused: tuple[str, int] | None = None
        """What the path of a refused request ends with, and the status."""
        self.commits: list[str] = []

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Everything but the bytes of large files."""
        body, path = self._body(), self.path.partition("?")[0]
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        if self.server.refused and path.endswith(self.server.refused[0]):
            return self._answer(self.server.refused[1], {"error": "refused"})
        routes: dict[str, Callable[[str, bytes], None]] = {
            "/api/repos/create": self._create,
            "/api/validate-yaml": lambda _, __: self._answer(200, {"warnings": [], "errors": []}),
            "/preupload/main": self._preupload,
            "/info/lfs/objects/batch": self._batch,
            "/commit/main": self._commit,
        }
        for end, route in routes.items():
            if path.endswith(end):
                name = path.removesuffix(end).removesuffix(".git").removeprefix("/api/models").lstrip("/")
                return route(name, body)
        return self._answer(404, {"error": f"no such place {path}"})

    def do_PUT(self) -> None:
        """The bytes of a large file, whose SHA-256 is its name."""
        body, name = self._body(), self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != name:
            return self._answer(400, {"error": "other bytes than were announced"})
        self.server.objects[name] = body
        return self._answer(200, {})

    def _create(self, _: str, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        exists = name in self.server.repositories
        self.server.repositories.setdefault(name, {})
        answer = {"url": f"{self.server.endpoint}/{name}", "name": name, "id": name}
        self._answer(409 if exists else 200, answer | ({"error": "You already created this"} if exists else {}))

    def _preupload(self, name: str, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200 if name in self.server.repositories else 404, {"files": files})

    def _batch(self, _: str, body: bytes) -> None:
        objects: list[dict[str, Any]] = []
        for asked in json.loads(body)["objects"]:
            href = f"{self.server.endpoint}/objects/{asked['oid']}"
            wanted = {} if asked["oid"] in self.server.objects else {"actions": {"upload": {"href": href}}}
            objects.append({**asked, **wanted})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
        self.server.repositories[name].update(files)
        self.server.commits.append(name)
        self._answer(200, {"commitUrl": f"{self.server.endpoint}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
