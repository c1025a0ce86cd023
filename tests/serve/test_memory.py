"""The memory: what is kept and what never is, feedback, deletion to the last byte, broken disks, killed processes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.config import ServeConfig
from lorikeet.errors import EngineError, InputError
from lorikeet.grounding import HEADER
from lorikeet.messages import Message, Source
from lorikeet.serve.assistant import Assistant, Text
from lorikeet.serve.http import create_app
from lorikeet.serve.memory import Memory, identify
from lorikeet.serve.models import Models, Served
from lorikeet.serve.note import Note, Origin, new_id
from lorikeet.serve.store import Store, StoreError, storable
from tests.serve.fakes import ScriptedEngine, ScriptedProvider, served

OSLO = Source("Weather in Oslo", "https://weather.example/oslo", "Light snow, minus two degrees.")
ORIGIN = Origin(name="parrot", quant="q8_0", gguf_sha256="a" * 64, adapter_sha256="b" * 64)
SECRET = "xylophone-cadmium-4711"
DAY_MS = 24 * 3600 * 1000


def note(question: str = "Hi", answer: str = "Hello.", **more: Any) -> Note:
    return Note(
        **{
            "id": new_id("turn"), "channel": "page", "question": question, "answer": answer, "outcome": "stop",
            "prompt": (Message("system", "Be brief."), Message("user", question)), "origin": ORIGIN, **more,
        }
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.db"


@contextmanager
def server(path: Path | None, engine: ScriptedEngine | None = None, **more: Any) -> Iterator[str]:
    memory = Memory.open(path) if path else None
    assistant = Assistant(
        engine or ScriptedEngine("Light ", "snow", "."),
        system_prompt="Be brief.", provider=ScriptedProvider(OSLO), config=ServeConfig(), memory=memory, origin=ORIGIN,
    )  # fmt: skip
    app = create_app(Models(Served(name="parrot", assistant=assistant)), page=False, **more)
    try:
        with served(app) as url:
            yield url
    finally:
        if memory:
            memory.close()


def ask(url: str, text: str = "What is the weather in Oslo?", **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def turns(path: Path) -> list[dict[str, Any]]:
    with Store.open(path) as store:
        return [turn for conversation in store.conversations() for turn in conversation["turns"]]


def bytes_of(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(path.name + "*")))


# What is kept.


def test_nothing_is_written_where_no_memory_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in {"sqlite3.connect"} else None)
    with server(None) as url:
        answer = ask(url, lorikeet={"search": "always"})
        assert answer["lorikeet"]["memory"] is None
        response = httpx.post(f"{url}/v1/feedback", json={"id": answer["id"], "rating": "up"})
        assert response.status_code == 404
        assert "without --memory" in response.json()["error"]["message"]
    assert opened == []
    assert list(tmp_path.iterdir()) == []


def test_a_turn_is_kept_as_the_model_was_given_it(path: Path) -> None:
    engine = ScriptedEngine("Light ", "snow", ".")
    with server(path, engine) as url:
        answer = ask(url, lorikeet={"search": "always"})
        assert answer["lorikeet"]["memory"]["id"] == answer["id"]
    (turn,) = turns(path)
    assert turn["id"] == answer["id"]
    assert (turn["question"], turn["answer"], turn["outcome"]) == (
        "What is the weather in Oslo?", "Light snow.", "stop",
    )  # fmt: skip
    assert turn["prompt"] == [message.as_dict() for message in engine.asked[-1]]
    assert turn["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert turn["prompt"][1]["content"].startswith(HEADER)
    assert turn["search"]["reason"] == "search is set to always"
    assert turn["search"]["sources"] == [{"title": OSLO.title, "url": OSLO.url, "snippet": OSLO.snippet}]
    assert turn["model"] == {"name": "parrot", "quant": "q8_0", "gguf_sha256": "a" * 64, "adapter_sha256": "b" * 64}
    assert turn["usage"] == {"prompt_tokens": 7, "completion_tokens": 3}
    assert 0 <= turn["timings_ms"]["first_token"] <= turn["timings_ms"]["answer"]
    assert abs(turn["began_ms"] / 1000 - time.time()) < 60


def test_streamed_turns_say_where_they_are_kept_and_go_on(path: Path) -> None:
    with server(path) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        messages: Any = [{"role": "user", "content": "Hi"}]
        chunks = list(client.chat.completions.create(model="default", messages=messages, stream=True))
        kept = chunks[-1].model_extra["lorikeet"]["memory"]  # type: ignore[index]
        assert kept["id"] == chunks[0].id
        again = ask(url, "And you?", lorikeet={"conversation": kept["conversation"]})
        assert again["lorikeet"]["memory"]["conversation"] == kept["conversation"]
        chosen = ask(url, "Mine?", lorikeet={"conversation": "conv_1"})["lorikeet"]["memory"]["conversation"]
        assert chosen not in {"conv_1", kept["conversation"]}
        conversation = httpx.get(f"{url}/v1/conversations/{kept['conversation']}").json()
    assert [turn["question"] for turn in conversation["turns"]] == ["Hi", "And you?"]
    assert conversation["channel"] == "api"


def test_a_client_can_keep_a_turn_out(path: Path) -> None:
    with server(path) as url:
        assert ask(url, store=False)["lorikeet"]["memory"] is None
        assert ask(url, store=True)["lorikeet"]["memory"] is not None
    assert len(turns(path)) == 1


def test_what_was_stopped_or_failed_is_marked(path: Path) -> None:
    with Memory.open(path) as memory:
        for engine in (ScriptedEngine("one ", "two ", "three"), ScriptedEngine("one ", "<fail>")):
            assistant = Assistant(engine, memory=memory)
            events = assistant.respond([Message("user", "Hi")], note=note(answer="", outcome="stopped"))
            assert isinstance(next(events), Text)
            if engine.pieces[1] == "<fail>":
                with pytest.raises(EngineError, match="in the middle"):
                    next(events)
            events.close()
        for _ in Assistant(ScriptedEngine("one"), memory=memory).respond([Message("user", "Hi")]):
            pass  # without a note nothing is kept
        assistant = Assistant(ScriptedEngine("one"), memory=memory)
        for _ in assistant.respond([Message("user", "Hi")], note=note(answer="", deferred=True)):
            pass  # nor before the one who asked says so
    assert [(turn["answer"], turn["outcome"]) for turn in turns(path)] == [("one ", "stopped"), ("one ", "failed")]


def test_the_served_file_and_its_adapter_are_named(tmp_path: Path) -> None:
    gguf = tmp_path / "run" / "gguf" / "model-q8_0.gguf"
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"weights")
    assert identify(gguf, "m") == Origin(name="m", gguf_sha256=hashlib.sha256(b"weights").hexdigest())
    entry = {"sha256": {"model-q8_0.gguf": "c" * 64}, "adapter_sha256": "d" * 64}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"artefacts": {"gguf/model-q8_0.gguf": entry}}))
    assert identify(gguf, "m") == Origin(name="m", quant="q8_0", gguf_sha256="c" * 64, adapter_sha256="d" * 64)
    assert identify("http://127.0.0.1:1/v1", "m") == Origin(name="m")


def test_what_is_served_and_what_is_kept_tell_the_same() -> None:
    assistant = Assistant(ScriptedEngine())
    facts = {"name": "m", "assistant": assistant}
    assert Served.of(ORIGIN, assistant) == Served(
        **facts | {"name": "parrot"}, kind="tuned", quant="q8_0", sha256="a" * 64, adapter_sha256="b" * 64
    )
    assert Served.of(Origin(name="m", gguf_sha256="c" * 64), assistant) == Served(**facts, kind="file", sha256="c" * 64)
    assert Served.of(Origin(name="m"), assistant) == Served(**facts, kind="remote")


# Feedback.


def test_the_last_feedback_counts_and_what_is_left_out_stays(path: Path) -> None:
    with server(path) as url:
        identity = ask(url)["id"]

        def rate(**fields: Any) -> dict[str, Any]:
            response = httpx.post(f"{url}/v1/feedback", json={"id": identity, **fields})
            assert response.status_code == 200, response.text
            body: dict[str, Any] = response.json()
            return body

        assert rate(rating="down")["rating"] == "down"
        assert rate(rating="up", comment="fine")["rating"] == "up"
        assert rate(correction="It snows.") == {
            "object": "feedback", "id": identity, "rating": "up", "correction": "It snows.", "comment": "fine",
        }  # fmt: skip
        assert rate(comment=None)["comment"] is None
        assert rate(comment=None) == rate(comment=None)
    (turn,) = turns(path)
    assert turn["feedback"] == {"rating": "up", "correction": "It snows.", "comment": None}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"id": "chatcmpl-0", "rating": "up"}, 404),
        ({"rating": "up"}, 400),
        ({"id": "x"}, 400),
        ({"id": "x", "rating": "great"}, 400),
        ({"id": "x", "rating": 1}, 400),
        ({"id": "x", "correction": "  "}, 400),
        ({"id": "x", "correction": "y" * 64_001}, 400),
        ({"id": "x", "comment": "y" * 4001}, 400),
        ({"id": "x" * 101, "rating": "up"}, 400),
        ({"id": "x", "rating": "up", "user": "y"}, 400),
        ({"id": "' OR 1=1 --", "rating": "up"}, 404),
        ([], 400),
    ],
)
def test_feedback_that_cannot_be_taken_is_refused(url: str, body: Any, status: int) -> None:
    response = httpx.post(f"{url}/v1/feedback", json=body)
    assert response.status_code == status
    assert response.json()["error"]["message"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("memory") / "memory.db") as base:
        yield base


# Whose it is.


def test_ids_cannot_be_guessed_and_nothing_lists_them(url: str) -> None:
    kept = [ask(url, f"Question {number}")["lorikeet"]["memory"] for number in range(3)]
    ids = {value for entry in kept for value in entry.values()}
    assert len(ids) == 6
    assert all(len(value.rpartition("_")[2].rpartition("-")[2]) == 32 for value in ids)
    for guess in ("", "1", "conv_", "%", "*", kept[0]["id"], kept[0]["conversation"][:-1]):
        response = httpx.get(f"{url}/v1/conversations/{guess}")
        assert response.status_code == 404, guess
        assert "Question" not in response.text


def test_the_key_is_asked_for(path: Path) -> None:
    with server(path, api_key="key") as url:
        assert httpx.post(f"{url}/v1/feedback", json={"id": "x", "rating": "up"}).status_code == 401
        assert httpx.get(f"{url}/v1/conversations/x").status_code == 401
        assert httpx.delete(f"{url}/v1/conversations/x").status_code == 401


# Deleting.


def test_what_is_deleted_is_in_no_byte_of_the_files(path: Path) -> None:
    with server(path) as url:
        kept = ask(url, SECRET * 900)["lorikeet"]["memory"]
        other = ask(url, "marimba")["lorikeet"]["memory"]
        httpx.post(f"{url}/v1/feedback", json={"id": kept["id"], "correction": f"No {SECRET}"})
        assert SECRET.encode() in bytes_of(path)
        deleted = httpx.delete(f"{url}/v1/conversations/{kept['conversation']}")
        assert deleted.json() == {"object": "conversation.deleted", "id": kept["conversation"], "deleted": True}
        assert path.with_name("memory.db-wal").stat().st_size == 0
        assert SECRET.encode() not in bytes_of(path)
        assert kept["id"].encode() not in bytes_of(path)
        assert httpx.get(f"{url}/v1/conversations/{kept['conversation']}").status_code == 404
        assert httpx.delete(f"{url}/v1/conversations/{kept['conversation']}").status_code == 404
        assert httpx.get(f"{url}/v1/conversations/{other['conversation']}").status_code == 200


def test_deletion_says_so_when_a_reader_keeps_the_log(path: Path) -> None:
    with Store.open(path) as store:
        kept = store.keep(note(SECRET))
        reader = sqlite3.connect(path)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM turns").fetchone()
        with pytest.raises(StoreError, match="another program is reading"):
            store.delete(kept.conversation_id)
        reader.close()
        assert store.conversation(kept.conversation_id) is None
        store.overwrite()
        assert SECRET.encode() not in bytes_of(path)


def test_old_conversations_go_at_the_start_and_space_comes_back(path: Path) -> None:
    with Store.open(path) as store:
        for days in (40, 31, 29, 0):
            store.keep(note(f"{SECRET} {days} " + "x" * 20_000, began_s=time.time() - days * 24 * 3600))
    before = path.stat().st_size
    with Memory.open(path, days=30):
        pass
    assert [turn["question"].split()[1] for turn in turns(path)] == ["29", "0"]
    assert f"{SECRET} 40".encode() not in bytes_of(path)
    assert path.stat().st_size < 0.7 * before, "half of it was deleted"
    with Memory.open(path, days=0):
        assert len(turns(path)) == 2


def test_the_sweep_comes_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorikeet.serve.memory.DAY_S", 0.05)
    with Memory.open(path, days=1) as memory:
        memory.keep(note())
        deadline = time.monotonic() + 10
        while turns(path) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert turns(path) == []


# The file.


def test_only_its_owner_can_read_it(path: Path) -> None:
    path.touch(0o644)
    path.chmod(0o644)
    with Store.open(path) as store:
        store.keep(note())
        files = sorted(path.parent.glob("memory.db*"))
        assert len(files) == 3
        assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * 3


def test_a_damaged_or_foreign_file_is_one_line_and_stays_as_it_is(path: Path, tmp_path: Path) -> None:
    with Store.open(path) as store:
        for number in range(40):
            store.keep(note(f"{number} " + "x" * 3000))
    whole = path.read_bytes()
    noise = random.Random(1).randbytes(4096)
    for name, data in (
        ("text", b"not a database, " * 400),
        ("cut", whole[: len(whole) // 2]),
        ("page", whole[:8192] + noise + whole[8192 + 4096 :]),
        ("head", noise[:100] + whole[100:]),
    ):
        file = tmp_path / name
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"is damaged|another program") as caught:
            Store.open(file)
        assert "\n" not in str(caught.value), name
        assert file.read_bytes() == data, name
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE bookmarks (url)")
    db.close()
    foreign.chmod(0o644)
    with pytest.raises(InputError, match="another program"):
        Store.open(foreign)
    assert stat.S_IMODE(foreign.stat().st_mode) == 0o644, "its rights are its own program's business"
    empty = tmp_path / "empty.db"
    empty.touch()
    with pytest.raises(InputError, match="is empty"):
        Store.open(empty, create=False)
    assert empty.stat().st_size == 0
    with pytest.raises(InputError, match="is a folder"):
        Store.open(tmp_path)
    with pytest.raises(InputError, match="is not there"):
        Store.open(tmp_path / "none.db", create=False)


def test_migrations_apply_in_order_whole_or_not_at_all(path: Path) -> None:
    first = "CREATE TABLE a (x);\nINSERT INTO a VALUES (1);"
    Store.open(path, migrations=[first]).close()
    with pytest.raises(StoreError, match="no such table"):
        Store.open(path, migrations=[first, "CREATE TABLE b (x);\nINSERT INTO missing VALUES (1);"])
    db = sqlite3.connect(path)
    assert [row[0] for row in db.execute("SELECT name FROM sqlite_master")] == ["a"]
    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    db.close()
    Store.open(path, migrations=[first, "CREATE TABLE b (x);"]).close()
    Store.open(path, migrations=[first, "CREATE TABLE b (x);"]).close()
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM a").fetchone() == (1,)
    assert db.execute("PRAGMA user_version").fetchone() == (2,)
    db.close()
    with pytest.raises(InputError, match="newer Lorikeet"):
        Store.open(path, migrations=[first])


def test_a_full_disk_costs_no_answer(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory.open(path)
    assistant = Assistant(ScriptedEngine("Light ", "snow", "."), memory=memory, origin=ORIGIN)
    with served(create_app(Models(Served(name="parrot", assistant=assistant)), page=False)) as url:
        ask(url)
        pages = memory._store._db.execute("PRAGMA page_count").fetchone()[0]
        memory._store._db.execute(f"PRAGMA max_page_count = {pages}")
        for _ in range(3):
            answer = ask(url, "x" * 60_000)
            assert answer["choices"][0]["message"]["content"] == "Light snow."
            assert answer["lorikeet"]["memory"] is None
        numbers = httpx.get(f"{url}/metrics").text
        assert 'lorikeet_memory_turns_total{result="failed"} 3.0' in numbers
        assert 'lorikeet_memory_turns_total{result="kept"} 1.0' in numbers
        assert len([r for r in caplog.records if "full" in r.getMessage()]) == 1, "said once, not at every turn"
        memory._store._db.execute("PRAGMA max_page_count = 1000000")
        assert ask(url, "x" * 60_000)["lorikeet"]["memory"] is not None
    memory.close()


def test_a_file_that_was_removed_is_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Memory.open(path) as memory:
        path.unlink()
        memory.keep(note())
        assert memory.failed_turns == 1
        assert "was removed" in caplog.text


ID_CHARACTERS = len(new_id("turn"))
"""A killed process may have said a part of its last one."""

WRITER = """
import sys
from pathlib import Path
from lorikeet.messages import Message
from lorikeet.serve.note import Note, new_id
from lorikeet.serve.store import Store
store = Store.open(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    note = Note(id=new_id("turn"), channel="api", question=f"{number}", answer="x" * 5000, prompt=(Message("user", "y"),))
    print(store.keep(note).id, flush=True)
"""


def test_killed_while_writing_it_loses_only_the_turn_under_way(path: Path) -> None:
    said: list[str] = []
    chance = random.Random(7)
    for _ in range(6):
        command = [sys.executable, "-c", WRITER, str(path), "100000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            said.append(process.stdout.readline().strip())
            time.sleep(chance.uniform(0.0, 0.1))
            process.send_signal(signal.SIGKILL)
            said += [line.strip() for line in process.stdout.read().splitlines() if len(line.strip()) == ID_CHARACTERS]
    with Store.open(path) as store:
        kept = {turn["id"] for conversation in store.conversations() for turn in conversation["turns"]}
        assert len(said) > 6
        assert set(said) <= kept
        assert len(kept) <= len(said) + 6


def test_processes_share_a_file(path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), "60"], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [line for process in processes for line in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(said) == 180
    assert {turn["id"] for turn in turns(path)} == set(said)


def test_threads_share_a_store(path: Path) -> None:
    with Memory.open(path) as memory:

        def work(number: int) -> None:
            for turn in range(25):
                mine = note(f"{number} {turn}", conversation_id=f"conv_{number}")
                memory.keep(mine)
                assert mine.kept is not None
                assert memory.rate(mine.id, {"comment": f"{number} {turn}"})
                assert memory.conversation(f"conv_{number}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (memory.kept_turns, memory.failed_turns) == (200, 0)
        for number in range(8):
            conversation = memory.conversation(f"conv_{number}")
            assert conversation is not None
            assert [turn["question"] for turn in conversation["turns"]] == [f"{number} {turn}" for turn in range(25)]
            assert all(turn["feedback"]["comment"] == turn["question"] for turn in conversation["turns"])


# Any text.


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(tmp_path_factory.mktemp("any") / "memory.db") as store:
        yield store


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=())), source=st.text(st.characters(exclude_categories=())))
def test_any_text_comes_back(shared_store: Store, text: str, source: str) -> None:
    kept = shared_store.keep(
        note(
            text, text, search_reason=text, sources=(Source(source, source, source),),
            prompt=(Message("user", text),), origin=Origin(name=text),
        )
    )  # fmt: skip
    shared_store.rate(kept.id, {"correction": text, "comment": source})
    conversation = shared_store.conversation(kept.conversation_id)
    assert conversation is not None
    (turn,) = conversation["turns"]
    clean = storable(text)
    assert (turn["question"], turn["answer"], turn["prompt"]) == (clean, clean, [{"role": "user", "content": clean}])
    assert turn["search"]["sources"][0]["url"] == storable(source)
    assert (turn["feedback"]["correction"], turn["feedback"]["comment"]) == (clean, storable(source))
    assert turn["model"]["name"] == clean


@pytest.mark.parametrize("text", ["🦜" * 250_000, "a\0b\0", "\ud800x\udfff", "'; DROP TABLE turns; --", "\u202e\ufeff"])
def test_hard_texts_come_back(shared_store: Store, text: str) -> None:
    kept = shared_store.keep(note(text, text))
    conversation = shared_store.conversation(kept.conversation_id)
    assert conversation is not None
    assert conversation["turns"][0]["answer"] == storable(text)
    conversation["turns"][0]["answer"].encode()
    assert os.path.getsize(shared_store._path) > 0


def test_what_answers_nobody_is_not_kept(path: Path) -> None:
    with server(path) as url:
        for messages in (
            [{"role": "system", "content": "Be."}],
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        ):
            answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages})
            assert (answer.status_code, answer.json()["lorikeet"]["memory"]) == (200, None)
