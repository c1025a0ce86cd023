"""What is served: each model with its assistant and its facts, in the order in which they are listed.

    models = Models(Served(name="mine", assistant=assistant, kind="tuned", quant="q8_0", sha256="…", proved=True))
    models.choose("default").assistant.respond(...)

The first is the default. A request names one model and sees that one's assistant alone: each model has an engine of its
own, so no cached prefix is ever shared between two of them. It knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

from lorikeet.errors import InputError
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.note import Origin

DEFAULT = "default"
"""The name that always means the first model."""


class UnknownModelError(InputError):
    """A request names a model that is not served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model that can be asked for."""

    name: str
    """What clients see and ask for."""
    assistant: Assistant
    kind: Literal["tuned", "base", "file", "remote"] = "file"
    """A run's tuned model, its base, a GGUF file of unknown origin, or another server's model."""
    quant: str = ""
    """The GGUF type; '' where it is not known."""
    sha256: str = ""
    """Hash of the GGUF file that the engine loaded; '' for a remote model."""
    adapter_sha256: str = ""
    """Hash of the run's adapter weights, which are merged into a tuned model's file; '' for others."""
    proved: bool = False
    """Whether the run's proof is about exactly this file."""

    @classmethod
    def of(cls, origin: Origin, assistant: Assistant, *, proved: bool = False) -> Self:
        """Return the model that `assistant` answers with, and what is known of it; kept turns say the same.

        `proved` says that a run's proof is about its file; without an adapter in it that is the base.
        """
        without = "base" if proved else "file" if origin.gguf_sha256 else "remote"
        return cls(
            name=origin.name,
            assistant=assistant,
            kind="tuned" if origin.adapter_sha256 else without,  # type: ignore[arg-type]
            quant=origin.quant,
            sha256=origin.gguf_sha256,
            adapter_sha256=origin.adapter_sha256,
            proved=proved,
        )


class Models:
    """The models of one server, by name."""

    def __init__(self, *served: Served) -> None:
        """Serve these; the first is the default. Raises InputError if there is none, or two share a name."""
        self._served = {model.name: model for model in served}
        if not served or len(self._served) < len(served) or DEFAULT in self._served:
            names = ", ".join(model.name for model in served) or "none"
            raise InputError(f"models to serve: {names}; each needs a name of its own, other than {DEFAULT}")

    def __iter__(self) -> Iterator[Served]:
        """Iterate over the models, the default first."""
        return iter(self._served.values())

    @property
    def default(self) -> Served:
        """The model that is meant where none is named."""
        return next(iter(self))

    def choose(self, name: str) -> Served:
        """Return the model of that name, or the default for `default`. Raises UnknownModelError."""
        if name == DEFAULT:
            return self.default
        try:
            return self._served[name]
        except KeyError:
            served = ", ".join(repr(model.name) for model in self)
            raise UnknownModelError(
                f"model: {name[:100]!r} is not served here; ask for {served} or {DEFAULT!r}"
            ) from None
