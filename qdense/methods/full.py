"""Full fine-tuning, and no training at all. Neither uses PEFT."""

from __future__ import annotations

from dataclasses import replace

from qdense.methods.costs import (
    NO_COPIES,
    AdapterSettings,
    Computation,
    Costs,
    LinearShapes,
    ModuleCosts,
    no_frozen_parameters,
)
from qdense.methods.method import Method


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """d_in d_out for each layer: the weights of the target modules themselves."""
    return {kind: d_in * d_out * num_layers for kind, (d_in, d_out) in shapes.items()}


def _input(at: Computation, d_in: int, num_modules: int) -> float:
    return d_in * at.base_width


def _module(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """The weight's gradient; the other products are the base's."""
    weight = d_in * d_out
    gradient = (at.base_width + 4) * weight  # as computed, and cast to fp32
    return ModuleCosts(
        kept=0,
        in_backward=0,
        products=0,
        backward_products=weight,
        moved=0,
        weights=replace(NO_COPIES, in_backward=gradient),
    )


METHOD = Method(
    name="full",
    summary="full fine-tuning: the weights of the target modules themselves, in the base's dtype",
    learning_rate=lambda adapter: 1e-4,
    adapter_keys=frozenset({"target_modules"}),
    build_config=None,
    count_parameters=_count_parameters,
    costs=Costs(of_input=_input, of_module=_module, frozen_parameters=no_frozen_parameters),
    quantizations=("none",),
    why_not_quantized="weights of 4 or 8 bits cannot be trained",
    peft_type=None,
    size_keys=(),
    reads_base_weights=False,
    factors={"weight": "W"},
)

NONE = Method(
    name="none",
    summary="the base alone",
    learning_rate=METHOD.learning_rate,  # of nothing
    adapter_keys=frozenset(),
    build_config=None,
    count_parameters=lambda adapter, shapes, num_layers: {},
    costs=METHOD.costs,  # of no module
    quantizations=("nf4", "int8", "none"),
    peft_type=None,
    size_keys=(),
    reads_base_weights=False,
    factors={},
    targets=lambda adapter: (),
)
