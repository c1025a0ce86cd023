"""Speech to text: Whisper through CTranslate2 and faster-whisper.

    ears = load_ears("whisper-tiny.en")
    ears.transcribe(samples).text

Whisper was made for windows of 30 s, and on a CPU that window is most of the wait. So a first draft sees the speech and
five seconds of silence alone; what looks wrong with it (unsure, too fast, cut off) is heard again in the full window. What is no
speech, by the detector or by Whisper's own doubts, gives no words: Whisper invents some for silence and noise.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorikeet.errors import InputError, MachineError, MissingExtraError, RequestError
from lorikeet.run import usable_cores
from lorikeet.speech import HEARING_HZ, Ears, Samples, Segment, TimedTranscript, Transcript, Word
from lorikeet.speech.audio import level_db
from lorikeet.speech.vad import FRAME_MS, FRAME_SAMPLES, Vad, load_vad
from lorikeet.weights import PACKAGES, packaged

MOST_THREADS = 4
"""CTranslate2's own default; the models are too small for more."""

SILENCE_DB = -55.0
"""Audio below this level is silence; Whisper invents words for it."""

MIN_SPEECH_MS = 96
"""Less speech than this holds no word."""

MARGIN_S = 0.2
"""Audio that stays before and after the speech: soft beginnings and ends are below the detector's threshold."""

NO_SPEECH_PROBABILITY = 0.6
LOG_PROBABILITY = -1.0
COMPRESSION = 2.4
"""A text that Whisper thinks is no speech and is unsure of, or that repeats itself, is left out: the thresholds of its
paper (2212.04356)."""

RETRY_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Tried one after another while a text looks wrong, as in Whisper's paper."""

YIELD_S = 0.001
"""A lock that is taken again at once never passes to another thread."""

DRAFT_MAX_S = 20.0
"""Longer speech is heard in the full window at once."""

DRAFT_PADDING_S = 5.0
"""Silence after the speech in a draft. With less, tiny.en begins to repeat itself (docs/decisions/0005-voice.md)."""

TIME_STEP_S = 0.02
"""Between two of Whisper's tokens for times."""

DRAFT_PARTS = 3
"""Windows that a draft takes at most; each but the first is a sentence that the one before broke off."""

DRAFT_TOKENS_PER_S = 8
DRAFT_WORDS_PER_S = 6.0
"""People say two to four words a second; a draft with more was not said like that."""


class WhisperEars:
    """Whisper on CTranslate2, 8-bit integers on the CPU."""

    def __init__(self, name: str, model: Any, vad: Vad) -> None:
        """Wrap a loaded `faster_whisper.WhisperModel`; `vad` finds the speech that it is given."""
        self.name = name
        self._model = model
        self._vad = vad
        self._lock = threading.Lock()
        self._english = not model.model.is_multilingual

    def transcribe(self, samples: Samples) -> Transcript:
        """Return what is said in `samples`, mono at 16 kHz; one window at a time, whoever asks."""
        duration_s = samples.size / HEARING_HZ
        speech, speech_s = self._find_speech(samples)
        if not speech.size:
            return Transcript("", duration_s)
        with self._lock:
            draft = self._draft(speech, speech_s) if speech.size <= DRAFT_MAX_S * HEARING_HZ else None
        return Transcript(self._hear_whole(speech) if draft is None else draft, duration_s)

    def transcribe_timed(
        self,
        samples: Samples,
        *,
        language: str = "",
        prompt: str = "",
        temperature: float = 0.0,
        words: bool = False,
    ) -> Generator[Segment, None, TimedTranscript]:
        """Yield what is said in `samples`, mono at 16 kHz, and when, from the full window; return all of it.

        Raises RequestError for a language that is not heard.
        """
        heard = self._model.supported_languages
        if language and language not in heard:
            raise RequestError(f"language: {language[:20]!r} is not heard by {self.name}; it hears: {', '.join(heard)}")
        duration_s = samples.size / HEARING_HZ
        first, last, _ = self._speech_range(samples)
        if first == last:
            return TimedTranscript((), language or ("en" if self._english else ""), duration_s)
        with self._lock:
            found, info = self._model.transcribe(
                samples[first:last],
                language=language or None,
                beam_size=1,
                condition_on_previous_text=False,
                initial_prompt=prompt or None,
                temperature=temperature or RETRY_TEMPERATURES,
                word_timestamps=words,
            )
        spoken = []
        for segment in filter(_is_said, self._take(found)):
            spoken.append(_timed(segment, first / HEARING_HZ, duration_s))
            yield spoken[-1]
        return TimedTranscript(tuple(spoken), info.language, duration_s)

    def _take(self, segments: Iterator[Any]) -> Iterator[Any]:
        """Yield what faster-whisper hears, window by window; a turn that waits goes between two windows."""
        while True:
            with self._lock:
                segment = next(segments, None)
            if segment is None:
                return
            yield segment
            time.sleep(YIELD_S)

    def _find_speech(self, samples: Samples) -> tuple[Samples, float]:
        """Return the part from the first speech to the last, with a margin, and the seconds of speech in it."""
        first, last, speech_s = self._speech_range(samples)
        return samples[first:last], speech_s

    def _speech_range(self, samples: Samples) -> tuple[int, int, float]:
        """Return where the speech begins and ends, with a margin, and the seconds of speech; zeros if there is none."""
        if level_db(samples) < SILENCE_DB:
            return 0, 0, 0.0
        voiced = np.flatnonzero(self._vad.voiced_frames(samples))
        if voiced.size * FRAME_MS < MIN_SPEECH_MS:
            return 0, 0, 0.0
        margin = int(MARGIN_S * HEARING_HZ)
        first, last = int(voiced[0]) * FRAME_SAMPLES, int(voiced[-1] + 1) * FRAME_SAMPLES
        return max(0, first - margin), min(samples.size, last + margin), voiced.size * FRAME_MS / 1000

    def _draft(self, speech: Samples, speech_s: float, *, parts: int = DRAFT_PARTS) -> str | None:
        """Return what a short window gives, '' where that is no speech, None if it must be heard again.

        A sentence that Whisper leaves to the next window is asked for anew, until there are so many `parts`.
        """
        model = self._model
        padded = np.pad(speech, (0, int(DRAFT_PADDING_S * HEARING_HZ)))
        features = model.feature_extractor(padded, padding=0)
        encoded = model.encode(features[:, : features.shape[-1] // 2 * 2])
        prompt = self._prompt(encoded)
        limit = int(DRAFT_TOKENS_PER_S * speech_s) + 12
        result = model.model.generate(
            encoded,
            [prompt],
            beam_size=1,
            max_length=len(prompt) + limit,
            return_scores=True,
            return_no_speech_prob=True,
        )[0]
        tokens = result.sequences_ids[0]
        end = model.hf_tokenizer.token_to_id("<|endoftext|>")
        closed, closed_s = _last_closed(tokens, zero=model.hf_tokenizer.token_to_id("<|notimestamps|>") + 1)
        text = model.hf_tokenizer.decode([token for token in tokens if token < end]).strip()
        if result.no_speech_prob > NO_SPEECH_PROBABILITY and result.scores[0] < LOG_PROBABILITY:
            return ""
        hurried = len(tokens) >= limit or len(text.split()) > DRAFT_WORDS_PER_S * speech_s + 2
        once = cut_repetition(text) if hurried else text
        if result.scores[0] < LOG_PROBABILITY or (hurried and once == text) or compression(once) > COMPRESSION:
            return None
        if hurried or not closed or parts == 1 or closed_s * HEARING_HZ >= speech.size:
            return once
        before = model.hf_tokenizer.decode([token for token in tokens[:closed] if token < end]).strip()
        left = speech[int(closed_s * HEARING_HZ) :]
        rest = self._draft(left, min(speech_s, left.size / HEARING_HZ), parts=parts - 1)
        if not rest:
            return once if rest == "" else None
        return f"{before} {rest}".strip()

    def _prompt(self, encoded: Any) -> list[int]:
        """Return the tokens that ask for a transcript in the language that is heard.

        Times are asked for too: with them the model notices better where the speech ends.
        """
        names = ["<|startoftranscript|>"]
        if not self._english:
            names += [self._model.model.detect_language(encoded)[0][0][0], "<|transcribe|>"]
        return [self._model.hf_tokenizer.token_to_id(name) for name in names]

    def _hear_whole(self, speech: Samples) -> str:
        """Return what the full window gives, without the segments that are no speech."""
        with self._lock:
            segments, _ = self._model.transcribe(
                speech,
                language="en" if self._english else None,
                beam_size=1,
                condition_on_previous_text=False,
            )
        return " ".join(segment.text.strip() for segment in self._take(segments) if _is_said(segment))


def _last_closed(tokens: Sequence[int], *, zero: int) -> tuple[int, float]:
    """Return how many of `tokens` belong to closed segments, and when the next one begins; zeros if all are closed.

    Whisper closes a segment with a time. Where it ends without one, it leaves the last sentence to the next window, often cut
    off, and expects to be asked again from the time before it (2212.04356, section 2.3). `zero` is the token of time 0.
    """
    times = [place for place, token in enumerate(tokens) if token >= zero]
    if not times or times[-1] == len(tokens) - 1 or tokens[times[-1]] == zero:
        return 0, 0.0
    return times[-1], (tokens[times[-1]] - zero) * TIME_STEP_S


def _is_said(segment: Any) -> bool:
    """Say whether one of faster-whisper's segments has words, and words that were spoken."""
    speech = segment.no_speech_prob < NO_SPEECH_PROBABILITY or segment.avg_logprob > LOG_PROBABILITY
    return bool(segment.text.strip()) and speech and segment.compression_ratio < COMPRESSION


def _timed(segment: Any, offset_s: float, duration_s: float) -> Segment:
    """Return one of faster-whisper's segments with its times in the whole recording, `offset_s` later."""

    def when(time_s: float) -> float:
        return round(min(duration_s, float(time_s) + offset_s), 2)

    return Segment(
        text=segment.text.strip(),
        start_s=when(segment.start),
        end_s=when(segment.end),
        words=tuple(Word(word.word.strip(), when(word.start), when(word.end)) for word in segment.words or ()),
        tokens=tuple(segment.tokens),
        temperature=float(segment.temperature or 0.0),
        log_probability=float(segment.avg_logprob),
        compression=float(segment.compression_ratio),
        no_speech_probability=float(segment.no_speech_prob),
    )


def cut_repetition(text: str) -> str:
    """Return `text` up to where it begins to say again what it has just said; `text` itself if it does not."""
    words = text.split()
    plain = [word.strip(".,?!;:").lower() for word in words]
    for size in range(1, len(words) // 2 + 1):
        for start in range(len(words) - 2 * size + 1):
            again = plain[start + size : start + 2 * size]
            # One word or two may well be said twice ("no, no"), but not three times over.
            twice = plain[start : start + size] == again
            thrice = again == plain[start + 2 * size : start + 3 * size]
            if twice and (size >= 3 or thrice):
                return " ".join(words[: start + size])
    return text


def compression(text: str) -> float:
    """Return how many times smaller `text` becomes: more than `COMPRESSION` is said over and over."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


def load_ears(name: str, *, threads: int | None = None) -> Ears:
    """Return the speech recogniser `name`: a packaged name, a CTranslate2 folder, or a size that the hub has.

    It hears with so many `threads`, by default one for each core up to `MOST_THREADS`.
    Raises InputError for an unknown name, MissingExtraError without faster-whisper, MachineError if it cannot be loaded.
    """
    threads = threads or min(MOST_THREADS, usable_cores())
    if name in PACKAGES and name.startswith("whisper"):
        return WhisperEars(name, _load(str(packaged(name)), threads), load_vad())
    if Path(name).is_dir():
        if not (Path(name) / "model.bin").is_file():
            raise InputError(f"{name} is no Whisper folder for CTranslate2 (no model.bin); try --ears whisper-tiny.en")
        return WhisperEars(Path(name).name, _load(name, threads), load_vad())
    sizes = _sizes()
    if name.removeprefix("whisper-") in sizes:
        return WhisperEars(name, _load(name.removeprefix("whisper-"), threads), load_vad())
    raise InputError(
        f"--ears {name} is not known; packaged is whisper-tiny.en, sizes are {', '.join(sizes)}, or name a folder, or off"
    )


def _sizes() -> list[str]:
    try:
        from faster_whisper import available_models
    except ImportError as error:
        raise MissingExtraError("faster-whisper", "speech") from error
    return list(available_models())


def _load(source: str, threads: int) -> Any:
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise MissingExtraError("faster-whisper", "speech") from error
    try:
        return WhisperModel(source, device="cpu", compute_type="int8", cpu_threads=threads, num_workers=1)
    except (RuntimeError, OSError, ValueError) as error:
        raise MachineError(
            f"cannot load the ears {source}: {str(error).splitlines()[0]}; the packaged one is whisper-tiny.en"
        ) from error
