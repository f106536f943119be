"""VeRA (arXiv:2310.11454), PEFT's own: one frozen random pair of matrices for all layers, two trained vectors for each."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from qdense.methods.costs import (
    NO_COPIES,
    AdapterSettings,
    Computation,
    Costs,
    LinearShapes,
    ModuleCosts,
    added_output,
    dropped_input,
    input_bytes_if_frozen,
)
from qdense.methods.method import Method, MethodSettings


class VeraSettings(MethodSettings):
    """[adapter.vera]"""

    r: int = Field(256, ge=1, le=4096, description="a whole number from 1 to 4096: the rank of the random pair")
    initial_d: float = Field(0.1, gt=0, description="a positive number: the initial value of the vector of length r")


def _build_config(adapter: AdapterSettings, num_steps: int) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        r=adapter.method_settings.r,
        d_initial=adapter.method_settings.initial_d,
        vera_dropout=adapter.dropout,
        target_modules=list(adapter.target_modules),
        task_type="CAUSAL_LM",
    )


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """d_out + r for each layer."""
    return {kind: (d_out + adapter.method_settings.r) * num_layers for kind, (_, d_out) in shapes.items()}


def _count_frozen(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> int:
    """One pair for all layers, as wide as the widest module's input and output."""
    d_in, d_out = (max(sizes) for sizes in zip(*shapes.values(), strict=True))
    return int(adapter.method_settings.r * (d_in + d_out))


def _module(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """The inputs of both vectors are kept: one of length r, and one of d_out."""
    r = at.adapter.method_settings.r
    products = r * (d_in + d_out)
    return ModuleCosts(
        kept=at.width * (r + d_out),
        in_backward=0,
        products=products,
        backward_products=products,  # the pair is frozen
        moved=added_output(at, d_out) + dropped_input(at, d_in) + 2 * at.width * r,
        weights=NO_COPIES,
    )


METHOD = Method(
    name="vera",
    summary="VeRA, PEFT's: two vectors for each module, on one frozen random pair",
    learning_rate=lambda adapter: 3e-2,
    # adapter.r is not read: VeRA's ranks are of another order of magnitude (PEFT's default and the paper's: 256).
    adapter_keys=frozenset({"dropout", "target_modules"}),
    build_config=_build_config,
    count_parameters=_count_parameters,
    costs=Costs(of_input=input_bytes_if_frozen, of_module=_module, frozen_parameters=_count_frozen),
    quantizations=("nf4", "int8", "none"),
    peft_type="VERA",
    size_keys=("r",),
    reads_base_weights=False,
    factors={"vera_lambda_b": "b", "vera_lambda_d": "d"},
    has_gradient_at_start=lambda name: ".vera_lambda_b." in name,
    settings=VeraSettings,
)
