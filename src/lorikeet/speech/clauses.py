"""A stream of text -> clauses that can be spoken one after another, the first one early.

    clauses = ClauseSplitter()
    for piece in stream:
        for clause in clauses.feed(piece):
            speak(clause)
    for clause in clauses.flush():
        speak(clause)

Joined, the clauses are the text. It looks at punctuation alone; what of a clause is said is `sayable`'s business.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator

FIRST_WORDS = 3
"""A first clause has at least so many words: fewer sound chopped off, more make the listener wait."""

CLAUSE_WORDS = 6
"""A later clause that ends in the middle of a sentence has at least so many; a sentence may be shorter."""

LONG_WORDS = 9
"""Where a first clause has grown to so many words without a comma, it ends before the next conjunction."""

MOST_WORDS = 24
"""A clause that has grown to so many words ends where it can: a small model may never come to a full stop."""

_TITLES = [
    "dr",
    "mr",
    "mrs",
    "ms",
    "prof",
    "st",
    "mt",
    "no",
    "vs",
    "etc",
    "jr",
    "sr",
    "inc",
    "ltd",
    "co",
    "corp",
    "dept",
    "gov",
    "gen",
    "approx",
    "e.g",
    "i.e",
    "a.k.a",
    "fig",
    "vol",
    "pp",
    "ed",
    "est",
    "jan",
    "feb",
    "mar",
    "apr",
    "jun",
    "jul",
    "aug",
    "sep",
    "sept",
    "oct",
    "nov",
    "dec",
]
# Each run of marks is tried once, from its first: from each of its marks, a long run would take its square.
_BREAK = re.compile(r"((?<![.!?…])[.!?…]++|[,;:]|[^\S\n][-–—]|—)([\"'”’)\]*_]*)(\s++)(?=\S)|(?<!\n)(\n++)(?=\S)")
_CONJUNCTION = re.compile(r"\s(?=(?:and|but|because|which|while|when|where|so|or)\s\S)")
_SPACE = re.compile(r"(?<=\S)\s+(?=\S)")
_WHOLE = re.compile(r"```.*?(?:```|$)|\[[^\]\n]{0,200}(?:\]\([^)\s]*\)?|$)", re.DOTALL)
_WORD = re.compile(r"\w[\w'’.-]*")


class ClauseSplitter:
    """Holds back text until it ends a clause."""

    def __init__(self) -> None:
        """Begin a new answer."""
        self._held = ""
        self._given = 0

    def feed(self, text: str) -> list[str]:
        """Return the clauses that `text` completes, with the white space after each."""
        self._held += text
        found = []
        while (end := self._end()) is not None:
            found.append(self._held[:end])
            self._held = self._held[end:]
            self._given += 1
        return found

    def flush(self) -> list[str]:
        """Return what is left at the end of the stream: one clause, or none."""
        rest, self._held = self._held, ""
        return [rest] if rest.strip() else []

    def _end(self) -> int | None:
        """Return where the first clause of what is held ends, None if that is not known yet."""
        words: list[int] = []
        read = 0
        for match in _BREAK.finditer(self._held):
            words += (word.start() for word in _WORD.finditer(self._held, read, match.start()))
            read = match.end()
            if self._ends_clause(match, words) and not _is_open(self._held[: match.start()]):
                return match.end()
        words += (word.start() for word in _WORD.finditer(self._held, read))
        if self._given == 0 and len(words) > LONG_WORDS:
            for match in _CONJUNCTION.finditer(self._held, words[CLAUSE_WORDS - 1] + 1):
                if not _is_open(self._held[: match.end()]):
                    return match.end()
        return self._forced_end()

    def _forced_end(self) -> int | None:
        """Return where a clause of too many words is cut: not inside code, a link or "Dr. Lee", and not for a few words more."""
        spaces = [*_SPACE.finditer(self._held)]
        whole = [match.span() for match in _WHOLE.finditer(self._held)] if len(spaces) >= MOST_WORDS else []
        for place in range(MOST_WORDS - 1, len(spaces) - CLAUSE_WORDS + 1):
            space = spaces[place]
            last = self._held[spaces[place - 1].end() : space.start()].lstrip("(\"'“‘*_[").lower()
            inside = any(start < space.start() < end for start, end in whole)
            if not inside and last.removesuffix(".") not in _TITLES and not last[-1:].isdigit():
                return space.end()
        return None

    def _ends_clause(self, match: re.Match[str], words: list[int]) -> bool:
        """Say whether a clause ends at a break; `words` are the places where words begin."""
        count, after = bisect_left(words, match.start()), self._held[match.end()]
        if match[4]:
            return count > 0
        mark = match[1].strip()
        if mark[0] in ".!?…":
            return count > 0 and self._ends_sentence(match.start(), mark, after, words[:count])
        if mark == "," and (after.isdigit() or not count):
            return False
        return count >= (FIRST_WORDS if self._given == 0 else CLAUSE_WORDS)

    def _ends_sentence(self, place: int, mark: str, after: str, words: list[int]) -> bool:
        """Say whether a stop at `place` ends a sentence rather than an abbreviation, an initial or a list's number."""
        if after.islower():
            return False
        if mark != ".":
            return True
        last = self._held[:place].rsplit(None, 1)[-1].lstrip("(\"'“‘*_[").lower()
        if last in _TITLES or (len(last) == 1 and last.isalpha() and last not in "i"):
            return False
        # "1. First": a number that opens a line is a list's; one that ends a sentence has words before it.
        line = self._held.rfind("\n", 0, place) + 1
        return not (last.isdigit() and bisect_left(words, line) == len(words) - 1)


def _is_open(text: str) -> bool:
    """Say whether a code block or a link that begins in `text` has not ended there."""
    if text.count("```") % 2 == 1:
        return True
    text = text.rpartition("```")[2]
    named, link, address = text.rpartition("](")
    return _has_bracket(text) or (bool(link) and _has_bracket(named) and not re.search(r"[)\s]", address))


def _has_bracket(text: str) -> bool:
    """Say whether a square bracket is open at the end of `text`."""
    return text.rfind("[") > text.rfind("]")


def split_clauses(text: str) -> Iterator[str]:
    """Yield the clauses of a whole text."""
    splitter = ClauseSplitter()
    yield from splitter.feed(text)
    yield from splitter.flush()
