"""Every adaptation method by name: one file and one line of `METHODS` each.

A method says how to build its PEFT configuration from a recipe, how many parameters it trains, and which of them must
have a gradient from the first step on. Importing this package imports no PEFT.
"""

from __future__ import annotations

from qdense.methods import denselora, lora
from qdense.methods.method import Method

METHODS: dict[str, Method] = {method.name: method for method in (denselora.METHOD, lora.METHOD)}

__all__ = ["METHODS", "Method"]
