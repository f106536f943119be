"""The display of `qdense evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qdense.benchmarks.accuracy import wilson_interval
from qdense.benchmarks.scoring import RULES
from qdense.errors import counted
from qdense.events import EvaluationDone, EvaluationProgress, EvaluationStarted
from qdense.text import clean
from qdense.ui.console import Display, accuracy_text, facts_panel

_NARROW, _WIDE = 80, 100  # columns


class EvaluationDisplay(Display):
    """A table that fills as completions arrive: a row for each task and model, both rules with their intervals; for a person's
    own tasks the strict rule alone."""

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
            parts.append(facts_panel(self.started.title, self.started.facts))
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
        for name in ("items", *(("correct %",) if self._rules == ("strict",) else ("paper %", "strict %"))):
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
    def _rules(self) -> tuple[str, ...]:
        assert self.started
        return ("strict",) if self.started.are_own else RULES

    @property
    def _has_room_for_counts(self) -> bool:
        """Columns for completions that hit the token limit and for items without an answer by the strict rule; otherwise a
        line."""
        return self.console.width >= _WIDE

    def _counts_line(self) -> str:
        assert self.started
        columns, truncated, without = self.started.columns, [], []
        for column in columns:
            results = [self._result(task, column == columns[-1]) for task in self.started.tasks]
            truncated.append(sum(result["num_truncated"] for result in results))
            without.append(sum(result["strict"]["num_without_answer"] for result in results))
        more = "; --max-new-tokens raises it" if any(truncated) else ""
        if len(columns) == 1:
            missing = "" if self.started.are_own else f", {counted(without[0], 'item')} without an answer (strict)"
            return f"{counted(truncated[0], 'answer')} cut off at the token limit{more}{missing}"

        def each(numbers: list[int]) -> str:
            return ", ".join(f"{column} {number:,}" for column, number in zip(columns, numbers, strict=True))

        missing = "" if self.started.are_own else f"; items without an answer (strict): {each(without)}"
        return f"answers cut off at the token limit: {each(truncated)}{more}{missing}"

    def _result(self, task: str, is_last: bool) -> dict[str, Any]:
        assert self.done
        summary = self.done.summary
        result: dict[str, Any] = (summary if is_last else summary["base"])["tasks"][task]
        return result

    def _add_result(self, table: Table, names: tuple[str, str], result: dict[str, Any], style: str) -> None:
        digits = 0 if self.console.width < _NARROW else 1
        shares = [accuracy_text(result[rule], digits) for rule in self._rules]
        has_counts = len(table.columns) > 3 + len(self._rules)
        counts = [f"{result['num_truncated']:,}", f"{result['strict']['num_without_answer']:,}"] if has_counts else []
        table.add_row(*names, f"{result['num_scored']:,}", *shares, *counts, style=style)
        samples = result.get("num_samples", 1)
        if samples > 1:
            ks = [f"{100 * result[rule]['pass_at'][str(samples)]:.1f}" for rule in self._rules]
            table.add_row("", f" pass@{samples}", "", *ks, style="dim")
        if "clean" in result:
            left = result["clean"]
            shares = [accuracy_text(left[rule], digits) if left["num_items"] else "-" for rule in self._rules]
            table.add_row("", " clean", f"{result['clean']['num_items']:,}", *shares, style="dim")

    def _add_progress(
        self, table: Table, names: tuple[str, str], progress: EvaluationProgress | None, style: str
    ) -> None:
        if progress is None or not progress.num_done:
            table.add_row(*names, "", *[""] * len(self._rules), style="dim")
            return
        of = f"/{progress.num_items}" if progress.num_done < progress.num_items else ""
        digits = 0 if self.console.width < _NARROW else 1
        shares = []
        for rule in self._rules:
            num_correct = progress.num_correct[rule]
            interval = wilson_interval(num_correct, progress.num_done)
            shares.append(accuracy_text({"accuracy": num_correct / progress.num_done, "interval": interval}, digits))
        table.add_row(*names, f"{progress.num_done}{of}", *shares, style=style)

    def _done_line(self) -> str:
        assert self.done
        counts = "" if self._has_room_for_counts else self._counts_line() + ". "
        if self.started and self.started.are_own:
            counts += (
                "An answer is right if it equals the completion in your file; for free text this says little (--show 5 prints "
                "answers). "
            )
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
