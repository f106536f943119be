"""Every method that trains, the bases that it works on here, and its recipes."""

from __future__ import annotations

from qdense.methods import METHODS
from tests.helpers.runs import recipe_for

TRAINED = [name for name in METHODS if name != "none"]


def bases_of(method):
    """Of NF4 and unquantized, those that the method works on."""
    return [quantization for quantization in METHODS[method].quantizations if quantization != "int8"]


def method_recipe(tiny_model, output, method, quantization, **changes):
    return recipe_for(
        tiny_model,
        output,
        quantization=quantization,
        adapter__method=method,
        training__optimizer="adamw_torch",
        **changes,
    )
