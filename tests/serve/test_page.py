"""The page in a real browser with a fake microphone: text streams, speech is heard and answered aloud."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lorikeet.messages import Source
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import Service, create_app
from lorikeet.serve.ui.page import plain, source_list
from lorikeet.speech.audio import decode, encode_wav, level_db
from lorikeet.speech.hear import load_ears
from lorikeet.speech.speak import load_voice, spoken

from ..conftest import SHARED
from .fakes import EchoEngine, OneSource
from .server import running

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
]

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; install chromium to test the page"),
    # Gradio's own code and its event loop leave these behind.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture(scope="module")
def question_wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's question, or one that the packaged voice asks where the optional clips are absent."""
    clip = SHARED / "data" / "speech" / "sb_spk1_snt5.wav"
    if clip.is_file():
        return clip
    voice = load_voice("hibari")
    samples = np.concatenate(list(voice.speak("Sunday is the best part of the week.")))
    path = tmp_path_factory.mktemp("clip") / "question.wav"
    path.write_bytes(encode_wav(samples, voice.sample_rate_hz))
    return path


@pytest.fixture(scope="module")
def service() -> Service:
    """The real ears and voice around an engine that says the question back."""
    assistant = Assistant(EchoEngine(delay_s=0.01), system_prompt="", provider=OneSource())
    return Service("mine", "ready", assistant, load_ears("whisper-tiny.en"), load_voice("hibari"))


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(create_app(service)) as address:
        yield address


@pytest.fixture(scope="module")
def browser(question_wav: Path) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    microphone = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    microphone += [f"--use-file-for-fake-audio-capture={question_wav}%noloop"]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *microphone])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    opened.goto(url)
    opened.wait_for_selector("#question textarea")
    yield opened
    context.close()


def ask(page: Any, text: str) -> None:
    page.fill("#question textarea", text)
    page.press("#question textarea", "Enter")


def test_typed_text_streams(page: Any) -> None:
    ask(page, "hello " * 30)
    answer = page.locator("#chat .message.bot")
    answer.first.wait_for()
    lengths = set()
    while len(answer.first.inner_text().strip()) < len("hello " * 30) - 1:
        lengths.add(len(answer.first.inner_text()))
        page.wait_for_timeout(30)
    assert len(lengths) > 3, "the answer came in pieces"
    assert page.locator("#chat .message.user").inner_text().strip() == ("hello " * 30).strip()


def test_what_is_said_is_heard_and_answered_aloud(page: Any, url: str, question_wav: Path) -> None:
    page.click("#microphone .record-button")
    page.wait_for_timeout(int(1000 * decode(question_wav).size / 16_000) + 700)
    page.click("#microphone .stop-button")
    page.wait_for_selector("#chat .message.user")
    transcript = page.locator("#chat .message.user").inner_text().lower()
    assert len({"sunday", "best", "part", "week"} & set(re.findall("[a-z]+", transcript))) >= 3, transcript
    link = page.locator("#reply a[download]")
    link.wait_for(state="attached")
    sound = decode(httpx.get(link.get_attribute("href")).content)
    assert level_db(sound) > -35
    assert (
        len(
            {"sunday", "best", "part", "week"}
            & set(re.findall("[a-z]+", load_ears("whisper-tiny.en").transcribe(sound).text.lower()))
        )
        >= 3
    )
    page.wait_for_function("document.querySelector('#reply #time').textContent !== '0:00'")


def test_a_recording_can_be_dropped(page: Any, question_wav: Path) -> None:
    page.click("#microphone button[aria-label='Upload file']")
    page.set_input_files("#microphone input[type=file]", str(question_wav))
    page.wait_for_selector("#chat .message.user")
    assert "week" in page.locator("#chat .message.user").inner_text().lower()


def test_a_text_file_called_wav_is_said_in_plain_words(page: Any, tmp_path: Path) -> None:
    (tmp_path / "note.wav").write_text("this is no sound")
    page.click("#microphone button[aria-label='Upload file']")
    page.set_input_files("#microphone input[type=file]", str(tmp_path / "note.wav"))
    toast = page.locator(".toast-body")
    toast.wait_for()
    assert "not an audio file" in toast.inner_text()
    assert page.locator("#chat .message.user").count() == 0


def test_a_search_is_shown_with_its_reason_and_links(page: Any) -> None:
    ask(page, "tides today?")
    page.get_by_text('Looked up: you asked about "today"').wait_for()
    link = page.locator("#chat a[href='https://tides.example/a']")
    link.wait_for(state="attached")
    assert link.inner_text() == "Tides <b>today</b>" or "Tides" in link.text_content()
    assert page.locator("#chat b").count() == 0


def test_markup_from_the_model_is_text(page: Any) -> None:
    ask(page, "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> end")
    page.locator("#chat .message.bot").first.wait_for()
    page.wait_for_timeout(1500)
    assert page.title() == "Lorikeet"
    assert page.locator("#chat img[src='x'], #chat script").count() == 0
    assert "<script>" in page.locator("#chat .message.bot").first.inner_text()


def test_nothing_is_loaded_from_elsewhere(browser: Any, url: str) -> None:
    context = browser.new_context()
    opened = context.new_page()
    hosts: set[str] = set()
    opened.on("request", lambda request: hosts.add(httpx.URL(request.url).netloc.decode()))
    opened.goto(url)
    opened.wait_for_selector("#question textarea")
    opened.wait_for_timeout(500)
    context.close()
    assert {host for host in hosts if host} == {httpx.URL(url).netloc.decode()}


def test_the_page_behind_a_key_asks_once(browser: Any, service: Service) -> None:
    with running(create_app(service, api_key="right key 123")) as locked:
        context = browser.new_context()
        opened = context.new_page()
        opened.goto(locked)
        opened.fill("#key", "right key 123")
        opened.click("button")
        opened.wait_for_selector("#question textarea")
        ask(opened, "hello")
        opened.wait_for_selector("#chat .message.bot")
        opened.reload()
        opened.wait_for_selector("#question textarea")
        context.close()


def test_links_are_only_to_the_web() -> None:
    shown = source_list(
        (Source("a](javascript:x)<i>", "javascript:alert(1)", "s"), Source("ok", "https://b.example/x y)", "s"))
    )
    assert "](javascript" not in shown and "<i>" not in shown
    assert "[ok](https://b.example/x%20y%29)" in shown
    assert plain("<b>") == "&lt;b&gt;"
    assert spoken(shown)
