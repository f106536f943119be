"""metrics.jsonl: one line for each step, validation and sample, complete and without repeats after any number of resumes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdense.cache import write_atomically
from qdense.events import Sampled, StepDone, Validated

_NAMES = {StepDone: "step", Validated: "validation", Sampled: "sample"}


class MetricsFile:
    """Appends steps, validations and samples. For a resume it first drops the lines after the checkpoint's step."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        seconds = [line.get("seconds") for line in kept if line["event"] == "step"]
        self.seconds = max((float(value) for value in seconds if isinstance(value, int | float)), default=0.0)
        self._stream = path.open("a", encoding="utf-8")

    def __call__(self, event: Any) -> None:
        if (name := _NAMES.get(type(event))) is not None:
            values = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN
                for key, value in asdict(event).items()
            }
            self._stream.write(json.dumps({"event": name, **values}) + "\n")
            self._stream.flush()

    def sync(self) -> None:
        """Flush all lines to disk, so that they survive a power cut."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. A crash may have cut one short, in the middle of the file after a resume; lines that are not
    an event are skipped."""
    return parse_metrics(path.read_text(encoding="utf-8", errors="replace"))


def parse_metrics(content: str) -> list[dict[str, Any]]:
    """The lines of part of a metrics file. See `read_metrics`."""
    lines = []
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and line.get("event") in _NAMES.values():
            lines.append(line)
    return lines
