"""NoRA (arXiv:2408.10280), ours (`qdense.tuners.nora`): a small trained pair inside a frozen one, the SVD of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

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


class NoraSettings(MethodSettings):
    """[adapter.nora]; adapter.r is the rank of the frozen pair. No settings for LLaMA are published; these are ours."""

    r_inner: int | None = Field(
        None,
        ge=1,
        le=512,
        description="a whole number, at most adapter.r; omitted, r / 2, which gives a layer DenseLoRA's r^2 numbers",
    )
    split: Literal["both", "left", "right"] = Field(
        "both", description="both, left or right: which factor of the frozen pair holds the singular values"
    )
    calibration_rows: int = Field(
        32, ge=0, description="a whole number of training rows whose activations weight the SVD; 0 gives a plain SVD"
    )


def _r_inner(adapter: AdapterSettings) -> int:
    return int(adapter.method_settings.r_inner or max(1, adapter.r // 2))


def _build_config(adapter: AdapterSettings, num_steps: int) -> Any:
    from qdense.tuners import NoraConfig

    return NoraConfig(
        r=adapter.r,
        r_inner=_r_inner(adapter),
        # The recipe's alpha is for alpha / r.
        alpha=adapter.scaling_alpha * _r_inner(adapter) / adapter.r,
        split=adapter.method_settings.split,
        dropout=adapter.dropout,
        target_modules=list(adapter.target_modules),
        task_type="CAUSAL_LM",
    )


def _calibrate(adapter: AdapterSettings, config: Any, model: Any, batches: Sequence[Any]) -> None:
    from qdense.tuners.nora import calibrate

    config.statistics = calibrate(model, batches, config)


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """2 r r_inner for each layer."""
    return {kind: 2 * adapter.r * _r_inner(adapter) * num_layers for kind in shapes}


def _count_frozen(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> int:
    """The outer pair: (d_in + d_out) r for each layer."""
    return sum(d_in + d_out for d_in, d_out in shapes.values()) * adapter.r * num_layers


def _module(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """Both inner factors' inputs, of r and r_inner, are kept; the frozen outer pair's are not."""
    r, r_inner = at.adapter.r, _r_inner(at.adapter)
    frozen, trained = r * (d_in + d_out), 2 * r * r_inner
    return ModuleCosts(
        kept=at.width * (r + r_inner),
        in_backward=0,
        products=frozen + trained,
        backward_products=frozen + 2 * trained,
        moved=added_output(at, d_out) + dropped_input(at, d_in),
        weights=NO_COPIES,
    )


METHOD = Method(
    name="nora",
    summary="NoRA: a trained pair inside the frozen SVD of the weight",
    learning_rate=lambda adapter: 3e-3,
    adapter_keys=frozenset({"r", "alpha", "dropout", "target_modules"}),
    build_config=_build_config,
    count_parameters=_count_parameters,
    costs=Costs(of_input=input_bytes_if_frozen, of_module=_module, frozen_parameters=_count_frozen),
    quantizations=("nf4", "int8", "none"),
    peft_type="NORA",
    size_keys=("r", "r_inner"),
    reads_base_weights=False,  # only when a fresh adapter is made
    factors={"nora_inner_a": "A", "nora_inner_b": "B"},
    has_gradient_at_start=lambda name: ".nora_inner_b." in name,
    settings=NoraSettings,
    num_calibration_rows=lambda adapter: int(adapter.method_settings.calibration_rows),
    calibrate=_calibrate,
)
