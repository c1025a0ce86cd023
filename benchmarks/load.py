"""Many clients at once: how fast is each answered, is any answer mixed up or lost, and does memory stay flat?

    .venv/bin/python benchmarks/load.py [--target smollm2-135m-instruct] [--seconds 60] [--soak-minutes 10] [--json PATH]
    .venv/bin/python benchmarks/load.py --slots 1 2 4 8 --clients 8 32 --soak-minutes 0      # how many slots are best

Starts the real server and asks it over HTTP with the official client, 1, 8 and 32 at once, each asking again as soon as it is
answered. Every client has a conversation of its own. Three things tell whose answer came: its prompt's tokens, which
must be as many as when the client was alone; a code, which every fourth answer must hold (as JSON, so that a model of
any size can); and the words, which must be those that the client got alone, or else ones that the model would have said to
nobody else: sums are rounded otherwise in company, and where two tokens are as likely, the other one may be taken. So every
answer that is not to the letter what the client got alone is read by the model again, after that client's conversation.
So that this proves something, each client's answer is read after the next client's conversation as well, and must be noticed.
The soak goes on with the most clients and watches the memory of server and engine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
from report import Server, served, stamp, table

from lorikeet.cli import resolve_target
from lorikeet.config import ServeConfig
from lorikeet.data.load import load_conversations
from lorikeet.engine import LlamaEngine
from lorikeet.messages import Message
from lorikeet.scoring import Scorer

ANSWER_TOKENS = 64
CODE_EVERY = 4
REGRET_NATS = 0.6
"""Most that the likeliest token may be likelier, anywhere in an answer, than the one that came. 32 clients' own answers had up
to 0.28; of 132 answers that were another client's, none had less than 0.76."""

SAMPLE_S = 5.0
SETTLE_S = 60.0
"""The first minute of a soak, in which pools and caches fill; memory is compared with its end."""

MIB = 1 << 20


@dataclass
class Client:
    """Somebody with a conversation of their own, and what they got alone."""

    messages: list[dict[str, str]]
    code: str
    alone: str = ""
    prompt_tokens: dict[bool, int] = field(default_factory=dict)
    """Of the plain question, and of that for the code."""


@dataclass
class Seen:
    """One answer."""

    ended_s: float
    first_ms: float
    whole_ms: float
    tokens: int
    same: bool | None
    """Whether it is to the letter what the client got alone; None for a code."""


@dataclass
class Level:
    """What so many clients saw."""

    clients: int
    slots: int
    seconds: float = 0.0
    answers: list[Seen] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    """How many were answered, refused with 503, failed, lost or mixed."""
    examples: list[str] = field(default_factory=list)
    other_words: Counter[tuple[int, str]] = field(default_factory=Counter)
    """Answers in other words than the client got alone: the client's place, and the text."""
    rss_bytes: list[tuple[float, int]] = field(default_factory=list)
    """Seconds after the start, memory of server and engine."""

    def numbers(self) -> dict[str, Any]:
        """Return the figures."""
        first = [seen.first_ms for seen in self.answers] or [float("nan")]
        whole = [seen.whole_ms for seen in self.answers] or [float("nan")]
        compared = [seen.same for seen in self.answers if seen.same is not None]
        figures = {
            "clients": self.clients,
            "slots": self.slots,
            "seconds": round(self.seconds, 1),
            **{name: self.outcomes[name] for name in ("answered", "refused", "failed", "lost", "mixed")},
            "tokens_per_s": round(sum(seen.tokens for seen in self.answers) / self.seconds, 1),
            "first_token_p50_ms": round(float(np.percentile(first, 50))),
            "first_token_p95_ms": round(float(np.percentile(first, 95))),
            "whole_p50_ms": round(float(np.percentile(whole, 50))),
            "whole_p95_ms": round(float(np.percentile(whole, 95))),
            "equal_to_alone": round(sum(compared) / len(compared), 3) if compared else None,
        }
        return {**figures, **self._memory()}

    def _memory(self) -> dict[str, float]:
        """Return memory at the end of the first minute and at the end, and its slope after that minute."""
        settled = [(at_s, rss) for at_s, rss in self.rss_bytes if at_s >= SETTLE_S]
        if len(settled) < 3:
            return {"rss_mib": round(max(rss for _, rss in self.rss_bytes) / MIB, 1)}
        at_min, rss_mib = np.array([(at_s / 60, rss / MIB) for at_s, rss in settled]).T
        last = rss_mib[at_min >= at_min[-1] - 1]
        return {
            "rss_mib": round(float(rss_mib.max()), 1),
            "rss_after_a_minute_mib": round(float(np.median(rss_mib[at_min <= at_min[0] + 1])), 1),
            "rss_last_minute_mib": round(float(np.median(last)), 1),
            "slope_mib_per_minute": round(float(np.polyfit(at_min, rss_mib, 1)[0]), 2),
        }


def make_clients(count: int) -> list[Client]:
    """Return clients with the first turns of packaged conversations, up to a question, each with its own code."""
    clients, asked = [], set()
    for conversation in load_conversations("spoken").conversations:
        turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
        question = turns[1]["content"]
        if question in asked:
            continue
        asked.add(question)
        # Some with an earlier exchange in their history, some without.
        last = 4 if len(turns) > 4 and len(clients) % 2 else 2
        clients.append(Client(turns[:last], f"{question[:1].upper()}-{4096 + 37 * len(clients)}"))
        if len(clients) == count:
            return clients
    raise SystemExit(f"--clients: at most {len(clients)}")


def code_schema(client: Client) -> dict[str, Any]:
    """Return the response format that leaves the model no other answer than the client's code."""
    fields = {"code": {"const": client.code}}
    schema = {"type": "object", "properties": fields, "required": ["code"], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "code", "strict": True, "schema": schema}}


async def ask(api: openai.AsyncOpenAI, client: Client, *, wants_code: bool) -> tuple[Seen, str, str, int]:
    """Ask once, streamed; return times, text, the reason of the end ('' if there was none) and the prompt's tokens."""
    began_s = time.monotonic()
    first_s, text, reason, usage = 0.0, "", "", None
    options: dict[str, Any] = {"response_format": code_schema(client)} if wants_code else {}
    stream = await api.chat.completions.create(
        model="default",
        messages=client.messages,  # type: ignore[arg-type]
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta.content:
                first_s = first_s or time.monotonic()
                text += choice.delta.content
            reason = choice.finish_reason or reason
    now_s = time.monotonic()
    seen = Seen(now_s, 1000 * ((first_s or now_s) - began_s), 1000 * (now_s - began_s), 0, None)
    if usage is None or not text:
        return seen, text, "", 0
    seen.tokens = usage.completion_tokens
    return seen, text, reason, usage.prompt_tokens


def wrong_code(text: str, client: Client) -> str:
    """Return '' if the client's code came, else what came."""
    try:
        code = json.loads(text).get("code")
    except (ValueError, AttributeError):
        code = text
    return "" if code == client.code else f"asked for {client.code}, got {text!r}"


class Reader:
    """Reads an answer after a conversation, to see whether it is one that the model would give there."""

    def __init__(self, engine: LlamaEngine) -> None:
        self._engine = engine
        self._scorer = Scorer(engine)

    def regret(self, client: Client, text: str) -> float:
        """Return how much likelier the likeliest token was than the one of `text`, in nats, where that is most."""
        prompt = self._engine.render([Message(**turn) for turn in client.messages])
        start = len(self._engine.tokenize(prompt))
        assert start == client.prompt_tokens[False], "the prompt read here is not the one that was answered"
        ids = self._engine.tokenize(prompt + text)
        (logits,) = self._scorer.logits(ids, np.arange(start - 1, len(ids) - 1))
        return float(np.max(logits.max(axis=1) - logits[np.arange(len(logits)), ids[start:]]))


def read_again(levels: Sequence[Level], clients: Sequence[Client], gguf: Path) -> float:
    """Move answers that are not their client's from answered to mixed; return the share noticed of answers swapped here."""
    most_tokens = max(client.prompt_tokens[False] for client in clients) + 2 * ANSWER_TOKENS
    with LlamaEngine(gguf, scoring=True, context_tokens=most_tokens) as engine:
        reader = Reader(engine)
        for level in levels:
            for (place, text), count in level.other_words.items():
                if (regret := reader.regret(clients[place], text)) > REGRET_NATS:
                    level.outcomes["mixed"] += count
                    level.outcomes["answered"] -= count
                    level.examples.append(f"{regret:.2f} nats: {text!r}, alone {clients[place].alone!r}")
        swapped = zip(clients, [*clients[1:], clients[0]], strict=True)
        return float(np.mean([reader.regret(client, other.alone) > REGRET_NATS for client, other in swapped]))


async def learn(api: openai.AsyncOpenAI, clients: Sequence[Client]) -> None:
    """Have each client ask alone."""
    for client in clients:
        for wants_code in (False, True):
            _, text, reason, prompt_tokens = await ask(api, client, wants_code=wants_code)
            assert reason and prompt_tokens, "an answer without an end, to a client that was alone"
            client.prompt_tokens[wants_code] = prompt_tokens
            if not wants_code:
                client.alone = text
    assert len({client.alone for client in clients}) == len(clients), "two questions have one answer; take others"


async def keep_asking(
    api: openai.AsyncOpenAI, place: int, clients: Sequence[Client], level: Level, *, until_s: float
) -> None:
    """Have the client in that place ask again and again until the time is over, and note what came."""
    client = clients[place]
    for number in itertools.count(1):
        if time.monotonic() >= until_s:
            return
        wants_code = number % CODE_EVERY == 0
        try:
            seen, text, reason, prompt_tokens = await ask(api, client, wants_code=wants_code)
        except openai.APIStatusError as error:
            level.outcomes["refused" if error.status_code == 503 else "failed"] += 1
            if error.status_code != 503:
                level.examples.append(str(error))
            await asyncio.sleep(float(error.response.headers.get("retry-after", 1)))
            continue
        except openai.APIError as error:
            level.outcomes["lost"] += 1
            level.examples.append(repr(error))
            continue
        if not reason:
            level.outcomes["lost"] += 1
            level.examples.append(f"no end after {text!r}")
            continue
        wrong = wrong_code(text, client) if wants_code else ""
        if prompt_tokens != client.prompt_tokens[wants_code]:
            wrong = f"a prompt of {prompt_tokens} tokens, alone {client.prompt_tokens[wants_code]}"
        if wrong:
            level.outcomes["mixed"] += 1
            level.examples.append(wrong)
            continue
        level.outcomes["answered"] += 1
        if not wants_code:
            seen.same = text == client.alone
            level.other_words.update([] if seen.same else [(place, text)])
        level.answers.append(seen)


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process and all below it, from Linux's /proc."""
    total, pids = 0, [pid]
    while pids:
        folder = Path("/proc") / str(pids.pop())
        with suppress(FileNotFoundError, ProcessLookupError):
            status = (folder / "status").read_text()
            total += 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]
            for task in (folder / "task").iterdir():
                pids += [int(child) for child in (task / "children").read_text().split()]
    return total


@asynccontextmanager
async def watched(level: Level, pid: int) -> AsyncIterator[None]:
    """Sample memory every few seconds while the block runs, and say how far it is."""
    began_s = time.monotonic()

    async def sample() -> None:
        while True:
            at_s = time.monotonic() - began_s
            level.rss_bytes.append((at_s, rss_bytes(pid)))
            print(f"\r{level.clients} clients, {at_s:.0f} s: {dict(level.outcomes)}   ", end="", flush=True)
            await asyncio.sleep(SAMPLE_S)

    sampler = asyncio.create_task(sample())
    try:
        yield
    finally:
        sampler.cancel()
        level.seconds = time.monotonic() - began_s
        print()


async def run_level(server: Server, clients: Sequence[Client], count: int, *, slots: int, seconds: float) -> Level:
    """Have `count` clients ask for so long, and wait for the last answers."""
    level = Level(count, slots)
    api = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
    async with api, watched(level, server.pid):
        until_s = time.monotonic() + seconds
        asking = [keep_asking(api, place, clients, level, until_s=until_s) for place in range(count)]
        await asyncio.gather(*asking)
    return level


async def measure(server: Server, clients: Sequence[Client], options: argparse.Namespace, *, slots: int) -> list[Level]:
    """Have all levels asked, and the soak."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
        await learn(api, clients)
    plan = [(count, options.seconds) for count in options.clients]
    plan += [(max(options.clients), 60 * options.soak_minutes)] if options.soak_minutes else []
    return [await run_level(server, clients, count, slots=slots, seconds=seconds) for count, seconds in plan]


def show(levels: Sequence[Level]) -> None:
    """Print the table, and what went wrong."""
    head = (
        "Clients",
        "Slots",
        "Minutes",
        "Answers",
        "503",
        "Failed",
        "Lost",
        "Mixed",
        "Tokens/s",
        "First token, median and 95 %",
    )
    head += ("Whole answer, median and 95 %", "Equal to alone", "Memory, MiB", "MiB a minute")
    rows = []
    for level in levels:
        n = level.numbers()
        counts = [str(n[name]) for name in ("answered", "refused", "failed", "lost", "mixed")]
        times = [f"{n[f'{what}_p50_ms']} and {n[f'{what}_p95_ms']} ms" for what in ("first_token", "whole")]
        same = "" if n["equal_to_alone"] is None else f"{n['equal_to_alone']:.0%}"
        slope = n.get("slope_mib_per_minute")
        place = [str(n["clients"]), str(n["slots"]), f"{n['seconds'] / 60:.1f}"]
        memory = [f"{n['rss_mib']:.0f}", "" if slope is None else f"{slope:+.2f}"]
        rows.append([*place, *counts, f"{n['tokens_per_s']:.0f}", *times, same, *memory])
    print(table(head, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--slots", type=int, nargs="+", default=[4], help="each is measured with a server of its own")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each level")
    parser.add_argument("--soak-minutes", type=float, default=10.0, help="with the most clients; 0 for none")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/load.json"))
    options = parser.parse_args()
    gguf, _, _ = resolve_target(options.target, ServeConfig())
    if not isinstance(gguf, Path):
        parser.error(f"--target {options.target}: a model whose file is here")
    levels, noticed = [], []
    for slots in options.slots:
        clients = make_clients(max(options.clients))
        with served(options.target, "--slots", str(slots)) as server:
            measured = asyncio.run(measure(server, clients, options, slots=slots))
        noticed.append(read_again(measured, clients, gguf))
        levels += measured
    show(levels)
    print(f"of answers swapped on purpose, {np.mean(noticed):.0%} were noticed by their words")
    wrong = sum(level.outcomes[name] for level in levels for name in ("failed", "lost", "mixed"))
    rows = [{**level.numbers(), "rss": [[round(at_s), rss] for at_s, rss in level.rss_bytes]} for level in levels]
    stamp(
        options.json,
        {"target": options.target, "levels": rows, "wrong": wrong, "swaps_noticed": float(np.mean(noticed))},
    )
    if wrong:
        examples = [example for level in levels for example in level.examples]
        raise SystemExit("\n".join([f"{wrong} answers failed, were lost, or were another's", *examples[:5]]))


if __name__ == "__main__":
    main()
