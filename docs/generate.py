"""Write `docs/reference/commands.md` from the command line itself; `--check` says whether it is up to date.

.venv/bin/python docs/generate.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from lorikeet.cli import app

TARGET = Path(__file__).parent / "reference" / "commands.md"


def commands() -> str:
    """Return the reference of every command, in Markdown."""
    text = app.generate_docs(output_format="markdown")
    return "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"


def main() -> int:
    """Write the reference, or compare it; return 1 if it is out of date."""
    if "--check" in sys.argv[1:]:
        if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == commands():
            return 0
        print("docs/reference is out of date; run: make docs", file=sys.stderr)
        return 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(commands(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
