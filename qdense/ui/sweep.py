"""The display of `qdense sweep`: what an experiment will cost, and its cells while they run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qdense.events import CellChanged, SweepProgress
from qdense.experiments.costs import ArmCost
from qdense.experiments.experiment import Experiment
from qdense.text import clean
from qdense.ui.console import Display, duration, plain_decimals, size

_MOST_SHOWN = 12  # ended cells in the live table
_RUNNING = ("training", "evaluating", "waiting")
_STYLES = {"trained": "green", "evaluated": "green", "failed": "red", "diverged": "yellow", "stopped": "yellow"}
_TABLE_CARDS = ("RTX 3090", "RTX 4090")  # where no card is known, those with a column of their own


def show_costs(console: Console, experiment: Experiment, costs: Sequence[ArmCost], prices: Mapping[str, float]) -> None:
    """A row for each arm, and the totals."""
    speeds = next((each.speeds for each in costs if each.speeds), {})
    cards = [card for card in _TABLE_CARDS if card in speeds] or list(speeds)[:1]
    is_measured = any(each.measured_seconds is not None for each in costs)
    console.print(Text(clean(experiment.title), style="bold"))
    if experiment.question:
        console.print(Text(clean(experiment.question), style="dim"))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("arm", overflow="fold")
    for name in ("left", "done", "rate", "trained", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for card in cards:
        table.add_column(f"{card.removeprefix('RTX ')} h", justify="right", no_wrap=True)
    if is_measured:
        table.add_column("took", justify="right", no_wrap=True)
    for each in costs:
        rate, plan = each.standing.learning_rate, each.plan
        failed = f" ({each.num_failed} failed)" if each.num_failed else ""
        table.add_row(
            clean(each.standing.arm.name),
            f"{'>= ' if rate is None else ''}{each.num_left}",
            f"{each.num_done}{failed}",
            "search" if rate is None else f"{rate:g}" if isinstance(rate, float) else rate,
            f"{each.trainable_parameters:,}" if each.trainable_parameters is not None else "",
            (size(plan.needed_bytes) if plan.fits else Text(f"{size(plan.needed_bytes)}: too much", style="red"))
            if plan
            else "",
            *(_hours(each, card) for card in cards),
            *([duration(each.measured_seconds) if each.measured_seconds is not None else ""] if is_measured else []),
        )
    console.print(table)
    machine = next((each.plan.machine.name for each in costs if each.plan), None)
    lines = []
    if machine is not None:
        lines.append(f"memory on {machine}; h: predicted hours of a run's training, without evaluation")
    if is_measured:
        lines.append("took: mean of the runs that are done")
    if any(each.is_bound for each in costs):
        lines.append("<= counts every row as data.max_length tokens")
    totals = []
    for card in speeds:
        hours = [each.hours(card) for each in costs]
        if all(one is not None for one in hours):
            total = sum((one or 0.0) * each.num_left for one, each in zip(hours, costs, strict=True))
            money = f" (costs {total * prices[card]:,.2f})" if card in prices else ""
            totals.append(f"{total:,.1f} h on {card}{money}")
    if totals:
        lines.append("left to train: " + ", ".join(totals))
    if is_measured and all(each.measured_seconds is not None for each in costs):
        seconds = sum((each.measured_seconds or 0.0) * each.num_left for each in costs)
        lines.append(f"left to train here, from the runs that are done: {duration(seconds)}")
    for line in lines:
        console.print(Text(clean(line), style="dim"))


def _hours(cost: ArmCost, card: str) -> str:
    hours = cost.hours(card)
    return "" if hours is None else f"{'<= ' if cost.is_bound else ''}{plain_decimals(hours, 2)}"


def show_problems(console: Console, problems: Sequence[tuple[str, str]], experiment: str) -> None:
    """What failed, each reason once, and how to try it again."""
    by_reason: dict[str, list[str]] = {}
    for name, problem in problems:
        by_reason.setdefault(problem, []).append(name)
    for problem, names in by_reason.items():
        runs = f" ({len(names)} runs)" if len(names) > 1 else ""
        named = f"{clean(', '.join(dict.fromkeys(names)))}{runs}"
        console.print(Text.assemble(("failed ", "red"), named, ": ", clean(problem)), soft_wrap=True)
    if problems:
        text = f"The rest is not affected. To try these again: qdense sweep {clean(experiment)} --retry"
        console.print(Text(text), soft_wrap=True)


class SweepDisplay(Display):
    """The cells at work, the last that ended, and how much is left."""

    def __init__(
        self, console: Console, title: str, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False
    ) -> None:
        super().__init__(console, clock, quiet=quiet)
        self.title = title
        self.cells: dict[str, CellChanged] = {}
        self.progress: SweepProgress | None = None

    def update(self, event: Any) -> None:
        if isinstance(event, CellChanged):
            self.cells.pop(event.key, None)  # the newest is last
            self.cells[event.key] = event
        elif isinstance(event, SweepProgress):
            self.progress = event

    def render(self) -> RenderableType:
        parts: list[RenderableType] = [Text(clean(self.title), style="bold")]
        running = [cell for cell in self.cells.values() if cell.state in _RUNNING]
        ended = [cell for cell in self.cells.values() if cell.state not in _RUNNING]
        room = max(3, min(_MOST_SHOWN, self.console.height - len(running) - 6))
        if self.cells:
            table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
            table.add_column("arm", overflow="ellipsis", no_wrap=True)
            for name in ("stage", "rate", "seed"):
                table.add_column(name, no_wrap=True)
            table.add_column("", no_wrap=True)
            table.add_column("validation loss", justify="right", no_wrap=True)
            for cell in [*ended[-room:], *running]:
                table.add_row(*self._row(cell))
            parts.append(table)
        if self.progress:
            total = self.progress.num_done + self.progress.num_left
            bar = Table.grid(padding=(0, 1), expand=True)
            bar.add_column(no_wrap=True)
            bar.add_column(ratio=1)
            bar.add_column(no_wrap=True)
            bar.add_row(
                f"{self.progress.num_done} of {total} runs",
                ProgressBar(total=max(1, total), completed=self.progress.num_done),
                self._left(),
            )
            parts.append(bar)
        parts += self._status_line()
        return Group(*parts)

    def _row(self, cell: CellChanged) -> tuple[RenderableType, ...]:
        return (
            Text(clean(cell.arm)),
            cell.stage,
            _rate(cell),
            "" if cell.stage == "base" else str(cell.seed),
            Text(_state(cell), style=_STYLES.get(cell.state, "")),
            f"{cell.loss:.4f}" if cell.loss is not None else "",
        )

    def _left(self) -> str:
        assert self.progress
        failed = f", {self.progress.num_failed} failed" if self.progress.num_failed else ""
        seconds = self.progress.seconds_left
        if not self.progress.num_left:
            return f"done{failed}"
        return (
            f"about {duration(seconds)} left{failed}"
            if seconds is not None
            else f"{self.progress.num_left} left{failed}"
        )

    def plain(self, event: Any) -> str | None:
        if isinstance(event, CellChanged):
            if event.state in ("training", "waiting") and not self._is_time():
                return None
            named = ", ".join(part for part in (event.stage, _rate(event)) if part)
            seed = f", seed {event.seed}" if event.stage != "base" else ""
            loss = f", validation loss {event.loss:.4f}" if event.loss is not None else ""
            return f"{event.arm} ({named}{seed}): {_state(event)}{loss}{f': {event.text}' if event.text else ''}"
        if isinstance(event, SweepProgress):
            return f"{event.num_done} of {event.num_done + event.num_left} runs done, {self._left()}"
        return None


def _rate(cell: CellChanged) -> str:
    return f"{cell.learning_rate:g}" if isinstance(cell.learning_rate, float) else cell.learning_rate


def _state(cell: CellChanged) -> str:
    if cell.state == "training":
        return f"step {cell.step}{f' of {cell.num_steps}' if cell.num_steps else ''}" if cell.step else "starting"
    return "trained elsewhere: waiting" if cell.state == "waiting" else cell.state
