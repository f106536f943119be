"""THE EQUATION of DenseLoRA, in plain PyTorch.

    delta(x) = (alpha / r) * drop( s( D ( M drop( s( E drop(x) ) ) ) ) )       arXiv:2505.23808, eq. 3-5

E (the encoder) and D (the decoder) are shared by all layers of one module kind; M belongs to one layer. The paper writes
D transposed, which does not fit the shape it states, and shows neither alpha / r nor dropout: both are the authors'
released code (mulin-ahu/DenseLoRA@864e39b). s is exact GELU, after the encoder and after the decoder.

One departure: modules that read the same x (q, k and v of a layer) are encoded together, so they share one dropout mask of x.

`encode`, `decode` and `add` have fused counterparts for CUDA with the same signatures: qdense/ops/denselora_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qdense.ops.dropout import dropout as drop

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "relu": F.relu,  # zero slope at 0: learns only if no factor starts at zero
    "none": lambda x: x,  # the paper's "only matrix" ablation: linear, so it can be merged
}


def encode(
    x: Tensor, encoders: Sequence[Tensor], *, activation: str = "gelu", dropout: float = 0.0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """drop(s(E drop(x))) for each of several modules that read the same x; they share one mask of it.

    Args:
        x: (..., d_in), bf16, fp16 or fp32: the projections' input.
        encoders: E of each module, (r, d_in), dtype of x.
        activation: s, a key of `ACTIVATIONS`.
        dropout: probability of dropping an element; pass 0 outside training.

    Returns:
        x again, for the frozen projections (the fused version adds the adapter's gradient to theirs there), and
        (..., r) for each encoder, dtype of x.
    """
    stacked = encoders[0] if len(encoders) == 1 else torch.cat(tuple(encoders))
    encoded = drop(ACTIVATIONS[activation](F.linear(drop(x, dropout), stacked)), dropout)
    return x, encoded.split([len(encoder) for encoder in encoders], dim=-1)


def decode(
    mixed: Tensor,
    decoder: Tensor,
    *,
    scaling: float,
    activation: str = "gelu",
    dropout: float = 0.0,
) -> Tensor:
    """The adapter's part of the output, scaling * drop(s(D mixed)), for `add`.

    Call it before the frozen projection: a layer that is recomputed in the backward pass stops where its last saved tensor is
    there again, so with all of them saved before, its last projection is not computed again.

    Args:
        mixed: (..., r), M times the encoding.
        decoder: D, (d_out, r), dtype of mixed; shared like E, initially zero.
        scaling: alpha / r.

    Returns:
        (..., d_out), dtype of mixed. (The fused version leaves the work to `add` and returns what that needs.)
    """
    return drop(ACTIVATIONS[activation](F.linear(mixed, decoder)), dropout, scaling)


def add(output: Tensor, delta: Tensor) -> Tensor:
    """The frozen projection W0 x (..., d_out), plus what `decode` returned: dtype of W0 x. The fused version writes into it."""
    return output + delta.to(output.dtype)


class DropoutMasks(NamedTuple):
    """The three dropout masks of the equation: 0 where dropped, 1 / (1 - p) where kept, broadcastable."""

    input: Tensor  # (..., d_in), on x
    encoded: Tensor  # (..., r), on s(E x)
    output: Tensor  # (..., d_out), on s(D M z)


def denselora_delta(
    x: Tensor,
    encoder: Tensor,
    m: Tensor,
    decoder: Tensor,
    *,
    scaling: float,
    activation: str = "gelu",
    masks: DropoutMasks | None = None,
) -> Tensor:
    """The equation as written above, with given masks; tests compare `encode` and `decode`, plain and fused, with it.

    Args:
        x: (..., d_in), bf16 or fp32: the projection's input.
        encoder: E, (r, d_in), dtype of x; shared by all layers of one module kind.
        m: M, (r, r), dtype of x; one per layer.
        decoder: D, (d_out, r), dtype of x.
        masks: None drops nothing.

    Returns:
        (..., d_out), dtype of x.
    """
    s = ACTIVATIONS[activation]
    input_mask, encoded_mask, output_mask = masks or (1.0, 1.0, 1.0)
    encoded = s(F.linear(x * input_mask, encoder)) * encoded_mask
    return scaling * (s(F.linear(F.linear(encoded, m), decoder)) * output_mask)


def denselora_delta_weight(encoder: Tensor, m: Tensor, decoder: Tensor, *, scaling: float) -> Tensor:
    """The adapter's weight (d_out, d_in), fp32, if its activation is "none"."""
    return scaling * (decoder.float() @ m.float() @ encoder.float())
