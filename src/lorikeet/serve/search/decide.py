"""When a question needs the web, and why, in words for the user."""

from __future__ import annotations

import re
from datetime import date

KEYWORDS = ("current", "currently", "latest", "recent", "recently", "today", "weather", "price", "prices")
"""Words that ask for something a model cannot know."""


def decide(question: str, *, today: date) -> str | None:
    """Return why `question` asks for a search, such as `you asked about "weather"`; None if it does not.

    Besides the keywords, this year's number and last year's count: a model's knowledge ends before them.
    """
    years = (str(today.year), str(today.year - 1))
    found = re.search(rf"\b({'|'.join((*KEYWORDS, *years))})\b", question, re.IGNORECASE)
    return f'you asked about "{found.group(0).lower()}"' if found else None
