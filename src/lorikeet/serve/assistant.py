"""One turn: history, and search results where the question needs them, in; events out.

    assistant = Assistant(engine, system_prompt="...", provider=load_provider("ddg"))
    for event in assistant.respond([Message("user", "What is the weather in Oslo?")], search="auto"):
        if isinstance(event, Text):
            print(event.text, end="")

It knows no HTTP, no page and no audio: those turn its events into what their users see.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal

from lorikeet.config import ServeConfig
from lorikeet.engine import Engine
from lorikeet.errors import RequestError
from lorikeet.grounding import approximate_tokens, ground
from lorikeet.messages import Conversation, Message, Source, Usage
from lorikeet.serve.search.decide import decide
from lorikeet.serve.search.provider import Provider, SearchError

Search = Literal["auto", "off", "always"]
"""When to search: where the question asks for it, never, or before every answer."""

TURN_TOKENS = 8
"""What a template puts around a turn, at most."""


@dataclass(frozen=True, slots=True)
class Searching:
    """A search begins."""

    reason: str
    """Why, in words for the user."""
    query: str
    """What is asked of the search service: the user's own words."""


@dataclass(frozen=True, slots=True)
class Found:
    """The search ended well; the answer will see these sources."""

    sources: tuple[Source, ...]
    """In the order of their numbers in the answer; untrusted text."""


@dataclass(frozen=True, slots=True)
class SearchFailed:
    """The search ended badly; the answer goes on without it."""

    message: str
    """What went wrong, in words for the user."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer."""

    text: str
    """Whole characters; never ''."""


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete; the last event."""

    finish_reason: Literal["stop", "length"]
    """Whether the model ended by itself, or a limit did."""
    usage: Usage | None
    """Token counts, where the engine gives them."""


Event = Searching | Found | SearchFailed | Text | Done


class Assistant:
    """Answers conversations; one object serves any number of threads."""

    def __init__(
        self,
        engine: Engine,
        *,
        system_prompt: str = "",
        provider: Provider | None = None,
        config: ServeConfig | None = None,
        count_tokens: Callable[[str], int] = approximate_tokens,
        today: Callable[[], date] = date.today,
    ) -> None:
        """Answer with `engine`; conversations without a system turn get `system_prompt`.

        Without a `provider` it never searches. `config` gives the context's size and the defaults of an answer;
        `count_tokens` counts the tokens of a text where it matters whether a long history fits.
        """
        self._engine = engine
        self._system_prompt = system_prompt
        self._provider = provider
        self._config = config or ServeConfig()
        self._count_tokens = count_tokens
        self._today = today

    @property
    def can_search(self) -> bool:
        """Whether there is a search service to ask."""
        return self._provider is not None

    @property
    def system_prompt(self) -> str:
        """What conversations without a system turn are led by."""
        return self._system_prompt

    def warm(self) -> None:
        """Have the engine read the system prompt once, so that the first answer does not wait for that."""
        for _ in self.respond([Message("user", "Hello.")], search="off", max_tokens=1):
            pass

    def healthy(self) -> bool:
        """Say whether the engine would answer now."""
        return self._engine.healthy()

    def respond(
        self,
        messages: Sequence[Message],
        *,
        search: Search = "auto",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Generator[Event, None, None]:
        """Yield the events of the answer to the last turn, which is the user's.

        What is None is the configuration's; `max_tokens` can only lower its limit. Turns that would not fit the
        context are dropped, oldest first; the system turn and the question stay. Closing the iterator stops the
        generation. Raises RequestError for a conversation that cannot be answered, EngineError if the engine fails.
        """
        if not messages or messages[-1].role != "user":
            raise RequestError("the conversation must end with a turn of the user")
        limit = min(max_tokens or self._config.max_answer_tokens, self._config.max_answer_tokens)
        sources = yield from self._search(messages[-1].content, search)
        question = replace(messages[-1], content=ground(messages[-1].content, sources))
        conversation = Conversation((*messages[:-1], question)).with_system(self._system_prompt)
        sampling: dict[str, Any] = {} if top_p is None else {"top_p": top_p}
        answer = self._engine.stream(
            self._fit(conversation.messages, limit),
            max_tokens=limit,
            temperature=self._config.temperature if temperature is None else temperature,
            seed=seed,
            stop=stop,
            **sampling,
        )
        with closing(answer) as deltas:
            for delta in deltas:
                if delta.text:
                    yield Text(delta.text)
                if delta.finish_reason:
                    yield Done(delta.finish_reason, delta.usage)

    def _search(self, question: str, search: Search) -> Generator[Event, None, tuple[Source, ...]]:
        """Yield the events of a search, if there is one, and return the sources found."""
        if search == "off" or (search == "auto" and self._provider is None):
            return ()
        reason = "search is set to always" if search == "always" else decide(question, today=self._today())
        if reason is None:
            return ()
        yield Searching(reason, question)
        if self._provider is None:
            yield SearchFailed("search is switched off on this server")
            return ()
        try:
            sources = tuple(self._provider.search(question))
        except SearchError as error:
            yield SearchFailed(str(error))
            return ()
        yield Found(sources)
        return sources

    def _fit(self, messages: Sequence[Message], answer_tokens: int) -> list[Message]:
        """Return the messages without the oldest turns that, with room for an answer, exceed the context.

        At least a quarter of the context is the prompt's, however long an answer is allowed. What remains starts
        with a turn of the user, as templates demand.
        """
        context_tokens = self._config.context_tokens
        budget = context_tokens - min(answer_tokens, context_tokens * 3 // 4)
        system = list(messages[:1]) if messages[0].role == "system" else []
        turns = list(messages[len(system) :])
        # A byte is at least a token's worth, so what fits by bytes needs no counting.
        if sum(len(m.content.encode()) + TURN_TOKENS for m in messages) <= budget:
            return [*system, *turns]
        costs = [self._count_tokens(turn.content) + TURN_TOKENS for turn in turns]
        left = budget - sum(self._count_tokens(m.content) + TURN_TOKENS for m in system)
        first = len(turns) - 1
        while first > 0 and sum(costs[first - 1 :]) <= left:
            first -= 1
        while first < len(turns) - 1 and turns[first].role != "user":
            first += 1
        return [*system, *turns[first:]]
