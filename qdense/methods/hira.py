"""HiRA (ICLR 2025, openreview.net/pdf?id=TwJrTz9cRS), PEFT's own: the weight times a low-rank matrix, element by element.

delta(x) = (W o B A) x        with the base's weight W, which is unpacked in each forward pass if quantized
"""

from __future__ import annotations

from typing import Any

from qdense.methods.costs import (
    AdapterSettings,
    Computation,
    Costs,
    ModuleCosts,
    WeightCosts,
    added_output,
    count_low_rank,
    dropped_input,
    input_bytes_if_trained,
    no_frozen_parameters,
)
from qdense.methods.method import Method


def _build_config(adapter: AdapterSettings, num_steps: int) -> Any:
    from peft import HiraConfig

    return HiraConfig(
        r=adapter.r,
        hira_dropout=adapter.dropout,
        target_modules=list(adapter.target_modules),
        task_type="CAUSAL_LM",
    )


def _module(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """W o B A is kept for the input's gradient, W for B A's."""
    weight, width = d_in * d_out, max(at.width, at.base_width)  # of bf16 times fp32
    return ModuleCosts(
        kept=0,
        in_backward=0,
        products=weight,
        backward_products=2 * weight,
        moved=added_output(at, d_out) + dropped_input(at, d_in),
        weights=WeightCosts(
            kept=(at.unpacked_width + width) * weight,
            in_forward=at.width * weight,  # B A
            in_backward=width * weight,  # the gradient of W o B A, then B A's in its place
            products=(at.adapter.r + 1) * weight,
            moved=(2 * at.unpacked_width + 2 * at.width + 2 * width) * weight,
        ),
    )


METHOD = Method(
    name="hira",
    summary="HiRA, PEFT's: the weight times a low-rank matrix, element by element; unpacks every weight in each forward pass",
    learning_rate=lambda adapter: 1e-2,
    adapter_keys=frozenset({"r", "dropout", "target_modules"}),
    build_config=_build_config,
    count_parameters=count_low_rank,
    costs=Costs(of_input=input_bytes_if_trained, of_module=_module, frozen_parameters=no_frozen_parameters),
    quantizations=("nf4", "none"),
    why_not_quantized="PEFT's HiRA unpacks 8-bit weights to fp16 and multiplies there (peft 0.21)",
    peft_type="HIRA",
    size_keys=("r",),
    reads_base_weights=True,
    factors={"hira_A": "A", "hira_B": "B"},
    has_gradient_at_start=lambda name: ".hira_B." in name,
)
