"""A tiny experiment: two arms on a tiny LLaMA, seconds a run."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

TINY = """
title = "Tiny"
question = "Does `qdense sweep` do what it says?"
seeds = [1, 2]

[set.model]
name = "{model}"
device = "cpu"

[set.adapter]
dropout = 0.0

[set.data]
name = "wordproblems"
validation_rows = 8
fraction = 0.05
max_length = 320

[set.training]
max_steps = {steps}
batch_size = 4
micro_batch_size = 4
warmup_steps = 1
eval_steps = 2
save_steps = 2
recompute = "none"
keep = "last"

[variants.LoRA.adapter]
method = "lora"
r = 4

[variants.DenseLoRA.adapter]
method = "denselora"
r = 8

[variants.DenseLoRA.training]
learning_rate = 1e-1

[search]
learning_rate = [3e-2, 1e-1, 3e-1]
seeds = [101]

[evaluate]
tasks = ["wordproblems"]
decoding = "greedy"
limit = 4
max_new_tokens = 4

[report]
updates = true
"""


def write_experiment(folder: Path, model: Path, text: str = "", steps: int = 4, **replaced: str) -> Path:
    """TINY with further text, and with `old=new` replaced (underscores stand for spaces around "=")."""
    content = TINY.format(model=model, steps=steps) + text
    for old, new in replaced.items():
        assert old in content
        content = content.replace(old, new)
    file = folder / "tiny.toml"
    file.write_text(content, encoding="utf-8")
    return file


def known_cells(experiment):
    """The cells that are certain before anything has run; a searched arm's final runs are represented at the first rate."""
    for arm in experiment.arms:
        grid = experiment.search.learning_rate if arm.is_searched else ()
        for rate, seed in itertools.product(grid, experiment.search.seeds if grid else ()):
            yield arm.cell("search", seed, rate)
        for seed in experiment.seeds:
            yield arm.cell("final", seed, grid[0] if grid else None)


def start_sweep(file: Path, *options: str, cwd: Path) -> subprocess.Popen[str]:
    """`qdense sweep` as a user starts it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "qdense", "sweep", str(file), *options],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts background jobs deaf to Ctrl-C, and this would be, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
