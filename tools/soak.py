"""A long run: does memory grow, do files stay open, are the metrics complete, does the display ever raise?

    .venv/bin/python tools/soak.py --steps 2000

One process trains a tiny LLaMA in parts of 500 steps, draws the live display, validates and saves every 25 steps, and after each
part evaluates its adapter. Memory (resident), open files and threads are noted every 50 steps; the first part's are left out
of the growth, since caches fill during it.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import psutil
from rich.console import Console

from qdense.benchmarks.evaluate import EvaluationRequest, evaluate
from qdense.benchmarks.tasks import TASKS
from qdense.events import StepDone
from qdense.inference.generation import DECODINGS
from qdense.libraries import quiet_libraries
from qdense.provenance import git_hash, package_versions
from qdense.recipe import recipe_from_tables
from qdense.runs import RunFolder
from qdense.training.metrics import read_metrics
from qdense.training.run import train
from qdense.ui.evaluation import EvaluationDisplay
from qdense.ui.training import TrainingDisplay


class Watch:
    """Hands events on to a display, and notes what the process holds."""

    def __init__(self) -> None:
        self.process, self.show, self.steps = psutil.Process(), None, 0  # type: psutil.Process, Any, int
        self.noted: list[tuple[int, float, int, int]] = []  # steps, MiB, open files, threads

    def __call__(self, event: Any) -> None:
        self.show(event)
        if isinstance(event, StepDone):
            self.steps += 1
            if self.steps % 50 == 0:
                memory = self.process.memory_info().rss / 2**20
                self.noted.append((self.steps, memory, self.process.num_fds(), self.process.num_threads()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--part", type=int, default=500)
    arguments = parser.parse_args()
    quiet_libraries()
    started, watch, faults = time.monotonic(), Watch(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["QDENSE_CACHE"] = str(folder / "cache")
        os.chdir(folder)
        importlib.import_module("tests.helpers.models").make_tiny_model(folder / "tiny")
        for number in range(arguments.steps // arguments.part):
            run_dir = folder / f"run-{number}"
            recipe = recipe_from_tables(
                {
                    "model": {"name": str(folder / "tiny"), "device": "cpu"},
                    "adapter": {"r": 8, "dropout": 0.1},
                    "data": {"name": "wordproblems", "validation_rows": 8, "fraction": 0.1},
                    "training": {"max_steps": arguments.part, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 10,
                                 "eval_steps": 25, "save_steps": 25, "seed": number},
                    "output": {"dir": str(run_dir)},
                },
                source="tools/soak.py",
            )  # fmt: skip
            console = Console(file=io.StringIO(), force_terminal=True, width=100)
            with TrainingDisplay(console) as watch.show:
                train(recipe, resume=False, data_dir=None, emit=watch)
            lines = read_metrics(RunFolder(run_dir).metrics)
            steps = [line["step"] for line in lines if line["event"] == "step"]
            validated = [line["step"] for line in lines if line["event"] == "validation"]
            if steps != list(range(1, arguments.part + 1)) or validated != list(range(25, arguments.part + 1, 25)):
                faults.append(f"part {number}: metrics have {len(steps)} steps, {len(validated)} validations")
            request = EvaluationRequest(
                tasks=[TASKS["wordproblems"]], adapter=run_dir, model={}, with_base=False, decoding=DECODINGS["greedy"],
                limit=32, max_new_tokens=16, batch_size=8,
            )  # fmt: skip
            with EvaluationDisplay(Console(file=io.StringIO(), force_terminal=True, width=100)) as show:
                summary = evaluate(request, show)
            print(f"part {number}: {summary['tasks']['wordproblems']['num_items']} items", file=sys.stderr, flush=True)
    first, last = next(noted for noted in watch.noted if noted[0] > arguments.part), watch.noted[-1]
    growth = (last[1] - first[1]) / (last[0] - first[0]) * 1000
    print(
        f"{watch.steps} steps in {time.monotonic() - started:.0f} s; commit {git_hash()}, torch {package_versions()['torch']}\n\n"
        "| after step | resident memory | open files | threads |\n|---|---|---|---|"
    )
    for step, memory, files, threads in watch.noted[4 :: max(1, len(watch.noted) // 8)]:
        print(f"| {step} | {memory:,.0f} MiB | {files} | {threads} |")
    print(f"\nFrom step {first[0]} to {last[0]}: {growth:+.1f} MiB in 1,000 steps, {last[2] - first[2]:+d} files.")
    print("\n".join(faults) or "Metrics complete; the display never raised.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
