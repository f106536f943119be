"""RED (arXiv:2402.15179), ours (`qdense.tuners.red`): a scale and a bias on the output of each down_proj."""

from __future__ import annotations

from typing import Any

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

_TARGETS = ("down_proj",)


def _build_config(adapter: AdapterSettings, num_steps: int) -> Any:
    from qdense.tuners import RedConfig

    return RedConfig(target_modules=list(_TARGETS), task_type="CAUSAL_LM")


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """2 d_out for each layer: 262,144 on LLaMA-3-8B."""
    return {kind: 2 * d_out * num_layers for kind, (_, d_out) in shapes.items()}


def _module(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """The module's output is kept."""
    return ModuleCosts(
        kept=at.width * d_out,
        in_backward=0,
        products=0,
        backward_products=0,
        moved=4 * at.width * d_out,
        weights=NO_COPIES,
    )


METHOD = Method(
    name="red",
    summary="RED: a scale and a bias on each down_proj output; use adapter.dtype = float32, because bf16 is coarse near 1",
    learning_rate=lambda adapter: 1e-2,
    adapter_keys=frozenset(),
    build_config=_build_config,
    count_parameters=_count_parameters,
    costs=Costs(of_input=lambda at, d_in, num_modules: 0, of_module=_module, frozen_parameters=no_frozen_parameters),
    quantizations=("nf4", "int8", "none"),
    peft_type="RED",
    size_keys=(),
    reads_base_weights=False,
    factors={"red_scale": "scale", "red_bias": "bias"},
    targets=lambda adapter: _TARGETS,
)
