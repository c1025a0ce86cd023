"""What was heard, and when -> subtitle files: SubRip and WebVTT.

    text = write_srt([*ears.transcribe_timed(samples)])

It writes text; `serve.audio` sends it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from lorikeet.speech import Segment


def write_srt(segments: Sequence[Segment]) -> str:
    """Return the segments as a SubRip file; '' for none."""
    return "".join(
        f"{number}\n{_when(segment.start_s, ',')} --> {_when(segment.end_s, ',')}\n{_line(segment)}\n\n"
        for number, segment in enumerate(segments, 1)
    )


def write_vtt(segments: Sequence[Segment]) -> str:
    """Return the segments as a WebVTT file, which has `&`, `<` and `>` escaped (w3.org/TR/webvtt1)."""
    cues = (
        f"{_when(segment.start_s, '.')} --> {_when(segment.end_s, '.')}\n{html.escape(_line(segment), quote=False)}\n\n"
        for segment in segments
    )
    return "WEBVTT\n\n" + "".join(cues)


def _line(segment: Segment) -> str:
    # An empty line would end the subtitle.
    return " ".join(segment.text.split())


def _when(time_s: float, mark: str) -> str:
    """Return hours, minutes, seconds and, after `mark`, milliseconds."""
    seconds, ms = divmod(round(time_s * 1000), 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}{ms:03}"
