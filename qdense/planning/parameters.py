"""Trainable parameters of a method on a model, from shapes alone."""

from __future__ import annotations

import json
from dataclasses import dataclass

from qdense.catalogs.models import CatalogModel
from qdense.errors import ModelError
from qdense.methods import METHODS
from qdense.planning.shapes import model_shape
from qdense.recipe import AdapterRecipe


@dataclass(frozen=True)
class ParameterCount:
    """The counts that `qdense params` reports.

    Attributes:
        r: None where the method does not read it.
        percent: of base and adapter together, as in PEFT and the paper's tables.
    """

    method: str
    model: str
    r: int | None
    trainable_parameters: int
    base_parameters: int
    percent: float
    by_module: dict[str, int]


def count_parameters(model: str | CatalogModel, adapter: AdapterRecipe) -> ParameterCount:
    """Count for a model, given its shapes or its name. Raises ModelError for a name whose shapes are not known."""
    entry = model_shape(model) if isinstance(model, str) else model
    adapter = adapter.on(entry.model_type)
    method = METHODS[adapter.method]
    by_module = method.count_parameters(adapter, _adapted_shapes(entry, adapter), entry.num_layers)
    trainable = sum(by_module.values())
    added = trainable if method.is_adapter else 0
    return ParameterCount(
        method=adapter.method,
        model=model if isinstance(model, str) else model.name,
        r=adapter.r if "r" in method.adapter_keys else None,
        trainable_parameters=trainable,
        base_parameters=entry.num_parameters,
        percent=100 * trainable / (entry.num_parameters + added),
        by_module=by_module,
    )


def count_frozen(shape: CatalogModel, adapter: AdapterRecipe) -> int:
    """Elements that the adapter holds and does not train. Raises ModelError for target modules that the model lacks."""
    adapter = adapter.on(shape.model_type)
    chosen = _adapted_shapes(shape, adapter)
    return METHODS[adapter.method].costs.frozen_parameters(adapter, chosen, shape.num_layers) if chosen else 0


def _adapted_shapes(entry: CatalogModel, adapter: AdapterRecipe) -> dict[str, tuple[int, int]]:
    shapes, targets = entry.linear_shapes(), METHODS[adapter.method].targets(adapter)
    unknown = [name for name in targets if name not in shapes]
    if unknown and entry.family is not None and entry.family.has_experts:
        raise ModelError(
            f"adapter.target_modules: {', '.join(unknown)} of {entry.name} ({entry.model_type}) belong to experts, whose weights "
            'are one tensor for all of them: they cannot be adapted. Adapt its attention: adapter.target_modules = "QKVO"'
        )
    if unknown:
        raise ModelError(
            f"adapter.target_modules: {entry.name} ({entry.model_type}) has no linear module {', '.join(unknown)}. It has "
            f"{', '.join(shapes)}; name those to adapt, for instance adapter.target_modules = {json.dumps(list(shapes)[:2])}"
        )
    return {name: shapes[name] for name in shapes if name in targets}
