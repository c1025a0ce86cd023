"""Subtitle files: times with hours, markup escaped, and no empty line inside a subtitle."""

from __future__ import annotations

from lorikeet.speech import Segment
from lorikeet.speech.subtitles import write_srt, write_vtt

SEGMENTS = (
    Segment(text="Salt & <pepper>\n\nand --> more", start_s=0.0, end_s=1.2346),
    Segment(text="Late.", start_s=3599.9996, end_s=36_061.5),
)


def test_subrip() -> None:
    assert write_srt(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,235\nSalt & <pepper> and --> more\n\n2\n01:00:00,000 --> 10:01:01,500\nLate.\n\n"
    )
    assert write_srt([]) == ""


def test_webvtt() -> None:
    assert write_vtt(SEGMENTS) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.235\nSalt &amp; &lt;pepper&gt; and --&gt; more\n\n"
        "01:00:00.000 --> 10:01:01.500\nLate.\n\n"
    )
    assert write_vtt([]) == "WEBVTT\n\n"
