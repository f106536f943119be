"""Several processes, gloo on a CPU: the batch is the recipe's, and the run is that of one process."""

import subprocess
import sys

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from qdense.training.metrics import read_metrics
from tests.helpers import ROOT
from tests.helpers.runs import recipe_for, run

EXACT = {"quantization": "none", "model__dtype": "float32", "adapter__dtype": "float32", "adapter__dropout": 0.0}


@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_train_as_one(tiny_model, tmp_path, num_processes):
    # The last step of an epoch has three of the 59 rows: with batches of 4, one process of two has more than the other.
    settings = EXACT | {"training__max_steps": 16, "training__save_steps": 8, "training__eval_steps": 8}
    run(recipe_for(tiny_model, tmp_path / "one", **settings))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(recipe_for(tiny_model, tmp_path / "several", **settings).resolved()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    outcome = subprocess.run(
        [*command, "-m", "qdense", "train", str(recipe)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    one, several = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "several"))
    assert [line["step"] for line in one] == [line["step"] for line in several]
    assert [line["loss"] for line in several] == pytest.approx([line["loss"] for line in one], rel=1e-6)
    keys = ("num_tokens", "epoch")
    assert [[line.get(key) for key in keys] for line in one] == [[line.get(key) for key in keys] for line in several]
    name = "adapter/adapter_model.safetensors"
    expected, found = load_file(tmp_path / "one" / name), load_file(tmp_path / "several" / name)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6, msg=key)
    assert outcome.stdout.count("step 16 checkpoint") == 1
