"""DenseLoRA (arXiv:2505.23808) and the paper's two ablations of it (Table 4).

One encoder and decoder for each module kind, an r x r matrix M for each layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qdense.methods.method import AdapterSettings, LinearShapes, Method

_USES = frozenset({"r", "alpha", "dropout", "activation", "sharing", "zero_init", "target_modules"})


def _config(adapter: AdapterSettings, **changes: Any) -> Any:
    from qdense.tuners import DenseLoraConfig

    settings: dict[str, Any] = {
        "r": adapter.r,
        "alpha": adapter.scaling_alpha,
        "dropout": adapter.dropout,
        "activation": adapter.activation,
        "sharing": adapter.sharing,
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
    pairs = num_layers if adapter.sharing == "none" else 1
    return {name: sum(shapes[kinds[0]]) * adapter.r * pairs for name, kinds in _groups(adapter, shapes).items()}


def _count_matrices(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """l r^2 for each module kind: a matrix M for each layer."""
    return {name: len(kinds) * num_layers * adapter.r**2 for name, kinds in _groups(adapter, shapes).items()}


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """(d_in + d_out + l r) r for each module kind: encoder, decoder and l matrices M."""
    matrices = _count_matrices(adapter, shapes, num_layers)
    return {name: count + matrices[name] for name, count in _count_shared(adapter, shapes, num_layers).items()}


def _awake_at_start(name: str) -> bool:
    return name.endswith(".decoder")


METHOD = Method(
    name="denselora",
    summary="DenseLoRA: shared encoder and decoder, a dense matrix for each layer",
    uses=_USES,
    build_config=lambda adapter, num_steps: _config(adapter),
    count_parameters=_count_parameters,
    awake_at_start=_awake_at_start,
)


def _freeze_config(adapter: AdapterSettings) -> Any:
    # Behind a frozen decoder of zeros nothing would ever learn, so M takes the place of what starts at zero.
    zero_init = "m" if adapter.zero_init == "decoder" else adapter.zero_init
    return _config(adapter, freeze_shared=True, zero_init=zero_init)


FREEZE = dataclasses.replace(
    METHOD,
    name="denselora-freeze",
    summary='ablation: encoder and decoder stay as drawn; M is trained, from zero (zero_init = "none": from a random start)',
    build_config=lambda adapter, num_steps: _freeze_config(adapter),
    count_parameters=_count_matrices,
    awake_at_start=lambda name: True,
)

ONLY_MATRIX = dataclasses.replace(
    METHOD,
    name="denselora-only-matrix",
    summary="ablation: no activations, so the adapter is a matrix and can be merged",
    uses=_USES - {"activation"},
    build_config=lambda adapter, num_steps: _config(adapter, activation="none"),
)
