"""A loss chart in the terminal: training as a line of braille dots, validation as marks over it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rich.text import Text

_LABEL = 7  # columns of the numbers on the left
# The dot at (column, row) of a braille character's 2 x 4.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def loss_chart(
    training: Sequence[tuple[int, float]],
    validation: Sequence[tuple[int, float]],
    *,
    width: int,
    height: int,
    last_step: int,
) -> list[Text]:
    """Lines of text: losses from top to bottom, steps from left to right, 0 to `last_step`.

    Args:
        training, validation: (step, loss), all finite.
        width, height: in characters; the height without the line of step numbers below. Less than 3 lines give nothing.
    """
    columns = width - _LABEL - 2
    if not training or columns < 10 or height < 3:
        return []
    dots = _columns_of(training, 2 * columns, last_step)
    shown = [*dots.values(), *(loss for _, loss in validation)]
    # A first step far above all others would press the rest into one line: the scale ends where 98% of the losses are.
    low, high = min(shown), sorted(shown)[math.ceil(0.98 * len(shown)) - 1]
    span = (high - low) or 1.0

    def row_of(loss: float, rows: int) -> int:
        return min(rows - 1, max(0, round((high - loss) / span * (rows - 1))))

    canvas = [[0] * columns for _ in range(height)]
    points = [(x, row_of(loss, 4 * height)) for x, loss in sorted(dots.items())]
    for (x0, y0), (x1, y1) in itertools.pairwise([points[0], *points]):
        for part in range(steps := max(x1 - x0, abs(y1 - y0), 1)):  # a straight line to the next point
            x, y = (round(b + (a - b) * part / steps) for a, b in ((x0, x1), (y0, y1)))
            canvas[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    marks = {(row_of(loss, height), min(columns - 1, step * columns // (last_step + 1))) for step, loss in validation}
    lines = []
    for row, cells in enumerate(canvas):
        label = f"{high - span * row / (height - 1):.3g}" if row in (0, height - 1) else ""
        line = Text(f"{label:>{_LABEL}} ", style="dim", no_wrap=True)
        for column, bits in enumerate(cells):
            is_mark = (row, column) in marks
            line.append("●" if is_mark else chr(0x2800 + bits), style="green" if is_mark else "cyan")
        lines.append(line)
    end = f"step {last_step}"
    axis = f"{'':{_LABEL}} 0{end:>{columns - 1}}"
    return [*lines, Text(axis, style="dim", no_wrap=True)]


def _columns_of(losses: Sequence[tuple[int, float]], num_columns: int, last_step: int) -> dict[int, float]:
    """The mean loss in each column of dots that has any."""
    found: dict[int, list[float]] = {}
    for step, loss in losses:
        found.setdefault(min(num_columns - 1, step * num_columns // (last_step + 1)), []).append(loss)
    return {column: sum(values) / len(values) for column, values in found.items()}
