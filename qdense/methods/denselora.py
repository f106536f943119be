"""DenseLoRA (arXiv:2505.23808): one encoder and decoder for each module kind, an r x r matrix M for each layer."""

from __future__ import annotations

from typing import Any

from qdense.methods.method import AdapterSettings, LinearShapes, Method


def _build_config(adapter: AdapterSettings) -> Any:
    from qdense.tuners.denselora import DenseLoraConfig

    return DenseLoraConfig(
        r=adapter.r,
        alpha=adapter.scaling_alpha,
        dropout=adapter.dropout,
        activation=adapter.activation,
        target_modules=list(adapter.target_modules),
        task_type="CAUSAL_LM",
    )


def _count_parameters(shapes: LinearShapes, num_layers: int, r: int) -> dict[str, int]:
    """(d_in + d_out + l r) r for each module kind: encoder, decoder and l matrices M."""
    return {kind: (d_in + d_out + num_layers * r) * r for kind, (d_in, d_out) in shapes.items()}


METHOD = Method(
    name="denselora",
    build_config=_build_config,
    count_parameters=_count_parameters,
    awake_at_start=lambda name: name.endswith(".decoder"),
)
