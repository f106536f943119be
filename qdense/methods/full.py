"""Full fine-tuning, and no training at all: the two ends between which every adapter lies. PEFT has no part in either."""

from __future__ import annotations

from qdense.methods.method import AdapterSettings, LinearShapes, Method


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """d_in d_out for each layer: the weights of the target modules themselves."""
    return {kind: d_in * d_out * num_layers for kind, (d_in, d_out) in shapes.items()}


METHOD = Method(
    name="full",
    summary="full fine-tuning: the weights of the target modules themselves, in the base's dtype",
    uses=frozenset({"target_modules"}),
    build_config=None,
    count_parameters=_count_parameters,
    quantizations=("none",),
    why_not_quantized="weights of 4 or 8 bits cannot be trained",
)

NONE = Method(
    name="none",
    summary="the base as it is",
    uses=frozenset(),
    build_config=None,
    count_parameters=lambda adapter, shapes, num_layers: {},
)
