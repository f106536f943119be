"""LoRA (arXiv:2106.09685), PEFT's own: the baseline of every comparison."""

from __future__ import annotations

from typing import Any

from qdense.methods.method import AdapterSettings, LinearShapes, Method


def _build_config(adapter: AdapterSettings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.scaling_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.target_modules),
        task_type="CAUSAL_LM",
    )


def _count_parameters(shapes: LinearShapes, num_layers: int, r: int) -> dict[str, int]:
    """(d_in + d_out) r for each layer."""
    return {kind: (d_in + d_out) * r * num_layers for kind, (d_in, d_out) in shapes.items()}


METHOD = Method(
    name="lora",
    build_config=_build_config,
    count_parameters=_count_parameters,
    awake_at_start=lambda name: ".lora_B." in name,
)
