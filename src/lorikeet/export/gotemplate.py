"""The small part of Go's text/template that our Modelfiles use, so that what Ollama will render can be checked here.

    text = execute(template, {"System": "...", "Messages": [{"Role": "user", "Content": "..."}]})

Syntax and truth follow Go's documentation of text/template: text, `{{ .Field }}`, `{{ $variable }}`, `:=`, `if`, `else if`,
`else`, `range $i, $m :=`, `end`, string and number literals, parentheses, `eq`, `len`, `not`, `slice`. No trim markers, no
comments, no pipes: a template that uses anything else is refused. It knows nothing of chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{((?:\"(?:[^\"\\]|\\.)*\"|[^\"{}])*)\}\}")
_WORD = re.compile(r"\s*(:=|,|\(|\)|\"(?:[^\"\\]|\\.)*\"|\$\w*(?:\.\w+)*|\.\w*(?:\.\w+)*|\w+)")


class TemplateSyntaxError(ValueError):
    """The template uses what is not part of this subset."""


@dataclass(slots=True)
class _Block:
    """`if` or `range` with what it encloses; the root is one without words."""

    words: list[str]
    body: list[str | _Block] = field(default_factory=list)
    otherwise: list[str | _Block] = field(default_factory=list)


def execute(template: str, data: dict[str, Any]) -> str:
    """Return what the template prints for `data`. Raises TemplateSyntaxError for what is outside the subset."""
    return "".join(_run(_parse(template), data, {"$": data}))


def quote(text: str) -> str:
    """Return an action that prints `text` exactly, all of it in characters that can be seen.

    Raises TemplateSyntaxError for a character above U+FFFF that cannot be seen: Go and JSON write it differently.
    """
    hidden = {c for c in text if not c.isprintable() and ord(c) > 0x1F}
    if any(ord(c) > 0xFFFF for c in hidden):
        raise TemplateSyntaxError("a character that cannot be seen")
    literal = json.dumps(text, ensure_ascii=False)
    for character in hidden:
        literal = literal.replace(character, f"\\u{ord(character):04x}")
    return "{{ " + literal + " }}"


def _parse(template: str) -> list[str | _Block]:
    pieces = _ACTION.split(template)
    if any("{{" in text for text in pieces[::2]):
        raise TemplateSyntaxError("an action is not closed, or uses what this subset does not have")
    root = _Block([])
    stack, places = [root], [root.body]
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            places[-1].append(piece)
            continue
        words = _words(piece)
        if words[0] in {"if", "range"}:
            block = _Block(words)
            places[-1].append(block)
            stack.append(block)
            places.append(block.body)
        elif words[0] == "else":
            places[-1] = stack[-1].otherwise
            if len(words) > 1:
                # `else if` is an `if` inside the `else` that ends with it.
                block = _Block([*words[1:], "chained"])
                places[-1].append(block)
                stack.append(block)
                places.append(block.body)
        elif words[0] == "end":
            while len(stack) > 1 and stack[-1].words[-1] == "chained":
                stack.pop().words.pop()
                places.pop()
            if len(stack) == 1:
                raise TemplateSyntaxError("an end without a beginning")
            stack.pop()
            places.pop()
        else:
            places[-1].append(_Block(words))
    if len(stack) > 1:
        raise TemplateSyntaxError(f"{stack[-1].words[0]} has no end")
    return root.body


def _words(action: str) -> list[str]:
    words, place = [], 0
    action = action.rstrip()
    while place < len(action):
        match = _WORD.match(action, place)
        if match is None:
            raise TemplateSyntaxError(f"{action[place:].strip()!r} is not part of this subset")
        words.append(match.group(1))
        place = match.end()
    if not words:
        raise TemplateSyntaxError("an empty action")
    return words


def _run(nodes: list[str | _Block], dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif node.words[0] == "if":
            taken = node.body if _value(node.words[1:], dot, variables) else node.otherwise
            yield from _run(taken, dot, dict(variables))
        elif node.words[0] == "range":
            index, comma, item, assign, *source = node.words[1:]
            if (comma, assign) != (",", ":="):
                raise TemplateSyntaxError("range needs two variables")
            for number, element in enumerate(_value(source, dot, variables)):
                yield from _run(node.body, element, {**variables, index: number, item: element})
        elif len(node.words) > 1 and node.words[1] == ":=":
            variables[node.words[0]] = _value(node.words[2:], dot, variables)
        else:
            yield str(_value(node.words, dot, variables))


def _value(words: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    """Return the value of an expression: one operand, or a function with its operands."""
    operands, rest = [], list(words)
    function = rest.pop(0) if rest and rest[0] in {"eq", "len", "not", "slice"} else ""
    while rest:
        word = rest.pop(0)
        if word == "(":
            depth, inner = 1, []
            while depth:
                word = rest.pop(0)
                depth += {"(": 1, ")": -1}.get(word, 0)
                inner.append(word)
            operands.append(_value(inner[:-1], dot, variables))
        else:
            operands.append(_operand(word, dot, variables))
    if function == "eq":
        return operands[0] in operands[1:]
    if function == "len":
        return len(operands[0])
    if function == "not":
        return not operands[0]
    if function == "slice":
        return operands[0][operands[1] :]
    if len(operands) != 1:
        raise TemplateSyntaxError(f"{' '.join(words)!r} is not part of this subset")
    return operands[0]


def _operand(word: str, dot: Any, variables: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    if word.isdigit():
        return int(word)
    name, *fields = word.split(".")
    value: Any = variables.get(name) if name else dot
    if name and name not in variables:
        raise TemplateSyntaxError(f"{word!r} is not part of this subset")
    for one in filter(None, fields):
        value = value[one]
    return value
