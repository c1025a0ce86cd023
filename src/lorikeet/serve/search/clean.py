"""Makes what a search service sent fit to be shown and read: plain text, sound links, nothing twice.

    sources = clean(provider.search("ferry timetable"))

It does not know what was asked: choosing is `rank`'s.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from urllib.parse import parse_qsl, urlsplit

from lorikeet.messages import Source

MAX_TITLE_CHARACTERS = 160
MAX_SNIPPET_CHARACTERS = 2000
MAX_URL_CHARACTERS = 2000

PER_HOST = 2
"""Most results of one site: ten pages of one shop say what two of them say."""

_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,500}>")
_TRACKING = re.compile(r"utm_\w+|fbclid|gclid|msclkid|ref|ref_src")


def clean(sources: Iterable[Source]) -> list[Source]:
    """Return the sources that can be used, in their order, as plain text with http or https links.

    Left out are links that are none, results without text, the same page or the same text again, and what a site has
    beyond `PER_HOST` results.
    """
    kept: list[Source] = []
    seen: set[str] = set()
    hosts: Counter[str] = Counter()
    for source in sources:
        page = _page(source.url)
        title, snippet = _text(source.title, MAX_TITLE_CHARACTERS), _text(source.snippet, MAX_SNIPPET_CHARACTERS)
        if page is None or not snippet:
            continue
        host = page.partition("/")[0]
        words = " ".join(re.findall(r"\w+", snippet.casefold()))
        if page in seen or words in seen or hosts[host] == PER_HOST:
            continue
        seen |= {page, words}
        hosts[host] += 1
        kept.append(Source(title or host, source.url, snippet))
    return kept


def _page(url: str) -> str | None:
    """Return what tells a page from another, beginning with its host; None for what is no sound link to one.

    A link with a user's name in it, which can pass for another site, is none.
    """
    if len(url) > MAX_URL_CHARACTERS or re.search(r"[\s\x00-\x20\x7f-\xa0\u200b-\u202e\u2066-\u2069<>\"\\]", url):
        return None
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").removeprefix("www.")
        parts.port  # noqa: B018  # raises for a port that is none
    except ValueError:
        return None
    if parts.scheme not in {"http", "https"} or not host or "@" in parts.netloc:
        return None
    query = [pair for pair in sorted(parse_qsl(parts.query)) if not _TRACKING.fullmatch(pair[0])]
    return f"{host}{'/' + parts.path.strip('/')}{query or ''}"


def _text(raw: str, limit: int) -> str:
    """Return `raw` as one line of at most `limit` characters: no markup, entities, control or invisible characters."""
    text = html.unescape(_TAG.sub(" ", html.unescape(raw[: 4 * limit])))
    text = unicodedata.normalize("NFC", _TAG.sub(" ", text))
    # The category C holds controls, directions of writing, and what is unassigned or private.
    text = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in text)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rpartition(" ")[0] + "…"
