"""Stops a run whose numbers go wrong: a loss or gradient that is not finite, tensors that cannot learn, an exploding loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qdense.errors import DivergedError, RunError
from qdense.events import Emit, Notice

REMEDY = "Lower training.learning_rate, or look at these rows."
_MOST_SKIPPED = 10  # steps in a row


class Watch:
    """Checks each step between its backward pass and its update.

    Args:
        parameters: all trainable ones by name.
        has_gradient_at_start: whether the parameter of this name must have a gradient at step 1: `Method.has_gradient_at_start`.
        skips: whether a step that is not finite is skipped instead of ending the run (training.on_nonfinite).
        last_good: a sentence on where a stopped run can continue.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        has_gradient_at_start: Callable[[str], bool],
        *,
        skips: bool,
        emit: Emit,
        last_good: Callable[[], str],
    ) -> None:
        self.parameters, self.has_gradient_at_start = parameters, has_gradient_at_start
        self.skips, self.emit, self.last_good = skips, emit, last_good
        self.num_skipped, self.num_left_out = 0, 0  # steps in a row; in all
        self.mean_loss, self.lowest_mean, self.has_exploded = math.nan, math.inf, False

    def allows(self, step: int, losses: Sequence[float | Tensor], rows: Sequence[Sequence[int]]) -> bool:
        """Whether the step's update may be made. Called with gradients that are not clipped yet.

        Args:
            losses: of each micro-batch; their sum is the step's.
            rows: the numbers of each micro-batch's data rows.

        Raises:
            DivergedError: a loss or gradient is not finite.
            RunError: a tensor cannot learn.
        """
        values = [float(loss) for loss in losses]
        norms = torch.stack(  # one transfer for all of them
            [p.grad.norm().float() if p.grad is not None else torch.zeros((), device=p.device)
             for p in self.parameters.values()]
        ).cpu()  # fmt: skip
        if not all(map(math.isfinite, values)):
            bad = [
                row for loss, numbers in zip(values, rows, strict=True) if not math.isfinite(loss) for row in numbers
            ]
            return self._skip(f"step {step}: the loss is not finite; data rows {bad} (counted from 0).")
        if not torch.isfinite(norms).all():
            all_rows = [row for numbers in rows for row in numbers]
            return self._skip(f"step {step}: a gradient is not finite; data rows {all_rows} (counted from 0).")
        self.num_skipped = 0
        self._tell_of_explosion(step, sum(values))
        if (update := step - self.num_left_out) in (1, 3):
            self._refuse_dead_parameters(step, update, norms)
        return True

    def _skip(self, what: str) -> bool:
        self.num_skipped += 1
        self.num_left_out += 1
        if not self.skips:
            raise DivergedError(f"{what} {REMEDY} {self.last_good()}")
        if self.num_skipped > _MOST_SKIPPED:
            raise DivergedError(
                f"{what} That makes {self.num_skipped} skipped steps in a row (training.on_nonfinite). {REMEDY} "
                f"{self.last_good()}"
            )
        self.emit(Notice(f"{what} This step is skipped (training.on_nonfinite).", "warning"))
        return False

    def _refuse_dead_parameters(self, step: int, update: int, norms: Tensor) -> None:
        dead = [
            name
            for name, norm in zip(self.parameters, norms, strict=True)
            if norm == 0 and (update == 3 or self.has_gradient_at_start(name))
        ]
        if dead:
            raise RunError(
                f"step {step}: {len(dead)} of {len(norms)} trainable tensors have no gradient, so they would never learn: "
                f"{', '.join(dead[:3])}{', ...' if len(dead) > 3 else ''}. The set-up is at fault, not the data: "
                "check adapter.target_modules and training.recompute, and report it."
            )

    def _tell_of_explosion(self, step: int, loss: float) -> None:
        self.mean_loss = loss if math.isnan(self.mean_loss) else 0.9 * self.mean_loss + 0.1 * loss
        self.lowest_mean = min(self.lowest_mean, self.mean_loss)
        if (
            self.mean_loss > 2 * self.lowest_mean + 0.5 and not self.has_exploded
        ):  # single rows cannot raise the mean so much
            self.has_exploded = True
            self.emit(
                Notice(
                    f"step {step}: the loss has exploded: its running mean was {self.lowest_mean:.3g} and is now "
                    f'{self.mean_loss:.3g}. Lower training.learning_rate; training.keep = "best" keeps the weights from before.',
                    "warning",
                )
            )
