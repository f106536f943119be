"""What a run would train on, as the model reads it: for a person to look at before training."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdense.data.examples import Example, encode_rows, split_rows
from qdense.data.sources import load_training_set
from qdense.data.templates import chat_template_for, template_named
from qdense.events import Emit, Notice, ignore
from qdense.modeling.load import load_tokenizer
from qdense.ops.cross_entropy import IGNORED
from qdense.recipe import Recipe

_MOST_MEASURED = 2000  # rows whose tokens are counted
_NUM_BINS = 12


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens as text, and whether they count in the loss."""

    text: str
    counts: bool


@dataclass(frozen=True)
class ShownRow:
    """One training row.

    Attributes:
        number: in the file, from 0.
        spans: its text, special tokens included.
        is_cut: whether data.max_length cuts it.
    """

    number: int
    spans: list[Span]
    num_tokens: int
    num_counted: int
    is_cut: bool


@dataclass(frozen=True)
class Preview:
    """Rows to show and what is known of all.

    Attributes:
        num_measured: rows whose tokens were counted, if not all were.
        bins: (shortest, longest, rows) of each range of lengths.
        num_cut, num_without_answer, num_dropped: of the measured rows (see `Encoded`).
        num_ended: of the measured rows, those whose last token that counts ends generation.
        end_tokens: the tokens that do.
    """

    origin: str
    columns: str
    template: str
    train_on: str
    num_training: int
    num_validation: int
    num_skipped: int
    first_skipped: str
    rows: list[ShownRow]
    num_measured: int
    mean_tokens: float
    longest_tokens: int
    max_length: int
    bins: list[tuple[int, int, int]]
    num_cut: int
    num_without_answer: int
    num_dropped: int
    num_ended: int
    end_tokens: list[str]


def preview(recipe: Recipe, data_dir: Path | None, num_shown: int, emit: Emit = ignore) -> Preview:
    """Encode some of the rows that `recipe` would train on. Raises QDenseError as training would."""
    data = load_training_set(recipe.data, data_dir, emit)
    split = split_rows(
        len(data.rows),
        validation_rows=recipe.data.validation_rows,
        fraction=recipe.data.fraction,
        seed=recipe.data.seed,
    )
    tokenizer = load_tokenizer(recipe.model, lambda text: emit(Notice(text)))
    settings = recipe.data.settled(data.kind)
    if settings.template == "chat":
        settings = settings.model_copy(update={"template": chat_template_for(tokenizer)})
    step = max(1, len(split.training) // _MOST_MEASURED)
    measured = split.training[::step][:_MOST_MEASURED]
    encoded = encode_rows(data.rows, measured, tokenizer, settings)
    lengths = list(encoded.lengths.values())
    end_token = template_named(settings.template, tokenizer).end_token
    ends = {tokenizer.eos_token_id} | ({tokenizer.convert_tokens_to_ids(end_token)} if end_token else set())
    columns = data.columns
    has_input = any(row.input for row in data.rows)
    read = (columns.instruction, *((columns.input,) if has_input else ()), columns.output)
    return Preview(
        origin=data.origin,
        columns=columns.messages or columns.text or ", ".join(read),
        template=settings.template,
        train_on=settings.train_on,
        num_training=len(split.training),
        num_validation=len(split.validation),
        num_skipped=len(data.skipped),
        first_skipped=data.skipped[0] if data.skipped else "",
        rows=[
            _shown(example, tokenizer, is_cut=len(example.input_ids) < encoded.lengths[example.row])
            for example in encoded.examples[:num_shown]
        ],
        num_measured=len(measured),
        mean_tokens=statistics.fmean(lengths),
        longest_tokens=max(lengths),
        max_length=recipe.data.max_length,
        bins=_bins(lengths),
        num_cut=encoded.num_truncated,
        num_without_answer=encoded.num_without_answer,
        num_dropped=encoded.num_dropped,
        num_ended=sum(_last_counted(example) in ends for example in encoded.examples),
        end_tokens=[str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(filter(None, ends))],
    )


def _shown(example: Example, tokenizer: Any, *, is_cut: bool) -> ShownRow:
    return ShownRow(
        number=example.row,
        spans=[Span(tokenizer.decode(ids), counts) for ids, counts in _runs(example)],
        num_tokens=len(example.input_ids),
        num_counted=example.num_labels,
        is_cut=is_cut,
    )


def _runs(example: Example) -> Iterator[tuple[list[int], bool]]:
    """Neighbouring tokens that count alike."""
    counts = example.labels != IGNORED
    edges = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(counts)]
    for first, end in itertools.pairwise(edges):
        yield example.input_ids[first:end].tolist(), bool(counts[first])


def _last_counted(example: Example) -> int | None:
    counted = np.flatnonzero(example.labels != IGNORED)
    return int(example.input_ids[counted[-1]]) if len(counted) else None


def _bins(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(shortest, longest, rows) of ranges of equal width, from the shortest row to the longest."""
    first = min(lengths)
    width = max(1, -(-(max(lengths) - first + 1) // _NUM_BINS))
    counts = np.bincount((np.asarray(lengths) - first) // width, minlength=1)
    starts = range(first, first + width * len(counts), width)
    return [(start, start + width - 1, int(count)) for start, count in zip(starts, counts, strict=True)]
