"""A small hub on the loopback interface: enough of the protocol for models and datasets to be listed and downloaded.

Serves folders. Keeps a log of what was asked for, so that a test can say what was never fetched.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """A hub of folders.

    models, datasets: repositories by id. failing: id -> (status, X-Error-Code) that every request for it is answered
    with; gated: ids of which the listing is public and no file is. silent: ids that never get an answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.models: dict[str, Path] = {}
        self.datasets: dict[str, Path] = {}
        self.failing: dict[str, tuple[int, str]] = {}
        self.gated: set[str] = set()
        self.silent: set[str] = set()
        self.log: list[str] = []
        self.closing = threading.Event()

    def downloads(self) -> set[str]:
        """Names of the files whose content was fetched."""
        return {line.rsplit("/", 1)[1] for line in self.log if line.startswith("GET") and "/resolve/" in line}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.0"  # a connection a request: nothing outlives the server

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.log.append(f"{self.command} /{'/'.join(parts)}")
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        folder = getattr(self.hub, kind).get(repo_id)
        if repo_id in self.hub.silent:
            self.hub.closing.wait()
            self.close_connection = True
        elif repo_id in self.hub.failing:
            self._fail(*self.hub.failing[repo_id])
        elif folder is None:
            self._fail(401, "RepoNotFound")  # so does the real one, to whoever is not logged in
        elif api:
            self._list(repo_id, folder, rest)
        elif repo_id in self.hub.gated:
            self._fail(401, "GatedRepo")
        elif not (folder / "/".join(rest[2:])).is_file():
            self._fail(404, "EntryNotFound")
        else:
            content = (folder / "/".join(rest[2:])).read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            self._answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"})

    do_HEAD = do_GET  # noqa: N815 - http.server calls it so

    def do_POST(self) -> None:
        wanted = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.hub.log.append(f"POST {self.path} {wanted}")
        _, kind, *repo = urlsplit(self.path).path.strip("/").split("/")[:4]
        folder = getattr(self.hub, kind)["/".join(repo)]
        paths = [unquote(part.split("=", 1)[1]) for part in wanted.split("&") if part.startswith("paths=")]
        found = [_entry(folder / path, path) for path in paths if (folder / path).is_file()]
        self._answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _list(self, repo_id: str, folder: Path, rest: list[str]) -> None:
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if rest[:1] == ["tree"]:
            body: object = [_entry(path, name) for name, path in files.items()]
        else:
            siblings = [{"rfilename": name} for name in files]
            body = {"_id": "1", "id": repo_id, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code} if code else {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range")
        if status == 200 and wanted and wanted.startswith("bytes="):
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            end = int(stop) + 1 if stop else len(body)
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
            status, body = 206, body[int(start) : end]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing on the screen."""


def _entry(path: Path, name: str) -> dict[str, object]:
    content = path.read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """Serve on a free port of the loopback interface while the `with` lasts."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub = handler.hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def point_here(url: str, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Make the hub's client, which reads its environment on import alone, ask `url` and keep its files in `cache`."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.delenv("HF_TOKEN", raising=False)
