"""VeRA (arXiv:2310.11454), PEFT's own: one frozen random pair of matrices for all layers, two trained vectors for each."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from qdense.methods.method import AdapterSettings, LinearShapes, Method, MethodSettings


class VeraSettings(MethodSettings):
    """[adapter.vera]"""

    r: int = Field(256, ge=1, le=4096, description="a whole number from 1 to 4096: rank of the random pair")
    initial_d: float = Field(0.1, gt=0, description="a positive number: what the vector of length r starts with")


def _build_config(adapter: AdapterSettings, num_steps: int) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        r=adapter.own.r,
        d_initial=adapter.own.initial_d,
        vera_dropout=adapter.dropout,
        target_modules=list(adapter.target_modules),
        task_type="CAUSAL_LM",
    )


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """d_out + r for each layer."""
    return {kind: (d_out + adapter.own.r) * num_layers for kind, (_, d_out) in shapes.items()}


METHOD = Method(
    name="vera",
    summary="VeRA, PEFT's: two vectors for each layer on one frozen random pair",
    # adapter.r is not read: VeRA's ranks are another order of magnitude (PEFT's default and the paper's: 256).
    uses=frozenset({"dropout", "target_modules"}),
    build_config=_build_config,
    count_parameters=_count_parameters,
    awake_at_start=lambda name: ".vera_lambda_b." in name,
    settings=VeraSettings,
)
