"""LoRA (arXiv:2106.09685), the baseline of every comparison, and DoRA (arXiv:2402.09353), both PEFT's own."""

from __future__ import annotations

import dataclasses
from typing import Any

from qdense.methods.costs import (
    AdapterSettings,
    Computation,
    Costs,
    LinearShapes,
    ModuleCosts,
    WeightCosts,
    count_low_rank,
    dropped_input,
    input_bytes_if_trained,
    low_rank,
    no_frozen_parameters,
)
from qdense.methods.method import Method


def _config(adapter: AdapterSettings, **changes: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.scaling_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.target_modules),
        task_type="CAUSAL_LM",
        **changes,
    )


def _count_dora(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """LoRA's, and a magnitude for each output: d_out for each layer."""
    lora = count_low_rank(adapter, shapes, num_layers)
    return {kind: lora[kind] + d_out * num_layers for kind, (_, d_out) in shapes.items()}


def _module(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    return low_rank(at, d_in, d_out, r=at.adapter.r)


def _module_of_dora(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """LoRA's, and the norm of each row of W + scaling B A, for which both are computed in each forward pass.

    B A is B(A(I)) with an identity of d_in x d_in. Where elements of x are dropped, the base's output is computed a second
    time from what is left, so that autograd keeps the unpacked weight.
    """
    lora, weight = _module(at, d_in, d_out), d_in * d_out
    is_computed_twice = at.mask_width > 0
    unpacked = weight * at.unpacked_width
    twice = weight if is_computed_twice else 0
    return dataclasses.replace(
        lora,
        # The base's output and LoRA's, which the magnitude multiplies.
        kept=lora.kept + 2 * at.width * d_out,
        products=lora.products + twice,
        backward_products=lora.backward_products + twice,
        moved=12 * at.width * d_out + dropped_input(at, d_in),
        weights=WeightCosts(
            kept=unpacked if is_computed_twice else 0,
            # The identity, B A, scaled, and added to W.
            in_forward=at.width * (d_in * d_in + 3 * weight) + (0 if is_computed_twice else unpacked),
            in_backward=0,
            products=at.adapter.r * (weight + d_in * d_in),
            moved=at.width * (2 * d_in * d_in + 8 * weight),
        ),
    )


METHOD = Method(
    name="lora",
    summary="LoRA, PEFT's",
    learning_rate=lambda adapter: 3e-3,
    adapter_keys=frozenset({"r", "alpha", "dropout", "target_modules"}),
    build_config=lambda adapter, num_steps: _config(adapter),
    count_parameters=count_low_rank,
    costs=Costs(of_input=input_bytes_if_trained, of_module=_module, frozen_parameters=no_frozen_parameters),
    quantizations=("nf4", "int8", "none"),
    peft_type="LORA",
    size_keys=("r",),
    reads_base_weights=False,
    factors={"lora_A": "A", "lora_B": "B"},
    has_gradient_at_start=lambda name: ".lora_B." in name,
)

DORA = dataclasses.replace(
    METHOD,
    name="dora",
    learning_rate=lambda adapter: 1e-3,
    summary="DoRA, PEFT's: LoRA for the weights' direction, and a trained magnitude; unpacks every weight in each forward pass",
    build_config=lambda adapter, num_steps: _config(adapter, use_dora=True),
    count_parameters=_count_dora,
    costs=dataclasses.replace(METHOD.costs, of_module=_module_of_dora),
    quantizations=("nf4", "none"),
    why_not_quantized="PEFT's DoRA loses the scales of 8-bit weights when it unpacks them on a CPU (peft 0.21)",
    reads_base_weights=True,
    factors={**METHOD.factors, "lora_magnitude_vector": "magnitude"},
    identifying_config={"use_dora": True},
    has_gradient_at_start=lambda name: ".lora_B." in name or ".lora_magnitude_vector." in name,
)
