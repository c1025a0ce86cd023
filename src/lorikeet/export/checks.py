"""What a certificate is made of: checks whose value must be at most a limit.

    checks = Checks()
    checks.add("kl_mean_q8_0", value, limit, artefact="gguf/model-q8_0.gguf")
    checks.fault("template", "gguf/model-q8_0.gguf: its chat template is not the base's")
    checks.rows()

It does not know what is checked, nor why a limit is what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a certificate."""

    name: str
    value: float
    limit: float
    artefact: str
    """What it is about: `run`, `adapter`, `merged` or a file in gguf/."""
    notes: list[str]
    """What was found, in words; the first ones if there are many."""

    @property
    def passed(self) -> bool:
        """Whether the value is a number at most the limit."""
        return math.isfinite(self.value) and self.value <= self.limit

    def row(self) -> dict[str, Any]:
        """Return the check as it stands in `parity.json`; a value that is no number is null."""
        value = (round(self.value, 6) if isinstance(self.value, float) else self.value) if self._is_number() else None
        row = {"name": self.name, "value": value, "limit": self.limit, "pass": self.passed}
        return {**row, "artefact": self.artefact, "notes": self.notes}

    def _is_number(self) -> bool:
        return math.isfinite(self.value)


MOST_NOTES = 8


@dataclass(slots=True)
class Checks:
    """The checks of one certificate, in the order in which they are first named."""

    found: list[Check] = field(default_factory=list)
    _faults: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, name: str, value: float, limit: float, *, artefact: str, notes: list[str] | None = None) -> None:
        """Add a check with its value."""
        self.found.append(Check(name, value, limit, artefact, notes or []))

    def begin(self, name: str, *, artefact: str) -> None:
        """Add a check that counts faults and allows none; those found later are added with `fault`."""
        self._faults.setdefault((name, artefact), [])

    def fault(self, name: str, what: str, *, artefact: str = "run") -> None:
        """Count one fault under a check that allows none."""
        self._faults.setdefault((name, artefact), []).append(what)

    def all(self) -> list[Check]:
        """Return every check: those that count faults first."""
        counted = [Check(name, len(w), 0, artefact, _first(w)) for (name, artefact), w in self._faults.items()]
        return [*counted, *self.found]


def _first(faults: list[str]) -> list[str]:
    more = len(faults) - MOST_NOTES
    return [*faults[:MOST_NOTES], *([f"and {more} more"] if more > 0 else [])]
