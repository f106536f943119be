"""What a report is made of: texts, tables and charts, in sections. `page.py` writes them as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Text:
    """A paragraph; with `is_warning`, one that must not be overlooked."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Code:
    """Commands."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of texts.

    Attributes:
        kinds: of each row: "ours" or a kind of published row, by which rows are marked; empty if there is nothing to tell apart.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    kinds: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart, and its numbers for those who cannot see it.

    Attributes:
        about: what it shows, in a sentence, for screen readers.
        spec: Vega-Lite's.
        is_small: whether several belong in a row.
    """

    title: str
    about: str
    spec: dict[str, Any] = field(repr=False)
    numbers: Table | None = None
    is_small: bool = False


Block = Text | Code | Table | Chart


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Part:
    """One experiment of a report."""

    title: str
    question: str
    sections: Sequence[Section]
