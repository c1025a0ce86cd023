"""How long from the end of a question to the first sound of its answer? People's clips, in real time, over /v1/realtime.

    .venv/bin/python benchmarks/voice.py [--target smollm2-135m-instruct] [--rounds 3] [--json PATH]

Starts the real server with the packaged ears and voice, streams each clip to it as a microphone would, and times from
the clip's last voiced sample, found in the clip itself, to the arrival of the first audible sample. Prints a waterfall
for each turn: what the client saw (endpoint, first audio), and when the server had the stages in between ready, which
it prepares while it still waits for the endpoint. `--url` measures a server that runs already.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
from report import SHARED, served, stamp, table

from lorikeet.speech import HEARING_HZ, Samples
from lorikeet.speech.audio import decode, encode_pcm16, level_db, resample
from lorikeet.speech.vad import FRAME_SAMPLES, load_vad

RATE_HZ = 24_000
STEP_MS = 20
LEAD_IN_S = 0.6
PATIENCE_S = 8.0
AUDIBLE = 0.01
BELOW_SPEECH_DB = 25.0
STAGES = ("endpoint", "transcript", "first_token", "first_clause", "first_audio")


@dataclass
class Turn:
    """What was seen of one clip."""

    clip: str
    voice_to_voice_ms: float | None = None
    """From the last voiced sample to the first audible one, by the client's clock."""
    endpoint_ms: float | None = None
    """From the last voiced sample to the event that says the turn is over, by the client's clock."""
    heard: str = ""
    early_starts: int = 0
    """Answers that began to be heard before the clip was over."""
    user_turns: int = 0
    """Turns that the clip was taken for."""
    waterfall: dict[str, float] = field(default_factory=dict)
    """The server's own, from where it saw the speech end."""


def last_voiced_s(samples: Samples) -> float:
    """Return where the speech in a clip ends: its last 10 ms that are at most 25 dB below the speech's level."""
    voiced = load_vad().voiced_frames(samples)
    frames = np.pad(samples, (0, -samples.size % FRAME_SAMPLES)).reshape(-1, FRAME_SAMPLES)
    limit_db = level_db(frames[voiced].ravel()) - BELOW_SPEECH_DB
    end = min(samples.size, (int(np.flatnonzero(voiced)[-1]) + 1) * FRAME_SAMPLES)
    step = HEARING_HZ // 100
    while end > step and level_db(samples[end - step : end]) < limit_db:
        end -= step
    return end / HEARING_HZ


async def take_turn(url: str, clip: Path, key: str) -> Turn:
    """Play one clip to the server as a microphone would, and listen until the answer is over."""
    samples = decode(clip)
    spoken_until_s = LEAD_IN_S + last_voiced_s(samples)
    sound = resample(samples, HEARING_HZ, RATE_HZ)
    silence = np.zeros(int(RATE_HZ * LEAD_IN_S), np.float32)
    pcm = encode_pcm16(np.concatenate([silence, sound]))
    turn = Turn(clip.name)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key)
    async with client.realtime.connect(model="default") as connection:
        await connection.session.update(session={"type": "realtime", "lorikeet": {"events": True}})
        began_s = time.monotonic()
        microphone = asyncio.create_task(_stream(connection, pcm, began_s))
        try:
            async with asyncio.timeout(spoken_until_s + PATIENCE_S):
                await _listen(connection, turn, end_s=began_s + spoken_until_s)
        except TimeoutError:
            print(f"{clip.name}: no answer within {PATIENCE_S:g} s", file=sys.stderr)
        finally:
            microphone.cancel()
    return turn


async def _stream(connection: Any, pcm: bytes, began_s: float) -> None:
    """Send the sound, then silence, in pieces of 20 ms, each when it would have been recorded."""
    step = 2 * RATE_HZ * STEP_MS // 1000
    place = 0
    while True:
        await asyncio.sleep(began_s + (place + step) / (2 * RATE_HZ) - time.monotonic())
        piece = pcm[place : place + step].ljust(step, b"\0")
        await connection.input_audio_buffer.append(audio=base64.b64encode(piece).decode())
        place += step


async def _listen(connection: Any, turn: Turn, *, end_s: float) -> None:
    """Take note of what comes, until an answer to the whole clip can be heard."""
    waterfalls: dict[str, dict[str, float]] = {}
    audible: set[str] = set()
    items: set[str] = set()
    async for event in connection:
        now_s = time.monotonic()
        if event.type == "input_audio_buffer.speech_stopped":
            turn.endpoint_ms = (now_s - end_s) * 1000
        elif event.type == "conversation.item.input_audio_transcription.completed":
            turn.heard = event.transcript
            items.add(event.item_id)
        elif event.type == "conversation.item.deleted":
            items.discard(event.item_id)
        elif event.type == "lorikeet.turn":
            extra = event.model_extra
            waterfalls[extra["response_id"]] = extra["waterfall"]
        elif event.type == "response.output_audio.delta" and event.response_id not in audible:
            sound = np.abs(np.frombuffer(base64.b64decode(event.delta), "<i2")) > AUDIBLE * 32768
            if not sound.any():
                continue
            audible.add(event.response_id)
            if now_s > end_s:
                turn.voice_to_voice_ms = (now_s - end_s) * 1000
                turn.user_turns = len(items)
                turn.waterfall = waterfalls.get(event.response_id, {})
                return
            turn.early_starts += 1


def summary(values: list[float]) -> dict[str, float]:
    """Return the median and the 95th percentile."""
    return {"p50_ms": round(float(np.percentile(values, 50)), 1), "p95_ms": round(float(np.percentile(values, 95)), 1)}


def show(turns: list[Turn]) -> None:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}"

    rows = []
    for turn in turns:
        middle = [cell(turn.waterfall.get(f"{stage}_ms")) for stage in STAGES[1:4]]
        ends = cell(turn.endpoint_ms), cell(turn.voice_to_voice_ms)
        rows.append(
            (turn.clip, ends[0], *middle, ends[1], str(turn.early_starts), str(turn.user_turns), turn.heard[:40])
        )
    head = ("Clip", "endpoint", "transcript", "first token", "first clause", "first audio", "early", "turns", "heard")
    print(table(head, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--key", default="none")
    parser.add_argument("--clips", type=Path, default=SHARED / "speech")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/voice.json"))
    options = parser.parse_args()
    clips = sorted(options.clips.glob("*.wav"))
    if not clips:
        sys.exit(f"no clips in {options.clips}; name a folder of WAV files with --clips")

    def measure(url: str) -> list[Turn]:
        order = [clip for _ in range(options.rounds) for clip in clips]
        return [asyncio.run(take_turn(url, clip, options.key)) for clip in order]

    if options.url:
        turns = measure(options.url)
    else:
        with served(options.target) as server:
            turns = measure(server.url)
    show(turns)
    whole = [turn.voice_to_voice_ms for turn in turns if turn.voice_to_voice_ms is not None]
    if not whole:
        sys.exit("no turn was answered")
    stages = {
        "endpoint": summary([turn.endpoint_ms for turn in turns if turn.endpoint_ms is not None]),
        **{
            stage: summary([turn.waterfall[f"{stage}_ms"] for turn in turns if f"{stage}_ms" in turn.waterfall])
            for stage in STAGES[1:4]
        },
        "first_audio": summary(whole),
    }
    result = {"turns": len(whole), "unanswered": len(turns) - len(whole), **summary(whole), "stages": stages}
    print(f"\nvoice to voice: p50 {result['p50_ms']:.0f} ms, p95 {result['p95_ms']:.0f} ms over {len(whole)} turns")
    stamp(options.json, {**result, "target": options.target, "rows": [vars(turn) for turn in turns]})


if __name__ == "__main__":
    main()
