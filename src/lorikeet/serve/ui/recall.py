"""What a visitor may do with what is kept of their conversation: rate it, correct it, have it forgotten.

    problem = rate(memory, talk, place=3, rating="up")      # '' if it was done

Whatever a browser sends is looked up in the visitor's own conversation, so nobody reaches another's. It knows no
component of the page.
"""

from __future__ import annotations

from typing import Literal

from lorikeet.errors import LorikeetError
from lorikeet.serve.memory import MAX_CORRECTION_CHARACTERS, Memory
from lorikeet.serve.ui.talk import Talk

NOT_KEPT = "This answer is not kept, so nothing can be said about it."


def told(memory: Memory) -> str:
    """Return in one sentence that conversations are kept, where, and for how long."""
    days = f" for {memory.days} day{'s' if memory.days != 1 else ''}" if memory.days else ""
    return f"Conversations are kept on the server, in {memory.path.name}{days}."


def rate(memory: Memory, talk: Talk, *, place: int, rating: Literal["up", "down"] | None) -> str:
    """Rate the answer at a place in `talk.shown`, None to take it back; return '' or why not, in words for the user."""
    return _change(memory, talk.answer_at(place), rating=rating)


def correct(memory: Memory, talk: Talk, better: str) -> str:
    """Keep a better answer for the one that `talk.corrects`; return '' or why not, in words for the user."""
    if not better.strip():
        return "Write the better answer first."
    if len(better) > MAX_CORRECTION_CHARACTERS:
        return f"The better answer is too long; at most {MAX_CORRECTION_CHARACTERS} characters are kept."
    return _change(memory, talk.corrects, correction=better.strip())


def forget(memory: Memory, talk: Talk) -> str:
    """Delete all that is kept of a conversation, spoken turns too; return '' or why not, in words for the user."""
    if talk.under_way:
        talk.under_way.deferred = True  # an answer that is stopped now would be kept after the rest was forgotten
    try:
        for _, answer_id in talk.answers:
            memory.forget_turn(answer_id)
    except LorikeetError as error:
        return f"The conversation is still kept: {error}"
    return ""


def _change(memory: Memory, answer_id: str, **changes: str | None) -> str:
    try:
        kept = memory.rate(answer_id, changes) if answer_id else None
    except LorikeetError as error:
        return f"That was not kept: {error}"
    return "" if kept else NOT_KEPT
