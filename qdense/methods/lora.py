"""LoRA (arXiv:2106.09685), the baseline of every comparison, and DoRA (arXiv:2402.09353); both are PEFT's own."""

from __future__ import annotations

import dataclasses
from typing import Any

from qdense.methods.method import AdapterSettings, LinearShapes, Method


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


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """(d_in + d_out) r for each layer."""
    return {kind: (d_in + d_out) * adapter.r * num_layers for kind, (d_in, d_out) in shapes.items()}


def _count_dora(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """LoRA's, and a magnitude for each output: d_out for each layer."""
    lora = _count_parameters(adapter, shapes, num_layers)
    return {kind: lora[kind] + d_out * num_layers for kind, (_, d_out) in shapes.items()}


METHOD = Method(
    name="lora",
    summary="LoRA, PEFT's",
    uses=frozenset({"r", "alpha", "dropout", "target_modules"}),
    build_config=lambda adapter, num_steps: _config(adapter),
    count_parameters=_count_parameters,
    awake_at_start=lambda name: ".lora_B." in name,
)

DORA = dataclasses.replace(
    METHOD,
    name="dora",
    summary="DoRA, PEFT's: LoRA for the direction of the weights, a trained magnitude; unpacks every weight in each forward",
    build_config=lambda adapter, num_steps: _config(adapter, use_dora=True),
    count_parameters=_count_dora,
    awake_at_start=lambda name: ".lora_B." in name or ".lora_magnitude_vector." in name,
)
