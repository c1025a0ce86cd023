"""`RUN/Modelfile`: the run for Ollama, with a template that gives the tokens that tuning saw, or none.

    why_not = write_modelfile(run)           # '' if it was written; then, in RUN: ollama create mine

Ollama renders Go templates, not the Jinja template in the GGUF. Ours is put together from what `prompt.py` prints around
the messages of a few probes, whatever the model's family. Then it is rendered as Ollama would, and its token ids are
compared with `prompt.py`'s, for probes and for the run's held-out conversations. One difference, and no Modelfile is
written; the reason is kept for the card.

What Ollama does by itself: it puts the Modelfile's system prompt first where a request has none, joins messages of one
role that follow each other, and adds the BOS if the GGUF says so, which is why the template has none then. It does not
defuse: a message that spells a special token reaches the model as that token, unlike in `lorikeet serve`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lorikeet.config import ServeConfig
from lorikeet.data.load import load_conversations
from lorikeet.errors import InputError
from lorikeet.export.gotemplate import TemplateSyntaxError, execute, quote
from lorikeet.files import sha256_text, write_changed
from lorikeet.messages import Message
from lorikeet.prompt import PromptFormat, defuse
from lorikeet.run import RunFolder

NAME = "Modelfile"
HELDOUT_CHECKED = 20
"""Held-out conversations whose tokens are compared besides the probes."""

_NASTY = (
    "{{ .System }} {% raw %} {{",
    'say """ and "quotes"\n\nand\ta tab \\n \\',
    "caf\u00e9 \U0001f99c\u200d \u4f60\u597d",
    "1. 22 <|im_end|> <|eot_id|> <end_of_turn> </s>\n\n3",
    "`code` $1 | & < >",
)


_TRIMMED = (
    "the model's chat template takes white space off the ends of messages, which Ollama cannot: give it none there, and "
    "the tokens are those of tuning"
)


class UnprovenError(Exception):
    """Why Ollama cannot be given exactly the tokens of tuning."""


@dataclass(frozen=True, slots=True)
class Modelfile:
    """What Ollama reads from a Modelfile."""

    source: str
    """FROM: the GGUF."""
    template: str
    system: str
    parameters: dict[str, list[str]]

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that Ollama makes of `messages`, the last of which is a user's."""
        rows = [(message.role, message.content) for message in messages]
        if self.system and rows[0][0] != "system":
            rows.insert(0, ("system", self.system))
        joined: list[dict[str, str]] = []
        for role, content in rows:
            if joined and joined[-1]["Role"] == role:
                joined[-1]["Content"] += "\n\n" + content
            else:
                joined.append({"Role": role, "Content": content})
        system = "\n\n".join(content for role, content in rows if role == "system")
        return execute(self.template, {"System": system, "Messages": joined})

    def dump(self) -> str:
        """Return the Modelfile's text."""
        lines = [f"FROM {self.source}", f'TEMPLATE """{self.template}"""']
        if self.system:
            lines.append(f'SYSTEM """{self.system}"""')
        lines += [f"PARAMETER {name} {_quoted(value)}" for name, values in self.parameters.items() for value in values]
        return "\n".join(lines) + "\n"


def write_modelfile(run: RunFolder) -> str:
    """Write `RUN/Modelfile` for the run's q8_0, else its first GGUF; return '' or why there is none.

    What was decided is in the manifest as `modelfile`: `{"complete", "sha256", "note"}` or `{"why"}`.
    """
    path = run.root / NAME
    ggufs = sorted(
        (name for name in run.manifest()["artefacts"] if name.startswith("gguf/")), key=lambda name: "q8_0" not in name
    )
    try:
        if not ggufs:
            raise UnprovenError("the run has no GGUF")
        prompt = PromptFormat.load(run.root / "adapter")
        modelfile = build(prompt, system=str(run.manifest().get("system_prompt", "")), source=f"./{ggufs[0]}")
        trimmed = trims(prompt)
        check(modelfile, prompt, [_stripped(c) if trimmed else c for c in (*probes(), *_heldout(run))])
    except (UnprovenError, TemplateSyntaxError) as error:
        cause = "its chat template cannot be written for Ollama: " if isinstance(error, TemplateSyntaxError) else ""
        path.unlink(missing_ok=True)
        run.update(modelfile={"why": f"{cause}{error}"})
        return f"{cause}{error}"
    written = modelfile.dump()
    write_changed(path, written)
    run.update(modelfile={"complete": True, "sha256": sha256_text(written), "note": _TRIMMED if trimmed else ""})
    return ""


def build(prompt: PromptFormat, *, system: str, source: str) -> Modelfile:
    """Return a Modelfile whose template prints around the messages what `prompt` does.

    Raises UnprovenError where what stands between two messages depends on more than who speaks.
    """
    one, two, three = (Message("user", text) for text in ("Qaq", "Qbq", "Qcq"))
    answers = Message("assistant", "Rar"), Message("assistant", "Rbr")
    try:
        head, answer, question, tail = _around(prompt, [one, answers[0], two])
    except InputError as error:
        raise UnprovenError("its chat template refuses a plain conversation") from error
    if _around(prompt, [one, answers[0], two, answers[1], three]) != [head, answer, question, answer, question, tail]:
        raise UnprovenError("its chat template prints turns differently as a conversation grows")
    opening = _literal(head)
    try:
        system_head, between, _ = _around(prompt, [Message("system", "Sas"), one])
        opening = f"{{{{ if .System }}}}{_literal(system_head)}{{{{ .System }}}}{_literal(between)}{{{{ else }}}}{opening}{{{{ end }}}}"
    except InputError:
        pass  # the template takes no system turn, so there is none to place
    template = (
        opening
        + "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + '{{ if eq $m.Role "user" }}{{ $m.Content }}'
        + f"{{{{ if $last }}}}{_literal(tail)}{{{{ else }}}}{_literal(answer)}{{{{ end }}}}"
        + '{{ else if eq $m.Role "assistant" }}{{ $m.Content }}'
        + f"{{{{ if not $last }}}}{_literal(question)}{{{{ end }}}}"
        + "{{ end }}{{ end }}"
    )
    parameters = {
        "stop": _stops(prompt, question),
        "temperature": [str(ServeConfig.temperature)],
        "num_ctx": [str(ServeConfig.context_tokens)],
    }
    return Modelfile(source, template, system, parameters)


def check(modelfile: Modelfile, prompt: PromptFormat, conversations: Sequence[Sequence[Message]]) -> None:
    """Raise UnprovenError unless Ollama would give exactly the tokens of `prompt` for every one of `conversations`.

    Each ends with a user's turn. One without a system turn is compared twice: as it is, and led by the Modelfile's.
    """
    read: Modelfile | None
    try:
        read = parse(modelfile.dump())
    except UnprovenError:
        read = None
    if read != modelfile:
        raise UnprovenError("a Modelfile cannot hold its system prompt or template unchanged")
    bare = replace(modelfile, system="")
    compared = 0
    for conversation in conversations:
        messages = [Message(m.role, defuse(m.content, prompt.specials)) for m in conversation]
        compared += _same(bare, prompt, messages, messages)
        if modelfile.system and messages[0].role != "system":
            compared += _same(modelfile, prompt, messages, [Message("system", modelfile.system), *messages])
    if not compared:
        raise UnprovenError("its chat template refuses every conversation that was tried")


def trims(prompt: PromptFormat) -> bool:
    """Return whether the chat template takes white space off the ends of messages, which Ollama's cannot."""
    question, answer = Message("user", " Qaq "), Message("assistant", " Rar ")
    text = prompt.render([question, answer, question], generation_prompt=True)
    return text.count(" Qaq ") < 2 or " Rar " not in text


def parse(text: str) -> Modelfile:
    """Return what Ollama reads from a Modelfile; like it, drop characters that cannot be seen.

    Raises UnprovenError for what is no Modelfile of ours.
    """
    source, template, system = "", "", ""
    parameters: dict[str, list[str]] = {}
    place = 0
    while place < len(text):
        match = _COMMAND.match(text, place)
        if match is None:
            raise UnprovenError(f"its Modelfile cannot be read from character {place} on")
        place = match.end()
        command, name = match["command"], match["name"]
        block, line = match["block"], match["line"]
        value = "".join(c for c in (block if block is not None else line.strip()) if c.isprintable() or c in "\t\n\r")
        if command == "PARAMETER":
            parameters.setdefault(name, []).append(value.removeprefix('"').removesuffix('"'))
        source = value if command == "FROM" else source
        template = value if command == "TEMPLATE" else template
        system = value if command == "SYSTEM" else system
    return Modelfile(source, template, system, parameters)


def repository_files(text: str, *, gguf: str) -> dict[str, str]:
    """Return a Modelfile as the hub's repository needs it, by file name: for `ollama create`, and for `hf.co/...` names."""
    modelfile = parse(text)
    moved = Modelfile(f"./{gguf}", modelfile.template, modelfile.system, modelfile.parameters)
    params = {k: v if k == "stop" else json.loads(v[0]) for k, v in modelfile.parameters.items()}
    files = {NAME: moved.dump(), "template": modelfile.template, "params": json.dumps(params, indent=2) + "\n"}
    return files | ({"system": modelfile.system} if modelfile.system else {})


_COMMAND = re.compile(
    r"(?P<command>FROM|TEMPLATE|SYSTEM|PARAMETER) +(?:(?<=PARAMETER )(?P<name>\w+) +)?"
    r"(?:\"{3}(?P<block>.*?)\"{3}[ \t]*(?:[\r\n]+|$)|(?P<line>[^\r\n]*)(?:[\r\n]+|$))",
    re.DOTALL,
)


def _same(modelfile: Modelfile, prompt: PromptFormat, messages: list[Message], reference: list[Message]) -> int:
    """Return 1 if the tokens are the same and 0 where `prompt` refuses. Raises UnprovenError if they differ."""
    try:
        wanted = prompt.prompt_ids(reference)
    except InputError:
        return 0
    ids = list(prompt.tokenizer(modelfile.render(messages), add_special_tokens=False).input_ids)
    if ([prompt.bos_id, *ids] if prompt.bos_id is not None else ids) != wanted:
        raise UnprovenError(f"its template gives other tokens in Ollama for a conversation of {len(reference)} turns")
    return 1


def _around(prompt: PromptFormat, messages: Sequence[Message]) -> list[str]:
    """Return what the template prints before, between and after the contents of `messages`; no BOS that is added anyway."""
    text = prompt.render(messages, generation_prompt=True)
    bos = str(prompt.tokenizer.bos_token or "")
    if prompt.bos_id is not None and bos and text.startswith(bos):
        text = text.removeprefix(bos)
    pieces = []
    for message in messages:
        before, found, text = text.partition(message.content)
        if not found:
            raise UnprovenError(f"its chat template leaves out a turn of the {message.role}")
        pieces.append(before)
    return [*pieces, text]


def _literal(text: str) -> str:
    """Return `text` as it stands in a template: as it is where it can be read, else quoted."""
    plain = all(c.isprintable() or c == "\n" for c in text) and "{{" not in text and '"""' not in text
    return text if plain else quote(text)


def _stops(prompt: PromptFormat, after_answer: str) -> list[str]:
    """Return the special tokens at which an answer ends: the one that the template prints after it, and the EOS."""
    ends = [token for token in prompt.specials if after_answer.lstrip().startswith(token)]
    return list(dict.fromkeys([*ends, *([str(prompt.tokenizer.eos_token)] if prompt.tokenizer.eos_token else [])]))


def probes() -> Iterator[list[Message]]:
    """Yield conversations that end with a question: short and long, with and without a system turn, nasty ones."""
    for text in ("Hello?", "  two spaces, a line\n", *_NASTY):
        question = Message("user", text)
        yield [question]
        yield [Message("system", f"S: {text}"), question]
        yield [question, Message("assistant", text), Message("user", "And then?")]
    turns = [Message("assistant" if n % 2 else "user", f"turn {n}: {_NASTY[n % len(_NASTY)]}") for n in range(7)]
    yield turns
    yield [Message("system", "Be brief."), *turns]


def _stripped(messages: Sequence[Message]) -> list[Message]:
    return [Message(message.role, message.content.strip()) for message in messages]


def _heldout(run: RunFolder) -> Iterator[list[Message]]:
    """Yield the first held-out conversations up to their last question."""
    path = run.root / "data" / "heldout.jsonl"
    if path.is_file():
        for conversation in load_conversations(str(path)).conversations[:HELDOUT_CHECKED]:
            messages = list(conversation.messages)
            while messages and messages[-1].role != "user":
                messages.pop()
            if messages:
                yield messages


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\d.]+", value) else f'"{value}"'
