"""The exceptions that a person may see, each one line: what is wrong, where, and what to do.

    LorikeetError            exit code 1
    +-- Interrupted          exit code 130 stopped by Ctrl-C or SIGTERM, nothing lost
    +-- InputError           exit code 2   the user's input is at fault
    |   `-- RequestError                   one HTTP request is at fault (answered with 400)
    `-- MachineError         exit code 3   the machine is: disk, memory, network, a missing package
        +-- MissingExtraError
        +-- HubError
        `-- EngineError

`cli.main` turns each into its line on stderr and its exit code; `serve.http` maps them to responses.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

NO_MEMORY = (
    "DefaultCPUAllocator",
    "bad_alloc",
    "Cannot allocate memory",
    "cannot allocate memory",
    "failed to map segment",
    "can't start new thread",
    "Unable to create type object",
    " out of memory",
)
"""What torch, C++, the loader of libraries, Python's threads, pybind and CUDA say when memory runs out: most have no exception for it."""


COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that command a terminal, or turn the order of what follows: data and file names may hold any."""


def printable(text: str) -> str:
    """Return `text` with every character that commands a terminal as its code; line breaks and tabs stay."""
    return COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error`, the one that it was raised from or while handling, the one that that was, and so on, each once."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        yield link
        seen.append(link)
        link = link.__cause__ or link.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error`, or one that it was raised from, means that memory ran out."""
    return any(
        isinstance(seen, MemoryError)
        or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM)
        or (isinstance(seen, RuntimeError | ImportError | SystemError) and any(text in str(seen) for text in NO_MEMORY))
        for seen in causes(error)
    )


class LorikeetError(Exception):
    """Root of every error that Lorikeet raises on purpose."""

    exit_code = 1


class InputError(LorikeetError):
    """The input is at fault: the message names the value, the place and what to do."""

    exit_code = 2


class Interrupted(LorikeetError):
    """The work was stopped from outside; the message says how to go on."""

    exit_code = 130


class RequestError(InputError):
    """A single request is at fault; the server answers it with 400 and goes on."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        """Say what is wrong, and in which `field` of the request, where it is known."""
        super().__init__(message)
        self.field = field


class MachineError(LorikeetError):
    """The machine cannot do it: disk, memory, network or a missing package."""

    exit_code = 3


class MissingExtraError(MachineError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        """Name the `package` that is missing and the `extra` that brings it."""
        super().__init__(f"{package} is not installed; it comes with: pip install 'lorikeet[{extra}]'")


class HubError(MachineError):
    """The Hugging Face hub could not be reached or refused."""


class EngineError(MachineError):
    """The engine could not start, stopped, or answered with an error."""
