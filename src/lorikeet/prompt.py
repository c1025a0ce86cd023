"""Messages <-> token ids and the supervision mask: the one owner of the prompt format.

    format = PromptFormat.load(folder)            # a tokenizer folder with its chat template
    encoded = format.encode(conversation)         # ids, and which of them the model must learn to say
    ids = format.prompt_ids(messages)             # what is sent before an answer

Tuning trains on `encode`; `prove` scores with it; the template that is served is compared with it token by token.
It does not know where conversations come from, nor what is done with the ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikeet.errors import InputError, is_out_of_memory
from lorikeet.messages import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINEL = "\u2402lorikeet\u2403"
"""Stands for an assistant's turn while its place is looked for; no template or tokenizer treats it specially."""

_NOW = re.compile(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as tokens."""

    ids: list[int]
    """Token ids, one BOS at the start if the tokenizer uses one."""
    supervised: list[bool]
    """Per token: whether the loss counts it (assistant turns, each with its end-of-turn token)."""

    @property
    def supervised_tokens(self) -> int:
        """How many tokens the loss counts; the first token is never predicted."""
        return sum(self.supervised[1:])


def freeze_dates(template: str, today: date) -> str:
    """Return the chat template with every call for the current date replaced by `today`, so that it never drifts."""
    return _NOW.sub(lambda call: '"' + today.strftime(call.group(2)) + '"', template)


def defuse(text: str, specials: Iterable[str]) -> str:
    """Return `text` in which no special token's text stands whole: a space follows the first character of each.

    Without it, a message or a web page that contains `<|im_end|>` would end its own turn.
    """
    for special in specials:
        if len(special) > 1:
            text = text.replace(special, f"{special[0]} {special[1:]}")
    return text


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a tokenizer's chat template; of several with names, the one called `default`; '' if it has none.

    Raises InputError if it has several and none of that name.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise InputError(
                f"the model's tokenizer has the chat templates {', '.join(sorted(template))} and none called default; "
                "call the one to tune with default"
            )
        template = template["default"]
    return str(template or "")


class PromptFormat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a fast tokenizer with a chat template. Raises InputError if it has none."""
        template = chat_template(tokenizer)
        if not template:
            raise InputError(
                "the model's tokenizer has no chat template, so it cannot be tuned for conversation; "
                "choose an instruct model, such as smollm2-135m-instruct"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.stop_ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
        start = tokenizer("").input_ids
        self.bos_id: int | None = start[0] if start and start[0] == tokenizer.bos_token_id else None

    @classmethod
    def load(cls, folder: Path) -> PromptFormat:
        """Return the format of the tokenizer in `folder`. Raises InputError if it cannot be read."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a damaged tokenizer.json raises what its reader happens to meet
            if is_out_of_memory(error):
                raise
            why = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"{folder} holds no tokenizer that can be read ({type(error).__name__}: {why}); restore its files"
            ) from error
        return cls(tokenizer)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """Return the template's text for `messages`; their content cannot contain a special token.

        Raises InputError if the template refuses them (roles that must alternate, no system turn, ...).
        """
        rows = [{"role": message.role, "content": defuse(message.content, self.specials)} for message in messages]
        return self._apply(rows, generation_prompt=generation_prompt)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids that precede the assistant's next answer."""
        return self._tokenize(self.render(messages, generation_prompt=True))[0]

    def encode(self, conversation: Conversation) -> Encoded:
        """Return the ids of the whole conversation and the mask over its assistant turns.

        Each turn is supervised from where generation would start to its end-of-turn token. The place of a turn is
        found by rendering the conversation once more with a marker in its stead, so any template works; a token
        belongs to a turn if any of it stands inside. Raises InputError where the template refuses the conversation or
        does not print a turn as it is.
        """
        messages = conversation.messages
        text = self.render(messages)
        ids, spans = self._tokenize(text)
        supervised = [False] * len(ids)
        for index, message in enumerate(messages):
            if message.role == "assistant" and message.supervised:
                first, last = self._answer_span(messages, index, text, conversation.origin)
                limit = self._turn_end(messages, index, text, last)
                self._mark(ids, spans, supervised, first=first, last=last, limit=limit)
        return Encoded(ids, supervised)

    def _answer_span(self, messages: Sequence[Message], index: int, text: str, origin: str) -> tuple[int, int]:
        """Return where the answer at `index` stands in `text`, as character positions [first, last)."""
        marked = [*messages[:index], Message("assistant", _SENTINEL), *messages[index + 1 :]]
        rendered = self.render(marked)
        place = rendered.find(_SENTINEL)
        if place < 0:
            raise InputError(f"{origin or 'a conversation'}: the chat template leaves out assistant turn {index + 1}")
        before, after = rendered[:place], rendered[place + len(_SENTINEL) :]
        last = len(text) - len(after)
        if not text.startswith(before) or not text.endswith(after) or last < place:
            raise InputError(
                f"{origin or 'a conversation'}: the chat template rewrites assistant turn {index + 1}; "
                "it cannot be supervised exactly"
            )
        head = self.render(messages[:index], generation_prompt=True) if index else ""
        generated_from = len(head) if head and len(head) <= place and text.startswith(head) else place
        return generated_from, last

    def _turn_end(self, messages: Sequence[Message], index: int, text: str, last: int) -> int:
        """Return the character position where the next turn starts, so that the end-of-turn is looked for before it."""
        if index + 1 == len(messages):
            return len(text)
        head = self.render(messages[: index + 1])
        return len(head) if text.startswith(head) and len(head) >= last else len(text)

    def _mark(
        self, ids: list[int], spans: list[tuple[int, int]], supervised: list[bool], *, first: int, last: int, limit: int
    ) -> None:
        """Mark the tokens of [first, last) and the special token that ends the turn; all up to `limit` if none does."""
        tail: list[int] = []
        for position, (start, end) in enumerate(spans):
            if start < last and (end > first or start >= first):
                supervised[position] = True
            elif last <= start < limit:
                tail.append(position)
        for count, position in enumerate(tail, start=1):
            if ids[position] in self.special_ids or ids[position] in self.stop_ids:
                tail = tail[:count]
                break
        for position in tail:
            supervised[position] = True

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `text` and the characters [start, end) of each, with one BOS if the tokenizer uses one."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        spans = list(encoding["offset_mapping"])
        if self.bos_id is not None and (not ids or ids[0] != self.bos_id):
            ids, spans = [self.bos_id, *ids], [(-1, -1), *spans]
        return ids, spans

    def _apply(self, rows: list[dict[str, Any]], *, generation_prompt: bool) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                rows, tokenize=False, add_generation_prompt=generation_prompt, chat_template=self.template
            )
        except Exception as error:  # a template is a program, and raises what programs raise
            if is_out_of_memory(error):
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"the model's chat template refuses the conversation: {why}") from error
        return str(rendered)
