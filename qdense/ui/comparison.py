"""The tables of `qdense compare`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qdense.comparison.tables import Sheet, interval, p_value, parts_of, percent, sheets
from qdense.text import clean
from qdense.ui.console import plain_decimals


def show_comparison(console: Console, comparison: Mapping[str, Any]) -> None:
    """The result of `qdense compare`: the runs, all accuracies side by side, each group with its intervals and tests, notes."""
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
        how = f"{100 * comparison['confidence']:.0f}% intervals: Wilson's for a run on a task, else a bootstrap of "
        how += f"{comparison['num_draws']:,} draws; Holm: p adjusted for the number of tasks"
        console.print(_hanging("-", f"percent right by the {comparison['rule']} rule; {how}", "dim"))
    for note in comparison["notes"]:
        console.print(_hanging("-", note, "dim"))


def _hanging(label: str, text: str, style: str) -> Table:
    """A label, and a text with a hanging indent."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=max(1, len(label)), no_wrap=True, style=style)
    grid.add_column(overflow="fold", style=style)
    grid.add_row(label, Text(clean(text)))
    return grid


def _group_facts(group: Mapping[str, Any]) -> str:
    facts = [f"{group['name']} on {group['model']}" if group["method"] else group["name"]]
    if group["trainable_parameters"] is not None:
        facts.append(f"{group['trainable_parameters']:,} trained ({plain_decimals(group['trainable_percent'], 2)}%)")
    seeds = [str(run["seed"]) for run in group["runs"] if run["seed"] is not None]
    if seeds:
        facts.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}")
    return ", ".join(facts)


def _show_sheet(console: Console, sheet: Sheet) -> None:
    """Rows by kind, each under its name; as many columns at a time as fit the console."""
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
            # A table for each kind, with its name above it, because in a cell it would widen the column.
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
    """A row for each task: items (for the reference), accuracy, spread over seeds, difference and p values (for the others)."""
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
        cells.append(f"{percent(accuracy['accuracy'])} {interval(*accuracy['interval'], comma=comma)}")
        if is_pooled:
            cells.append(f"{percent(min(accuracy['by_seed']))} to {percent(max(accuracy['by_seed']))}")
        if part:
            spread = interval(*part["interval"], is_signed=True, comma=comma)
            cells.append(f"{100 * part['difference']:+.1f} {spread}")
            cells += [p_value(part["p"]), p_value(part["p_holm"])] if "p" in part else ["", ""]
        table.add_row(Text(clean(task)), *cells, style="bold" if task == "average" else "")
    return table
