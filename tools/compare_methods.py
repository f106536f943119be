"""Every method on one footing: same base, rows, steps and evaluation; only `adapter.method` and its learning rate differ.

    .venv/bin/python tools/compare_methods.py ../shared/data/ft-training_set/math_SUBSTITUTE_clean.json addsub,svamp \\
        --data-dir ../shared/data --output /tmp/compare

For each method the learning rate is chosen first: one short run for each of the same few rates, by validation loss. Then one run
for each seed at the chosen rate, scored on the tasks. Each run is the command that a user would type (`qdense train`,
`qdense evaluate`) in a process of its own, so that its peak memory is its own. Runs that are finished are not repeated: the
script can be stopped and started again. It ends with one table, in Markdown, of all methods, those that did badly too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdense.benchmarks.compare import compare, load_evaluation
from qdense.methods import METHODS
from qdense.provenance import git_hash, package_versions
from qdense.training.metrics import read_metrics

RATES = (3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    data: Path
    model: str
    r: int
    steps: int
    search_steps: int
    tasks: str
    limit: int
    data_dir: Path | None
    output: Path


def train(plan: Plan, method: str, rate: float, seed: int, steps: int) -> Path | None:
    """One run; None if it failed (a learning rate can be too high for a method)."""
    folder = plan.output / f"{method}-{rate:g}-{steps}-{seed}"
    if (folder / "adapter" / "qdense.json").is_file():
        return folder
    quantization = "nf4" if "nf4" in METHODS[method].quantizations else "none"
    settings = {
        "model.quantization": quantization,
        "adapter.method": method,
        "adapter.r": plan.r,
        "data.validation_rows": 64,
        "training.max_steps": steps,
        "training.warmup_steps": max(2, steps // 12),
        "training.learning_rate": rate,
        "training.eval_steps": steps // 2,
        "training.save_steps": steps,
        "training.seed": seed,
    }
    recipe = plan.output / "recipe.toml"
    recipe.write_text(_RECIPE.format(model=plan.model, data=plan.data.resolve()))
    command = [sys.executable, "-m", "qdense", "train", str(recipe), "--output", str(folder), "--quiet"]
    if folder.exists():
        command.append("--resume")
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        print(f"  {folder.name}: {outcome.stderr.strip()[-300:]}", flush=True)
        return None
    print(f"  {folder.name}: validation loss {validation_loss(folder):.4f}", flush=True)
    return folder


_RECIPE = """# Written by tools/compare_methods.py: what all methods have in common.
[model]
name = "{model}"
[adapter]
dropout = 0.05
target_modules = "QKVUD"
[data]
path = "{data}"
train_on = "response"
max_length = 192
[training]
batch_size = 8
micro_batch_size = 8
optimizer = "adamw_torch"
gradient_checkpointing = false
keep = "last"
"""


def validation_loss(folder: Path) -> float:
    return float([line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["event"] == "validation"][-1])


def evaluate(plan: Plan, folder: Path | None) -> Path:
    """Score a run, or the base (None), on the tasks; returns the folder that `qdense compare` reads."""
    subject = ["--model", plan.model] if folder is None else ["--adapter", str(folder)]
    command = [
        sys.executable,
        "-m",
        "qdense",
        "evaluate",
        plan.tasks,
        *subject,
        "--decoding",
        "greedy",
        "--template",
        "alpaca",
    ]
    command += ["--limit", str(plan.limit), "--json", "--quiet"]
    if plan.data_dir is not None:
        command += ["--data-dir", str(plan.data_dir.resolve())]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, cwd=plan.output)
    if outcome.returncode:
        sys.exit(outcome.stderr)
    return Path(plan.output, json.loads(outcome.stdout)["folder"])


def seconds_per_step(folder: Path) -> float:
    """Median over the run's steps; the first is left out, for it warms up."""
    seconds = [line["seconds"] for line in read_metrics(folder / "metrics.jsonl") if line["event"] == "step"]
    return statistics.median(b - a for a, b in itertools.pairwise(seconds))


def peak_bytes(folder: Path) -> int:
    return max(line["memory_bytes"] for line in read_metrics(folder / "metrics.jsonl") if line["event"] == "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the training rows, a file")
    parser.add_argument("tasks", help="comma-separated")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--search-steps", type=int, default=24)
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES))
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        arguments.data, arguments.model, arguments.r, arguments.steps, arguments.search_steps, arguments.tasks,
        arguments.limit, arguments.data_dir, output,
    )  # fmt: skip
    rates = [float(rate) for rate in arguments.rates.split(",")]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    found: dict[str, tuple[dict[float, float], float, list[Path], list[Path]]] = {}
    for method in arguments.methods.split(","):
        if method == "none":
            continue
        print(method, flush=True)
        searched = {rate: train(plan, method, rate, seeds[0], plan.search_steps) for rate in rates}
        losses = {rate: validation_loss(folder) for rate, folder in searched.items() if folder is not None}
        if not losses:
            continue
        best = min(losses, key=lambda rate: losses[rate])
        runs = [folder for seed in seeds if (folder := train(plan, method, best, seed, plan.steps)) is not None]
        found[method] = losses, best, runs, [evaluate(plan, folder) for folder in runs]
    base = evaluate(plan, None) if "none" in arguments.methods.split(",") else None
    text = report(plan, found, base, seeds)
    (output / "table.md").write_text(text)
    print("\n" + text)


def report(plan: Plan, found: dict[str, Any], base: Path | None, seeds: Sequence[int]) -> str:
    """The table, and what it was made with."""
    reference = seconds_per_step(found["lora"][2][0]) if "lora" in found else None
    lines = [
        f"{plan.model}, r {plan.r}, QKVUD, {plan.data.name}, batch 8, {plan.steps} steps, seeds {', '.join(map(str, seeds))}; "
        f"learning rate by validation loss after {plan.search_steps} steps; first {plan.limit} items of each task, greedy.",
        "",
        ", ".join(f"{name} {version}" for name, version in package_versions().items()) + f"; commit {git_hash()}",
        "",
    ]
    tasks = plan.tasks.split(",")
    head = ["method", "trained", "lr", "validation loss of each seed", "s/step over lora's", "peak GB"]
    lines += [f"| {' | '.join([*head, *tasks])} |", "|" + "---|" * (len(head) + len(tasks))]
    if base is not None:
        lines.append(_row(["none", "0", "", "", "", ""], [base]))
    for method, (losses, best, runs, scored) in found.items():
        counted = compare([load_evaluation(folder) for folder in scored])["groups"][0]["trainable_parameters"]
        speed = "" if reference is None else f"{statistics.median(map(seconds_per_step, runs)) / reference:.2f}"
        cells = [
            method,
            "" if counted is None else f"{counted:,}",
            f"{best:g}{'*' if best in (min(losses), max(losses)) else ''}",
            ", ".join(f"{validation_loss(run):.4f}" for run in runs),
            speed,
            f"{max(map(peak_bytes, runs)) / 1e9:.2f}",
        ]
        lines.append(_row(cells, scored))
    lines += ["", "* at the edge of the rates that were tried. Validation losses after the search runs, by rate:", ""]
    lines += [f"- {method}: " + ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in losses.items()) for method, (losses, *_) in
              found.items()]  # fmt: skip
    return "\n".join(lines) + "\n"


def _row(cells: list[str], scored: Sequence[Path]) -> str:
    group = compare([load_evaluation(folder) for folder in scored], rule="strict")["groups"][0]
    for result in group["tasks"].values():
        low, high = result["interval"]
        cells.append(f"{100 * result['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
