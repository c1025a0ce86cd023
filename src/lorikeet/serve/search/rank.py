"""Which results answer best, and which part of each.

    sources = rank("when does the night ferry leave", sources)

The order is that of the search service and that of BM25 over titles and snippets, fused by their ranks: the service knows
pages and links, BM25 knows what the snippets at hand say. It does not know how many will fit.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from lorikeet.messages import Source

EXCERPT_CHARACTERS = 320
"""Longest text of a source: the longest that `spoken` has is 265."""

_K1, _B = 1.2, 0.75
"""BM25's usual constants (Robertson and Zaragoza, 2009)."""

_FUSION = 60
"""The constant of reciprocal rank fusion (Cormack, Clarke and Buettcher, 2009)."""

_STOPWORDS = frozenset(
    re.findall(
        r"\w+",
        """a about an and any are as at be been but by can could did do does for from had has have how i if in into is it its
        may me my no not of on or our so tell than that the their them then there these they this those to was we were what
        when where which who whom whose why will with would you your""",
    )
)


def terms(text: str) -> list[str]:
    """Return the words of `text` that carry its meaning, in their order, without plural endings."""
    words = re.findall(r"\w+", text.casefold())
    return [_stem(word) for word in words if word not in _STOPWORDS and len(word) > 1] or [_stem(w) for w in words]


def _stem(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def rank(query: str, sources: Sequence[Source]) -> list[Source]:
    """Return the sources, best first, each with the part of its snippet that has most to do with `query`.

    Those that share no word with the query go, if any source does.
    """
    wanted = set(terms(query))
    scores = _bm25(wanted, [terms(f"{source.title} {source.snippet}") for source in sources])
    by_words = sorted(range(len(sources)), key=lambda index: -scores[index])
    fused = {index: 1 / (_FUSION + index) + 1 / (_FUSION + place) for place, index in enumerate(by_words)}
    order = sorted(fused, key=lambda index: -fused[index])
    if any(scores):
        order = [index for index in order if scores[index] > 0]
    return [
        Source(sources[index].title, sources[index].url, excerpt(sources[index].snippet, wanted)) for index in order
    ]


def _bm25(wanted: set[str], documents: Sequence[Sequence[str]]) -> list[float]:
    """Return each document's BM25 score for the terms `wanted`, with the documents as the whole collection."""
    counts = [Counter(document) for document in documents]
    mean_length = sum(map(len, documents)) / max(1, len(documents)) or 1.0
    frequency = {term: sum(term in count for count in counts) for term in wanted}
    scores = []
    for document, count in zip(documents, counts, strict=True):
        length = _K1 * (1 - _B + _B * len(document) / mean_length)
        score = 0.0
        for term in wanted & count.keys():
            rarity = math.log(1 + (len(documents) - frequency[term] + 0.5) / (frequency[term] + 0.5))
            score += rarity * count[term] * (_K1 + 1) / (count[term] + length)
        scores.append(score)
    return scores


def excerpt(snippet: str, wanted: set[str], *, limit: int = EXCERPT_CHARACTERS) -> str:
    """Return the run of whole sentences of `snippet`, at most `limit` characters, with most of the terms `wanted`.

    A first sentence that is longer than that comes back whole: cutting within is `grounding`'s, to the budget.
    """
    if len(snippet) <= limit:
        return snippet
    sentences = re.split(r"(?<=[.!?…])\s+", snippet)
    runs = []
    for first in range(len(sentences)):
        run = sentences[first]
        for sentence in sentences[first + 1 :]:
            if len(run) + 1 + len(sentence) > limit:
                break
            run += f" {sentence}"
        runs.append(run)
    return max(runs, key=lambda run: (len(wanted & set(terms(run))), len(run) <= limit))
