"""AdamW whose bf16 parameters learn: fp32 master weights, fp32 gradients.

bf16 keeps 8 bits: beside a weight of 0.1 an update below 0.0002 vanishes, and with M's size and the paper's learning rate
that is most of them. So the optimizer works on fp32 copies (masters), keeps them in its state and its checkpoints, and
writes them, rounded, into the bf16 parameters after each step. bitsandbytes' paged and 8-bit optimizers run on the masters
just as they would on the parameters; the masters themselves are not paged (4 bytes a parameter: 8 MB for the paper's r 32).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Optimizer name in a recipe -> (class, its further arguments).
_BITSANDBYTES = {
    "paged_adamw_8bit": {"optim_bits": 8, "is_paged": True},
    "paged_adamw_32bit": {"optim_bits": 32, "is_paged": True},
    "adamw_8bit": {"optim_bits": 8},
}


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float, master_weights: bool
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.999, eps 1e-8) by its recipe name.

    Args:
        name: paged_adamw_8bit, paged_adamw_32bit, adamw_8bit or adamw_torch.
        parameters: trainable, float32 or bfloat16.
        master_weights: False steps bf16 parameters in bf16, for comparison.
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

    A subclass, not a wrapper: learning-rate schedulers, accelerate and Trainer take it for the optimizer that it is.
    """

    class MasterWeights(base):
        def __init__(self, parameters: list[nn.Parameter], **options: Any) -> None:
            self._parameters = parameters
            self._masters = [
                nn.Parameter(p.detach().to(torch.float32, copy=True), requires_grad=True) for p in parameters
            ]
            for parameter in parameters:
                # Micro-batches then add up in fp32 too, and no copy is needed for the master's gradient.
                parameter.grad_dtype = torch.float32
            super().__init__(self._masters, **options)

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
        def adopt(self) -> None:
            """Take over values that were changed beside `step`: where a parameter is not its master, rounded."""
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
