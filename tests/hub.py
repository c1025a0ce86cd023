"""A stand-in for the model hub that speaks its HTTP protocol.

`serve_hub` gives folders as repositories: repository info, and files with commit and etag. `serve_writable_hub` takes
uploads too: accounts, new repositories, LFS in one piece or in parts as a store like S3 takes them, and commits. It checks
what arrives against its sha256, counts the bytes of every object, and can be told to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import yaml

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
                    entries = [entry(n, p) for n, p in zip(names, files, strict=True)]
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


LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
TOKEN = "hf_a_very_secret_token"
OWNER = "me"


def entry(name: str, path: Path) -> dict[str, Any]:
    """Return how a listing names a file: a large one with the sha256 of its content."""
    data = path.read_bytes()
    row: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
    if name.endswith(LFS_SUFFIXES):
        row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return row


def git_oid(data: bytes) -> str:
    """Return git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """A failure that the hub has been told to show."""

    path: str
    """A regular expression that the request's path must match."""
    status: int = 0
    """The status to answer with; 0 to cut the connection after `after_bytes` of the body."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "as told"}'
    times: int = 1
    after_bytes: int = 0


@dataclass
class WritableHub:
    """What a hub knows: its repositories on the disk, the objects that have arrived, what it was asked."""

    folder: Path
    part_bytes: int
    endpoint: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    """METHOD path, in their order."""
    received_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of each object that came over the wire, sent twice counted twice."""
    pause_s: float = 0.0
    """How long each part takes to store."""
    commits: list[list[str]] = field(default_factory=list)
    """The paths of each commit."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def object(self, oid: str) -> Path:
        """Return where an object lies once all of it has arrived."""
        return self.folder / "objects" / oid

    def files(self, repo: str) -> dict[str, bytes]:
        """Return what a repository holds."""
        root = self.repositories[f"models/{repo}"]
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@contextmanager
def serve_writable_hub(folder: Path, *, part_bytes: int = 64 << 10) -> Iterator[WritableHub]:
    """Serve an empty hub that keeps what it is sent in `folder`; objects above `part_bytes` travel in parts."""
    hub = WritableHub(folder, part_bytes)
    (folder / "objects").mkdir(parents=True)

    class Handler(_Uploads):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _CutError(Exception):
    """The connection is to be cut."""


class _Uploads(BaseHTTPRequestHandler):
    """The writing half of the protocol, and enough of the reading half to get it all back."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: WritableHub

    def do_GET(self) -> None:
        self.route()

    def do_HEAD(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.seen.append(f"{self.command} {path}")
            fault = next((f for f in self.hub.faults if f.times and re.search(f.path, path)), None)
            if fault:
                fault.times -= 1
        try:
            if fault and not fault.status:
                self.cut(path, fault.after_bytes)
            body = b"" if path.startswith("/store/") else self.body()
            if fault:
                self.body() if path.startswith("/store/") else None
                return self.send(fault.status, fault.body, fault.headers)
            return self.answer(path, body)
        except (_CutError, ConnectionError):
            self.close_connection = True
            self.connection.close()
            return None

    def cut(self, path: str, after_bytes: int) -> None:
        """Read some of the body, then drop the connection."""
        taken = self.rfile.read(after_bytes)
        if path.startswith("/store/"):
            with self.hub.lock:
                self.hub.received_bytes[path.split("/")[3]] += len(taken)
        raise _CutError

    def answer(self, path: str, body: bytes) -> None:
        if path.startswith("/store/"):
            return self.store(*path.removeprefix("/store/").split("/"))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, b'{"error": "Invalid username or password."}')
        if path == "/api/whoami-v2":
            return self.reply({"type": "user", "name": OWNER})
        if path == "/api/validate-yaml":
            errors = card_errors(json.loads(body)["content"])
            return self.reply({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            return self.api(match[1], match[2] or "", body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            return self.file(match[1], match[2])
        return self.send(404, b'{"error": "no such route"}')

    def create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or OWNER
        repo = f"{owner}/{asked['name']}"
        if owner != OWNER:
            return self.send(403, b'{"error": "You may not create repositories there"}')
        if f"models/{repo}" in self.hub.repositories:
            return self.reply(
                {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo}"}, 409
            )
        folder = self.hub.folder / "repositories" / repo
        folder.mkdir(parents=True)
        self.hub.repositories[f"models/{repo}"] = folder
        if asked.get("visibility") == "private":
            self.hub.private.add(repo)
        return self.reply({"url": f"{self.hub.endpoint}/{repo}", "id": repo})

    def api(self, repo: str, rest: str, body: bytes) -> None:
        root = self.hub.repositories.get(f"models/{repo}")
        if root is None:
            return self.send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        if rest.startswith("preupload/"):
            return self.reply({"files": [self.mode(root, row) for row in json.loads(body)["files"]]})
        if rest.startswith("commit/"):
            return self.commit(repo, root, [json.loads(line) for line in body.splitlines()])
        names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
        if rest.startswith("tree/"):
            return self.reply([entry(name, root / name) for name in names])
        if rest == "" or rest.startswith("revision/"):
            about = {"id": repo, "modelId": repo, "sha": COMMIT, "private": repo in self.hub.private}
            return self.reply({**about, "siblings": [{"rfilename": name} for name in names]})
        return self.send(404, b'{"error": "no such route"}')

    def mode(self, root: Path, row: dict[str, Any]) -> dict[str, Any]:
        known = root / row["path"]
        lfs = row["path"].endswith(LFS_SUFFIXES)
        if not known.is_file():
            oid = None
        else:
            data = known.read_bytes()
            oid = hashlib.sha256(data).hexdigest() if lfs else git_oid(data)
        return {"path": row["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, asked: dict[str, Any]) -> None:
        rows = []
        for row in asked["objects"]:
            oid, size = row["oid"], row["size"]
            if not self.hub.object(oid).is_file():
                verify = {"href": f"{self.hub.endpoint}/store/verify/{oid}", "header": {}}
                upload: dict[str, Any] = {"href": f"{self.hub.endpoint}/store/whole/{oid}?X-Amz-Signature=signed"}
                if size > self.hub.part_bytes:
                    count = -(-size // self.hub.part_bytes)
                    store = f"{self.hub.endpoint}/store/part/{oid}"
                    header = {str(n): f"{store}/{n}?X-Amz-Signature=signed" for n in range(1, count + 1)}
                    header["chunk_size"] = str(self.hub.part_bytes)
                    upload = {"href": f"{self.hub.endpoint}/store/complete/{oid}", "header": header}
                rows.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
            else:
                rows.append({"oid": oid, "size": size})
        self.reply({"transfer": "basic", "objects": rows})

    def store(self, step: str, oid: str, number: str = "") -> None:
        place = self.hub.object(oid)
        parts = place.with_name(f"{oid}.parts")
        if step in {"whole", "part"}:
            parts.mkdir(exist_ok=True)
            with (parts / (number or "1")).open("wb") as sink:
                digest = self.save(sink, oid)
            time.sleep(self.hub.pause_s)
            if step == "whole" and not self.assemble(oid, [parts / "1"]):
                return self.send(400, b'{"error": "BadDigest"}')
            return self.send(200, b"", {"ETag": f'"{digest}"'})
        body = json.loads(self.body())
        if step == "verify":
            there = place.is_file() and place.stat().st_size == body["size"]
            return self.reply({} if there else {"error": "not there"}, 200 if there else 404)
        pieces = []
        for part in body["parts"]:
            piece = parts / str(part["partNumber"])
            if part["etag"] != f'"{hashlib.md5(piece.read_bytes()).hexdigest()}"':
                return self.send(400, b'{"error": "InvalidPart"}')
            pieces.append(piece)
        whole = self.assemble(oid, pieces)
        return self.reply({} if whole else {"error": "BadDigest"}, 200 if whole else 400)

    def assemble(self, oid: str, pieces: list[Path]) -> bool:
        """Put an object together; it counts only if its content has the hash that is its name."""
        data = b"".join(piece.read_bytes() for piece in pieces)
        whole = hashlib.sha256(data).hexdigest() == oid
        if whole:
            self.hub.object(oid).write_bytes(data)
        shutil.rmtree(pieces[0].parent)
        return whole

    def commit(self, repo: str, root: Path, lines: list[dict[str, Any]]) -> None:
        assert lines[0]["key"] == "header"
        missing = [
            line["value"]["path"]
            for line in lines
            if line["key"] == "lfsFile" and not self.hub.object(line["value"]["oid"]).is_file()
        ]
        if missing:
            return self.reply({"error": f"LFS objects have not been uploaded: {missing}"}, 400)
        for line in lines[1:]:
            value = line["value"]
            path = root / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            else:
                assert line["key"] == "lfsFile" and value["algo"] == "sha256"
                shutil.copyfile(self.hub.object(value["oid"]), path)
        self.hub.commits.append([line["value"]["path"] for line in lines[1:]])
        url = f"{self.hub.endpoint}/{repo}/commit/{COMMIT}"
        return self.reply({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})

    def file(self, repo: str, name: str) -> None:
        path = self.hub.repositories.get(f"models/{repo}", Path("/nowhere")) / name
        if not path.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest() if name.endswith(LFS_SUFFIXES) else git_oid(data)
        return self.send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def save(self, sink: BinaryIO, oid: str) -> str:
        """Write the body as it arrives, count it, and return its md5."""
        digest = hashlib.md5()
        for chunk in self.chunks():
            sink.write(chunk)
            digest.update(chunk)
            with self.hub.lock:
                self.hub.received_bytes[oid] += len(chunk)
        return digest.hexdigest()

    def body(self) -> bytes:
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """Yield the body, of a stated length or chunked."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                yield self.exactly(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.exactly(min(left, 1 << 14))
            left -= len(piece)
            yield piece

    def exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise _CutError
        return data

    def reply(self, document: Any, status: int = 200) -> None:
        self.send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        return


def card_errors(content: str) -> list[str]:
    """Return what the hub would find wrong with a card's front matter, as far as its documentation states the rules."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["no front matter"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    results = [result for model in data.get("model-index", []) for result in model["results"]]
    rules = {
        '"license" must be an identifier': re.fullmatch(r"[a-z0-9.+-]+", str(data.get("license"))),
        '"base_model" must be a model id': re.fullmatch(r"[\w.-]+/[\w.-]+", str(data.get("base_model", "a/b"))),
        '"base_model_relation" must be one of [adapter, merge, quantized, finetune]': data.get(
            "base_model_relation", "finetune"
        )
        in {"adapter", "merge", "quantized", "finetune"},
        '"model-index" is incomplete': all(
            {"task", "dataset", "metrics"} <= result.keys() and {"name", "type"} <= result["dataset"].keys()
            for result in results
        ),
    }
    return [rule for rule, kept in rules.items() if not kept]
