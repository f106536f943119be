"""How rows look to a person: `qdense data show`."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qdense.errors import counted
from qdense.text import clean
from qdense.training.preview import Preview, ShownRow
from qdense.ui.console import facts_panel

_BAR = 40  # columns of the longest bar


def show_preview(console: Console, preview: Preview) -> None:
    """Rows with what counts in the loss, lengths, and what is cut or skipped."""
    for row in preview.rows:
        console.print(_panel(row))
    console.print(Text.assemble(("green", "green"), ": counts in the loss", style="dim"))
    if preview.num_validation:
        console.print(
            Text("Rows are numbered from 0, as in the file; a number that is left out is for validation.", style="dim")
        )
    console.print(facts_panel(preview.origin, _facts(preview)))
    most = max(count for _, _, count in preview.bins)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for shortest, longest, count in preview.bins:
        is_cut = shortest > preview.max_length
        bar = Text("█" * max(1 if count else 0, round(_BAR * count / most)), style="yellow" if is_cut else "cyan")
        table.add_row(f"{shortest:,} to {longest:,}", f"{count:,}", bar)
    console.print(table)
    if preview.bins[-1][0] > preview.max_length:
        console.print(Text(f"yellow: longer than data.max_length = {preview.max_length:,}", style="dim"))
    for warning in warnings_of(preview):
        console.print(Text.assemble(("warning: ", "yellow"), clean(warning)))


def _panel(row: ShownRow) -> Panel:
    text = Text()
    for span in row.spans:
        lines = "\n".join(map(clean, span.text.split("\n")))
        text.append(lines, style="green" if span.counts else "")
    cut = ", cut off" if row.is_cut else ""
    title = f"row {row.number}: {row.num_tokens:,} tokens, {row.num_counted:,} count{cut}"
    return Panel(text, title=title, title_align="left", border_style="dim")


def _facts(preview: Preview) -> list[tuple[str, str]]:
    measured = f" (of {preview.num_measured:,} rows)" if preview.num_measured < preview.num_training else ""
    return [
        ("columns", preview.columns),
        ("template", f"{preview.template}; loss on {preview.train_on}"),
        ("rows", f"{preview.num_training:,} to train on, {preview.num_validation:,} for validation"),
        ("tokens of a row", f"mean {preview.mean_tokens:,.0f}, longest {preview.longest_tokens:,}{measured}"),
        ("ends", f"{preview.num_ended:,} rows end with a token that ends generation ({', '.join(preview.end_tokens)})"),
    ]


def warnings_of(preview: Preview) -> list[str]:
    """What a person should know before training."""
    found = []
    if preview.num_skipped:
        found.append(
            f"{counted(preview.num_skipped, 'row is', 'rows are')} skipped; the first: {preview.first_skipped}"
        )
    if preview.num_cut:
        found.append(
            f"{preview.num_cut:,} of {preview.num_measured:,} rows are longer than data.max_length = {preview.max_length:,} and "
            f"are cut, {preview.num_without_answer:,} of them before any answer, {preview.num_dropped:,} dropped. Raise it to "
            f"{preview.longest_tokens:,} to keep all."
        )
    num_whole = preview.num_measured - preview.num_cut
    if preview.num_ended < num_whole:
        found.append(
            f"{num_whole - preview.num_ended:,} of {num_whole:,} whole rows do not teach the model to end its answer: the last "
            "token that counts does not stop generation."
        )
    return found
