"""A model hub on the loopback interface: as much of its protocol as downloading a repository takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repository:
    """token: None is public, else what a request for a file must bear; everybody may list the files.
    status: every request is answered with it, where there is one.
    """

    files: dict[str, bytes]
    token: str | None = None
    status: int | None = None
    revisions: tuple[str, ...] = ("main", COMMIT)


@dataclass
class Hub:
    repositories: dict[str, Repository]
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)

    def downloads(self) -> list[str]:
        """Names of the files that were fetched, sorted."""
        return sorted(path.split("/")[-1] for method, path in self.requests if method == "GET" and "/resolve/" in path)


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.answer_api("/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision", parts[5:])
            elif len(parts) >= 5 and parts[2] == "resolve":
                self.answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self.send(404, b"no such page")

        def repository(self, name: str, revision: str) -> Repository | None:
            """The repository, or None once an error has been sent."""
            repository = hub.repositories.get(name)
            if repository is None:
                # The hub says 401 to strangers, lest they learn which private repositories exist.
                self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif repository.status is not None:
                self.send(repository.status, b"{}")
            elif revision not in repository.revisions:
                self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                return repository
            return None

        def answer_api(self, name: str, what: str, rest: list[str]) -> None:
            repository = self.repository(name, rest[0] if rest else "main")
            if repository is None:
                return
            if what == "tree":
                files = repository.files.items()
                answer: object = [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files]
            else:
                answer = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in repository.files]}
            self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def answer_file(self, name: str, revision: str, file: str) -> None:
            repository = self.repository(name, revision)
            if repository is None:
                return
            bearer = self.headers.get("Authorization")
            if repository.token is not None and bearer != f"Bearer {repository.token}":
                self.send(403 if bearer else 401, b"{}", {"X-Error-Code": "GatedRepo"})
            elif file not in repository.files:
                self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            else:
                content = repository.files[file]
                self.send(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT})

        def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    return Handler


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
