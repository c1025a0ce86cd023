"""Conversations, ratings and corrections in one SQLite file.

    with Store.open(Path("memory.db")) as store:
        kept = store.keep(note)
        store.rate(kept.id, {"rating": "down", "correction": "At nine."})
        store.conversation(kept.conversation_id)

Any number of threads and processes may use one file: writers wait for each other, readers for nobody. What is deleted
is overwritten. It owns the file and its schema (`migrations/`, numbered); what is worth keeping is `memory`'s business.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, Self

from lorikeet.errors import InputError, MachineError
from lorikeet.serve.note import Kept, Note, Origin, new_id

APPLICATION_ID = 0x4C4F5249
"""Marks a file as ours ("LORI"), so that no other program's database is ever changed."""

BUSY_S = 2.0
"""So long is another writer waited for; then the turn is not kept, and that is said."""

RATED_FIELDS = ("rating", "correction", "comment")

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class StoreError(MachineError):
    """The file cannot be read or written now; nothing in it was changed."""


class StillReadError(StoreError):
    """Something was deleted, but its traces cannot be overwritten while another program reads the file."""


class Store:
    """An open file; one object serves any number of threads."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Take an open connection to the file at `path`; see `open`."""
        self._path = path
        self._db = connection
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, *, create: bool = True, migrations: Sequence[str] | None = None) -> Self:
        """Return the store at `path`, made or brought up to the newest schema.

        `migrations` are the scripts that make the schema, in order; by default those of the package. Raises InputError
        for a file that is missing (unless `create`), damaged, newer or another program's, MachineError where it cannot
        be opened.
        """
        _prepare_file(path, create=create)
        try:
            connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise StoreError(f"{path} cannot be opened: {error}; fix its rights, or name another file") from error
        store = cls(path, connection)
        try:
            scripts = _packaged_migrations() if migrations is None else migrations
            store._check(create=create, newest=len(scripts))
            store._set_up(scripts)
        except sqlite3.DatabaseError as error:
            store.close()
            raise _opening_error(path, error) from error
        except BaseException:
            store.close()
            raise
        return store

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._path

    def __enter__(self) -> Self:
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Let go of the file. Its log is folded into it if nobody else has it open."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()

    # Schema.

    def _check(self, *, create: bool, newest: int) -> None:
        """Raise InputError for a file that is not ours, unchanged; see to it that only its owner can read one that is."""
        is_new = not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if is_new and not create:
            raise InputError(f"{self._path} is empty; name the file that lorikeet serve RUN --memory FILE writes")
        if not is_new and self._db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise InputError(f"{self._path} is another program's database; name another file")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > newest:
            raise InputError(
                f"{self._path} is of a newer Lorikeet (its schema is {version}, this one knows {newest}); "
                "update Lorikeet, or name another file"
            )
        try:
            if self._path.stat().st_mode & 0o077:
                self._path.chmod(0o600)  # before there is a log, which gets the same rights from SQLite
        except OSError as error:
            raise _unopened(self._path, error) from error

    def _set_up(self, migrations: Sequence[str]) -> None:
        db = self._db
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("its pages do not fit together")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table: room is given back after deletions
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise StoreError(f"{self._path} cannot have a write-ahead log there; name a file on a local disk")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA journal_size_limit = {4 << 20}")
        for number in range(1, len(migrations) + 1):
            self._migrate(number, migrations[number - 1])

    def _migrate(self, number: int, script: str) -> None:
        """Apply migration `number` unless the file has it; another process may be doing the same."""
        with self._transaction() as db:
            if db.execute("PRAGMA user_version").fetchone()[0] >= number:
                return
            for statement in _statements(script):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    # Turns.

    def keep(self, note: Note) -> Kept:
        """Write a turn, again if it is there already, and return where it is. Raises StoreError.

        A client's conversation id is gone on with if it is known here; otherwise a new one is made, so that no client
        can choose one that others could guess.
        """
        if not self._path.exists():
            raise StoreError(f"{self._path} was removed while it was in use; start the server again")
        with self._transaction() as db:
            conversation, identity = self._conversation_of(db, note)
            row = {
                "id": note.id,
                "conversation": conversation,
                "model": _model_number(db, note.origin),
                "began_ms": round(note.began_s * 1000),
                "question": storable(note.question),
                "prompt": _json([message.as_dict() for message in note.prompt]),
                "answer": storable(note.answer),
                "outcome": note.outcome,
                "search": _json(_search_fields(note)),
                "timings_ms": _json({name: round(ms, 1) for name, ms in note.timings_ms.items()}),
                "prompt_tokens": note.usage and note.usage.prompt_tokens,
                "completion_tokens": note.usage and note.usage.completion_tokens,
            }
            db.execute(_UPSERT_TURN, row)
        return Kept(note.id, identity)

    def _conversation_of(self, db: sqlite3.Connection, note: Note) -> tuple[int, str]:
        """Return number and id of the conversation that a turn belongs to, made if need be."""
        identity = storable(note.conversation_id)
        known = db.execute("SELECT number FROM conversations WHERE id = ?", (identity,)).fetchone()
        if known:
            return int(known[0]), identity
        if not identity or note.channel == "api":
            identity = new_id("conv")
        began_ms = round(note.began_s * 1000)
        made = db.execute(
            "INSERT INTO conversations (id, channel, began_ms) VALUES (?, ?, ?)", (identity, note.channel, began_ms)
        )
        assert made.lastrowid is not None
        return made.lastrowid, identity

    def rate(self, turn_id: str, changes: Mapping[str, str | None]) -> dict[str, Any] | None:
        """Set those of rating, correction and comment that `changes` names; None takes one back. The last one counts.

        Returns all three, or None if there is no such turn. Raises StoreError.
        """
        with self._transaction() as db:
            found = db.execute("SELECT number FROM turns WHERE id = ?", (storable(turn_id),)).fetchone()
            if not found:
                return None
            before = db.execute("SELECT rating, correction, comment FROM feedback WHERE turn = ?", found).fetchone()
            after = dict(zip(RATED_FIELDS, before or (None,) * 3, strict=True))
            after |= {name: value and storable(value) for name, value in changes.items() if name in after}
            values = (*found, *after.values(), _now_ms())
            db.execute("INSERT OR REPLACE INTO feedback VALUES (?, ?, ?, ?, ?)", values)
        return after

    # Reading.

    def conversation(self, conversation_id: str) -> dict[str, Any] | None:
        """Return a conversation with its turns in order, ready for JSON; None if there is no such one."""
        with self._transaction(write=False) as db:
            found = db.execute(
                "SELECT number, id, channel, began_ms FROM conversations WHERE id = ?", (storable(conversation_id),)
            ).fetchone()
            if not found:
                return None
            rows = db.execute(_TURNS_OF, (found[0],)).fetchall()
        return {"id": found[1], "channel": found[2], "began_ms": found[3], "turns": [_turn_fields(row) for row in rows]}

    def conversation_of(self, turn_id: str) -> str | None:
        """Return the id of the conversation that a turn belongs to."""
        with self._transaction(write=False) as db:
            found = db.execute(_CONVERSATION_OF_TURN, (storable(turn_id),)).fetchone()
        return str(found[0]) if found else None

    def conversations(self) -> Iterator[dict[str, Any]]:
        """Yield every conversation with its turns, the oldest first; one is held in memory at a time."""
        with self._transaction(write=False) as db:
            ids = [row[0] for row in db.execute("SELECT id FROM conversations ORDER BY number")]
        for identity in ids:
            conversation = self.conversation(identity)
            if conversation is not None:  # else it was deleted meanwhile
                yield conversation

    def summaries(self) -> list[dict[str, Any]]:
        """Return a summary of each conversation, oldest first.

        It holds id, channel, began_ms, how many turns there are, how many of them are up, down and corrected, and
        first_words: at most 200 characters of the first question.
        """
        with self._transaction(write=False) as db:
            rows = db.execute(_SUMMARIES).fetchall()
        names = ("id", "channel", "began_ms", "turns", "up", "down", "corrected", "first_words")
        return [dict(zip(names, row, strict=True)) for row in rows]

    # Deleting.

    def delete(self, conversation_id: str) -> bool:
        """Delete a conversation and overwrite it; say whether it was there. Raises StoreError."""
        return bool(self._delete("DELETE FROM conversations WHERE id = ?", storable(conversation_id)))

    def delete_before(self, began_ms: int) -> int:
        """Delete conversations that began before a time and overwrite them; return how many. Raises StoreError."""
        return self._delete("DELETE FROM conversations WHERE began_ms < ?", began_ms)

    def delete_all(self) -> int:
        """Delete everything and overwrite it; return how many conversations there were. Raises StoreError."""
        return self._delete("DELETE FROM conversations")

    def _delete(self, statement: str, *values: str | int) -> int:
        with self._transaction() as db:
            deleted = db.execute(statement, values).rowcount
            db.execute("DELETE FROM models WHERE id NOT IN (SELECT model FROM turns)")
        if deleted:
            self.overwrite()
        return deleted

    def overwrite(self) -> None:
        """Make sure that nothing deleted is left in the file or its log. Raises StoreError, StillReadError if a reader prevents it."""
        with self._held() as db:
            db.executescript("PRAGMA incremental_vacuum")  # `execute` would free one page and stop
            # The log still holds pages as they were; emptied, it is cut to nothing.
            blocked = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if blocked:
            raise StillReadError(
                f"what was deleted may still be in {self._path}-wal, as another program is reading {self._path}; "
                "it goes when that is closed and Lorikeet opens the file again"
            )

    # One at a time.

    @contextmanager
    def _held(self) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread; what SQLite raises becomes a StoreError."""
        if not self._lock.acquire(timeout=BUSY_S):
            raise StoreError(f"{self._path} is busy; try again")
        try:
            yield self._db
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}; free some space or fix the file, and try again") from error
        finally:
            self._lock.release()

    @contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        """Give the connection inside a transaction, kept if the block ends well, undone if not."""
        with self._held() as db:
            # A writer takes its place at once: one that reads first and then writes could be refused without waiting.
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        db.execute("ROLLBACK")


def storable(text: str) -> str:
    """Return `text` with what no database tool and no tokenizer takes, NUL and lone surrogates, marked as U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text)


def _json(value: Any) -> str:
    return json.dumps(_all_storable(value), ensure_ascii=False)


def _all_storable(value: Any) -> Any:
    """Return a JSON value with each of its texts made storable."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list):
        return [_all_storable(item) for item in value]
    if isinstance(value, dict):
        return {name: _all_storable(item) for name, item in value.items()}
    return value


def _search_fields(note: Note) -> dict[str, Any] | None:
    if note.search_reason is None:
        return None
    sources = [asdict(source) for source in note.sources]
    return {"reason": note.search_reason, "failure": note.search_failure, "sources": sources}


def _model_number(db: sqlite3.Connection, origin: Origin) -> int:
    values = (storable(origin.name), origin.quant, origin.gguf_sha256, origin.adapter_sha256)
    db.execute("INSERT OR IGNORE INTO models (name, quant, gguf_sha256, adapter_sha256) VALUES (?, ?, ?, ?)", values)
    found = db.execute(
        "SELECT id FROM models WHERE (name, quant, gguf_sha256, adapter_sha256) = (?, ?, ?, ?)", values
    ).fetchone()
    return int(found[0])


def _turn_fields(row: Sequence[Any]) -> dict[str, Any]:
    (identity, began_ms, question, prompt, answer, outcome, search, timings_ms, *rest) = row
    prompt_tokens, completion_tokens, name, quant, gguf_sha256, adapter_sha256, *feedback = rest
    return {
        "id": identity,
        "began_ms": began_ms,
        "question": question,
        "prompt": json.loads(prompt),
        "answer": answer,
        "outcome": outcome,
        "search": json.loads(search),
        "timings_ms": json.loads(timings_ms),
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
        "model": {"name": name, "quant": quant, "gguf_sha256": gguf_sha256, "adapter_sha256": adapter_sha256},
        "feedback": dict(zip(RATED_FIELDS, feedback, strict=True)),
    }


def _now_ms() -> int:
    return round(time.time() * 1000)


def _prepare_file(path: Path, *, create: bool) -> None:
    """See to it that there is a file; a new one is its owner's alone."""
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is no file; name a file for the memory, such as memory.db")
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there; lorikeet serve RUN --memory {path} makes it") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; name a file for the memory, such as {path / 'memory.db'}") from error
    except OSError as error:
        raise _unopened(path, error) from error


def _unopened(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be opened: {error.strerror}; fix its rights, or name another file")


def _opening_error(path: Path, error: sqlite3.DatabaseError) -> Exception:
    """Return what an error of SQLite on opening means for the user."""
    if isinstance(error, sqlite3.OperationalError):
        return StoreError(f"{path} cannot be opened: {error}; free some space or fix its rights, or name another file")
    return InputError(f"{path} is damaged or no memory of Lorikeet ({error}); restore it, or name another file")


def _packaged_migrations() -> list[str]:
    """Return the scripts in `migrations/` in the order of their numbers."""
    folder = resources.files("lorikeet.serve") / "migrations"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
    return [file.read_text(encoding="utf-8") for file in files]


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script; SQLite itself says where each ends."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        yield statement


_UPSERT_TURN = """
INSERT INTO turns (id, conversation, model, began_ms, question, prompt, answer, outcome, search, timings_ms,
                   prompt_tokens, completion_tokens)
VALUES (:id, :conversation, :model, :began_ms, :question, :prompt, :answer, :outcome, :search, :timings_ms,
        :prompt_tokens, :completion_tokens)
ON CONFLICT (id) DO UPDATE SET answer = excluded.answer, outcome = excluded.outcome, timings_ms = excluded.timings_ms
"""

_TURNS_OF = """
SELECT t.id, t.began_ms, t.question, t.prompt, t.answer, t.outcome, t.search, t.timings_ms, t.prompt_tokens,
       t.completion_tokens, m.name, m.quant, m.gguf_sha256, m.adapter_sha256, f.rating, f.correction, f.comment
FROM turns t JOIN models m ON m.id = t.model LEFT JOIN feedback f ON f.turn = t.number
WHERE t.conversation = ? ORDER BY t.number
"""

_CONVERSATION_OF_TURN = """
SELECT c.id FROM turns t JOIN conversations c ON c.number = t.conversation WHERE t.id = ?
"""

_SUMMARIES = """
SELECT c.id, c.channel, c.began_ms, count(t.number), coalesce(sum(f.rating = 'up'), 0),
       coalesce(sum(f.rating = 'down'), 0), count(f.correction),
       coalesce((SELECT substr(question, 1, 200) FROM turns WHERE conversation = c.number ORDER BY number LIMIT 1), '')
FROM conversations c LEFT JOIN turns t ON t.conversation = c.number LEFT JOIN feedback f ON f.turn = t.number
GROUP BY c.number ORDER BY c.number
"""
