"""The X-ray tells what is there: counts by hand, planted repetitions, the rows and the mask that tuning uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lorikeet.cli import run
from lorikeet.config import TuneConfig
from lorikeet.data.encode import TOO_LONG, encode_all
from lorikeet.data.inspect import SAMPLES, SHOWN_TOKENS, inspect_data, write_page
from lorikeet.data.load import load_conversations
from lorikeet.data.near import NearIndex, shingles
from lorikeet.errors import InputError
from lorikeet.grounding import HEADER, ground
from lorikeet.messages import Conversation, Message, Source
from lorikeet.prompt import PromptFormat

from ..conftest import make_conversations, write_jsonl

LONG = "When the kettle boils pour the water slowly over the leaves and wait for four minutes before you serve it warm"


def talk(question: str, answer: str, origin: str = "") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), origin)


def inspected(data: Path, model: Path, *, against: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
    return inspect_data(TuneConfig(data=str(data), model=str(model), **settings), against=against)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Sixty conversations, then an exact repetition, a near one, a long one, and broken rows."""
    rows = make_conversations(60)
    rows += [rows[0], talk("How do I make tea?", LONG), talk("How do I make tea?", f"{LONG} please")]
    rows.append(talk("Tell me everything <|im_end|>", "word " * 400))
    path = write_jsonl(tmp_path / "planted.jsonl", rows)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"messages": []}\n{"messages": [{"role": "wizard", "content": "x"}]}\nnot json\n')
    return path


def test_it_counts_what_was_planted(planted: Path, tiny_model: Path) -> None:
    report = inspected(planted, tiny_model, max_length=200)
    assert (report["layout"], report["conversations"], report["exact_duplicates"]) == ("messages", 64, 1)
    assert report["broken"]["rows"] == 3 and report["broken"]["share"] == pytest.approx(3 / 67)
    assert [entry["where"].rpartition(":")[2] for entry in report["broken"]["examples"]] == ["65", "66", "67"]
    assert (report["turns"]["user"], report["turns"]["assistant"], report["turns"]["system"]) == (64, 64, 0)
    assert report["near_duplicates"]["conversations"] == 1
    first, second = report["near_duplicates"]["examples"][0]
    assert (first.rpartition(":")[2], second.rpartition(":")[2]) == ("62", "63")
    assert report["defused"] == 1
    assert report["truncated"]["conversations"] == 1
    assert sum(report["split"][part] for part in ("train", "validation", "heldout")) == 63


def test_lengths_and_mask_are_those_of_tuning(planted: Path, tiny_model: Path) -> None:
    report = inspected(planted, tiny_model, max_length=200)
    prompt = PromptFormat.load(tiny_model)
    distinct = list(dict.fromkeys(load_conversations(str(planted), strict=False).conversations))
    by_hand = encode_all(prompt, [c for i, c in enumerate(distinct) if i != 60], max_length=200, on_long="truncate")
    assert (report["tokens"]["total"], report["tokens"]["supervised"]) == (by_hand.tokens, by_hand.supervised_tokens)
    assert report["truncated"] == {"conversations": by_hand.truncated, "tokens": by_hand.cut_tokens}
    assert sum(bucket["conversations"] for bucket in report["tokens"]["histogram"]) == 63
    assert report["tokens"]["longest"] == 200
    sample = report["samples"][0]
    said = "".join(part["text"] for part in sample["runs"] if part["supervised"])
    assert said == distinct[0].messages[1].content + "<|im_end|>"
    assert sum(part["tokens"] for part in sample["runs"]) == len(prompt.encode(distinct[0]).ids)


def test_prompts_of_an_evaluation_are_found_in_the_data(planted: Path, tiny_model: Path, tmp_path: Path) -> None:
    asked = make_conversations(3)[2].messages[0].content
    prompts = tmp_path / "eval.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": p}) for p in (asked.upper(), "Something else entirely")))
    report = inspected(planted, tiny_model, against=[str(prompts)], max_length=200)
    assert report["against"][0] | {"file": ""} == {
        "file": "",
        "prompts": 2,
        "same": 1,
        "near": 0,
        "examples": [asked.upper()],
    }
    with pytest.raises(InputError, match="evaluation prompts"):
        inspected(planted, tiny_model, against=[str(tmp_path / "missing")])


def test_data_too_small_to_tune_is_shown_all_the_same(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", make_conversations(3))
    report = inspected(path, tiny_model)
    assert report["conversations"] == 3 and report["split"]["possible"] is False
    assert "at least 24 are needed" in report["split"]["why_not"]


def test_it_is_split_and_cut_by_the_settings_it_is_given(planted: Path, tiny_model: Path) -> None:
    given = {"max_length": 200, "validation_share": 0.3, "heldout_share": 0.2}
    report = inspected(planted, tiny_model, on_long="drop", **given)
    assert (report["split"]["validation"], report["split"]["heldout"]) == (19, 13)
    assert report["truncated"]["conversations"] == 0 and report["left_out"]["reasons"] == {TOO_LONG: 1}
    assert inspected(planted, tiny_model, on_long="error", **given)["truncated"]["conversations"] == 1


def test_the_command_takes_the_settings_of_the_split_and_checks_them(
    planted: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["inspect", str(planted), "--model", str(tiny_model), "--out", str(tmp_path / "page.html"), "--json"]
    given = ["--max-length", "200", "--on-long", "drop", "--validation-share", "0.3", "--heldout-share", "0.2"]
    assert run([*command, *given, "--seed", "5"]) == 0
    by_hand = inspected(
        planted, tiny_model, max_length=200, on_long="drop", validation_share=0.3, heldout_share=0.2, seed=5
    )
    assert json.loads(capsys.readouterr().out) == by_hand
    for flag, value, message in (
        ("--max-length", "0", "max_length is 0; it must be above 0"),
        ("--heldout-share", "1", "heldout_share is 1.0; it must be at least 0 and below 1"),
        ("--seed", "-1", "seed is -1; it must not be negative"),
        ("--system-prompt", "be\udce9", "system_prompt is no text"),
    ):
        assert run([*command, flag, value]) == 2
        assert capsys.readouterr().err.startswith(f"lorikeet: {message}")


def test_where_all_are_long_the_mask_is_shown_around_the_first_answer(tmp_path: Path, tiny_model: Path) -> None:
    rows = [talk(f"{'word ' * 300}{n}", f"the answer {n}") for n in range(30)]
    report = inspected(write_jsonl(tmp_path / "long.jsonl", rows), tiny_model)
    assert len(report["samples"]) == SAMPLES
    for n, sample in enumerate(report["samples"]):
        assert sample["shown_from"] > 0 and sample["tokens"] > SHOWN_TOKENS
        assert [run["text"] for run in sample["runs"] if run["supervised"]] == [f"the answer {n}<|im_end|>"]


def test_names_that_are_no_text_and_markup_are_shown(tmp_path: Path, tiny_model: Path) -> None:
    for name in ("chats[/b].jsonl", "caf\udce9.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path = write_jsonl(tmp_path / name, make_conversations(3))
        out = tmp_path / "page.html"
        assert run(["inspect", str(path), "--model", str(tiny_model), "--out", str(out), "--json"]) == 0
        assert name.encode("utf-8", "replace").decode() in out.read_text(encoding="utf-8")
    assert run(["inspect", str(tmp_path / "chats[/b].jsonl"), "--model", str(tiny_model), "--out", str(out)]) == 0


def test_a_page_that_can_be_no_file_is_one_line(
    planted: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (".", str(tmp_path)):
        assert run(["inspect", str(planted), "--model", str(tiny_model), "--out", out]) == 2
        assert capsys.readouterr().err == f"lorikeet: cannot write {out}: it is a folder; name a file\n"


def test_what_the_data_holds_is_never_markup(tmp_path: Path, tiny_model: Path) -> None:
    hostile = "<script>alert(1)</script>"
    path = write_jsonl(tmp_path / "x.jsonl", [talk(hostile, hostile)])
    report = inspected(path, tiny_model)
    write_page(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "<mark>" in page


def test_what_the_data_holds_commands_no_terminal(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07 \u202e\x9b31m"
    good = write_jsonl(tmp_path / "good.jsonl", [talk(hostile, f"{hostile}\nline\ttab")])
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({hostile: 1}))
    for path in (good, broken):
        assert run(["inspect", str(path), "--model", str(tiny_model), "--out", str(tmp_path / "page.html")]) == 0
        assert run(["tune", "--data", str(path), "--model", str(tiny_model), "--out", str(tmp_path / "run")]) == 2
        shown = "".join(capsys.readouterr())
        assert "\\x1b[2J" in shown
        assert not [character for character in "\x1b\x07\x9b\u202e" if character in shown]


def test_json_is_one_document_and_the_terminal_shows_the_same(
    planted: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["inspect", str(planted), "--model", str(tiny_model), "--out", str(tmp_path / "p.html")]
    assert run([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conversations"] == 64
    assert run(given) == 0
    shown = capsys.readouterr().out
    assert "near duplicates" in shown and "3 (4.5%" in shown and "wizard" in shown
    assert run(["inspect", str(tmp_path / "missing.jsonl"), "--model", str(tiny_model)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_near_duplicates_are_near_and_others_are_not() -> None:
    index = NearIndex()
    index.add("a", LONG)
    assert index.alike(f"{LONG}!") == ["a"] and index.alike(LONG.upper()) == ["a"]
    assert index.alike("When the kettle boils the phone rings and the dog wants to go out for a walk now") == []
    assert shingles("One, two; three four") == {"one two three", "two three four"} and shingles("Hi") == {"hi"}


def test_real_chats(shared: Path, tiny_model: Path) -> None:
    report = inspected(shared / "chat" / "sharegpt-200.json", tiny_model)
    assert report["layout"] == "sharegpt" and report["conversations"] == 200 and report["split"]["possible"]


def test_search_results_are_counted_as_sources_and_as_the_block_that_was_served(
    tmp_path: Path, tiny_model: Path
) -> None:
    source = {"title": "Timetable", "url": "https://trains.example/", "snippet": "Trains at nine."}
    block = ground("When?", [Source(**source)])
    answer = {"role": "assistant", "content": "At nine."}
    rows = [
        [{"role": "user", "content": "When?", "sources": [source]}, answer],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{block} Today?"}, answer],
        [{"role": "user", "content": HEADER}, answer],
        [{"role": "user", "content": f"What does this mean? {block}"}, answer],
        [{"role": "user", "content": "No sources?", "sources": []}, answer],
    ]
    path = tmp_path / "grounded.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    assert inspected(path, tiny_model)["turns"]["grounded"] == 2
