"""Cross entropy of a slice of logits and its gradient, in two passes over the slice, for CUDA: 6 bytes for a logit in bf16, where
single operations in fp32 move 60."""

# ruff: noqa: N803 (compile-time constants are written in capitals, as everywhere in Triton)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdense.ops.denselora_triton import round_tile

_BLOCK = 4096


def losses_of(logits: Tensor, targets: Tensor, divisor: Tensor, *, needs_gradient: bool) -> Tensor:
    """The cross entropy of each row: (rows,), fp32.

    Args:
        logits: (rows, vocabulary), bf16, fp16 or fp32, contiguous. With `needs_gradient` overwritten by the gradient of the
            rows' sum over `divisor`, divided before it is rounded.
        targets: (rows,), int64, all of which count.
        divisor: a scalar, fp32.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        with torch.cuda.device_of(logits):
            _cross_entropy_kernel[len(logits),](
                *(logits, targets, divisor, losses, logits.shape[1]),
                NEEDS_GRADIENT=needs_gradient,
                BLOCK=_BLOCK,
                num_warps=8,
            )
    return losses


@triton.jit
def _cross_entropy_kernel(
    logits: tl.tensor,  # (rows, width), overwritten
    targets: tl.tensor,  # (rows,)
    divisor: tl.tensor,  # (1,)
    losses: tl.tensor,  # (rows,), written
    width: tl.tensor,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program: a row."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * width
    target = tl.load(targets + row)
    lanes = tl.arange(0, BLOCK)
    # Each lane has a maximum of its own, so that lanes meet once only. A finite one, since -inf - -inf is no number.
    high = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        tile = tl.load(logits + start + lanes, mask=start + lanes < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(high, tile)
        total = total * tl.exp(high - higher) + tl.exp(tile - higher)
        high = higher
    highest = tl.max(high, 0)
    normalizer = highest + tl.log(tl.sum(total * tl.exp(high - highest), 0))
    tl.store(losses + row, normalizer - tl.load(logits + target).to(tl.float32))
    if NEEDS_GRADIENT:
        divided_by = tl.load(divisor)
        for start in range(0, width, BLOCK):
            columns = start + lanes
            tile = tl.load(logits + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
            gradient = (tl.exp(tile - normalizer) - tl.where(columns == target, 1.0, 0.0)) / divided_by
            tl.store(logits + columns, round_tile(gradient, logits.dtype.element_ty), mask=columns < width)
