"""What one GGUF file does, through the engine that serves: losses, answers, tokens of its prompts, speed.

    measured = measure(gguf, plan, strangers=True, kept=None, done=...)

Base and tuned model get the same `Plan`, so `judge` can compare them row by row. How long each part takes is noted beside. It
judges nothing, and knows nothing of what was measured before: that is `base`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorikeet.config import ProveConfig
from lorikeet.data.checks import Instructed
from lorikeet.data.prose import prose_rows
from lorikeet.engine import LlamaEngine
from lorikeet.messages import Message
from lorikeet.prompt import PromptFormat
from lorikeet.prove.ask import SLOTS, Answer, Asking, counted, decode_speed
from lorikeet.prove.grounding import Probe
from lorikeet.prove.heldout import Heldout, question_of
from lorikeet.prove.instructions import answer_prompts
from lorikeet.scoring import Scorer, Scores

PROBE_TOKENS = 40
"""Longest answer to a probe: enough for a long spoken sentence, in which an order is obeyed or a gap admitted."""

REPEATED = 12
"""Conversations that are scored again to see the noise of the numbers themselves."""

Done = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What both models are asked."""

    heldout: Heldout
    prompt: PromptFormat
    instructed: list[Instructed]
    probes: list[Probe]
    system_prompt: str
    config: ProveConfig

    @property
    def steps(self) -> int:
        """How often `done` is called for both models together."""
        each = len(self.heldout.own) + len(prose_rows(self.prompt)) + len(self.instructed) + len(self.probes)
        return 2 * (each + len(self.questions)) + len(self.heldout.strangers) + REPEATED

    @property
    def questions(self) -> list[tuple[Message, ...]]:
        """The held-out questions that are answered."""
        return [question_of(c) for c in self.heldout.conversations[: self.config.answers]]

    @property
    def probe_questions(self) -> list[tuple[Message, ...]]:
        """The probes as the server would ask them: led by the run's system prompt."""
        return [probe.messages(self.system_prompt) for probe in self.probes]


@dataclass(frozen=True, slots=True)
class Losses:
    """What scoring gave."""

    own: Scores
    strangers: Scores
    """Empty for the base, which is not asked."""
    prose: Scores


@dataclass(frozen=True, slots=True)
class Replies:
    """What answering gave."""

    answers: list[Answer]
    instructed: list[Answer]
    probes: list[Answer]
    parity: int
    """Held-out questions whose tokens from the file's own template and tokenizer equal those of tuning."""
    tokens_per_s: float
    """Decoding speed of one answer alone."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one GGUF file did."""

    losses: Losses
    replies: Replies
    seconds: dict[str, float]
    """How long each part took."""


@dataclass(frozen=True, slots=True)
class Noise:
    """How far the loss of the same model moves for no good reason, in nats a token; the mean over `REPEATED` conversations."""

    repeated: float
    """The same file scored twice."""
    requantised: float | None
    """The base as f16 beside the type that is proved; None where no such file is here."""


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Enter into `seconds` how long the block took, under the name `part`."""
    began_s = time.monotonic()
    yield
    seconds[part] = round(time.monotonic() - began_s, 1)


def measure(gguf: Path, plan: Plan, *, strangers: bool, kept: Path | None, done: Done) -> Measured:
    """Return what the model in `gguf` does; its answers to instructions are kept in the file `kept`, if any."""
    seconds: dict[str, float] = {}
    losses = _score(gguf, plan, strangers=strangers, seconds=seconds, done=done)
    return Measured(losses, _answer(gguf, plan, kept, seconds=seconds, done=done), seconds)


def _score(gguf: Path, plan: Plan, *, strangers: bool, seconds: dict[str, float], done: Done) -> Losses:
    prose = prose_rows(plan.prompt)
    longest = max(plan.heldout.longest_tokens, max(len(row.ids) for row in prose))
    with LlamaEngine(gguf, scoring=True, context_tokens=longest + 1) as engine:
        scorer = Scorer(engine)
        with timed(seconds, "heldout_loss"):
            own = scorer.score(plan.heldout.own, done=done)
        with timed(seconds, "strangers"):
            others = scorer.score(plan.heldout.strangers if strangers else [], done=done)
        with timed(seconds, "plain_text_loss"):
            return Losses(own, others, scorer.score(prose, done=done))


def _answer(gguf: Path, plan: Plan, kept: Path | None, *, seconds: dict[str, float], done: Done) -> Replies:
    config = plan.config
    with answering(gguf, plan) as engine:
        with timed(seconds, "decoding_speed"):
            speed = decode_speed(engine, plan.prompt.prompt_ids(plan.questions[0]))
        questions = [question_of(conversation) for conversation in plan.heldout.conversations]
        with timed(seconds, "prompt_parity"):
            parity = sum(engine.tokenize(engine.render(q)) == plan.prompt.prompt_ids(q) for q in questions)
        with timed(seconds, "answers"), Asking(engine) as asking:
            answers = asking.start(plan.questions, max_tokens=config.max_answer_tokens)
            probes = asking.start(plan.probe_questions, max_tokens=PROBE_TOKENS)
            instructed = answer_prompts(
                asking, plan.instructed, max_tokens=config.max_instruction_tokens, kept=kept, done=done
            )
            return Replies(counted(answers, done), instructed, counted(probes, done), parity, speed)


def answering(gguf: Path, plan: Plan) -> LlamaEngine:
    """Return the engine that answers the plan's questions, with room for the longest of them."""
    config = plan.config
    instructed = [[Message("user", prompt.prompt)] for prompt in plan.instructed]
    asked = (*plan.questions, *plan.probe_questions, *instructed)
    room = max(config.max_answer_tokens, config.max_instruction_tokens, PROBE_TOKENS) + 16
    longest = max(plan.heldout.longest_tokens, max(len(plan.prompt.prompt_ids(messages)) for messages in asked))
    return LlamaEngine(gguf, context_tokens=longest + room, slots=SLOTS)


def measure_noise(gguf: Path, f16: Path | None, plan: Plan, first: Scores, *, done: Done) -> Noise:
    """Return how far the losses `first` of the model in `gguf` move when scored again, and in the file `f16` if there is one."""
    rows = plan.heldout.own[:REPEATED]
    known = Scores(first.by_token[: len(rows)])
    with LlamaEngine(gguf, scoring=True, context_tokens=plan.heldout.longest_tokens + 1) as engine:
        again = Scorer(engine).score(rows, done=done)
    moved = float(np.max(np.abs(again.loss - known.loss) / known.tokens))
    if f16 is None:
        return Noise(moved, None)
    with LlamaEngine(f16, scoring=True, context_tokens=plan.heldout.longest_tokens + 1) as engine:
        return Noise(moved, abs(Scorer(engine).score(rows).mean - known.mean))
