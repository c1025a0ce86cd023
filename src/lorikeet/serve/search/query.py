"""What is asked of a search service: the user's own words, few of them, and nothing else of the conversation.

    plan = plan_search(["What is the weather in Oslo?", "and in Bergen?"], today=date.today())
    plan.query       # 'What is the weather in Bergen'

A follow-up takes its topic from at most two turns of the user before it. What the assistant said, the system turn and
earlier search results are never part of a query.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from lorikeet.serve.search.decide import decide
from lorikeet.serve.search.rank import terms

MAX_QUERY_CHARACTERS = 200
MAX_TURN_CHARACTERS = 4000
"""A longer turn brings a text; what it asks stands at its beginning or its end, and half of this is read of each."""
TURNS_BACK = 2
"""So many earlier turns of the user can lend a follow-up its topic."""

_THOUGHT = re.compile(r"<think>.*?(?:</think>|$)|^.*?</think>|```.*?(?:```|$)", re.DOTALL | re.IGNORECASE)
_MARKS = (
    re.compile(r"<[|\uff5c]?/?[a-zA-Z_][^<>]{0,40}>"),
    # An address is looked for once in each word, from its first letter: from each letter, long words would take minutes.
    re.compile(r"https?://\S+|(?<!\S)\S[^\s@]*@\S+\.\w+"),
    re.compile(r"[`*_#>|]+"),
)
_LEAD = re.compile(
    r"^(?:(?:hey|hi|hello|ok|okay|please|so|well|um|uh|erm|oh|lorikeet|listen|right|lovely|great|nice|thanks|thank you)\b[\s,.!]*)+(?=\w)"
    r"|^(?:can|could|would|will) you (?:please )?(?=(?:tell|look|search|find|check|google|give)\b)"
    r"|^(?:please )?(?:look up|search (?:the web |the internet |online )?for|google|tell me(?: about)?|find(?: out)?|i (?:want|need|would like|'d like) to know)\s+(?=\w)",
    re.IGNORECASE,
)

_GOES_ON = re.compile(r"^(?:and|or|but|what about|how about|also|then)\b[\s,]*", re.IGNORECASE)
_NO_TOPIC = re.compile(r"^(?:why|how do|how can|how come|you|i|we|that's|thanks|so what|what should)\b", re.IGNORECASE)
_POINTS_BACK = re.compile(
    r"\b(?:it|its|it's|he|he's|she|she's|they|they're|them|him|his|her|hers|their|theirs|that one|this one|the one|there|both|those|these)\b",
    re.IGNORECASE,
)
_WEATHER_IT = re.compile(
    r"\b(?:is|will|does|did|was) it (?:be )?(?:going to )?(?:rain|snow|hot|cold|warm|sunny|windy)|\b(?:is|are|was|were|will|has|have) there\b",
    re.IGNORECASE,
)
_PLACE = re.compile(r"^(?P<word>in|at|for|on|to|from|near)\s+(?P<rest>.+)$", re.IGNORECASE)
_ASKS = re.compile(
    r"^(?:who|what|when|where|which|why|how|is|are|was|were|do|does|did|has|have|had|will|would|can|could|should|may|any)\b",
    re.IGNORECASE,
)
_OPEN_ENDS = (" in", " at", " for", " on", " to", " from", " near", " of", " the", " a")
"""A question that ends so goes on in the next sentence."""
_TIME = re.compile(
    r"\b(?:today|tonight|tomorrow|yesterday|now|(?:on )?(?:mon|tues|wednes|thurs|fri|satur|sun)days?|(?:this|next|last) (?:morning|afternoon|evening|night|week|weekend|month|year)|(?:in )?(?:19|20)\d\d)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """A search to make."""

    reason: str
    """Why, in words for the user."""
    query: str
    """What to ask."""


def plan_search(turns: Sequence[str], *, today: date, always: bool = False) -> Plan | None:
    """Return the search that the last of the user's `turns` asks for; None if it asks for none, or has no words.

    With `always` every turn with words in it is searched.
    """
    *earlier, turn = (_ends(_THOUGHT.sub(" ", turn)) for turn in turns[-1 - TURNS_BACK :])
    question = _plain(turn)
    topic = _topic([_plain(turn) for turn in earlier])
    goes_on = bool(topic) and _goes_on(question)
    reason = "search is set to always" if always else decide(turn, today=today)
    if reason is None and goes_on and decide(topic, today=today):
        reason = f'it follows "{_cut(topic, 60)}"'
    query = _query(question, topic, goes_on=goes_on)
    return Plan(reason, query) if reason and re.search(r"\w", query) else None


def _query(question: str, topic: str, *, goes_on: bool) -> str:
    if goes_on:
        return _cut(_join(topic, _GOES_ON.sub("", question)), MAX_QUERY_CHARACTERS)
    question = _question_in(question)
    if topic and _POINTS_BACK.search(_WEATHER_IT.sub(" ", question)):
        known = set(terms(question))
        added = [
            word
            for word in re.findall(r"[\w'\u2019-]+", _cut(topic, 100))
            if terms(word)[0] not in known and _means(word)
        ]
        question = " ".join([question.rstrip(" ?.!"), *added])
    return _cut(question, MAX_QUERY_CHARACTERS)


def _goes_on(question: str) -> bool:
    """Say whether a turn is the rest of a question, such as "and in Bergen?", whose beginning was said before."""
    rest = _GOES_ON.sub("", question)
    if _NO_TOPIC.search(rest):
        return False
    return (rest != question or bool(_PLACE.match(rest))) and len(rest.split()) <= 6


def _topic(earlier: Sequence[str]) -> str:
    """Return the last whole question of the user's earlier turns, with what the follow-ups after it changed."""
    topic = ""
    for turn in earlier:
        topic = _join(topic, _GOES_ON.sub("", turn)) if topic and _goes_on(turn) else _question_in(turn)
    return _cut(topic, MAX_QUERY_CHARACTERS)


def _join(topic: str, rest: str) -> str:
    """Return the question `topic` with its place or time replaced by `rest`, or with `rest` added.

    "What is the weather in Oslo today" and "in Bergen" give "What is the weather in Bergen today".
    """
    rest = rest.strip(" ?.!,")
    if place := _PLACE.match(rest):
        word = place["word"]
        old = re.compile(
            rf"\b{word}\s+[\w'\u2019.-]+(?:\s+(?!(?:in|at|for|on|to|from|near|by|of|this|next|last|today|tomorrow)\b)[\w'\u2019.-]+){{0,3}}",
            re.IGNORECASE,
        )
        if old.search(topic):
            return old.sub(lambda _: rest, topic, count=1)
    if _TIME.fullmatch(rest) and _TIME.search(topic):
        return _TIME.sub(lambda _: rest, topic, count=1)
    return f"{topic.rstrip(' ?.!')} {rest}"


def _question_in(text: str) -> str:
    """Return what of `text` asks: its last question, with a fragment before or after it; `text` itself if nothing asks.

    A pause in speech makes a sentence of a fragment: "What is the weather today in? The city of Oslo."
    """
    sentences = re.split(r"(?<=[.!?])(?<!\.\.)\s+", text)
    asking = [place for place, sentence in enumerate(sentences) if sentence.endswith("?")]
    if len(sentences) == 1 or not asking:
        return text.strip(" .!")
    first = last = asking[-1]
    while first - 1 in asking and _is_fragment(sentences[first]):
        first -= 1
    if sentences[last].rstrip(" ?").lower().endswith(_OPEN_ENDS) and last + 1 < len(sentences):
        last += 1
    chosen = " ".join(sentences[first : last + 1])
    # "Is it safe?" alone says nothing: what it is about stands before it.
    return (chosen if len([w for w in chosen.split() if _means(w)]) >= 2 else text).strip(" .!")


def _is_fragment(sentence: str) -> bool:
    """Say whether a question has no verb of asking before its subject, so that it may be the rest of one before it."""
    return not _ASKS.match(sentence)


def _means(word: str) -> bool:
    """Say whether a word carries meaning by itself."""
    return len(word) > 1 and len(terms(f"{word} xx")) > 1


def _ends(text: str) -> str:
    """Return `text`, or its first and last words where it is longer than a turn that asks."""
    if len(text) <= MAX_TURN_CHARACTERS:
        return text
    half = MAX_TURN_CHARACTERS // 2
    end = text[-half:]
    return f"{_cut(text, half)}\n{end.partition(' ')[2] or end}"


def _plain(text: str) -> str:
    """Return what the user said as one line: no marks or addresses, and no polite beginning."""
    for pattern in _MARKS:
        text = pattern.sub(" ", text)
    line = " ".join(text.split())
    line = "".join(letter for letter in line if letter.isprintable())
    previous = ""
    while line != previous:
        previous, line = line, _LEAD.sub("", line)
    return line.strip()


def _cut(text: str, limit: int) -> str:
    """Return at most `limit` characters of `text`, in whole words where there are any."""
    if len(text) <= limit:
        return text
    return text[:limit].rpartition(" ")[0] or text[:limit]
