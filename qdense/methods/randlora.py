"""RandLoRA (arXiv:2502.00987), PEFT's own: an update of full rank, the sum of frozen random low-rank products, each scaled.

    dW = scaling * sum over j of B_j diag(lambda_j) A diag(gamma_j)        j = 1 ... n, n = min(d_in, d_out) / r, rounded up

All layers share the random A (r, min) and B_j (max, r); the vectors lambda_j (r,) and gamma_j (min,) are trained.
A and B_j are drawn again from their seed when an adapter is loaded: PEFT would save them with every layer (66 GB on LLaMA-3-8B).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from pydantic import Field

from qdense.methods.costs import (
    AdapterSettings,
    Computation,
    Costs,
    LinearShapes,
    ModuleCosts,
    WeightCosts,
    added_output,
    dropped_input,
)
from qdense.methods.method import Method, MethodSettings


class RandLoraSettings(MethodSettings):
    """[adapter.randlora]; adapter.r is the rank of each random product: a smaller one trains more."""

    scaling: float = Field(20.0, gt=0, description="a positive number: alpha / r; PEFT's default is 20")


def _num_bases(r: int, d_in: int, d_out: int) -> int:
    return math.ceil(min(d_in, d_out) / r)


def _build_config(adapter: AdapterSettings, num_steps: int) -> Any:
    from peft import RandLoraConfig

    with warnings.catch_warnings(action="ignore"):  # A and B_j are not saved
        return RandLoraConfig(
            r=adapter.r,
            randlora_alpha=adapter.method_settings.scaling * adapter.r,
            randlora_dropout=adapter.dropout,
            save_projection=False,
            target_modules=list(adapter.target_modules),
            task_type="CAUSAL_LM",
        )


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """n (r + min(d_in, d_out)) for each layer."""
    r = adapter.r
    return {kind: _num_bases(r, *shape) * (r + min(shape)) * num_layers for kind, shape in shapes.items()}


def _count_frozen(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> int:
    """A, and all B_j as one tensor, as large as the largest modules need."""
    d_in, d_out = (max(sizes) for sizes in zip(*shapes.values(), strict=True))
    smaller, larger = sorted((d_in, d_out))
    return adapter.r * (smaller + larger * _num_bases(adapter.r, d_in, d_out))


def _prepare(model: Any) -> None:
    """Store A and B_j in the adapter's dtype: PEFT draws them in fp32.

    On a CPU, its layers on a quantized base return fp32, in which they compute (peft 0.21); cast that to the input's dtype.
    """
    from peft.tuners.randlora.layer import RandLoraLayer
    from torch import nn

    for module in model.modules():
        if isinstance(module, RandLoraLayer):
            assert isinstance(module, nn.Module)
            for name, trained in module.randlora_lambda.items():
                for drawn in (module.randlora_A, module.randlora_B):  # of all layers
                    assert drawn is not None
                    drawn[name] = drawn[name].to(trained.device, trained.dtype)
            module.register_forward_hook(lambda layer, inputs, output: output.to(inputs[0].dtype))


def _input(at: Computation, d_in: int, num_modules: int) -> float:
    return 0  # whether a module keeps its input depends on its output


def _module(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """All A diag(gamma_j) as one matrix, (n r, min), are computed and kept, with their input.

    On a CPU PEFT computes in fp32, for which each module casts the whole shared B.
    """
    width = at.width if at.is_cuda else 4
    mask_width = 0 if not at.mask_width else 1 if at.is_cuda else width
    smaller, larger = sorted((d_in, d_out))
    rank = _num_bases(at.adapter.r, d_in, d_out) * at.adapter.r
    scaled, fixed = rank * smaller, rank * larger
    cast = width * _count_frozen(at.adapter, at.shapes, 1) if width != at.width else 0
    return ModuleCosts(
        kept=width * (d_in if d_in == smaller else rank) + d_in * mask_width,
        in_backward=2 * width * d_in if cast else 0,
        products=scaled + fixed,
        backward_products=2 * scaled + fixed,
        moved=added_output(at, d_out) + dropped_input(at, d_in),
        weights=WeightCosts(
            kept=width * scaled + cast,
            in_forward=0,
            in_backward=3 * width * scaled,
            products=2 * scaled,
            moved=4 * width * scaled + 2 * cast,
        ),
    )


METHOD = Method(
    name="randlora",
    summary="RandLoRA, PEFT's: a sum of frozen random products of rank r, each scaled, as many as give it full rank",
    learning_rate=lambda adapter: 3e-4,
    adapter_keys=frozenset({"r", "dropout", "target_modules"}),
    build_config=_build_config,
    count_parameters=_count_parameters,
    costs=Costs(of_input=_input, of_module=_module, frozen_parameters=_count_frozen),
    quantizations=("nf4", "int8", "none"),
    peft_type="RANDLORA",
    size_keys=("r",),
    reads_base_weights=False,
    factors={"randlora_lambda": "lambda", "randlora_gamma": "gamma"},
    has_gradient_at_start=lambda name: ".randlora_lambda." in name,
    settings=RandLoraSettings,
    prepare=_prepare,
)
