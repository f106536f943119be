"""Cross entropy of an output layer without all its logits: they are computed, used and freed a slice of tokens at a time.

Vocabularies are large: for LLaMA-3 the logits of one token take 0.5 MiB in fp32, and a training step would keep several copies
for every token, even those without a label. Here only tokens with a label reach the output layer, and the
gradient of a slice is computed while its logits exist, as Liger's fused_linear_cross_entropy does (arXiv:2410.10989, section
3.2).

torch's own (`F.linear_cross_entropy` with options, from 2.13 on) is not used: it sums a bf16 loss in bf16, with an error of
0.4% where this has 0.001%, and on a CPU it took twice as long (1,024 tokens, hidden size 576, vocabulary 49,152).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qdense.ops.kernels import is_fused
from qdense.ops.slices import logits_slice_tokens

IGNORED = -100  # such targets do not count in the loss


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, divisor: Tensor | float | None = None
) -> Tensor:
    """Sum of the cross entropies of `hidden @ weight.T`, divided by `divisor`.

    Args:
        hidden: (tokens, d), bf16, fp16 or fp32.
        weight: (vocabulary, d), dtype of hidden; its gradient is computed if it requires one.
        targets: (tokens,), integers; `IGNORED` for tokens that do not count in the loss.
        divisor: None for the number of targets that are not ignored, which gives a mean like PyTorch's cross_entropy.

    Returns:
        A scalar, fp32. NaN without targets and divisor, like PyTorch's.
    """
    has_target = targets != IGNORED
    hidden, targets = hidden[has_target], targets[has_target]
    if divisor is None:
        divisor = float(len(targets))
    if not isinstance(divisor, Tensor):
        divisor = torch.tensor(divisor, dtype=torch.float32)
    return _LinearCrossEntropy.apply(hidden, weight, targets, divisor.to(hidden.device))


class _LinearCrossEntropy(torch.autograd.Function):
    """Here all targets count."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, divisor: Tensor) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        num_tokens = logits_slice_tokens(len(weight), hidden.device.type == "cuda")
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(hidden), num_tokens):
            part = slice(start, start + num_tokens)
            # The logits have no name here, so that they can be freed.
            losses, gradient = losses_of(
                F.linear(hidden[part], weight), targets[part], divisor, needs_hidden or needs_weight
            )
            total += losses.sum()
            if hidden_gradient is not None:
                torch.mm(gradient, weight, out=hidden_gradient[part])
            if weight_gradient is not None:
                weight_gradient += gradient.T @ hidden[part]
            del gradient  # before the next slice is computed
        ctx.save_for_backward(hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype))
        return total / divisor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors), None, None


def losses_of(logits: Tensor, targets: Tensor, divisor: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """The cross entropies of logits (rows, vocabulary), in fp32, and if needed the gradient of their sum over `divisor`.

    On CUDA by qdense/ops/cross_entropy_triton.py, in the memory of the logits.
    """
    if is_fused(logits):
        from qdense.ops import cross_entropy_triton  # imports Triton

        return cross_entropy_triton.losses_of(logits, targets, divisor, needs_gradient=needs_gradient), logits
    dtype, targets = logits.dtype, targets.unsqueeze(1)
    logits = logits.float()
    normalizer = logits.logsumexp(dim=1, keepdim=True)
    losses = normalizer - logits.gather(1, targets)
    if needs_gradient:
        logits.sub_(normalizer).exp_()  # the probabilities
        logits.scatter_add_(1, targets, logits.new_full(targets.shape, -1.0))
        logits.div_(divisor)  # before rounding, as in a graph of single operations
    return losses, logits.to(dtype)
