"""Starting and ending: the port, the honest 503, the command as a process, and signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lorikeet.config import SYSTEM_PROMPT, ServeConfig
from lorikeet.errors import InputError
from lorikeet.serve.launch import check_exposure, serve
from lorikeet.serve.server import Listener
from lorikeet.weights import packaged_gguf


def test_a_port_in_use_is_one_line_that_names_it() -> None:
    with Listener("127.0.0.1", 0) as taken, pytest.raises(InputError, match=rf"port {taken.port} is in use.*--port"):
        Listener("127.0.0.1", taken.port)


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 70_000), ("127.0.0.1", -1), ("nowhere.invalid", 0), ("8.8.8.8", 0)]
)
def test_an_address_that_cannot_be_had_is_said(host: str, port: int) -> None:
    with pytest.raises(InputError, match=r"--(host|port)"):
        Listener(host, port)


def test_until_the_application_is_there_health_is_503() -> None:
    with Listener("127.0.0.1", 0) as listener:
        for method, path in (("GET", "/health"), ("POST", "/v1/chat/completions")):
            response = httpx.request(method, listener.url + path)
            assert (response.status_code, response.json()) == (503, {"status": "starting"})
        assert httpx.head(f"{listener.url}/health").status_code == 503
        listener.stop_waiting()
        with socket.create_connection(("127.0.0.1", listener.port), timeout=2):
            pass  # who connects in between waits, and is not refused


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.com"])
def test_others_are_let_in_only_with_a_key(host: str) -> None:
    with pytest.raises(InputError, match="--api-key"):
        check_exposure(ServeConfig(host=host))
    check_exposure(ServeConfig(host=host, api_key="secret"))


def test_an_empty_key_is_no_key() -> None:
    with pytest.raises(InputError, match="--api-key is empty"):
        check_exposure(ServeConfig(api_key=" "))


def test_a_damaged_model_is_one_line_and_gives_the_port_back(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and then nothing")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = ServeConfig(port=port, search="off", ears="off", voice="off")
    with pytest.raises(InputError, match=r"broken\.gguf"):
        serve(broken, config, system_prompt="", model_name="broken")
    Listener("127.0.0.1", port).__exit__()


SCRIPT = """
import sys
from pathlib import Path
from lorikeet.config import SYSTEM_PROMPT, ServeConfig
from lorikeet.serve.launch import serve
config = ServeConfig(port=0, search="off", ears="off", voice="off", context_tokens=512, max_answer_tokens=256)
serve(Path(sys.argv[1]), config, system_prompt=SYSTEM_PROMPT, model_name="small")
"""


@pytest.fixture(scope="module")
def process() -> Any:
    command = [sys.executable, "-u", "-c", SCRIPT, str(packaged_gguf())]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ) as running:
        assert running.stderr
        lines = []
        for line in running.stderr:
            lines.append(line)
            if line.startswith("ready: "):
                break
        else:
            pytest.fail("".join(lines))
        yield running, line.split()[1]
        running.kill()


def chat(url: str, text: str, **options: Any) -> Any:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="small", messages=messages, **options)


@pytest.mark.parametrize("question", ["Name three birds.", "Repeat after me: 🦜🎉 čaj, 你好!"])
def test_the_packaged_model_says_the_same_streamed_and_whole(process: Any, question: str) -> None:
    options = {"temperature": 0, "seed": 7, "max_tokens": 40}
    whole = chat(process[1], question, **options).choices[0].message.content
    pieces = [c.choices[0].delta.content or "" for c in chat(process[1], question, stream=True, **options)]
    assert "".join(pieces) == whole
    assert len(whole) > 10
    assert len(pieces) > 3
    assert "\ufffd" not in whole


def test_a_long_conversation_still_gets_an_answer(process: Any) -> None:
    client = openai.OpenAI(base_url=f"{process[1]}/v1", api_key="none", max_retries=0, timeout=120)
    turn = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "Yes."}]
    messages: Any = [*turn * 12, {"role": "user", "content": "Say hello."}]
    answer = client.chat.completions.create(model="small", messages=messages, max_tokens=5)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens < 512
    assert answer.choices[0].message.content


def test_a_question_beyond_the_context_is_the_requests_fault(process: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        chat(process[1], "word " * 900)


def test_sigterm_ends_the_server_within_its_bound_also_while_it_answers(process: Any) -> None:
    running, url = process
    messages = [{"role": "user", "content": "Tell a very long story."}]
    body = {"messages": messages, "stream": True, "max_tokens": 256}
    with ThreadPoolExecutor(16) as clients:  # more than it can end within its bound: some are cut, some still wait
        answers = [clients.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=30) for _ in range(16)]
        time.sleep(1)
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(15) == 0
        assert time.monotonic() - began < 15
    assert any(answer.exception() for answer in answers)
    said = running.stderr.read()
    assert "Traceback" not in said, said
    assert "running task(s)" in said
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_the_system_prompt_is_the_one_that_is_trained() -> None:
    assert "Lorikeet" in SYSTEM_PROMPT
