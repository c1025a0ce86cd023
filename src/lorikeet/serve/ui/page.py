"""The page at `/`: text that streams, push-to-talk, answers aloud, and search results shown with their reason.

    app = mount_page(app, service)

Nothing on it is loaded from elsewhere. Text from the model or from the web is shown, never executed.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

import numpy as np

from lorikeet.errors import LorikeetError
from lorikeet.messages import Message, Source
from lorikeet.serve.assistant import Assistant, Found, Sampling, SearchFailed, Searching, Text
from lorikeet.speech import Ears, Voice
from lorikeet.speech.audio import decode
from lorikeet.speech.speak import spoken

if TYPE_CHECKING:
    from fastapi import FastAPI

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

SEARCH_CHOICES = [("Search when needed", "auto"), ("Always search", "always"), ("Never search", "off")]

Shown = list[dict[str, Any]]
"""The messages on the page, as Gradio's chat component takes them."""


class Parts(Protocol):
    """What the page uses; parts are None while the server starts, or where they are switched off."""

    model_name: str
    assistant: Assistant | None
    ears: Ears | None
    voice: Voice | None
    sampling: Sampling


def mount_page(app: FastAPI, parts: Parts) -> FastAPI:
    """Return `app` with the page at `/`."""
    import gradio as gr

    folder = resources.files("lorikeet.serve.ui")
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        build_page(parts),
        path="/",
        theme=_theme(),
        css=folder.joinpath("page.css").read_text(encoding="utf-8"),
        footer_links=[],
        show_error=True,
        max_file_size="25mb",
        ssr_mode=False,
        favicon_path=str(Path(str(folder)) / "favicon.svg"),
    )
    return mounted


def build_page(parts: Parts) -> Any:
    """Return the page as Gradio blocks."""
    import gradio as gr

    talk = _Talk(parts)
    with gr.Blocks(title="Lorikeet", analytics_enabled=False, fill_height=True) as page:
        history = gr.State([])
        gr.HTML(_header(parts.model_name), elem_id="header")
        chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            sanitize_html=True,
            allow_tags=False,
            buttons=["copy"],
            feedback_options=None,
            layout="bubble",
            height="100%",
            min_height=260,
            placeholder="### Ask something\nType below, or press the microphone and speak.",
            scale=1,
        )
        with gr.Row(elem_id="ask", equal_height=True):
            question = gr.Textbox(
                placeholder="Ask something",
                show_label=False,
                container=False,
                autofocus=True,
                scale=8,
                elem_id="question",
                max_lines=6,
            )
            send = gr.Button("Send", variant="primary", scale=1, min_width=84, elem_id="send")
            stop = gr.Button("Stop", scale=1, min_width=84, elem_id="stop")
            again = gr.Button("New", scale=1, min_width=84, elem_id="new")
        with gr.Row(elem_id="voice"):
            microphone = gr.Audio(
                sources=["microphone", "upload"],
                type="filepath",
                label="Speak, or drop a recording",
                elem_id="microphone",
                editable=False,
                buttons=[],
            )
            reply = gr.Audio(
                label="Spoken answer",
                interactive=False,
                autoplay=True,
                elem_id="reply",
                buttons=["download"],
                format="wav",
                waveform_options=gr.WaveformOptions(waveform_color="#7ccaa9", waveform_progress_color="#127455"),
            )
        with gr.Row(elem_id="options"):
            search = gr.Radio(
                SEARCH_CHOICES, value="auto", show_label=False, container=False, elem_id="search", min_width=420
            )
            aloud = gr.Checkbox(label="Read answers aloud", elem_id="aloud", container=False, min_width=180)

        typed = {"fn": talk.typed, "inputs": [question, history, chat, search, aloud]}
        outputs = [question, history, chat, reply]
        asked = [question.submit(**typed, outputs=outputs), send.click(**typed, outputs=outputs)]
        heard_inputs = [microphone, history, chat, search]
        heard_outputs = [microphone, history, chat, reply]
        asked += [
            microphone.stop_recording(talk.heard, heard_inputs, heard_outputs),
            microphone.upload(talk.heard, heard_inputs, heard_outputs),
        ]
        stop.click(None, cancels=asked)
        chat.clear(lambda: ([], None), outputs=[history, reply], cancels=asked)
        again.click(lambda: ([], [], None), outputs=[history, chat, reply], cancels=asked)
    page.queue(default_concurrency_limit=4, max_size=32)
    return page


class _Talk:
    """The page's handlers; each yields what changes on the page."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def typed(self, question: str, history: list[Message], shown: Shown, search: Any, aloud: bool) -> Iterator[Any]:
        """Answer a typed question; yields question box, history, messages and spoken answer."""
        if not question.strip():
            yield question, history, shown, None
            return
        for step in self._turn(question.strip(), history, shown, search, aloud=aloud):
            yield "", *step

    def heard(self, path: str | None, history: list[Message], shown: Shown, search: Any) -> Iterator[Any]:
        """Answer a spoken question; yields microphone, history, messages and spoken answer."""
        import gradio as gr

        if path is None:
            yield None, history, shown, None
            return
        if self._parts.ears is None:
            gr.Warning("The ears are off, or still loading.")
            yield None, history, shown, None
            return
        try:
            transcript = self._parts.ears.transcribe(decode(Path(path)))
        except LorikeetError as error:
            gr.Warning(_sentence(str(error)))
            yield None, history, shown, None
            return
        if not transcript.text:
            gr.Warning("No speech was heard. Check the microphone, and speak a little longer.")
            yield None, history, shown, None
            return
        for step in self._turn(transcript.text, history, shown, search, aloud=True):
            yield None, *step

    def _turn(self, question: str, history: list[Message], shown: Shown, search: Any, *, aloud: bool) -> Iterator[Any]:
        """Yield history, messages and spoken answer as the turn goes on."""
        import gradio as gr

        assistant = self._parts.assistant
        if assistant is None:
            gr.Warning("The model is still loading. Try again in a moment.")
            yield history, shown, None
            return
        history = [*history, Message("user", question)]
        shown = [*shown, {"role": "user", "content": plain(question)}]
        yield history, shown, None
        answer = ""
        try:
            for event in assistant.respond(history, search=search, sampling=self._parts.sampling):
                if isinstance(event, Searching):
                    yield history, [*shown, _block(f"Looking it up: {event.reason}", "…")], None
                elif isinstance(event, Found):
                    shown = [*shown, _block(f"Looked up: {event.reason}", source_list(event.sources))]
                elif isinstance(event, SearchFailed):
                    shown = [
                        *shown,
                        _block(f"Looked up: {event.reason}", f"{_sentence(event.message)} Answering without it."),
                    ]
                elif isinstance(event, Text):
                    answer += event.text
                    yield history, [*shown, {"role": "assistant", "content": plain(answer)}], None
        except LorikeetError as error:
            gr.Warning(_sentence(str(error)))
        if not answer.strip():
            yield history[:-1], shown, None
            return
        history = [*history, Message("assistant", answer)]
        shown = [*shown, {"role": "assistant", "content": plain(answer)}]
        yield history, shown, self._say(answer) if aloud else None

    def _say(self, answer: str) -> tuple[int, Any] | None:
        """Return the answer spoken, as Gradio's audio component takes it: rate, and 16-bit samples."""
        voice, text = self._parts.voice, spoken(answer)
        parts = list(voice.speak(text)) if voice and text else []
        if voice is None or not parts:
            return None
        samples = np.concatenate(parts)
        return voice.sample_rate_hz, (np.clip(samples, -1, 1) * 32767).astype(np.int16)


def plain(text: str) -> str:
    """Return `text` so that the page's markdown shows tags as text."""
    return html.escape(text, quote=False)


def source_list(sources: tuple[Source, ...]) -> str:
    """Return search results as a markdown list of links; only http and https are linked."""
    lines = []
    for source in sources:
        title = re.sub(r"([\\`*_{}\[\]()#+!|<>~-])", r"\\\1", " ".join(source.title.split())) or "Untitled"
        host = urlsplit(source.url).hostname or ""
        url = quote(source.url, safe=":/?#@!$&*+,;=%~-._")
        linked = f"[{plain(title)}]({url})" if source.url.startswith(("http://", "https://")) else plain(title)
        lines.append(f"- {linked} · {plain(host)}")
    return "\n".join(lines)


def _block(title: str, body: str) -> dict[str, Any]:
    """Return a collapsible block of the conversation."""
    return {"role": "assistant", "content": body, "metadata": {"title": plain(title)}}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _header(model_name: str) -> str:
    return (
        '<div class="title"><span class="bird" aria-hidden="true"></span><h1>Lorikeet</h1>'
        f'<span class="model">{html.escape(model_name)}</span></div>'
    )


def _theme() -> Any:
    import gradio as gr

    green = gr.themes.Color(
        c50="#eef8f3", c100="#d6efe3", c200="#aee0c9", c300="#7ccaa9", c400="#45ae87", c500="#1f916b", c600="#127455",
        c700="#0f5d46", c800="#0e4a39", c900="#0b3b2e", c950="#05211a",
    )  # fmt: skip
    return gr.themes.Base(
        primary_hue=green,
        secondary_hue=green,
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "monospace"],
    )
