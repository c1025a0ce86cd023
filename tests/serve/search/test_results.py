"""What a service sent becomes plain, safe, single and ranked."""

from __future__ import annotations

import pytest

from lorikeet.messages import Source
from lorikeet.serve.search.budget import LEAST_TOKENS, MOST_TOKENS, budget_tokens, measure_prefill
from lorikeet.serve.search.clean import MAX_SNIPPET_CHARACTERS, clean
from lorikeet.serve.search.rank import EXCERPT_CHARACTERS, excerpt, rank, terms
from tests.serve.fakes import ScriptedEngine


def test_text_becomes_plain() -> None:
    raw = Source(
        "<b>Tide</b> &amp;amp; times",
        "https://a.example/",
        "High\x00 water\u202e at&nbsp;06:12\u200b <script>x</script>&lt;b&gt;now",
    )
    assert clean([raw]) == [Source("Tide & times", "https://a.example/", "High water at 06:12 x now")]


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)", "ftp://a.example", "//a.example", "", "https://", "http://[::1", "https://bank.example@evil.example/",
        "https://a.example/\"onclick=x", "https://a.example/ b", "https://a.example/<script>", "data:text/html,x", "https://a.example:x/",
        "https://a.example/" + "x" * 3000,
    ],
)  # fmt: skip
def test_links_that_are_none_go(url: str) -> None:
    assert clean([Source("t", url, "text")]) == []


def test_pages_texts_and_sites_come_once() -> None:
    rows = [
        Source("a", "https://www.a.example/x/?utm_source=q", "one"), Source("b", "http://a.example/x", "two"),
        Source("c", "https://b.example/", "One!"), Source("d", "https://a.example/y", "three"),
        Source("e", "https://a.example/z", "four"), Source("f", "https://c.example/", ""), Source("", "https://d.example/p", "five"),
    ]  # fmt: skip
    assert [(s.title, s.snippet) for s in clean(rows)] == [("a", "one"), ("d", "three"), ("d.example", "five")]


def test_long_text_is_cut_at_a_word() -> None:
    (kept,) = clean([Source("t", "https://a.example/", "word " * 5000)])
    assert len(kept.snippet) <= MAX_SNIPPET_CHARACTERS and kept.snippet.endswith("word…")


def test_the_source_that_answers_comes_first_and_the_beside_the_point_goes() -> None:
    rows = [
        Source("Harbour cafe", "https://a.example/", "Cakes and tea all day."),
        Source("Ferries", "https://b.example/", "The company was founded in 1950 and has a ferry."),
        Source("Timetable", "https://c.example/", "The night ferry leaves at 22:40 from pier two."),
    ]
    assert [s.title for s in rank("when does the night ferry leave", rows)] == ["Timetable", "Ferries"]
    assert len(rank("zzz", rows)) == 3
    assert rank("anything", []) == []


def test_of_a_long_text_the_part_that_answers_is_kept() -> None:
    text = "We sell cakes. " * 40 + "The night ferry leaves at 22:40. " + "We sell tea. " * 40
    part = excerpt(text, set(terms("night ferry")))
    assert "22:40" in part and len(part) <= EXCERPT_CHARACTERS


@pytest.mark.parametrize(
    ("tokens_per_s", "wait_ms", "context_tokens", "expected"),
    [(300, 1000, 4096, 300), (300, 500, 4096, 150), (10, 1000, 4096, LEAST_TOKENS), (9e9, 1000, 65536, MOST_TOKENS), (900, 1000, 2048, 512), (300, 1000, 256, 64)],
)  # fmt: skip
def test_the_budget_follows_speed_and_context(
    tokens_per_s: float, wait_ms: float, context_tokens: int, expected: int
) -> None:
    assert budget_tokens(tokens_per_s, wait_ms=wait_ms, context_tokens=context_tokens) == expected


def test_an_engine_that_counts_nothing_is_not_measured() -> None:
    engine = ScriptedEngine()
    assert measure_prefill(engine, context_tokens=4096) is None  # it says 7 tokens for any prompt
    assert [options["max_tokens"] for options in engine.options] == [1] * 4
    assert {options["seed"] for options in engine.options} == {0}
