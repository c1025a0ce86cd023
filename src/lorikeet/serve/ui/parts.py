"""What the page consists of, and where it stands; `page` says what each part does.

parts = place_parts(["my-model"], assistant, hears=True)      # inside a gradio.Blocks
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from lorikeet.serve.assistant import Assistant
from lorikeet.serve.memory import MAX_CORRECTION_CHARACTERS
from lorikeet.serve.ui import recall
from lorikeet.serve.ui.look import mark

MAX_QUESTION_CHARACTERS = 8000
MAX_LIVE_CHARACTERS = 64_000
SEARCH_CHOICES = [("Auto", "auto"), ("Off", "off"), ("Always", "always")]

_OPEN_MICROPHONE = """<button id="open-mic" type="button" aria-pressed="false"
 title="Talk freely: it listens, answers aloud, and stops when you speak"><i></i><span>Talk</span></button>"""

_LIVE = """<section id="live" data-state="off" aria-live="polite"><p id="live-state" role="status"></p>
<p id="live-heard"></p><p id="live-said"></p><div id="live-waterfall" aria-label="From the end of your speech"></div></section>"""

_WELCOME = f"""<div class="welcome">{mark(48)}<h2>Ask, or press Talk</h2>
<p>Answers are short, made to be heard; speak to interrupt them. When the web was searched, the reason and the sources are shown.</p></div>"""


@dataclass(frozen=True)
class Parts:
    """The parts that a visitor acts on, or that show something."""

    fresh: gr.Button
    chat: gr.Chatbot
    notice: gr.HTML
    better: gr.Textbox
    """A better answer, in the visitor's words."""
    question: gr.Textbox
    search: gr.Radio
    clip: gr.Audio
    model: gr.Radio
    improve: gr.Button
    forget: gr.Button
    spoken_turn: gr.Textbox
    """A turn of the open microphone, as its script hands it over with `keep`; both are out of sight."""
    keep: gr.Button


def place_parts(names: Sequence[str], assistant: Assistant, *, hears: bool) -> Parts:
    """Place the parts, from top to bottom, and return them: the models are named `names`, the first is `assistant`'s.

    What is of no use is hidden: the microphone unless the page `hears`, the models where there is one, memory where
    nothing is kept.
    """
    with gr.Row(elem_id="bar"):
        gr.HTML(_header(names[0] if len(names) == 1 else ""), elem_id="top")
        fresh = gr.Button("New conversation", elem_id="fresh", size="sm", variant="secondary")
    chat = _chat(rated=assistant.memory is not None)
    gr.HTML(_LIVE, elem_id="live-panel", visible=hears)
    notice = gr.HTML("", elem_id="notice", visible=True)
    better = gr.Textbox(
        elem_id="better",
        label="A better answer",
        lines=2,
        max_lines=8,
        max_length=MAX_CORRECTION_CHARACTERS,
        submit_btn="Keep",
        visible=False,
    )
    with gr.Column(elem_id="composer"):
        question = _question()
        with gr.Row(elem_id="tools"):
            search = _search(assistant)
            clip = _clip(visible=hears)
            gr.HTML(_OPEN_MICROPHONE, elem_id="microphone", visible=hears)
        model = gr.Radio(list(names), value=names[0], elem_id="model", label="Answered by", visible=len(names) > 1)
    improve, forget = _memory(assistant)
    with gr.Row(elem_id="live-hand"):
        spoken_turn = gr.Textbox(elem_id="live-turn", show_label=False, container=False, max_length=MAX_LIVE_CHARACTERS)
        keep = gr.Button("Keep", elem_id="live-keep")
    return Parts(fresh, chat, notice, better, question, search, clip, model, improve, forget, spoken_turn, keep)


def _header(model_name: str) -> str:
    model = f'<span class="model" title="the model that answers">{html.escape(model_name)}</span>' if model_name else ""
    line = "A small assistant to write to, or talk with."
    return f'<header>{mark(38)}<div class="name"><h1>Lorikeet {model}</h1><p>{line}</p></div></header>'


def _chat(*, rated: bool) -> gr.Chatbot:
    return gr.Chatbot(
        elem_id="chat",
        show_label=False,
        container=False,
        layout="bubble",
        scale=1,
        height="100%",
        min_height=220,
        placeholder=_WELCOME,
        sanitize_html=True,
        latex_delimiters=[],
        allow_tags=False,
        feedback_options=("Like", "Dislike") if rated else None,
        elem_classes=["rated"] if rated else [],
        buttons=["copy"],
    )


def _question() -> gr.Textbox:
    return gr.Textbox(
        elem_id="question",
        show_label=False,
        container=False,
        placeholder="Ask something",
        lines=1,
        max_lines=6,
        max_length=MAX_QUESTION_CHARACTERS,
        autofocus=True,
        submit_btn=True,
        stop_btn=False,
    )


def _search(assistant: Assistant) -> gr.Radio:
    return gr.Radio(
        SEARCH_CHOICES if assistant.can_search else SEARCH_CHOICES[1:2],
        value=assistant.search_when,
        elem_id="search",
        label="Web search",
        interactive=assistant.can_search,
    )


def _clip(*, visible: bool) -> gr.Audio:
    return gr.Audio(
        elem_id="clip",
        sources=["microphone", "upload"],
        type="filepath",
        format="wav",
        show_label=False,
        container=False,
        editable=False,
        buttons=[],
        visible=visible,
    )


def _memory(assistant: Assistant) -> tuple[gr.Button, gr.Button]:
    memory = assistant.memory
    with gr.Row(elem_id="memory", visible=memory is not None):
        gr.HTML(f"<p>{html.escape(recall.told(memory))}</p>" if memory else "", elem_id="memory-line")
        improve = gr.Button("Better answer", elem_id="improve", size="sm", variant="secondary")
        forget = gr.Button("Forget", elem_id="forget", size="sm", variant="secondary")
    return improve, forget
