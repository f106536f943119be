"""Rows of random tokens, packed as training packs them."""

from __future__ import annotations

import numpy as np

from qdense.data.examples import Example
from qdense.ops.cross_entropy import IGNORED


def example(length, row=0, seed=0, vocabulary=100):
    ids = np.random.default_rng(seed + row).integers(1, vocabulary, length).astype(np.int32)
    labels = ids.copy()
    labels[: length // 3] = IGNORED
    return Example(row, ids, labels)


def examples_of(*lengths):
    return [example(length, row) for row, length in enumerate(lengths)]


def arguments(batch):
    return {key: value for key, value in batch.items() if key not in ("rows", "num_tokens")}
