"""Every adaptation method by name: one file and one line of `METHODS` each (an ablation is a further METHOD of its file).

A method says how to build its PEFT configuration from a recipe, how many parameters it trains, and which of them must
have a gradient from the first step on. Importing this package imports no PEFT.
"""

from __future__ import annotations

from qdense.methods import adalora, denselora, full, lokr, lora, nora, red, vera
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
        vera.METHOD,
        lokr.METHOD,
        nora.METHOD,
        red.METHOD,
        full.METHOD,
        full.NONE,
    )
}

__all__ = ["METHODS", "Method", "MethodSettings"]
