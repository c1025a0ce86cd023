"""One turn: history and grounding in, events out. It knows no HTTP and no audio.

assistant = Assistant(engine, system_prompt="...", provider=provider)
for event in assistant.respond(messages, search="auto"):
    match event: ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from typing import Literal

from lorikeet.engine import Engine
from lorikeet.grounding import approximate_tokens, ground
from lorikeet.messages import Conversation, Message, Source, Usage
from lorikeet.serve.search.decide import decide
from lorikeet.serve.search.provider import Provider, SearchError

SearchMode = Literal["auto", "off", "always"]

TURN_TOKENS = 8
"""Upper estimate of what a template adds to a turn."""


@dataclass(frozen=True, slots=True)
class Searching:
    """A search begins."""

    reason: str
    """Why, in words for the user."""
    query: str


@dataclass(frozen=True, slots=True)
class Found:
    """The search gave results, which now stand before the question."""

    reason: str
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class SearchFailed:
    """The search gave nothing; the answer goes on without it."""

    reason: str
    message: str
    """What went wrong, in words for the user."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer, in whole characters."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete."""

    finish_reason: Literal["stop", "length"]
    usage: Usage | None


Event = Searching | Found | SearchFailed | Text | Done


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn."""

    max_tokens: int = 512
    temperature: float = 0.3
    top_p: float = 0.95
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Assistant:
    """Answers conversations with an engine, looking things up where that is wanted. Safe to use from several threads."""

    def __init__(
        self, engine: Engine, *, system_prompt: str, provider: Provider | None = None, context_tokens: int = 4096
    ) -> None:
        """Answer with `engine`, led by `system_prompt` where a conversation has no system turn of its own.

        `provider` is where searches go; None for none. `context_tokens` bounds prompt and answer together.
        """
        self.engine = engine
        self.system_prompt = system_prompt
        self.provider = provider
        self.context_tokens = context_tokens

    def respond(
        self, messages: Sequence[Message], *, search: SearchMode = "off", sampling: Sampling | None = None
    ) -> Iterator[Event]:
        """Yield what happens until the answer to the last message is complete; closing the iterator stops it.

        Raises RequestError for what the engine refuses and EngineError if it fails.
        """
        sampling = sampling or Sampling()
        question = messages[-1]
        reason = self._reason(question.content, search) if question.role == "user" else None
        if reason and self.provider:
            yield Searching(reason, question.content)
            try:
                sources = tuple(self.provider.search(question.content))
            except SearchError as error:
                yield SearchFailed(reason, str(error))
            else:
                yield Found(reason, sources)
                messages = [*messages[:-1], Message("user", ground(question.content, sources))]
        led = Conversation(tuple(messages)).with_system(self.system_prompt).messages
        fitted = fit(led, tokens=self.context_tokens - sampling.max_tokens)
        deltas = self.engine.stream(
            fitted,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=sampling.stop,
        )
        with closing(deltas):  # type: ignore[type-var]  # engines stream from generators
            for delta in deltas:
                if delta.text:
                    yield Text(delta.text)
                if delta.finish_reason:
                    yield Done(delta.finish_reason, delta.usage)

    def _reason(self, question: str, search: SearchMode) -> str | None:
        if search == "off" or self.provider is None:
            return None
        return decide(question, today=date.today()) or ("you asked to always look up" if search == "always" else None)


def fit(messages: Sequence[Message], *, tokens: int) -> list[Message]:
    """Return `messages` without their oldest turns, as many as must go to stay within about `tokens`.

    The system turn and the last message always stay, and what is left starts with a user's turn.
    """
    system = [m for m in messages[:1] if m.role == "system"]
    turns = list(messages[len(system) :])

    def size(kept: Sequence[Message]) -> int:
        return sum(approximate_tokens(m.content) + TURN_TOKENS for m in (*system, *kept))

    while len(turns) > 1 and size(turns) > tokens:
        turns = turns[1:]
        while len(turns) > 1 and turns[0].role != "user":
            turns = turns[1:]
    return [*system, *turns]
