"""A stand-in for the hub's HTTP interface: as much of it as its client needs to push and pull."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t" * 34


class StandIn(ThreadingHTTPServer):
    """Repositories in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        """Object ids in the order in which their bytes came."""
        self.fail_uploads_after: int | None = None
        self.one_at_a_time = threading.Lock()  # the client sends several files at once
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Serve until the end of the block."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, value: Any = None, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, header in headers.items():
            self.send_header(name.replace("_", "-"), header)
        if not isinstance(value, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def path_parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        content, parts = self.body(), self.path_parts()
        if not self.authorised():
            self.reply(401, {"error": "Invalid username or password."})
        elif parts == ["api", "validate-yaml"]:
            self.reply(200, {"errors": [], "warnings": []})
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(content))
        elif parts[-3:] == ["info", "lfs", "objects"] or parts[-1] == "batch":
            self.batch(json.loads(content))
        elif "preupload" in parts:
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".bin")) else "regular"}
                for f in json.loads(content)["files"]
            ]  # fmt: skip
            self.reply(200, {"files": files})
        elif "commit" in parts:
            self.commit("/".join(parts[2:4]), content)
        else:
            self.reply(404, {"error": f"{self.path} is not here"})

    def create(self, wanted: dict[str, Any]) -> None:
        name = "/".join(part for part in (wanted.get("organization"), wanted["name"]) if part)
        name = name if "/" in name else f"user/{name}"
        url = f"{self.server.address}/{name}"
        if name in self.server.repositories:
            self.reply(409, {"error": "You already created this model repo", "url": url})
            return
        self.server.repositories[name] = {}
        self.server.private[name] = "private" in (
            wanted.get("visibility"),
            wanted.get("private") and "private",
        )
        self.reply(200, {"url": url, "name": name})

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for entry in wanted["objects"]:
            known = entry["oid"] in self.server.objects
            upload = {"upload": {"href": f"{self.server.address}/lfs/{entry['oid']}"}}
            objects.append({**entry, **({} if known else {"actions": upload})})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, content: bytes) -> None:
        files = self.server.repositories[name]
        for line in content.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        sha = self.sha(name)
        url = f"{self.server.address}/{name}/commit/{sha}"
        self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def sha(self, name: str) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for path, content in sorted(self.server.repositories[name].items()):
            digest.update(path.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def do_PUT(self) -> None:
        content = self.body()
        oid = self.path_parts()[1]
        assert hashlib.sha256(content).hexdigest() == oid
        with self.server.one_at_a_time:
            limit = self.server.fail_uploads_after
            accepted = limit is None or len(self.server.uploads) < limit
            if accepted:
                self.server.objects[oid] = content
                self.server.uploads.append(oid)
        if accepted:
            self.reply(200, b"")
        else:
            self.reply(400, {"error": "storage is on fire"})

    def do_GET(self) -> None:
        parts = self.path_parts()
        if parts == ["api", "whoami-v2"]:
            if self.authorised():
                self.reply(200, {"type": "user", "name": "user", "orgs": [{"name": "team"}]})
            else:
                self.reply(401, {"error": "Invalid credentials in Authorization header"})
            return
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repositories.get(name)
        if files is None or (self.server.private[name] and not self.authorised()):
            self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif parts[0] == "api" and parts[4] == "tree":
            self.reply(200, [
                {"type": "file", "path": path, "size": len(content),
                 "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest()}
                for path, content in files.items()
            ])  # fmt: skip
        elif parts[0] == "api":
            self.reply(200, {
                "_id": "0", "id": name, "modelId": name, "sha": self.sha(name),
                "private": self.server.private[name], "tags": [], "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": path} for path in files],
            })  # fmt: skip
        else:
            self.resolve(name, files, "/".join(parts[4:]))

    do_HEAD = do_GET

    def resolve(self, name: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        etag = hashlib.sha256(files[path]).hexdigest()
        self.reply(200, files[path], ETag=f'"{etag}"', X_Repo_Commit=self.sha(name))
