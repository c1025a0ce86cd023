"""The page in a real browser: text that streams, a fake microphone, searches in sight, and nothing injected."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorikeet.messages import Source
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.serve.memory import Memory
from lorikeet.serve.models import Models, Served
from lorikeet.serve.note import Origin
from lorikeet.serve.store import Store
from lorikeet.serve.ui.page import keep_spoken
from lorikeet.serve.ui.recall import correct, forget, rate
from lorikeet.serve.ui.talk import Talk
from lorikeet.speech import Ears, Voice
from lorikeet.speech.audio import decode, encode_wav
from lorikeet.speech.hear import load_ears
from lorikeet.speech.speak import load_voice
from tests.serve.fakes import API_KEY, ScriptedEngine, ScriptedProvider, served, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

JFK = Path(__file__).resolve().parents[3] / "shared" / "data" / "speech" / "jfk.wav"
PARROTS = ("Parrots ", "are ", "green, ", "blue ", "and ", "orange ", "birds.")
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
SOURCES = (
    Source(
        f"Oslo {EVIL}",
        'https://weather.example/oslo?a=1&b="><script>window.hacked=1</script>',
        f"Weather: light snow. {EVIL}",
    ),
    Source("No link", "javascript:window.hacked=1", "weather x"),
)
PATIENCE_MS = 30_000
SHOTS = os.environ.get("LORIKEET_SHOTS")
"""A folder to put pictures of the page in, for people to look at."""


@pytest.fixture(scope="session")
def ears() -> Ears:
    return load_ears("whisper-tiny.en")


@pytest.fixture(scope="session")
def voice() -> Voice:
    return load_voice("hibari")


@pytest.fixture(scope="session")
def clip(voice: Voice, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question as sound: a human's, or where that is not here, one that the voice says."""
    if JFK.is_file():
        return JFK
    path = tmp_path_factory.mktemp("clip") / "question.wav"
    samples = np.concatenate(list(voice.speak("And so, my fellow Americans, ask what you can do for your country.")))
    path.write_bytes(encode_wav(samples, voice.sample_rate_hz))
    return path


@pytest.fixture(scope="module")
def browser(clip: Path) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = [
        "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={clip}%noloop",
    ]  # fmt: skip
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, headless=True)
        yield running
        running.close()


@contextmanager
def page_of(browser: Any, url: str) -> Iterator[Any]:
    """Open the page; at the end, it must have asked no other host for anything and shown no dialog."""
    context = browser.new_context(permissions=["microphone"], viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    foreign: list[str] = []
    page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else foreign.append(r.url))
    page.on("dialog", lambda dialog: (foreign.append("dialog"), dialog.dismiss()))
    page.goto(url)
    try:
        yield page
        assert page.evaluate("window.hacked") is None
        assert foreign == []
    finally:
        context.close()


def open_page(browser: Any, engine: ScriptedEngine, **parts: Any) -> Any:
    provider = parts.pop("provider", None)
    key, memory = parts.pop("api_key", None), parts.pop("memory", None)
    assistant = Assistant(engine, provider=provider, memory=memory)
    app = create_app(serving(assistant, "parrot-1"), api_key=key, **parts)

    @contextmanager
    def opened() -> Iterator[Any]:
        with served(app) as url, page_of(browser, url) as page:
            yield page

    return opened()


def ask(page: Any, text: str) -> None:
    page.fill("#question textarea", text)
    page.press("#question textarea", "Enter")


def bot_text(page: Any) -> str:
    return str(
        page.evaluate("[...document.querySelectorAll('#chat .bot .message-content')].map(e => e.innerText).join('|')")
    )


def test_an_answer_streams_into_the_page(browser: Any) -> None:
    engine = ScriptedEngine(*PARROTS, delay_s=0.15)
    with open_page(browser, engine) as page:
        assert "parrot-1" in page.inner_text("#top")
        ask(page, "What are parrots?")
        page.wait_for_function("document.querySelector('#chat .bot')?.innerText.includes('Parrots are')")
        early = bot_text(page)
        assert "birds" not in early, "the answer came in one piece"
        page.wait_for_selector("text=orange birds.")
        assert page.input_value("#question textarea") == ""
        assert page.inner_text("#chat .user").strip() == "What are parrots?"
        page.wait_for_selector("#question .submit-button")
        ask(page, "And how many?")
        page.wait_for_function("document.querySelectorAll('#chat .bot .message-content').length === 2")
        page.wait_for_selector("#question .submit-button")
        assert [m.content for m in engine.asked[1]] == ["What are parrots?", "".join(PARROTS), "And how many?"]
        assert not page.is_visible("#clip")  # no ears, no microphone


def test_stop_ends_the_answer_and_the_engine(browser: Any) -> None:
    engine = ScriptedEngine(*["word "] * 300, delay_s=0.05)
    with open_page(browser, engine) as page:
        ask(page, "Talk")
        page.wait_for_selector("text=word word")
        page.click("#question .stop-button")
        page.wait_for_selector("#question .submit-button")
        assert engine.closed.wait(5)
        assert engine.given < 200
        engine.pieces = ("Fine.",)
        ask(page, "Still there?")
        page.wait_for_selector("text=Fine.")
        assert [m.role for m in engine.asked[1]] == ["user", "assistant", "user"]


def test_a_new_conversation_forgets(browser: Any) -> None:
    engine = ScriptedEngine("Hello.")
    with open_page(browser, engine) as page:
        ask(page, "My name is Ada")
        page.wait_for_selector("#chat .bot >> text=Hello.")
        page.click("#fresh")
        page.wait_for_selector("#chat .welcome")
        ask(page, "Who am I?")
        page.wait_for_selector("#chat .bot >> text=Hello.")
        assert [m.content for m in engine.asked[1]] == ["Who am I?"]


def test_a_search_is_shown_with_its_reason_and_sources(browser: Any) -> None:
    engine = ScriptedEngine("Light snow. ", EVIL, " [x](javascript:window.hacked=1)")
    with open_page(browser, engine, provider=ScriptedProvider(*SOURCES)) as page:
        ask(page, f"What is the weather? {EVIL}")
        page.wait_for_selector("#chat .bot >> text=Light snow.")
        title = page.locator(".thought-group .title")
        assert 'you asked about "weather" · 2 sources' in title.inner_text()
        page.wait_for_selector("#chat .sources", state="hidden")  # it folds when the search is over
        title.click()
        page.wait_for_selector("#chat .sources")
        links = page.locator("#chat .sources a")
        assert links.count() == 1
        assert links.get_attribute("href").startswith("https://weather.example/oslo?a=1")
        assert "noopener" in links.get_attribute("rel")
        assert EVIL in page.inner_text("#chat .sources")  # as text
        for link in page.locator("#chat a").all():
            assert not (link.get_attribute("href") or "").startswith("javascript")
        assert page.locator("#chat script").count() == 0
        assert page.locator("#chat [onerror]").count() == 0


def test_a_failed_search_is_said_and_the_answer_goes_on(browser: Any) -> None:
    provider = ScriptedProvider(failure="DuckDuckGo did not answer within 8 s")
    with open_page(browser, ScriptedEngine("Anyway."), provider=provider) as page:
        page.click("#search label:has-text('Always')")
        ask(page, "Hi")
        page.wait_for_selector("#chat .bot >> text=Anyway.")
        assert "Search failed: search is set to always" in page.inner_text(".thought-group .title")
        page.click(".thought-group .title")
        page.wait_for_selector("text=DuckDuckGo did not answer within 8 s. The answer goes on without it.")


def test_an_engine_that_fails_is_said_in_words(browser: Any) -> None:
    engine = ScriptedEngine("Hello.")
    with open_page(browser, engine) as page:
        engine.down = True
        ask(page, "Hi")
        page.wait_for_selector("#notice .problem >> text=does not answer")
        page.wait_for_selector("#question .submit-button")
        engine.down = False
        ask(page, "Again")
        page.wait_for_selector("#chat .bot >> text=Hello.")
        assert [m.content for m in engine.asked[1]] == ["Again"]


def test_a_spoken_question_comes_back_as_a_spoken_answer(browser: Any, ears: Ears, voice: Voice) -> None:
    engine = ScriptedEngine(*PARROTS)
    with open_page(browser, engine, ears=ears, voice=voice) as page:
        page.click("#clip .record-button")
        page.wait_for_selector("#clip .stop-button")
        page.wait_for_timeout(4500)
        page.click("#clip .stop-button")
        page.wait_for_selector("#chat .user")
        heard = page.inner_text("#chat .user").lower()
        assert "fellow" in heard
        assert engine.asked[0][-1].content.lower() == heard.strip()
        player = page.wait_for_selector("#chat audio")
        address = page.url + str(player.get_attribute("src"))
        sound = page.request.get(address).body()
        page.wait_for_function("document.querySelector('#chat audio').currentTime > 0.2")  # it plays by itself
        page.wait_for_selector("#clip .record-button")  # ready for the next question
    with wave.open(io.BytesIO(sound)) as file:
        assert file.getframerate() == voice.sample_rate_hz
    samples = decode(sound)
    assert samples.size > 16_000
    assert float(np.sqrt(np.mean(np.square(samples)))) > 0.01
    words = set(re.findall("[a-z]+", ears.transcribe(samples).text.lower()))
    assert len(words & {"parrots", "green", "blue", "orange", "birds"}) >= 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"this is a text and no sound at all", "is not an audio file"),
        (encode_wav(np.zeros(16_000, np.float32), 16_000), "No speech was heard"),
    ],
)
def test_what_cannot_be_heard_is_said_in_words(browser: Any, ears: Ears, data: bytes, words: str) -> None:
    with open_page(browser, ScriptedEngine(), ears=ears) as page:
        page.click('#clip [aria-label="Upload file"]')
        page.set_input_files('#clip input[type="file"]', {"name": "sound.wav", "mimeType": "audio/wav", "buffer": data})
        page.wait_for_selector(f"#notice .problem >> text={words}")
        assert page.locator("#chat .user").count() == 0


def test_an_uploaded_clip_is_heard(browser: Any, ears: Ears, clip: Path) -> None:
    engine = ScriptedEngine(*PARROTS)
    with open_page(browser, engine, ears=ears) as page:
        page.click('#clip [aria-label="Upload file"]')
        page.set_input_files('#clip input[type="file"]', str(clip))
        page.wait_for_selector("#chat .bot >> text=orange birds.")
        assert "country" in page.inner_text("#chat .user")
        assert page.locator("#chat audio").count() == 0  # no voice, no player


def test_with_a_key_the_page_asks_for_it_once(browser: Any) -> None:
    with open_page(browser, ScriptedEngine("Welcome in."), api_key=API_KEY) as page:
        page.fill("input[name=key]", "wrong")
        page.click("button")
        page.wait_for_selector("text=That key is not right.")
        page.fill("input[name=key]", API_KEY)
        page.click("button")
        page.wait_for_selector("#question textarea")
        ask(page, "Hi")
        page.wait_for_selector("#chat .bot >> text=Welcome in.")
        page.reload()
        page.wait_for_selector("#question textarea")
        cookie = page.context.cookies()[0]
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert API_KEY not in cookie["value"]


def test_the_page_fits_a_phone(browser: Any, ears: Ears) -> None:
    with open_page(browser, ScriptedEngine("word " * 60), ears=ears) as page:
        page.set_viewport_size({"width": 390, "height": 844})
        ask(page, "x" * 120)
        page.wait_for_selector("#chat .bot >> text=word word")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        fits(page, "#composer", "#clip .record-button", "#fresh", "#open-mic")


def fits(page: Any, *parts: str) -> None:
    """Check that each part is wholly on a screen of 390 by 844."""
    for part in parts:
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0, part
        assert box["x"] + box["width"] <= 390, part
        assert box["y"] + box["height"] <= 844, part


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "memory.db", days=30) as opened:
        yield opened


def remembered(memory: Memory) -> list[dict[str, Any]]:
    """Return every turn that is in the memory's file."""
    with Store.open(memory.path, create=False) as store:
        return [turn for conversation in store.conversations() for turn in conversation["turns"]]


def thumb(page: Any, name: str, number: int = 0) -> None:
    """Press a thumb below an answer."""
    buttons = page.locator('#chat .message-buttons:has([aria-label^="Like"])').nth(number)
    buttons.get_by_label(name, exact=True).click()


def wait_until(page: Any, condition: Any) -> None:
    for _ in range(100):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not come to pass within 5 s")


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / name))


def test_thumbs_and_better_answers_arrive_in_the_memory(browser: Any, memory: Memory) -> None:
    engine = ScriptedEngine("Light snow.")
    with open_page(browser, engine, provider=ScriptedProvider(*SOURCES), memory=memory) as page:
        assert page.inner_text("#memory-line") == "Conversations are kept on the server, in memory.db for 30 days."
        assert not page.is_visible("#forget"), "there is nothing to forget yet"
        ask(page, "What is the weather?")
        page.wait_for_selector("#question .submit-button")
        page.wait_for_selector("#chat .bot >> text=Light snow.")
        engine.pieces = ("Green ", "birds.")
        ask(page, "What are parrots?")
        page.wait_for_selector("#chat .bot >> text=Green birds.")
        page.wait_for_selector("#question .submit-button")
        thumb(page, "Like", 0)
        thumb(page, "Dislike", 1)
        wait_until(page, lambda: [turn["feedback"]["rating"] for turn in remembered(memory)] == ["up", "down"])
        shoot(page, "rated-1280.png")
        thumb(page, "Liked", 0)
        wait_until(page, lambda: [turn["feedback"]["rating"] for turn in remembered(memory)] == [None, "down"])
        page.click("#improve")
        page.wait_for_selector("#better textarea")
        assert page.input_value("#better textarea") == "Green birds."
        page.fill("#better textarea", "Birds of many colours.")
        for width in (1200, 390):
            page.set_viewport_size({"width": width, "height": 844})
            page.wait_for_timeout(300 if SHOTS else 0)
            shoot(page, f"better-{width}.png")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.click("#better .submit-button")
        page.wait_for_selector("#notice .done >> text=Kept as the better answer.")
        assert not page.is_visible("#better textarea")
        shoot(page, "kept-390.png")
        first, second = remembered(memory)
        assert first["feedback"]["correction"] is None
        assert second["feedback"]["correction"] == "Birds of many colours."
        assert (second["question"], second["answer"], second["outcome"]) == (
            "What are parrots?",
            "Green birds.",
            "stop",
        )
        assert memory.conversation(str(_only_conversation(memory)))["channel"] == "page"  # type: ignore[index]


def _only_conversation(memory: Memory) -> str:
    with Store.open(memory.path, create=False) as store:
        (summary,) = store.summaries()
    return str(summary["id"])


def test_forget_deletes_the_conversation_and_no_other_and_stops_what_is_being_written(
    browser: Any, memory: Memory
) -> None:
    engine = ScriptedEngine("Hello.")
    with open_page(browser, engine, memory=memory) as page:
        ask(page, "Another conversation")
        page.wait_for_selector("#chat .bot >> text=Hello.")
        page.wait_for_selector("#question .submit-button")
        page.click("#fresh")
        page.wait_for_selector("#chat .welcome")
        ask(page, "My name is Ada")
        page.wait_for_selector("#chat .bot >> text=Hello.")
        page.wait_for_selector("#question .submit-button")
        engine.pieces, engine.delay_s = ("word ",) * 300, 0.05
        ask(page, "Talk")
        page.wait_for_selector("text=word word")
        page.click("#forget")
        page.wait_for_selector("#notice .done >> text=The conversation is forgotten.")
        page.wait_for_selector("#chat .welcome")
        wait_until(page, engine.closed.is_set)
        page.wait_for_timeout(500)
        assert [turn["question"] for turn in remembered(memory)] == ["Another conversation"]
        engine.pieces, engine.delay_s = ("Fine.",), 0.0
        ask(page, "Who am I?")
        page.wait_for_selector("#chat .bot >> text=Fine.")
        assert [m.content for m in engine.asked[-1]] == ["Who am I?"]


def test_without_a_memory_there_is_nothing_to_rate(browser: Any) -> None:
    with open_page(browser, ScriptedEngine("Hello.")) as page:
        ask(page, "Hi")
        page.wait_for_selector("#chat .bot >> text=Hello.")
        page.wait_for_selector("#question .submit-button")
        for part in ("#memory", "#better", "#forget", "#chat .message-buttons"):
            assert not page.locator(part).first.is_visible()
        assert page.get_by_label("Like", exact=True).count() == 0


def test_a_spoken_turn_is_rated_and_forgotten_by_its_own_id(memory: Memory) -> None:
    from lorikeet.serve.note import Note

    memory.keep(Note(id="resp_1", channel="voice", conversation_id="conv_1", question="Hi", answer="Hello."))
    talk = Talk()
    keep_spoken(json.dumps({"asked": "Hi", "said": "Hello.", "id": "resp_1"}), talk)
    assert rate(memory, talk, place=1, rating="down") == ""
    talk.corrects = talk.last_answer[0]
    assert correct(memory, talk, " Good day. ") == ""
    (turn,) = remembered(memory)
    assert turn["feedback"] == {"rating": "down", "correction": "Good day.", "comment": None}
    assert "not kept" in rate(memory, talk, place=7, rating="up")
    assert "not kept" in rate(memory, talk, place=-1, rating="up")
    assert correct(memory, talk, " ") == "Write the better answer first."
    assert "too long" in correct(memory, talk, "x" * 64_001)
    assert forget(memory, talk) == ""
    assert remembered(memory) == []


def test_a_memory_that_fails_is_said_in_words(memory: Memory) -> None:
    talk = Talk()
    keep_spoken(json.dumps({"asked": "Hi", "said": "Hello.", "id": "resp_1"}), talk)
    memory.close()
    assert "That was not kept: " in rate(memory, talk, place=1, rating="up")
    assert "The conversation is still kept: " in forget(memory, talk)


def two_models(**parts: Any) -> Any:
    """Return an application with a tuned model and its base, and their engines."""
    tuned, base = ScriptedEngine("I was tuned."), ScriptedEngine("I am the base.")
    assistant = Assistant(tuned)
    beside = assistant.beside(base, origin=Origin(name="small-base"))
    models = Models(Served(name="mine", assistant=assistant), Served(name="small-base", assistant=beside))
    return create_app(models, **parts), tuned, base


def test_the_model_that_answers_is_chosen_in_the_page(browser: Any) -> None:
    app, tuned, base = two_models()
    with served(app) as url, page_of(browser, url) as page:
        assert page.inner_text("#model").split("\n") == ["Answered by", "mine", "small-base"]
        ask(page, "Who are you?")
        page.wait_for_selector("#chat .bot >> text=I was tuned.")
        page.wait_for_selector("#question .submit-button")
        page.click("#model >> text=small-base")
        ask(page, "And you?")
        page.wait_for_selector("#chat .bot >> text=I am the base.")
        assert (len(tuned.asked), len(base.asked)) == (1, 1)
        assert [m.content for m in base.asked[0]] == ["Who are you?", "I was tuned.", "And you?"]
        shoot(page, "models-1280.png")
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        shoot(page, "models-390.png")
    with open_page(browser, ScriptedEngine()) as page:
        assert not page.is_visible("#model")  # one model, no choice


def test_the_open_microphone_speaks_with_the_model_that_is_chosen(browser: Any, ears: Ears, voice: Voice) -> None:
    app, tuned, base = two_models(ears=ears, voice=voice)
    with served(app) as url, page_of(browser, url) as page:
        page.click("#model >> text=small-base")
        page.click("#open-mic")
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_selector("#open-mic >> text=Stop talking")
        fits(page, "#open-mic", "#clip .record-button", "#search", "#model")
        page.wait_for_selector("#chat .bot >> text=I am the base.")
        assert (len(tuned.asked), len(base.asked) >= 1) == (0, True)
        shoot(page, "talking-390.png")
