"""Signals that end a run: the first stops it after the current step, a second one of the same kind at once.

Of the same kind, because a launcher sends SIGTERM to its processes when it receives the Ctrl-C that they have received too.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from qdense.events import Emit, Notice

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def named(received: signal.Signals) -> str:
    """What a person calls this signal."""
    return "Ctrl-C" if received == signal.SIGINT else received.name


class StopSignals:
    """Within it, Ctrl-C, SIGTERM and a closed terminal only set `received`. Outside the main thread it does nothing.

    Attributes:
        received: the first signal that came, or None.
    """

    def __init__(self, emit: Emit) -> None:
        self.received: signal.Signals | None = None
        self._emit = emit
        self._seen: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup, a closed terminal is ignored
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            raise KeyboardInterrupt
        self._seen.add(number)
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        notice = Notice(
            f"{named(self.received)}: stopping after this step, with a checkpoint; a second one stops at once",
            "warning",
        )
        # In a thread, because the signal may have interrupted a write of the display.
        threading.Thread(target=self._emit, args=(notice,), daemon=True).start()
