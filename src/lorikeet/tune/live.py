"""A plot of numbers in a terminal, from Braille characters: two dots wide and four high each."""

from __future__ import annotations

from collections.abc import Sequence

DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bit of each dot of a Braille character, by column and row (Unicode 2800 to 28FF)."""


def draw_line(values: Sequence[float], *, width: int, height: int) -> list[str]:
    """Return `values` as `height` lines of `width` characters, the newest at the right; [] for fewer than two values.

    More values than there are dots are averaged over each column.
    """
    if len(values) < 2:
        return []
    columns = min(2 * width, len(values))
    means = []
    for column in range(columns):
        first, last = column * len(values) // columns, (column + 1) * len(values) // columns
        means.append(sum(values[first:last]) / (last - first))
    low, high = min(means), max(means)
    rows = 4 * height
    cells = [[0] * width for _ in range(height)]
    for column, value in enumerate(means):
        place = column * (2 * width - 1) // max(1, columns - 1)
        level = round((high - value) / (high - low) * (rows - 1)) if high > low else rows - 1
        cells[level // 4][place // 2] |= DOTS[place % 2][level % 4]
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]
