"""Every adaptation method by name: one file and one entry of `METHODS` each (an ablation is a further METHOD of its file).

A method says how to build its PEFT configuration from a recipe, how many parameters it trains, and which of them must
have a gradient from the first step on; what it costs a training step; what loading, analysis and merging must know of it.
Importing this package imports no PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdense.methods import adalora, denselora, full, hira, lokr, lora, nora, randlora, red, vera
from qdense.methods.method import Method, MethodSettings

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        denselora.METHOD,
        denselora.FREEZE,
        denselora.ONLY_MATRIX,
        lora.METHOD,
        lora.DORA,
        adalora.METHOD,
        hira.METHOD,
        vera.METHOD,
        randlora.METHOD,
        lokr.METHOD,
        nora.METHOD,
        red.METHOD,
        full.METHOD,
        full.NONE,
    )
}

# PEFT's types that no method here makes, whose adapters load all the same: each keeps all its tensors in its own file.
_OTHER_PEFT_TYPES = {"LOHA", "IA3", "OFT", "BOFT", "HRA", "FOURIERFT", "VBLORA", "LN_TUNING", "MISS", "SHIRA", "C3A"}
_OTHER_SIZES = ("r", "n_frequency", "num_vectors", "vector_length")

PEFT_TYPES = _OTHER_PEFT_TYPES | {method.peft_type for method in METHODS.values() if method.peft_type is not None}


def method_of(config: Mapping[str, Any]) -> Method | None:
    """The method that makes adapters of this configuration (an adapter_config.json); None if none here does."""
    fitting = [
        method
        for method in METHODS.values()
        if method.is_adapter
        and method.peft_type == config.get("peft_type")
        and all(config.get(key) == value for key, value in method.identifying_config.items())
    ]
    return max(fitting, key=lambda method: len(method.identifying_config), default=None)


def sizes_in(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a configuration that are sizes of tensors."""
    method = method_of(config)
    return _OTHER_SIZES if method is None else method.size_keys


__all__ = ["METHODS", "PEFT_TYPES", "Method", "MethodSettings", "method_of", "sizes_in"]
