"""Which rows a step has, in what order and in which micro-batches, and its random numbers. All follow from the step's number.

So a run needs no random state to resume: step 41 is the same whether or not this process ran step 40.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from qdense.data.examples import Example, collate, join, pack


class Batches:
    """The rows of each optimizer step.

    Every epoch uses each row once, in an order drawn from the seed and the epoch. Its last step may have fewer rows.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.steps_per_epoch = math.ceil(len(examples) / batch_size)
        self._order = lru_cache(maxsize=1)(self._draw_order)

    def _draw_order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order: list[int] = torch.randperm(len(self.examples), generator=generator).tolist()
        return order

    def of_step(self, step: int) -> list[Example]:
        """The rows of step 1, 2, ..."""
        epoch, number = divmod(step - 1, self.steps_per_epoch)
        chosen = self._order(epoch)[number * self.batch_size : (number + 1) * self.batch_size]
        return [self.examples[index] for index in chosen]

    def epochs_after(self, step: int) -> float:
        """Epochs completed after `step`."""
        return step / self.steps_per_epoch


def seed_step(seed: int, step: int, process: int = 0) -> None:
    """Seed torch's generators for one step's dropout, on every device; each process has its own masks."""
    text = f"{seed} {step} {process}" if process else f"{seed} {step}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest) >> 1)


def micro_batches(
    examples: Sequence[Example], size: int, *, max_length: int | None, pad_token_id: int
) -> list[dict[str, Any]]:
    """Examples as input for the model, each with rows, num_tokens and num_labels for the step.

    Args:
        size: the number of rows of maximum length in one forward pass.
        max_length: that length, for packed rows; None pads each micro-batch to its longest row.
    """
    groups: list[Sequence[Example]]
    if max_length is not None:
        groups = [*pack(examples, size * max_length)]
        batches = [join(group) for group in groups]
    else:
        groups = [examples[start : start + size] for start in range(0, len(examples), size)]
        batches = [collate(group, pad_token_id) for group in groups]
    for group, batch in zip(groups, batches, strict=True):
        batch["num_labels"] = sum(example.num_labels for example in group)
    return batches
