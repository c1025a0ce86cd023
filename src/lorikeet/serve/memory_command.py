"""What `lorikeet memory FILE` prints and writes: the list of conversations, and rows to tune on.

    for line in table(store.summaries()): print(line)
    said = write_sft(store, Path("mine.jsonl"), rated_only=False)      # "mine.jsonl: 5 rows, ..."

What people said is as private in the rows as in the memory: both files are their owner's alone. It knows no SQL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lorikeet.errors import InputError
from lorikeet.files import atomic_file
from lorikeet.serve.rows import preference_rows, sft_rows
from lorikeet.serve.store import Store

FIRST_WORDS_CHARACTERS = 60


def table(summaries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of `Store.summaries`; what was said cannot move the terminal's cursor."""
    if not summaries:
        yield "no conversations are kept"
        return
    yield f"{'id':37}  {'began':16}  {'turns':>5}  {'up':>3}  {'down':>4}  {'corrected':>9}  first words"
    for row in summaries:
        began = datetime.fromtimestamp(row["began_ms"] / 1000).astimezone()
        counts = f"{row['turns']:5}  {row['up']:3}  {row['down']:4}  {row['corrected']:9}"
        yield f"{_plain(row['id']):37}  {began:%Y-%m-%d %H:%M}  {counts}  {_first_words(row['first_words'])}"


def write_sft(store: Store, out: Path, *, rated_only: bool) -> str:
    """Write `sft_rows` as JSON lines and return the counts in a line. Raises InputError, MachineError."""
    rows = answers = 0

    def noted() -> Iterator[dict[str, Any]]:
        nonlocal rows, answers
        for row in sft_rows(store.conversations(), rated_only=rated_only):
            rows += 1
            answers += sum(turn["role"] == "assistant" and turn.get("weight") != 0 for turn in row["messages"])
            yield row

    _write(out, noted())
    learned = f"{counted(rows, 'row')} with {counted(answers, 'answer')} to learn from"
    return f"{out}: {learned}, of {_turns(store)} kept"


def write_preferences(store: Store, out: Path) -> str:
    """Write `preference_rows` as JSON lines and return the counts in a line. Raises InputError, MachineError."""
    rows = _write(out, preference_rows(store.conversations()))
    return f"{out}: {counted(rows, 'row')}, each an answer and its correction, of {_turns(store)} kept"


def counted(number: int, thing: str) -> str:
    """Return `1 row`, `2 rows` and the like."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def check_outputs(memory: Path, outputs: Iterable[Path | None]) -> None:
    """Raise InputError for rows that would be written over the memory or each other, or that `tune` would not read."""
    taken = {memory.resolve()}
    for out in filter(None, outputs):
        if out.suffix != ".jsonl":
            raise InputError(f"{out}: the rows are JSON lines; name a file that ends in .jsonl")
        if out.resolve() in taken:
            raise InputError(f"{out} is named twice; give the memory and each kind of row a file of its own")
        taken.add(out.resolve())


def _write(out: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows to a file that only its owner can read, whole or not at all; return how many."""
    count = 0
    with atomic_file(out) as beside:
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            for count, row in enumerate(rows, start=1):  # noqa: B007
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def _turns(store: Store) -> str:
    return counted(sum(row["turns"] for row in store.summaries()), "turn")


def _first_words(text: str) -> str:
    words = " ".join(_plain(text).split())
    return words if len(words) <= FIRST_WORDS_CHARACTERS else words[: FIRST_WORDS_CHARACTERS - 3] + "..."


def _plain(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
