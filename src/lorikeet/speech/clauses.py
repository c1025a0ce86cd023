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
_BREAK = re.compile(r"([.!?…]+|[,;:]|[^\S\n][-–—]|—)([\"'”’)\]*_]*)(\s+)(?=\S)|(\n+)(?=\S)")
_CONJUNCTION = re.compile(r"\s(?=(?:and|but|because|which|while|when|where|so|or)\s\S)")
_OPEN = re.compile(r"```|\[[^\]]*\]\([^)\s]*$|\[[^\]]*$")
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
        for match in _BREAK.finditer(self._held):
            if self._ends_clause(match):
                return match.end()
        if self._given == 0 and len(_words(self._held)) > LONG_WORDS:
            for match in _CONJUNCTION.finditer(self._held):
                if len(_words(self._held[: match.start()])) >= CLAUSE_WORDS and not _is_open(self._held[: match.end()]):
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

    def _ends_clause(self, match: re.Match[str]) -> bool:
        before, after = self._held[: match.start()], self._held[match.end() :]
        if _is_open(self._held[: match.start()]):
            return False
        words = len(_words(before))
        if match[4]:
            return words > 0
        mark = match[1].strip()
        if mark[0] in ".!?…":
            return words > 0 and _ends_sentence(before, mark, after)
        if mark == "," and (after[0].isdigit() or not words):
            return False
        return words >= (FIRST_WORDS if self._given == 0 else CLAUSE_WORDS)


def _ends_sentence(before: str, mark: str, after: str) -> bool:
    """Say whether a stop after `before` ends a sentence rather than an abbreviation, an initial or a list's number."""
    if after[0].islower():
        return False
    if mark != ".":
        return True
    last = before.rsplit(None, 1)[-1].lstrip("(\"'“‘*_[").lower() if before.split() else ""
    if last in _TITLES or (len(last) == 1 and last.isalpha() and last not in "i"):
        return False
    # "1. First": a number that opens a line is a list's; one that ends a sentence has words before it.
    return not (last.isdigit() and len(_words(before.rsplit("\n", 1)[-1])) == 1)


def _is_open(text: str) -> bool:
    """Say whether a code block or a link that begins in `text` has not ended there."""
    return text.count("```") % 2 == 1 or _OPEN.search(text.rsplit("```", 1)[-1]) is not None


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def split_clauses(text: str) -> Iterator[str]:
    """Yield the clauses of a whole text."""
    splitter = ClauseSplitter()
    yield from splitter.feed(text)
    yield from splitter.flush()
