"""Many users: the line before the engine, models side by side, and a child that is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorikeet import engine
from lorikeet.config import ServeConfig
from lorikeet.engine import EngineDownError, HttpEngine, LateEngine, LlamaEngine, _start_child
from lorikeet.errors import EngineError, InputError
from lorikeet.files import sha256_file
from lorikeet.messages import Message
from lorikeet.run import RunFolder
from lorikeet.serve import launch
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.serve.memory import identify
from lorikeet.serve.models import Models, Served, UnknownModelError
from lorikeet.serve.note import Origin
from lorikeet.serve.queue import BusyError, Queue
from lorikeet.weights import packaged_gguf
from tests.serve.fakes import ScriptedEngine, served, serving, silent_server


def wait_until(condition: Any, *, timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)


def test_first_come_first_served_and_who_leaves_makes_room() -> None:
    queue = Queue(slots=1, places=3)
    tickets = [queue.join() for _ in range(4)]
    assert [ticket.position for ticket in tickets] == [0, 1, 2, 3]
    with pytest.raises(BusyError, match="3 requests wait"):
        queue.join()
    tickets[1].leave()
    late = queue.join()
    tickets[0].leave()
    assert [ticket.wait(0) for ticket in (tickets[2], tickets[3], late)] == [True, False, False]
    for ticket in (*tickets, late, late):
        ticket.leave()
    assert (queue.waiting, queue.answering, queue.refused) == (0, 0, 1)


def test_somebody_who_speaks_waits_for_nobody_who_types() -> None:
    queue = Queue(slots=2, places=0)
    texts = [queue.join(), queue.join()]
    first, second = queue.join(urgent=True), queue.join(urgent=True)
    assert (first.wait(0), second.wait(0)) == (True, False)
    with pytest.raises(BusyError):
        queue.join()
    texts[0].leave()
    assert second.wait(0)
    texts[1].leave()
    with pytest.raises(BusyError):
        queue.join()  # two speak: both slots are theirs


def ask(url: str, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)


@pytest.fixture
def slow() -> Any:
    engine = ScriptedEngine(*["word "] * 40, delay_s=0.02)
    assistant = Assistant(engine, config=ServeConfig(slots=1, queue=1))
    with served(create_app(serving(assistant), page=False)) as url:
        yield url, assistant.queue, engine


def test_a_full_line_is_503_with_a_time_to_come_back(slow: Any) -> None:
    url, queue, _ = slow
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, url, stream=number == 1) for number in range(2)]
        wait_until(lambda: (queue.answering, queue.waiting) == (1, 1))
        refused = ask(url)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_busy"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert [answer.result().status_code for answer in answers] == [200, 200]
    numbers = httpx.get(f"{url}/metrics").text
    assert "lorikeet_queue_refused_total 1.0" in numbers
    assert "lorikeet_queue_wait_seconds_count 2.0" in numbers


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_up_its_place(slow: Any, stream: bool) -> None:
    url, queue, engine = slow
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, url)
        wait_until(lambda: queue.answering == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.1)
        wait_until(lambda: queue.waiting == 0, timeout_s=0.6)
        assert queue.answering == 1  # the first still is
        first.result()
    assert len(engine.asked) == 1


def test_models_are_chosen_by_name_and_share_one_line() -> None:
    queue = Queue(slots=4, places=4)
    models = Models(
        *(
            Served(name=name, assistant=Assistant(ScriptedEngine(name), queue=queue), kind=kind)  # type: ignore[arg-type]
            for name, kind in (("mine", "tuned"), ("mine-base", "base"))
        )
    )
    with served(create_app(models, page=False)) as url:
        for asked, answered in (("mine", "mine"), ("mine-base", "mine-base"), ("default", "mine")):
            answer = ask(url, model=asked).json()
            assert (answer["model"], answer["choices"][0]["message"]["content"]) == (answered, answered)
        assert ask(url, model="../mine").status_code == 404
        kinds = [card["lorikeet"]["kind"] for card in httpx.get(f"{url}/v1/models").json()["data"]]
        assert kinds == ["tuned", "base"]
    with pytest.raises(UnknownModelError):
        models.choose("mine-base ")
    with pytest.raises(InputError, match="a name of its own"):
        Models(models.default, models.default)


def run_with_proof(root: Path, base: Path) -> Path:
    """Return the GGUF of a run whose manifest and proof are about its file and about `base`."""
    run = RunFolder.create(root, config={})
    gguf = root / "gguf" / "model-q8_0.gguf"
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"tuned")
    run.update(base={"id": "folder/small-one", "sha256": "1" * 64}, template={"sha256": "2" * 64})
    run.record("gguf/model-q8_0.gguf", gguf, adapter_sha256="3" * 64)
    run.reports.mkdir(exist_ok=True)
    hashes = run.manifest()["artefacts"]["gguf/model-q8_0.gguf"]["sha256"]
    files = {"tuned": "gguf/model-q8_0.gguf", "tuned_sha256": hashes, "base_sha256": sha256_file(base)}
    (run.reports / "proof.json").write_text(json.dumps({"checks": [], "files": files}))
    return gguf


@pytest.mark.parametrize(
    ("fault", "served_models", "said"),
    [
        ("", [("mine", "tuned", True), ("small-one", "base", True)], "beside it: small-one"),
        ("proof", [("mine", "tuned", False)], "no proof is about model-q8_0.gguf"),
        ("tuned", [("mine", "tuned", False)], "no proof is about model-q8_0.gguf"),
        ("base", [("mine", "tuned", True)], "the base that was proved is not in the cache"),
        ("gone", [("mine", "tuned", True)], "the base that was proved is not in the cache"),
        ("old", [("mine", "tuned", True)], "the proof does not say which file the base was"),
    ],
)
def test_the_base_is_served_beside_the_tuned_model_where_both_were_proved(
    tmp_path: Path, monkeypatch: Any, capsys: Any, fault: str, served_models: Any, said: str
) -> None:
    base = tmp_path / "base-q8_0.gguf"
    base.write_bytes(b"base")
    gguf = run_with_proof(tmp_path / "mine", base)
    monkeypatch.setattr(launch, "base_gguf_path", lambda *_: base)
    if fault == "proof":
        (tmp_path / "mine" / "reports" / "proof.json").unlink()
    if fault == "tuned":
        gguf.write_bytes(b"exported again")
        run = RunFolder.open(tmp_path / "mine")
        run.record("gguf/model-q8_0.gguf", gguf, adapter_sha256="3" * 64)
    if fault == "base":
        base.write_bytes(b"another base")
    if fault == "gone":
        base.unlink()
    if fault == "old":
        proof = tmp_path / "mine" / "reports" / "proof.json"
        proof.write_text(proof.read_text().replace('"base_sha256"', '"base_hash"'))
    assistant = Assistant(ScriptedEngine())
    models = launch._models(gguf, identify(gguf, "mine"), assistant, ServeConfig())
    assert [(model.name, model.kind, model.proved) for model in models] == served_models
    assert said in capsys.readouterr().err
    assert all(model.assistant.queue is assistant.queue for model in models)


def test_an_engine_that_starts_late_costs_nothing_and_its_failure_is_503(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "RESTART_FIRST_S", 60)
    started: list[ScriptedEngine] = []

    def start() -> ScriptedEngine:
        started.append(ScriptedEngine("base"))
        if len(started) == 1:
            raise InputError("base.gguf was changed")
        return started[-1]

    tuned = Assistant(ScriptedEngine("tuned"))
    late_engine = LateEngine(start, name="base")
    late = tuned.beside(late_engine, origin=Origin(name="base"))
    models = Models(Served(name="tuned", assistant=tuned), Served(name="base", assistant=late))
    with served(create_app(models, page=False)) as url:
        assert ask(url).json()["choices"][0]["message"]["content"] == "tuned"
        assert not started
        for _ in range(3):  # a failed start is not repeated for everybody who asks
            refused = ask(url, model="base")
            assert (refused.status_code, "was changed" in refused.text) == (503, True)
        assert len(started) == 1
        assert httpx.get(f"{url}/health").status_code == 200
        late_engine._again_s = 0
        assert ask(url, model="base").json()["choices"][0]["message"]["content"] == "base"
        assert ask(url, model="base").status_code == 200
        assert len(started) == 2
        late.close()
        assert ask(url, model="base").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200


def test_an_engine_that_takes_long_to_start_stops_neither_the_others_nor_the_end(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "LATE_WAIT_S", 0.5)
    loaded, ended = threading.Event(), threading.Event()
    slow = ScriptedEngine("base")
    slow.close = ended.set  # type: ignore[method-assign]

    def start() -> ScriptedEngine:
        loaded.wait(10)
        return slow

    tuned = Assistant(ScriptedEngine("tuned"))
    late_engine = LateEngine(start, name="base")
    late = tuned.beside(late_engine, origin=Origin(name="base"))
    models = Models(Served(name="tuned", assistant=tuned), Served(name="base", assistant=late))
    with served(create_app(models, page=False)) as url, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(ask, url, model="base")
        wait_until(lambda: tuned.queue.answering == 1)
        assert ask(url).json()["choices"][0]["message"]["content"] == "tuned"
        refused = waits.result()
        assert (refused.status_code, "is being loaded" in refused.text) == (503, True)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{url}/v1/chat/completions",
                json={"model": "base", "messages": [{"role": "user", "content": "Hi"}]},
                timeout=0.1,
            )
        wait_until(lambda: tuned.queue.answering == 0, timeout_s=0.45)  # who left does not hold the slot to the end
    threading.Timer(0.3, loaded.set).start()
    began = time.monotonic()
    late_engine.close()
    assert time.monotonic() - began < 5
    assert ended.wait(5)  # what came too late is ended


def test_a_start_that_fails_in_an_unknown_way_is_told_and_tried_again() -> None:
    starts = []

    def start() -> ScriptedEngine:
        starts.append(1)
        raise RuntimeError("can't start new thread")

    late = LateEngine(start, name="base")
    for _ in range(2):
        with pytest.raises(EngineDownError, match="can't start new thread"):
            list(late.stream([Message("user", "Hi")]))
    assert len(starts) == 1 and "can't start" in late.problem()
    late._again_s = 0
    with pytest.raises(EngineDownError, match="can't start new thread"):
        list(late.stream([Message("user", "Hi")]))
    assert len(starts) == 2


def test_who_still_searches_keeps_a_place_and_no_slot() -> None:
    queue = Queue(slots=1, places=1)
    searching, quick = queue.join(ready=False), queue.join()
    assert (searching.wait(0), quick.wait(0)) == (False, True)
    with pytest.raises(BusyError):
        queue.join()
    assert searching.position == 1
    time.sleep(0.05)
    searching.ready()
    assert not searching.wait(0)
    quick.leave()
    assert searching.wait(0)
    assert (
        searching.admitted_s and searching.admitted_s - searching.ready_s < 0.05
    )  # what the search took is no waiting


def test_who_still_searches_is_not_counted_before_others() -> None:
    queue = Queue(slots=1, places=4)
    inside, searching, waiting = queue.join(), queue.join(ready=False), queue.join()
    assert [ticket.position for ticket in (inside, searching, waiting)] == [0, 1, 1]
    searching.ready()
    assert [ticket.position for ticket in (searching, waiting)] == [1, 2]


def test_a_refused_file_leaves_no_pipe_open(tmp_path: Path) -> None:
    refused = tmp_path / "no-tensors.gguf"
    refused.write_bytes(b"GGUF")
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with pytest.raises(EngineError, match="could not load"):
            _start_child(
                {"gguf": str(refused), "context_tokens": 64, "slots": 1, "threads": 1, "scoring": False, "key": "k"},
                refused,
            )
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= open_files)


def test_a_killed_child_is_said_and_started_again() -> None:
    engine = LlamaEngine(packaged_gguf(), context_tokens=256, restart=True)
    assistant = Assistant(engine)
    with served(create_app(serving(assistant), page=False)) as url:
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        os.kill(engine._process.pid, signal.SIGKILL)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        assert "-9" in httpx.get(f"{url}/health").json()["reason"]
        refused = ask(url, max_tokens=2)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200, timeout_s=30)
        assert ask(url, max_tokens=2).status_code == 200
        child = engine._process
        engine.close()
        assert child.poll() is not None
        time.sleep(1.5)  # longer than the first pause: what was closed stays closed
        assert engine._process is child


def test_a_file_that_was_changed_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was changed"):
        LlamaEngine(packaged_gguf(), sha256="0" * 64)


def test_threads_end_with_their_requests(slow: Any) -> None:
    url, queue, _ = slow
    before = threading.active_count()
    for _ in range(20):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]}, timeout=0.05
            )
    wait_until(lambda: (queue.waiting, queue.answering) == (0, 0))
    assert threading.active_count() <= before + 12


def test_who_leaves_a_remote_engine_that_says_nothing_gives_up_the_slot_and_the_server_ends() -> None:
    with silent_server() as (remote, left), ThreadPoolExecutor(4) as pool:
        assistant = Assistant(HttpEngine(remote, name="mute"), config=ServeConfig(slots=4, queue=1))
        with served(create_app(serving(assistant), page=False)) as url:
            body = {"messages": [{"role": "user", "content": "Hi"}]}
            for stream in (True, True, False, False):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": stream}, timeout=0.5)
            wait_until(lambda: assistant.queue.answering == 0, timeout_s=5)
            assert all(left.acquire(timeout=5) for _ in range(4))  # the remote can stop, too
            for stream in (True, False):
                pool.submit(ask, url, stream=stream)
            wait_until(lambda: assistant.queue.answering == 2)
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 6
