"""The assistant's memory: keeps what was said, forgets what is too old, and never gets in an answer's way.

    memory = Memory.open(Path("memory.db"), days=30)
    assistant = Assistant(engine, memory=memory, origin=identify(Path("runs/mine/gguf/model-q8_0.gguf"), "mine"))

A turn that cannot be written is counted and said on stderr; its answer goes on. It exists only where the server was
told to keep anything. It knows no HTTP, no page and no audio.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorikeet.files import sha256_file
from lorikeet.serve.note import Note, Origin
from lorikeet.serve.store import StillReadError, Store, StoreError

MAX_CORRECTION_CHARACTERS = 64_000

DAY_S = 24 * 3600
SAY_AGAIN_S = 60.0
"""A failure that lasts is said so often, not at every turn."""

_log = logging.getLogger(__name__)


class Memory:
    """Keeps turns in a store; one object serves any number of threads and models."""

    def __init__(self, store: Store, *, days: int = 0) -> None:
        """Keep turns in `store`; conversations that began more than `days` days ago are deleted, 0 for never.

        Raises StoreError if the old ones cannot be deleted now.
        """
        self._store = store
        self._days = days
        self.kept_turns = 0
        self.failed_turns = 0
        self._last_said_s = -SAY_AGAIN_S
        self._closing = threading.Event()
        self._forget_old()
        self._thread = threading.Thread(target=self._sweep_daily, name="memory", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path, *, days: int = 0) -> Memory:
        """Return the memory in the file at `path`, made if need be. Raises as `Store.open` does."""
        store = Store.open(path)
        try:
            return cls(store, days=days)
        except BaseException:
            store.close()
            raise

    def __enter__(self) -> Memory:
        """Return the memory itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._closing.set()
        self._thread.join()
        self._store.close()

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._store.path

    @property
    def days(self) -> int:
        """After so many days a conversation is deleted; 0 for never."""
        return self._days

    def keep(self, note: Note) -> None:
        """Write a turn; `note.kept` says where it is, None if it could not be written. Raises nothing."""
        try:
            note.kept = self._store.keep(note)
        except StoreError as error:
            self.failed_turns += 1
            self._say(f"a turn was not kept: {error}")
        else:
            self.kept_turns += 1

    def rate(self, turn_id: str, changes: Mapping[str, str | None]) -> dict[str, Any] | None:
        """Set rating, correction or comment of a turn, as `Store.rate` does."""
        return self._store.rate(turn_id, changes)

    def conversation(self, conversation_id: str) -> dict[str, Any] | None:
        """Return a conversation, as `Store.conversation` does."""
        return self._store.conversation(conversation_id)

    def forget(self, conversation_id: str) -> bool:
        """Delete a conversation; say whether it was there. Raises StoreError."""
        try:
            return self._store.delete(conversation_id)
        except StillReadError as error:  # it is gone from the conversations; the daily sweep tries again
            self._say(str(error))
            return True

    def forget_turn(self, turn_id: str) -> bool:
        """Delete the conversation that a turn belongs to; say whether there was one. Raises StoreError."""
        conversation_id = self._store.conversation_of(turn_id)
        return conversation_id is not None and self.forget(conversation_id)

    def _forget_old(self) -> None:
        """Delete what is too old, and overwrite what an earlier end left behind."""
        try:
            if self._days:
                self._store.delete_before(round((time.time() - self._days * DAY_S) * 1000))
            self._store.overwrite()
        except StillReadError as error:
            self._say(str(error))

    def _sweep_daily(self) -> None:
        while not self._closing.wait(DAY_S):
            try:
                self._forget_old()
            except StoreError as error:
                self._say(f"old conversations were not deleted: {error}")

    def _say(self, line: str) -> None:
        now_s = time.monotonic()
        if now_s - self._last_said_s >= SAY_AGAIN_S:
            self._last_said_s = now_s
            _log.warning("memory: %s", line)


def identify(target: Path | str, name: str, *, hashes: bool = True) -> Origin:
    """Return what is known of a served target: a GGUF file of a run, another GGUF file, or a server's URL.

    A run's manifest knows the file's hash and the adapter in it; another file is hashed, at about a second a gigabyte,
    unless `hashes` is False.
    """
    if isinstance(target, str):
        return Origin(name=name)
    entry = _manifest_entry(target)
    return Origin(
        name=name,
        quant=target.stem.removeprefix("model-") if entry else "",
        gguf_sha256=entry.get("sha256", {}).get(target.name) or (sha256_file(target) if hashes else ""),
        adapter_sha256=entry.get("adapter_sha256", ""),
    )


def _manifest_entry(gguf: Path) -> dict[str, Any]:
    """Return what the run that a GGUF file lies in says of it; {} if it is no run's."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        manifest = json.loads((gguf.resolve().parent.parent / "run.json").read_text(encoding="utf-8"))
        entry = manifest.get("artefacts", {}).get(f"gguf/{gguf.name}", {})
        return entry if isinstance(entry, dict) else {}
    return {}
