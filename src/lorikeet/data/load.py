"""Files -> conversations: `messages`, ShareGPT, Alpaca and preference rows in JSON, JSONL, Parquet or CSV, told apart by themselves.

    loaded = load_conversations("spoken")
    loaded = load_conversations("mine.jsonl")      # loaded.conversations, loaded.broken, loaded.layout

A broken row is named by file and line; the rest goes on while under 1 % is broken. It does not know tokens.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lorikeet.config import PACKAGED_DATA, SYSTEM_PROMPT
from lorikeet.data.clean import LEAST_CONVERSATIONS
from lorikeet.errors import InputError, MissingExtraError, printable
from lorikeet.grounding import ground_conversation
from lorikeet.messages import Conversation, Message, Role, Source
from lorikeet.weights import DATA_PATTERNS, resolve_data

BROKEN_SHARE = 0.01
"""More broken rows than this share stop the loading."""

MAX_ROW_BYTES = 8 << 20
"""A longer line or CSV field is broken: no conversation is eight megabytes."""

MOST_TURNS = 1000
"""A conversation of more turns is broken: the place of each answer is looked for in the whole, which takes a second by then."""

TRAIN = re.compile(r"(?<![a-zA-Z])([Tt]rain|TRAIN)|(?<=[a-zA-Z])Train")
"""What the name of a dataset's training part, a file or else a folder, has: a word that begins so."""

PREFERENCE = "preference"
"""The layout of rows with `chosen` and `rejected` answers; the chosen ones are learned from."""

FIELDS = (
    "id", "messages", "conversations", "conversation", "system", "instruction", "input", "output", "prompt", "chosen", "rejected",
)  # fmt: skip
"""What is read of a row."""

SHOWN_CHARACTERS = 300
"""Of what a row holds, so much is told to a person."""

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
"""Role names in the wild -> ours."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that could not be read."""

    where: str
    """`file:line`, or `file:row n` where the format has no lines."""
    why: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a file or dataset held."""

    conversations: list[Conversation]
    layout: str
    """`messages`, `sharegpt`, `alpaca`, `preference`, or several joined by `+`."""
    files: list[Path]
    broken: list[Broken] = field(default_factory=list)


class _RowError(ValueError):
    """Why a row is broken."""


def load_conversations(name: str, *, strict: bool = True) -> Loaded:
    """Return the conversations of `spoken`, a path or a hub dataset; sources are rendered into the user's turns.

    Raises InputError for data that is missing and, if `strict`, for data that is empty, of no known layout, or more
    than 1 % broken.
    """
    files = _files(name)
    conversations: list[Conversation] = []
    broken: list[Broken] = []
    layouts: dict[str, None] = {}
    for file in files:
        for where, row in _rows(file):
            try:
                if isinstance(row, _RowError):
                    raise row
                layout, conversation = _conversation(row, where)
            except _RowError as error:
                broken.append(Broken(_one_line(where), _one_line(str(error))))
            else:
                layouts[layout] = None
                conversations.append(ground_conversation(conversation))
    if name == PACKAGED_DATA:
        conversations = [conversation.with_system(SYSTEM_PROMPT) for conversation in conversations]
    if strict:
        _check(name, conversations, broken)
    return Loaded(conversations, "+".join(layouts), files, broken)


def _check(name: str, conversations: list[Conversation], broken: list[Broken]) -> None:
    total = len(conversations) + len(broken)
    if not total:
        raise InputError(
            f"{name} holds no rows; give at least {LEAST_CONVERSATIONS} conversations, or use the packaged data: {PACKAGED_DATA}"
        )
    if not conversations or len(broken) > BROKEN_SHARE * total:
        first = broken[0]
        raise InputError(
            f"{first.where}: {first.why} ({len(broken)} of {total} rows are broken, more than 1 %); "
            "mend them: a row holds messages, conversations (ShareGPT), instruction and output (Alpaca) or prompt, chosen and rejected"
        )


def _files(name: str) -> list[Path]:
    if name == PACKAGED_DATA:
        folder = Path(str(resources.files("lorikeet.data") / "spoken"))
        return sorted(folder.glob("*.jsonl"))
    try:
        path = resolve_data(name)
    except OSError as error:
        raise InputError(f"{_one_line(name)} cannot be read: {error.strerror or error}; check the path") from error
    if path.is_file():
        return [path]
    files = sorted(file for pattern in DATA_PATTERNS for file in path.rglob(pattern) if _is_data(file))
    if not files:
        raise InputError(f"{name} holds no JSON, JSONL, Parquet or CSV file; name a file of conversations")
    named = [file for file in files if TRAIN.search(file.name)]
    return named or [file for file in files if TRAIN.search(str(file.parent.relative_to(path)))] or files


def _is_data(file: Path) -> bool:
    return file.name not in {"dataset_infos.json", "dataset_info.json", "state.json"} and not file.name.startswith(".")


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield `(where, row)`; a row that could not even be parsed comes as a `_RowError`."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(file)
        elif suffix == ".csv":
            yield from _csv_rows(file)
        elif suffix in {".json", ".jsonl", ".ndjson"}:
            yield from _json_rows(file)
        else:
            raise InputError(
                f"{file}: {suffix or 'no'} ending is not one that can be read; give .json, .jsonl, .parquet or .csv"
            )
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a JSON array, an object with one list in it, or JSON lines: told by the first character."""
    with file.open("rb") as raw:
        head = raw.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"[") or (file.suffix.lower() == ".json" and not _first_line_is_whole(file)):
        yield from _array_rows(file)
    else:
        yield from _line_rows(file)


def _first_line_is_whole(file: Path) -> bool:
    with file.open("rb") as raw:
        first = raw.readline(MAX_ROW_BYTES)
        more = raw.read(1)
    try:
        _parse(first)
    except _RowError:
        return False
    return bool(more)


def _array_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        document = _parse(file.read_bytes())
    except _RowError as error:
        raise InputError(f"{file}: {error}; save it as a JSON array or as JSON lines (.jsonl)") from error
    if isinstance(document, dict):
        lists = [
            value for value in document.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        keyed = {"messages", "conversations"} & set(document)
        document = [document] if keyed or len(lists) != 1 else lists[0]
    if not isinstance(document, list):
        raise InputError(f"{file}: holds a single {type(document).__name__}, not rows; give an array of conversations")
    for number, row in enumerate(document, start=1):
        yield f"{file}:row {number}", row


def _line_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as raw:
        number = 0
        while line := raw.readline(MAX_ROW_BYTES + 1):
            number += 1
            where = f"{file}:{number}"
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):
                    line = raw.readline(MAX_ROW_BYTES)
                yield where, _RowError(f"the line is longer than {MAX_ROW_BYTES >> 20} MiB")
            elif line.strip(b"\xef\xbb\xbf \t\r\n"):
                try:
                    yield where, _parse(line)
                except _RowError as error:
                    yield where, error


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_nothing)
    except UnicodeDecodeError as error:
        raise _RowError(f"is not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise _RowError("is nested too deeply") from error
    except ValueError as error:
        raise _RowError(f"is not JSON ({error})") from error


def _nothing(_: str) -> None:
    """Stand for NaN and Infinity, which are no JSON: programs write them where a value is missing."""


def _csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a CSV file. Raises InputError where a quote takes in lines, so that rows cannot be told apart."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with file.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as text:
        rows = csv.reader(text, strict=True)
        head: list[str] = []
        while True:
            begun = rows.line_num + 1
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if rows.line_num > begun or "unexpected end" in str(error):
                    raise InputError(
                        f"{file}:{begun}: a quote that is opened here takes in all up to line {rows.line_num} ({error}); "
                        'close it, and write a quote inside of quotes twice ("")'
                    ) from error
                yield f"{file}:{begun}", _RowError(f"is not CSV ({error})")
                continue
            if not head:
                head = cells
            elif any(cells[len(head) :]):
                yield (
                    f"{file}:{begun}",
                    _RowError("has more cells than the first line; put a text with commas in quotes"),
                )
            elif cells:
                yield f"{file}:{begun}", {name: _cell(cell) for name, cell in zip_longest(head, cells[: len(head)])}


def _cell(value: Any) -> Any:
    """Return a CSV cell: a list of turns is written there as JSON, every other text is a text."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            turns = json.loads(value, parse_constant=_nothing)
        except (ValueError, RecursionError):
            return value
        return turns if all(isinstance(turn, dict) for turn in turns) else value
    return value


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "tune") from error
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        number = 0
        # Other columns may hold what Python cannot: dates after the year 9999, say.
        for batch in table.iter_batches(batch_size=1024, columns=[name for name in FIELDS if name in names] or names):
            for row in _python_rows(batch):
                number += 1
                yield f"{file}:row {number}", row
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{file} is not a whole Parquet file ({str(error).splitlines()[0]}); write it again"
        ) from error


def _python_rows(batch: Any) -> list[Any]:
    """Return the rows of an Arrow batch; one with a value that Python cannot hold comes as a `_RowError`."""
    try:
        return list(batch.to_pylist())
    except (OverflowError, ValueError) as error:
        if len(batch) == 1:
            return [_RowError(f"cannot be read ({error})")]
        return [row for place in range(len(batch)) for row in _python_rows(batch.slice(place, 1))]


def why_broken(row: Any) -> str | None:
    """Return why a row, a JSON value, could not be tuned on; None if it could."""
    try:
        _conversation(row, "")
    except _RowError as error:
        return str(error)
    return None


def _conversation(row: Any, where: str) -> tuple[str, Conversation]:
    """Return the layout and the conversation of a row. Raises _RowError saying why there is none."""
    if not isinstance(row, dict):
        raise _RowError(f"is a {type(row).__name__}, not an object")
    for layout, key in (("messages", "messages"), ("sharegpt", "conversations"), ("sharegpt", "conversation")):
        if isinstance(row.get(key), list):
            messages = _led(row, _turns(row[key]))
            if layout == "messages" and "from" in row[key][0]:
                layout = "sharegpt"
            return layout, _checked(messages, where, row)
    if "chosen" in row and "rejected" in row:
        return PREFERENCE, _checked(_led(row, _chosen(row)), where, row)
    if "instruction" in row and "output" in row:
        return "alpaca", _checked(_led(row, _alpaca(row)), where, row)
    raise _RowError(
        f"has none of messages, conversations, instruction+output (it has: {', '.join(map(str, row)) or 'nothing'})"
    )


def _is_missing(value: Any) -> bool:
    """Say whether a field is as good as not there: null, false, or the NaN that Parquet has where a program had no value."""
    return value is None or value is False or value != value  # only NaN differs from itself


def _calls_tool(turn: dict[str, Any]) -> bool:
    """Say whether a turn calls a function; Parquet gives every turn the fields that one of them has, filled with nulls."""
    call = turn.get("function_call")
    if isinstance(call, dict):
        call = any(value is not None for value in call.values())
    return bool(turn.get("tool_calls") or call)


def _led(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Return the turns led by the row's field `system`, if it holds a text and they have no system turn of their own."""
    system = "" if _is_missing(row.get("system")) else _text(row["system"], "the field system")
    return [Message("system", system), *messages] if system.strip() and messages[0].role != "system" else messages


def _turns(turns: list[Any]) -> list[Message]:
    if not turns:
        raise _RowError("has no turns")
    if len(turns) > MOST_TURNS:
        raise _RowError(f"has {len(turns)} turns, more than {MOST_TURNS}; cut it into several conversations")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise _RowError(f"turn {number} is a {type(turn).__name__}, not an object")
        name = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(name, str):
            raise _RowError(f"turn {number} has no role; known are system, user and assistant")
        if name.lower() not in ROLES:
            raise _RowError(f"turn {number} has the role {name!r}; known are system, user and assistant")
        if _calls_tool(turn):
            raise _RowError(f"turn {number} calls a tool, which cannot be learned yet")
        if turn.get("weight") not in (None, 0, 1):
            raise _RowError(f"turn {number} has the weight {turn['weight']!r}; known are 0 and 1")
        message = Message(ROLES[name.lower()], _text(content, f"turn {number}"), _sources(turn.get("sources"), number))
        messages.append(replace(message, supervised=turn.get("weight") != 0))
    return messages


def _text(content: Any, place: str) -> str:
    """Return the text that stands at `place` of a row."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        parts = [part.get("text", "") for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else parts
    if not isinstance(content, str):
        raise _RowError(f"{place} has {'no content' if content is None else 'content that is not text'}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise _RowError(f"{place} is not UTF-8 text") from error
    if "\0" in content:
        raise _RowError(f"{place} contains a null byte")
    return content


def _sources(sources: Any, number: int) -> tuple[Source, ...]:
    if sources is None:
        return ()
    try:
        found = tuple(
            Source(*(_text(s[name], f"turn {number}") for name in ("title", "url", "snippet"))) for s in sources
        )
    except (TypeError, KeyError) as error:
        raise _RowError(f"turn {number} has sources without title, url and snippet") from error
    for source in found:
        try:
            urlsplit(source.url)
        except ValueError as error:
            raise _RowError(f"turn {number} has a source whose url is none ({error})") from error
    return found


def _one_line(text: str) -> str:
    """Return `text` as one line that can be printed and written anywhere, not longer than a person reads."""
    line = printable(" ".join(text.encode("utf-8", "replace").decode().split()))
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]} ..."


def _chosen(row: dict[str, Any]) -> list[Message]:
    """Return a preference row's prompt and chosen answer, which alone is learned from.

    Without a prompt, or where `chosen` repeats it, the turns that `chosen` and `rejected` share are the prompt.
    """
    prompt, chosen, rejected = (_as_turns(row, name) for name in ("prompt", "chosen", "rejected"))
    if not chosen:
        raise _RowError("has no chosen answer")
    if not prompt or chosen[0].role != "assistant":
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen = chosen[:shared], chosen[shared:]
    return [*(replace(message, supervised=False) for message in prompt), *chosen]


def _as_turns(row: dict[str, Any], name: str) -> list[Message]:
    """Return a preference row's field, a list of turns or a text alone, as turns."""
    value = row.get(name)
    if isinstance(value, str):
        return [Message("user" if name == "prompt" else "assistant", _text(value, f"the field {name}"))]
    return _turns(value) if isinstance(value, list) and value else []


def _alpaca(row: dict[str, Any]) -> list[Message]:
    parts = [
        "" if _is_missing(row.get(key)) else _text(row[key], f"the field {key}") for key in ("instruction", "input")
    ]
    question = "\n\n".join(part for part in parts if part.strip())
    return [Message("user", question), Message("assistant", _text(row["output"], "the field output"))]


def _checked(messages: list[Message], where: str, row: dict[str, Any]) -> Conversation:
    """Return the conversation up to its last answer. Raises _RowError if it cannot be trained on."""
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise _RowError("has no assistant turn to learn from")
    if not any(message.supervised for message in messages if message.role == "assistant"):
        raise _RowError("has only assistant turns of weight 0, which are not learned from")
    for number, message in enumerate(messages, start=1):
        if not message.content.strip() and message.role != "system":
            raise _RowError(f"turn {number} ({message.role}) is empty")
        if message.role == "system" and number > 1:
            raise _RowError(f"turn {number} is a system turn, which may only come first")
    if all(message.role != "user" for message in messages):
        raise _RowError("has no user turn")
    name = row.get("id")
    origin = _one_line(str(name)) if isinstance(name, str | int) else ""
    return Conversation(tuple(m for m in messages if m.content.strip()), origin or _one_line(where))
