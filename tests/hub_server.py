"""A hub on this machine, which speaks as much of the protocol of the Hugging Face hub as its client needs.

Repositories are folders: `models/someone/tiny`, `datasets/someone/rows`. Commits of clients are written to them.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub_cache import COMMIT

NOT_FOUND = {"X-Error-Code": "RepoNotFound"}


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.asked = root, list[str]()
        self.commits: list[dict[str, bytes]] = []
        """Path -> content, of each commit."""

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that uses this hub and has nothing in its cache."""
        address = f"http://127.0.0.1:{self.server_address[1]}"
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": address, "HF_HOME": str(self.root / "cache"), "NO_PROXY": "127.0.0.1", **switches}


@contextmanager
def hub_at(root: Path) -> Iterator[HubServer]:
    with HubServer(root) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *words: Any) -> None:
        """Nothing: the paths are in `server.asked`."""

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            folder = self.server.root / "models" / name
            folder.mkdir(parents=True, exist_ok=True)
            self._say(200, {"url": self._address(folder), "name": name, "id": "1"})
        elif "/preupload/" in path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **how} for file in json.loads(body)["files"]]
            self._say(200, {"files": files, "commitOid": COMMIT})
        elif "/commit/" in path:
            folder, _ = self._folder(path.removeprefix("/api/"))
            self._commit(folder, body)
            self._say(
                200, {"commitUrl": f"{self._address(folder)}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        elif path == "/api/validate-yaml":
            self._say(200, {"errors": [], "warnings": []})
        else:
            self._say(404, {"error": path})

    def _address(self, folder: Path) -> str:
        return f"{self.server.environment['HF_ENDPOINT']}/{folder.parent.name}/{folder.name}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _get(self) -> None:
        path = self._path()
        if not path.startswith("/api/"):
            self._file(path)
            return
        folder, rest = self._folder(path.removeprefix("/api/"))
        if not folder.is_dir():
            self._say(404, {"error": "Repository not found"}, NOT_FOUND)
        elif rest[:1] == ["tree"]:
            is_deep = "recursive=true" in urlsplit(self.path).query.lower()
            listed = self._listed(folder, "/".join(rest[2:]), is_deep=is_deep)
            if listed or len(rest) < 3:
                self._say(200, listed)
            else:
                self._say(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        else:
            siblings = [{"rfilename": file["path"]} for file in self._listed(folder) if file["type"] == "file"]
            name = "/".join(folder.parts[-2:])
            self._say(200, {"id": name, "_id": "1", "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def _file(self, path: str) -> None:
        kind = "" if path.startswith("/datasets/") else "models/"
        folder, rest = self._folder(kind + path[1:])
        file = folder.joinpath(*rest[2:])
        if not folder.is_dir():
            self._say(404, b"", NOT_FOUND)
        elif not file.is_file():
            self._say(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            content = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            if first and self.command == "GET":
                end = min(int(last or len(content) - 1) + 1, len(content))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                self._say(206, content[int(first) : end], headers)
            else:
                self._say(200, content, {**headers, "Accept-Ranges": "bytes"})

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        return path

    def _folder(self, path: str) -> tuple[Path, list[str]]:
        """(the folder of a repository, the rest of the path)."""
        kind, owner, name, *rest = [*path.split("/"), "", ""]
        return self.server.root / kind / owner / name, [part for part in rest if part]

    def _listed(self, folder: Path, below: str = "", *, is_deep: bool = True) -> list[dict[str, Any]]:
        found = []
        for path in sorted(folder.joinpath(below).rglob("*") if is_deep else folder.joinpath(below).glob("*")):
            content = path.read_bytes() if path.is_file() else b""
            kind, digest = "file" if path.is_file() else "directory", hashlib.sha1(content).hexdigest()
            found.append({"type": kind, "path": str(path.relative_to(folder)), "size": len(content), "oid": digest})
        return found

    def _commit(self, folder: Path, body: bytes) -> None:
        lines = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
        files = {line["path"]: base64.b64decode(line["content"]) for line in lines}
        self.server.commits.append(files)
        for path, content in files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def _say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
