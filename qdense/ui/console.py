"""The console, what displays have in common, and the format of sizes, durations and percentages."""

from __future__ import annotations

import io
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, TextIO, TypeVar, cast

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qdense.events import Download, Notice
from qdense.text import clean, without_secrets

_T = TypeVar("_T")
_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN_INTERVAL_SECONDS = 10.0


def make_console(stream: TextIO | None = None) -> Console:
    # No markup: "[/x]" in a folder's name or in somebody's adapter is text.
    return Console(file=stream or sys.stdout, highlight=False, soft_wrap=False, markup=False, emoji=False)


def drawn(draw: Callable[[Console], None]) -> str:
    """What `draw` prints, as text for a file."""
    console = Console(file=io.StringIO(), width=120, color_system=None, highlight=False, markup=False, emoji=False)
    draw(console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().split("\n"))


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as at most `width` bars, each the mean of its share, scaled between smallest and largest."""
    if not values or width < 1:
        return ""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(_BLOCKS[round((mean - low) / span * (len(_BLOCKS) - 1))] for mean in means)


def duration(seconds: float) -> str:
    """1:05, 2:03:04 or 3d 04:05."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        days, hours = divmod(hours, 24)
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def plain_decimals(number: float, digits: int) -> str:
    """ "0.00048", "4.1", "240": this many significant digits and no exponent. All digits before the point are kept."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    text = f"{number:.{max(0, digits - 1 - math.floor(math.log10(abs(number))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def accuracy_text(scored: Mapping[str, Any], digits: int = 1) -> str:
    """ "53.1 [41.1, 64.8]" from an accuracy with its interval; `digits` are those of the interval."""
    low, high = scored["interval"]
    separator = ", " if digits else ","  # without digits, the column is narrow
    return f"{100 * scored['accuracy']:.1f} [{100 * low:.{digits}f}{separator}{100 * high:.{digits}f}]"


def facts_panel(title: str, facts: Sequence[tuple[str, str]]) -> Panel:
    """Labels and values, framed under a title."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(ratio=1)
    for label, value in facts:
        grid.add_row(label, Text(clean(value)))
    return Panel(grid, title=Text(clean(title), style="bold"), title_align="left", border_style="dim")


class _Unbreakable:
    """A stream whose reader may go away (a closed terminal, `| head`). Only what is written after that is lost."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text), len(text))

    def flush(self) -> None:
        self._try(self._stream.flush, None)

    def _try(self, action: Callable[[], _T], instead: _T) -> _T:
        try:
            return action()
        except OSError:
            with suppress(OSError, ValueError):  # so that the interpreter's last flush does not fail either
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return instead

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Display:
    """A job on the screen: `with Display(console) as show: job(emit=show)`.

    Subclasses keep their state in `update`, draw it in `render`, and print it as a line in `plain`.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False) -> None:
        self.console, self.clock, self.quiet = console, clock, quiet
        console.file = cast("IO[str]", _Unbreakable(console.file))  # a job must not end because nobody is watching
        self._live: Live | None = None
        self._last_plain = -_PLAIN_INTERVAL_SECONDS
        self.status = ""

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.quiet:
            self._live = Live(
                get_renderable=self.render, console=self.console, refresh_per_second=4, vertical_overflow="visible"
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self.status = ""
            self._live.stop()

    def __call__(self, event: Any) -> None:
        self.update(event)
        if isinstance(event, Notice):
            text = clean(without_secrets(event.text))
            if event.level == "warning":
                self._print(Text.assemble(("warning: ", "yellow"), text), even_if_quiet=True)
            elif self._live is None:
                self._print(Text(text))
            self.status = text if event.level == "info" else self.status
        elif isinstance(event, Download):
            total = f" of {size(event.total_bytes)}" if event.total_bytes else ""
            self.status = f"downloading {event.name}: {size(event.num_bytes)}{total}"
            if self._live is None and self._is_time():
                self._print(Text(clean(self.status)))
        elif self._live is None:
            line = self.plain(event)
            if line:
                self._print(Text(clean(line)))

    def _print(self, text: Text, *, even_if_quiet: bool = False) -> None:
        if not self.quiet or even_if_quiet:
            # Lines of a log are not wrapped; its reader can do that.
            self.console.print(text, soft_wrap=not self.console.is_terminal)

    def _is_time(self) -> bool:
        now = self.clock()
        if now - self._last_plain < _PLAIN_INTERVAL_SECONDS:
            return False
        self._last_plain = now
        return True

    def _status_line(self) -> list[RenderableType]:
        return [Text(clean(self.status), style="dim", overflow="ellipsis", no_wrap=True)] if self.status else []

    def update(self, event: Any) -> None:
        raise NotImplementedError

    def render(self) -> RenderableType:
        raise NotImplementedError

    def plain(self, event: Any) -> str | None:
        raise NotImplementedError
