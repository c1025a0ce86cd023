"""Conversations -> distinct conversations -> train, validation and held-out: dedupe first, then split.

It knows texts, not tokens. The split depends on the seed and on each conversation's words alone, so adding rows does
not move the others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from lorikeet.errors import InputError
from lorikeet.messages import Conversation

LEAST_PART = 8
MOST_PART = 100
LEAST_CONVERSATIONS = 3 * LEAST_PART


@dataclass(frozen=True, slots=True)
class Split:
    """Distinct conversations, each in one part."""

    train: list[Conversation]
    validation: list[Conversation]
    heldout: list[Conversation]


def fingerprint(conversation: Conversation) -> str:
    """Return a key that is equal for conversations equal but for case and white space, in hex."""
    text = "\x1e".join(f"{m.role}\x1f{' '.join(m.content.casefold().split())}" for m in conversation.messages)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def deduplicate(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Return the conversations without repetitions, the first of each kept, in their order."""
    distinct: dict[str, Conversation] = {}
    for conversation in conversations:
        distinct.setdefault(fingerprint(conversation), conversation)
    return list(distinct.values())


def split(conversations: Sequence[Conversation], *, validation_share: float, heldout_share: float, seed: int) -> Split:
    """Return distinct `conversations` in three parts; each share is at least 8 and at most 100 conversations.

    Conversations that open with the same question go to the same part, so none is tested on a question it was
    trained on; where every question opens many, a part is as large as it must be. Raises InputError if there are too few.
    """
    if len(conversations) < LEAST_CONVERSATIONS:
        raise InputError(
            f"the data has {len(conversations)} distinct conversations; at least {LEAST_CONVERSATIONS} are needed "
            "to tune, to validate and to prove"
        )
    keyed = sorted(conversations, key=lambda c: (_draw(_question(c), seed), fingerprint(c)))
    groups = [list(group) for _, group in groupby(keyed, key=_question)]
    heldout, groups = _take(groups, _part(heldout_share, len(keyed)))
    validation, groups = _take(groups, _part(validation_share, len(keyed)))
    train = [conversation for group in groups for conversation in group]
    if len(train) < LEAST_PART:
        raise InputError(
            "nearly all conversations open with the same few questions, so none can be held out; give varied data"
        )
    return Split(train, validation, heldout)


def _take(groups: list[list[Conversation]], size: int) -> tuple[list[Conversation], list[list[Conversation]]]:
    """Return about `size` conversations, of whole groups in their order, and the groups that are left.

    A group that is too large for what is missing is passed over. Where the others are no part, the smallest that makes one
    is taken: alone or, if fewer are then taken, with them.
    """
    taken, larger, missing = list[list[Conversation]](), list[list[Conversation]](), size
    for group in groups:
        if len(group) <= missing:
            taken.append(group)
            missing -= len(group)
        else:
            larger.append(group)
    if size - missing < LEAST_PART:
        ways = [[*taken, group] for group in larger] + [[group] for group in larger]
        taken = min((way for way in ways if _count(way) >= LEAST_PART), key=_count, default=groups)
    names = {id(group) for group in taken}
    left = [group for group in groups if id(group) not in names]
    return [conversation for group in taken for conversation in group], left


def _count(groups: Sequence[Sequence[Conversation]]) -> int:
    return sum(map(len, groups))


def _part(share: float, total: int) -> int:
    return min(max(LEAST_PART, round(share * total)), MOST_PART, total // 3)


def _question(conversation: Conversation) -> str:
    for message in conversation.messages:
        if message.role == "user":
            return " ".join(message.content.casefold().split())
    return fingerprint(conversation)


def _draw(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\x1e{text}".encode("utf-8", "surrogatepass")).digest()


def common_system(conversations: Sequence[Conversation]) -> str:
    """Return the system turn that more than half of the conversations have; '' if there is none.

    It is what an assistant tuned on them is given when it is served.
    """
    led = [c.messages[0].content for c in conversations if c.messages[0].role == "system"]
    for text, count in Counter(led).most_common(1):
        if 2 * count > len(conversations):
            return text
    return ""
