"""A small Hub on the loopback interface: it takes what huggingface_hub sends, and keeps it byte by byte.

The paths and the JSON are those of https://huggingface.co/docs/hub/api and of Git LFS's batch API.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

LARGE = (".safetensors", ".onnx")
"""Files that the Hub stores outside of Git."""


@dataclass
class Hub:
    """What has arrived. refuse: the status and the message with which a path that matches the pattern is answered."""

    endpoint: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Visibility and files of each, by name."""
    branches: list[str] = field(default_factory=list)
    committed: dict[str, bytes] = field(default_factory=dict)
    """The files of the commits, by `REPOSITORY@REVISION/PATH`."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Authorization of each."""
    agents: set[str] = field(default_factory=set)
    """What the client says about itself when it speaks to the API."""
    objects: dict[str, bytes] = field(default_factory=dict)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)

    def methods(self) -> set[str]:
        return {method for method, _, _ in self.requests}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def taken(self) -> tuple[str, bytes] | None:
        """The path and the body of a request; None when it was refused."""
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, path, self.headers.get("Authorization", "")))
        if path.startswith("/api/"):
            self.hub.agents.add(self.headers["User-Agent"])
        for pattern, (status, message) in self.hub.refuse.items():
            if re.search(pattern, path):
                self.answer({"error": message}, status, X_Error_Message=message)
                return None
        return path, body

    def do_GET(self) -> None:
        if (taken := self.taken()) is None:
            return
        name = taken[0].removeprefix("/api/models/")
        found = self.hub.repositories.get(name)
        if found is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        siblings = [{"rfilename": file} for file in found["files"]]
        self.answer(
            {"id": name, "private": found["private"], "siblings": siblings, "tags": [], "sha": "0" * 40}
        )

    def do_PUT(self) -> None:
        if (taken := self.taken()) is None:
            return
        oid = taken[0].removeprefix("/lfs/")
        assert hashlib.sha256(taken[1]).hexdigest() == oid
        self.hub.objects[oid] = taken[1]
        self.answer({})

    def do_POST(self) -> None:
        if (taken := self.taken()) is None:
            return
        path, body = taken
        if path.endswith("/commit/" + path.rpartition("/")[2]):
            self.commit(path, body)
            return
        given: Any = json.loads(body)
        if path == "/api/repos/create":
            name = f"{given['organization']}/{given['name']}"
            private = given.get("private", given.get("visibility") == "private")
            self.hub.repositories[name] = {"private": private, "files": []}
            self.answer({"url": f"{self.hub.endpoint}/{name}"})
        elif path == "/api/validate-yaml":
            yaml.safe_load(given["content"].split("---\n")[1])
            self.answer({"errors": [], "warnings": []})
        elif "/branch/" in path:
            self.hub.branches.append(path.rpartition("/")[2])
            self.answer({})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in given["files"]
            ]
            self.answer({"files": modes})
        else:
            assert path.endswith(".git/info/lfs/objects/batch"), path
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}}}
                for each in given["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})

    def commit(self, path: str, body: bytes) -> None:
        """Lines of JSON: a header, small files in base64, and large ones by their SHA-256."""
        repository, _, revision = path.removeprefix("/api/models/").partition("/commit/")
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                assert value["encoding"] == "base64"
                content = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]]
            else:
                assert entry["key"] == "header", entry
                continue
            self.hub.committed[f"{repository}@{revision}/{value['path']}"] = content
        url = f"{self.hub.endpoint}/{repository}/commit/{'1' * 40}"
        self.answer({"commitUrl": url, "commitOid": "1" * 40, "pullRequestUrl": ""})


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that listens on a free port until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
