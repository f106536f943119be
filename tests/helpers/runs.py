"""Short runs on a tiny LLaMA."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdense.events import StepDone
from qdense.recipe import recipe_from_tables
from qdense.runs import PEFT_WEIGHTS_FILE, RunFolder
from qdense.training.loop import TrainingLoop
from qdense.training.run import train

BASICS = {
    "max_steps": 6,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
    "recompute": "all",
    "seed": 3,
}


def recipe_for(tiny_model, output, *, quantization="nf4", **changes):
    tables = {
        "model": {"name": str(tiny_model), "device": "cpu", "quantization": quantization},
        "adapter": {"r": 8, "dropout": 0.1},
        "data": {"name": "wordproblems", "validation_rows": 8, "fraction": 0.05, "max_length": 320},
        "training": BASICS,
        "output": {"dir": str(output)},
    }
    for key, value in changes.items():
        table, _, name = key.partition("__")
        tables[table] = tables[table] | {name: value}
    return recipe_from_tables(tables, source="test")


def run(recipe, resume=False):
    events = []
    train(recipe, resume=resume, data_dir=None, emit=events.append)
    return events


def adapter_bytes(folder):
    return (RunFolder(Path(folder)).adapter / PEFT_WEIGHTS_FILE).read_bytes()


def killed_run(recipe, step):
    class Killed(BaseException):
        pass

    def emit(event):
        if isinstance(event, StepDone) and event.step == step:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, resume=False, data_dir=None, emit=emit)


def change_losses(monkeypatch, change):
    """Give each training micro-batch the loss that `change(loop, loss, number)` returns; `number` counts from 0 in a step."""
    original, seen = TrainingLoop.token_loss, {}

    def token_loss(self, model, batch, num_labels):
        loss = original(self, model, batch, num_labels)
        if not model.training:
            return loss
        number = seen[self.step] = seen.get(self.step, -1) + 1
        return change(self, loss, number)

    monkeypatch.setattr(TrainingLoop, "token_loss", token_loss)
