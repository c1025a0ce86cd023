"""A stand-in for the model hub that speaks its HTTP protocol: repository info, and files with commit and etag."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@contextmanager
def serve_hub(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repositories, `models/owner/name` or `datasets/owner/name`; give the endpoint and the requests seen."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            seen.append(self.path)
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/"):
                self.info(path.removeprefix("api/"))
            else:
                self.file(path, body=body)

        def info(self, path: str) -> None:
            name, _, rest = path.partition("/revision/")
            name, tree, _ = name.partition("/tree/")
            if name not in repositories:
                self.send(404, json.dumps({"error": "Repository not found"}).encode(), {"X-Error-Code": "RepoNotFound"})
            elif rest not in {"", "main", COMMIT}:
                self.send(404, b'{"error": "no such revision"}', {"X-Error-Code": "RevisionNotFound"})
            else:
                files = sorted(p for p in repositories[name].rglob("*") if p.is_file())
                names = [str(p.relative_to(repositories[name])) for p in files]
                if tree:
                    entries = [
                        {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0"}
                        for n, p in zip(names, files, strict=True)
                    ]
                    self.send(200, json.dumps(entries).encode())
                    return
                siblings = [{"rfilename": n} for n in names]
                short = name.partition("/")[2]
                self.send(
                    200, json.dumps({"id": short, "modelId": short, "sha": COMMIT, "siblings": siblings}).encode()
                )

        def file(self, path: str, *, body: bool) -> None:
            name, _, rest = path.partition("/resolve/")
            name = name if name.startswith("datasets/") else f"models/{name}"
            file = repositories[name] / rest.partition("/")[2]
            if not file.is_file():
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            data = file.read_bytes()
            self.send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, body=body)

        def send(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, body: bool = True) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
