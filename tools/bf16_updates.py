"""What becomes of small updates: adapters in bf16, in bf16 with fp32 masters, and in fp32, side by side on real training.

    .venv/bin/python tools/bf16_updates.py ../shared/data/ft-training_set/math_SUBSTITUTE_clean.json

For each way, learning rate and seed one run of DenseLoRA. Counted at each step, over all trained elements that have a gradient:
how many the step left as they were in the tensor that the optimizer works on (in bf16 the update was rounded away; masters and
fp32 keep it for later steps). And at the end, how many elements of M still are what they were at first, in the dtype that is
saved. The first step is left out: warm-up makes its learning rate 0.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qdense.events import StepDone, Validated
from qdense.provenance import git_hash, package_versions
from qdense.recipe import recipe_from_tables
from qdense.training import loop as loop_module
from qdense.training.run import train

WAYS = {
    "bf16": {"dtype": "bfloat16", "master_weights": False},
    "bf16, fp32 masters": {"dtype": "bfloat16", "master_weights": True},
    "fp32": {"dtype": "float32", "master_weights": False},
}


class Counter:
    """Watches the optimizer of one run."""

    def __init__(self) -> None:
        self.num_updates = self.num_vanished = 0
        self.initial: list[torch.Tensor] = []
        self.parameters: list[torch.nn.Parameter] = []

    def building(self, build: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
        def wrapped(name: str, parameters: Any, **options: Any) -> torch.optim.Optimizer:
            self.parameters = list(parameters)
            self.initial = [parameter.detach().clone() for parameter in self.parameters]
            optimizer = build(name, self.parameters, **options)
            step, is_first = optimizer.step, [True]

            def counted(closure: Any = None) -> Any:
                own = [tensor for group in optimizer.param_groups for tensor in group["params"]]
                before = [tensor.detach().clone() for tensor in own]
                moved_by = [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]
                outcome = step(closure)
                if is_first:
                    is_first.clear()
                    return outcome
                for old, new, gradient in zip(before, own, moved_by, strict=True):
                    has_update = gradient != 0
                    self.num_updates += int(has_update.sum())
                    self.num_vanished += int((has_update & (old == new)).sum())
                return outcome

            optimizer.step = counted  # type: ignore[method-assign]
            return optimizer

        return wrapped

    def share_never_moved(self) -> float:
        """Of M, which are the square tensors."""
        same = total = 0
        for first, parameter in zip(self.initial, self.parameters, strict=True):
            if first.shape[0] == first.shape[1]:
                same += int((first == parameter).sum())
                total += first.numel()
        return same / total


def run(data: Path, way: dict[str, Any], rate: float, seed: int, steps: int) -> tuple[float, float, float, float]:
    """(mean loss of the last quarter, validation loss, share of updates that vanished, share of M that never moved)."""
    folder = Path(tempfile.mkdtemp())
    tables = {
        "model": {"name": "smollm2-135m"},
        "adapter": {"r": 32, "dropout": 0.0, **way},
        "data": {"path": str(data), "train_on": "response", "max_length": 160, "validation_rows": 64},
        "training": {
            "max_steps": steps, "batch_size": 8, "micro_batch_size": 8, "learning_rate": rate, "warmup_steps": steps // 12,
            "optimizer": "adamw_torch", "recompute": "none", "eval_steps": steps, "save_steps": steps,
            "keep": "last", "seed": seed,
        },
        "output": {"dir": str(folder / "run")},
    }  # fmt: skip
    counter, losses, validation = Counter(), [], []

    def emit(event: Any) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)
        elif isinstance(event, Validated):
            validation.append(event.loss)

    build = loop_module.build_optimizer
    loop_module.build_optimizer = counter.building(build)
    try:
        train(recipe_from_tables(tables, source="bf16_updates"), resume=False, data_dir=None, emit=emit)
    finally:
        loop_module.build_optimizer = build
        shutil.rmtree(folder)
    last = statistics.mean(losses[-max(1, steps // 4) :])
    return last, validation[-1], counter.num_vanished / counter.num_updates, counter.share_never_moved()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rates", default="3e-4,3e-3")
    parser.add_argument("--seeds", default="1,2,3")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    print(
        f"{arguments.data.name}, {arguments.steps} steps, seeds {arguments.seeds}, {torch.get_num_threads()} threads; commit"
    )
    print(git_hash(), package_versions())
    print("| lr | adapter | loss of the last quarter, by seed | validation loss | updates vanished | M never moved |")
    print("|---|---|---|---|---|---|", flush=True)
    for rate in map(float, arguments.rates.split(",")):
        for name, way in WAYS.items():
            found = [run(arguments.data, way, rate, seed, arguments.steps) for seed in seeds]
            training, validation, vanished, still = ([result[i] for result in found] for i in range(4))
            print(
                f"| {rate:g} | {name} | {', '.join(f'{loss:.4f}' for loss in training)} "
                f"| {', '.join(f'{loss:.4f}' for loss in validation)} "
                f"| {100 * statistics.mean(vanished):.1f}% | {100 * statistics.mean(still):.1f}% |",
                flush=True,
            )


if __name__ == "__main__":
    main()
