"""Text to speech, and what of a text is spoken.

voice = load_voice("hibari")
for samples in voice.speak(spoken("**Hello**, see https://lorikeet.example")): ...
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

from lorikeet.errors import InputError, MissingExtraError
from lorikeet.speech import Samples, Voice
from lorikeet.weights import packaged_voice

_CODE_BLOCK = re.compile(r"```.*?(```|\Z)", re.DOTALL)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_URL = re.compile(r"(https?://|www\.)[^\s<>\")\]]+")
_CITATION = re.compile(r"\s?\[\d+\]")
_MARKS = re.compile(
    r"(\*\*|__|~~|`|^\s{0,3}#{1,6}\s+|^\s{0,3}>\s?|^\s*[-*+•]\s+|(?<!\w)\*(?=\S)|(?<=\S)\*(?!\w)|\|)", re.MULTILINE
)
_RULE = re.compile(r"^\s*([-*_=]\s*){3,}$", re.MULTILINE)
_EMOJI = re.compile(
    "[\U0001f000-\U0001faff\U00002600-\U000027bf\U0001f1e6-\U0001f1ff\u2190-\u21ff\u2b00-\u2bff\ufe0e\ufe0f\u200d\u20e3]+"
)


def spoken(text: str) -> str:
    """Return what of `text` is said aloud: no markdown, code blocks, links, citations or emoji, lines as sentences."""
    text = _CODE_BLOCK.sub(" ", text)
    text = _LINK.sub(r"\1", text)
    text = _URL.sub(" ", text)
    text = _CITATION.sub("", text)
    text = _RULE.sub(" ", text)
    text = _MARKS.sub("", text)
    text = _EMOJI.sub(" ", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    ended = [line if line[-1] in ".!?:;," else f"{line}." for line in lines if re.search(r"\w", line)]
    return re.sub(r"\s+([,.!?;:])", r"\1", " ".join(ended))


class HibariVoice:
    """The packaged neural voice: English, 24 kHz, about a hundred times faster than real time."""

    name = "hibari"

    def __init__(self, model: Any) -> None:
        """Wrap a loaded `hibari.Hibari`."""
        self._model = model
        self._lock = threading.Lock()
        self.sample_rate_hz = int(model.sample_rate)

    def speak(self, text: str) -> Iterator[Samples]:
        """Yield the spoken `text`, a sentence at a time; the same text always sounds the same."""
        for sentence in self._model.split_sentences(text):
            with self._lock:
                samples: Samples = self._model(sentence, seed=0)
            if samples.size:
                yield samples


def load_voice(name: str) -> Voice:
    """Return the voice `name`. Raises InputError for an unknown one, MissingExtraError without its package."""
    if name != "hibari":
        raise InputError(f"--voice {name} is not known; there are: hibari (packaged), off")
    packaged_voice()
    try:
        from hibari import Hibari
    except ImportError as error:
        raise MissingExtraError("hibari-tts", "speech") from error
    return HibariVoice(Hibari(threads=1))
