"""One visitor's conversation, as the assistant is given it and as the page shows it.

    talk = Talk()
    talk.begin("What are parrots?", note.id)
    talk.end("Birds.")
    talk.answer_at(1)                # the id that the answer shown there may be rated by

It knows no component of the page, and not whether anything of it is kept.
"""

from __future__ import annotations

from typing import Any

from lorikeet.messages import Message
from lorikeet.serve.note import Note


class Talk:
    """One visitor's conversation; it lives as long as their tab.

    Not a dataclass: Gradio would write it into the page.
    """

    def __init__(self) -> None:
        """Begin with nothing said."""
        self.turns: list[Message] = []
        """What the assistant is given."""
        self.shown: list[dict[str, Any]] = []
        """What the page shows: the turns, and between them searches and spoken answers."""
        self.answers: list[tuple[int, str]] = []
        """Of each turn, in order: where it begins in `shown`, and the id of its answer."""
        self.conversation_id = ""
        """What the memory knows the written turns by; '' until one is kept."""
        self.under_way: Note | None = None
        """Of the answer that is being written."""
        self.left = False
        """Whether the visitor went on to another conversation: nothing of this one is shown any more."""
        self.corrects = ""
        """The answer that the visitor is writing a better one for."""

    def begin(self, question: str, answer_id: str) -> None:
        """Show a question, and give it to the assistant."""
        self.turns.append(Message("user", question))
        self.answers.append((len(self.shown), answer_id))
        self.shown.append({"role": "user", "content": question})

    def end(self, answer: str) -> None:
        """Give the assistant its own answer from now on; a question without one is taken back."""
        if answer:
            self.turns.append(Message("assistant", answer))
        else:
            self.turns.pop()

    def answer_at(self, place: int) -> str:
        """Return the id of the answer that `shown[place]` belongs to; '' if there is none."""
        if not 0 <= place < len(self.shown):
            return ""
        return next((answer_id for first, answer_id in reversed(self.answers) if first <= place), "")

    @property
    def last_answer(self) -> tuple[str, str]:
        """The id and the text of the last answer; '' twice if the last question got none."""
        if not self.answers or not self.turns or self.turns[-1].role != "assistant":
            return "", ""
        return self.answers[-1][1], self.turns[-1].content
