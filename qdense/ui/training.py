"""The display of `qdense train`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qdense.events import (
    CheckpointSaved,
    Sampled,
    StepDone,
    TrainingDone,
    TrainingStarted,
    Validated,
    ValidationProgress,
)
from qdense.text import clean
from qdense.ui.chart import loss_chart
from qdense.ui.console import Display, duration, facts_panel, size, sparkline


class TrainingDisplay(Display):
    """Recipe and model; step, loss, validation, learning rate, gradient, speed, memory, time left."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False) -> None:
        super().__init__(console, clock, quiet=quiet)
        self.started: TrainingStarted | None = None
        self.step: StepDone | None = None
        self.done: TrainingDone | None = None
        self.losses: list[tuple[int, float]] = []
        self.validations: list[tuple[int, float]] = []
        self.samples: dict[str, Sampled] = {}
        self.step_seconds: list[float] = []
        self.validation: Validated | None = None
        self.best: Validated | None = None

    def update(self, event: Any) -> None:
        if isinstance(event, TrainingStarted):
            self.started, self.status = event, "first step"
        elif isinstance(event, StepDone):
            before = self.step.seconds if self.step else event.seconds - event.num_tokens / event.tokens_per_second
            self.step_seconds = [*self.step_seconds[-49:], event.seconds - before]
            self.step, self.status = event, ""
            self.losses += [(event.step, event.loss)] if math.isfinite(event.loss) else []
        elif isinstance(event, ValidationProgress):
            self.status = f"validating, batch {event.num_done} of {event.num_batches}"
        elif isinstance(event, Validated):
            self.validation, self.status = event, ""
            self.validations.append((event.step, event.loss))
            self.best = event if event.is_best else self.best
        elif isinstance(event, Sampled):
            self.samples[event.prompt] = event
        elif isinstance(event, CheckpointSaved):
            self.status = f"checkpoint saved at step {event.step}"
        elif isinstance(event, TrainingDone):
            self.done, self.status = event, ""

    def seconds_left(self) -> float | None:
        if not self.step or not self.started or not self.step_seconds:
            return None
        ordered = sorted(self.step_seconds)
        return ordered[len(ordered) // 2] * (self.started.num_steps - self.step.step)

    def _memory(self) -> str:
        assert self.step
        assert self.started
        return f"{self.started.memory_name} {size(self.step.memory_bytes)} of {size(self.started.memory_total_bytes)}"

    def render(self) -> RenderableType:
        parts: list[RenderableType] = []
        width = self.console.width
        if self.started:
            parts.append(facts_panel(self.started.title, self.started.facts))
        if self.step and self.started:
            total = self.started.num_steps
            bar = Table.grid(padding=(0, 1), expand=True)
            bar.add_column(no_wrap=True)
            bar.add_column(ratio=1)
            bar.add_column(no_wrap=True)
            left = self.seconds_left()
            time_left = "done" if self.done else f"{duration(left)} left" if left is not None else ""
            bar.add_row(
                f"step {self.step.step}/{total}, epoch {self.step.epoch:.2f}",
                ProgressBar(total=total, completed=self.step.step),
                f"{duration(self.step.seconds)}, {time_left}",
            )
            parts.append(bar)
            loss = f"loss {self.step.loss:.4f} "
            line = Text.assemble(("loss ", "dim"), (f"{self.step.loss:.4f} ", "bold"), no_wrap=True)
            chart = self._chart()
            if not chart:
                line.append(sparkline([each for _, each in self.losses], max(0, width - len(loss) - 1)), style="cyan")
            parts += [line, *chart]
            if self.validation and self.best:
                parts.append(
                    Text.assemble(
                        ("validation ", "dim"), (f"{self.validation.loss:.4f} ", "bold"), f"at step {self.validation.step}",
                        (f", best {self.best.loss:.4f} at step {self.best.step}", "dim"),
                    )
                )  # fmt: skip
            parts.append(
                Text.assemble(
                    ("learning rate ", "dim"), f"{self.step.learning_rate:.2e}  ",
                    ("gradient norm ", "dim"), f"{self.step.grad_norm:.3g}  ",
                    ("tokens/s ", "dim"), f"{self.step.tokens_per_second:,.0f}  ",
                    ("memory ", "dim"), self._memory(),
                )
            )  # fmt: skip
        for sample in self.samples.values():
            text = clean(f"{sample.prompt} → {sample.completion.strip()}".replace("\n", " "))
            parts.append(Text(text, overflow="ellipsis", no_wrap=True, style="dim"))
        parts += self._status_line()
        if self.done:
            parts.append(Text(self._done_line(), style="green"))
        return Group(*parts)

    def _chart(self) -> list[Text]:
        """The losses over the steps, where the terminal has room for it."""
        assert self.started
        others = 10 + len(self.started.facts) + len(self.samples)  # lines of this display, and a few for the shell's
        return loss_chart(
            self.losses,
            self.validations,
            width=min(100, self.console.width),
            height=min(8, self.console.height - others),
            last_step=self.started.num_steps,
        )

    def _done_line(self) -> str:
        assert self.done
        kept = f" (weights of step {self.done.kept_step})" if self.done.kept_step != self.done.num_steps else ""
        return clean(
            f"{self.done.num_steps} steps in {duration(self.done.seconds)}, peak memory {size(self.done.peak_memory_bytes)} "
            f"({size(self.done.predicted_memory_bytes)} predicted); "
            f"adapter in {self.done.adapter_dir}{kept}"
        )

    def plain(self, event: Any) -> str | None:
        if isinstance(event, TrainingStarted):
            return "\n".join([event.title, *(f"  {label}: {value}" for label, value in event.facts)]).replace(
                "\n", "; "
            )
        if isinstance(event, StepDone):
            assert self.started
            is_edge = event.step in (1, self.started.num_steps) or event.step == self.started.first_step + 1
            if not (self._is_time() or is_edge):
                return None
            left = self.seconds_left()
            return (
                f"step {event.step}/{self.started.num_steps} epoch {event.epoch:.2f} loss {event.loss:.4f} "
                f"lr {event.learning_rate:.2e} grad {event.grad_norm:.3g} {event.tokens_per_second:,.0f} tokens/s "
                f"{self._memory()}, {duration(left or 0)} left"
            )
        if isinstance(event, Validated):
            return f"step {event.step} validation loss {event.loss:.4f}{' (best)' if event.is_best else ''}"
        if isinstance(event, Sampled):
            return f"step {event.step} sample: {event.prompt} -> {event.completion.strip()}".replace("\n", " ")
        if isinstance(event, CheckpointSaved):
            return f"step {event.step} checkpoint {event.path}"
        if isinstance(event, TrainingDone):
            return self._done_line()
        return None
