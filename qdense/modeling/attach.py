"""A new adapter on a base, as a recipe describes it, and the tensors that it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import qdense.tuners  # noqa: F401  (registers our methods, so that PEFT can load them)
from qdense.errors import AdapterError
from qdense.methods import METHODS
from qdense.modeling.load import BaseModel
from qdense.recipe import AdapterRecipe


def attach_adapter(
    base: BaseModel, recipe: AdapterRecipe, num_steps: int, calibration: Sequence[Mapping[str, torch.Tensor]] = ()
) -> Any:
    """Add a new adapter to the base. Its initial values come from torch's generator: seed it first.

    Args:
        num_steps: of the whole run, for methods with a schedule.
        calibration: batches of training rows, for methods that need them.

    Returns:
        A PeftModel whose adapter has the recipe's dtype; for full fine-tuning the base's model, partly trainable.

    Raises:
        AdapterError: no module of the base has one of the target names, the method does not work on this base, or PEFT
            refuses.
    """
    from peft import get_peft_model

    method, recipe = METHODS[recipe.method], recipe.on(base.model.config.model_type)
    names = {name.rpartition(".")[2] for name, module in base.model.named_modules() if isinstance(module, nn.Linear)}
    missing = [target for target in method.targets(recipe) if target.rpartition(".")[2] not in names]
    if missing:
        raise AdapterError(
            f"adapter.target_modules: {base.name} has no linear module {', '.join(missing)}. It has: {', '.join(sorted(names))}"
        )
    if method.build_config is None:
        return _trainable_base(base, recipe)
    try:
        config = method.build_config(recipe, num_steps)
        if calibration:
            method.calibrate(recipe, config, base.model, calibration)
        # PEFT's autocast would turn bf16 adapters into fp32.
        model = get_peft_model(base.model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"adapter: {error}") from error
    dtype = getattr(torch, recipe.dtype_on(str(base.model.dtype).removeprefix("torch.")))
    for _, tensor in adapter_tensors(model):
        tensor.data = tensor.data.to(dtype)
    method.prepare(model)
    return model


def _trainable_base(base: BaseModel, recipe: AdapterRecipe) -> Any:
    """The base's model with the method's target modules trainable."""
    targets = METHODS[recipe.method].targets(recipe)
    if not targets:
        raise AdapterError(
            f'adapter.method = "{recipe.method}": trains nothing. Score the base with '
            f"`qdense evaluate TASKS --model {base.name}`."
        )
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            if not module.weight.is_floating_point():
                raise AdapterError(
                    f'adapter.method = "{recipe.method}": {name} of {base.name} holds {module.weight.dtype}, which cannot be '
                    'trained. Name an unquantized model, with model.quantization = "none".'
                )
            module.weight.requires_grad_(True)
    return base.model


def adapter_tensors(model: Any, adapter_name: str = "default") -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the saved file and tensor in the model of everything that PEFT saves of the adapter, frozen parts included."""
    from peft import get_peft_model_state_dict

    names = {
        tensor.data_ptr(): name
        for name, tensor in get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        ).items()
        if tensor.numel()  # a layer whose rank was cut to 0 has no memory to identify it
    }
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() in names:
            yield names.pop(tensor.data_ptr()), tensor


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and tensor of each trainable parameter, shared ones once, in a fixed order."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def run_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that a run must save to continue, by name in the model: trained ones, and the adapter's frozen parts."""
    from peft import PeftModel

    kept = {tensor.data_ptr() for _, tensor in adapter_tensors(model)} if isinstance(model, PeftModel) else set()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if tensor.requires_grad or tensor.data_ptr() in kept}
