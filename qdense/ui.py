"""Everything drawn in the terminal. State is kept apart from drawing: events go in, rich renderables come out.

On a terminal the display is live. In a pipe or a CI log it is plain lines, some seconds apart. Console and clock can be
given, so all of it can be tested.
"""

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
from typing import IO, TYPE_CHECKING, Any, TextIO, TypeVar, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qdense.benchmarks.accuracy import wilson_interval
from qdense.benchmarks.tasks import Task
from qdense.comparison.tables import Sheet, interval, p_value, parts_of, sheets
from qdense.comparison.tables import percent as bare_percent
from qdense.events import (
    CheckpointSaved,
    Download,
    EvaluationDone,
    EvaluationProgress,
    EvaluationStarted,
    Notice,
    StepDone,
    TrainingDone,
    TrainingStarted,
    Validated,
    ValidationProgress,
)
from qdense.methods import METHODS
from qdense.planning.parameters import ParameterCount
from qdense.text import clean, without_secrets

if TYPE_CHECKING:  # it would import torch, which most commands can do without
    from qdense.analysis import Analysis
    from qdense.doctor import Check
    from qdense.modeling.merge import MergeReport
    from qdense.planning.plan import Plan

_T = TypeVar("_T")
_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN_INTERVAL_SECONDS = 10.0
_NARROW, _WIDE = 80, 100  # columns


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
    """`values` in `width` characters at most, each the mean of its share, scaled between smallest and largest."""
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


def percent(scored: Mapping[str, Any], digits: int = 1) -> str:
    """ "53.1 [41.1, 64.8]" from an accuracy with its interval; `digits` are those of the interval."""
    low, high = scored["interval"]
    separator = ", " if digits else ","  # without digits, the column is narrow
    return f"{100 * scored['accuracy']:.1f} [{100 * low:.{digits}f}{separator}{100 * high:.{digits}f}]"


class _Unbreakable:
    """A stream whose reader may go away (a closed terminal, `| head`): what is written then is lost, and nothing else."""

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
            with suppress(OSError, ValueError):  # so that the interpreter's own last flush does not fail either
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return instead

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Display:
    """A job on the screen: `with Display(console) as show: job(emit=show)`.

    Subclasses keep their state in `update`, draw it in `render`, and say it in a line in `plain`.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False) -> None:
        self.console, self.clock, self.quiet = console, clock, quiet
        console.file = cast("IO[str]", _Unbreakable(console.file))  # no job ends because nobody is watching
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
            # Lines of a log are not wrapped: what reads them later may.
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


def _facts_panel(title: str, facts: Sequence[tuple[str, str]]) -> Panel:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(ratio=1)
    for label, value in facts:
        grid.add_row(label, Text(clean(value)))
    return Panel(grid, title=Text(clean(title), style="bold"), title_align="left", border_style="dim")


class TrainingDisplay(Display):
    """Recipe and model at a glance; step, loss, validation, learning rate, gradient, speed, memory, time left."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False) -> None:
        super().__init__(console, clock, quiet=quiet)
        self.started: TrainingStarted | None = None
        self.step: StepDone | None = None
        self.done: TrainingDone | None = None
        self.losses: list[float] = []
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
            self.losses += [event.loss] if math.isfinite(event.loss) else []
        elif isinstance(event, ValidationProgress):
            self.status = f"validating, batch {event.num_done} of {event.num_batches}"
        elif isinstance(event, Validated):
            self.validation, self.status = event, ""
            self.best = event if event.is_best else self.best
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
            parts.append(_facts_panel(self.started.title, self.started.facts))
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
            line.append(sparkline(self.losses, max(0, width - len(loss) - 1)), style="cyan")
            parts.append(line)
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
        parts += self._status_line()
        if self.done:
            parts.append(Text(self._done_line(), style="green"))
        return Group(*parts)

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
        if isinstance(event, CheckpointSaved):
            return f"step {event.step} checkpoint {event.path}"
        if isinstance(event, TrainingDone):
            return self._done_line()
        return None


class EvaluationDisplay(Display):
    """A table that fills while completions come: a row for each task and model, both rules with their intervals."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False) -> None:
        super().__init__(console, clock, quiet=quiet)
        self.started: EvaluationStarted | None = None
        self.progress: dict[tuple[str, str], EvaluationProgress] = {}
        self.done: EvaluationDone | None = None

    def update(self, event: Any) -> None:
        if isinstance(event, EvaluationStarted):
            self.started, self.status = event, ""
        elif isinstance(event, EvaluationProgress):
            self.progress[event.task, event.column] = event
            speed = f", {event.tokens_per_second:,.0f} tokens/s" if event.tokens_per_second else ""
            self.status = f"{event.task} with {event.column}: {event.num_done} of {event.num_items} items{speed}"
        elif isinstance(event, EvaluationDone):
            self.done, self.status = event, ""

    def render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self.started:
            parts.append(_facts_panel(self.started.title, self.started.facts))
            parts.append(self._table())
        parts += self._status_line()
        if self.done:
            parts.append(Text(clean(self._done_line()), style="green"))
        return Group(*parts)

    def _table(self) -> Table:
        assert self.started
        is_narrow = self.console.width < _NARROW
        table = Table(box=None, padding=(0, 1 if is_narrow else 3, 0, 0), header_style="dim")
        table.add_column("task", no_wrap=True)
        table.add_column("model", no_wrap=True, max_width=16 if is_narrow else 28)
        for name in ("items", "paper %", "strict %"):
            table.add_column(name, justify="right", no_wrap=True)
        if self.done and self._has_room_for_counts:
            for name in ("cut off", "no answer"):
                table.add_column(name, justify="right", no_wrap=True)
        for task in self.started.tasks:
            for column in self.started.columns:
                is_last = column == self.started.columns[-1]
                style = "bold" if is_last and len(self.started.columns) > 1 else ""
                first = task if column == self.started.columns[0] else ""
                if self.done:
                    self._add_result(table, (first, clean(column)), self._result(task, is_last), style)
                else:
                    self._add_progress(table, (first, clean(column)), self.progress.get((task, column)), style)
        return table

    @property
    def _has_room_for_counts(self) -> bool:
        """For completions that hit the token limit, and items without an answer by the strict rule; else they are a line."""
        return self.console.width >= _WIDE

    def _counts_line(self) -> str:
        assert self.started
        results = [self._result(task, True) for task in self.started.tasks]
        num_truncated = sum(result["num_truncated"] for result in results)
        num_without = sum(result["strict"]["num_without_answer"] for result in results)
        return f"{num_truncated:,} completions cut off at the token limit, {num_without:,} items without an answer (strict)"

    def _result(self, task: str, is_last: bool) -> dict[str, Any]:
        assert self.done
        summary = self.done.summary
        result: dict[str, Any] = (summary if is_last else summary["base"])["tasks"][task]
        return result

    def _add_result(self, table: Table, names: tuple[str, str], result: dict[str, Any], style: str) -> None:
        digits = 0 if self.console.width < _NARROW else 1
        shares = [percent(result[rule], digits) for rule in ("paper", "strict")]
        counts = [f"{result['num_truncated']:,}", f"{result['strict']['num_without_answer']:,}"]
        table.add_row(
            *names, f"{result['num_scored']:,}", *shares, *(counts if len(table.columns) > 5 else ()), style=style
        )
        samples = result.get("num_samples", 1)
        if samples > 1:
            ks = [f"{100 * result[rule]['pass_at'][str(samples)]:.1f}" for rule in ("paper", "strict")]
            table.add_row("", f" pass@{samples}", "", *ks, style="dim")
        if "clean" in result:
            shares = [percent(result["clean"][rule], digits) for rule in ("paper", "strict")]
            table.add_row("", " clean", f"{result['clean']['num_items']:,}", *shares, style="dim")

    def _add_progress(
        self, table: Table, names: tuple[str, str], progress: EvaluationProgress | None, style: str
    ) -> None:
        if progress is None or not progress.num_done:
            table.add_row(*names, "", "", "", style="dim")
            return
        of = f"/{progress.num_items}" if progress.num_done < progress.num_items else ""
        digits = 0 if self.console.width < _NARROW else 1
        shares = []
        for rule in ("paper", "strict"):
            num_correct = progress.num_correct[rule]
            interval = wilson_interval(num_correct, progress.num_done)
            shares.append(percent({"accuracy": num_correct / progress.num_done, "interval": interval}, digits))
        table.add_row(*names, f"{progress.num_done}{of}", *shares, style=style)

    def _done_line(self) -> str:
        assert self.done
        counts = "" if self._has_room_for_counts else self._counts_line() + ". "
        return f"{counts}95% Wilson intervals; completions and summary.json in {self.done.summary['folder']}"

    def plain(self, event: Any) -> str | None:
        if isinstance(event, EvaluationStarted):
            return "; ".join([event.title, *(f"{label}: {value}" for label, value in event.facts)])
        if isinstance(event, EvaluationProgress):
            is_over = event.num_done == event.num_items
            return self.status if event.num_done and (self._is_time() or is_over) else None
        if isinstance(event, EvaluationDone):
            if not self.quiet:
                self.console.print(self._table())
            return self._done_line()
        return None


def show_score(console: Console, result: dict[str, Any]) -> None:
    """What `qdense score` found."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("rule", no_wrap=True)
    for name in ("right", "%, 95% Wilson", "no answer"):
        table.add_column(name, justify="right", no_wrap=True)
    for rule in ("paper", "strict"):
        scored = result[rule]
        table.add_row(rule, f"{scored['num_correct']:,}", percent(scored), f"{scored['num_without_answer']:,}")
        for k, share in scored.get("pass_at", {}).items():
            table.add_row(f"  pass@{k}", "", f"{100 * share:.1f}", "", style="dim")
    samples = f", the majority of {result['num_samples']} samples each" if "num_samples" in result else ""
    console.print(f"{result['task']}: {result['num_scored']:,} of {result['num_items']:,} items scored{samples}")
    console.print(table)


def show_contamination(console: Console, origin: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """What `qdense data check` found: a line for each task, then an example of each kind of match."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("task", no_wrap=True)
    for name in ("items", "exact", "near", "same numbers", "other numbers", "clean"):
        table.add_column(name, justify="right")
    keys = ("num_items", "num_exact", "num_near", "num_near_same_numbers", "num_near_other_numbers")
    for task, overlap in found.items():
        num_clean = len(overlap["clean_indices"])
        style = "yellow" if num_clean < overlap["num_items"] else ""
        table.add_row(task, *(f"{overlap[key]:,}" for key in keys), f"{num_clean:,}", style=style)
    console.print(Text(clean(f"test items in {origin}")))
    console.print(table)
    for task, overlap in found.items():
        for match in overlap["examples"]:
            is_near = match["kind"] != "exact"
            how = f"{100 * match['share']:.0f}% of its words, {match['kind']}" if is_near else match["kind"]
            console.print(Text(f"\n{task} item {match['item']}, training row {match['row']}: {how}", style="dim"))
            for label, text in (("test", match["test_text"]), ("training", match["training_text"])):
                console.print(Text(f"  {label}: {_excerpt(text)}"))


def _excerpt(text: str, length: int = 240) -> str:
    text = clean(" ".join(text.split()))
    return text if len(text) <= length else f"{text[:length]} ..."


def show_tasks(console: Console, tasks: Mapping[str, Task], groups: Mapping[str, Sequence[str]]) -> None:
    """The table of `qdense tasks`."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("task", no_wrap=True)
    table.add_column("items", justify="right", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    table.add_column("upstream's name", no_wrap=True)
    table.add_column("source", overflow="fold")
    for task in tasks.values():
        table.add_row(task.name, f"{task.num_items:,}", task.answers.name, task.upstream_name, task.source)
    console.print(table)
    for name, members in groups.items():
        console.print(f"{name}: {', '.join(members)}")


def show_comparison(console: Console, comparison: Mapping[str, Any]) -> None:
    """What `qdense compare` found: who is who, all accuracies side by side, each group with its intervals and tests, notes."""
    groups = comparison["groups"]
    for group in groups:
        console.print(_hanging(group["label"], ", ".join(run["run"] for run in group["runs"]), "bold"))
        console.print(_hanging("", _group_facts(group), "dim"))
    for sheet in sheets(comparison):
        console.print()
        _show_sheet(console, sheet)
    for group in groups:
        console.print()
        against = f" against {group['difference']['to']}: {group['difference']['test']}" if group["difference"] else ""
        console.print(Text(f"{group['label']}{against}", style="bold"))
        console.print(_group_table(group, comparison["num_items"], is_narrow=console.width < 100))
    console.print()
    if groups:
        drawn = f"{100 * comparison['confidence']:.0f}% intervals: Wilson's for a run on a task, else a bootstrap of "
        drawn += f"{comparison['num_draws']:,} draws; Holm: p adjusted for the number of tasks"
        console.print(_hanging("-", f"percent right by the {comparison['rule']} rule; {drawn}", "dim"))
    for note in comparison["notes"]:
        console.print(_hanging("-", note, "dim"))


def _hanging(label: str, text: str, style: str) -> Table:
    """A label, and text whose further lines stand under its first."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=max(1, len(label)), no_wrap=True, style=style)
    grid.add_column(overflow="fold", style=style)
    grid.add_row(label, Text(clean(text)))
    return grid


def _group_facts(group: Mapping[str, Any]) -> str:
    facts = [f"{group['name']} on {group['model']}" if group["method"] else group["name"]]
    if group["trainable_parameters"] is not None:
        facts.append(f"{group['trainable_parameters']:,} trained ({group['trainable_percent']:.2g}%)")
    seeds = [str(run["seed"]) for run in group["runs"] if run["seed"] is not None]
    if seeds:
        facts.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}")
    return ", ".join(facts)


def _show_sheet(console: Console, sheet: Sheet) -> None:
    """Rows by kind under its name; as many columns at a time as the console is wide."""
    names = [clean(line.name) for line in sheet.lines]
    first = min(max(map(len, names)), 24 if console.width >= 100 else 17)
    widths = [max(len(clean(column)), 5) for column in sheet.columns]
    parts: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if parts[-1] and first + sum(widths[j] + 1 for j in parts[-1]) + width + 1 > console.width:
            parts.append([])
        parts[-1].append(i)
    has_room = len(parts) == 1 and first + sum(widths) + len(widths) + len(" trainable %") <= console.width
    for part in parts:
        for i, kind in enumerate(dict.fromkeys(line.kind for line in sheet.lines)):
            # A table for each kind, its name above it: in a cell it would widen the column.
            table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim", show_header=i == 0)
            table.add_column("", width=first, overflow="fold")
            if has_room:
                table.add_column("trainable %", justify="right", width=len("trainable %"))
            for j in part:
                table.add_column(Text(clean(sheet.columns[j])), justify="right", width=widths[j], no_wrap=True)
            for name, line in zip(names, sheet.lines, strict=True):
                if line.kind == kind:
                    cells = [line.trainable] if has_room else []
                    table.add_row(Text(name), *cells, *(line.cells[j] for j in part))
            if kind != "ours":
                console.print(Text(kind, style="italic"))
            console.print(table)


def _group_table(group: Mapping[str, Any], num_items: Mapping[str, int], *, is_narrow: bool) -> Table:
    """A row for each task: items (of the reference), accuracy, spread of the seeds, difference and p values (of the others)."""
    difference, is_pooled = group["difference"], len(group["runs"]) > 1
    comma = "," if is_narrow else ", "
    table = Table(box=None, padding=(0, 1 if is_narrow else 3, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("task", no_wrap=True)
    titles = [] if difference else ["items"]
    titles += [f"{group['label']} %", *(["seeds"] if is_pooled else [])]
    titles += [f"{group['label']} - {difference['to']}", "p", "Holm"] if difference else []
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for task, accuracy, part in parts_of(group):
        cells = [] if difference else [f"{num_items[task]:,}" if task in num_items else ""]
        cells.append(f"{bare_percent(accuracy['accuracy'])} {interval(*accuracy['interval'], comma=comma)}")
        if is_pooled:
            cells.append(f"{bare_percent(min(accuracy['by_seed']))} to {bare_percent(max(accuracy['by_seed']))}")
        if part:
            spread = interval(*part["interval"], is_signed=True, comma=comma)
            cells.append(f"{100 * part['difference']:+.1f} {spread}")
            cells += [p_value(part["p"]), p_value(part["p_holm"])] if "p" in part else ["", ""]
        table.add_row(Text(clean(task)), *cells, style="bold" if task == "average" else "")
    return table


def show_methods(console: Console, counts: Sequence[ParameterCount]) -> None:
    """The table of `qdense params --method all`."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("method", "trainable", "%", ""):
        table.add_column(name, justify="right" if name in ("trainable", "%") else "left")
    for count in counts:
        table.add_row(
            count.method, f"{count.trainable_parameters:,}", f"{count.percent:.3g}", METHODS[count.method].summary
        )
    first = next(count for count in counts if count.r is not None)
    console.print(clean(f"{first.model}, {first.base_parameters:,} parameters; r {first.r} where the method has it"))
    console.print(table)


def show_merge(console: Console, report: MergeReport) -> None:
    """What `qdense merge` wrote, and what it cost."""
    console.print(clean(f"wrote {report.folder}: the adapter on {report.onto} weights, rounded to {report.held_in}"))
    console.print(
        f"lost to rounding: {100 * report.lost_median:.2g}% of an update in the median of {report.num_layers} layers, at most "
        f"{100 * report.lost_worst:.2g}% ({clean(report.worst_layer)})"
    )
    console.print(
        f"against the adapter beside that base: divergence {report.divergence:.2g} nats a token, the same most likely token for "
        f"{report.num_same:,} of {report.num_tokens:,}"
    )


def show_analysis(console: Console, analysis: Analysis) -> None:
    """The table of `qdense analyze`."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("")
    for name in ("elements", "slices", "change", "near 0", "unmoved", "eff. rank"):
        table.add_column(name, justify="right")
    for run, lines in itertools.groupby(analysis.summaries, key=lambda line: line.run):
        shown = list(lines)
        if shown[0].factor:
            table.add_row(Text(clean(run), style="bold"))
        for line in shown:
            rank = "" if line.effective_rank is None else f"{line.effective_rank:.1f}"
            near_zero = f"{100 * line.near_zero:.1f}%"
            if line.factor:
                counts = f"{line.num_elements:,}", f"{line.num_slices:,}", f"{100 * line.relative_change:.3g}%"
                table.add_row(f"  {clean(line.factor)}", *counts, near_zero, f"{100 * line.unmoved:.1f}%", rank)
            else:
                table.add_row(clean(line.run), "", "", "", near_zero, "", rank)
    console.print(table)
    console.print(
        f"Medians over slices of {analysis.side} x {analysis.side} (seed {analysis.seed}). change: over the initial values; over "
        f"the final ones of tensors that start at zero. near 0: below {analysis.near_zero:g} of the change's own. All RMS."
    )
    console.print(clean(f"wrote {', '.join(analysis.files)} to {analysis.folder}"))


_PARTS = {
    "weights": "weights of the base",
    "embeddings_and_head": "embeddings and output layer",
    "adapter": "adapter",
    "gradients": "its gradients",
    "optimizer": "optimizer, masters",
    "checkpoints": "checkpoints of recomputed layers",
    "activations": "activations",
    "passing_gradients": "gradients on their way",
    "logits": "logits, a slice at a time",
    "copies_of_weights": "copies of a weight in use",
}


def show_plan(console: Console, plan: Plan, title: str, longest_context_tokens: int) -> None:
    """The table of `qdense plan`: where each GiB goes at the highest moment, whether it fits, how it will run."""
    machine = plan.machine
    console.print(Text(clean(f"{title}: {plan.summary}"), style="bold"))
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for part, num_bytes in plan.memory.breakdown.items():
        if num_bytes:
            table.add_row(_PARTS[part], size(num_bytes))
    moments = {
        "forward": "in forward",
        "loss": "while the loss is computed",
        "recompute": "while a layer is recomputed",
        "backward": "in backward",
    }
    table.add_row(f"predicted peak, {moments[plan.memory.moment]}", size(plan.predicted_peak_bytes), style="bold")
    what = "CUDA's context, fragments" if machine.kernels.is_cuda else "the process itself, fragments"
    table.add_row(what, size(plan.needed_bytes - plan.predicted_peak_bytes))
    table.add_row(clean(f"of {machine.name}"), size(machine.memory_bytes))
    console.print(table)
    if plan.fits:
        console.print(Text(f"fits: {size(plan.needed_bytes)} of {size(machine.memory_bytes)}", style="green"))
    else:
        console.print(Text(f"does not fit: {size(plan.needed_bytes)} of {size(machine.memory_bytes)}", style="red"))
        for remedy in plan.remedies:
            console.print(Text(clean(f"  {remedy}")))
    console.print(f"longest row that fits, one at a time: {longest_context_tokens:,} tokens")
    if plan.choice.offload:
        console.print(f"host memory for checkpoints: {size(plan.host_bytes)}, pinned")
    if plan.speeds:
        speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in plan.speeds.items())
        console.print(f"tokens/s, predicted from shapes, not yet measured on a GPU: {speeds}")


def show_parameters(console: Console, count: ParameterCount) -> None:
    """The table of `qdense params`."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("module")
    table.add_column("trainable", justify="right")
    for name, number in count.by_module.items():
        table.add_row(name, f"{number:,}")
    table.add_row("all", f"{count.trainable_parameters:,}", style="bold")
    method = count.method if count.r is None else f"{count.method} r {count.r}"
    console.print(clean(f"{method} on {count.model}: {count.percent:.4g}% of {count.base_parameters:,} parameters"))
    console.print(table)


def show_doctor(console: Console, checks: Sequence[Check]) -> None:
    """The table of `qdense doctor`: a line for each check, its remedy beneath where it is bad."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True, style="bold")
    table.add_column("", overflow="fold")
    styles = {"good": "green", "bad": "bold red", "not here": "dim"}
    for check in checks:
        detail = Text(clean(check.detail))
        if check.remedy:
            detail.append(f"\n{clean(check.remedy)}", style="yellow")
        table.add_row(Text(check.state, style=styles[check.state]), Text(clean(check.name)), detail)
    console.print(table)
    num_bad = sum(check.state == "bad" for check in checks)
    if num_bad:
        console.print(Text(f"{num_bad} of {len(checks)} bad", style="bold red"))
    else:
        console.print(Text("nothing is bad", style="green"))
