"""Is somebody speaking? Silero's voice activity detector, a frame of 32 ms at a time.

    vad = load_vad()
    probability = vad.stream().feed(frame)          # live: one frame of 512 samples after another
    vad.voiced_frames(samples)                      # a recording: which of its frames are speech

The ONNX file travels in the package `silero-vad`, whose code needs torch; only the file is used. What a probability
means for a conversation is `serve.voice.turn`'s business.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorikeet.errors import MachineError, MissingExtraError
from lorikeet.speech import HEARING_HZ, Samples
from lorikeet.weights import packaged

FRAME_SAMPLES = 512
"""What the model takes at 16 kHz: 32 ms."""

FRAME_MS = 1000 * FRAME_SAMPLES // HEARING_HZ
SPEECH_PROBABILITY = 0.5
"""A frame of at least this probability is speech: the threshold that Silero's own tools use."""

_CONTEXT_SAMPLES = 64
_STATE = (1, 1, 128)


class VadStream:
    """One listener: the detector's memory of what it heard."""

    def __init__(self, session: Any) -> None:
        """Listen with a shared onnxruntime session, which any number of threads may run."""
        self._session = session
        self._h = np.zeros(_STATE, np.float32)
        self._c = np.zeros(_STATE, np.float32)
        self._context = np.zeros(_CONTEXT_SAMPLES, np.float32)

    def feed(self, frame: Samples) -> float:
        """Return the probability in [0, 1] that the next `FRAME_SAMPLES` samples, at 16 kHz, are speech."""
        return float(self.feed_all(frame)[0])

    def feed_all(self, frames: Samples) -> NDArray[np.float32]:
        """Return the probability of each whole frame in `frames`, shape (samples // FRAME_SAMPLES,)."""
        count = frames.size // FRAME_SAMPLES
        if not count:
            return np.zeros(0, np.float32)
        heard = np.concatenate([self._context, frames[: count * FRAME_SAMPLES]])
        width = FRAME_SAMPLES + _CONTEXT_SAMPLES
        rows = np.lib.stride_tricks.sliding_window_view(heard, width)[::FRAME_SAMPLES]
        given = {"input": np.ascontiguousarray(rows), "h": self._h, "c": self._c}
        probabilities, self._h, self._c = self._session.run(None, given)
        self._context = heard[-_CONTEXT_SAMPLES:]
        return np.asarray(probabilities, np.float32)


class Vad:
    """The detector; one object serves any number of streams and threads."""

    def __init__(self, session: Any) -> None:
        """Wrap an onnxruntime session of Silero's sequence model."""
        self._session = session

    def stream(self) -> VadStream:
        """Return a listener that has heard nothing yet."""
        return VadStream(self._session)

    def voiced_frames(self, samples: Samples) -> NDArray[np.bool_]:
        """Return for each frame of a recording, its last one filled up with silence, whether it is speech."""
        padded = np.pad(samples, (0, -samples.size % FRAME_SAMPLES))
        return self.stream().feed_all(padded) >= SPEECH_PROBABILITY


@cache
def load_vad() -> Vad:
    """Return the packaged detector, loaded once. Raises MissingExtraError or MachineError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "speech") from error
    model = packaged("silero-vad") / "silero_vad_16k_sequence.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return Vad(onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"]))
    except Exception as error:  # onnxruntime's exceptions have no common root that it exports
        raise MachineError(f"cannot load the voice activity detector {model}: {error}") from error
