"""A report as one HTML page that needs no network, and as Markdown with the same texts and numbers."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup, escape

from qdense.experiments.blocks import Block, Chart, Code, Part, Table, Text
from qdense.text import clean, markdown_escaped, markdown_table

_NUMBER = re.compile(r"[<>=+\-\s]*\d[\d,.]*(e-?\d+)?($|[\s%(\[])")


def as_html(title: str, parts: Sequence[Part], made: str) -> str:
    """The page. `made` says when and by what it was made."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = _inline
    template = environment.from_string(_template())
    specs: list[dict[str, Any]] = []

    def number_of(spec: dict[str, Any]) -> int:
        specs.append(spec)
        return len(specs) - 1

    body = template.render(
        title=title,
        parts=parts,
        made=made,
        kind=lambda block: type(block).__name__.lower(),
        number_of=number_of,
        anchor=_anchor,
        number_columns=number_columns,
        specs=lambda: Markup(json.dumps(specs, separators=(",", ":")).replace("<", "\\u003c")),
        libraries=Markup(_libraries().replace("</script", "<\\/script")),
    )
    return str(body)


def as_markdown(title: str, parts: Sequence[Part], made: str) -> str:
    """The same texts and numbers; charts are represented by their numbers."""
    lines = [f"# {markdown_escaped(title)}"] if len(parts) > 1 else []
    mark = "##" if len(parts) > 1 else "#"
    for part in parts:
        lines.append(f"{mark} {markdown_escaped(part.title)}")
        lines += [part.question] if part.question else []
        for section in part.sections:
            lines.append(f"{mark}# {section.title}")
            lines += [text for block in section.blocks if (text := _markdown(block))]
    return "\n\n".join([*lines, made]) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Text):
        return f"**{clean(block.text)}**" if block.is_warning else clean(block.text)
    if isinstance(block, Code):
        return f"```sh\n{block.text}\n```"
    if isinstance(block, Chart):
        return _markdown(block.numbers) if block.numbers is not None and not block.is_small else ""
    header = [markdown_escaped(clean(each)) for each in block.columns]
    rows = [[markdown_escaped(clean(cell)) for cell in row] for row in block.rows]
    return "\n\n".join(each for each in (f"**{block.caption}**", markdown_table(header, rows), block.note) if each)


@functools.cache
def _libraries() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script without addresses."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _template() -> str:
    return (importlib.resources.files("qdense.experiments") / "page.html").read_text(encoding="utf-8")


def _inline(text: str) -> Markup:
    """Text with `code` as code."""
    parts = re.split(r"`([^`]+)`", clean(text))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )


def number_columns(table: Table) -> set[int]:
    """The columns of numbers, which are aligned to the right: all cells that are not empty start with one."""
    if not any(table.columns):
        return set()
    columns = range(1, len(table.columns))
    filled = {i: [row[i] for row in table.rows if row[i]] for i in columns}
    return {i for i in columns if filled[i] and all(_NUMBER.match(cell) for cell in filled[i])}


def _anchor(*names: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(names).lower()).strip("-")
