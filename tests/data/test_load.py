"""Formats told apart, broken rows named, and nothing that raises anything but one line."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lorikeet.config import SYSTEM_PROMPT
from lorikeet.data.load import load_conversations
from lorikeet.errors import InputError, LorikeetError
from lorikeet.grounding import FOOTER, HEADER

MESSAGES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
ALPACA = {"instruction": "hi", "input": "", "output": "hello"}


def save(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "csv"])
@pytest.mark.parametrize(("layout", "row"), [("messages", MESSAGES), ("sharegpt", SHAREGPT), ("alpaca", ALPACA)])
def test_every_layout_in_every_format(tmp_path: Path, ending: str, layout: str, row: dict[str, Any]) -> None:
    loaded = load_conversations(str(save(tmp_path / f"chats.{ending}", [row, row])))
    assert loaded.layout == layout
    assert [[(m.role, m.content) for m in c.messages] for c in loaded.conversations] == [
        [("user", "hi"), ("assistant", "hello")]
    ] * 2


def test_a_folder_of_files_is_read_as_a_dataset_would_be(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    save(tmp_path / "data" / "train-00000-of-00001.parquet", [SHAREGPT, SHAREGPT])
    save(tmp_path / "data" / "test-00000-of-00001.parquet", [MESSAGES])
    save(tmp_path / "dataset_infos.json", [{"not": "rows"}])
    loaded = load_conversations(str(tmp_path))
    assert (loaded.layout, len(loaded.conversations)) == ("sharegpt", 2)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train/0000.jsonl", "test/0000.jsonl"], 1),
        (["my_train.jsonl", "my_test.jsonl"], 1),
        (["training.jsonl", "test.jsonl"], 1),
        (["training-data/train.jsonl", "training-data/test.jsonl"], 1),
        (["trainset.jsonl", "testset.jsonl"], 1),
        (["SFTTrain.jsonl", "SFTTest.jsonl"], 1),
        (["TRAIN.jsonl", "TEST.jsonl"], 1),
        (["constraints.jsonl", "strained.jsonl", "chats.jsonl"], 3),
    ],
)
def test_the_training_part_is_told_by_a_word_of_its_path(tmp_path: Path, names: list[str], read: int) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, [MESSAGES])
    assert len(load_conversations(str(tmp_path)).files) == read


@pytest.mark.parametrize("name", ["", " ", "~no-such-user/chats.jsonl"])
def test_what_names_nothing_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"the data has no name|there is no home folder of that name"):
        load_conversations(name)


def test_a_json_object_that_holds_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "wrapped.json"
    path.write_text(json.dumps({"version": 1, "data": [SHAREGPT]}))
    assert len(load_conversations(str(path)).conversations) == 1


def test_alpaca_input_and_system_are_kept(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "gato", "output": "cat", "system": "Be brief."}
    (conversation,) = load_conversations(str(save(tmp_path / "a.jsonl", [row]))).conversations
    assert [m.content for m in conversation.messages] == ["Be brief.", "Translate.\n\ngato", "cat"]


def test_a_trailing_question_is_cut(tmp_path: Path) -> None:
    row = {"messages": [*MESSAGES["messages"], {"role": "user", "content": "and?"}]}
    (conversation,) = load_conversations(str(save(tmp_path / "a.jsonl", [row]))).conversations
    assert conversation.messages[-1].role == "assistant"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{not json", "is not JSON"),
        ('{"messages": []}', "has no turns"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no assistant turn"),
        ('{"messages": [{"role": "wizard", "content": "hi"}]}', "role 'wizard'"),
        ('{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]}', "is empty"),
        ('{"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": "x"}]}', "not text"),
        ('{"messages": [{"role": "user", "content": "a\\u0000"}, {"role": "assistant", "content": "x"}]}', "null byte"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', "UTF-8"),
        ('{"messages": [{"role": [3], "content": "a"}, {"role": "assistant", "content": "x"}]}', "turn 1 has no role"),
        ('"a string"', "is a str"),
        ('{"a\\nb": 1, "\\ud800": 2}', "it has: a b, ?"),
        ('{"text": "x"}', "has none of messages"),
        ('{"instruction": "hi", "output": NaN}', "the field output has no content"),
        (json.dumps(MESSAGES | {"system": 7}), "the field system has content that is not text"),
        (json.dumps(MESSAGES | {"system": "\ud800"}), "the field system is not UTF-8 text"),
        (json.dumps(SHAREGPT | {"system": "a\0"}), "the field system contains a null byte"),
        (json.dumps({"prompt": "\0", "chosen": "a", "rejected": "b"}), "the field prompt contains a null byte"),
        (json.dumps({"messages": [{**MESSAGES["messages"][0], "weight": 0.5}]}), "turn 1 has the weight 0.5"),
        (json.dumps({"messages": [{**MESSAGES["messages"][1], "tool_calls": [{}]}]}), "turn 1 calls a tool"),
        (
            json.dumps({"messages": [{**MESSAGES["messages"][1], "function_call": {"name": "f"}}]}),
            "turn 1 calls a tool",
        ),
        (json.dumps({"messages": MESSAGES["messages"] * 501}), "has 1002 turns, more than 1000"),
    ],
)
def test_a_broken_row_is_named_by_line_and_the_rest_goes_on(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([json.dumps(MESSAGES)] * 150 + [line] + [json.dumps(MESSAGES)]))
    loaded = load_conversations(str(path))
    assert len(loaded.conversations) == 151
    ((where, reason),) = [(broken.where, broken.why) for broken in loaded.broken]
    assert where == f"{path}:151"
    assert why in reason


def sourced(**source: Any) -> dict[str, Any]:
    found = {"title": "Trains", "url": "https://trains.example/", "snippet": "At nine."} | source
    return {"messages": [{"role": "user", "content": "When?", "sources": [found]}, MESSAGES["messages"][1]]}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ({"url": "http://[x"}, "a source whose url is none"),
        ({"url": None}, "turn 1 has no content"),
        ({"title": "\ud800"}, "is not UTF-8 text"),
        ({"snippet": ["a"]}, "content that is not text"),
    ],
)
def test_sources_that_cannot_be_rendered_break_their_row_alone(tmp_path: Path, source: Any, why: str) -> None:
    loaded = load_conversations(str(save(tmp_path / "a.jsonl", [sourced()] * 120 + [sourced(**source)])))
    assert len(loaded.conversations) == 120
    (broken,) = loaded.broken
    assert why in broken.why


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("a\nb", "a b"),
        ("\ud800", "?"),
        (7, "7"),
        ("x" * 900, "x" * 300 + " ..."),
        ([[1]], "{path}:1"),
        ("", "{path}:1"),
    ],
)
def test_a_rows_name_is_one_line_that_can_be_written(tmp_path: Path, name: Any, origin: str) -> None:
    path = save(tmp_path / "a.jsonl", [{"id": name, **MESSAGES}])
    (conversation,) = load_conversations(str(path)).conversations
    assert conversation.origin == origin.format(path=path)


def csv_file(path: Path, lines: list[str]) -> str:
    path.write_text("instruction,output\n" + "".join(f"{line}\n" for line in lines))
    return str(path)


def test_csv_goes_on_after_a_field_that_is_too_long(tmp_path: Path) -> None:
    lines = [f"a{n},b" for n in range(300)]
    path = csv_file(tmp_path / "a.csv", [*lines[:200], f"{'x' * (9 << 20)},b", *lines[200:]])
    loaded = load_conversations(path)
    assert len(loaded.conversations) == 300
    assert [(b.where, b.why) for b in loaded.broken] == [
        (f"{path}:202", "is not CSV (field larger than field limit (8388608))")
    ]


@pytest.mark.parametrize("after", [[], ['"quoted, too",b'], ["x" * (9 << 20)]])
def test_a_quote_that_swallows_rows_is_refused_with_its_line(tmp_path: Path, after: list[str]) -> None:
    lines = [f"a{n},b" for n in range(200)]
    path = csv_file(tmp_path / "a.csv", [*lines, '"never closed,b', *lines, *after])
    with pytest.raises(
        InputError, match=r"a.csv:202: a quote that is opened here takes in all up to line 40\d"
    ) as caught:
        load_conversations(path, strict=False)
    assert "\n" not in str(caught.value)


def test_cells_beyond_the_columns_break_their_row(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "a.csv", ["a,b"] * 150 + ["What is 2,3?,five", "a,b,,", "a"])
    loaded = load_conversations(path, strict=False)
    assert len(loaded.conversations) == 151
    assert [(b.where.rpartition(":")[2], b.why) for b in loaded.broken] == [
        ("152", "has more cells than the first line; put a text with commas in quotes"),
        ("154", "the field output has no content"),
    ]


def test_cells_over_several_lines_and_brackets_are_text(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "a.csv", ['"one\ntwo","[1, 2]"', 'say ""hi"",[x', f"a,{'[' * 200_000}"])
    loaded = load_conversations(path)
    answers = [c.messages[1].content for c in loaded.conversations]
    assert answers[:2] == ["[1, 2]", "[x"] and len(answers[2]) == 200_000
    assert loaded.conversations[0].messages[0].content == "one\ntwo"


def test_parquet_columns_that_are_not_read_cannot_break_it(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    far = pyarrow.array([10**15] * 150, pyarrow.timestamp("ms"))
    plain = pyarrow.table({"instruction": ["a"] * 150, "output": ["b"] * 150, "when": far})
    parquet.write_table(plain, tmp_path / "beside.parquet")
    assert len(load_conversations(str(tmp_path / "beside.parquet")).conversations) == 150
    output = pyarrow.array([10**15] + [0] * 149, pyarrow.timestamp("ms"))
    parquet.write_table(pyarrow.table({"instruction": ["a"] * 150, "output": output}), tmp_path / "in.parquet")
    loaded = load_conversations(str(tmp_path / "in.parquet"), strict=False)
    assert "cannot be read" in loaded.broken[0].why and len(loaded.broken) == 150


def test_more_than_one_percent_broken_stops(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([json.dumps(MESSAGES)] * 50 + ["{"]))
    with pytest.raises(InputError, match=r"chats.jsonl:51: is not JSON .*1 of 51 rows"):
        load_conversations(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "holds no rows"),
        ("empty.json", b"[]", "holds no rows"),
        ("bad.json", b"[{", "is not JSON"),
        ("latin.jsonl", b'{"a": "\xff"}', "not UTF-8"),
        ("bad.parquet", b"PAR1 nothing", "not a whole Parquet file"),
        ("notes.txt", b"hello", "ending is not one"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_conversations(str(path))
    assert "\n" not in str(caught.value)


def test_a_name_that_no_disk_takes_is_one_line() -> None:
    for name in ("x" * 400, "x" * 5000 + ".jsonl"):
        with pytest.raises(InputError, match=r"^x+ \.\.\. cannot be read: File name too long") as caught:
            load_conversations(name)
        assert len(str(caught.value)) < 400


def test_a_missing_file_names_the_packaged_data() -> None:
    with pytest.raises(InputError, match=r"nope.jsonl is not there.*spoken"):
        load_conversations("nope.jsonl")


def test_hundreds_of_mangled_files_never_raise_anything_else(tmp_path: Path) -> None:
    generator = random.Random(5)
    whole = "\n".join(json.dumps(row) for row in [MESSAGES, SHAREGPT, ALPACA] * 4).encode()
    lines: list[str] = []
    for number in range(300):
        mangled = bytearray(whole)
        for _ in range(generator.randint(1, 12)):
            place = generator.randrange(len(mangled))
            mangled[place : place + generator.randint(0, 4)] = generator.randbytes(generator.randint(0, 4))
        path = tmp_path / f"m{number}.{generator.choice(['json', 'jsonl', 'csv', 'parquet'])}"
        path.write_bytes(bytes(mangled))
        try:
            load_conversations(str(path))
        except LorikeetError as error:
            lines.append(str(error))
    assert len(lines) > 100
    assert not [line for line in lines if "\n" in line]


def test_spoken_carries_its_system_turn_and_rendered_sources() -> None:
    loaded = load_conversations("spoken")
    assert all(c.messages[0].content == SYSTEM_PROMPT for c in loaded.conversations)
    grounded = [m for c in loaded.conversations for m in c.messages if HEADER in m.content]
    assert len(grounded) >= 80
    assert all(m.role == "user" and FOOTER in m.content and not m.sources for m in grounded)


def test_the_optional_files_load(shared: Path) -> None:
    for name, layout, count in (
        ("instruct-2k.jsonl", "messages", 2000),
        ("sharegpt-200.json", "sharegpt", 200),
        ("alpaca-200.json", "alpaca", 200),
    ):
        loaded = load_conversations(str(shared / "chat" / name))
        assert (loaded.layout, len(loaded.conversations), loaded.broken) == (layout, count, [])


PROMPT = [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "When?"},
]  # fmt: skip
CHOSEN, REJECTED = {"role": "assistant", "content": "At nine."}, {"role": "assistant", "content": "Never."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"chosen": [*PROMPT, CHOSEN], "rejected": [*PROMPT, REJECTED]},
        {"prompt": "When?", "chosen": [*PROMPT, CHOSEN], "rejected": [*PROMPT, REJECTED]},
    ],
)
def test_preference_rows_train_on_the_chosen_answer_alone(tmp_path: Path, row: dict[str, Any]) -> None:
    loaded = load_conversations(str(save(tmp_path / "pairs.jsonl", [row])))
    (conversation,) = loaded.conversations
    assert loaded.layout == "preference"
    assert [m.content for m in conversation.messages] == ["hi", "yes?", "When?", "At nine."]
    assert [m.supervised for m in conversation.messages if m.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    "row",
    [
        MESSAGES,
        SHAREGPT,
        ALPACA,
        {"prompt": "hi", "chosen": "hello", "rejected": "no"},
    ],
)
def test_a_rows_system_leads_whatever_its_layout(tmp_path: Path, row: dict[str, Any]) -> None:
    rows = [row | {"system": "Be brief."}, row | {"system": " "}, row | {"system": None}]
    loaded = load_conversations(str(save(tmp_path / "led.jsonl", rows)))
    found = [[(m.role, m.content) for m in c.messages] for c in loaded.conversations]
    bare = [("user", "hi"), ("assistant", "hello")]
    assert found == [[("system", "Be brief."), *bare], bare, bare]
    own = {"messages": [{"role": "system", "content": "Mine."}, *MESSAGES["messages"]], "system": "Be brief."}
    (kept,) = load_conversations(str(save(tmp_path / "own.jsonl", [own]))).conversations
    assert [m.content for m in kept.messages] == ["Mine.", "hi", "hello"]


def test_a_missing_value_that_a_program_wrote_as_nan_is_none(tmp_path: Path) -> None:
    path = tmp_path / "nan.jsonl"
    path.write_text('{"instruction": "hi", "input": NaN, "system": Infinity, "output": "hello"}\n')
    (conversation,) = load_conversations(str(path)).conversations
    assert [m.content for m in conversation.messages] == ["hi", "hello"]


def test_what_parquet_fills_in_is_as_good_as_not_there(tmp_path: Path) -> None:
    turns = [{**turn, "function_call": {"name": None, "arguments": None}} for turn in MESSAGES["messages"]]
    rows = [{"messages": turns, "system": float("nan")}] * 3
    loaded = load_conversations(str(save(tmp_path / "padded.parquet", rows)))
    assert [[m.content for m in c.messages] for c in loaded.conversations] == [["hi", "hello"]] * 3
    (kept,) = load_conversations(str(save(tmp_path / "false.jsonl", [MESSAGES | {"system": False}]))).conversations
    assert [m.content for m in kept.messages] == ["hi", "hello"]


def test_a_turn_of_weight_0_is_context(tmp_path: Path) -> None:
    from lorikeet.prompt import PromptFormat
    from tests.conftest import make_tokenizer

    rows = [{"messages": [*PROMPT[:1], {**PROMPT[1], "weight": 0}, *PROMPT[2:], CHOSEN]}]
    (conversation,) = load_conversations(str(save(tmp_path / "weighed.jsonl", rows))).conversations
    tokenizer = make_tokenizer()
    row = PromptFormat(tokenizer).encode(conversation)
    learned = [token for token, counted in zip(row.ids, row.supervised, strict=True) if counted]
    assert tokenizer.decode(learned).strip() == "At nine.<|im_end|>"
    with pytest.raises(InputError, match="weight 0"):
        load_conversations(str(save(tmp_path / "none.jsonl", [{"messages": rows[0]["messages"][:2]}])))
