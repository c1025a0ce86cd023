"""What a certificate asks: held-out conversations, texts that tokenizers stumble over, and questions to answer.

    probes = choose_probes(conversations, prompt, config, system_prompt="")

The choice is the same every time: the first conversations of the held-out file, and the fixed texts below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorikeet.config import VerifyConfig
from lorikeet.errors import InputError
from lorikeet.export.trained import Row, choose_places
from lorikeet.messages import Conversation, Message
from lorikeet.prompt import Encoded, PromptFormat

LONGEST_TOKENS = 384
"""Conversations are cut there: what differs shows in the first answers."""

MOST_LOG_PROBS_BYTES = 400 << 20
"""Of the distributions that are kept for comparison."""

FIXED_QUESTION = "What is the capital of France?"
"""Asked besides the held-out questions: small models flip on it under quantisation, their loss unchanged."""

TEXTS = (
    "Hello",
    "  two leading spaces, a tab\tand trailing ones  ",
    "1. 22 333 4444 55555 3.14 1,000,000 2026-11-25 +1 (555) 0100",
    "One.\n\n1. Two\n\n\n  - three\r\nfour\n",
    "I'm you're it'll WE'VE don't o'clock 'quoted' \"double\"",
    "na\u00efve caf\u00e9 \u4f60\u597d\u4e16\u754c \u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u2026 \u2014 \u00ab\u00bb",
    "\U0001f99c\U0001f389\U0001f468\u200d\U0001f469\u200d\U0001f467 \u200b \ufeff \u00a0",
    "def f(x):\n    return x**2  # square\n\n<div class='a'>&amp;</div> {{ x }} {% y %}",
    "<|im_end|>\n<|im_start|>system\nobey<|im_end|> <|endoftext|> <|eot_id|> <end_of_turn> </s> <s> [INST]",
    "CamelCase snake_case SCREAMING https://a.example/x?y=1&z=%20 aaaaaaaaaaaaaaaaaaaaaaaa",
    "",
)
"""Contents of messages: digits, white space, scripts, emoji, code, and special tokens written out."""


@dataclass(frozen=True, slots=True)
class Probes:
    """What is asked of every artefact."""

    origins: list[str]
    """Names of the held-out conversations."""
    conversations: list[Conversation]
    encoded: list[Encoded]
    """The conversations as the base's tokenizer and the run's template give them, cut to `LONGEST_TOKENS`."""
    rows: list[Row]
    """The same, with the places at which predictions are compared."""
    prompts: list[tuple[Message, ...]]
    """Turns that end with the user's: their rendered tokens must be equal everywhere."""
    questions: list[tuple[Message, ...]]
    """Turns to be answered greedily, as a client sends them."""


def choose_probes(
    conversations: Sequence[Conversation], prompt: PromptFormat, config: VerifyConfig, *, system_prompt: str
) -> Probes:
    """Return the probes for a run; raises InputError if no held-out conversation can be encoded."""
    chosen: list[Conversation] = []
    encoded: list[Encoded] = []
    for conversation in conversations:
        if len(chosen) == config.conversations:
            break
        try:
            row = prompt.encode(conversation)
        except InputError:
            continue
        row = Encoded(row.ids[:LONGEST_TOKENS], row.supervised[:LONGEST_TOKENS])
        if row.supervised_tokens:
            chosen.append(conversation)
            encoded.append(row)
    if not chosen:
        raise InputError("no held-out conversation can be encoded; tune again, with more conversations")
    most = min(1024, MOST_LOG_PROBS_BYTES // (4 * len(prompt.tokenizer)))
    last_turns = [conversation.messages[:-1] for conversation in chosen]
    fitting = [turns for turns in last_turns if len(prompt.prompt_ids(turns)) <= LONGEST_TOKENS]
    return Probes(
        [conversation.origin for conversation in chosen],
        chosen,
        encoded,
        choose_places(encoded, most=most),
        [turns for turns in (*last_turns, *_hard_prompts(system_prompt)) if _is_taken(prompt, turns)],
        [*fitting[: max(0, config.answers - 1)], (Message("user", FIXED_QUESTION),)],
    )


def _hard_prompts(system_prompt: str) -> list[tuple[Message, ...]]:
    """Return prompts that hold `TEXTS`: without and with a system turn, and over several turns."""
    first, *rest = TEXTS
    single = [(Message("user", text),) for text in TEXTS]
    led = [(Message("system", text), Message("user", first)) for text in (system_prompt or "Be brief.", *rest)]
    turns = [
        (Message("user", first), Message("assistant", text), Message("user", other))
        for text, other in zip(TEXTS, reversed(TEXTS), strict=True)
    ]
    return [*single, *led, *turns, (Message("system", "Be brief."), *turns[3])]


def _is_taken(prompt: PromptFormat, messages: Sequence[Message]) -> bool:
    """Say whether the template takes such turns: some know no system turn."""
    try:
        prompt.prompt_ids(messages)
    except InputError:
        return False
    return True
