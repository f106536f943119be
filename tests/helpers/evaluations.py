"""Folders as `qdense evaluate` leaves them, without a model."""

import json
from pathlib import Path

import tomli_w

from qdense.runs import RunFolder

SHA = {"gsm8k": "a" * 64, "aqua": "b" * 64, "boolq": "c" * 64}


def recipe_tables(seed=42, output="runs/x", **adapter):
    return {
        "model": {"name": "llama3-8b", "quantization": "nf4"},
        "adapter": {"method": "denselora", "r": 32, "alpha": 64.0, "target_modules": ["q_proj", "k_proj"]} | adapter,
        "data": {"name": "math10k", "seed": 42},
        "training": {"seed": seed, "learning_rate": 3e-4},
        "output": {"dir": output},
        "provenance": {"started": f"2025-01-0{seed % 9 + 1}", "data": {"sha256": "d" * 64}},
    }


def write_evaluation(run: Path, outcomes, *, recipe=None, adapter=True, digest="0123456789ab", strict=None, **settings):
    """Write run/recipe.toml and run/eval/<digest>/.

    Args:
        outcomes: task -> 0 or 1 of each item, or {index: 0 or 1}.
        strict: the same by the strict rule, if it is to differ.
        adapter: False for a bare base.
    """
    folder = RunFolder(run).evaluation(digest)
    folder.path.mkdir(parents=True)
    if recipe is not None:
        RunFolder(run).recipe.write_text(tomli_w.dumps(recipe))
    by_index = {task: given if isinstance(given, dict) else dict(enumerate(given)) for task, given in outcomes.items()}
    items = {
        task: {"index": list(given), "paper": list(given.values()), "strict": list((strict or outcomes)[task])}
        if strict
        else {"index": list(given), "paper": list(given.values()), "strict": list(given.values())}
        for task, given in by_index.items()
    }
    defaults = {
        "model": "llama3-8b",
        "base_fingerprint": {"weights": "e" * 64},
        "adapter_sha256": f"adapter of {run}" if adapter else None,
        "quantization": "nf4",
        "dtype": "bfloat16",
        "template": "alpaca",
        "decoding": {"name": "beam4", "num_beams": 4, "do_sample": False},
        "max_new_tokens": dict.fromkeys(outcomes, 256),
        "batch_size": 16,
        "limit": None,
        "data_sha256": {task: SHA.get(task, "f" * 64) for task in outcomes},
        "task_versions": dict.fromkeys(outcomes, 1),
        "device": "CPU",
        "versions": {"torch": "2.11.0"},
    }
    folder.settings.write_text(json.dumps(defaults | settings))
    folder.summary.write_text(json.dumps({"folder": str(folder.path)}))
    folder.items.write_text(json.dumps(items))
    return run
