"""A small hub on the loopback interface: enough of the protocol for models and datasets to be listed and downloaded.

Serves folders, of large files the ranges that are asked for. Keeps a log of what was asked for and counts what was
sent, so that a test can say what was never fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE_BYTES = 2**20
HASHED_BYTES = 2**24


class FakeHub:
    """A hub of folders.

    models, datasets: repositories by id. failing: id -> (status, X-Error-Code) that every request for it is answered
    with; gated: ids of which the listing is public and no file is. silent: ids that never get an answer.
    commits: id -> commit, where it is not COMMIT. faults: what befalls the next ranges that are asked for, one each: a
    status, or "cut" for a body that ends in the middle. without_ranges, without_sizes, without_listing: as some are.
    redirecting: weights come from another host, as those of the real one do. tokens: which were shown here and there.
    sent_bytes: of file contents, by name. ranges: each that was asked for, as (revision, name, first byte, byte after
    the last).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.models: dict[str, Path] = {}
        self.datasets: dict[str, Path] = {}
        self.failing: dict[str, tuple[int, str]] = {}
        self.gated: set[str] = set()
        self.silent: set[str] = set()
        self.commits: dict[str, str] = {}
        self.faults: list[int | str] = []
        self.without_ranges = self.without_sizes = self.without_listing = self.redirecting = False
        self.tokens: dict[str, set[str | None]] = {"here": set(), "elsewhere": set()}
        self.sent_bytes: Counter[str] = Counter()
        self.ranges: list[tuple[str, str, int, int]] = []
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
        elsewhere = parts[0] == "elsewhere"
        parts = parts[1:] if elsewhere else parts
        self.hub.tokens["elsewhere" if elsewhere else "here"].add(self.headers.get("Authorization"))
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
        elif self.hub.redirecting and not elsewhere and parts[-1].endswith(".safetensors"):
            there = self.hub.url.replace("127.0.0.1", "localhost")
            self._answer(302, b"", {"Location": f"{there}/elsewhere{self.path}"})
        else:
            self._send(folder / "/".join(rest[2:]), self.hub.commits.get(repo_id, COMMIT), rest[1])

    do_HEAD = do_GET  # noqa: N815 - http.server calls it so

    def do_POST(self) -> None:
        wanted = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.hub.log.append(f"POST {self.path} {wanted}")
        if self.hub.without_listing:
            self._fail(404, "")
            return
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
            sizes = "blobs" in urlsplit(self.path).query and not self.hub.without_sizes
            siblings = [
                {"rfilename": name} | ({"size": path.stat().st_size} if sizes else {}) for name, path in files.items()
            ]
            commit = self.hub.commits.get(repo_id, COMMIT)
            body = {"_id": "1", "id": repo_id, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, path: Path, commit: str, revision: str) -> None:
        """Send a file, or the range of it that is asked for, piece by piece."""
        size, wanted = path.stat().st_size, self.headers.get("Range")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(path)}"', "Accept-Ranges": "bytes"}
        status, start, stop = 200, 0, size
        fault = self.hub.faults.pop(0) if wanted and self.hub.faults else None
        if isinstance(fault, int):
            self._fail(fault, "")
            return
        if wanted and not self.hub.without_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            status, start, stop = 206, int(first), int(last) + 1 if last else size
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self.hub.ranges.append((revision, path.name, start, stop))
        self.send_response(status)
        for name, value in ({"Content-Length": str(stop - start)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "cut":
            stop -= (stop - start + 1) // 2
        with open(path, "rb") as file, contextlib.suppress(ConnectionError):  # who has seen enough hangs up
            file.seek(start)
            while self.command != "HEAD" and start < stop:
                piece = file.read(min(PIECE_BYTES, stop - start))
                start += len(piece)
                self.hub.sent_bytes[path.name] += len(piece)  # before whom it is sent to can go on
                self.wfile.write(piece)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing on the screen."""


def _entry(path: Path, name: str) -> dict[str, object]:
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(path)}


def _oid(path: Path) -> str:
    """Return what changes with a file's content; of a file too large to be read for that, with its size and time."""
    status = path.stat()
    small = status.st_size <= HASHED_BYTES
    return hashlib.sha1(path.read_bytes() if small else repr((status.st_size, status.st_mtime_ns)).encode()).hexdigest()


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
