"""One conversation by voice: the turns that are heard, the answers that are spoken, and what the client is told.

    session = Session({"my-model": parts}, model="my-model", send=queue.put)      # starts its thread
    session.take(event)                                                           # a client event, from any thread
    session.close()

One thread owns all of its state: client events, what `Mind` posts, and the clock that paces speech meet in one inbox.
An answer is prepared at the first silence, shown and spoken once the turn is over, and dropped when speech goes on.
Audio is sent about as fast as it is played, so an interruption stops speech at once, and what was heard is known.
It knows no socket; `wire` owns the shapes.
"""

from __future__ import annotations

import base64
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorikeet.errors import InputError
from lorikeet.messages import Message
from lorikeet.serve.assistant import Assistant, Found, Searching
from lorikeet.serve.note import Note, Outcome, new_id
from lorikeet.serve.voice import wire
from lorikeet.serve.voice.items import Item, Reply, UserTurn
from lorikeet.serve.voice.mind import SPEAKING_HZ, Failed, Finished, Heard, Job, Looked, Mind, Said, Thought, Wrote
from lorikeet.serve.voice.recording import Recording
from lorikeet.serve.voice.settings import SessionSettings
from lorikeet.serve.voice.turn import Ended, Paused, Resumed, Started, TurnTaker, sounds_finished
from lorikeet.serve.voice.wire import EventError, error_event, server_event
from lorikeet.speech import HEARING_HZ, Ears, Samples, Voice
from lorikeet.speech.audio import Resampler, decode_pcm16, encode_pcm16
from lorikeet.speech.vad import FRAME_SAMPLES, Vad

CHUNK_MS = 40
"""Sound in one audio event."""

LEAD_MS = 300
"""So far is what was sent ahead of what is played: enough for a network's hiccups, little to throw away."""

MAX_BUFFER_S = 120
"""Audio of one turn; a longer one is ended, or refused where the client ends its turns itself."""

MIN_COMMIT_MS = 100
HOLD_S = 0.1
"""So long sound is held back, at most, after audio that may begin an interruption; less than is sent ahead."""

STALL_S = 2.0
"""A client that sends no audio for so long, in the middle of a turn, is taken to be silent."""

MAX_ITEMS = 500
MAX_INBOX = 2000
JOIN_S = 3.0
"""So long is the end of a session waited for."""

TAIL_MS = 200
"""Audio after the last frame of speech that is transcribed with it."""

SAYS_NOTHING = Message("user", "...")
"""Where the assistant speaks unasked: templates demand that turns alternate, and `tune` reads none without words."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a conversation is made with."""

    assistant: Assistant
    ears: Ears | None
    voice: Voice | None
    vad: Vad | None
    model_name: str
    on_turn: Callable[[dict[str, float]], object]
    """Given each spoken answer's waterfall: milliseconds from the end of speech to each stage."""


@dataclass(frozen=True, slots=True)
class Came:
    """A client's event."""

    event: wire.ClientEvent
    at_s: float
    """When it arrived."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing came, but something is due."""


class Session:
    """The conversation; see the module."""

    def __init__(self, models: Mapping[str, Parts], *, model: str, send: Callable[[dict[str, Any]], object]) -> None:
        """Start its threads and greet the client; `send` is given server events, on the session's thread.

        `model` answers until the client asks for another of `models`, which differ in nothing else.
        """
        self._models, self._send = models, send
        self._parts = parts = models[model]
        self._inbox: queue.Queue[Came | Tick | Thought | None] = queue.Queue(MAX_INBOX)
        self._settings = SessionSettings.of(parts.model_name, parts.assistant.system_prompt, speaks=bool(parts.voice))
        self._taker = TurnTaker(self._settings.turns)
        self._stream = parts.vad.stream() if parts.vad else None
        self._resampler = Resampler(wire.RATE_HZ, HEARING_HZ)
        self._recording = Recording()
        self._judged = 0
        """Samples that the detector has seen."""
        self._buffer_start_ms = 0.0
        """Where the audio begins that a commit would take."""
        self._last_audio_s = 0.0
        self._items: list[Item] = []
        self._turn: UserTurn | None = None
        self._reply: Reply | None = None
        self._wanted: wire.ResponseFields | None = None
        """An answer asked for while a transcript is still being made."""
        self._mind = Mind(ears=parts.ears, voice=parts.voice, post=self._inbox.put)
        self._thread = threading.Thread(target=self._work, name="voice session", daemon=True)
        self._thread.start()

    def take(self, event: wire.ClientEvent) -> bool:
        """Take a client event, from any thread; return False if far too many wait already."""
        try:
            self._inbox.put_nowait(Came(event, time.monotonic()))
        except queue.Full:
            return False
        return True

    def close(self) -> None:
        """End its threads, without waiting for it; nothing is sent any more.

        Of an answer that is being spoken, what was heard by now is kept.
        """
        self._send = lambda _: None
        self._mind.close()
        while True:
            try:
                self._inbox.put_nowait(None)
                return
            except queue.Full:
                self._drop_inbox()

    def join(self) -> None:
        """Wait until all is kept that is to be kept; after `close`, and at most `JOIN_S`."""
        self._thread.join(JOIN_S)

    def _drop_inbox(self) -> None:
        while not self._inbox.empty():
            try:
                self._inbox.get_nowait()
            except queue.Empty:
                return

    # The loop.

    def _work(self) -> None:
        self._emit("session.created", session=self._settings.fields())
        while True:
            try:
                message = self._inbox.get(timeout=self._wait_s())
            except queue.Empty:
                message = Tick()
            if message is None:
                self._interrupt("client_cancelled")
                return
            event_id = message.event.event_id if isinstance(message, Came) else None
            try:
                if isinstance(message, Came):
                    self._take_event(message.event, message.at_s)
                elif not isinstance(message, Tick):
                    self._take_thought(message)
                self._hear_stall()
                self._speak()
                self._respond_if_wanted()
            except EventError as error:
                self._send(error_event(str(error), code=error.code, param=error.param, event_id=event_id))
            except InputError as error:
                self._send(error_event(str(error), event_id=event_id))
            # The edge of a thread: a defect must not end the conversation without a word.
            except Exception as error:  # noqa: BLE001
                _log.exception("a voice session failed at %s", type(message).__name__)
                words = f"the server failed ({type(error).__name__}); its log says more"
                self._send(error_event(words, kind="server_error", event_id=event_id))

    def _wait_s(self) -> float | None:
        """Return how long nothing will be due, None for ever."""
        waits = []
        reply = self._reply
        if reply and reply.shown and reply.pending:
            due_s = self._last_audio_s + HOLD_S if self._holds() else reply.played_until_s - LEAD_MS / 1000
            waits.append(due_s - time.monotonic())
        elif reply and reply.shown and reply.finished:
            waits.append(reply.played_until_s - time.monotonic())
        if self._stream and self._taker.in_turn:
            waits.append(self._last_audio_s + STALL_S - time.monotonic())
        return max(0.0, min(waits)) if waits else None

    def _holds(self) -> bool:
        """Say whether somebody may just be interrupting: until that is known, no more sound is sent."""
        interruptible = self._settings.detects_turns and self._settings.interrupts
        return interruptible and self._taker.may_begin and time.monotonic() < self._last_audio_s + HOLD_S

    def _emit(self, kind: str, **fields: Any) -> None:
        self._send(server_event(kind, **fields))

    # What the client asks for.

    def _take_event(self, event: wire.ClientEvent, at_s: float) -> None:
        match event:
            case wire.Append():
                self._append(event, at_s)
            case wire.SessionUpdate():
                self._update(event.session)
            case wire.Commit():
                self._commit_by_client()
            case wire.Clear():
                self._clear()
            case wire.ItemCreate():
                self._create_item(event)
            case wire.ItemRetrieve():
                self._emit("conversation.item.retrieved", item=self._find(event.item_id).fields())
            case wire.ItemDelete():
                self._delete(self._find(event.item_id))
            case wire.ItemTruncate():
                self._truncate(event)
            case wire.ResponseCreate():
                self._respond(event.response or wire.ResponseFields())
            case wire.ResponseCancel():
                self._cancel(event)

    def _cancel(self, event: wire.ResponseCancel) -> None:
        if self._reply and self._reply.shown and event.response_id in {None, self._reply.id}:
            self._interrupt("client_cancelled")
        elif self._wanted and event.response_id is None:
            self._wanted = None
        else:
            raise EventError("there is no response under way", code="response_cancel_not_active")

    def _update(self, fields: wire.SessionFields) -> None:
        old = self._settings
        self._settings = old.updated(fields, voice=self._parts.voice, models=self._models.keys())
        self._parts = self._models[self._settings.model]
        if self._settings.turns != old.turns:
            self._taker.settings = self._settings.turns
        if self._settings.detects_turns != old.detects_turns:
            self._drop_turn()
        self._emit("session.updated", session=self._settings.fields())

    def _append(self, event: wire.Append, at_s: float) -> None:
        if self._parts.ears is None:
            raise EventError("this server does not hear: it was started with --ears off", code="unsupported")
        samples = self._resampler.feed(decode_pcm16(wire.read_audio(event.audio)))
        self._last_audio_s = at_s
        if self._settings.detects_turns:
            self._hear(samples, at_s)
            return
        if self._recording.end * 1000 / HEARING_HZ - self._buffer_start_ms > MAX_BUFFER_S * 1000:
            raise EventError(f"the buffer holds {MAX_BUFFER_S} s already; commit or clear it", code="buffer_full")
        self._recording.append(samples)
        self._judged = self._recording.end

    def _commit_by_client(self) -> None:
        self._drop_preparation()
        audio = self._recording.cut(self._turn.start_ms if self._turn else self._buffer_start_ms)
        if audio.size * 1000 < MIN_COMMIT_MS * HEARING_HZ:
            raise EventError(
                f"the buffer holds {audio.size * 1000 // HEARING_HZ} ms; at least {MIN_COMMIT_MS} ms can be committed",
                code="input_audio_buffer_commit_empty",
            )
        item = Item(self._turn.item_id if self._turn else new_id("item"), "user", "input_audio", pending=True)
        self._drop_turn()
        self._emit("input_audio_buffer.committed", item_id=item.id, previous_item_id=self._last_id())
        self._add(item)
        self._mind.submit(Job(generation=None, item_id=item.id, audio=audio))

    def _clear(self) -> None:
        self._drop_turn()
        self._emit("input_audio_buffer.cleared")

    def _drop_turn(self) -> None:
        """Forget what is being said and the audio that was not committed."""
        self._drop_preparation()
        self._turn = None
        self._taker.reset()
        self._buffer_start_ms = self._judged * 1000 / HEARING_HZ  # the detector is still to see the rest
        self._recording.forget_before(self._buffer_start_ms)

    def _create_item(self, event: wire.ItemCreate) -> None:
        if len(self._items) >= MAX_ITEMS:
            raise EventError(f"the conversation has {MAX_ITEMS} items; delete some", code="too_many_items")
        item, audio = self._read_item(event.item)
        if any(other.id == item.id for other in self._items):
            raise EventError(f"item.id: {item.id[:40]!r} is taken", code="item_exists", param="item.id")
        self._add(item, after=event.previous_item_id)
        if audio is not None:
            self._mind.submit(Job(generation=None, item_id=item.id, audio=audio))

    def _read_item(self, fields: wire.ItemFields) -> tuple[Item, Samples | None]:
        """Return a client's item, and its audio if it has to be transcribed."""
        allowed = {
            "user": ("input_text", "input_audio"),
            "system": ("input_text",),
            "assistant": ("output_text", "text"),
        }
        for part in fields.content:
            if part.type not in allowed[fields.role]:
                raise EventError(
                    f"item.content: {part.type} cannot be in a {fields.role} item", param="item.content.type"
                )
        identity = fields.id or new_id("item")
        sounds = [part.audio for part in fields.content if part.type == "input_audio" and part.audio]
        if sounds:
            if self._parts.ears is None:
                raise EventError("this server does not hear: it was started with --ears off", code="unsupported")
            samples = Resampler(wire.RATE_HZ, HEARING_HZ).feed(decode_pcm16(b"".join(map(wire.read_audio, sounds))))
            if samples.size > MAX_BUFFER_S * HEARING_HZ:
                raise EventError(f"item.content: at most {MAX_BUFFER_S} s of audio are taken", param="item.content")
            return Item(identity, "user", "input_audio", pending=True), samples
        text = "\n".join(part.text or part.transcript or "" for part in fields.content)
        kind = "output_text" if fields.role == "assistant" else "input_text"
        return Item(identity, fields.role, kind, text), None

    def _truncate(self, event: wire.ItemTruncate) -> None:
        item = self._find(event.item_id)
        if item.role != "assistant" or item.kind != "output_audio":
            raise EventError("item_id: only a spoken answer can be truncated", param="item_id")
        if event.content_index != 0:
            raise EventError("content_index: there is only part 0", param="content_index")
        sent_ms = self._reply.sent_ms if self._reply and self._reply.item is item else item.spoken_ms
        if event.audio_end_ms > sent_ms + CHUNK_MS:
            raise EventError(f"audio_end_ms: only {sent_ms:.0f} ms were sent", param="audio_end_ms")
        if self._reply and self._reply.item is item:
            self._interrupt("client_cancelled", heard_ms=event.audio_end_ms, tells=False)
        item.text = item.heard_text(event.audio_end_ms)
        if item.note and item.note.answer != item.text:
            self._remember(item, replace(item.note, answer=item.text, outcome="interrupted"))
        self._tell_truncated(item, event.audio_end_ms)

    def _tell_truncated(self, item: Item, heard_ms: float) -> None:
        self._emit("conversation.item.truncated", item_id=item.id, content_index=0, audio_end_ms=int(heard_ms))

    # Items.

    def _find(self, item_id: str) -> Item:
        for item in self._items:
            if item.id == item_id:
                return item
        raise EventError(f"item_id: there is no item {item_id[:64]!r}", code="item_not_found", param="item_id")

    def _last_id(self) -> str | None:
        return self._items[-1].id if self._items else None

    def _add(self, item: Item, *, after: str | None = None) -> None:
        """Put an item into the conversation: at its end, or after another, or first (`root`)."""
        place = len(self._items)
        if after is not None:
            place = 0 if after == "root" else self._items.index(self._find(after)) + 1
        previous = self._items[place - 1].id if place else None
        self._items.insert(place, item)
        self._emit("conversation.item.added", item=item.fields(), previous_item_id=previous)
        if item.status == "completed":
            self._emit("conversation.item.done", item=item.fields(), previous_item_id=previous)

    def _delete(self, item: Item) -> None:
        if self._reply and self._reply.item is item:
            self._reply.retracted = True
            self._interrupt("client_cancelled")
        if item in self._items:
            self._items.remove(item)
        self._emit("conversation.item.deleted", item_id=item.id)

    def _history(self, options: wire.ResponseFields) -> tuple[Message, ...]:
        items = self._items if options.input is None else [self._read_item(fields)[0] for fields in options.input]
        instructions = self._settings.instructions if options.instructions is None else options.instructions
        system = [Message("system", instructions)] if instructions else []
        turns = [Message(item.role, item.text) for item in items if item.text.strip()]  # type: ignore[arg-type]
        if turns and turns[0].role == "assistant":
            turns.insert(0, SAYS_NOTHING)
        return (*system, *turns)

    # Listening.

    def _hear(self, samples: Samples, at_s: float) -> None:
        """Take in audio that arrived at `at_s`, frame by frame."""
        assert self._stream is not None
        self._recording.append(samples)
        while self._recording.end - self._judged >= FRAME_SAMPLES:
            frame = self._recording.cut(
                self._judged * 1000 / HEARING_HZ, (self._judged + FRAME_SAMPLES) * 1000 / HEARING_HZ
            )
            self._judged += FRAME_SAMPLES
            for event in self._taker.hear(self._stream.feed(frame)):
                # Frames of one message end at different times; the last of them ends when it arrives.
                behind_s = (self._recording.end - self._judged) / HEARING_HZ
                self._take_turn(event, at_s - behind_s)
        turn = self._turn
        start_ms = turn.start_ms if turn else self._judged * 1000 / HEARING_HZ - 2000
        self._recording.forget_before(start_ms)
        if turn and not turn.ended and self._judged * 1000 / HEARING_HZ - turn.start_ms > MAX_BUFFER_S * 1000:
            self._commit_by_client()

    def _hear_stall(self) -> None:
        """Take a client that sends nothing in the middle of a turn to be silent."""
        now_s = time.monotonic()
        if self._settings.detects_turns and self._taker.in_turn and now_s - self._last_audio_s >= STALL_S:
            missing = int((now_s - self._last_audio_s) * HEARING_HZ)
            self._last_audio_s = now_s
            self._hear(np.zeros(missing, np.float32), now_s)

    def _take_turn(self, event: Started | Paused | Resumed | Ended, at_s: float) -> None:
        match event:
            case Started():
                self._start_turn(event)
            case Paused():
                assert self._turn is not None
                self._turn.end_s = at_s - (self._taker.heard_ms - event.speech_end_ms) / 1000
                self._prepare(self._turn, event.speech_end_ms)
            case Resumed():
                self._drop_preparation()
            case Ended():
                assert self._turn is not None
                self._turn.ended = event
                if self._turn.reply:
                    self._turn.reply.stages_s["endpoint"] = time.monotonic()
                self._emit(
                    "input_audio_buffer.speech_stopped", item_id=self._turn.item_id, audio_end_ms=event.speech_end_ms
                )
                if self._turn.job is None:  # what was prepared was dropped for an answer that the client asked for
                    self._prepare(self._turn, event.speech_end_ms)
                self._commit_if_ready()

    def _start_turn(self, event: Started) -> None:
        start_ms = event.at_ms
        before = self._turn
        if event.reopens and before and (not before.committed or (self._reply and self._reply is before.reply)):
            start_ms = before.start_ms
            self._retract(before)
        elif self._reply and self._reply.shown and self._settings.interrupts:
            self._interrupt("turn_detected")
        self._turn = UserTurn(new_id("item"), start_ms)
        self._emit("input_audio_buffer.speech_started", item_id=self._turn.item_id, audio_start_ms=start_ms)

    def _retract(self, turn: UserTurn) -> None:
        """Take back a turn that ended too early, with its answer: the speaker goes on."""
        reply = turn.reply
        if reply and reply is self._reply and reply.shown:
            reply.retracted = True
            self._interrupt("turn_detected")
            if reply.item in self._items:
                self._delete(reply.item)
        self._drop_preparation()
        for item in [item for item in self._items if item.id == turn.item_id]:
            self._delete(item)

    def _prepare(self, turn: UserTurn, speech_end_ms: int) -> None:
        """Begin to transcribe and to answer what was said so far; nothing of it is shown yet."""
        audio = self._recording.cut(turn.start_ms, speech_end_ms + TAIL_MS)
        options = wire.ResponseFields()
        speaking = self._reply is not None and self._reply.shown
        answers = self._settings.responds and not speaking
        if answers:
            turn.reply = self._reply_to(options, item_id=turn.item_id, audio=audio)
            turn.job = turn.reply.job
        else:
            turn.job = Job(generation=None, item_id=turn.item_id, audio=audio)
        turn.heard = None
        self._mind.submit(turn.job)

    def _drop_preparation(self) -> None:
        turn = self._turn
        if turn and not turn.committed:
            if turn.reply:
                self._mind.begin()
            turn.reply = turn.job = turn.heard = None

    def _commit_if_ready(self) -> None:
        """Show the turn once it is over and its words are known; a turn without words is none."""
        turn = self._turn
        if turn is None or turn.ended is None or turn.heard is None or turn.committed:
            return
        transcript = turn.heard.transcript
        if not transcript.text:
            self._drop_preparation()
            self._turn = None
            self._buffer_start_ms = self._recording.end * 1000 / HEARING_HZ
            self._emit("input_audio_buffer.cleared")
            return
        turn.committed = True
        self._emit("input_audio_buffer.committed", item_id=turn.item_id, previous_item_id=self._last_id())
        self._add(Item(turn.item_id, "user", "input_audio", transcript.text))
        self._tell_transcript(turn.item_id, transcript.text, transcript.duration_s)
        if self._wanted is None or self._wanted.input is not None:
            if turn.reply:
                self._show(turn.reply)
        else:
            turn.reply = None  # what was prepared makes way for the answer that the client asks for

    def _tell_transcript(self, item_id: str, text: str, seconds: float) -> None:
        if self._settings.transcribes:
            kind = "conversation.item.input_audio_transcription"
            self._emit(f"{kind}.delta", item_id=item_id, content_index=0, delta=text)
            usage = {"type": "duration", "seconds": round(seconds, 2)}
            self._emit(f"{kind}.completed", item_id=item_id, content_index=0, transcript=text, usage=usage)

    # Answering.

    def _respond(self, options: wire.ResponseFields) -> None:
        """Answer the conversation as it is."""
        if self._reply and self._reply.shown:
            raise EventError(
                "a response is under way; cancel it first", code="conversation_already_has_active_response"
            )
        turn_is_over = self._turn is not None and self._turn.ended is not None and not self._turn.committed
        if turn_is_over or (options.input is None and self._is_hearing()):
            self._wanted = options
            return
        self._drop_preparation()
        reply = self._reply_to(options)
        self._mind.submit(reply.job)
        self._show(reply)

    def _is_hearing(self) -> bool:
        """Say whether items of the conversation are still being transcribed."""
        return any(item.pending for item in self._items)

    def _respond_if_wanted(self) -> None:
        """Give the answer that was asked for too early, once what was said is known."""
        turn_is_open = self._turn is not None and not self._turn.committed
        if self._wanted is None or self._reply or turn_is_open or self._is_hearing():
            return
        options, self._wanted = self._wanted, None
        self._respond(options)

    def _reply_to(self, options: wire.ResponseFields, *, item_id: str = "", audio: Samples | None = None) -> Reply:
        """Return a new answer, its job not yet submitted."""
        modality = (options.output_modalities or self._settings.modalities)[0]
        speaks = modality == "audio" and self._parts.voice is not None
        limit = options.max_output_tokens or self._settings.max_output_tokens
        history, response_id = self._history(options), new_id("resp")
        if not history and audio is None:
            raise EventError("there is nothing to answer: give instructions, or create an item of the user's first")
        asked = audio is not None or history[-1].role == "user"
        note = Note(id=response_id, channel="voice", conversation_id=self._settings.conversation_id, deferred=True)
        generation = self._mind.begin()
        job = Job(
            generation=generation,
            item_id=item_id,
            audio=audio,
            assistant=self._parts.assistant,
            history=history if asked else (*history, SAYS_NOTHING),
            speaks=speaks,
            search=self._settings.search,
            max_tokens=limit if isinstance(limit, int) else None,
            note=note if asked else None,
        )
        item = Item(new_id("item"), "assistant", "output_audio" if speaks else "output_text", status="in_progress")
        kept = options.conversation != "none"
        return Reply(generation, job, options, item, response_id, speaks=speaks, kept=kept)

    def _show(self, reply: Reply) -> None:
        """Tell the client of an answer; what is ready of it is sent at once."""
        reply.shown = True
        self._reply = reply
        self._emit("response.created", response=self._response(reply, "in_progress"))
        self._emit("response.output_item.added", response_id=reply.id, output_index=0, item=reply.item.fields())
        if reply.kept:
            self._add(reply.item)
        self._emit_part("response.content_part.added", reply, part=self._part(reply, ""))
        reply.job.confirmed.set()
        for looked in reply.untold:
            self._tell_search(reply, looked)
        self._write(reply, "")
        if reply.failure:
            self._fail(reply, reply.failure)
        self._speak()

    def _emit_part(self, kind: str, reply: Reply, **fields: Any) -> None:
        place = {"response_id": reply.id, "item_id": reply.item.id, "output_index": 0, "content_index": 0}
        self._emit(kind, **place, **fields)

    def _part(self, reply: Reply, text: str) -> dict[str, Any]:
        return {"type": "audio", "transcript": text} if reply.speaks else {"type": "text", "text": text}

    def _response(self, reply: Reply, status: str, **details: Any) -> dict[str, Any]:
        done = status != "in_progress"
        fields: dict[str, Any] = {
            "object": "realtime.response",
            "id": reply.id,
            "status": status,
            "status_details": details or None,
            "output": [reply.item.fields()] if done else [],
            "conversation_id": self._settings.conversation_id if reply.kept else None,
            "output_modalities": ["audio" if reply.speaks else "text"],
            "max_output_tokens": reply.options.max_output_tokens or self._settings.max_output_tokens or "inf",
            "audio": {"output": self._settings.audio_output()},
            "usage": wire.response_usage(reply.finished.usage) if done and reply.finished else None,
            "metadata": reply.options.metadata,
        }
        if done and reply.stages_s:
            fields["lorikeet"] = {"waterfall": self._waterfall(reply)}
        return fields

    def _take_thought(self, thought: Thought) -> None:
        if isinstance(thought, Heard):
            self._take_heard(thought)
            return
        if isinstance(thought, Failed) and not thought.heard:
            self._fail_hearing(thought)
            return
        reply = self._current(thought.job.generation if isinstance(thought, Failed) else thought.generation)
        if reply is None:
            return
        match thought:
            case Wrote():
                reply.stages_s.setdefault("first_token", thought.at_s)
                self._write(reply, thought.text)
            case Said():
                self._take_said(reply, thought)
            case Looked():
                if not isinstance(thought.event, Searching):
                    reply.stages_s["search"] = thought.at_s
                if reply.shown:
                    self._tell_search(reply, thought)
                else:
                    reply.untold.append(thought)
            case Finished():
                reply.finished = thought
                self._finish_if_done(reply)
            case Failed():
                self._fail(reply, thought.message)

    def _current(self, generation: int | None) -> Reply | None:
        """Return the answer under way, or in preparation, that a thought belongs to."""
        for reply in (self._reply, self._turn.reply if self._turn else None):
            if reply and reply.generation == generation:
                return reply
        return None

    def _take_heard(self, heard: Heard) -> None:
        turn = self._turn
        if turn and turn.item_id == heard.job.item_id and not turn.committed:
            if turn.job is not heard.job:
                return
            turn.heard = heard
            self._taker.judge(finished=not heard.transcript.text or sounds_finished(heard.transcript.text))
            if turn.reply:
                turn.reply.stages_s["speech_end"] = turn.end_s
                turn.reply.stages_s["transcript"] = heard.at_s
            self._commit_if_ready()
            return
        for item in self._items:
            if item.id == heard.job.item_id and item.pending:
                item.text, item.pending = heard.transcript.text, False
                self._tell_transcript(item.id, item.text, heard.transcript.duration_s)

    def _fail_hearing(self, failed: Failed) -> None:
        """Say that a turn could not be transcribed."""
        error = {"type": "server_error", "code": "transcription_failed", "message": failed.message, "param": None}
        kind = "conversation.item.input_audio_transcription.failed"
        self._emit(kind, item_id=failed.job.item_id, content_index=0, error=error)
        for item in self._items:
            if item.id == failed.job.item_id:
                item.pending = False
        if self._turn and self._turn.item_id == failed.job.item_id:
            self._drop_turn()

    def _write(self, reply: Reply, text: str) -> None:
        reply.text += text
        reply.unsent_text += text
        if reply.shown and reply.unsent_text:
            kind = "response.output_audio_transcript.delta" if reply.speaks else "response.output_text.delta"
            self._emit_part(kind, reply, delta=reply.unsent_text)
            reply.unsent_text = ""

    def _take_said(self, reply: Reply, said: Said) -> None:
        reply.stages_s.setdefault("first_clause", said.clause_at_s)
        reply.item.clauses.append((said.text, 1000 * said.samples.size / SPEAKING_HZ))
        step = CHUNK_MS * SPEAKING_HZ // 1000
        reply.pending.extend(said.samples[first : first + step] for first in range(0, said.samples.size, step))

    def _tell_search(self, reply: Reply, looked: Looked) -> None:
        if not self._settings.tells_events:
            return
        event = looked.event
        if isinstance(event, Searching):
            fields: dict[str, Any] = {"status": "searching", "reason": event.reason, "query": event.query}
        elif isinstance(event, Found):
            sources = [{"title": s.title, "url": s.url, "snippet": s.snippet} for s in event.sources]
            fields = {"status": "found", "sources": sources}
        else:
            fields = {"status": "failed", "message": event.message}
        self._emit("lorikeet.search", response_id=reply.id, **fields)

    # Speaking.

    def _speak(self) -> None:
        """Send what is due of the sound, and end the answer after its last piece."""
        reply = self._reply
        if reply is None or not reply.shown:
            return
        while reply.pending and reply.played_until_s - time.monotonic() <= LEAD_MS / 1000 and not self._holds():
            chunk = reply.pending.popleft()
            chunk_ms = 1000 * chunk.size / SPEAKING_HZ
            if not reply.sent_ms:
                self._begin_sound(reply)
            delta = base64.b64encode(encode_pcm16(chunk)).decode()
            self._emit_part("response.output_audio.delta", reply, delta=delta)
            reply.sent_ms += chunk_ms
            reply.played_until_s = max(reply.played_until_s, time.monotonic()) + chunk_ms / 1000
        self._finish_if_done(reply)

    def _begin_sound(self, reply: Reply) -> None:
        reply.stages_s["first_audio"] = time.monotonic()
        if "speech_end" in reply.stages_s:
            waterfall = self._waterfall(reply)
            self._parts.on_turn(waterfall)
            if self._settings.tells_events:
                self._emit("lorikeet.turn", response_id=reply.id, waterfall=waterfall)

    def _waterfall(self, reply: Reply) -> dict[str, float]:
        """Return each stage of the turn in milliseconds after the end of speech."""
        start_s = reply.stages_s.get("speech_end")
        stages = ("endpoint", "transcript", "search", "first_token", "first_clause", "first_audio")
        if start_s is None:
            return {}
        return {
            f"{stage}_ms": round((reply.stages_s[stage] - start_s) * 1000, 1)
            for stage in stages
            if stage in reply.stages_s
        }

    def _finish_if_done(self, reply: Reply) -> None:
        if not (reply.shown and reply is self._reply and reply.finished and not reply.pending):
            return
        if reply.played_until_s > time.monotonic():
            return  # what is still being heard can be interrupted
        cut = reply.finished.reason == "length"
        details = {"type": "incomplete", "reason": "max_output_tokens"} if cut else {"type": "completed"}
        self._close(reply, reply.text, "incomplete" if cut else "completed", details)

    def _fail(self, reply: Reply, message: str) -> None:
        if not reply.shown:
            reply.failure = message
            return
        error = {"type": "server_error", "code": "engine_failed", "message": message}
        self._close(reply, reply.text, "failed", {"type": "failed", "error": error})

    def _interrupt(self, reason: str, *, heard_ms: float | None = None, tells: bool = True) -> None:
        """Stop the answer under way; the conversation keeps what was heard of it."""
        reply = self._reply
        if reply is None:
            return
        self._mind.begin()
        heard_ms = reply.heard_ms if heard_ms is None else heard_ms
        text = reply.item.heard_text(heard_ms) if reply.speaks else reply.text
        self._close(reply, text, "cancelled", {"type": "cancelled", "reason": reason})
        if reply.speaks and tells and reply.kept:
            self._tell_truncated(reply.item, heard_ms)

    def _close(self, reply: Reply, text: str, status: str, details: dict[str, Any]) -> None:
        """End an answer: its text is `text`, its status and the details of it are the API's."""
        self._reply = None
        reply.pending.clear()
        reply.item.text = text
        reply.item.status = "completed" if status == "completed" else "incomplete"
        if reply.kept and not reply.retracted:
            self._note_end(reply, _outcome(status, details))
        if reply.speaks:
            self._emit_part("response.output_audio.done", reply)
            self._emit_part("response.output_audio_transcript.done", reply, transcript=text)
        else:
            self._emit_part("response.output_text.done", reply, text=text)
        self._emit_part("response.content_part.done", reply, part=self._part(reply, text))
        self._emit("response.output_item.done", response_id=reply.id, output_index=0, item=reply.item.fields())
        if reply.kept:
            place = self._items.index(reply.item) if reply.item in self._items else 0
            previous = self._items[place - 1].id if place else None
            self._emit("conversation.item.done", item=reply.item.fields(), previous_item_id=previous)
        self._emit("response.done", response=self._response(reply, status, **details))

    def _note_end(self, reply: Reply, outcome: Outcome) -> None:
        """Give the memory an answer with what was heard of it; before the client knows the end, and may rate it."""
        note, text = reply.job.note, reply.item.text
        if outcome == "failed" and reply.speaks:
            text = reply.item.heard_text(reply.heard_ms)
        if note and text.strip():
            stages = {name.removesuffix("_ms"): ms for name, ms in self._waterfall(reply).items()}
            # A copy: the mind may still be writing in the note of an answer that was cut off.
            timings_ms = stages or dict(note.timings_ms)
            ended = replace(note, answer=text, outcome=outcome, timings_ms=timings_ms)
            self._remember(reply.item, ended)

    def _remember(self, item: Item, note: Note) -> None:
        memory = self._parts.assistant.memory
        if memory is not None:
            memory.keep(note)
            item.note = note


def _outcome(status: str, details: dict[str, Any]) -> Outcome:
    """Return what the memory calls the end of a response."""
    if status == "cancelled":
        return "interrupted" if details["reason"] == "turn_detected" else "stopped"
    ends: dict[str, Outcome] = {"completed": "stop", "incomplete": "length", "failed": "failed"}
    return ends[status]
