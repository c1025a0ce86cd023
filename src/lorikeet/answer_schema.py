"""Which JSON schemas an answer can be held to: those that llama.cpp's grammar enforces whole.

    check_answer_schema({"type": "json_schema", "json_schema": {"name": "city", "schema": {...}}})

llama.cpp ignores what it has no rule for (`multipleOf`, a pattern that it cannot read, limits of a fraction), so an answer
would break the schema in silence. Such a schema is refused here, by the place of what is wrong. It knows no engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorikeet.errors import RequestError

MAX_DEPTH = 32
MAX_NODES = 1000
MAX_CHOICES = 500
"""Of one `enum`, `anyOf` or `oneOf`, and of all that a reference can stand for."""
MAX_OPTIONAL = 100
"""Of properties in one object: the grammar grows with their square."""
MAX_REPEAT = 1000
MAX_REPEATED = 10_000
"""All counts inside one another multiplied: what the grammar would spell out."""

_NOTES = {
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$comment",
    "$schema",
    "$id",
}
_SCALARS = {"boolean": set(), "null": set(), "number": set(), "integer": {"minimum", "maximum"}}
_BY_TYPE: dict[str, set[str]] = {
    **_SCALARS,
    "string": {"minLength", "maxLength", "pattern", "format"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
_FORMATS = {"date", "time", "date-time", "uuid"}
_PATTERN = re.compile(
    r"\^(?:[^\\(){}\[\]^$.]|\[[^\\\[\]]+\]|\((?!\?)|\)|\.|\{\d{1,3}(?:,\d{0,3})?\}|\\[.\\/()\[\]{}^$*+?|-])*\$"
)
"""The patterns that are surely read as they are meant: no classes such as `\\d`, no look-around, anchored at both ends."""


def check_answer_schema(response_format: Mapping[str, Any] | None) -> None:
    """Raise RequestError, naming the place, if an answer cannot be held to the format."""
    if not response_format or response_format.get("type") != "json_schema":
        return
    schema = response_format["json_schema"].get("schema")
    if schema is None:
        raise _wrong("", "is missing; give the schema, or ask for json_object")
    _Check(schema).node(schema, "", depth=0, repeated=1)


class _Check:
    """Walks one schema."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._nodes = 0
        self._choices: dict[str, int] = {}
        """Reference -> how many schemas it can stand for."""

    def node(self, schema: Any, place: str, *, depth: int, repeated: int) -> None:
        """Check a schema and those in it."""
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise _wrong(place, f"is too large; at most {MAX_NODES} schemas, {MAX_DEPTH} deep, are taken")
        if not isinstance(schema, dict):
            raise _wrong(place, "is no schema; it must be an object")
        definitions = {"$defs", "definitions"} & set(schema)
        for name in definitions:
            self._all(schema[name], f"{place}/{name}", depth=depth, repeated=1)
        words = set(schema) - _NOTES - definitions
        rule = next((rule for rule in ("$ref", "anyOf", "oneOf", "const", "enum") if rule in words), None)
        if rule:
            _only(words, {rule} | ({"type"} if rule in {"const", "enum"} else set()), place)
            self._rule(rule, schema[rule], f"{place}/{rule}", depth=depth, repeated=repeated)
            return
        self._typed(schema, words, place, depth=depth, repeated=repeated)

    def _rule(self, rule: str, value: Any, place: str, *, depth: int, repeated: int) -> None:
        if rule == "$ref":
            self._reference(value, place)
        elif rule != "const":
            if not isinstance(value, list) or not 1 <= len(value) <= MAX_CHOICES:
                raise _wrong(place, f"must be a list of 1 to {MAX_CHOICES}")
            for number, item in enumerate(value if rule != "enum" else ()):
                self.node(item, f"{place}/{number}", depth=depth + 1, repeated=repeated)

    def _reference(self, value: Any, place: str) -> None:
        """Check that a reference leads to a schema of this document that is no reference itself."""
        parts = value.split("/") if isinstance(value, str) else []
        if len(parts) != 3 or parts[0] != "#" or parts[1] not in {"$defs", "definitions"}:
            raise _wrong(place, "must be of the form #/$defs/name")
        if not isinstance(self._target(value), dict):
            raise _wrong(place, f"leads nowhere: there is no {value[:60]}")
        self._follow(value, place)

    def _target(self, reference: str) -> Any:
        """Return what a reference leads to; None for nowhere."""
        kind, _, name = reference.removeprefix("#/").partition("/")
        named = self._root.get(kind) if isinstance(self._root, dict) else None
        return named.get(name) if isinstance(named, dict) else None

    def _follow(self, reference: str, place: str) -> None:
        """Count the schemas that `reference` can stand for: the grammar tries all of them at once.

        Raises RequestError if there are too many, or none because it leads back before a character is written.
        """
        path = {reference: iter(self._steps(reference))}
        while path:
            name, steps = next(reversed(path.items()))
            step = next(steps, None)
            if step is None:
                self._choices[name] = max(1, sum(self._choices[step] for step in self._steps(name)))
                if self._choices[name] > MAX_CHOICES:
                    raise _wrong(place, f"can be more than {MAX_CHOICES} schemas")
                del path[name]
            elif step in path:
                raise _wrong(place, "leads back to itself before anything is written")
            elif step not in self._choices:
                path[step] = iter(self._steps(step))

    def _steps(self, reference: str) -> list[str]:
        """Return the references that what `reference` leads to can be, without writing a character first."""
        steps, choices = [], [self._target(reference)]
        while choices:
            schema = choices.pop()
            if not isinstance(schema, dict):
                continue
            if isinstance(schema.get("$ref"), str):
                steps.append(schema["$ref"])
                continue
            more = schema.get("anyOf", schema.get("oneOf"))
            choices += more if isinstance(more, list) else ()
        return steps

    def _typed(self, schema: dict[str, Any], words: set[str], place: str, *, depth: int, repeated: int) -> None:
        """Check a schema that says what type a value has."""
        kind = schema.get("type")
        if isinstance(kind, list) and len(kind) == 2 and "null" in kind:
            kind = next((name for name in kind if name != "null"), "null")
            if not (isinstance(kind, str) and kind in _SCALARS) and words != {"type"}:
                raise _wrong(f"{place}/type", 'of two types takes no further keywords; use "anyOf"')
        if not words:
            return  # any value
        if not isinstance(kind, str) or kind not in _BY_TYPE:
            raise _wrong(f"{place}/type", f"must be one of {', '.join(sorted(_BY_TYPE))}")
        _only(words, {"type"} | _BY_TYPE[kind], place)
        if kind == "object":
            self._object(schema, place, depth=depth, repeated=repeated)
        elif kind == "array":
            self._array(schema, place, depth=depth, repeated=repeated)
        elif kind == "string":
            _string(schema, place, repeated=repeated)
        else:
            _span(schema, "minimum", "maximum", place, least=-(2**53), most=2**53)

    def _object(self, schema: dict[str, Any], place: str, *, depth: int, repeated: int) -> None:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        self._all(properties, f"{place}/properties", depth=depth, repeated=repeated)
        names = required if isinstance(required, list) else [None]
        if not all(isinstance(name, str) and name in properties for name in names):
            raise _wrong(f"{place}/required", "must be a list of names in properties")
        if len(properties) - len(set(names)) > MAX_OPTIONAL:
            raise _wrong(f"{place}/properties", f"has more than {MAX_OPTIONAL} that are not required")
        more = schema.get("additionalProperties")
        if more is not None and not isinstance(more, bool):
            self.node(more, f"{place}/additionalProperties", depth=depth + 1, repeated=repeated)

    def _array(self, schema: dict[str, Any], place: str, *, depth: int, repeated: int) -> None:
        count = _span(schema, "minItems", "maxItems", place, least=0, most=MAX_REPEAT) * repeated
        if count > MAX_REPEATED:
            raise _wrong(place, f"repeats too much; all counts inside one another multiply to at most {MAX_REPEATED}")
        if "prefixItems" in schema:
            _only(set(schema) - _NOTES, {"type", "prefixItems"}, place)
            items = schema["prefixItems"]
            if not isinstance(items, list):
                raise _wrong(f"{place}/prefixItems", "must be a list of schemas")
            for number, item in enumerate(items):
                self.node(item, f"{place}/prefixItems/{number}", depth=depth + 1, repeated=repeated)
        if "items" in schema:
            self.node(schema["items"], f"{place}/items", depth=depth + 1, repeated=count)

    def _all(self, named: Any, place: str, *, depth: int, repeated: int) -> None:
        if not isinstance(named, dict):
            raise _wrong(place, "must be an object of schemas")
        for name, schema in named.items():
            self.node(schema, f"{place}/{name[:60]}", depth=depth + 1, repeated=repeated)


def _string(schema: dict[str, Any], place: str, *, repeated: int) -> None:
    if len({"pattern", "format"} & set(schema)) + bool({"minLength", "maxLength"} & set(schema)) > 1:
        raise _wrong(place, "can have a pattern, a format or a length, not two of them")
    if "format" in schema and schema["format"] not in sorted(_FORMATS):
        raise _wrong(f"{place}/format", f"must be one of {', '.join(sorted(_FORMATS))}")
    if _span(schema, "minLength", "maxLength", place, least=0, most=MAX_REPEAT) * repeated > MAX_REPEATED:
        raise _wrong(place, f"repeats too much; all counts inside one another multiply to at most {MAX_REPEATED}")
    if "pattern" in schema:
        pattern = schema["pattern"]
        try:
            fine = isinstance(pattern, str) and len(pattern) <= 200 and bool(_PATTERN.fullmatch(pattern))
            re.compile(pattern if fine else "")
        except (re.error, OverflowError) as error:
            raise _wrong(f"{place}/pattern", f"is no regular expression: {error}") from error
        if not fine:
            raise _wrong(f"{place}/pattern", r"must begin with ^, end with $, and have no \d, \w, (?...) or the like")
        if _most_repeats(pattern) > MAX_REPEAT:
            raise _wrong(
                f"{place}/pattern", f"repeats too much; counts inside one another multiply to at most {MAX_REPEAT}"
            )


def _most_repeats(pattern: str) -> int:
    """Return the largest product of counts, such as `{0,9}`, that stand inside one another in a pattern."""
    most, inner = [1], 1
    for part in re.findall(r"\\.|\[[^\]]*\]|\{\d+,?\d*\}|.", pattern, re.DOTALL):
        if part == "(":
            most.append(1)
        elif part == ")":
            inner = most.pop()
        elif len(part) > 1 and part[0] == "{":
            inner *= max(int(count or 0) for count in part[1:-1].split(","))
        else:
            inner = 1
        most[-1] = max(most[-1], inner)
    return most[0]


def _span(schema: dict[str, Any], low: str, high: str, place: str, *, least: int, most: int) -> int:
    """Return the upper bound, or 1 if there is none, once both are whole numbers in their order."""
    for name in (low, high):
        value = schema.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _wrong(f"{place}/{name}", f"must be a whole number from {least} to {most}")
    if low in schema and high in schema and schema[low] > schema[high]:
        raise _wrong(f"{place}/{low}", f"is above {high}")
    return max(1, int(schema.get(high, schema.get(low, 1))))


def _only(words: set[str], known: set[str], place: str) -> None:
    if unknown := sorted(words - known):
        raise _wrong(f"{place}/{unknown[0][:60]}", "cannot be enforced here; leave it out")


def _wrong(place: str, what: str) -> RequestError:
    return RequestError(f"response_format: schema {place[-200:] or '/'} {what}", field="response_format")
