"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def noisy_embeddings(model: Any, alpha: float | None, lengths: Sequence[int], *, is_packed: bool) -> Iterator[None]:
    """Within it, each token's embedding gets uniform noise of at most alpha / sqrt(L d): L tokens in its row, d the hidden size.

    The noise comes from torch's generator. Nothing happens without an alpha.

    Args:
        lengths: tokens of each row, without padding.
        is_packed: whether the rows are joined end to end in one, or are the rows of a batch.
    """
    if alpha is None:
        yield
        return

    def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
        sizes = torch.tensor(lengths, device=output.device, dtype=torch.float32)
        # To (1, tokens, d) or (rows, tokens, d).
        sizes = sizes.repeat_interleave(sizes.long())[None, :, None] if is_packed else sizes[:, None, None]
        largest = alpha / torch.sqrt(sizes * output.shape[-1])
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * largest.to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
