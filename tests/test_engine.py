"""The engine: whole characters, its own child, and files that it must never see."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from lorikeet.cli import resolve_target
from lorikeet.config import ServeConfig
from lorikeet.engine import HttpEngine, LlamaEngine
from lorikeet.errors import EngineError, InputError, RequestError
from lorikeet.export.gguf import write_gguf
from lorikeet.gguf_header import read_header
from lorikeet.messages import Delta, Message
from lorikeet.run import usable_cores
from lorikeet.serve import launch
from tests.serve.fakes import silent_server

HELLO = [Message("user", "hello there")]


@pytest.fixture(scope="module")
def gguf(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_model, path, quant="f16", name="tiny")
    return path


def test_a_streamed_answer_is_the_same_with_a_seed(gguf: Path) -> None:
    with LlamaEngine(gguf) as engine:
        first, second = (
            [delta for delta in engine.stream(HELLO, max_tokens=24, temperature=1.0, seed=4) if delta != Delta("")]
            for _ in range(2)
        )
        other = "".join(d.text for d in engine.stream(HELLO, max_tokens=24, temperature=1.0, seed=5))
    assert first == second
    assert "".join(d.text for d in first) != other
    assert first[-1].finish_reason in {"stop", "length"}
    assert first[-1].usage is not None and first[-1].usage.completion_tokens <= 24
    assert all(d.finish_reason is None for d in first[:-1])


def test_only_whole_characters_are_streamed(gguf: Path) -> None:
    """A random model says random bytes; pieces of characters must wait for the rest of theirs."""
    with LlamaEngine(gguf) as engine:
        deltas = [d.text for seed in range(6) for d in engine.stream(HELLO, max_tokens=40, temperature=2.0, seed=seed)]
    assert any(ord(c) > 127 for text in deltas for c in text)
    for text in deltas:
        text.encode("utf-8")


def test_the_limit_and_the_stop_are_kept(gguf: Path) -> None:
    with LlamaEngine(gguf) as engine:
        *_, last = engine.stream(HELLO, max_tokens=3, temperature=0.0, seed=0)
        assert (last.finish_reason, last.usage and last.usage.completion_tokens) == ("length", 3)
        text = "".join(d.text for d in engine.stream(HELLO, max_tokens=30, temperature=0.0, seed=0))
        stop = re.findall("[a-z]{2}", text)[1]
        *parts, last = engine.stream(HELLO, max_tokens=30, temperature=0.0, seed=0, stop=[stop])
        assert last.finish_reason == "stop"
        assert "".join(d.text for d in parts) == text[: text.index(stop)]


def test_a_conversation_that_does_not_fit_is_the_requests_fault(gguf: Path) -> None:
    with LlamaEngine(gguf, context_tokens=64) as engine, pytest.raises(RequestError, match="context"):
        list(engine.stream([Message("user", "words " * 400)]))


def test_closing_the_stream_stops_the_generation(gguf: Path) -> None:
    with LlamaEngine(gguf, context_tokens=400) as engine:
        with closing(engine.stream(HELLO, max_tokens=300, temperature=1.0, seed=1)) as deltas:
            next(deltas)
        began = time.monotonic()
        list(engine.stream(HELLO, max_tokens=2, seed=1))
        assert time.monotonic() - began < 5


def test_the_child_is_behind_a_key_and_on_loopback(gguf: Path) -> None:
    with LlamaEngine(gguf) as engine:
        url = str(engine._http.base_url)
        assert url.startswith("http://127.0.0.1:")
        assert httpx.post(f"{url}/completion", json={"prompt": "x"}).status_code == 401


def test_a_child_that_dies_is_said_in_one_line(gguf: Path) -> None:
    with LlamaEngine(gguf) as engine:
        assert engine.healthy()
        os.kill(engine._process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"tiny.gguf: llama.cpp ended with -9"):
            list(engine.stream(HELLO))
        assert not engine.healthy()


def test_the_child_ends_with_its_engine(gguf: Path) -> None:
    engine = LlamaEngine(gguf)
    process = engine._process
    engine.close()
    engine.close()
    assert process.poll() is not None


def test_a_remote_engine_is_the_same_protocol(gguf: Path) -> None:
    with LlamaEngine(gguf) as local:
        key = local._http.headers["Authorization"].removeprefix("Bearer ")
        with HttpEngine.connect(f"{local._http.base_url}/v1", api_key=key) as remote:
            assert remote.healthy()
            mine, theirs = (
                [d.text for d in engine.stream(HELLO, max_tokens=8, temperature=0.0, seed=1) if d.text]
                for engine in (local, remote)
            )
            assert mine == theirs


def test_nobody_at_the_url_is_one_line() -> None:
    with pytest.raises(EngineError, match="does not answer"):
        HttpEngine.connect("http://127.0.0.1:9")


def test_the_header_is_read_whole(gguf: Path) -> None:
    header = read_header(gguf)
    assert header.metadata["general.architecture"] == "llama"
    assert header.tensors["token_embd.weight"][0] == 64


def test_a_truncated_file_never_reaches_the_engine(gguf: Path, tmp_path: Path) -> None:
    whole = gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(5, 3000, 97), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut.gguf is damaged or truncated"):
            LlamaEngine(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file"),
        (b"hello", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40), "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "no language model"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 2**33), "damaged"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_header(path)


@contextmanager
def listing(*names: str) -> Iterator[tuple[int, list[tuple[int, str | None]]]]:
    """A server that lists models; give its port, and each request's port and `Connection` header."""
    seen: list[tuple[int, str | None]] = []

    class Models(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            seen.append((self.client_address[1], self.headers["Connection"]))
            body = json.dumps({"data": [{"id": name} for name in names]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, seen
        server.shutdown()


@pytest.mark.parametrize(("chosen", "name"), [("", "one"), ("/v1#one", "one"), ("#owner/two:7b", "owner/two:7b")])
def test_a_servers_model_can_be_chosen_and_its_password_is_shown_to_nobody(chosen: str, name: str) -> None:
    with listing("one", "owner/two:7b") as (port, _):
        target = f"http://me:secret@127.0.0.1:{port}{chosen}"
        source, _, shown = resolve_target(target, ServeConfig())
        assert source == target and "secret" not in shown
        engine, origin = launch._open(target, ServeConfig(), shown)
        assert (engine.name, origin.name) == (name, name)
        assert engine.problem() == ""
    assert str(port) in engine.problem() and "secret" not in engine.problem()
    with pytest.raises(EngineError) as caught:
        engine.get("/v1/models")
    assert str(port) in str(caught.value) and "secret" not in str(caught.value)
    engine.close()


def test_a_model_that_a_server_does_not_have_is_one_line() -> None:
    with listing("one", "two") as (port, _), pytest.raises(InputError, match=r"has no model three.*one, two") as caught:
        HttpEngine.connect(f"http://me:secret@127.0.0.1:{port}#three")
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="is no address"):
        HttpEngine.connect("http://here:there")


def test_no_connection_is_used_twice() -> None:
    """A kept one may be closed by the server, or by another thread, just as a request is put on it."""
    with listing("one") as (port, seen), HttpEngine.connect(f"http://127.0.0.1:{port}") as engine:
        engine.get("/v1/models")
    assert [header for _, header in seen] == ["close", "close"]
    assert len({port for port, _ in seen}) == 2


def test_a_server_that_says_nothing_is_left_at_once() -> None:
    with silent_server() as (url, left), HttpEngine(url, name="mute") as engine:
        began_s = time.monotonic()
        with closing(engine.stream(HELLO)) as deltas:
            assert next(deltas) == Delta("")
            assert not left.acquire(blocking=False)
        assert left.acquire(timeout=2)
        assert time.monotonic() - began_s < 5


@pytest.mark.parametrize(("tokens", "types"), [(["a", "b"], 3), ([1, 2], [3, 3]), ([["a"], ["b"]], [3, 3])])
def test_a_vocabulary_of_another_kind_is_one_line(gguf: Path, tmp_path: Path, tokens: Any, types: Any) -> None:
    """As `test_hostile_headers_are_refused`, with the rest of the file in order."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(header_of(tokens=tokens, types=types))
    with pytest.raises(InputError, match=r"bad\.gguf is damaged.*fetch or export it again"):
        read_header(path)


def header_of(*, tokens: Any, types: Any) -> bytes:
    """Return a file of one small tensor with this vocabulary."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def value(item: Any) -> tuple[int, bytes]:
        if isinstance(item, list):
            kinds, parts = zip(*map(value, item), strict=True)
            return 9, struct.pack("<IQ", kinds[0], len(item)) + b"".join(parts)
        return (8, text(item)) if isinstance(item, str) else (5, struct.pack("<i", item))

    pairs = [("tokenizer.ggml.tokens", value(tokens)), ("tokenizer.ggml.token_type", value(types))]
    body = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs))
    body += b"".join(text(key) + struct.pack("<I", kind) + data for key, (kind, data) in pairs)
    body += text("t") + struct.pack("<IQIQ", 1, 1, 0, 0)
    return body + bytes(-len(body) % 32 + 4)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_as_many_threads_are_used_as_there_are_cores_to_use() -> None:
    before = os.sched_getaffinity(0)
    assert usable_cores() == len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
