"""RED (arXiv:2402.15179), ours (`qdense.tuners.red`): a scale and a bias on the output of each down_proj."""

from __future__ import annotations

from typing import Any

from qdense.methods.method import AdapterSettings, LinearShapes, Method

_TARGETS = ("down_proj",)


def _build_config(adapter: AdapterSettings, num_steps: int) -> Any:
    from qdense.tuners import RedConfig

    return RedConfig(target_modules=list(_TARGETS), task_type="CAUSAL_LM")


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """2 d_out for each layer: 262,144 on LLaMA-3-8B."""
    return {kind: 2 * d_out * num_layers for kind, (_, d_out) in shapes.items()}


METHOD = Method(
    name="red",
    summary="RED: a scale and a bias on each down_proj output; give it adapter.dtype = float32, for bf16 is coarse next to 1",
    uses=frozenset(),
    build_config=_build_config,
    count_parameters=_count_parameters,
    targets=lambda adapter: _TARGETS,
)
