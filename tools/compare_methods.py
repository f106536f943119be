"""Every method on one footing: same base, rows, steps and evaluation; only `adapter.method` and its learning rate differ.

    .venv/bin/python tools/compare_methods.py ../shared/data/ft-training_set/math_SUBSTITUTE_clean.json addsub \\
        --data-dir ../shared/data --longest 300 --output /tmp/compare-math

For each method the learning rate is chosen first, on one grid of half decades that all share: runs of --search-steps, by
default as long as the final ones, from 3e-3 towards lower validation loss (the mean over the seeds) until both neighbours of
the best rate are worse. Then one run for each seed at the chosen rate, scored on the tasks. Each run is the command that a
user would type (`qdense train`, `qdense evaluate`) in a process of its own, so that its peak memory is its own. Steps are
timed apart from that, all methods in turn on the same batch in one process, so that other work on the machine meets all of
them. Runs that are finished are not repeated: the script can be stopped and started again. It ends with one table, in
Markdown, of all methods, those that did badly too.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdense.comparison.compare import compare
from qdense.comparison.evaluations import load_evaluation
from qdense.data.examples import collate, encode_rows
from qdense.data.sources import load_training_set
from qdense.methods import METHODS
from qdense.modeling.attach import attach_adapter, trainable_parameters
from qdense.modeling.load import load_base
from qdense.modeling.loss import without_logits
from qdense.provenance import git_hash, package_versions
from qdense.recipe import load_recipe
from qdense.runs import RunFolder
from qdense.training.metrics import read_metrics
from qdense.training.optimizer import build_optimizer

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
START = 3e-3
# What else must differ. denselora-freeze has the paper's r; bf16 is too coarse next to RED's scale of 1. LoRA of r 2 has
# about as many parameters as DenseLoRA of r 32.
VARIANTS: dict[str, dict[str, Any]] = {name: {"adapter.method": name} for name in METHODS if name != "none"}
VARIANTS["lora-r2"] = {"adapter.method": "lora", "adapter.r": 2}
VARIANTS["denselora-freeze"]["adapter.r"] = 128
VARIANTS["red"]["adapter.dtype"] = "float32"
VARIANTS["full"]["model.quantization"] = "none"
NUM_TIMED = 12
_TIMING_RATE = 1e-6


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    recipe: Path
    model: str
    r: int
    steps: int
    search_steps: int
    seeds: tuple[int, ...]
    evaluation: tuple[str, ...]
    output: Path


@dataclass(frozen=True)
class Found:
    """One method's outcome.

    Attributes:
        losses: validation loss of the short run at each learning rate that was tried; infinite where the run failed.
        runs: the folder of the run of each seed, at the best rate.
        scored: the folder of each run's evaluation.
    """

    losses: dict[float, float]
    runs: list[Path]
    scored: list[Path]

    @property
    def best(self) -> float:
        return min(self.losses, key=lambda rate: self.losses[rate])


def train(plan: Plan, variant: str, rate: float, seed: int, steps: int) -> tuple[Path, float]:
    """One run: its folder, and its validation loss; infinity if it failed, because a learning rate can be too high."""
    folder = plan.output / f"{variant}-{rate:g}-{steps}-{seed}"
    if not RunFolder(folder).is_finished:
        command = [sys.executable, "-m", "qdense", "train", str(plan.recipe), "--output", str(folder), "--quiet"]
        if folder.exists():
            command.append("--resume")
        for override in _overrides(plan, variant, rate, seed, steps):
            command += ["--set", override]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode:
            print(f"  {folder.name}: {outcome.stderr.strip()[-300:]}", flush=True)
            return folder, math.inf
    lines = [line for line in read_metrics(RunFolder(folder).metrics) if line["event"] == "validation"]
    loss = float(lines[-1]["loss"])
    print(f"  {folder.name}: validation loss {loss:.4f}", flush=True)
    return folder, loss


def _mean_loss(plan: Plan, variant: str, rate: float) -> float:
    return statistics.mean(train(plan, variant, rate, seed, plan.search_steps)[1] for seed in plan.seeds)


def _overrides(plan: Plan, variant: str, rate: float, seed: int, steps: int) -> list[str]:
    settings = {
        "training.max_steps": steps,
        "training.warmup_steps": max(2, steps // 12),
        "training.learning_rate": rate,
        "training.eval_steps": steps,
        "training.save_steps": steps,
        "training.seed": seed,
        **VARIANTS[variant],
    }
    return [f"{key}={value}" for key, value in settings.items()]


def search(loss_at: Callable[[float], float]) -> dict[float, float]:
    """Losses by rate, from START downhill until both neighbours of the best are known, or the grid ends."""
    losses = {START: loss_at(START)}
    while True:
        best = RATES.index(min(losses, key=lambda rate: losses[rate]))
        unknown = [RATES[i] for i in (best + 1, best - 1) if 0 <= i < len(RATES) and RATES[i] not in losses]
        if not unknown:
            return dict(sorted(losses.items()))
        losses[unknown[0]] = loss_at(unknown[0])


def evaluate(plan: Plan, folder: Path | None) -> Path:
    """Score a run, or the base (None), on the tasks; returns the folder that `qdense compare` reads."""
    subject = ["--model", plan.model] if folder is None else ["--adapter", str(folder)]
    command = [sys.executable, "-m", "qdense", "evaluate", *plan.evaluation, *subject, "--json", "--quiet"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, cwd=plan.output)
    if outcome.returncode:
        sys.exit(outcome.stderr)
    return Path(plan.output, json.loads(outcome.stdout)["folder"])


def time_steps(plan: Plan, variants: Sequence[str]) -> dict[str, list[float]]:
    """Seconds of each of NUM_TIMED steps (forward, backward, optimizer), all variants in turn on one batch."""
    steppers = {variant: _stepper(plan, variant) for variant in variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(NUM_TIMED + 1):
        for variant, stepper in steppers.items():
            start = time.perf_counter()
            next(stepper)
            if number:  # the first one warms up
                seconds[variant].append(time.perf_counter() - start)
    return seconds


def _stepper(plan: Plan, variant: str) -> Iterator[None]:
    """Trains one step each time it is advanced."""
    num_steps = NUM_TIMED + 1
    recipe = load_recipe(plan.recipe, _overrides(plan, variant, _TIMING_RATE, 1, num_steps))
    method, size = METHODS[recipe.adapter.method], recipe.training.batch_size
    base = load_base(recipe.model)
    rows = load_training_set(recipe.data, None).rows
    examples = encode_rows(rows, range(size * num_steps), base.tokenizer, recipe.data).examples
    batches = [collate(examples[size * i : size * (i + 1)], base.pad_token_id) for i in range(num_steps)]
    inputs = [{key: batch[key] for key in ("input_ids", "attention_mask", "labels")} for batch in batches]
    torch.manual_seed(1)
    model = attach_adapter(
        base, recipe.adapter, num_steps, inputs[:4] if method.num_calibration_rows(recipe.adapter) else ()
    )
    optimizer = build_optimizer(
        recipe.training.optimizer,
        [parameter for _, parameter in trainable_parameters(model)],
        learning_rate=_TIMING_RATE,
        weight_decay=0.0,
        master_weights=recipe.adapter.master_weights,
    )
    model.train()
    for number, batch in enumerate(inputs, start=1):
        with without_logits(model):
            model(**batch).loss.backward()
        optimizer.step()
        if method.schedule is not None:
            method.schedule.step(model, number)
        optimizer.zero_grad()
        yield


_RECIPE = """# Written by tools/compare_methods.py: what all methods have in common.
[model]
name = "{model}"
[adapter]
r = {r}
dropout = 0.05
target_modules = "QKVUD"
[data]
path = "{data}"
train_on = "response"
max_length = {max_length}
validation_rows = 48
[training]
batch_size = 8
micro_batch_size = 8
optimizer = "adamw_torch"
recompute = "none"
keep = "last"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the training rows, a JSON file")
    parser.add_argument("tasks", help="comma-separated")
    parser.add_argument("--methods", default=",".join(VARIANTS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--longest", type=int, help="characters: longer rows (instruction and output) are left out")
    parser.add_argument("--max-length", type=int, default=160, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--search-steps", type=int, help="by default --steps")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--limit", type=int, default=64, help="items of each task")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    rows = json.loads(arguments.data.read_text(encoding="utf-8"))
    longest = arguments.longest or math.inf
    kept = [row for row in rows if len(row["instruction"]) + len(row["output"]) <= longest]
    (output / "rows.json").write_text(json.dumps(kept), encoding="utf-8")
    recipe = output / "recipe.toml"
    recipe.write_text(
        _RECIPE.format(model=arguments.model, r=arguments.r, data=output / "rows.json", max_length=arguments.max_length)
    )
    evaluation = [arguments.tasks, "--decoding", "greedy", "--template", "alpaca", "--limit", str(arguments.limit)]
    evaluation += ["--max-new-tokens", str(arguments.max_new_tokens)]
    if arguments.data_dir is not None:
        evaluation += ["--data-dir", str(arguments.data_dir.resolve())]
    seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    plan = Plan(
        recipe,
        arguments.model,
        arguments.r,
        arguments.steps,
        arguments.search_steps or arguments.steps,
        seeds,
        tuple(evaluation),
        output,
    )
    started = time.monotonic()
    variants = arguments.methods.split(",")
    base = evaluate(plan, None)
    found: dict[str, Found] = {}
    for variant in variants:
        print(variant, flush=True)
        losses = search(functools.partial(_mean_loss, plan, variant))
        best = min(losses, key=lambda rate: losses[rate])
        runs = [
            folder
            for seed in seeds
            for folder, loss in [train(plan, variant, best, seed, plan.steps)]
            if loss < math.inf
        ]
        found[variant] = Found(losses, runs, [evaluate(plan, folder) for folder in runs])
    text = report(plan, found, base, time_steps(plan, variants))
    head = (
        f"{arguments.model}, r {arguments.r}, QKVUD, {len(kept):,} of {len(rows):,} rows of {arguments.data.name}"
        f"{f' (at most {longest} characters)' if arguments.longest else ''}, "
        f"batch 8, {plan.steps} steps, seeds {arguments.seeds}; "
        f"learning rate by validation loss after {plan.search_steps} steps; "
        f"first {arguments.limit} items of each task, greedy, at most {arguments.max_new_tokens} new tokens. "
        f"{torch.get_num_threads()} threads, {(time.monotonic() - started) / 60:.0f} min.\n\n"
        + ", ".join(f"{name} {version}" for name, version in package_versions().items())
        + f"; commit {git_hash()}\n\n    {' '.join(['tools/compare_methods.py', *sys.argv[1:]])}\n\n"
    )
    (output / "table.md").write_text(head + text)
    print("\n" + head + text)


def report(plan: Plan, found: dict[str, Found], base: Path, seconds: dict[str, list[float]]) -> str:
    """The table, and the losses at all rates that were tried."""
    tasks = plan.evaluation[0].split(",")
    head = [
        "method",
        "trained",
        "learning rate",
        "validation loss of each seed",
        "s/step over LoRA's (quartiles)",
        "peak GB",
    ]
    lines = [f"| {' | '.join([*head, *tasks])} |", "|" + "---|" * (len(head) + len(tasks))]
    lines.append(f"| none | 0 | | | | | {' | '.join(_accuracies([base])[1])} |")
    for variant, outcome in found.items():
        if not outcome.runs:
            lines.append(f"| {variant} | | {outcome.best:g} | failed | |" + " |" * (1 + len(tasks)))
            continue
        count, accuracies = _accuracies(outcome.scored)
        at_edge = outcome.best in (RATES[0], RATES[-1])
        losses = [read_metrics(RunFolder(run).metrics) for run in outcome.runs]
        cells = [
            variant,
            f"{count:,}",
            f"{outcome.best:g}{'*' if at_edge else ''}",
            ", ".join(f"{[line['loss'] for line in run if line['event'] == 'validation'][-1]:.4f}" for run in losses),
            _ratio(seconds[variant], seconds["lora"]) if "lora" in seconds else "",
            f"{max(line['memory_bytes'] for run in losses for line in run if line['event'] == 'step') / 1e9:.2f}",
            *accuracies,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Validation loss after the short runs, by learning rate (* above: at the edge of the grid):", ""]
    for variant, outcome in found.items():
        lines.append(f"- {variant}: " + ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in outcome.losses.items()))
    return "\n".join(lines) + "\n"


def _ratio(seconds: Sequence[float], reference: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, reference, strict=True)], n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _accuracies(scored: Sequence[Path]) -> tuple[int, list[str]]:
    """Trained parameters; accuracy over the runs, with its interval, of each task."""
    group = compare([load_evaluation(folder) for folder in scored], rule="strict")["groups"][0]
    cells = []
    for result in group["tasks"].values():
        low, high = result["interval"]
        cells.append(f"{100 * result['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    return group["trainable_parameters"] or 0, cells


if __name__ == "__main__":
    main()
