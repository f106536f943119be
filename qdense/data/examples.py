"""From rows to training examples: which rows are used, and how each becomes tokens and labels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from qdense.data.rows import Row
from qdense.data.templates import Piece, num_doubled, template_named
from qdense.errors import DataError
from qdense.ops.cross_entropy import IGNORED

if TYPE_CHECKING:
    from qdense.recipe import DataRecipe


class Split(NamedTuple):
    """Row numbers of the two parts, in the order of the file."""

    training: list[int]
    validation: list[int]


def split_rows(num_rows: int, *, validation_rows: int, fraction: float, seed: int) -> Split:
    """Choose validation rows first, from all rows; then the fraction of the rest.

    Rows are ordered by a hash of seed and number, and taken from the front. So a smaller fraction is part of a larger one
    with the same seed, the validation rows are the same for every fraction, and no library's random generator
    matters.

    Raises:
        DataError: too few rows for either part.
    """

    def rank(number: int) -> bytes:
        return hashlib.sha256(f"{seed}:{number}".encode()).digest()

    order = sorted(range(num_rows), key=rank)
    if num_rows <= validation_rows:
        raise DataError(
            f"data.validation_rows = {validation_rows}: the data set has {num_rows} rows, so none is left to train on. "
            "Lower data.validation_rows; 0 trains without validation."
        )
    remaining = num_rows - validation_rows
    num_training = math.floor(fraction * remaining + 1e-9)
    if num_training < 1:
        raise DataError(
            f"data.fraction = {fraction:g}: less than one of {remaining} rows. The smallest fraction here is "
            f"{1 / remaining:.2g}."
        )
    training = order[validation_rows : validation_rows + num_training]
    return Split(sorted(training), sorted(order[:validation_rows]))


@dataclass(frozen=True)
class Example:
    """One tokenized row.

    Attributes:
        row: its number in the data set.
        input_ids, labels: int32 arrays of equal length; labels that do not count in the loss are -100.
    """

    row: int
    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def num_labels(self) -> int:
        """Tokens that count in the loss; never the first, which no token precedes."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Encoded:
    """Tokenized rows, with counts of truncation.

    Attributes:
        num_truncated: rows longer than `max_length`; these have no EOS either.
        num_without_answer: of these, rows whose whole response was cut off.
        num_dropped: of these, rows dropped because no label remained (unless train_on = "all").
        lengths: row number -> its tokens before it is cut.
    """

    examples: list[Example]
    num_truncated: int
    num_without_answer: int
    num_dropped: int
    lengths: dict[int, int]


def encode_rows(rows: Sequence[Row], numbers: Sequence[int], tokenizer: Any, data: DataRecipe) -> Encoded:
    """Tokenize `rows[n]` for each n of `numbers` as the authors do: prompt and response in one text, truncated on the right
    to `max_length` tokens, with EOS appended if it fits (upstream's finetune.py).

    With train_on = "response", a label counts if its token ends after the prompt, by the tokenizer's offsets.
    Tokenizing the prompt alone, as upstream does, can split the boundary differently. Of a conversation, all answers are
    responses, or with train_on = "last" the last one; one that is too long is cut at the end of an answer, if one fits.
    """
    data = data.settled(rows[0].kind)  # a data set has rows of one kind
    template = template_named(data.template, tokenizer)
    examples: list[Example] = []
    lengths: dict[int, int] = {}
    num_truncated = num_without_answer = num_dropped = 0
    for start in range(0, len(numbers), 1000):
        chunk = numbers[start : start + 1000]
        texts, spans = [], []
        for number in chunk:
            pieces = template.pieces(rows[number])
            texts.append("".join(piece.text for piece in pieces))
            spans.append(_responses(pieces, only_last=data.train_on == "last"))
        encodings = tokenizer(
            texts,
            return_offsets_mapping=True,
            return_attention_mask=False,
            add_special_tokens=template.adds_special_tokens,
        )
        for number, responses, ids, offsets in zip(
            chunk, spans, encodings["input_ids"], encodings["offset_mapping"], strict=True
        ):
            doubled = num_doubled(template, ids, tokenizer)
            ids, offsets = ids[doubled:], offsets[doubled:]
            in_response = _in_spans(offsets, responses)
            first_of_response = next((i for i, inside in enumerate(in_response) if inside), len(ids))
            if template.adds_special_tokens:
                # One response, to the end, with special tokens that have no place in the text.
                in_response = [i >= first_of_response for i in range(len(ids))]
            needs_eos = template.adds_special_tokens and ids[-1] != tokenizer.eos_token_id
            lengths[number] = len(ids) + needs_eos
            if len(ids) > data.max_length:
                num_truncated += 1
                ids = ids[: _cut(in_response, data.max_length) if rows[number].messages else data.max_length]
                num_without_answer += first_of_response >= len(ids)
            elif needs_eos and len(ids) < data.max_length:
                ids = [*ids, tokenizer.eos_token_id]
                in_response = [*in_response, True]
            input_ids = np.asarray(ids, dtype=np.int32)
            labels = input_ids.copy()
            if data.train_on != "all":
                labels[~np.asarray(in_response[: len(ids)])] = IGNORED
                if first_of_response >= len(ids):
                    num_dropped += 1
                    continue
            examples.append(Example(number, input_ids, labels))
    if not examples:
        raise DataError(
            f"no row has any of its response left within data.max_length = {data.max_length} tokens; raise it"
        )
    return Encoded(examples, num_truncated, num_without_answer, num_dropped, lengths)


def _responses(pieces: Sequence[Piece], *, only_last: bool) -> list[tuple[int, int]]:
    """(first, last + 1) character of each response in the joined text."""
    spans, at = [], 0
    for piece in pieces:
        if piece.is_response:
            spans.append((at, at + len(piece.text)))
        at += len(piece.text)
    return spans[-1:] if only_last else spans


def _in_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token is part of a span: it ends in it or after it begins there. Both in rising order."""
    inside, number = [], 0
    for first, end in offsets:
        while number < len(spans) and first >= spans[number][1]:
            number += 1
        inside.append(number < len(spans) and end > spans[number][0])
    return inside


def _cut(in_response: Sequence[bool], max_length: int) -> int:
    """Where to cut a conversation: at the end of the last answer that fits, or else at `max_length`."""
    ends = [i for i in range(1, max_length + 1) if in_response[i - 1] and not (i < len(in_response) and in_response[i])]
    return ends[-1] if ends else max_length


def pack(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """Divide examples into micro-batches of at most `max_tokens` tokens by first-fit decreasing.

    A longer example gets its own. The result depends only on the examples and their order, so a resumed run packs alike.
    """
    packs: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        length = len(example.input_ids)
        place = next((i for i, left in enumerate(room) if left >= length), None)
        if place is None:
            packs.append([])
            room.append(max_tokens)
            place = len(packs) - 1
        packs[place].append(example)
        room[place] -= length
    return packs


def join(examples: Sequence[Example]) -> dict[str, Any]:
    """Join examples end to end in one row, as `qdense.modeling.packing` expects.

    Returns:
        input_ids, position_ids, labels: (1, tokens), int64, the first label of each example ignored (no token precedes it);
        cu_seq_lens_q: (examples + 1,), int32, where each begins; plain values: lengths, max_length_q, rows, num_tokens.
    """
    lengths = [len(example.input_ids) for example in examples]
    labels = np.concatenate([example.labels for example in examples]).astype(np.int64)
    starts = np.cumsum([0, *lengths])
    labels[starts[:-1]] = IGNORED
    return {
        "input_ids": torch.from_numpy(np.concatenate([example.input_ids for example in examples]).astype(np.int64))[
            None
        ],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        "labels": torch.from_numpy(labels)[None],
        "cu_seq_lens_q": torch.from_numpy(starts.astype(np.int32)),
        "lengths": lengths,
        "max_length_q": max(lengths),
        "rows": [example.row for example in examples],
        "num_tokens": int(starts[-1]),
    }


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Any]:
    """Pad on the right to the longest example.

    Padding is identified by position, not by token: where pad and EOS are the same token (SmolLM2), EOS still counts in the loss.

    Returns:
        input_ids, attention_mask, labels: (batch, longest), int64; and two plain Python values: rows, the rows' numbers,
        and num_tokens, without padding.
    """
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full((len(examples), longest), IGNORED, dtype=torch.int64)
    for i, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[i, :length] = torch.from_numpy(example.input_ids)
        attention_mask[i, :length] = 1
        labels[i, :length] = torch.from_numpy(example.labels)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "rows": [example.row for example in examples],
        "num_tokens": sum(len(example.input_ids) for example in examples),
    }
