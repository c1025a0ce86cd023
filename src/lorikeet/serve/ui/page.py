"""The page at `/`: chat by text or by voice, with what was searched in plain sight.

    mount_page(app, {"my-model": assistant}, ears=ears, voice=voice)

It turns the assistant's events into what a person sees and hears. Answers and search results are untrusted: answers
go through the chat component's sanitiser, everything that is made into HTML here is escaped here.
"""

from __future__ import annotations

import html
import logging
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import gradio as gr
import numpy as np
from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, Field, ValidationError

from lorikeet.errors import LorikeetError
from lorikeet.messages import Source
from lorikeet.serve.assistant import Assistant, Done, Event, Found, Search, SearchFailed, Searching, Text
from lorikeet.serve.memory import Memory
from lorikeet.serve.note import Note, new_id
from lorikeet.serve.ui import recall
from lorikeet.serve.ui.clips import Clips
from lorikeet.serve.ui.look import HEAD, STYLE, theme
from lorikeet.serve.ui.parts import MAX_LIVE_CHARACTERS, MAX_QUESTION_CHARACTERS, Parts, place_parts
from lorikeet.serve.ui.talk import Talk
from lorikeet.speech import Ears, Voice
from lorikeet.speech.audio import decode
from lorikeet.speech.sayable import sayable

MAX_RECORDING_S = 60.0
MAX_UPLOAD = "25mb"
REFRESH_S = 0.05
"""Least time between two pictures of a growing answer: faster is not seen, and costs the engine's cores."""

ANSWERS_AT_ONCE = 4
CLEAN_UP_S = (600, 3600)
"""How often recordings and spoken answers are swept up, and how old they may get."""

Say = Callable[[str], str]
"""A text -> the HTML of its player, '' if nothing in it can be said."""

Turn = Generator[str, None, None]
"""A turn under way: yields a problem in words for the user, '' while there is none."""

LIVE_SCRIPTS = ("live.js", "live_worklet.js")

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of what a click does: it shows no progress, and is no route that others could call."""

_MARK = re.compile(r"\[(\d{1,2})\](?!\()")
_log = logging.getLogger(__name__)


class SpokenSource(BaseModel):
    """A source that a spoken answer was given."""

    title: str = Field("", max_length=2000)
    url: str = Field("", max_length=4000)
    snippet: str = Field("", max_length=4000)


class SpokenSearch(BaseModel):
    """What was searched for a spoken answer."""

    reason: str = Field(max_length=1000)
    failed: str | None = Field(None, max_length=1000)
    sources: list[SpokenSource] = Field([], max_length=20)


class SpokenTurn(BaseModel):
    """A turn of the open microphone, as its script hands it over."""

    asked: str = Field(min_length=1, max_length=MAX_QUESTION_CHARACTERS)
    said: str = Field("", max_length=MAX_LIVE_CHARACTERS)
    problem: str = Field("", max_length=1000)
    cut: bool = False
    id: str = Field("", max_length=100)
    """The answer's."""
    search: SpokenSearch | None = None


def mount_page(app: FastAPI, assistants: Mapping[str, Assistant], *, ears: Ears | None, voice: Voice | None) -> None:
    """Mount the page on `app` at `/`: the visitor chooses among `assistants` by the names of their models.

    The first answers until another is chosen; they share search and memory. Without `ears` there is no microphone,
    without `voice` answers stay silent.
    """
    clips = Clips()

    @app.get("/spoken/{name}")
    def spoken_answer(name: str) -> Response:
        path = clips.path(name)
        # FileResponse answers ranges, without which Safari plays nothing.
        return FileResponse(path, media_type="audio/wav") if path else Response(status_code=404)

    @app.get("/live/{name}")
    def live_script(name: str) -> Response:
        if name not in LIVE_SCRIPTS:
            return Response(status_code=404)
        return FileResponse(Path(__file__).parent / name, media_type="text/javascript")

    say = _sayer(voice, clips) if voice else None
    page = build_page(assistants, ears=ears, say=say)
    # Gradio asks only of a page that was launched whether a file that is named was uploaded; a mounted one would read any.
    page.has_launched = True
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme(),
        css_paths=[STYLE],
        head=HEAD,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_UPLOAD,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
    )


class Page(gr.Blocks):  # type: ignore[misc]  # gradio ships no types
    """Gradio's page, whose inputs are no addresses: Gradio itself fetches the file that one names."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Raise gradio.Error for a file that was not uploaded but named by an address, wherever it is in the inputs."""
        if any("://" in path for path in _paths(inputs)):
            raise gr.Error("a file must be uploaded; its address is not followed", print_exception=False)
        super().validate_inputs(block_fn, inputs)


def _paths(value: Any) -> Iterator[str]:
    """Yield the path of every file in a JSON value, and of what looks like one."""
    if isinstance(value, dict):
        if "path" in value:
            yield str(value["path"])
        value = [*value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _paths(item)


def build_page(assistants: Mapping[str, Assistant], *, ears: Ears | None, say: Say | None) -> gr.Blocks:
    """Return the page, not yet mounted; `say` makes the player of a spoken answer."""
    names, assistant = list(assistants), next(iter(assistants.values()))
    title = f"Lorikeet · {names[0]}"
    with Page(title=title, analytics_enabled=False, fill_height=True, delete_cache=CLEAN_UP_S) as page:
        talk = gr.State(Talk(), time_to_live=24 * 3600)
        parts = place_parts(names, assistant, hears=ears is not None)
        _let_ask(parts, talk, assistants, ears=ears, say=say)
        begun = [parts.chat, parts.notice, parts.question, talk, parts.better]
        # A run ends by itself once its talk is left: to cancel it here could lose what this shows.
        parts.fresh.click(_begin_anew, [talk], begun, **_QUIET)
        if assistant.memory is not None:
            _let_rate(parts, talk, assistant.memory)
            parts.forget.click(partial(_forget, assistant.memory), [talk], begun, **_QUIET)
    page.queue(default_concurrency_limit=ANSWERS_AT_ONCE, max_size=64, api_open=False)
    return page


def _let_ask(
    parts: Parts, talk: gr.State, assistants: Mapping[str, Assistant], *, ears: Ears | None, say: Say | None
) -> None:
    """Let the visitor ask, in writing, by a recording or by the open microphone, and stop an answer."""
    first = next(iter(assistants.values()))

    def by_text(asked: str, choice: Search, named: str, current: Talk) -> Iterator[Any]:
        if not asked.strip():
            yield current.shown, _notice("Type a question first."), gr.skip()
            return
        yield from _watch(answer(assistants.get(named, first), current, asked.strip(), search=choice), current)

    def by_voice(path: str | None, choice: Search, named: str, current: Talk) -> Iterator[Any]:
        if path is None or ears is None:
            return
        yield current.shown, _notice("Listening to what you said …", kind="busy"), gr.skip(), None
        asked, problem = hear(ears, Path(path))
        if not asked:
            yield current.shown, _notice(problem), gr.skip(), None
            return
        turn = answer(assistants.get(named, first), current, asked, search=choice, say=say)
        for view in _watch(turn, current):
            yield *view, gr.skip()

    settings: dict[str, Any] = {**_QUIET, "concurrency_limit": ANSWERS_AT_ONCE, "concurrency_id": "answers"}
    chosen, shown = [parts.search, parts.model, talk], [parts.chat, parts.notice, parts.question]
    heard = [parts.clip, *chosen], [*shown, parts.clip]
    runs = [
        parts.question.submit(by_text, [parts.question, *chosen], shown, **settings),
        parts.clip.stop_recording(by_voice, *heard, **settings),
        parts.clip.upload(by_voice, *heard, **settings),
    ]
    parts.keep.click(keep_spoken, [parts.spoken_turn, talk], [parts.chat, parts.notice], **_QUIET)
    parts.question.stop(lambda: _IDLE, outputs=[parts.question], cancels=runs, **_QUIET)


def _let_rate(parts: Parts, talk: gr.State, memory: Memory) -> None:
    """Let the visitor rate each answer, and write a better one than the last."""

    def by_thumb(current: Talk, given: gr.LikeData) -> str:
        place = given.index if isinstance(given.index, int) else -1
        # A thumb that is pressed again says neither.
        rating: Literal["up", "down"] | None = "up" if given.liked is True else "down" if given.liked is False else None
        return _notice(recall.rate(memory, current, place=place, rating=rating))

    def open_or_close(current: Talk) -> tuple[str, Any]:
        if current.corrects:
            current.corrects = ""
            return "", _CLOSED
        current.corrects, said = current.last_answer
        if not current.corrects:
            return _notice("There is no answer yet that could be better."), _CLOSED
        return "", gr.Textbox(value=said, visible=True)

    def by_words(written: str, current: Talk) -> tuple[str, Any]:
        problem = recall.correct(memory, current, written)
        if problem:
            return _notice(problem), gr.skip()
        current.corrects = ""
        return _notice("Kept as the better answer.", kind="done"), _CLOSED

    parts.chat.like(by_thumb, [talk], [parts.notice], **_QUIET)
    parts.improve.click(open_or_close, [talk], [parts.notice, parts.better], **_QUIET)
    parts.better.submit(by_words, [parts.better, talk], [parts.notice, parts.better], **_QUIET)


def _begin_anew(talk: Talk) -> tuple[Any, str, Any, Any, Any]:
    """Leave a conversation for a new one."""
    talk.left = True
    return [], "", _IDLE, Talk(), _CLOSED


def _forget(memory: Memory, talk: Talk) -> tuple[Any, str, Any, Any, Any]:
    """Forget a conversation and begin a new one; where that fails, the old one stays."""
    problem = recall.forget(memory, talk)
    if problem:
        return gr.skip(), _notice(problem), _IDLE, gr.skip(), gr.skip()
    chat, _, *rest = _begin_anew(talk)
    return chat, _notice("The conversation is forgotten.", kind="done"), *rest


def keep_spoken(handed: str, talk: Talk) -> tuple[Any, Any]:
    """Take a turn of the open microphone into the chat; return the chat and a notice.

    `handed` is the script's JSON, which anybody could have written into their own page: it is checked like a request.
    """
    try:
        turn = SpokenTurn.model_validate_json(handed)
    except ValidationError:
        return gr.skip(), _notice("The page could not read what was said; reload it and try again.")
    talk.begin(turn.asked, turn.id)
    if turn.search is not None:
        talk.shown.append(_spoken_search(turn.search))
    talk.end(turn.said)
    if turn.said:
        sources = _spoken_sources(turn.search)
        talk.shown.append({"role": "assistant", "content": _linked(turn.said, sources) + (" …" if turn.cut else "")})
        talk.shown.extend(_below(sources))
    return talk.shown, _notice(turn.problem)


def _spoken_search(search: SpokenSearch) -> dict[str, Any]:
    if search.failed:
        why = f'<p class="failed">{html.escape(search.failed)}. The answer goes on without it.</p>'
        return _search_block(f"Search failed: {search.reason}", why)
    sources = _spoken_sources(search)
    count = f"{len(sources)} source{'s' if len(sources) != 1 else ''}"
    return _search_block(f"Searched the web: {search.reason} · {count}", _sources(sources))


def _spoken_sources(search: SpokenSearch | None) -> tuple[Source, ...]:
    return tuple(Source(source.title, source.url, source.snippet) for source in search.sources) if search else ()


def hear(ears: Ears, path: Path) -> tuple[str, str]:
    """Return what is said in a recording, and '' or why there is nothing, in words for the user."""
    try:
        text = ears.transcribe(decode(path, max_seconds=MAX_RECORDING_S)).text.strip()
    except LorikeetError as error:
        return "", str(error)
    return text, "" if text else "No speech was heard. Come a little closer to the microphone and try again."


def _watch(turn: Turn, talk: Talk) -> Iterator[tuple[Any, Any, Any]]:
    """Yield chat, notice and question field while a turn goes on; the field can stop it until it is over."""
    problem = ""
    yield gr.skip(), "", _BUSY
    try:
        with closing(turn) as problems:
            for problem in problems:
                if talk.left:
                    break
                yield talk.shown, _notice(problem), gr.skip()
    # The edge of a request: it must end with words, and the field must be given back.
    except Exception:  # noqa: BLE001
        _log.exception("the page failed to answer")
        problem = "Something went wrong here; the server's log says more. Try again."
    # Gradio shows the last of these once more at the end; of a talk that was left that must be nothing.
    yield (gr.skip(), gr.skip(), gr.skip()) if talk.left else (talk.shown, _notice(problem), _IDLE)


def answer(assistant: Assistant, talk: Talk, question: str, *, search: Search, say: Say | None = None) -> Turn:
    """Write a turn into `talk`, yielding at every change a problem in words for the user, '' while there is none.

    The turn is kept also where it is stopped half-way; a question that got no answer is taken out of what the
    assistant is given next. With `say` the answer is spoken at the end.
    """
    note = talk.under_way = Note(id=new_id("turn"), channel="page", conversation_id=talk.conversation_id)
    talk.begin(question, note.id)
    yield ""
    text, problem = "", ""
    try:
        with closing(assistant.respond(talk.turns, search=search, note=note)) as events:
            for text in _shown_events(events, talk):  # noqa: B007  # the last one is kept
                yield ""
    except LorikeetError as error:
        problem = str(error)
    finally:
        talk.end(text)
        talk.under_way = None
        if note.kept:
            talk.conversation_id = note.kept.conversation_id
    player = say(text) if text and say and not problem else ""
    if player:
        talk.shown.append({"role": "assistant", "content": player})
    yield problem or ("" if text else "The model had nothing to say; ask in other words.")


def _shown_events(events: Iterator[Event], talk: Talk) -> Iterator[str]:
    """Write events into `talk.shown` and yield the answer so far, whenever there is something new to see."""
    text, block, last = "", None, 0.0
    reason = ""
    sources: tuple[Source, ...] = ()
    for event in events:
        if isinstance(event, Searching):
            reason = event.reason
            block = len(talk.shown)
            talk.shown.append(_search_block(f"Searching the web: {reason}", "", pending=True))
        elif isinstance(event, Found) and block is not None:
            sources = event.sources
            count = f"{len(event.sources)} source{'s' if len(event.sources) != 1 else ''}"
            talk.shown[block] = _search_block(f"Searched the web: {reason} · {count}", _sources(event.sources))
        elif isinstance(event, SearchFailed) and block is not None:
            why = f'<p class="failed">{html.escape(event.message)}. The answer goes on without it.</p>'
            talk.shown[block] = _search_block(f"Search failed: {reason}", why)
        elif isinstance(event, Text):
            if not text:
                talk.shown.append({"role": "assistant", "content": ""})
            text += event.text
            talk.shown[-1] = {"role": "assistant", "content": _linked(text, sources)}
            if time.monotonic() - last < REFRESH_S:
                continue
            last = time.monotonic()
        elif isinstance(event, Done) and text:
            text += " …" if event.finish_reason == "length" else ""
            talk.shown[-1] = {"role": "assistant", "content": _linked(text, sources)}
            talk.shown.extend(_below(sources))
        yield text


def _search_block(title: str, content: str, *, pending: bool = False) -> dict[str, Any]:
    """Return the collapsible block that tells of a search: its reason in the title, its sources inside."""
    metadata = {"title": html.escape(title, quote=False), "status": "pending" if pending else "done"}
    return {"role": "assistant", "content": content, "metadata": metadata}


def _sources(sources: tuple[Source, ...]) -> str:
    """Return sources as a numbered list of links, on one line so that it stays one block of HTML in Markdown."""
    items = "".join(f"<li>{_link(source)}<span>{_plain(source.snippet, 220)}</span></li>" for source in sources)
    return f'<ol class="sources">{items}</ol>'


def _below(sources: tuple[Source, ...]) -> list[dict[str, Any]]:
    """Return the line of numbered links that stands below an answer; nothing without sources. It is not spoken."""
    links = " ".join(f"<span>{number} {_link(source)}</span>" for number, source in enumerate(sources, start=1))
    return [{"role": "assistant", "content": f'<p class="cited">{links}</p>'}] if sources else []


def _linked(text: str, sources: tuple[Source, ...]) -> str:
    """Return an answer in Markdown with each mark `[n]` of a source made a link to it; other marks stay text."""

    def link(mark: re.Match[str]) -> str:
        number = int(mark[1])
        url = sources[number - 1].url if 1 <= number <= len(sources) else ""
        # Percent signs hold what could end the link's address.
        address = quote(url, safe=":/?#[]@!$&'*+,;=%~-._")
        return f"[\\[{number}\\]](<{address}>)" if urlsplit(url).scheme in {"http", "https"} else mark[0]

    return _MARK.sub(link, text)


def _link(source: Source) -> str:
    title = _plain(source.title, 120) or "untitled"
    parts = urlsplit(source.url)
    if parts.scheme not in {"http", "https"}:
        return f"<b>{title}</b>"
    host = _plain((parts.hostname or "").removeprefix("www."), 80)
    address = html.escape("".join(source.url.split()))
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer nofollow">{title}</a> <em>{host}</em>'


def _plain(text: str, limit: int) -> str:
    """Return `text` as one escaped line of at most `limit` characters."""
    line = " ".join(text.split())
    return html.escape(line if len(line) <= limit else line[: limit - 1].rstrip() + "…")


def _sayer(voice: Voice, clips: Clips) -> Say:
    """Return what makes the player of a spoken answer, which starts by itself; '' if nothing in it can be said."""

    def say(text: str) -> str:
        parts = list(voice.speak(sayable(text)))
        if not parts:
            return ""
        name = clips.keep(np.concatenate(parts), voice.sample_rate_hz)
        return f'<audio controls autoplay src="spoken/{name}"></audio>'

    return say


def _notice(problem: str, *, kind: str = "problem") -> str:
    return f'<div class="{kind}" role="status">{html.escape(problem)}</div>' if problem else ""


_BUSY = gr.Textbox(value="", submit_btn=False, stop_btn=True)
_IDLE = gr.Textbox(submit_btn=True, stop_btn=False)
_CLOSED = gr.Textbox(value="", visible=False)
