"""Said and heard: an answer spoken by the packaged voice and transcribed by the packaged ears; word errors are what was lost.

    heard = round_trip(base_texts, tuned_texts, resamples=10_000)

Both sides are read the same way before they are compared (`speech.sayable`: numbers, dates and units in words, no markdown),
then lower case without punctuation, contractions written out, as Whisper's own normaliser does (2212.04356, appendix C). An
answer that repeats itself is counted and not spoken: Whisper takes such sound for its own raving and leaves it out, which says
nothing of how the answer sounds. It knows no model.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lorikeet.compare import ratio_interval
from lorikeet.errors import MachineError, MissingExtraError
from lorikeet.speech import HEARING_HZ, Ears, Voice
from lorikeet.speech.audio import resample
from lorikeet.speech.sayable import sayable

FIRST_WORDS = 40
"""Words of an answer that are spoken: about a quarter of a minute, which Whisper hears in one window."""

BUDGET_S = 25.0
"""No further pair of answers is spoken after this time."""

_SPELT = [
    (re.compile(pattern), spelt)
    for pattern, spelt in (
        (r"\bwon't\b", "will not"),
        (r"\b(?:can't|cannot)\b", "can not"),
        (r"n't\b", " not"),
        (r"'re\b", " are"),
        (r"'ve\b", " have"),
        (r"'ll\b", " will"),
        (r"'m\b", " am"),
        (r"\bo'clock\b", "o clock"),
        (r"\bok\b", "okay"),
        (r"\balright\b", "all right"),
    )
]
"""What people say in one way and write in two. An 's is left: it can be a possessive, and is silent between its and it's."""


def round_trip(base: Sequence[str], tuned: Sequence[str], *, resamples: int) -> dict[str, Any]:
    """Return the word error rates of both models' answers, how many repeat themselves, or `{"skipped": why}`.

    Rates are errors over words of all answers together, with 95 % bootstrap intervals over the answers, of the pairs of
    which neither repeats itself.
    """
    from lorikeet.speech.hear import load_ears
    from lorikeet.speech.speak import load_voice

    try:
        voice, ears = load_voice("hibari"), load_ears("whisper-tiny.en")
    except (MissingExtraError, MachineError) as error:
        return {"skipped": str(error)}
    counts = count_errors(list(zip(base, tuned, strict=True)), voice, ears, budget_s=BUDGET_S)
    heard = [pair for pair in counts if pair]
    if not heard:
        return {"skipped": "there is no pair of answers of which neither repeats itself"}
    result: dict[str, Any] = {"answers": len(counts), "compared": len(heard), "repeating": {}}
    for place, (who, answers) in enumerate((("base", base), ("tuned", tuned))):
        result["repeating"][who] = sum(_repeats(_said(answer)) for answer in answers[: len(counts)])
        # An answer without words is not dropped: it counts as one word, not heard.
        errors = np.array([pair[place][0] + (pair[place][1] == 0) for pair in heard], dtype=np.float64)
        counted = np.array([max(pair[place][1], 1) for pair in heard])
        result[who] = asdict(ratio_interval(errors, counted, level=0.95, resamples=resamples, seed=5))
    return result


Errors = tuple[int, int]
"""Words that were not heard as they were said, of how many."""


def count_errors(
    pairs: Sequence[tuple[str, str]], voice: Voice, ears: Ears, *, budget_s: float
) -> list[tuple[Errors, Errors] | None]:
    """Return the word errors of both answers of each pair, None for a pair of which one repeats itself: it is not spoken.

    As many pairs are spoken as the time allows, at least one.
    """
    began = time.monotonic()
    counts: list[tuple[Errors, Errors] | None] = []
    for base, tuned in ((_said(base), _said(tuned)) for base, tuned in pairs):
        is_spoken = not _repeats(base) and not _repeats(tuned)
        counts.append((_errors(base, voice, ears), _errors(tuned, voice, ears)) if is_spoken else None)
        if time.monotonic() - began > budget_s:
            break
    return counts


def _said(text: str) -> str:
    return " ".join(sayable(text).split()[:FIRST_WORDS])


def _repeats(said: str) -> bool:
    from lorikeet.speech.hear import COMPRESSION, compression

    return compression(said) > COMPRESSION


def _errors(said: str, voice: Voice, ears: Ears) -> Errors:
    pieces = list(voice.speak(said)) if said else []
    heard = ears.transcribe(resample(np.concatenate(pieces), voice.sample_rate_hz, HEARING_HZ)).text if pieces else ""
    wanted = words(said)
    return edit_distance(wanted, words(heard)), len(wanted)


def words(text: str) -> list[str]:
    """Return the words of `text` as they sound: numbers in words, lower case, hyphens and punctuation gone."""
    plain = sayable(text).lower().replace("\u2019", "'").replace("-", " ")
    for pattern, spelt in _SPELT:
        plain = pattern.sub(spelt, plain)
    return [word.replace("'", "") for word in re.findall(r"[\w']+", plain) if word.strip("'")]


def edit_distance(wanted: Sequence[str], got: Sequence[str]) -> int:
    """Return the fewest words to insert, delete or replace (Levenshtein, 1966)."""
    row = list(range(len(got) + 1))
    for place, word in enumerate(wanted, start=1):
        before, row[0] = row[0], place
        for column, other in enumerate(got, start=1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (word != other))
    return row[-1]
