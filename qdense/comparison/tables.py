"""A comparison as rows and columns, shared by Markdown and the terminal, and written as CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdense.benchmarks.tasks import GROUPS
from qdense.comparison.published import KINDS, WORKED_BACK
from qdense.text import markdown_escaped, markdown_table

AVERAGE = "avg"  # as in the paper; with "average" its Table 1 would not fit 80 columns
CSV_COLUMNS = (
    *("kind", "label", "name", "model", "method", "r", "trainable_parameters", "trainable_percent", "runs", "seeds"),
    *("rule", "task", "num_items", "percent", "low", "high", "percent_by_seed"),
    *("reference", "difference", "difference_low", "difference_high", "test", "p", "p_holm"),
    *("doubt", "source", "note"),
)


@dataclass(frozen=True)
class Line:
    """One row of a sheet: ours or a published one.

    Attributes:
        kind: one of `published.KINDS`.
        cells: the figures of the sheet's columns, or "".
    """

    kind: str
    name: str
    trainable: str
    cells: list[str]


@dataclass(frozen=True)
class Sheet:
    """All rows side by side; columns are tasks, then the average."""

    columns: list[str]
    lines: list[Line]


def sheets(comparison: Mapping[str, Any]) -> list[Sheet]:
    """One sheet; without runs, one for each group of tasks with published rows."""
    tasks, published = comparison["tasks"], comparison["published"]
    if tasks:
        ours = [
            Line(
                "ours",
                f"{group['label']} {group['name']}",
                trainable(group["trainable_percent"]),
                [percent(part["accuracy"]) for part in (*group["tasks"].values(), group["average"])],
            )
            for group in comparison["groups"]
        ]
        return [Sheet([*tasks, AVERAGE], ours + _published_lines(published, tasks))]
    return [
        Sheet(
            [*GROUPS[group], AVERAGE],
            _published_lines([row for row in published if row["group"] == group], GROUPS[group]),
        )
        for group in dict.fromkeys(row["group"] for row in published)
    ]


def _published_lines(rows: Iterable[Mapping[str, Any]], tasks: Sequence[str]) -> list[Line]:
    lines = [
        Line(
            row["kind"],
            row["name"],
            trainable(row["trainable_percent"]),
            published_figures(row, tasks),
        )
        for row in rows
    ]
    return sorted(lines, key=lambda line: KINDS.index(line.kind))


def published_figures(row: Mapping[str, Any], tasks: Iterable[str]) -> list[str]:
    """A published row's cells: "(80)" was worked back, "61.8?" is uncertain; the average is last."""

    def figure(task: str) -> str:
        if task not in row["percents"]:
            return ""
        doubt, value = row["doubts"].get(task), row["percents"][task]
        return f"({value:.0f})" if doubt == WORKED_BACK else f"{value:.1f}{'?' if doubt else ''}"

    return [*map(figure, tasks), "" if row["average"] is None else f"{row['average']:.1f}"]


def percent(share: float) -> str:
    """ "53.1" """
    return f"{100 * share:.1f}"


def trainable(share: float | None) -> str:
    """A share of parameters in percent, as the paper prints it."""
    return "" if share is None else f"{share:.2f}" if share >= 0.1 else f"{share:.2g}"


def interval(low: float, high: float, *, is_signed: bool = False, comma: str = ", ") -> str:
    """ "[41.1, 64.8]", of a difference "[-1.2, +3.4]" """
    sign = "+" if is_signed else ""
    return f"[{100 * low:{sign}.1f}{comma}{100 * high:{sign}.1f}]"


def p_value(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def parts_of(group: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(task, its accuracy, its difference from the reference) of each task, then the average; {} for no difference."""
    difference = group["difference"] or {"tasks": {}, "average": {}}
    for task, accuracy in group["tasks"].items():
        yield task, accuracy, difference["tasks"].get(task, {})
    yield "average", group["average"], difference["average"]


def as_csv(comparison: Mapping[str, Any]) -> str:
    """A line for each row and task, in percent and percentage points; "average" is a task, and each note is a separate line.

    Cells with several values (runs, seeds, percent_by_seed) are JSON lists.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()

    def write(**cells: Any) -> None:
        writer.writerow({key: "" if value is None else value for key, value in cells.items()})

    for group in comparison["groups"]:
        shared = {key: group[key] for key in ("label", "name", "model", "method", "r", "trainable_parameters")}
        shared |= {
            "kind": "ours",
            "trainable_percent": group["trainable_percent"],
            "runs": json.dumps([run["run"] for run in group["runs"]]),
            "seeds": json.dumps([run["seed"] for run in group["runs"]]),
            "rule": comparison["rule"],
        }
        for task, accuracy, difference in parts_of(group):
            low, high = accuracy["interval"]
            cells = {
                "task": task,
                "num_items": comparison["num_items"].get(task),
                "percent": _exact(accuracy["accuracy"]),
                "low": _exact(low),
                "high": _exact(high),
                "percent_by_seed": json.dumps([_exact(share) for share in accuracy["by_seed"]]),
            }
            if difference:
                cells |= {
                    "reference": group["difference"]["to"],
                    "difference": _exact(difference["difference"]),
                    "difference_low": _exact(difference["interval"][0]),
                    "difference_high": _exact(difference["interval"][1]),
                }
            if "p" in difference:
                cells |= {"test": group["difference"]["test"], "p": difference["p"], "p_holm": difference["p_holm"]}
            write(**shared, **cells)
    for row in comparison["published"]:
        shared = {
            key: row[key] for key in ("kind", "name", "model", "method", "r", "trainable_percent", "source", "note")
        }
        shared["rule"] = "paper"
        for task, value in row["percents"].items():
            write(**shared, task=task, percent=value, doubt=row["doubts"].get(task))
        if row["average"] is not None:
            write(**shared, task="average", percent=row["average"])
    for note in comparison["notes"]:
        write(kind="note", note=note)
    return text.getvalue()


def _exact(share: float) -> float:
    """Percent, rounded to hide binary fractions."""
    return round(100 * share, 6)


def as_markdown(comparison: Mapping[str, Any]) -> str:
    """The sheets, a table for each group of runs with intervals and tests, and the notes."""
    blocks = []
    for sheet in sheets(comparison):
        rows = [[markdown_escaped(line.name), line.kind, line.trainable, *line.cells] for line in sheet.lines]
        columns = ["", "", "trainable %", *map(markdown_escaped, sheet.columns)]
        blocks.append(markdown_table(columns, rows))
    for group in comparison["groups"]:
        difference = group["difference"]
        header = ["task", "items", f"{group['label']} %, 95%", "by seed"]
        if difference:
            header += [f"{group['label']} - {difference['to']}, 95%", "p", "p (Holm)"]
        rows = []
        for task, accuracy, part in parts_of(group):
            row = [
                markdown_escaped(task),
                f"{comparison['num_items'][task]:,}" if task in comparison["num_items"] else "",
                f"{percent(accuracy['accuracy'])} {interval(*accuracy['interval'])}",
                ", ".join(percent(share) for share in accuracy["by_seed"]),
            ]
            if part:
                row += [f"{100 * part['difference']:+.1f} {interval(*part['interval'], is_signed=True)}"]
                row += [p_value(part["p"]), p_value(part["p_holm"])] if "p" in part else ["", ""]
            rows.append(row)
        runs = ", ".join(markdown_escaped(run["run"]) for run in group["runs"])
        test = f"; {difference['test']}" if difference else ""
        blocks += [
            f"**{group['label']}**: {markdown_escaped(group['name'])}: {runs}{test}",
            markdown_table(header, rows),
        ]
    rule = f"Scored by the {comparison['rule']} rule. " if comparison["groups"] else ""
    blocks.append(rule + "Percent.")
    blocks.append("\n".join(f"- {markdown_escaped(note)}" for note in comparison["notes"]))
    return "\n\n".join(block for block in blocks if block) + "\n"
