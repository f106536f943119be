"""Signals that end a run: the first stops it after the current step, the second at once."""

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
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        notice = Notice(
            f"{named(self.received)}: stopping after this step, with a checkpoint; a second one stops at once",
            "warning",
        )
        # In a thread, because the signal may have interrupted a write of the display.
        threading.Thread(target=self._emit, args=(notice,), daemon=True).start()
