"""Schemas: those that are enforced pass, those that llama.cpp ignores, hangs on or dies of never reach it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from lorikeet.answer_schema import MAX_DEPTH, check_answer_schema
from lorikeet.errors import RequestError

TEXT = {"type": "string"}
TREE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
    "required": ["value", "next"],
    "additionalProperties": False,
}


def check(schema: Any) -> None:
    check_answer_schema({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"title": "City", **TEXT, "minLength": 1, "maxLength": 40},
        {"type": ["string", "null"]},
        {"enum": ["a", 1, None]},
        {"type": "string", "const": "a"},
        {"type": "integer", "minimum": -3, "maximum": 17},
        {"type": "array", "items": {"type": "array", "items": TEXT, "maxItems": 9}, "minItems": 1, "maxItems": 9},
        {"type": "array", "prefixItems": [TEXT, {"type": "boolean"}]},
        {"type": "object", "properties": {"a": TEXT}, "additionalProperties": {"type": "number"}},
        {**TEXT, "pattern": "^[a-z]{2,3}-(en|de)$"},
        {**TEXT, "pattern": "^(a{2,9}-){0,99}(b{9}|c{9})$"},
        {**TEXT, "format": "date"},
        {"$defs": {"tree": TREE}, "$ref": "#/$defs/tree"},
    ],
)
def test_what_can_be_enforced_passes(schema: Any) -> None:
    check(schema)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ([], "/ is no schema"),
        (True, "/ is no schema"),
        ({"type": "foo"}, "/type must be"),
        ({"type": ["string", "integer"]}, "/type must be"),
        ({"not": TEXT}, "/type must be"),
        ({"type": "number", "minimum": 3}, "/minimum cannot be enforced"),
        ({"type": "integer", "multipleOf": 3}, "/multipleOf cannot be enforced"),
        ({"type": "integer", "minimum": -(10**30)}, "/minimum must be a whole number"),
        ({"anyOf": [TEXT], "type": "string"}, "/type cannot be enforced"),
        ({"allOf": [TEXT]}, "/type must be"),
        ({"enum": []}, "/enum must be"),
        ({"enum": list(range(5000))}, "/enum must be"),
        ({"type": "object", "properties": 3}, "/properties must be"),
        ({"type": "object", "properties": {"a": TEXT}, "required": "a"}, "/required must be"),
        ({"type": "object", "properties": {f"p{n}": TEXT for n in range(300)}}, "/properties has more than"),
        ({"type": "object", "properties": {"a": {"type": "x"}}}, "/properties/a/type must be"),
        ({"type": "array", "items": TEXT, "minItems": 5, "maxItems": 2}, "/minItems is above"),
        ({"type": "array", "items": TEXT, "minItems": -1}, "/minItems must be"),
        ({"type": "array", "items": {**TEXT, "maxLength": 999}, "maxItems": 999}, "/items repeats too much"),
        ({**TEXT, "pattern": "(a"}, "/pattern must begin"),
        ({**TEXT, "pattern": "^(a$"}, "/pattern is no regular expression"),
        ({**TEXT, "pattern": r"^\d+$"}, "/pattern must begin"),
        ({**TEXT, "pattern": "^(x[{5}]a{0,99}(b){0,20}){0,99}$"}, "/pattern repeats too much"),
        ({**TEXT, "format": "email"}, "/format must be"),
        ({**TEXT, "format": ["date"]}, "/format must be"),
        ({"type": "object", "properties": {"x": TEXT}, "required": [["x"]]}, "/required must be"),
        ({"type": [["x"], "null"]}, "/type must be"),
        ({"type": [["x"], "null"], "minimum": 1}, "/type of two types"),
        ({"$ref": "https://example.com/x.json"}, "/$ref must be"),
        ({"$ref": "#/$defs/none"}, "/$ref leads nowhere"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "leads back"),
        ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, TEXT]}}, "$ref": "#/$defs/a"}, "leads back"),
    ],
)
def test_what_cannot_is_refused_by_its_place(schema: Any, place: str) -> None:
    with pytest.raises(RequestError) as caught:
        check(schema)
    assert str(caught.value).startswith("response_format: schema ")
    assert place in str(caught.value)


def test_a_deep_or_wide_schema_is_refused_at_once() -> None:
    deep: Any = TEXT
    for _ in range(MAX_DEPTH + 1):
        deep = {"anyOf": [deep]}
    wide = {
        "type": "object",
        "properties": {f"p{n}": TEXT for n in range(5000)},
        "required": [f"p{n}" for n in range(5000)],
    }
    began_s = time.monotonic()
    for schema in (deep, wide):
        with pytest.raises(RequestError, match="too large"):
            check(schema)
    assert time.monotonic() - began_s < 2


def chained(count: int, link: Any) -> Any:
    """Return a schema of so many definitions, each of which is what `link` makes of a reference to the next."""
    names = {f"a{n}": link({"$ref": f"#/$defs/a{n + 1}"}) for n in range(count)}
    return {"$defs": {**names, f"a{count}": TEXT}, "$ref": "#/$defs/a0"}


def test_references_are_followed_once_however_they_are_chained() -> None:
    began_s = time.process_time()
    check(chained(480, lambda reference: reference))
    check(chained(480, lambda reference: {"anyOf": [reference]}))
    check(chained(8, lambda reference: {"anyOf": [reference, reference]}))
    with pytest.raises(RequestError, match="can be more than 500 schemas"):
        check(chained(300, lambda reference: {"anyOf": [reference, reference]}))
    assert time.process_time() - began_s < 1


def test_other_formats_are_not_looked_at() -> None:
    check_answer_schema(None)
    check_answer_schema({"type": "json_object"})
    with pytest.raises(RequestError, match="is missing"):
        check_answer_schema({"type": "json_schema", "json_schema": {"name": "x"}})
