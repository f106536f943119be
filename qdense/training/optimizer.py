"""AdamW whose bf16 parameters learn: fp32 master weights, fp32 gradients.

bf16 keeps 8 bits: next to a weight of 0.1 an update below 0.0002 vanishes, and at the paper's learning rate that is most
updates of M. So the optimizer works on fp32 copies (masters), keeps them in its state and its checkpoints,
and
writes them, rounded, into the bf16 parameters after each step. bitsandbytes' paged and 8-bit optimizers run on the masters
just as they would on the parameters; the masters themselves are not paged (4 bytes a parameter: 8 MB for the paper's r 32).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Optimizer name in a recipe -> (class, its further arguments).
_BITSANDBYTES = {
    "paged_adamw_8bit": {"optim_bits": 8, "is_paged": True},
    "paged_adamw_32bit": {"optim_bits": 32, "is_paged": True},
    "adamw_8bit": {"optim_bits": 8},
}


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    weight_decay: float,
    master_weights: bool,
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.999, eps 1e-8) by its name in a recipe.

    Args:
        name: paged_adamw_8bit, paged_adamw_32bit, adamw_8bit or adamw_torch.
        parameters: trainable, float32 or bfloat16; or groups of them as PyTorch's optimizers take: {"params": [...], "lr": ...}.
        master_weights: False updates bf16 parameters directly, for comparison.
    """
    base: Any
    if name == "adamw_torch":
        base, options = torch.optim.AdamW, {}
    else:
        import bitsandbytes

        base, options = bitsandbytes.optim.AdamW, dict(_BITSANDBYTES[name])
    cls = _with_masters(base) if master_weights else base
    optimizer: torch.optim.Optimizer = cls(
        list(parameters), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, **options
    )
    return optimizer


def _with_masters(base: Any) -> Any:
    """A subclass of an optimizer class that steps fp32 masters of the parameters it is given.

    A subclass rather than a wrapper, because learning-rate schedulers require an Optimizer.
    """

    class MasterWeights(base):
        def __init__(self, parameters: list[Any], **options: Any) -> None:
            groups = parameters if isinstance(parameters[0], dict) else [{"params": parameters}]
            self._parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
            self._masters = [
                nn.Parameter(p.detach().to(torch.float32, copy=True), requires_grad=True) for p in self._parameters
            ]
            for parameter in self._parameters:
                # Gradients of micro-batches are then summed in fp32 too, and the master's gradient needs no copy.
                parameter.grad_dtype = torch.float32
            masters = iter(self._masters)
            super().__init__(
                [{**group, "params": list(itertools.islice(masters, len(group["params"])))} for group in groups],
                **options,
            )

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                master.grad = parameter.grad
            outcome = super().step(closure)
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                parameter.copy_(master)
                master.grad = None
            return outcome

        @torch.no_grad()
        def take_over_changes(self) -> None:
            """Copy into the masters what something other than `step` changed: elements that differ from their rounded master."""
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                changed = parameter != master.to(parameter.dtype)
                master.copy_(torch.where(changed, parameter.to(master.dtype), master))

        def zero_grad(self, set_to_none: bool = True) -> None:
            for parameter in self._parameters:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "masters": [master.detach() for master in self._masters]}

        @torch.no_grad()
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            state_dict = dict(state_dict)
            masters = state_dict.pop("masters")
            super().load_state_dict(state_dict)
            for parameter, master, saved in zip(self._parameters, self._masters, masters, strict=True):
                master.copy_(saved)
                parameter.copy_(master)

    MasterWeights.__name__ = f"MasterWeights{base.__name__}"
    return MasterWeights


def take_over_changes(optimizer: torch.optim.Optimizer) -> None:
    """Tell the optimizer that parameters were changed outside its own step, as AdaLoRA does. Only masters need this."""
    if hasattr(optimizer, "take_over_changes"):
        optimizer.take_over_changes()


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The optimizer's state as tensors and as numbers, both by parameter. Its settings come from the recipe.

    Returns:
        ("masters.3", "3.exp_avg", ...) -> tensor; and "3" -> {"step": 41, ...}.
    """
    state = optimizer.state_dict()
    tensors = {f"masters.{index}": master for index, master in enumerate(state.get("masters", ()))}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in _flat(values):
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    return tensors, numbers


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """bitsandbytes keeps quantized moments in a nested table; loading accepts it flat."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, value


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, dict[str, Any]]
) -> None:
    """Restore what `optimizer_state` returned. Raises ValueError or KeyError if it belongs to another optimizer."""
    state = optimizer.state_dict()
    values: dict[int, dict[str, Any]] = {int(index): dict(own) for index, own in numbers.items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if index != "masters":
            values.setdefault(int(index), {})[key] = tensor
    state["state"] = values
    if "masters" in state:
        state["masters"] = [tensors[f"masters.{index}"] for index in range(len(state["masters"]))]
    optimizer.load_state_dict(state)
