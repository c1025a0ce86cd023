"""Can an answer be spoken? Its length, and what a voice would stumble over."""

from __future__ import annotations

import re
from dataclasses import dataclass

MOST_WORDS = 60
"""About 24 seconds at 150 words a minute; listeners lose the thread of a longer answer."""

_STUMBLES = {
    "markdown": re.compile(
        r"(\*\*|__|`|^\s{0,3}#{1,6}\s|^\s*([-*+•]|\d+[.)])\s|\[[^\]]+\]\([^)]+\)|^\s*\|)", re.MULTILINE
    ),
    "link": re.compile(r"(https?://|www\.|\b[\w-]+@[\w-]+\.\w+|\b[\w-]+\.(com|org|net|io|example)\b)", re.IGNORECASE),
    "symbol": re.compile(r"[{}<>=\\^~|@#$%&€£°§©®™→←]|[\U0001f000-\U0001faff\u2600-\u27bf]"),
    "line break": re.compile(r"\S\s*\n\s*\S"),
}


@dataclass(frozen=True, slots=True)
class Speakability:
    """How an answer would sound."""

    words: int
    stumbles: tuple[str, ...]
    """What a voice would stumble over, such as `markdown` or `link`."""

    @property
    def speakable(self) -> bool:
        """Whether it has words, not too many, and nothing to stumble over."""
        return 0 < self.words <= MOST_WORDS and not self.stumbles


def speakability(answer: str) -> Speakability:
    """Return how `answer` would sound."""
    stumbles = tuple(name for name, pattern in _STUMBLES.items() if pattern.search(answer))
    return Speakability(len(re.findall(r"\w[\w'-]*", answer)), stumbles)
