"""Attention for packed examples: several rows end to end, without padding, none of which sees another.

A block-diagonal mask would be dense, tokens x tokens, and sdpa could not use its fast kernels. So there is no mask: the model
receives where each row begins (`cu_seq_lens_q`), and each row is attended to separately, in one kernel on
CUDA, in turn elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from qdense.catalogs.families import why_not_packed as why_not_packed_family
from qdense.compat.transformers import attention_set_to
from qdense.device import has_bfloat16

_NAME = "qdense_packed"


def why_not_packed(model: Any) -> str | None:
    """Why rows cannot be packed for this model; None if they can."""
    config = model.config
    if getattr(config, "attention_dropout", 0.0):
        return "it drops attention weights in training"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    return why_not_packed_family(config.model_type)


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Within it, forward and backward accept packed rows only: `input_ids` (1, tokens), `position_ids` that start at 0 with
    each row, `cu_seq_lens_q` (rows + 1,), int32, `max_length_q`, and neither attention mask nor cache."""
    with attention_set_to(model, _NAME):
        yield


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    lengths: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface.

    query (1, heads, tokens, d), key and value (1, kv heads, tokens, d) -> (1, tokens, heads, d).
    """
    if attention_mask is not None or dropout or len(query) != 1:
        raise ValueError("packed rows: no attention mask, attention dropout or second batch entry")
    is_grouped = key.shape[1] != query.shape[1]
    # The kernel for rows of different lengths is flash attention's, for cards from Ampere on.
    if query.device.type == "cuda" and query.dtype != torch.float32 and has_bfloat16(query.device):
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, d)
        bounds, longest = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
        # torch 2.11 accepts fewer heads of k and v without a flag.
        grouped: dict[str, Any] = (
            {"enable_gqa": is_grouped} if "enable_gqa" in signature(varlen_attn).parameters else {}
        )
        window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens before and after that are seen
        output = varlen_attn(query, key, value, *bounds, *longest, scale=scaling, window_size=window, **grouped)
        assert isinstance(output, Tensor)
        return output.unsqueeze(0), None
    rows = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    outputs = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=(mask := _window(q.shape[2], sliding_window, q.device)),
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=is_grouped,
        )
        for q, k, v in rows
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each query of one row sees, (length, length); None if that is all before it."""
    if sliding_window is None or length <= sliding_window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - sliding_window)


AttentionInterface.register(_NAME, _attend)
