"""Files that appear whole or not at all, their hashes, locks, and what a disk's errors mean.

    with atomic_folder(run / "adapter") as folder: ...     # written beside, renamed into place
    write_atomic(path, text)
    with alone(run, command="tune"): ...                   # no other process of this command is in the folder

It knows nothing of what the files hold.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lorikeet.errors import InputError, MachineError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
NO_SUCH_PLACE = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}

_LEFTOVER = re.compile(r"\.[a-z]+\.lock|\..+\.\d+\.part")

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust (safetensors, tokenizers) tell in the text of their own exceptions what the system said."""


def expanded(path: str) -> Path:
    """Return `path` with the home folder in the place of `~` or `~name`. Raises InputError where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no home folder of that name; write the path in full") from error


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the sha256 of `text` in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_tree(path: Path) -> dict[str, str]:
    """Return the sha256 of every file at or below `path`, by its name relative to it (a file's own name if it is one)."""
    if path.is_file():
        return {path.name: sha256_file(path)}
    return {str(file.relative_to(path)): sha256_file(file) for file in sorted(path.rglob("*")) if file.is_file()}


def _errno(error: BaseException | None) -> int | None:
    """Return the system's number of what went wrong; None for an error that is about something else."""
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found.group(1)) if found else None


def is_full(error: BaseException | None) -> bool:
    """Say whether `error` means that the disk, or what may be used of it, is full."""
    return _errno(error) in FULL


def disk_error(error: Exception, path: Path) -> Exception:
    """Return what `error` means for who asked for `path`; `error` itself if it is about something else.

    A full, read-only or failing disk is a MachineError, a path where nothing can be written an InputError.
    """
    number = _errno(error)
    said = os.strerror(number) if number is not None else ""
    if number in FULL:
        return MachineError(f"cannot write {path}: {said}; what was there is kept: free some space and try again")
    if number in REFUSED:
        return MachineError(f"cannot write {path}: {said}; fix its rights, or choose another disk")
    if number in NO_SUCH_PLACE:
        return InputError(f"cannot write {path}: {said}; name another place")
    return error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise what a disk's error in the block means for `path`: MachineError or InputError, as `disk_error` says."""
    try:
        yield
    except Exception as error:
        meant = disk_error(error, path)
        if meant is error:
            raise
        raise meant from error


@contextmanager
def alone(folder: Path, *, command: str) -> Iterator[None]:
    """Keep other processes of `command` out of `folder`, which is made if it is missing; a killed one holds nothing.

    Raises InputError if one is at work.
    """
    lock = FileLock(folder / f".{command}.lock", timeout=0)
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout as error:
        raise InputError(f"another lorikeet {command} is writing {folder}; wait for it to end, or stop it") from error
    try:
        yield
    finally:
        lock.release()


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files below a folder; 0 for what is not there."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def require_disk(path: Path, needed_bytes: int, *, removable: Sequence[Path] = ()) -> None:
    """Raise MachineError if the disk that `path` is or will be on has less than `needed_bytes` free.

    The message names those of `removable` that are there, the largest first.
    """
    parent = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise MachineError(
            f"{parent} has {free / 1e9:.1f} GB free and {needed_bytes / 1e9:.1f} GB are needed; free some or choose another disk"
            + could_go(removable)
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def could_go(removable: Sequence[Path]) -> str:
    """Return the end of a message that names what of `removable` is there with its size, the largest first; '' for nothing."""
    sizes = sorted(((size_bytes(file), file) for file in removable), reverse=True)
    named = ", ".join(f"{file} ({size / 1e9:.1f} GB)" for size, file in sizes[:4] if size)
    return f"; could go: {named}" if named else ""


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write `data` beside `path`, flush it to the disk and rename it into place; missing folders are made.

    Raises MachineError when the disk is at fault, InputError where `path` can be no file.
    """
    with atomic_file(path) as beside:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)


def write_changed(path: Path, text: str) -> None:
    """Write `text` like `write_atomic`, but leave a file alone that holds it already."""
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomic(path, text)


def is_leftover(path: Path) -> bool:
    """Say whether `path` is named as `alone` names its lock, or as what is written beside a file or folder."""
    return bool(_LEFTOVER.fullmatch(path.name))


def remove_leftovers(folder: Path, *, of: str = "*") -> None:
    """Remove what a killed process has left in or below `folder` of files and folders called `of`.

    A folder that was moved aside for its successor comes back if that one never arrived. No other process may be
    writing there.
    """
    for old in folder.rglob(f".{of}.*.old"):
        place = old.with_name(old.name[1:].rsplit(".", 2)[0])
        if place.exists():
            shutil.rmtree(old)
        else:
            old.rename(place)
    for path in folder.rglob(f".{of}.*.part"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    """Return where what will be `path` is written first."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; rename it into place if the block ends well, else remove it.

    Raises MachineError when the disk is at fault, InputError where `path` can be no file.
    """
    with writing(path):
        if not path.name or path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; name a file")
        beside = _beside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            _sync(beside)
            beside.replace(path)
            _sync(path.parent)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` to fill; put it in place of `path` if the block ends well, else remove it.

    Raises MachineError when the disk is at fault, InputError where `path` can be no folder.
    """
    with writing(path):
        if not path.name or path.is_file():
            raise InputError(f"cannot write {path}: no folder can be there; name another place")
        beside = _beside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            yield beside
            for file in (*beside.rglob("*"), beside):
                _sync(file)
            if path.exists():
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                path.rename(old)
                beside.rename(path)
                _sync(path.parent)
                shutil.rmtree(old)
            else:
                beside.rename(path)
                _sync(path.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
