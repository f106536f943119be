"""THE EQUATION of DenseLoRA, in plain PyTorch.

    delta(x) = (alpha / r) * drop( s( D ( M drop( s( E drop(x) ) ) ) ) )       arXiv:2505.23808, eq. 3-5

E (the encoder) and D (the decoder) are shared by all layers of one module kind; M belongs to one layer. The paper writes
D transposed, which does not fit the shape it states, and shows neither alpha / r nor dropout: both are the authors'
released code (mulin-ahu/DenseLoRA@864e39b). s is exact GELU, after the encoder and after the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qdense.ops.dropout import dropout as drop

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "relu": F.relu,  # zero slope at 0: learns only where no factor starts at zero
    "none": lambda x: x,  # the paper's "only matrix" ablation: linear, so it can be merged
}


class DropoutMasks(NamedTuple):
    """The three dropout masks of the equation: 0 where dropped, 1 / (1 - p) where kept, broadcastable."""

    input: Tensor  # (..., d_in), on x
    encoded: Tensor  # (..., r), on s(E x)
    output: Tensor  # (..., d_out), on s(D M z)


def draw_masks(x: Tensor, r: int, d_out: int, dropout: float) -> DropoutMasks:
    """Fresh masks for `x` (..., d_in) from torch's generator, in dtype and on device of `x`."""

    def mask(width: int) -> Tensor:
        return drop(torch.ones(*x.shape[:-1], width, dtype=x.dtype, device=x.device), dropout)

    return DropoutMasks(mask(x.shape[-1]), mask(r), mask(d_out))


def denselora_delta(
    x: Tensor,
    encoder: Tensor,
    m: Tensor,
    decoder: Tensor,
    *,
    scaling: float,
    activation: str = "gelu",
    dropout: float = 0.0,
    masks: DropoutMasks | None = None,
) -> Tensor:
    """Adapter output that is added to the frozen projection W0 x.

    Args:
        x: (..., d_in), bf16 or fp32: the projection's input.
        encoder: E, (r, d_in), dtype of x; shared by all layers of one module kind.
        m: M, (r, r), dtype of x; one per layer.
        decoder: D, (d_out, r), dtype of x; shared like E, zeros at first.
        scaling: alpha / r.
        activation: s, a key of `ACTIVATIONS`.
        dropout: probability of dropping an element; pass 0 outside training.
        masks: used in place of `dropout`, so that a result can be computed exactly.

    Returns:
        (..., d_out), dtype of x.
    """
    s = ACTIVATIONS[activation]
    if masks is not None:
        encoded = s(F.linear(x * masks.input, encoder)) * masks.encoded
        return scaling * (s(F.linear(F.linear(encoded, m), decoder)) * masks.output)
    encoded = drop(s(F.linear(drop(x, dropout), encoder)), dropout)
    return drop(s(F.linear(F.linear(encoded, m), decoder)), dropout, scaling)


def denselora_delta_weight(encoder: Tensor, m: Tensor, decoder: Tensor, *, scaling: float) -> Tensor:
    """The weight (d_out, d_in), fp32, to which the adapter amounts when its activation is "none"."""
    return scaling * (decoder.float() @ m.float() @ encoder.float())
