"""DenseLoRA (arXiv:2505.23808) and the paper's two ablations of it (Table 4).

One encoder and decoder for each module kind, an r x r matrix M for each layer.
"""

from __future__ import annotations

import dataclasses
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

_ADAPTER_KEYS = frozenset(
    {"r", "alpha", "dropout", "activation", "sharing", "layer_groups", "init", "zero_init", "target_modules"}
)


def _config(adapter: AdapterSettings, **changes: Any) -> Any:
    from qdense.tuners import DenseLoraConfig

    settings: dict[str, Any] = {
        "r": adapter.r,
        "alpha": adapter.scaling_alpha,
        "dropout": adapter.dropout,
        "activation": adapter.activation,
        "sharing": adapter.sharing,
        "layer_groups": adapter.layer_groups,
        "init": adapter.init,
        "zero_init": adapter.zero_init,
        "target_modules": list(adapter.target_modules),
        "task_type": "CAUSAL_LM",
    }
    return DenseLoraConfig(**(settings | changes))


def _groups(adapter: AdapterSettings, shapes: LinearShapes) -> dict[str, list[str]]:
    """The module kinds that share an encoder and decoder, by the name of what they share."""
    groups: dict[str, list[str]] = {}
    for kind, shape in shapes.items():
        groups.setdefault(f"{shape}" if adapter.sharing == "shape" else kind, []).append(kind)
    return {" + ".join(kinds): kinds for kinds in groups.values()}


def _count_shared(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """(d_in + d_out) r for each pair of encoder and decoder."""
    pairs = num_layers if adapter.sharing == "none" else adapter.layer_groups
    return {name: sum(shapes[kinds[0]]) * adapter.r * pairs for name, kinds in _groups(adapter, shapes).items()}


def _count_matrices(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """l r^2 for each module kind: a matrix M for each layer."""
    return {name: len(kinds) * num_layers * adapter.r**2 for name, kinds in _groups(adapter, shapes).items()}


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """(d_in + d_out + l r) r for each module kind: encoder, decoder and l matrices M."""
    matrices = _count_matrices(adapter, shapes, num_layers)
    return {name: count + matrices[name] for name, count in _count_shared(adapter, shapes, num_layers).items()}


def _input(at: Computation, d_in: int, num_modules: int) -> float:
    """All modules that read the input share one copy and one mask. The fused kernels keep no masks."""
    return d_in * (at.width + (0 if at.is_fused else at.mask_width))


def _input_of_frozen(at: Computation, d_in: int, num_modules: int) -> float:
    return 0 if at.is_fused else d_in * at.mask_width


def _module(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """Kept are the encoding before and after the activation and after M, the input of the second activation, and masks."""
    adapter, width, mask = at.adapter, at.width, 0 if at.is_fused else at.mask_width
    output = 0 if at.is_fused else (width if adapter.activation != "none" else 0) + mask
    products = adapter.r * (d_in + d_out + adapter.r)
    moved = 2 * d_out + d_in if at.is_fused else 12 * d_out + 6 * d_in
    return ModuleCosts(
        kept=adapter.r * (3 * width + mask) + d_out * output,
        in_backward=0,
        products=products,
        backward_products=2 * products,
        moved=width * moved,
        weights=NO_COPIES,
    )


def _module_of_frozen(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """M alone has a gradient: what the frozen encoder and decoder read is not kept."""
    module, r = _module(at, d_in, d_out), at.adapter.r
    return dataclasses.replace(
        module,
        kept=module.kept - r * at.width,
        backward_products=module.products + r * r,
    )


def _module_of_matrix(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """As for DenseLoRA, without the inputs of the activations."""
    module, r, mask = _module(at, d_in, d_out), at.adapter.r, 0 if at.is_fused else at.mask_width
    return dataclasses.replace(module, kept=r * (2 * at.width + mask) + d_out * mask)


_COSTS = Costs(
    of_input=_input,
    of_module=_module,
    frozen_parameters=no_frozen_parameters,
    has_fused_kernels=True,
    stops_before_last_product=True,
)


def _learning_rate(adapter: AdapterSettings) -> float:
    """The balanced start needs no higher rate than LoRA."""
    return 3e-3 if adapter.init == "balanced" else 1e-2


def _has_gradient_at_start(name: str) -> bool:
    return name.endswith(".decoder")


METHOD = Method(
    name="denselora",
    summary="DenseLoRA: shared encoder and decoder, a dense matrix for each layer",
    learning_rate=_learning_rate,
    adapter_keys=_ADAPTER_KEYS,
    build_config=lambda adapter, num_steps: _config(adapter),
    count_parameters=_count_parameters,
    costs=_COSTS,
    quantizations=("nf4", "int8", "none"),
    peft_type="DENSELORA",
    size_keys=("r",),
    reads_base_weights=False,
    factors={"denselora_m": "M", "encoder": "encoder", "decoder": "decoder"},
    has_gradient_at_start=_has_gradient_at_start,
)


def _freeze_config(adapter: AdapterSettings) -> Any:
    # With a frozen decoder of zeros nothing could learn, so M starts at zero instead.
    zero_init = "m" if adapter.zero_init == "decoder" else adapter.zero_init
    return _config(adapter, freeze_shared=True, zero_init=zero_init, init="paper")


FREEZE = dataclasses.replace(
    METHOD,
    name="denselora-freeze",
    summary="ablation: trains M alone, from zero; encoder and decoder stay random",
    adapter_keys=_ADAPTER_KEYS - {"init"},
    build_config=lambda adapter, num_steps: _freeze_config(adapter),
    count_parameters=_count_matrices,
    costs=dataclasses.replace(
        _COSTS,
        of_input=_input_of_frozen,
        of_module=_module_of_frozen,
        frozen_parameters=lambda *arguments: sum(_count_shared(*arguments).values()),
    ),
    factors={"denselora_m": "M"},
    identifying_config={"freeze_shared": True},
    has_gradient_at_start=lambda name: True,
)

ONLY_MATRIX = dataclasses.replace(
    METHOD,
    name="denselora-only-matrix",
    learning_rate=lambda adapter: 3e-3,
    summary="ablation: no activations, so the adapter is a matrix and can be merged",
    adapter_keys=_ADAPTER_KEYS - {"activation"},
    costs=dataclasses.replace(_COSTS, of_module=_module_of_matrix),
    identifying_config={"activation": "none"},
    build_config=lambda adapter, num_steps: _config(adapter, activation="none"),
)
