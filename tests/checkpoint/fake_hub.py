"""A hub on 127.0.0.1 with what huggingface_hub asks of one: model info, tree, and files with ETag and ranges."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_the_right_token"


@dataclass
class Repository:
    """One model: its files by name, and how it misbehaves."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    gated: bool = False
    revisions: set[str] = field(default_factory=lambda: {"main"})
    fail: set[str] = field(default_factory=set)  # answer 500 for these files
    break_once: set[str] = field(default_factory=set)  # close the connection half way, the first time
    trickle: set[str] = field(default_factory=set)  # send a few bytes a second, for ever
    claimed_sizes: dict[str, int] = field(default_factory=dict)  # sizes that the listing states


class FakeHub:
    """Use as a context manager; ``requests`` lists (method, path, range header) in order of arrival."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories
        self.requests: list[tuple[str, str, str | None]] = []
        self.status: int | None = None  # answer everything with this
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """The names of the files whose content was asked for, in order."""
        return [path.rsplit("/", 1)[-1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if hub.status is not None:
                return self._send(hub.status, b"")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?", path):
                return self._describe(*match.groups())
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self._file(*match.groups())
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

        def _repository(self, name: str, revision: str | None) -> Repository | None:
            repository = hub.repositories.get(name)
            if repository is None:  # the real hub says so too, to those who are not signed in
                self._send(401, b"", {"X-Error-Message": "Repository not found", "X-Error-Code": "RepoNotFound"})
                return None
            if revision not in {None, repository.commit} | repository.revisions:
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return None
            return repository

        def _describe(self, name: str, kind: str | None, revision: str | None) -> None:
            repository = self._repository(name, revision)
            if repository is None:
                return
            if kind == "tree":
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": _etag(data)}
                    for file, data in repository.files.items()
                ]
                return self._send_json(tree)
            siblings = [
                {
                    "rfilename": file,
                    "size": repository.claimed_sizes.get(file, len(data)),
                    "blobId": _etag(data),
                }
                for file, data in repository.files.items()
            ]
            self._send_json({"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings, "tags": []})

        def _file(self, name: str, revision: str, file: str) -> None:
            repository = self._repository(name, revision)
            if repository is None:
                return
            if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._send(403 if "Authorization" in self.headers else 401, b"", {"X-Error-Code": "GatedRepo"})
            data = repository.files.get(file)
            if data is None:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit})
            if file in repository.fail and self.command == "GET":
                return self._send(500, b"")
            headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
            start = 0
            if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                start = int(match.group(1))
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if self.command == "GET" and file in repository.break_once:
                repository.break_once.discard(file)
                self._head(200, len(data), headers)
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif self.command == "GET" and file in repository.trickle:
                self._head(200, len(data), headers)
                for position in range(len(data)):
                    if hub.closing.is_set():
                        break
                    self.wfile.write(data[position : position + 1])
                    time.sleep(0.2)
                self.close_connection = True
            else:
                self._send(206 if start else 200, data[start:], headers)

        def _send_json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self._head(status, len(body), headers or {})
            if self.command != "HEAD":
                self.wfile.write(body)

        def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()

    return Handler


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
