"""`lorikeet memory`: what people said and mended becomes rows that tuning reads, and goes when it is told to."""

from __future__ import annotations

import json
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorikeet import cli
from lorikeet.data.load import load_conversations
from lorikeet.grounding import ground
from lorikeet.messages import Message, Source, ToolCall
from lorikeet.prompt import PromptFormat
from lorikeet.run import RunFolder
from lorikeet.serve.note import Note, Origin, new_id
from lorikeet.serve.rows import preference_rows, sft_rows
from lorikeet.serve.store import Store
from tests.conftest import make_conversations

SYSTEM = Message("system", "Be brief.")
SECRET = "xylophone-cadmium-4711"


def keep(store: Store, question: str, answer: str, *earlier: Message, conversation: str = "", **more: Any) -> Note:
    """Keep a turn that came after `earlier` ones."""
    note = Note(
        id=new_id("turn"), channel="page", conversation_id=conversation, origin=Origin(name="parrot"),
        question=question, prompt=(SYSTEM, *earlier, Message("user", question)), answer=answer,
        **{"outcome": "stop", **more},
    )  # fmt: skip
    note.kept = store.keep(note)
    return note


def said(question: str, answer: str) -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", answer)


def learned(row: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in row["messages"] if turn["role"] == "assistant" and turn.get("weight") != 0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.db"


@pytest.fixture
def store(path: Path) -> Any:
    with Store.open(path) as opened:
        yield opened


def memory(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.run(["memory", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]


# Rows.


def test_turns_that_go_on_are_one_row(store: Store) -> None:
    keep(store, "One?", "One.", conversation="conv_a")
    keep(store, "Two?", "Two.", *said("One?", "One."), conversation="conv_a")
    keep(store, "Other?", "Other.", conversation="conv_b")
    first, second = sft_rows(store.conversations(), rated_only=False)
    assert [turn["content"] for turn in first["messages"]] == ["Be brief.", "One?", "One.", "Two?", "Two."]
    assert (learned(first), learned(second)) == (["One.", "Two."], ["Other."])


def test_a_correction_stands_in_the_place_of_its_answer_and_only_there(store: Store) -> None:
    wrong = keep(store, "One?", "Wrong.", conversation="conv_a")
    keep(store, "Two?", "Two.", *said("One?", "Wrong."), conversation="conv_a")
    store.rate(wrong.id, {"rating": "down", "correction": "Right."})
    first, second = sft_rows(store.conversations(), rated_only=False)
    assert [turn["content"] for turn in first["messages"]] == ["Be brief.", "One?", "Right."]
    # The second was said after the wrong one, which it must see and not learn.
    assert [turn["content"] for turn in second["messages"]] == ["Be brief.", "One?", "Wrong.", "Two?", "Two."]
    assert (learned(first), learned(second)) == (["Right."], ["Two."])
    (pair,) = preference_rows(store.conversations())
    assert pair == {
        "id": wrong.id,
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}],
        "chosen": [{"role": "assistant", "content": "Right."}],
        "rejected": [{"role": "assistant", "content": "Wrong."}],
    }


@pytest.mark.parametrize(
    ("rating", "correction", "outcome", "all_turns", "rated_only"),
    [
        (None, None, "stop", ["Said."], []),
        ("up", None, "stop", ["Said."], ["Said."]),
        ("down", None, "stop", [], []),
        (None, "Mended.", "stop", ["Mended."], ["Mended."]),
        ("down", "Mended.", "stop", ["Mended."], ["Mended."]),
        ("up", None, "length", [], []),
        ("up", None, "stopped", [], []),
        (None, None, "interrupted", [], []),
        (None, "Mended.", "failed", ["Mended."], ["Mended."]),
    ],
)
def test_which_answers_are_learned(
    store: Store, rating: str | None, correction: str | None, outcome: str, all_turns: list[str], rated_only: list[str]
) -> None:
    note = keep(store, "Ask?", "Said.", outcome=outcome)
    store.rate(note.id, {"rating": rating, "correction": correction})
    for only, expected in ((False, all_turns), (True, rated_only)):
        assert [text for row in sft_rows(store.conversations(), rated_only=only) for text in learned(row)] == expected
    assert len(list(preference_rows(store.conversations()))) == bool(correction)


def test_a_correction_that_says_the_same_is_no_preference(store: Store) -> None:
    note = keep(store, "Ask?", "Said.")
    store.rate(note.id, {"correction": " Said.\n"})
    assert list(preference_rows(store.conversations())) == []


def test_what_tuning_does_not_read_makes_no_row(store: Store, tmp_path: Path) -> None:
    call = Message("assistant", "", tool_calls=(ToolCall(0, "call_1", "time", "{}"),))
    result = Message("tool", "12:00", tool_call_id="call_1")
    notes = [
        keep(store, "And then?", "One.", Message("user", "Time?"), call, result),
        keep(store, "Late system?", "Two.", Message("user", "Hi"), Message("system", "Be loud.")),
        keep(store, " ", "Three."),
        keep(store, "Fine?", "Fine."),
    ]
    for note in notes:
        store.rate(note.id, {"correction": "Better."})
    for rows in (sft_rows(store.conversations(), rated_only=False), preference_rows(store.conversations())):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        loaded = load_conversations(str(file))
        assert [conversation.messages[1].content for conversation in loaded.conversations] == ["Fine?"]
        assert loaded.broken == []


# The command.


@pytest.fixture
def kept(path: Path) -> Path:
    """Thirty conversations: every third is corrected, one is rated down, one has search results, two go on."""
    with Store.open(path) as store:
        for number, conversation in enumerate(make_conversations(30)):
            question, answer = (message.content for message in conversation.messages)
            if number == 1:
                question = ground(question, [Source("Timetable", "https://trains.example/", "Trains at nine.")])
            note = keep(store, question, answer, began_s=1_700_000_000 + number)
            if number % 3 == 0:
                store.rate(note.id, {"rating": "down", "correction": f"Mended {number} \u2028 ünd so."})
            if number == 4:
                store.rate(note.id, {"rating": "down"})
            if number == 5:
                store.rate(note.id, {"rating": "up"})
            if number in {5, 6}:
                assert note.kept is not None
                keep(store, "More?", "More.", *said(question, answer), conversation=note.kept.conversation_id)
    return path


@pytest.mark.parametrize("kind", ["sft", "preferences"])
def test_what_was_kept_is_tuned_on(
    kept: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    if kind == "preferences":  # tuning needs more pairs than the ten there are
        with Store.open(kept) as store:
            for conversation in store.conversations():
                for turn in conversation["turns"]:
                    store.rate(turn["id"], {"correction": f"Mended {turn['id']}"})
    out = tmp_path / "out" / f"{kind}.jsonl"
    code, printed, error = memory(kept, f"--{kind}", out, capsys=capsys)
    count = {
        "sft": "30 rows with 31 answers to learn from",
        "preferences": "32 rows, each an answer and its correction",
    }
    assert (code, printed, error) == (0, "", f"{out}: {count[kind]}, of 32 turns kept\n")
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert [file.name for file in out.parent.iterdir()] == [out.name]

    assert (
        cli.run(["inspect", str(out), "--model", str(tiny_model), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    rows = len(rows_of(out))
    assert (report["layout"], report["conversations"], report["broken"]["rows"]) == (
        {"sft": "messages", "preferences": "preference"}[kind], rows, 0,
    )  # fmt: skip
    assert report["turns"]["grounded"] == 1

    learned_here = {
        text for row in rows_of(out) for text in (learned(row) if kind == "sft" else [row["chosen"][0]["content"]])
    }
    prompt = PromptFormat.load(tiny_model)
    ends = 0
    for conversation in load_conversations(str(out)).conversations:
        encoded = prompt.encode(conversation)
        ids = [token for token, counted in zip(encoded.ids, encoded.supervised, strict=True) if counted]
        texts = prompt.tokenizer.decode(ids).split("<|im_end|>")
        ends += len(texts) - 1
        assert {text.strip() for text in texts[:-1]} <= learned_here
    assert ends == {"sft": 31, "preferences": 32}[kind]

    settings = ("--max-steps", "2", "--eval-steps", "2", "--save-steps", "2", "--dtype", "float32")
    run = tmp_path / "run"
    assert cli.run(["tune", "--model", str(tiny_model), "--data", str(out), "--out", str(run), *settings]) == 0
    manifest = RunFolder.open(run).manifest()
    assert manifest["status"] == "tuned"
    assert sum(manifest["data"][part] for part in ("train", "validation", "heldout")) == rows


def test_rated_only_takes_what_somebody_looked_at(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rated.jsonl"
    code, _, error = memory(kept, "--sft", out, "--rated-only", capsys=capsys)
    assert (code, error) == (0, f"{out}: 11 rows with 11 answers to learn from, of 32 turns kept\n")
    assert sum(learned(row)[0].startswith("Mended") for row in rows_of(out)) == 10


def test_the_list_names_each_conversation(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store.open(kept) as store:
        keep(store, "\x1b[2JWipe\r\nthis \u202e" + "long " * 60, "No.")
        ids = [row["id"] for row in store.summaries()]
    code, out, error = memory(kept, capsys=capsys)
    head, *lines = out.splitlines()
    assert (code, error, head.split()[:2]) == (0, "", ["id", "began"])
    assert [line.split()[0] for line in lines] == ids
    assert lines[5].split()[3:7] == ["2", "1", "0", "0"]
    assert lines[6].split()[3:7] == ["2", "0", "1", "1"]
    assert lines[0].split()[3:7] == ["1", "0", "1", "1"]
    assert "[2JWipe this long" in lines[-1] and lines[-1].endswith("...")
    assert out.replace("\n", "").isprintable()
    code, out, _ = memory(kept, "--json", capsys=capsys)
    document = json.loads(out)
    assert [row["id"] for row in document["conversations"]] == ids
    assert document["conversations"][5] | {"id": "", "first_words": ""} == {
        "id": "", "channel": "page", "began_ms": 1_700_000_005_000, "turns": 2, "up": 1, "down": 0, "corrected": 0,
        "first_words": "",
    }  # fmt: skip


def test_what_is_deleted_is_gone(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store.open(path) as store:
        first = keep(store, SECRET, "One.").kept
        keep(store, "marimba", "Two.")
    assert first is not None
    assert memory(path, "--delete", first.conversation_id, capsys=capsys) == (
        0, "", f"deleted 1 conversation from {path}\n",
    )  # fmt: skip
    code, _, error = memory(path, "--delete", first.conversation_id, capsys=capsys)
    assert code == 2
    assert (
        error
        == f"lorikeet: {path} holds no conversation '{first.conversation_id}'; lorikeet memory {path} lists them\n"
    )
    assert SECRET.encode() not in path.read_bytes()
    assert b"marimba" in path.read_bytes()
    code, out, error = memory(path, "--delete-all", "--json", capsys=capsys)
    assert (code, json.loads(out)["conversations"], error) == (0, [], f"deleted 1 conversation from {path}\n")
    assert b"marimba" not in path.read_bytes()
    assert memory(path, capsys=capsys) == (0, "no conversations are kept\n", "")


def test_rows_are_written_before_anything_is_deleted(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    code, _, error = memory(kept, "--sft", tmp_path / "folder.jsonl", "--delete-all", capsys=capsys)
    assert code == 2 and "folder.jsonl: it is a folder; name a file" in error
    out = tmp_path / "all.jsonl"
    assert memory(kept, "--preferences", out, "--delete-all", capsys=capsys)[0] == 0
    assert len(rows_of(out)) == 10
    with Store.open(kept) as store:
        assert store.summaries() == []


def test_a_file_that_is_no_memory_is_one_line(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store.open(path) as store:
        keep(store, "Hi", "Hello.")
    whole = path.read_bytes()
    foreign, newer, empty = (tmp_path / f"{name}.db" for name in ("foreign", "newer", "empty"))
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE bookmarks (url)")
    db.close()
    newer.write_bytes(whole)
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    empty.touch()
    for name, data in (("text", b"not a database, " * 400), ("cut", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.db").write_bytes(data)
    out = tmp_path / "rows.jsonl"
    for name, message in (
        ("missing", "is not there"), ("foreign", "another program's"), ("newer", "newer Lorikeet"),
        ("text", "damaged"), ("cut", "damaged"), ("empty", "is empty"),
    ):  # fmt: skip
        file = tmp_path / f"{name}.db"
        before = file.read_bytes() if file.exists() else None
        for action in ((), ("--sft", out), ("--delete-all",)):
            code, printed, error = memory(file, *action, capsys=capsys)
            assert (code, printed, len(error.splitlines())) == (2, "", 1), (name, action)
            assert message in error and error.startswith("lorikeet: "), error
        assert (file.read_bytes() if file.exists() else None) == before, name
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sft", "rows.json"], "ends in .jsonl"),
        (["--sft", "a.jsonl", "--preferences", "./a.jsonl"], "is named twice"),
        (["--sft", "mine.jsonl"], "is named twice"),
        (["--rated-only"], "give both"),
        (["--delete", "conv_1", "--delete-all"], "exclude each other"),
        (["--sft", "mine.jsonl/x.jsonl"], "cannot write mine.jsonl/x.jsonl: "),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with Store.open(Path("mine.jsonl")) as store:
        keep(store, "Hi", "Hello.")
    code, out, error = memory("mine.jsonl", *arguments, capsys=capsys)
    assert (code, out, len(error.splitlines())) == (2, "", 1)
    assert message in error
    with Store.open(Path("mine.jsonl")) as store:
        assert len(store.summaries()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["mine.jsonl"]


def test_the_command_loads_nothing_heavy(kept: Path) -> None:
    heavy = ("torch", "transformers", "gradio", "fastapi", "numpy", "pyarrow", "onnxruntime", "rich.table")
    code = (
        f"import sys\nfrom lorikeet import cli\nassert cli.run(['memory', {str(kept)!r}, '--sft', {str(kept)!r} + '.jsonl']) == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
