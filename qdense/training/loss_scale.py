"""The scale of a float16 base's loss: gradients below 6e-8 are zero in float16, and those above 65,504 infinite.

The loss is multiplied, the gradients of the (float32) adapter are divided again. The scale doubles after many good steps. A
step whose gradients overflow is repeated with half of it, so every step is made, and a resumed run makes the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_FIRST, _MOST = 2.0**16, 2.0**24
_GOOD_STEPS = 500  # until it doubles


class LossScale:
    """What the loss of each step is multiplied by.

    Attributes:
        value: 1 where it is not used.
        num_good: steps since it last changed.
    """

    def __init__(self, *, is_used: bool) -> None:
        self.is_used = is_used
        self.value, self.num_good = (_FIRST if is_used else 1.0), 0

    def halves_for(self, gradients: Iterable[Tensor | None]) -> bool:
        """Divide the gradients by the scale, in place. If one of them is not finite, and a smaller scale may help, halve the
        scale instead; then the step is to be repeated."""
        if not self.is_used:
            return False
        given = [gradient for gradient in gradients if gradient is not None]
        if self.value > 1 and not all(torch.isfinite(torch.stack([g.norm() for g in given]).cpu())):
            self.value, self.num_good = self.value / 2, 0
            return True
        for gradient in given:
            gradient.div_(self.value)
        self.num_good += 1
        return False

    def grow(self) -> None:
        """Call it after each step that was made."""
        if self.is_used and self.num_good >= _GOOD_STEPS:
            self.value, self.num_good = min(2 * self.value, _MOST), 0

    def state(self) -> dict[str, Any] | None:
        """What a resumed run needs; None where it is not used."""
        return {"value": self.value, "num_good": self.num_good} if self.is_used else None

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restore the state. Raises KeyError or TypeError for something else."""
        if self.is_used and state is not None:
            self.value, self.num_good = float(state["value"]), int(state["num_good"])
