"""One turn: history, and search results where the question needs them, in; events out.

    assistant = Assistant(engine, system_prompt="...", provider=load_search("ddg", deadline_s=4))
    for event in assistant.respond([Message("user", "What is the weather in Oslo?")], search="auto"):
        if isinstance(event, Text):
            print(event.text, end="")

It knows no HTTP, no page and no audio: those turn its events into what their users see.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, Literal

from lorikeet.config import ServeConfig
from lorikeet.engine import Engine
from lorikeet.errors import LorikeetError, RequestError
from lorikeet.grounding import BUDGET_TOKENS, approximate_tokens, block_lines, put_before
from lorikeet.messages import (
    AnswerOptions,
    Conversation,
    Delta,
    FinishReason,
    Message,
    Source,
    TokenLogprob,
    ToolCall,
    Usage,
)
from lorikeet.serve.memory import Memory
from lorikeet.serve.note import Note, Origin
from lorikeet.serve.queue import Queue
from lorikeet.serve.search.budget import budget_tokens, measure_prefill
from lorikeet.serve.search.provider import Provider, SearchError
from lorikeet.serve.search.query import plan_search
from lorikeet.serve.search.rank import rank

Search = Literal["auto", "off", "always"]
"""When to search: where the question asks for it, never, or before every answer."""

LOOK_UP_S = 0.25
"""How often a request that stands in line looks whether it is still wanted."""

TURN_TOKENS = 8
"""What a template puts around a turn, at most."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing yet: the request stands in line, or the engine reads it. A moment to see whether anybody still waits."""

    position: int
    """How many are before it, itself included; 0 once the engine has it."""


@dataclass(frozen=True, slots=True)
class Searching:
    """A search begins."""

    reason: str
    """Why, in words for the user."""
    query: str
    """What is asked of the search service: the user's own words, those of earlier turns where this one goes on from them."""


@dataclass(frozen=True, slots=True)
class Found:
    """The search ended well; the answer will see these sources, and no others."""

    sources: tuple[Source, ...]
    """Those in the block, at least one, in the order of their numbers: `[1]` in the answer is the first. Untrusted text."""


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
    logprobs: tuple[TokenLogprob, ...] = ()
    """Its tokens, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Calling:
    """The model calls functions that the request offered."""

    calls: tuple[ToolCall, ...]
    """Pieces of calls, at least one; those of one index belong together."""


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete; the last event."""

    finish_reason: FinishReason
    usage: Usage | None
    """Token counts, where the engine gives them."""
    dropped_turns: int = 0
    """How many of the oldest turns did not fit the context, and were not read."""
    max_tokens: int | None = field(default=None, compare=False)
    """How long the answer could be."""


Event = Waiting | Searching | Found | SearchFailed | Text | Calling | Done


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
        memory: Memory | None = None,
        origin: Origin | None = None,
        queue: Queue | None = None,
    ) -> None:
        """Answer with `engine`; conversations without a system turn get `system_prompt`.

        Without a `provider` it never searches. `config` gives the context's size and the defaults of an answer;
        `count_tokens` counts the tokens of a text where it matters whether a long history fits. Turns that come with a
        note are kept in `memory` as answered by `origin`; without a memory nothing is kept.
        Requests stand in line in `queue`, which assistants on the same cores share.
        """
        self._engine = engine
        self._system_prompt = system_prompt
        self._provider = provider
        self._config = config or ServeConfig()
        self._count_tokens = count_tokens
        self._today = today
        self._search_tokens = min(BUDGET_TOKENS, self._config.context_tokens // 4)
        self._tokens_per_s: float | None = None
        self._memory = memory
        self._origin = origin or Origin(name=engine.name)
        self.queue = queue or Queue(slots=self._config.slots, places=self._config.queue)

    def beside(self, engine: Engine, *, origin: Origin) -> Assistant:
        """Return one that answers with `engine`, a model of the same size and tokens, under the same settings.

        It stands in the same line, searches and keeps in the same way, and shares no conversation.
        """
        other = copy.copy(self)
        other._engine, other._origin = engine, origin
        return other

    @property
    def can_search(self) -> bool:
        """Whether there is a search service to ask."""
        return self._provider is not None

    @property
    def system_prompt(self) -> str:
        """What conversations without a system turn are led by."""
        return self._system_prompt

    @property
    def memory(self) -> Memory | None:
        """Where turns are kept; None where nothing is."""
        return self._memory

    @property
    def search_note(self) -> str:
        """How long search results may be, and why, in words for the log."""
        bound = f"at most {self._search_tokens} tokens of results go before a question"
        if self._tokens_per_s is None:
            return bound
        wait_ms = self._config.search_prefill_ms
        return f"{bound}: the engine reads {self._tokens_per_s:.0f} tokens/s and may take {wait_ms:.0f} ms"

    @property
    def search_when(self) -> Search:
        """When the page searches until the user chooses; off where there is nothing to ask."""
        return self._config.search_when if self._provider else "off"

    def warm(self) -> None:
        """Measure how fast the engine reads, if there may be searches, and have it read the system prompt once.

        The first answer need not wait for that then.
        """
        context_tokens = self._config.context_tokens
        if self._provider:
            self._tokens_per_s = measure_prefill(self._engine, context_tokens=context_tokens)
        if self._tokens_per_s is not None:
            wait_ms = self._config.search_prefill_ms
            self._search_tokens = budget_tokens(self._tokens_per_s, wait_ms=wait_ms, context_tokens=context_tokens)
        for _ in self.respond([Message("user", "Hello.")], search="off", max_tokens=1):
            pass

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def problem(self) -> str:
        """Return why the engine would not answer now, in words for the user; '' if it would."""
        return self._engine.problem()

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
        options: AnswerOptions | None = None,
        note: Note | None = None,
        urgent: bool = False,
    ) -> Generator[Event, None, None]:
        """Yield the events of the answer to a conversation; `note` is filled in and kept.

        What is None is the configuration's. `max_tokens` holds as far as the context allows, on a public server as far as
        the configuration does. Turns that would not fit the context are dropped, oldest first; the system turn and the
        question, with all that follows it, stay. Only a turn of the user is searched for, and only an answer to a user or
        a function is kept. Closing the iterator stops the generation. An `urgent` one, which is spoken, goes before those
        that are written. Raises RequestError for a conversation without a turn or one that the engine refuses, BusyError
        at once if too many wait, EngineError if the engine fails.
        """
        noted = note if self._memory and messages and messages[-1].role in {"user", "tool"} else None
        events = self._answer(
            messages,
            note=noted,
            search=search,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            options=options or AnswerOptions(),
            urgent=urgent,
        )
        return self._noting(events, noted) if noted else events

    def _noting(self, events: Generator[Event, None, None], note: Note) -> Generator[Event, None, None]:
        """Pass events on and note them; the turn is kept before its last event, or when it ends without one."""
        note.origin, began_s = self._origin, time.monotonic()
        try:
            with closing(events):
                for event in events:
                    _take(note, event, after_ms=(time.monotonic() - began_s) * 1000)
                    if isinstance(event, Done):
                        self._keep(note)
                    yield event
        except LorikeetError:
            note.outcome = "failed"
            raise
        finally:
            if note.outcome in {"stopped", "failed"}:
                self._keep(note)

    def _keep(self, note: Note) -> None:
        if self._memory and note.answer and not note.deferred:
            self._memory.keep(note)

    def _answer(
        self,
        messages: Sequence[Message],
        *,
        note: Note | None,
        search: Search,
        max_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        seed: int | None,
        stop: Sequence[str],
        options: AnswerOptions,
        urgent: bool,
    ) -> Generator[Event, None, None]:
        if not messages:
            raise RequestError("the conversation has no turn; give one of the user", field="messages")
        if messages[-1].role != "user":
            search = "off"  # nothing is asked, or a function's result is what the answer is to rest on
        limit = self._limit(max_tokens)
        # A client may allow more than it needs: its history is not dropped for that.
        reserve = min(limit, self._config.max_answer_tokens)
        with self.queue.join(urgent=urgent, ready=False) as ticket:
            conversation = Conversation(tuple(messages)).with_system(self._system_prompt)
            # A search takes seconds and nothing of the engine: meanwhile others are let in.
            lines = yield from self._search(conversation.messages, search, reserve)
            question = replace(messages[-1], content=put_before(messages[-1].content, lines))
            conversation = Conversation((*conversation.messages[:-1], question))
            ticket.ready()
            while not ticket.wait(LOOK_UP_S):
                yield Waiting(ticket.position)
            prompt = self._fit(conversation.messages, reserve, tools=options.tools)
            if note is not None:
                note.question, note.prompt = messages[_question(messages)].content, tuple(prompt)
            sampling: dict[str, Any] = {} if top_p is None else {"top_p": top_p}
            answer = self._engine.stream(
                prompt,
                max_tokens=limit,
                temperature=self._config.temperature if temperature is None else temperature,
                seed=seed,
                stop=stop,
                options=options,
                **sampling,
            )
            dropped = len(conversation.messages) - len(prompt)
            for event in _events(answer):
                yield replace(event, dropped_turns=dropped, max_tokens=limit) if isinstance(event, Done) else event

    def _limit(self, max_tokens: int | None) -> int:
        """Return how long an answer may be for which so many tokens were asked."""
        usual = self._config.max_answer_tokens
        return min(max_tokens or usual, usual if self._config.public else self._config.context_tokens)

    def _search(
        self, messages: Sequence[Message], search: Search, answer_tokens: int
    ) -> Generator[Event, None, list[str]]:
        """Yield the events of a search, if there is one, and return the lines of the block; none without results."""
        if search == "off" or (search == "auto" and self._provider is None):
            return []
        asked = [message.content for message in messages if message.role == "user"]
        plan = plan_search(asked, today=self._today(), always=search == "always")
        if plan is None:
            return []
        yield Searching(plan.reason, plan.query)
        if self._provider is None:
            yield SearchFailed("search is switched off on this server")
            return []
        try:
            sources = rank(plan.query, self._provider.search(plan.query))
        except SearchError as error:
            yield SearchFailed(str(error))
            return []
        budget = min(self._search_tokens, self._room(messages, answer_tokens))
        lines = block_lines(sources, budget_tokens=budget, count_tokens=self._count_tokens)
        if lines:
            yield Found(tuple(sources[: len(lines)]))
        else:
            yield SearchFailed("the question is so long that no search results fit beside it")
        return lines

    def _room(self, messages: Sequence[Message], answer_tokens: int) -> int:
        """Return the tokens that search results can take, so that system turn, question and answer fit beside them."""
        system = [message.content for message in messages[:1] if message.role == "system"]
        beside = (put_before("", ["."]), *system, messages[-1].content)
        return self._prompt_tokens(answer_tokens) - sum(self._count_tokens(text) + TURN_TOKENS for text in beside)

    def _prompt_tokens(self, answer_tokens: int) -> int:
        """Return the prompt's share of the context: at least a quarter, however long an answer is allowed."""
        context_tokens = self._config.context_tokens
        return context_tokens - min(answer_tokens, context_tokens * 3 // 4)

    def _fit(
        self, messages: Sequence[Message], answer_tokens: int, *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Message]:
        """Return the messages without the oldest turns that, with room for an answer, exceed the context.

        What remains starts with a turn of the user, as templates demand, if there is one. `tools` are written into the prompt too.
        """
        budget = self._prompt_tokens(answer_tokens)
        system = list(messages[:1]) if messages[0].role == "system" else []
        turns = list(messages[len(system) :])
        offered = json.dumps(list(tools)) if tools else ""
        # A byte is at least a token's worth, so what fits by bytes needs no counting.
        if sum(len(_written(m).encode()) + TURN_TOKENS for m in messages) + len(offered.encode()) <= budget:
            return [*system, *turns]
        costs = [self._count_tokens(_written(turn)) + TURN_TOKENS for turn in turns]
        left = budget - sum(self._count_tokens(m.content) + TURN_TOKENS for m in system)
        left -= self._count_tokens(offered) if offered else 0
        question = first = _question(turns)
        while first > 0 and sum(costs[first - 1 :]) <= left:
            first -= 1
        while first < question and turns[first].role != "user":
            first += 1
        return [*system, *turns[first:]]


def _question(messages: Sequence[Message]) -> int:
    """Return the place of the last turn of the user; where there is none, of the last turn."""
    users = (place for place, message in enumerate(messages) if message.role == "user")
    return max(users, default=max(0, len(messages) - 1))


def _written(message: Message) -> str:
    """Return about what the turn puts into a prompt."""
    return message.content + "".join(json.dumps(call.as_dict()) for call in message.tool_calls)


def _take(note: Note, event: Event, *, after_ms: float) -> None:
    """Note an event that came so long after the beginning."""
    if isinstance(event, Searching):
        note.search_reason = event.reason
    elif isinstance(event, Found):
        note.sources = event.sources
        note.timings_ms["search"] = after_ms
    elif isinstance(event, SearchFailed):
        note.search_failure = event.message
        note.timings_ms["search"] = after_ms
    elif isinstance(event, Text):
        note.timings_ms.setdefault("first_token", after_ms)
        note.answer += event.text
    elif isinstance(event, Done):
        note.timings_ms["answer"] = after_ms
        # What calls a function ended by itself, too: what it said before is whole.
        note.outcome = "length" if event.finish_reason == "length" else "stop"
        note.usage = event.usage


def _events(answer: Generator[Delta, None, None]) -> Generator[Event, None, None]:
    """Yield what an engine's deltas mean, and close it at the end."""
    with closing(answer) as deltas:
        for delta in deltas:
            if delta.text:
                yield Text(delta.text, delta.logprobs)
            if delta.tool_calls:
                yield Calling(delta.tool_calls)
            if delta.finish_reason:
                yield Done(delta.finish_reason, delta.usage)
            elif not delta.text and not delta.tool_calls:
                yield Waiting(0)
