"""The open microphone in a real browser whose fake microphone plays a conversation."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorikeet.messages import Message, Source
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.serve.memory import Memory
from lorikeet.serve.models import Models, Served
from lorikeet.serve.store import Store
from lorikeet.serve.ui.page import keep_spoken
from lorikeet.serve.ui.talk import Talk
from lorikeet.speech import Ears, Samples, Voice
from lorikeet.speech.audio import encode_wav
from lorikeet.speech.hear import load_ears
from lorikeet.speech.speak import load_voice
from tests.serve.fakes import API_KEY, CountingEars, ScriptedEngine, ScriptedProvider, ToneVoice, served, serving
from tests.serve.test_browser import CHROMIUM, PATIENCE_MS

# Gradio leaves event loops open when an app is let go; they are collected here, and not in another test.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
RATE_HZ = 24_000
SHOTS = os.environ.get("LORIKEET_SHOT")
"""Where to put a picture of the page while it speaks, for people to look at."""

LONG = [f"This is part {number} of a very long answer about parrots. " for number in ("one", "two", "three", "four")]


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def ears() -> Ears:
    return load_ears("whisper-tiny.en")


@pytest.fixture(scope="module")
def voice() -> Voice:
    return load_voice("hibari")


@contextmanager
def page_with_microphone(url: str, sound: Samples, path: Path, *, key: str | None = None) -> Iterator[Any]:
    """Open the page in a browser whose microphone plays `sound` once."""
    from playwright.sync_api import sync_playwright

    path.write_bytes(encode_wav(sound, RATE_HZ))
    arguments = [
        "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={path}%noloop",
        "--autoplay-policy=no-user-gesture-required",
    ]  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, headless=True)
        context = browser.new_context(permissions=["microphone"], viewport={"width": 1280, "height": 800})
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        if key:
            page.fill("input[name=key]", key)
            page.click("button")
        page.wait_for_selector("#open-mic")
        try:
            yield page
            assert problems == []
        finally:
            browser.close()


def say(voice: Voice, text: str) -> Samples:
    return np.concatenate(list(voice.speak(text)))


def silence(ms: int) -> Samples:
    return np.zeros(RATE_HZ * ms // 1000, np.float32)


@needs_chromium
def test_a_spoken_question_is_answered_and_an_interruption_is_heeded(ears: Ears, voice: Voice, tmp_path: Path) -> None:
    engine = ScriptedEngine(*LONG)
    app = create_app(serving(Assistant(engine), "parrot-1"), ears=ears, voice=voice, api_key=API_KEY)
    sound = np.concatenate(
        [
            silence(1200), say(voice, "What is the capital of France?"), silence(3500),
            say(voice, "Please stop talking about it now."), silence(9000),
        ]
    )  # fmt: skip
    with served(app) as url, page_with_microphone(url, sound, tmp_path / "talk.wav", key=API_KEY) as page:
        assert page.inner_text("#open-mic").strip() == "Talk"
        page.click("#open-mic")
        page.wait_for_selector('#live[data-state="listening"]')
        page.wait_for_selector('#live[data-state="speaking"]')
        page.wait_for_selector("#live-waterfall b")
        if SHOTS:
            page.screenshot(path=SHOTS)
        assert "france" in page.inner_text("#live-heard").lower()
        assert page.inner_text("#live-said").startswith("This is part one")
        assert "first audio" in page.inner_text("#live-waterfall")
        engine.pieces = ("Fine.",)
        page.wait_for_function("document.getElementById('live').dataset.interrupted === '1'")
        page.wait_for_function("document.querySelectorAll('#chat .user-row').length === 2")
        page.wait_for_selector("#chat .bot >> text=Fine.")
        turns = page.locator("#chat .user-row").all_inner_texts()
        assert "france" in turns[0].lower()
        assert "stop" in turns[1].lower()
        kept = engine.asked[-1][-2]
        assert kept.role == "assistant"
        assert 0 < len(kept.content) < len("".join(LONG))
        shown = page.locator("#chat .bot").first.inner_text().replace("…", "").strip()
        assert len(shown) > 20
        assert "".join(LONG).startswith(shown)
        page.click("#open-mic")
        page.wait_for_selector('#live[data-state="off"]', state="attached")
        assert page.inner_text("#open-mic").strip() == "Talk"
        page.fill("#question textarea", "And in writing?")
        page.press("#question textarea", "Enter")
        page.wait_for_function("document.querySelectorAll('#chat .user-row').length === 3")
        page.wait_for_selector("#question .submit-button")
        assert [m.role for m in engine.asked[-1]] == ["user", "assistant", "user", "assistant", "user"]


@needs_chromium
def test_what_was_written_is_known_and_what_is_chosen_meanwhile_counts(voice: Voice, tmp_path: Path) -> None:
    tuned, base = ScriptedEngine("Light snow [1]."), ScriptedEngine("Base.")
    provider = ScriptedProvider(Source("Oslo", "https://weather.example/oslo", "Light snow."))
    assistants = [Assistant(engine, provider=provider) for engine in (tuned, base)]
    models = Models(
        *(Served(name=name, assistant=a) for name, a in zip(("parrot-1", "base-1"), assistants, strict=True))
    )
    app = create_app(models, ears=CountingEars(), voice=ToneVoice())
    spoken = [say(voice, text) for text in ("Please tell me more.", "And what do you think?")]
    sound = np.concatenate([silence(1200), spoken[0], silence(8000), spoken[1], silence(8000)])
    with served(app) as url, page_with_microphone(url, sound, tmp_path / "talk.wav") as page:
        page.fill("#question textarea", "What is the weather in Oslo today?")
        page.press("#question textarea", "Enter")
        page.wait_for_selector("#chat .cited")
        page.wait_for_selector("#question .submit-button")
        page.click("#open-mic")
        page.wait_for_function("document.querySelectorAll('#chat .user-row').length === 2")
        known = [(m.role, m.content) for m in tuned.asked[-1]]
        assert known[:2] == [("user", "What is the weather in Oslo today?"), ("assistant", "Light snow [1].")]
        assert known[2][1].startswith("I heard")
        assert (len(known), len(provider.queries)) == (3, 1)
        page.click("#search label:has-text('Always')")
        page.click("#model label:has-text('base-1')")
        page.wait_for_function("document.querySelectorAll('#chat .user-row').length === 3")
        assert [m.role for m in base.asked[-1]] == ["user", "assistant", "user", "assistant", "user"]
        assert (len(tuned.asked), len(base.asked), len(provider.queries)) == (2, 1, 2)
        page.wait_for_selector("#live-waterfall >> text=search")


@needs_chromium
@pytest.mark.parametrize("button", ["#open-mic", "#forget"])
def test_an_answer_that_is_broken_off_is_kept_unless_it_is_forgotten(voice: Voice, tmp_path: Path, button: str) -> None:
    engine = ScriptedEngine(*LONG)
    sound = np.concatenate([silence(1200), say(voice, "What are parrots?"), silence(20_000)])
    store = Store.open(tmp_path / "memory.db")
    with Memory(store) as memory:
        app = create_app(serving(Assistant(engine, memory=memory), "parrot-1"), ears=CountingEars(), voice=voice)
        with served(app) as url, page_with_microphone(url, sound, tmp_path / "talk.wav") as page:
            page.click("#open-mic")
            page.wait_for_selector('#live[data-state="speaking"]')
            page.wait_for_timeout(1500)
            page.dispatch_event(button, "click")  # at once: a real click waits until nothing moves
            page.wait_for_selector('#live[data-state="off"]', state="attached")
            if button == "#open-mic":
                page.wait_for_selector("#chat .bot")
                shown = page.locator("#chat .bot").first.inner_text().replace("…", "").strip()
                assert 0 < len(shown) < len("".join(LONG)) / 2
                assert "".join(LONG).startswith(shown)
                assert page.inner_text("#chat .user").startswith("I heard")
                (turn,) = next(iter(store.conversations()))["turns"]
                assert (turn["answer"], turn["outcome"]) == (shown, "stopped")
                page.click("#forget")
            else:
                assert memory.kept_turns == 0
            page.wait_for_selector("#notice >> text=forgotten")
            page.wait_for_timeout(500)
            assert list(store.conversations()) == []


@needs_chromium
def test_without_ears_there_is_no_open_microphone(tmp_path: Path) -> None:
    app = create_app(serving(Assistant(ScriptedEngine()), "parrot-1"))
    with served(app) as url:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], headless=True)
            page = browser.new_page()
            page.goto(url)
            page.wait_for_selector("#question textarea")
            assert not page.is_visible("#open-mic")
            assert page.locator("#live-hand").bounding_box()["width"] <= 1
            browser.close()


def test_what_the_script_hands_over_is_checked_and_escaped() -> None:
    talk = Talk()
    evil = '{"asked": "Hi", "said": "Yes.", "search": {"reason": "<b>x", "sources": [{"url": "javascript:x"}]}}'
    shown, notice = keep_spoken(evil, talk)
    assert talk.turns == [Message("user", "Hi"), Message("assistant", "Yes.")]
    assert "<b>" not in str(shown[1]["metadata"])
    assert "javascript" not in str(shown)
    assert notice == ""
    for broken in ("", "{", "[]", '{"asked": ""}', '{"said": "x"}', '{"asked": 5}'):
        assert "could not read" in keep_spoken(broken, talk)[1]
    assert len(talk.turns) == 2
    keep_spoken('{"asked": "Unanswered", "said": "", "problem": "The engine <stopped>"}', talk)
    assert len(talk.turns) == 2
