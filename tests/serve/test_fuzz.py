"""Hundreds of broken files, requests and events: never a 5xx, always OpenAI's shape, and a good one is answered after them."""

from __future__ import annotations

import io
import json
import math
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import av
import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.serve.memory import Memory
from lorikeet.speech import Ears
from lorikeet.speech.audio import encode_wav
from lorikeet.speech.hear import load_ears
from tests.serve.fakes import CountingEars, ScriptedEngine, ToneVoice, served, serving

RATE_HZ = 24_000
CODECS = {
    "wav": "pcm_s16le",
    "flac": "flac",
    "ogg": "libopus",
    "mp3": "libmp3lame",
    "mp4": "aac",
    "webm": "libopus",
    "aiff": "pcm_s16be",
    "matroska": "libmp3lame",
}
HI: Any = [{"role": "user", "content": "Hi"}]
ROUTES = (
    "/v1/chat/completions",
    "/v1/audio/speech",
    "/v1/audio/transcriptions",
    "/v1/feedback",
    "/v1/audio/translations",
)
THREADS_SPARE = 50
"""The server's pool grows up to its bounds; beyond them it would be growth."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Memory.open(tmp_path_factory.mktemp("memory") / "memory.db") as memory:
        assistant = Assistant(ScriptedEngine(), memory=memory)
        app = create_app(serving(assistant), ears=CountingEars(), voice=ToneVoice(), page=False)
        with served(app) as base:
            yield base


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    """A client; when the test is over, the server must answer a good request and have let its threads go."""
    before = threading.active_count()
    with httpx.Client(base_url=url, timeout=20) as client:
        yield client
        good = client.post("/v1/chat/completions", json={"messages": HI})
        assert good.json()["choices"][0]["message"]["content"] == "Hello there."
        heard = client.post("/v1/audio/transcriptions", files={"file": ("a.wav", sound("wav"))})
        assert heard.json()["text"] == "I heard 0.3 seconds."
    assert threading.active_count() <= before + THREADS_SPARE


def check(response: httpx.Response, what: object) -> int:
    """Hold an answer to the contract; return its status."""
    assert response.status_code < 500, (what, response.text[:300])
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, what
        assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 2000, what
        assert error["type"] == "invalid_request_error", what
        assert "Traceback" not in response.text and "site-packages" not in response.text, what
    return response.status_code


@cache
def sound(container: str, *, rate_hz: int = RATE_HZ, layout: str = "mono") -> bytes:
    """Return a third of a second of a tone as a real file."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        stream = file.add_stream(
            CODECS[container], rate=48_000 if "opus" in CODECS[container] else rate_hz, layout=layout
        )
        samples = (8000 * np.sin(np.arange(stream.rate // 3) / 10)).astype(np.int16)
        channels = len(stream.layout.channels)
        frame = av.AudioFrame.from_ndarray(np.repeat(samples, channels).reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate = stream.rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    return target.getvalue()


def wav(
    data: bytes, *, kind: int = 1, channels: int = 1, rate_hz: int = 16_000, bits: int = 16, size: int | None = None
) -> bytes:
    """Return a WAV file whose header says what it is told to."""
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, rate_hz, (rate_hz * block) & 0xFFFFFFFF, block & 0xFFFF, bits)
    body = (
        b"WAVEfmt "
        + struct.pack("<I", len(form))
        + form
        + b"data"
        + struct.pack("<I", len(data) if size is None else size)
        + data
    )
    return b"RIFF" + struct.pack("<I", (len(body) if size is None else size) & 0xFFFFFFFF) + body


def odd_sounds() -> Iterator[tuple[str, bytes]]:
    """Yield whole files of kinds that nobody sends, and what only looks like one."""
    floats = np.array([math.nan, math.inf, -math.inf, 1e38, -1e38, 0.5] * 800, "<f4").tobytes()
    for channels in (0, 1, 2, 3, 7, 8, 9, 16, 64, 255, 65535):
        yield f"{channels} channels", wav(bytes(4800), channels=channels)
    for rate_hz in (0, 1, 7, 3999, 192_000, 2**31 - 1, 2**32 - 1):
        yield f"{rate_hz} Hz", wav(bytes(4800), rate_hz=rate_hz)
    for bits in (0, 1, 7, 8, 24, 32, 64, 65535):
        yield f"{bits} bits", wav(bytes(4800), bits=bits)
    for kind in (0, 2, 3, 6, 7, 0x11, 0x55, 0xFFFE, 0xFFFF):
        yield f"format {kind}", wav(bytes(4800), kind=kind)
    yield "not numbers", wav(floats, kind=3, bits=32)
    yield "doubles", wav(np.array([math.nan, 1e308] * 900, "<f8").tobytes(), kind=3, bits=64)
    yield "4 GB that are not there", wav(bytes(4800), size=0xFFFFFFFF)
    yield "nothing", b""
    yield "a byte", b"\0"
    yield "zeros", bytes(100_000)
    for name, magic in {
        "RIFF": b"RIFF",
        "fLaC": b"fLaC",
        "OggS": b"OggS",
        "ID3": b"ID3\x04",
        "EBML": b"\x1aE\xdf\xa3",
        "ftyp": b"\0\0\0\x18ftypM4A ",
    }.items():
        yield f"only {name}", magic
        yield f"{name} and noise", magic + random.Random(name).randbytes(3000)
    yield "a picture", b"\x89PNG\r\n\x1a\n" + bytes(200)
    yield "a page", b"<html><script>1</script></html>"
    yield "a zip", b"PK\x03\x04" + bytes(200)
    yield "a playlist", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"
    yield "a list of files", b"ffconcat version 1.0\nfile /etc/passwd\n"


def broken_sounds(count: int) -> Iterator[tuple[str, bytes]]:
    """Yield real files that were cut, flipped, doubled or joined, the same ones every time."""
    generator = random.Random(7)
    wholes = {name: sound(name) for name in CODECS}
    for number in range(count):
        name = generator.choice(list(wholes))
        data = bytearray(wholes[name])
        for _ in range(generator.randint(1, 3)):
            match generator.randrange(5):
                case 0:
                    del data[generator.randrange(1, len(data) + 1) :]
                case 1:
                    del data[: generator.randrange(min(len(data), 64) + 1)]
                case 2:
                    for _ in range(generator.randint(1, 30)):
                        if data:
                            data[generator.randrange(min(len(data), 200))] ^= 1 << generator.randrange(8)
                case 3:
                    at = generator.randrange(len(data) + 1)
                    data[at:at] = generator.randbytes(generator.randint(1, 400))
                case _:
                    data += wholes[generator.choice(list(wholes))]
        yield f"{name} {number}", bytes(data)


def test_hundreds_of_broken_sound_files(client: httpx.Client) -> None:
    statuses: Counter[int] = Counter()
    names = ("a.wav", "a", "a.exe", "", "a.mp3/../../x", "a" * 300, "\u202egpj.wav", "a\n.wav", ".wav")
    for number, (what, data) in enumerate([*odd_sounds(), *broken_sounds(400)]):
        response = client.post("/v1/audio/transcriptions", files={"file": (names[number % len(names)], data)})
        statuses[check(response, what)] += 1
    assert set(statuses) <= {200, 400}
    assert statuses[400] > 50 and statuses[200] > 50


@pytest.mark.parametrize("container", sorted(CODECS))
def test_the_whole_files_that_are_broken_here_are_heard(client: httpx.Client, container: str) -> None:
    response = client.post("/v1/audio/transcriptions", files={"file": ("a", sound(container))})
    assert response.status_code == 200 and response.json()["text"].startswith("I heard 0.")


@pytest.mark.slow
def test_whisper_itself_survives_them() -> None:
    ears: Ears = load_ears("whisper-tiny.en")
    with served(create_app(serving(Assistant(ScriptedEngine())), ears=ears, page=False)) as base:
        for what, data in [*odd_sounds(), *broken_sounds(120)]:
            check(httpx.post(f"{base}/v1/audio/transcriptions", files={"file": ("a", data)}, timeout=60), what)
        silence = encode_wav(np.zeros(16_000, np.float32), 16_000)
        assert (
            httpx.post(f"{base}/v1/audio/transcriptions", files={"file": ("a", silence)}, timeout=60).json()["text"]
            == ""
        )


GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": HI, "model": "default", "stream": False, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "max_tokens": 5,
        "logprobs": False, "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "lorikeet": {"search": "off"},
    },
    "/v1/audio/speech": {"input": "One.", "model": "tts-1", "voice": "alloy", "response_format": "wav", "speed": 1.0, "stream_format": "audio"},
    "/v1/feedback": {"id": "chatcmpl-1", "rating": "up", "correction": "Better.", "comment": "Why."},
}  # fmt: skip
VALUES: tuple[str, ...] = (
    "null", "true", "-1", "0", "1e400", "-1e400", "NaN", "Infinity", "1e-400", "123456789012345678901234567890", "0.5", '""', '"x"', '"\\ud800"',
    '"\\u0000"', '"\\udc00\\ud800"', "[]", "{}", "[[[]]]", '[{"role": "user"}]', '{"type": "json_schema", "json_schema": {"name": "\\ud800"}}',
    '{"\\ud800": 1}', '[{"role": "user", "content": "\\ud800"}]', '[{"role": "\\ud800", "content": "x"}]', '"' + "y" * 5000 + '"',
    "[" * 400 + "]" * 400, '{"a":' * 400 + "1" + "}" * 400, '["\\ud800"]', '[{"type": "function", "function": {"name": "\\ud800"}}]',
    '{"type": "regex", "pattern": "("}', '[{"role": "tool", "tool_call_id": "\\ud800", "content": "x"}]',
)  # fmt: skip


def broken_bodies(route: str) -> Iterator[bytes]:
    """Yield JSON texts in which one field is wrong, and texts that are wrong as a whole."""
    good = GOOD[route]
    for name in (*good, "unknown", "\ud800", "", "__class__", "n", "user"):
        for value in VALUES:
            fields = {**{key: json.dumps(given) for key, given in good.items()}, name: value}
            yield ("{" + ", ".join(f"{json.dumps(key)}: {given}" for key, given in fields.items()) + "}").encode()
    yield from (value.encode() for value in VALUES)
    whole = json.dumps(good)
    yield from (whole[:cut].encode() for cut in range(0, len(whole), 7))
    yield from (
        b"",
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf" + whole.encode(),
        whole.encode("utf-16"),
        b"[" * 90_000,
        b'{"a":' * 90_000,
        b"\0" * 100,
    )
    yield (whole[:-1] + ', "messages": 1, "input": 2, "id": 3}').encode()  # keys that come twice
    yield b'{"messages": [' + b",".join([b'{"role": "user", "content": "x"}'] * 10_000) + b"]}"
    yield b'{"max_tokens": ' + b"9" * 10_000 + b', "messages": []}'


@pytest.mark.parametrize("route", sorted(GOOD))
def test_every_route_takes_broken_json(client: httpx.Client, route: str) -> None:
    statuses = Counter(
        check(client.post(route, content=body, headers={"Content-Type": "application/json"}), body[:300])
        for body in broken_bodies(route)
    )
    assert statuses[400] > 100 and set(statuses) <= {200, 400, 404}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_takes_other_kinds_of_bodies(client: httpx.Client, route: str) -> None:
    kinds = (
        "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=b",
        "multipart/form-data; boundary=" + "b" * 5000, "application/json; charset=utf-7", "application/xml", "", "x", "application/json, text/plain",
    )  # fmt: skip
    bodies = (
        b"", b"--b", b"--b\r\n", b"--b\r\n\r\n--b--", b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--',
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="\xff\xfe"\r\n\r\nx\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="model"; filename="f"\r\n\r\nx\r\n--b--\r\n', b"--b\r\nContent-Disposition: nonsense\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\n" + b"X: y\r\n" * 3000 + b"\r\n", b"a=b&" * 2000, json.dumps({"messages": HI}).encode(),
        b"".join(b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % n for n in range(2000)) + b"--b--\r\n",
    )  # fmt: skip
    for kind in kinds:
        for body in bodies:
            check(client.post(route, content=body, headers={"Content-Type": kind}), (kind, body[:80]))
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        check(client.request(method, route), method)


FORM: dict[str, tuple[str, ...]] = {
    "model": ("", "x" * 5000, "\0"),
    "response_format": ("", "xml", "JSON"),
    "language": ("", "xx", "\u202e", "e" * 21),
    "prompt": ("\0", "p" * 4001),
    "temperature": ("nan", "inf", "-1", "1e999", "", "0x1"),
    "timestamp_granularities[]": ("word", "", "x"),
    "stream": ("true", "maybe"),
    "include[]": ("logprobs",),
}


def test_every_field_of_the_form_may_be_wrong(client: httpx.Client) -> None:
    for name, values in FORM.items():
        for value in values:
            response = client.post(
                "/v1/audio/transcriptions", files={"file": ("a.wav", sound("wav"))}, data={name: value}
            )
            check(response, (name, value[:30]))
    for files in (
        {"file": ("", b"")},
        {"file": (None, b"text")},
        {"other": ("a", b"x")},
        [("file", ("a", sound("wav")))] * 3,
    ):
        check(client.post("/v1/audio/transcriptions", files=files), str(files)[:80])


RAW = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nzz\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n-1\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: \xb2\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: [::1\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/conversations/%00%ed%a0%80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


def test_what_is_hardly_http(client: httpx.Client, url: str) -> None:
    port = urlsplit(url).port or 0
    for data in RAW:
        with socket.create_connection(("127.0.0.1", port), timeout=3) as raw:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := raw.recv(65_536):
                answer += piece
        assert not answer.split(b" ")[1:2] or answer.split(b" ")[1] < b"500", (data[:100], answer[:300])


def test_a_body_in_chunks_beyond_the_limit_ends_early(client: httpx.Client, url: str) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 200 << 20:
            sent += 65_536
            yield b" " * 65_536

    try:
        response = client.post("/v1/chat/completions", content=endless(), headers={"Content-Type": "application/json"})
        assert check(response, "chunks") == 413
    except httpx.TransportError:
        pass  # it was answered and closed while the client still wrote
    assert sent < 100 << 20


def test_spoken_sessions_take_broken_events(url: str, client: httpx.Client) -> None:
    texts = [
        "", "null", "[]", "1", '"x"', "{}", '{"type": null}', '{"type": "\\ud800"}', '{"type": "session.update"}', '{"type": "session.update", "session": {"instructions": "\\ud800"}}',
        "NaN", "[" * 60_000, '{"type": "input_audio_buffer.append", "audio": "' + "A" * 1001 + '"}', '{"type": "input_audio_buffer.append", "audio": "AA=A"}',
        '{"type": "input_audio_buffer.append", "audio": 1e999}', '{"type": "response.create", "response": {"max_output_tokens": -1}}',
        '{"type": "response.create", "response": {"instructions": "\\ud800", "output_modalities": ["text"]}}',
        '{"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "\\ud800"}]}}',
        '{"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": []}, "previous_item_id": "\\ud800"}',
        '{"type": "conversation.item.truncate", "item_id": "\\udfff", "content_index": 123456789012345678901234567890, "audio_end_ms": -1}',
    ]  # fmt: skip
    for query in ("", "?model=default", "?model=%ff", "?model=" + "x" * 3000):
        with connect(f"ws{url[4:]}/v1/realtime{query}", max_size=None) as voice:
            first = json.loads(voice.recv(timeout=10))
            if first["type"] == "error":
                assert first["error"]["code"] == "model_not_found"
                continue
            for text in texts:
                voice.send(text)
            voice.send(b"\xff\x00")
            item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "There?"}]}
            voice.send(json.dumps({"type": "conversation.item.create", "item": item}))
            voice.send(
                json.dumps(
                    {
                        "type": "response.create",
                        "response": {"output_modalities": ["text"], "metadata": {"last": "yes"}},
                    }
                )
            )
            errors, done, deadline = 0, 0, time.monotonic() + 10
            while time.monotonic() < deadline and not (done and errors >= len(texts) // 2):
                event = json.loads(voice.recv(timeout=10))
                if event["type"] == "error":
                    errors += 1
                    assert event["error"]["type"] == "invalid_request_error", event
                done += event["type"] == "response.done" and event["response"]["status"] == "completed"
            assert errors >= len(texts) // 2 and done
