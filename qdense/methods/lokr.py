"""LoKr (arXiv:2212.10650; LyCORIS, arXiv:2309.14859), PEFT's own: the update is a Kronecker product of two small matrices.

PEFT's layer reshapes the product to the shape of the base's weight, which for a 4-bit weight is that of its packed bytes
(peft 0.21), so that it fails on NF4; `prepare` replaces it by one that keeps the product's own shape.
"""

from __future__ import annotations

from types import MethodType
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from qdense.methods.costs import (
    AdapterSettings,
    Computation,
    Costs,
    LinearShapes,
    ModuleCosts,
    WeightCosts,
    input_bytes_if_trained,
    no_frozen_parameters,
)
from qdense.methods.method import Method, MethodSettings


def _known_factor(factor: int) -> int:
    if factor < 2 and factor != -1:
        raise ValueError
    return factor


class LokrSettings(MethodSettings):
    """[adapter.lokr]"""

    decompose_factor: Annotated[int, AfterValidator(_known_factor)] = Field(
        -1, description="a whole number, 2 or more: size of the left factor; or -1: both as square as possible"
    )
    decompose_both: bool = Field(False, description="true or false: whether the left factor may have a low rank too")


def _build_config(adapter: AdapterSettings, num_steps: int) -> Any:
    from peft import LoKrConfig

    return LoKrConfig(
        r=adapter.r,
        alpha=adapter.scaling_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        decompose_factor=adapter.method_settings.decompose_factor,
        decompose_both=adapter.method_settings.decompose_both,
        target_modules=list(adapter.target_modules),
        task_type="CAUSAL_LM",
    )


def _factors(dimension: int, limit: int) -> tuple[int, int]:
    """(m, n) with m n = dimension as PEFT's `factorization` finds them: m = limit if it divides, else as even as possible."""
    if limit > 0 and dimension % limit == 0:
        return limit, dimension // limit
    most = dimension if limit < 0 else limit
    m = max(m for m in range(1, int(dimension**0.5) + 1) if dimension % m == 0 and m <= most)
    return m, dimension // m


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """Two factors for each layer, each in full or, if smaller, of rank r."""
    r, settings = adapter.r, adapter.method_settings
    counts = {}
    for kind, (d_in, d_out) in shapes.items():
        (out_l, out_k), (in_m, in_n) = (
            _factors(d_out, settings.decompose_factor),
            _factors(d_in, settings.decompose_factor),
        )
        is_left_low = settings.decompose_both and r < max(out_l, in_m) / 2
        is_right_low = r < max(out_k, in_n) / 2
        left = r * (out_l + in_m) if is_left_low else out_l * in_m
        right = r * (out_k + in_n) if is_right_low else out_k * in_n
        counts[kind] = (left + right) * num_layers
    return counts


def _prepare(model: Any) -> None:
    from peft.tuners.lokr.layer import LoKrLayer

    for module in model.modules():
        if isinstance(module, LoKrLayer) and module.get_base_layer().weight.shape != (
            module.get_base_layer().out_features,
            module.get_base_layer().in_features,
        ):
            module.get_delta_weight = MethodType(_delta_weight, module)  # type: ignore[method-assign]


def _delta_weight(layer: Any, adapter_name: str, *, apply_rank_dropout: bool = False) -> Any:
    """scaling * kron(w1, w2): (d_out, d_in). Rank dropout is PEFT's and not used here."""
    import torch

    def factor(which: str) -> torch.Tensor:
        whole = getattr(layer, f"lokr_{which}")
        if adapter_name in whole:
            return whole[adapter_name]
        return getattr(layer, f"lokr_{which}_a")[adapter_name] @ getattr(layer, f"lokr_{which}_b")[adapter_name]

    return layer.scaling[adapter_name] * torch.kron(factor("w1"), factor("w2"))


def _module(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """The full product, d_out x d_in, is computed and kept for the input's gradient."""
    weight = d_in * d_out
    return ModuleCosts(
        kept=0,
        in_backward=0,
        products=weight,
        backward_products=2 * weight,
        moved=3 * at.width * d_out,
        weights=WeightCosts(
            kept=at.width * weight,
            in_forward=at.width * weight,  # before it is scaled
            in_backward=2 * at.width * weight,
            products=weight,
            moved=4 * at.width * weight,
        ),
    )


METHOD = Method(
    name="lokr",
    summary="LoKr, PEFT's: a Kronecker product of two small factors",
    learning_rate=lambda adapter: 3e-3,
    adapter_keys=frozenset({"r", "alpha", "target_modules"}),  # PEFT's has no dropout on the input
    build_config=_build_config,
    count_parameters=_count_parameters,
    costs=Costs(of_input=input_bytes_if_trained, of_module=_module, frozen_parameters=no_frozen_parameters),
    quantizations=("nf4", "int8", "none"),
    peft_type="LOKR",
    size_keys=(),  # a rank as large as the matrix means the full matrix
    reads_base_weights=False,
    factors={
        name: name.removeprefix("lokr_")
        for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    },
    has_gradient_at_start=lambda name: ".lokr_w1." in name or ".lokr_w1_a." in name,
    settings=LokrSettings,
    prepare=_prepare,
)
