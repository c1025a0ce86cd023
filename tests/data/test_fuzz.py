"""Hundreds of broken files: each is read, or refused in one line with exit code 2; none hangs or shows a traceback."""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorikeet.cli import run as run_cli
from lorikeet.data.inspect import _prompts
from lorikeet.data.instructions import load_prompts
from lorikeet.data.load import load_conversations
from lorikeet.errors import InputError

from ..conftest import make_conversations

GOOD: list[dict[str, Any]] = [{"messages": [m.as_dict() for m in c.messages]} for c in make_conversations(30)]
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e308, "", " ", "\0", "\ud800", "\u202e", "x" * 10_000, [], {}, [[]], [{}], {"a": []},
    [None], ["text"], [1, [2, [3]]], {"role": "user"}, {"role": "user", "content": None}, {"from": "gpt", "value": 7},
    {"role": "wizard", "content": "hi"}, {"role": ["user"], "content": "hi"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    [{"title": "a", "url": "http://[x", "snippet": "b"}], [{"title": "\ud800", "url": "u", "snippet": "b"}], "http://[x", "a\nb",
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}, {"role": "tool", "content": "{}"},
)  # fmt: skip
"""What stands where something else should."""

FILES: dict[str, bytes] = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \r\n\t\n",
    "null.jsonl": b"null\n" * 50,
    "numbers.jsonl": b"1\n2\n3\n",
    "zeros.jsonl": b"\0" * 5000,
    "binary.jsonl": bytes(range(256)) * 40,
    "binary.parquet": bytes(range(256)) * 40,
    "magic.parquet": b"PAR1" + b"\xff" * 100 + b"PAR1",
    "empty.parquet": b"",
    "empty.csv": b"",
    "head.csv": b"instruction,output\n",
    "latin.csv": "instruction,output\ncaf\xe9,th\xe9\n".encode("latin-1"),
    "nul.csv": b"instruction,output\na\0b,c\0d\n",
    "quote.csv": b'instruction,output\n"never closed, and so on\n' + b"a,b\n" * 50,
    "ragged.csv": b"instruction,output\na\na,b,c,d\n,,,\n",
    "brackets.csv": b"messages\n" + b"[" * 200_000 + b"\n",
    "wide.csv": b"instruction,output\n" + b"a," * 5000 + b"b\n",
    "names.csv": b",,\xff\n1,2,3\n",
    "sources.jsonl": b'{"messages": [{"role": "user", "content": "a", "sources": [{"title": "\\ud800", "url": "http://[x", "snippet": ""}]},'
    b' {"role": "assistant", "content": "b"}]}\n',
    "id.jsonl": b'{"id": "\\ud800\\n", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    "keys.jsonl": b'{"a\\nb": 1, "\\ud800": 2}\n',
    "cells.csv": b'messages\n"[{""role"": 3}]"\n"[1,2"\n',
    "utf16.jsonl": json.dumps(GOOD[0]).encode("utf-16"),
    "utf32.json": json.dumps(GOOD[:3]).encode("utf-32"),
    "bom.jsonl": b"\xef\xbb\xbf" + b"\n".join(json.dumps(row).encode() for row in GOOD),
    "cut.json": json.dumps(GOOD).encode()[:-40],
    "cut.jsonl": b"\n".join(json.dumps(row).encode() for row in GOOD)[:-9],
    "deep.json": b"[" * 100_000,
    "deep.jsonl": b'{"messages":' * 50_000,
    "deepkeys.json": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "gzip.jsonl": gzip.compress(json.dumps(GOOD[0]).encode()),
    "nan.jsonl": b'{"messages": NaN}\n{"messages": [{"role": Infinity, "content": -Infinity}]}\n',
    "huge.jsonl": b'{"instruction": 1e400, "output": ' + b"9" * 6000 + b"}\n",
    "line.jsonl": b'{"messages": [{"role": "user", "content": "' + b"a" * (9 << 20) + b'"}]}\n',
    "twice.jsonl": b'{"messages": [], "messages": 3, "conversations": [], "instruction": {}, "output": []}\n',
    "string.json": b'"just text"',
    "object.json": b'{"data": {"rows": [1]}}',
    "lists.json": b'{"a": [{"x": 1}], "b": [{"y": 2}]}',
    "mixed.jsonl": b'{"messages": []}\n{"instruction": "a", "output": "b"}\n[]\n"x"\n{"conversations": {"from": "human"}}\n',
    "text.txt": b"hello\n",
    "none": b"hello\n",
    "html.json": b"<!doctype html><html><body>404</body></html>",
}


def read(path: Path) -> str:
    """Return how reading ended: `read`, or the one line that refused it."""
    began = time.monotonic()
    try:
        loaded = load_conversations(str(path))
        ended = "read"
        assert loaded.conversations
        for conversation in loaded.conversations:
            assert conversation.messages[-1].role == "assistant"
            assert all(m.content.encode() and "\0" not in m.content for m in conversation.messages)
            assert conversation.origin.encode() and "\n" not in conversation.origin
    except InputError as error:
        ended = str(error)
        assert ended and "\n" not in ended
    assert time.monotonic() - began < 10
    return ended


def refused(reader: Callable[[Path], Any], path: Path) -> str:
    """Return the one line that refused a file, '' if none did."""
    try:
        reader(path)
    except InputError as error:
        return str(error)
    return ""


def mutated(dice: random.Random) -> bytes:
    """Return a file of conversations in which something, somewhere, is something else."""
    rows: list[Any] = json.loads(json.dumps(GOOD[: dice.randint(1, 30)]))
    for _ in range(dice.randint(1, 6)):
        row = dice.choice(rows)
        kind = dice.randrange(7)
        if kind == 0:
            rows[rows.index(row)] = dice.choice(ODD)
        elif not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
            continue
        elif kind == 1:
            row["messages"] = dice.choice(ODD)
        elif kind == 2:
            row["messages"].insert(dice.randint(0, 2), dice.choice(ODD))
        elif kind == 3:
            row["messages"].reverse()
        elif isinstance(turn := dice.choice(row["messages"]), dict):
            turn[dice.choice(["role", "content", "from", "value", "sources"])] = dice.choice(ODD)
            row[dice.choice(["id", "system", "a\nb", "\ud800"])] = dice.choice(ODD)
    text = "\n".join(json.dumps(row) for row in rows) if dice.random() < 0.7 else json.dumps(rows)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(dice.choice([0, 0, 1, 5])):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data[: dice.randint(1, len(data))] if dice.random() < 0.2 else data)


@pytest.mark.parametrize("name", FILES)
def test_broken_files_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    read(path)


def test_six_hundred_mutations(tmp_path: Path) -> None:
    dice = random.Random(2026)
    ended = []
    for number in range(600):
        path = tmp_path / f"{number}.{dice.choice(['jsonl', 'json', 'jsonl', 'ndjson', 'csv', 'parquet'])}"
        path.write_bytes(mutated(dice))
        ended.append(read(path))
    assert 0 < ended.count("read") < len(ended)  # the mutations reach both ends


def test_parquet_of_odd_columns(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns: list[dict[str, Any]] = [
        {"messages": [1, 2]},
        {"messages": [b"\xff\xfe", None]},
        {"messages": [[{"role": 1, "content": 2}]]},
        {"messages": [[None]]},
        {"instruction": [None, "a"], "output": ["b", None]},
        {"instruction": [b"\xff"], "output": [b"\xff"]},
        {"conversations": [[{"from": "human", "value": None}]]},
        {"x": [1.5]},
    ]
    for number, column in enumerate(columns):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table(column), path)
        assert read(path) != "read"
    whole = (tmp_path / "0.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    assert "not a whole Parquet file" in read(tmp_path / "cut.parquet")


def test_files_of_prompts_are_read_or_refused_in_one_line(tmp_path: Path, tiny_model: Path) -> None:
    data = tmp_path / "good.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in GOOD))
    texts = {**FILES, "listed.jsonl": b'{"prompt": "a", "instruction_id_list": [[]], "kwargs": ["x"]}\n',
             "kwargs.jsonl": b'{"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": ["x"]}\n'}  # fmt: skip
    for name, content in texts.items():
        if not name.endswith(("json", "jsonl")):
            continue
        path = tmp_path / name
        path.write_bytes(content)
        for reader in (lambda given: _prompts(str(given)), load_prompts):
            assert "\n" not in refused(reader, path)
    (tmp_path / "odd.jsonl").write_text('{"prompt": "\\ud800"}')
    page = tmp_path / "page.html"
    for name in ("deep.jsonl", "binary.jsonl", "odd.jsonl"):
        asked = [
            "inspect",
            str(data),
            "--model",
            str(tiny_model),
            "--out",
            str(page),
            "--against",
            str(tmp_path / name),
        ]
        assert run_cli(asked) == (0 if name == "odd.jsonl" else 2)


def test_tune_and_inspect_refuse_in_one_line(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "good.jsonl").write_text("\n".join(json.dumps(row) for row in GOOD))
    for name in ("empty.jsonl", "binary.jsonl", "deep.json", "magic.parquet", "utf16.jsonl", "latin.csv", "none", "keys.jsonl",
                 "sources.jsonl", "brackets.csv", "quote.csv", "id.jsonl"):  # fmt: skip
        (tmp_path / name).write_bytes(FILES[name])
    for path in sorted(tmp_path.iterdir()):
        if path.name == "good.jsonl":
            continue
        out = tmp_path / "run"
        assert run_cli(["tune", "--model", str(tiny_model), "--data", str(path), "--out", str(out)]) == 2, path.name
        errors = capsys.readouterr().err.strip()
        assert errors.startswith("lorikeet: ") and "\n" not in errors, (path.name, errors)
        assert not out.exists()
        page = str(tmp_path / "page.html")
        assert run_cli(["inspect", str(path), "--model", str(tiny_model), "--out", page, "--json"]) in {0, 2}
        capsys.readouterr()
        Path(page).unlink(missing_ok=True)
