"""Plain prose written for this project, to see whether tuning on conversations costs a model its ordinary language.

    rows = prose_rows(PromptFormat.load(folder))

Eight passages of different registers (story, news, technical, code, dialogue, encyclopedia, letter, instructions), none of
them a conversation with an assistant. Nothing is tuned on them. It does not know what they are scored with.
"""

from __future__ import annotations

import json
from importlib import resources

from lorikeet.prompt import Encoded, PromptFormat

CHUNK_TOKENS = 128
"""Tokens of a row: short enough to give the bootstrap some twenty rows, long enough that most tokens have a context."""

MOST_FORGOTTEN = 0.1
"""Nats a token that plain prose may get dearer by tuning, a tenth more perplexity; docs/concept/verdict.md says why."""


def passages() -> list[tuple[str, str]]:
    """Return (register, text) of every passage."""
    text = resources.files("lorikeet.data").joinpath("prose.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [(row["register"], row["text"]) for row in rows]


def prose_rows(prompt: PromptFormat, *, limit: int = 0) -> list[Encoded]:
    """Return the passages as rows of at most `CHUNK_TOKENS` tokens, each led by a BOS if the tokenizer uses one.

    Every token but the first is supervised. Of each passage the first `limit` rows are taken, all if it is 0. A rest of
    less than a quarter of a row is left out.
    """
    rows = []
    for _, text in passages():
        ids = list(prompt.tokenizer(text, add_special_tokens=False).input_ids)
        chunks = [ids[start : start + CHUNK_TOKENS] for start in range(0, len(ids), CHUNK_TOKENS)]
        start = [] if prompt.bos_id is None else [prompt.bos_id]
        kept = [[*start, *chunk] for chunk in chunks if len(chunk) >= CHUNK_TOKENS // 4]
        rows += [Encoded(chunk, [place > 0 for place in range(len(chunk))]) for chunk in kept[: limit or None]]
    return rows
