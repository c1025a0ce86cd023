"""/v1/realtime through OpenAI's own client, against a real server with the packaged ears and voice."""

from __future__ import annotations

import base64
import json
import queue
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from lorikeet.messages import Source
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.serve.memory import Memory
from lorikeet.serve.models import Models, Served
from lorikeet.serve.voice import realtime
from lorikeet.speech import HEARING_HZ, Ears, Samples, Transcript, Voice
from lorikeet.speech.audio import encode_pcm16, resample, trim_start
from lorikeet.speech.hear import load_ears
from lorikeet.speech.speak import load_voice
from lorikeet.speech.vad import load_vad
from tests.serve.fakes import API_KEY, ScriptedEngine, ScriptedProvider, ToneVoice, served, serving

# OpenAI's client opens its socket in a way that websockets 17 is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:connect\\(\\) must be used as a context manager:DeprecationWarning")

RATE_HZ = 24_000
STEP = RATE_HZ // 50
LONG = [f"This is sentence number {number} of a long answer. " for number in ("one", "two", "three", "four", "five")]
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def ears() -> Ears:
    return load_ears("whisper-tiny.en")


@pytest.fixture(scope="module")
def voice() -> Voice:
    return load_voice("hibari")


def say(voice: Voice, text: str) -> Samples:
    """Return a text as somebody's speech, without the silence around it."""
    samples = trim_start(np.concatenate(list(voice.speak(text))), RATE_HZ)
    return trim_start(samples[::-1], RATE_HZ)[::-1].copy()


def silence(ms: int) -> Samples:
    return np.zeros(RATE_HZ * ms // 1000, np.float32)


class Talker:
    """OpenAI's client in a thread: what it is sent is kept with its time."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.seen: list[tuple[float, Any]] = []
        self._new: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for event in self.connection:
                self.seen.append((time.monotonic(), event))
                self._new.put(event)
        except (ConnectionClosed, OSError):
            pass
        self._new.put(None)

    def wait(self, kind: str, **fields: Any) -> Any:
        """Return the next event of a kind, with these fields; those before it are let go by."""
        deadline = time.monotonic() + PATIENCE_S
        while (left := deadline - time.monotonic()) > 0:
            try:
                event = self._new.get(timeout=left)
            except queue.Empty:
                break
            assert event is not None, f"the server left before {kind}"
            if event.type == kind and all(getattr(event, name) == value for name, value in fields.items()):
                return event
        raise AssertionError(f"no {kind} within {PATIENCE_S:g} s; there were {list(dict.fromkeys(self.kinds()))}")

    def kinds(self) -> list[str]:
        return [event.type for _, event in self.seen]

    def events(self, kind: str) -> list[Any]:
        return [event for _, event in self.seen if event.type == kind]

    def settle(self) -> None:
        """Wait until the server has taken all that was sent."""
        self.connection.session.update(session={"type": "realtime"})
        self.wait("session.updated")

    def play(self, *sounds: Samples, live: bool = True) -> float:
        """Send sound, each piece when it would have been recorded; return when the first piece was recorded."""
        samples = np.concatenate(sounds)
        began_s = time.monotonic()
        for place in range(0, samples.size, STEP):
            if live:
                time.sleep(max(0.0, began_s + (place + STEP) / RATE_HZ - time.monotonic()))
            piece = encode_pcm16(samples[place : place + STEP])
            self.connection.input_audio_buffer.append(audio=base64.b64encode(piece).decode())
        return began_s

    def sound(self, response_id: str) -> Samples:
        deltas = [e.delta for e in self.events("response.output_audio.delta") if e.response_id == response_id]
        data = b"".join(base64.b64decode(delta) for delta in deltas)
        return np.frombuffer(data, "<i2").astype(np.float32) / 32768


@contextmanager
def talking(engine: Any, *, ears: Ears | None, voice: Voice | None, **session: Any) -> Iterator[Talker]:
    provider, memory = session.pop("provider", None), session.pop("memory", None)
    assistant = Assistant(engine, system_prompt="Be brief.", provider=provider, memory=memory)
    app = create_app(serving(assistant, "parrot"), ears=ears, voice=voice, page=False)
    with served(app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        with client.realtime.connect(model="parrot") as connection:
            talker = Talker(connection)
            talker.url = url  # type: ignore[attr-defined]
            talker.wait("session.created")
            if session:
                connection.session.update(session={"type": "realtime", **session})
                talker.wait("session.updated")
            yield talker


MANUAL: Any = {"audio": {"input": {"turn_detection": None}}}


def words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def test_a_session_shows_what_it_is_set_to(ears: Ears) -> None:
    with talking(ScriptedEngine(), ears=ears, voice=ToneVoice()) as talker:
        session = talker.events("session.created")[0].session
        assert session.model == "parrot"
        assert session.instructions == "Be brief."
        assert session.output_modalities == ["audio"]
        assert session.audio.input.turn_detection.type == "server_vad"
        assert session.audio.input.format.rate == RATE_HZ
        change: Any = {
            "type": "realtime",
            "instructions": "Sing.",
            "audio": {
                "input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 700, "threshold": 0.6}}
            },
        }
        talker.connection.session.update(session=change)
        updated = talker.wait("session.updated").session
        assert updated.instructions == "Sing."
        vad = updated.audio.input.turn_detection
        assert (vad.silence_duration_ms, vad.threshold, vad.prefix_padding_ms) == (700, 0.6, 300)
        talker.connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
        assert talker.wait("session.updated").session.audio.input.turn_detection is None


def test_what_an_update_does_not_name_stays_as_it_was(ears: Ears) -> None:
    def detection(**changes: Any) -> Any:
        return {"audio": {"input": {"turn_detection": {"type": "server_vad", **changes}}}}

    def update(**changes: Any) -> Any:
        talker.connection.session.update(session={"type": "realtime", **changes})
        return talker.wait("session.updated").session

    with talking(ScriptedEngine(), ears=ears, voice=ToneVoice()) as talker:
        update(lorikeet={"events": True})
        assert update(lorikeet={"search": "auto"}).model_extra["lorikeet"] == {"search": "auto", "events": True}
        assert update(instructions="Sing.").model_extra["lorikeet"] == {"search": "auto", "events": True}
        update(**detection(create_response=False, interrupt_response=False, silence_duration_ms=900))
        vad = update(**detection(threshold=0.6)).audio.input.turn_detection
        assert (vad.threshold, vad.silence_duration_ms) == (0.6, 900)
        assert (vad.create_response, vad.interrupt_response) == (False, False)
        assert update(**detection(create_response=True)).audio.input.turn_detection.create_response
        update(**MANUAL)
        vad = update(**detection()).audio.input.turn_detection
        assert (vad.threshold, vad.silence_duration_ms, vad.interrupt_response) == (0.5, 384, True), "null forgets"


def test_another_model_answers_from_the_next_answer_on() -> None:
    tuned, base = ScriptedEngine("Tuned."), ScriptedEngine("Base.")
    models = Models(
        Served(name="parrot", assistant=Assistant(tuned)), Served(name="parrot-base", assistant=Assistant(base))
    )
    with served(create_app(models, ears=None, voice=None, page=False)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        with client.realtime.connect(model="gpt-realtime") as connection:

            def update(**changes: Any) -> Any:
                connection.session.update(session={"type": "realtime", **changes})
                return talker.wait("session.updated").session

            talker = Talker(connection)
            assert talker.wait("session.created").session.model == "parrot"
            create(talker, "user", "One?")
            connection.response.create()
            talker.wait("response.done")
            assert update(model="parrot-base").model == "parrot-base"
            assert update(model="gpt-realtime").model == "parrot-base", "a name by habit means what is served"
            connection.session.update(session={"type": "realtime", "model": "gpt-9", "instructions": "Sing."})
            refused = talker.wait("error").error
            assert (refused.code, refused.param) == ("model_not_found", "session.model")
            assert "'parrot-base'" in refused.message
            create(talker, "user", "Two?")
            connection.response.create()
            assert talker.wait("response.done").response.output[0].content[0].text == "Base."
            assert [m.content for m in base.asked[-1]] == ["One?", "Tuned.", "Two?"]
            assert update(model="parrot").instructions == "", "a refused update changes nothing"


def test_a_spoken_question_is_answered_by_voice(ears: Ears, voice: Voice) -> None:
    engine = ScriptedEngine("Paris ", "is ", "the capital, ", "and it ", "is large. ", "See https://a.example/b now.")
    with talking(engine, ears=ears, voice=voice) as talker:
        talker.play(silence(300), say(voice, "What is the capital of France?"), silence(900))
        done = talker.wait("response.done").response
        order = [
            "input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped", "input_audio_buffer.committed",
            "conversation.item.added", "conversation.item.done",
            "conversation.item.input_audio_transcription.completed", "response.created",
            "response.output_item.added", "response.content_part.added", "response.output_audio_transcript.delta",
            "response.output_audio.delta", "response.output_audio.done", "response.output_audio_transcript.done",
            "response.content_part.done", "response.output_item.done", "response.done",
        ]  # fmt: skip
        places = [talker.kinds().index(kind) for kind in order]
        assert places == sorted(places)
        heard = talker.events("conversation.item.input_audio_transcription.completed")[0]
        assert words(heard.transcript) == words("What is the capital of France")
        assert [m.content for m in engine.asked[-1]] == ["Be brief.", heard.transcript]
        assert done.status == "completed"
        assert done.output[0].content[0].transcript == "".join(engine.pieces)
        answer = ears.transcribe(resample(talker.sound(done.id), RATE_HZ, HEARING_HZ)).text
        assert {"paris", "capital", "large"} <= set(words(answer))
        assert not {"https", "example", "slash"} & set(words(answer))
        assert list(done.model_extra["lorikeet"]["waterfall"]) == [
            "endpoint_ms", "transcript_ms", "first_token_ms", "first_clause_ms", "first_audio_ms",
        ]  # fmt: skip
        numbers = httpx.get(f"{talker.url}/metrics").text  # type: ignore[attr-defined]
        assert 'lorikeet_voice_stage_seconds_count{stage="first_audio"} 1.0' in numbers


def test_a_sentence_with_a_pause_of_600_ms_is_one_turn(ears: Ears, voice: Voice) -> None:
    engine = ScriptedEngine("Fine.")
    first, second = say(voice, "I would like to know where"), say(voice, "the nearest train station is.")
    with talking(engine, ears=ears, voice=voice) as talker:
        talker.play(first, silence(600), second, silence(1200))
        talker.wait("response.done")
        talker.play(silence(500))
        deleted = {event.item_id for event in talker.events("conversation.item.deleted")}
        heard = [
            e.transcript
            for e in talker.events("conversation.item.input_audio_transcription.completed")
            if e.item_id not in deleted
        ]
        assert len(heard) == 1
        assert {"know", "where", "nearest", "train", "station"} <= set(words(heard[0]))
        answered = [e for e in talker.events("response.done") if e.response.status == "completed"]
        assert len(answered) == 1
        assert engine.asked[-1][-1].content == heard[0]


def test_who_goes_on_after_the_answer_began_takes_the_turn_back(ears: Ears, voice: Voice) -> None:
    engine = ScriptedEngine(*LONG)
    first, second = say(voice, "Please tell me about parrots."), say(voice, "And about their colors.")
    with talking(engine, ears=ears, voice=voice) as talker:
        talker.play(first, silence(850), second, silence(1000))
        talker.wait("conversation.item.deleted")
        dones = [event.response for event in talker.events("response.done")]
        assert [(r.status, r.status_details.reason) for r in dones] == [("cancelled", "turn_detected")]
        talker.wait("conversation.item.input_audio_transcription.completed")
        deadline = time.monotonic() + 5
        while len(engine.asked[-1]) > 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert {"please", "tell", "colors"} <= set(words(engine.asked[-1][-1].content))
        assert [m.role for m in engine.asked[-1]] == ["system", "user"], "the retracted turn is still in the history"


def test_barging_in_stops_speech_within_200_ms_and_only_what_was_heard_is_kept(ears: Ears, voice: Voice) -> None:
    engine = ScriptedEngine(*LONG)
    with talking(engine, ears=ears, voice=voice) as talker:
        talker.play(say(voice, "Please tell me a long story."), silence(800))
        talker.wait("response.output_audio.delta")
        talker.play(silence(2200))
        engine.pieces = ("Alright.",)
        barge_s = talker.play(say(voice, "Stop that now, thank you."), silence(900))
        done = talker.wait("response.done").response
        assert (done.status, done.status_details.reason) == ("cancelled", "turn_detected")
        last_s = max(
            at for at, e in talker.seen if e.type == "response.output_audio.delta" and e.response_id == done.id
        )
        assert last_s - barge_s < 0.2, "speech went on after the interruption"
        started_s = [at for at, e in talker.seen if e.type == "input_audio_buffer.speech_started"][-1]
        assert started_s - barge_s < 0.3
        talker.wait("response.done")
        kept = engine.asked[-1][-2]
        assert kept.role == "assistant"
        assert kept.content
        assert "".join(LONG).startswith(kept.content)
        assert len(kept.content) < len("".join(LONG)) * 0.8
        heard_ms = talker.events("conversation.item.truncated")[0].audio_end_ms
        assert 1500 < heard_ms < 4500
        assert done.output[0].content[0].transcript == kept.content
        assert heard_ms <= 1000 * talker.sound(done.id).size / RATE_HZ


def test_a_client_may_end_its_turns_itself(ears: Ears, voice: Voice) -> None:
    engine = ScriptedEngine("Fine.")
    with talking(engine, ears=ears, voice=voice, **MANUAL) as talker:
        talker.connection.input_audio_buffer.commit()
        assert talker.wait("error").error.code == "input_audio_buffer_commit_empty"
        talker.play(say(voice, "Good morning to you."), silence(600), live=False)
        talker.connection.input_audio_buffer.commit()
        item = talker.wait("input_audio_buffer.committed").item_id
        talker.connection.response.create()  # the transcript is still being made
        heard = talker.wait("conversation.item.input_audio_transcription.completed", item_id=item)
        assert "morning" in words(heard.transcript)
        assert talker.wait("response.done").response.status == "completed"
        assert engine.asked[-1][-1].content == heard.transcript
        assert "input_audio_buffer.speech_started" not in talker.kinds()
        talker.play(say(voice, "Good night."), live=False)
        talker.connection.input_audio_buffer.clear()
        talker.wait("input_audio_buffer.cleared")
        talker.connection.input_audio_buffer.commit()
        assert talker.wait("error").error.code == "input_audio_buffer_commit_empty"


def create(talker: Talker, role: str, text: str, **more: Any) -> Any:
    kind = "output_text" if role == "assistant" else "input_text"
    item: Any = {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}
    talker.connection.conversation.item.create(item=item, **more)
    return talker.wait("conversation.item.added")


def test_items_are_made_read_and_deleted(ears: Ears) -> None:
    engine = ScriptedEngine("Well.")
    with talking(engine, ears=ears, voice=ToneVoice(), output_modalities=["text"]) as talker:
        one = create(talker, "user", "One?").item.id
        assert create(talker, "assistant", "Yes.").previous_item_id == one
        three = create(talker, "user", "Three?").item.id
        first = create(talker, "user", "Zero?", previous_item_id="root")
        assert first.previous_item_id is None
        talker.connection.conversation.item.retrieve(item_id=three)
        assert talker.wait("conversation.item.retrieved").item.content[0].text == "Three?"
        talker.connection.conversation.item.delete(item_id=first.item.id)
        talker.wait("conversation.item.deleted", item_id=first.item.id)
        talker.connection.response.create()
        done = talker.wait("response.done").response
        assert done.output[0].content[0].text == "Well."
        assert (done.usage.input_tokens, done.usage.output_tokens) == (7, 1)
        assert [m.content for m in engine.asked[-1]] == ["Be brief.", "One?", "Yes.", "Three?"]
        assert "response.output_text.delta" in talker.kinds()
        assert "response.output_audio.delta" not in talker.kinds()
        talker.connection.conversation.item.retrieve(item_id="item_none")
        assert talker.wait("error").error.code == "item_not_found"
        aside: Any = {"conversation": "none", "instructions": "Sing.", "input": [], "metadata": {"for": "test"}}
        aside["input"] = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Aside?"}]}]
        talker.connection.response.create(response=aside)
        out = talker.wait("response.done").response
        assert (out.conversation_id, out.metadata) == (None, {"for": "test"})
        assert [m.content for m in engine.asked[-1]] == ["Sing.", "Aside?"]


def test_the_assistant_may_speak_first_and_go_on_unasked(ears: Ears, memory: Memory) -> None:
    engine = ScriptedEngine("Welcome.")
    with talking(engine, ears=ears, voice=None, memory=memory, lorikeet={"search": "always"}) as talker:

        def respond(**options: Any) -> list[tuple[str, str]]:
            talker.connection.response.create(response=options)
            assert talker.wait("response.done").response.status == "completed"
            return [(m.role, m.content) for m in engine.asked[-1]]

        # Templates demand turns that alternate, so that nobody said anything is a turn as well.
        assert respond(instructions="Greet the user.") == [("system", "Greet the user."), ("user", "...")]
        opening = [("system", "Be brief."), ("user", "..."), ("assistant", "Welcome.")]
        assert respond() == [*opening, ("user", "...")]
        talker.connection.conversation.item.delete(item_id=talker.events("response.done")[-1].response.output[0].id)
        assert remembered(memory, talker) == [], "an answer to nobody was kept as one"
        create(talker, "user", "Hi.")
        assert respond() == [*opening, ("user", "Hi.")]
        (turn,) = remembered(memory, talker)
        assert (turn["question"], turn["answer"]) == ("Hi.", "Welcome.")
        talker.connection.session.update(session={"type": "realtime", "instructions": ""})
        talker.connection.response.create(response={"input": []})
        assert talker.wait("error").error.message.startswith("there is nothing to answer")


def test_an_answer_is_cancelled_and_truncated_by_the_client(ears: Ears, voice: Voice) -> None:
    engine = ScriptedEngine(*LONG)
    with talking(engine, ears=ears, voice=voice) as talker:
        create(talker, "user", "Talk.")
        talker.connection.response.create()
        item_id = talker.wait("response.output_audio.delta").item_id
        talker.connection.response.create()
        assert talker.wait("error").error.code == "conversation_already_has_active_response"
        time.sleep(1.0)
        talker.connection.response.cancel()
        done = talker.wait("response.done").response
        assert (done.status, done.status_details.reason) == ("cancelled", "client_cancelled")
        talker.connection.response.cancel()
        assert talker.wait("error").error.code == "response_cancel_not_active"
        talker.connection.conversation.item.truncate(item_id=item_id, content_index=0, audio_end_ms=60_000)
        assert "audio_end_ms" in talker.wait("error").error.message
        talker.connection.conversation.item.truncate(item_id=item_id, content_index=0, audio_end_ms=600)
        talker.wait("conversation.item.truncated", audio_end_ms=600)
        talker.connection.conversation.item.retrieve(item_id=item_id)
        kept = talker.wait("conversation.item.retrieved").item.content[0].transcript
        assert 0 < len(kept) < len(LONG[0]) / 2
        assert LONG[0].startswith(kept)


class NoEars:
    """Hears nothing, whatever is said."""

    name = "deaf"

    def transcribe(self, samples: Samples) -> Transcript:
        return Transcript("", samples.size / HEARING_HZ)


def test_noise_and_wordless_sounds_are_no_turn(ears: Ears, voice: Voice) -> None:
    engine = ScriptedEngine()
    hiss = np.random.default_rng(0).normal(0, 0.05, RATE_HZ * 4).astype(np.float32)
    with talking(engine, ears=ears, voice=voice) as talker:
        talker.play(silence(3000), hiss, silence(2000), live=False)
        create(talker, "user", "Still there?")
        assert "input_audio_buffer.speech_started" not in talker.kinds()
    with talking(engine, ears=NoEars(), voice=voice) as talker:
        talker.play(say(voice, "Hum hum hum."), silence(1500), live=False)
        talker.wait("input_audio_buffer.cleared")
        create(talker, "user", "Still there?")
        assert "input_audio_buffer.committed" not in talker.kinds()
        assert "response.created" not in talker.kinds()
    assert engine.asked == []


def test_the_web_is_asked_once_the_turn_is_over_and_the_search_is_told(ears: Ears, voice: Voice) -> None:
    provider = ScriptedProvider(Source("Oslo", "https://weather.example/oslo", "Light snow."))
    engine = ScriptedEngine("Snow [1].")
    lorikeet: Any = {"search": "auto", "events": True}
    with talking(engine, ears=ears, voice=voice, provider=provider, lorikeet=lorikeet) as talker:
        first, second = say(voice, "What is the weather today in"), say(voice, "the city of Oslo?")
        talker.play(first, silence(500), second, silence(1000))
        talker.wait("response.done")
        assert len(provider.queries) == 1
        assert "oslo" in provider.queries[0].lower()
        told = [event.model_extra for event in talker.events("lorikeet.search")]
        assert [event["status"] for event in told] == ["searching", "found"]
        assert told[1]["sources"][0]["url"] == "https://weather.example/oslo"
        waterfall = talker.events("lorikeet.turn")[0].model_extra["waterfall"]
        assert list(waterfall) == [
            "endpoint_ms", "transcript_ms", "search_ms", "first_token_ms", "first_clause_ms", "first_audio_ms",
        ]  # fmt: skip
        assert waterfall["endpoint_ms"] < waterfall["search_ms"] < waterfall["first_token_ms"]
        numbers = httpx.get(f"{talker.url}/metrics").text  # type: ignore[attr-defined]
        assert 'lorikeet_voice_stage_seconds_count{stage="search"} 1.0' in numbers


def test_an_engine_that_fails_is_told_and_the_session_lives(ears: Ears) -> None:
    engine = ScriptedEngine("Half an ", "<fail>")
    with talking(engine, ears=ears, voice=ToneVoice()) as talker:
        create(talker, "user", "Talk.")
        talker.connection.response.create()
        done = talker.wait("response.done").response
        assert done.status == "failed"
        assert "middle of an answer" in done.status_details.error.message
        engine.pieces = ("Better.",)
        create(talker, "user", "Again.")
        talker.connection.response.create()
        assert talker.wait("response.done").response.status == "completed"


def broken_events(count: int) -> Iterator[str | bytes]:
    """Yield messages that are no good events."""
    generator = random.Random(5)
    kinds = [
        "session.update", "input_audio_buffer.append", "input_audio_buffer.commit", "conversation.item.create",
        "conversation.item.truncate", "conversation.item.delete", "response.create", "response.cancel", "nonsense",
    ]  # fmt: skip
    values = [None, True, -1, 1e308, "x" * 200, "\ud800", [], {}, [[[]]], {"type": "message"}, "AAA=", "AAAA", 2**70]
    names = ["session", "audio", "item", "item_id", "content_index", "audio_end_ms", "response", "event_id", "type"]
    for _ in range(count):
        event: dict[str, Any] = {"type": generator.choice(kinds)}
        for name in generator.sample(names[:-1], generator.randint(0, 3)):
            event[name] = generator.choice(values)
        text = json.dumps(event)
        if generator.random() < 0.2:
            text = text[: generator.randrange(len(text))]
        yield text.encode() if generator.random() < 0.05 else text
    yield "[" * 50_000
    yield json.dumps({"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"format": {"type": "audio/pcmu"}}}}})  # fmt: skip


def test_hundreds_of_broken_events_are_answered_and_the_session_lives(ears: Ears) -> None:
    engine = ScriptedEngine("Fine.")
    app = create_app(serving(Assistant(engine), "parrot"), ears=ears, voice=ToneVoice(), page=False)
    with served(app) as url, connect(f"ws{url[4:]}/v1/realtime?model=default", max_size=None) as socket:
        assert json.loads(socket.recv())["type"] == "session.created"
        for message in broken_events(500):
            socket.send(message)
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "There?"}]}
        socket.send(json.dumps({"type": "conversation.item.create", "item": item, "event_id": "last"}))
        socket.send(json.dumps({"type": "response.create", "response": {"output_modalities": ["text"]}}))
        errors = 0
        while (event := json.loads(socket.recv(timeout=20)))["type"] != "response.done":
            if event["type"] == "error":
                errors += 1
                assert event["error"]["message"]
                assert event["error"]["type"] == "invalid_request_error", event
        assert errors > 300
        assert event["response"]["status"] == "completed"
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_key_and_the_right_origin_are_asked_for(ears: Ears) -> None:
    app = create_app(serving(Assistant(ScriptedEngine()), "parrot"), ears=None, voice=None, page=False, api_key=API_KEY)
    with served(app) as url:
        address = f"ws{url[4:]}/v1/realtime"
        bearer = {"Authorization": b"Bearer ".decode() + API_KEY.encode().decode("latin-1")}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {**bearer, "Origin": "https://evil.example"}):
            with pytest.raises(InvalidStatus) as refused, connect(address, additional_headers=headers):
                pass
            assert refused.value.response.status_code == (403 if "Origin" in headers else 401)
        with connect(address, additional_headers=bearer) as socket:
            assert json.loads(socket.recv())["type"] == "session.created"


def test_limits_hold_and_others_are_served_on(ears: Ears, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "MAX_SESSIONS", 1)
    app = create_app(serving(Assistant(ScriptedEngine()), "parrot"), ears=ears, voice=None, page=False)
    with served(app) as url:
        address = f"ws{url[4:]}/v1/realtime"
        with connect(address) as socket:
            socket.recv()
            with connect(address) as other:
                assert json.loads(other.recv())["error"]["code"] == "session_limit"
                with pytest.raises(ConnectionClosed):
                    other.recv(timeout=5)
            manual = {"type": "session.update", "session": {"type": "realtime", **MANUAL}}
            socket.send(json.dumps(manual))
            piece = base64.b64encode(bytes(2 * RATE_HZ * 40)).decode()
            for _ in range(5):
                socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": piece}))
            while (event := json.loads(socket.recv(timeout=10)))["type"] != "error":
                pass
            assert event["error"]["code"] == "buffer_full"
            socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": "A" * (5 << 20)}))
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=10)
        with connect(f"{address}?model=gpt-9") as socket:
            assert json.loads(socket.recv())["error"]["code"] == "model_not_found"
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with connect(address) as socket:
                if json.loads(socket.recv())["type"] == "session.created":
                    break
        else:
            pytest.fail("a session that ended still counts")


def test_a_microphone_that_falls_silent_ends_the_turn(ears: Ears, voice: Voice) -> None:
    with talking(ScriptedEngine("Yes."), ears=ears, voice=voice) as talker:
        talker.play(say(voice, "Can you hear me now?"))
        assert talker.wait("response.done").response.status == "completed"


def test_a_server_that_ends_lets_its_talkers_go(ears: Ears, voice: Voice) -> None:
    app = create_app(serving(Assistant(ScriptedEngine(*LONG)), "parrot"), ears=ears, voice=voice, page=False)
    with served(app) as url:
        socket = connect(f"ws{url[4:]}/v1/realtime").__enter__()
        assert json.loads(socket.recv())["type"] == "session.created"
        threads = [thread for thread in threading.enumerate() if thread.name in {"mind", "voice session"}]
        assert threads
    with pytest.raises(ConnectionClosed):
        socket.recv(timeout=5)
    socket.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_an_answer_asked_for_in_the_middle_of_a_turn_does_not_lose_the_turn(ears: Ears, voice: Voice) -> None:
    engine = ScriptedEngine("Yes.")
    with talking(engine, ears=ears, voice=voice) as talker:
        create(talker, "user", "First?")
        talker.play(say(voice, "The second question is here."), silence(160))
        talker.connection.response.create()
        talker.wait("response.created")
        talker.play(silence(1200))
        heard = talker.wait("conversation.item.input_audio_transcription.completed").transcript
        assert "question" in words(heard)


class SlowEars:
    """Hears a second question, as soon as it may."""

    name = "slow"

    def __init__(self) -> None:
        self.may_hear = threading.Event()

    def transcribe(self, samples: Samples) -> Transcript:
        assert self.may_hear.wait(PATIENCE_S)
        return Transcript("Second?", samples.size / HEARING_HZ)


@pytest.mark.parametrize("responds", [False, True])
@pytest.mark.parametrize("last", ["user", "assistant"])
def test_an_answer_asked_for_after_a_turn_answers_that_turn(voice: Voice, last: str, *, responds: bool) -> None:
    engine, ears = ScriptedEngine("Yes."), SlowEars()
    audio = {"input": {"turn_detection": {"type": "server_vad", "create_response": responds}}}
    with talking(engine, ears=ears, voice=ToneVoice(), audio=audio, output_modalities=["text"]) as talker:
        create(talker, last, "First.")
        talker.play(say(voice, "And the second question?"), silence(800), live=False)
        talker.wait("input_audio_buffer.speech_stopped")
        talker.connection.response.create(response={"instructions": "Sing."})
        talker.connection.conversation.item.retrieve(item_id="item_none")
        talker.wait("error")
        assert "response.created" not in talker.kinds()
        ears.may_hear.set()
        talker.wait("conversation.item.input_audio_transcription.completed")
        assert talker.wait("response.done").response.status == "completed"
        assert [m.content for m in engine.asked[-1] if m.content != "..."] == ["Sing.", "First.", "Second?"]
        create(talker, "user", "Third?")
        assert talker.kinds().count("response.created") == 1
        assert len(talker.events("error")) == 1


@pytest.mark.parametrize("given_up", ["turn", "answer"])
def test_neither_turn_nor_answer_waits_for_the_other_once_that_is_given_up(voice: Voice, given_up: str) -> None:
    engine, ears = ScriptedEngine("Yes."), SlowEars()
    with talking(engine, ears=ears, voice=ToneVoice(), output_modalities=["text"]) as talker:
        create(talker, "user", "First?")
        talker.play(say(voice, "And the second question?"), silence(790), live=False)
        talker.wait("input_audio_buffer.speech_stopped")
        talker.connection.response.create(response={"instructions": "Sing."})
        if given_up == "turn":
            talker.connection.input_audio_buffer.clear()
            talker.play(silence(500), live=False)
        else:
            talker.connection.response.cancel()
        talker.settle()
        ears.may_hear.set()
        assert talker.wait("response.done").response.status == "completed"
        left = ["Sing.", "First?"] if given_up == "turn" else ["Be brief.", "First?", "Second?"]
        assert [[m.content for m in messages] for messages in engine.asked] == [left]
        assert talker.events("error") == []


def test_an_answer_beside_the_conversation_does_not_take_the_place_of_the_turns_own(voice: Voice) -> None:
    engine, ears = ScriptedEngine("Yes."), SlowEars()
    aside: Any = {"conversation": "none", "instructions": "Sing.", "metadata": {"for": "test"}}
    aside["input"] = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Aside?"}]}]
    with talking(engine, ears=ears, voice=ToneVoice(), output_modalities=["text"]) as talker:
        talker.play(say(voice, "And the second question?"), silence(800), live=False)
        talker.wait("input_audio_buffer.speech_stopped")
        talker.connection.response.create(response=aside)
        talker.settle()
        ears.may_hear.set()
        assert talker.wait("response.done").response.metadata is None
        assert talker.wait("response.done").response.metadata == {"for": "test"}
        asked = [[m.content for m in messages] for messages in engine.asked]
        assert asked == [["Be brief.", "Second?"], ["Sing.", "Aside?"]]


def test_the_detector_sees_speech_in_the_stand_in(voice: Voice) -> None:
    samples = resample(say(voice, "Please tell me a long story."), RATE_HZ, HEARING_HZ)
    assert load_vad().voiced_frames(samples).mean() > 0.7


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "memory.db") as opened:
        yield opened


def remembered(memory: Memory, talker: Talker) -> list[dict[str, Any]]:
    """Return the turns that are kept of the talker's conversation."""
    response = talker.events("response.created")[-1].response
    conversation = memory.conversation(response.conversation_id)
    return conversation["turns"] if conversation else []


def test_a_spoken_turn_is_kept_with_its_transcript_and_can_be_rated(ears: Ears, voice: Voice, memory: Memory) -> None:
    engine = ScriptedEngine("Paris ", "is ", "the capital.")
    with talking(engine, ears=ears, voice=voice, memory=memory) as talker:
        for _ in range(2):
            talker.play(silence(300), say(voice, "What is the capital of France?"), silence(900))
            done = talker.wait("response.done").response
        heard = talker.events("conversation.item.input_audio_transcription.completed")[0].transcript
        first, second = remembered(memory, talker)
        assert (first["question"], first["answer"], first["outcome"]) == (heard, "Paris is the capital.", "stop")
        assert first["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": heard}]
        assert list(first["timings_ms"]) == ["endpoint", "transcript", "first_token", "first_clause", "first_audio"]
        assert second["id"] == done.id
        feedback = {"id": done.id, "rating": "up"}
        assert httpx.post(f"{talker.url}/v1/feedback", json=feedback).status_code == 200  # type: ignore[attr-defined]
        assert remembered(memory, talker)[1]["feedback"]["rating"] == "up"
        assert memory.conversation(done.conversation_id)["channel"] == "voice"  # type: ignore[index]


def test_of_an_interrupted_answer_what_was_heard_is_kept(ears: Ears, voice: Voice, memory: Memory) -> None:
    engine = ScriptedEngine(*LONG)
    with talking(engine, ears=ears, voice=voice, memory=memory) as talker:
        talker.play(say(voice, "Please tell me a long story."), silence(800))
        talker.wait("response.output_audio.delta")
        talker.play(silence(2200))
        engine.pieces = ("Alright.",)
        talker.play(say(voice, "Stop that now, thank you."), silence(900))
        cut = talker.wait("response.done").response
        turn = remembered(memory, talker)[0]
        assert (turn["id"], turn["outcome"]) == (cut.id, "interrupted")
        assert turn["answer"] == cut.output[0].content[0].transcript
        assert 0 < len(turn["answer"]) < len("".join(LONG)) * 0.8
        talker.connection.conversation.item.truncate(item_id=cut.output[0].id, content_index=0, audio_end_ms=600)
        talker.wait("conversation.item.truncated", audio_end_ms=600)
        shorter = remembered(memory, talker)[0]["answer"]
        assert 0 < len(shorter) < len(turn["answer"])
        assert turn["answer"].startswith(shorter)


def test_who_hangs_up_leaves_what_was_heard_in_the_memory(ears: Ears, voice: Voice, memory: Memory) -> None:
    with talking(ScriptedEngine(*LONG), ears=ears, voice=voice, memory=memory) as talker:
        create(talker, "user", "Talk.")
        talker.connection.response.create()
        talker.wait("response.output_audio.delta")
        time.sleep(1.5)
        talker.connection.close()
        deadline = time.monotonic() + 5
        while not memory.kept_turns and time.monotonic() < deadline:
            time.sleep(0.02)
        (turn,) = remembered(memory, talker)
        assert (turn["question"], turn["outcome"]) == ("Talk.", "stopped")
        assert "".join(LONG).startswith(turn["answer"])
        assert 0 < len(turn["answer"]) < len("".join(LONG)) / 2


def test_an_answer_that_is_deleted_on_its_way_is_not_kept(ears: Ears, voice: Voice, memory: Memory) -> None:
    with talking(ScriptedEngine(*LONG), ears=ears, voice=voice, memory=memory) as talker:
        create(talker, "user", "Talk.")
        talker.connection.response.create()
        item_id = talker.wait("response.output_audio.delta").item_id
        time.sleep(1.0)
        talker.connection.conversation.item.delete(item_id=item_id)
        assert talker.wait("response.done").response.status == "cancelled"
        talker.wait("conversation.item.deleted")
        assert remembered(memory, talker) == []


def test_a_turn_that_was_taken_back_and_an_answer_outside_the_conversation_are_not_kept(
    ears: Ears, voice: Voice, memory: Memory
) -> None:
    engine = ScriptedEngine(*LONG)
    first, second = say(voice, "Please tell me about parrots."), say(voice, "And about their colors.")
    with talking(engine, ears=ears, voice=voice, memory=memory) as talker:
        talker.play(first, silence(850), second, silence(1000))
        talker.wait("conversation.item.deleted")
        talker.wait("response.output_audio.delta")
        assert remembered(memory, talker) == []
        talker.connection.response.cancel()
        talker.wait("response.done")
        # What was heard of it by now is kept, with the whole question; it may be nothing.
        assert all("color" in turn["question"] or "colour" in turn["question"] for turn in remembered(memory, talker))
        kept = memory.kept_turns
        create(talker, "user", "Another thing.")
        talker.connection.response.create(response={"conversation": "none", "output_modalities": ["text"]})
        talker.wait("response.done")
        assert memory.kept_turns == kept


def test_of_an_answer_that_failed_while_it_was_spoken_what_was_heard_is_kept(ears: Ears, memory: Memory) -> None:
    engine = ScriptedEngine("One two three. ", "Four five six. ", "<fail>")
    with talking(engine, ears=ears, voice=None, memory=memory) as talker:
        create(talker, "user", "Count.")
        talker.connection.response.create()
        assert talker.wait("response.done").response.status == "failed"
        (turn,) = remembered(memory, talker)
        assert (turn["question"], turn["answer"]) == ("Count.", "One two three. Four five six. ")
        assert turn["outcome"] == "failed"
        assert "first_token" in turn["timings_ms"]


def test_without_a_memory_nothing_is_kept(ears: Ears, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(Memory, "keep", lambda self, note: given.append(note))
    with talking(ScriptedEngine("Fine."), ears=ears, voice=None) as talker:
        create(talker, "user", "Hi.")
        talker.connection.response.create()
        talker.wait("response.done")
        assert given == []
        note_it = {"id": talker.events("response.done")[0].response.id, "rating": "up"}
        assert httpx.post(f"{talker.url}/v1/feedback", json=note_it).status_code == 404  # type: ignore[attr-defined]
