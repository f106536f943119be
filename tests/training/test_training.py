"""Runs on a tiny LLaMA: what they write, that they resume exactly, what stops them."""

import json
import math
import shutil
import tomllib
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from qdense.errors import EvaluationError, QDenseError, RunError
from qdense.events import (
    CheckpointSaved,
    Notice,
    Sampled,
    StepDone,
    TrainingDone,
    TrainingStarted,
    Validated,
    ValidationProgress,
)
from qdense.modeling.attach import attach_adapter, run_tensors
from qdense.modeling.load import load_base
from qdense.ops.denselora import decode
from qdense.recipe import load_recipe, recipe_from_tables
from qdense.training import checkpoint as checkpoint_module
from qdense.training.loop import checkpoint_bytes
from qdense.training.metrics import read_metrics
from qdense.training.run import train
from qdense.tuners.denselora import DenseLoraLinear
from tests.helpers.runs import BASICS, adapter_bytes, change_losses, killed_run, recipe_for, run


def test_a_run_writes_what_it_says(tiny_model, tmp_path):
    recipe = recipe_for(tiny_model, tmp_path / "run").settled(has_bfloat16=True)
    events = run(recipe)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "recipe.toml",
        "metrics.jsonl",
        "initial.safetensors",
        "adapter",
        "checkpoints",
        ".lock",
    }
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    for before, after in pairwise(steps):
        assert after.num_tokens / after.tokens_per_second == pytest.approx(after.seconds - before.seconds)
    assert [event.step for event in events if isinstance(event, Validated)] == [2, 4, 6]
    progress = [(event.num_done, event.num_batches) for event in events if isinstance(event, ValidationProgress)]
    assert progress == [(1, 2), (2, 2)] * 3  # 8 rows in batches of 4
    assert isinstance(events[-1], TrainingDone)
    started = next(event for event in events if isinstance(event, TrainingStarted))
    assert (started.num_steps, started.first_step) == (6, 0)
    assert started.memory_name == "process"
    facts = dict(started.facts)
    assert facts["adapter"] == "denselora r 8, alpha 16, on q, k, v, up, down"
    assert facts["trainable"] == "6,272 parameters, 6.48% of the model, bfloat16"  # of 96,832, by hand
    assert facts["data"] == "wordproblems: 59 rows of 1,192, 8 more for validation"
    assert facts["training"] == "6 steps, batch 4, packed, learning rate 0.01, paged_adamw_8bit"
    plan, _, predicted = facts["plan"].partition("; ")
    assert plan == "2 rows (640 tokens) at a time, all layers recomputed"
    assert 0.1 < float(predicted.removesuffix(" GiB predicted")) < 10  # with what the process has in use already
    assert events[-1].kept_step == min((event.loss, event.step) for event in events if isinstance(event, Validated))[1]
    assert events[-1].seconds == steps[-1].seconds > steps[0].seconds > 0

    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["event"], line["step"]) for line in lines] == [
        ("step", 1),
        ("step", 2),
        ("validation", 2),
        ("step", 3),
        ("step", 4),
        ("validation", 4),
        ("step", 5),
        ("step", 6),
        ("validation", 6),
    ]
    assert all(math.isfinite(line["loss"]) for line in lines)

    initial = safetensors.torch.load_file(tmp_path / "run" / "initial.safetensors")
    last = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in initial} == set(last)
    for name, value in initial.items():
        assert not torch.equal(value, last[name.replace(".default", "")]), name
        assert bool(value.any()) != name.endswith(".decoder"), name  # a zero decoder, all else drawn

    saved = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    provenance = saved.pop("provenance")
    # What "auto" stands for is written down.
    resolved = recipe.model_copy(update={"data": recipe.data.settled("pair")}).resolved()
    assert saved == resolved
    assert provenance["num_training_rows"] == 59  # 5% of 1,192
    assert len(provenance["data"]["sha256"]) == 64
    assert provenance["versions"]["torch"] == version("torch")
    assert provenance["git_hash"]
    assert load_recipe(tmp_path / "run" / "recipe.toml").resolved() == resolved

    modes = {(tmp_path / "run" / name).stat().st_mode for name in ("adapter", "checkpoints")}
    assert len(modes) == 1  # no folder has stricter permissions than an ordinary one
    weights = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    card = json.loads((tmp_path / "run" / "adapter" / "qdense.json").read_text())
    assert (card["template"], card["method"]) == ("alpaca", "denselora")


def test_a_tiny_model_learns(tiny_model, tmp_path):
    events = run(recipe_for(tiny_model, tmp_path / "run", training__max_steps=30, training__eval_steps=15))
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training__optimizer": "adamw_torch", "training__recompute": "none"},
        {"adapter__method": "lora", "training__optimizer": "paged_adamw_32bit"},
        {"quantization": "none", "adapter__dtype": "float32", "training__keep": "last"},
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tiny_model, tmp_path, settings, monkeypatch):
    whole = recipe_for(tiny_model, tmp_path / "whole", **settings)
    run(whole)

    cut = recipe_for(tiny_model, tmp_path / "cut", **settings)

    class Killed(BaseException):
        pass

    def emit(event):
        if isinstance(event, StepDone) and event.step == 5:  # one step after the checkpoint of step 4
            raise Killed

    with pytest.raises(Killed):
        train(cut, resume=False, data_dir=None, emit=emit)
    assert not (tmp_path / "cut" / "adapter").exists()
    events = run(cut, resume=True)
    assert any(isinstance(event, Notice) and "checkpoint-4" in event.text for event in events)
    assert [event.step for event in events if isinstance(event, StepDone)] == [5, 6]

    starts = [(tmp_path / name / "initial.safetensors").read_bytes() for name in ("cut", "whole")]
    assert starts[0] == starts[1]
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")
    keep = ("event", "step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "is_best")
    metrics = [
        [{key: line[key] for key in keep if key in line} for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    ]
    assert metrics[0] == metrics[1]


def test_equal_seeds_give_equal_runs_and_others_do_not(tiny_model, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(recipe_for(tiny_model, tmp_path / name, training__seed=seed, training__max_steps=2, training__keep="last"))
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    assert adapter_bytes(tmp_path / "a") != adapter_bytes(tmp_path / "c")


def test_micro_batches_do_not_change_the_loss(tiny_model, tmp_path):
    """The step's loss is the mean over its tokens, however it is cut into micro-batches."""
    losses = []
    for micro_batch_size in (1, 2, 4):
        events = run(
            recipe_for(
                tiny_model,
                tmp_path / str(micro_batch_size),
                quantization="none",
                adapter__dropout=0.0,
                model__dtype="float32",
                adapter__dtype="float32",
                training__micro_batch_size=micro_batch_size,
                training__max_steps=3,
            )
        )
        losses.append([event.loss for event in events if isinstance(event, StepDone)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_the_best_weights_are_kept(tiny_model, tmp_path):
    # Such a large constant learning rate makes the validation loss jump; stop just after a step where it rose.
    settings = {
        "training__learning_rate": 0.9,
        "training__warmup_steps": 3,
        "training__eval_steps": 1,
        "training__schedule": "constant",
    }
    trial = [
        event.loss
        for event in run(recipe_for(tiny_model, tmp_path / "trial", **settings))
        if isinstance(event, Validated)
    ]
    rise = next(step for step in range(1, len(trial)) if trial[step] > min(trial[:step]))
    settings["training__max_steps"] = rise + 1
    done = run(recipe_for(tiny_model, tmp_path / "best", **settings))[-1]
    assert done.kept_step == min(range(rise + 1), key=trial.__getitem__) + 1 < rise + 1
    run(recipe_for(tiny_model, tmp_path / "last", training__keep="last", **settings))
    assert adapter_bytes(tmp_path / "best") != adapter_bytes(tmp_path / "last")
    saved = read_metrics(tmp_path / "best" / "metrics.jsonl")
    assert [line["is_best"] for line in saved if line["event"] == "validation"][-1] is False
    # A run that is killed and resumed after the best step has not forgotten it.
    settings["training__save_steps"] = 1
    cut = recipe_for(tiny_model, tmp_path / "cut", **settings)
    killed_run(cut, step=rise + 1)
    assert run(cut, resume=True)[-1].kept_step == done.kept_step
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "best")


@pytest.mark.parametrize(("method", "r"), [("vera", 8), ("denselora", 256)])
def test_a_checkpoint_takes_no_more_than_is_asked_of_the_disk(tiny_model, tmp_path, method, r):
    """All its tensors with bf16 weights, fp32 masters and moments; a MiB is left for names and numbers."""
    settings = {"training__optimizer": "adamw_torch", "training__max_steps": 2}
    recipe = recipe_for(tiny_model, tmp_path / "run", adapter__method=method, adapter__r=r, **settings)
    folder = Path(next(event for event in run(recipe) if isinstance(event, CheckpointSaved)).path)
    size = sum(file.stat().st_size for file in folder.iterdir())
    model = attach_adapter(load_base(recipe.model), recipe.adapter, num_steps=2)
    assert size <= checkpoint_bytes(model) <= 1.05 * size + 2**20 + 2 * num_frozen(model)  # bf16, asked for as fp32


def num_frozen(model):
    return sum(tensor.numel() for tensor in run_tensors(model).values() if not tensor.requires_grad)


@pytest.mark.parametrize(
    ("settings", "num_steps"),
    # 59 rows in batches of 4: 15 steps an epoch, the last of 3 rows.
    [({"epochs": 1}, 15), ({"epochs": 2.5}, 38), ({"epochs": 1, "batch_size": 59, "micro_batch_size": 4}, 1)],
)
def test_a_run_is_as_many_steps_as_its_epochs_have(tiny_model, tmp_path, settings, num_steps):
    changes = {f"training__{key}": value for key, value in settings.items()}

    class Started(BaseException):
        pass

    def emit(event):
        if isinstance(event, TrainingStarted):
            raise Started(event.num_steps)

    with pytest.raises(Started, match=f"^{num_steps}$"):
        train(
            recipe_for(tiny_model, tmp_path / "run", training__max_steps=None, **changes),
            resume=False,
            data_dir=None,
            emit=emit,
        )


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("cosine", [0, 0.5, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),  # (1 + cos(pi k / 4)) / 2
    ],
)
def test_the_learning_rate_rises_to_the_recipe_s_and_follows_its_schedule(tiny_model, tmp_path, schedule, shares):
    settings = {"training__schedule": schedule, "training__warmup_steps": 2, "training__learning_rate": 0.008}
    events = run(recipe_for(tiny_model, tmp_path / "run", training__eval_steps=6, training__save_steps=6, **settings))
    rates = [event.learning_rate for event in events if isinstance(event, StepDone)]
    assert rates == pytest.approx([0.008 * share for share in shares])


def test_omitted_settings_are_chosen_for_the_run_and_kept_in_its_recipe(tiny_model, tmp_path):
    (tmp_path / "own.jsonl").write_text(
        "".join(f'{{"prompt": "Say {i}.", "completion": "{i}"}}\n' for i in range(30)) + "{oops\n"
    )
    tables = {
        "model": {"name": str(tiny_model), "device": "cpu"},
        "data": {"path": str(tmp_path / "own.jsonl"), "validation_rows": 0, "bad_rows": "skip"},
        "training": {"max_steps": 40, "batch_size": 2},
        "output": {"dir": str(tmp_path / "run")},
    }
    events = run(recipe_from_tables(tables, "test"))
    rates = [event.learning_rate for event in events if isinstance(event, StepDone)]
    expected = float(f"{1e-2 * (576 / 64) ** 0.781:.1e}")  # the tiny model is 64 wide
    assert rates[:3] == pytest.approx([0, expected / 2, expected])  # 5% of 40 steps
    own = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert (own["training"]["learning_rate"], own["training"]["warmup_steps"]) == (expected, 2)
    assert own["training"]["keep"] == "last"
    assert own["data"]["columns"] == {"instruction": "prompt", "input": "input", "output": "completion"}
    (skipped,) = (tmp_path / "run" / "skipped_rows.txt").read_text().splitlines()
    assert "line 31, column 2: not valid JSON" in skipped
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert "columns: prompt is the instruction, completion the output" in notices
    assert any(text.startswith("left out 1 bad row of 31: ") for text in notices)
    (started,) = (event for event in events if isinstance(event, TrainingStarted))
    assert f"learning rate {expected:g} (denselora's default)" in dict(started.facts)["training"]


def test_each_kind_of_tensor_has_its_own_rate_and_resumes_with_it(tiny_model, tmp_path):
    """AdamW's first update is the learning rate in size, whatever the gradient; M has no gradient while the decoder is zero."""
    settings = {"training__optimizer": "adamw_torch", "training__schedule": "constant", "training__warmup_steps": 0,
                "adapter__dtype": "float32", "training__rates": {"decoder": 4.0, "encoder": 0.5}}  # fmt: skip
    once = recipe_for(tiny_model, tmp_path / "once", training__max_steps=1, training__keep="last", **settings)
    run(once)
    saved = safetensors.torch.load_file(tmp_path / "once" / "adapter" / "adapter_model.safetensors")
    decoders = {name: tensor for name, tensor in saved.items() if "decoder" in name}
    assert len(decoders) == 5
    for name, decoder in decoders.items():
        assert decoder.abs().max().item() == pytest.approx(4 * BASICS["learning_rate"], rel=1e-3), name
    whole, cut = (
        recipe_for(tiny_model, tmp_path / name, training__keep="last", **settings) for name in ("whole", "cut")
    )
    run(whole)
    killed_run(cut, step=4)
    run(cut, resume=True)
    assert adapter_bytes(cut.output.dir) == adapter_bytes(whole.output.dir)


def test_a_warm_up_as_long_as_the_run_is_reported(tiny_model, tmp_path):
    for name, warmup_steps, is_told in (("long", 2, True), ("longer", 3, True), ("short", 1, False)):
        settings = {"training__max_steps": 2, "training__warmup_steps": warmup_steps}
        events = run(recipe_for(tiny_model, tmp_path / name, **settings))
        notices = [event.text for event in events if isinstance(event, Notice) and "the warm-up" in event.text]
        assert bool(notices) is is_told, name


def test_killed_between_the_last_checkpoint_and_the_result(tiny_model, tmp_path):
    whole, cut = recipe_for(tiny_model, tmp_path / "whole"), recipe_for(tiny_model, tmp_path / "cut")
    run(whole)

    class Killed(BaseException):
        pass

    def emit(event):
        if isinstance(event, CheckpointSaved) and event.step == 6:
            raise Killed

    with pytest.raises(Killed):
        train(cut, resume=False, data_dir=None, emit=emit)
    assert not (tmp_path / "cut" / "adapter").exists()
    events = run(cut, resume=True)
    assert not any(isinstance(event, StepDone) for event in events)
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")
    assert len(read_metrics(tmp_path / "cut" / "metrics.jsonl")) == len(
        read_metrics(tmp_path / "whole" / "metrics.jsonl")
    )


def _unlist(path):
    """Remove a file together with its line in the manifest."""
    path.unlink()
    manifest = json.loads((path.parent / "manifest.json").read_text())
    del manifest["files"][path.name]
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("state.json", _truncate, "state.json has"),
        ("weights.safetensors", _flip, "weights.safetensors is not the file that was written"),
        ("optimizer.safetensors", _flip, "optimizer.safetensors is not the file that was written"),
        ("schedule.safetensors", Path.unlink, "schedule.safetensors is missing"),
        ("optimizer.safetensors", _unlist, "manifest.json does not list optimizer.safetensors"),
        ("state.json", _unlist, "manifest.json does not list state.json"),
        ("best.safetensors", _truncate, "best.safetensors has"),
        ("manifest.json", _truncate, "manifest.json cannot be read"),
        ("manifest.json", Path.unlink, "it has no manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tiny_model, tmp_path, uncut, name, damage, told):
    cut = recipe_for(tiny_model, tmp_path / "cut")
    killed_run(cut, step=5)
    damage(tmp_path / "cut" / "checkpoints" / "checkpoint-4" / name)
    notices = [event.text for event in run(cut, resume=True) if isinstance(event, Notice)]
    assert any("checkpoint-4: " + told in text for text in notices), notices
    assert any(text.endswith("checkpoint-2") for text in notices)
    assert (tmp_path / "cut" / "checkpoints" / "damaged-checkpoint-4").is_dir()
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(uncut)


@pytest.fixture(scope="module")
def uncut(tiny_model, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uncut") / "run"
    run(recipe_for(tiny_model, folder))
    return folder


def test_old_checkpoints_go_only_when_the_new_one_is_verified(tiny_model, tmp_path, monkeypatch):
    recipe = recipe_for(tiny_model, tmp_path / "run", training__save_steps=1)
    found = []

    def kept(event):
        if isinstance(event, CheckpointSaved):
            found.append(sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()))
            if event.step == 4:
                monkeypatch.setattr(checkpoint_module, "fault_of", lambda folder: "a bad sector")

    with pytest.raises(
        RunError, match=r"step 5: the checkpoint cannot be written: .*a bad sector.*checkpoint-4; continue"
    ):
        train(recipe, resume=False, data_dir=None, emit=kept)
    assert found[-1] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == found[-1]


def test_resuming_with_other_rows_or_another_base_is_refused(tiny_model, other_tiny_model, tmp_path):
    import shutil

    rows = [{"instruction": f"Add {n} and 1.", "output": f"It is {n + 1}."} for n in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    shutil.copytree(tiny_model, tmp_path / "model")
    recipe = recipe_for(
        tmp_path / "model", tmp_path / "run", data__path=str(tmp_path / "rows.json"), data__fraction=1.0
    )
    killed_run(recipe, step=3)
    (tmp_path / "rows.json").write_text(json.dumps(rows[::-1]))
    with pytest.raises(RunError, match=r"changed since the run began:\n  the rows of .*rows.json\n"):
        run(recipe, resume=True)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(other_tiny_model, tmp_path / "model")
    with pytest.raises(RunError, match=r"changed since the run began:\n  the base"):
        run(recipe, resume=True)


def test_a_disk_that_fills_up_in_a_checkpoint_is_reported(tiny_model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.Checkpoint, "save", full)
    with pytest.raises(RunError, match=r"step 2: the checkpoint cannot be written: .*No space left"):
        run(recipe_for(tiny_model, tmp_path / "run"))


def test_training_needs_no_git(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run(recipe_for(tiny_model, tmp_path / "run", training__max_steps=1))
    assert tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["provenance"]["git_hash"] == "unknown"


def test_folders_that_are_not_empty(tiny_model, tmp_path):
    recipe = recipe_for(tiny_model, tmp_path / "run", training__max_steps=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        run(recipe)
    with pytest.raises(RunError, match="not a run of qdense"):
        run(recipe, resume=True)
    (tmp_path / "run" / "thesis.txt").unlink()
    events = run(recipe, resume=True)
    assert any(isinstance(event, Notice) and "starting afresh" in event.text for event in events)
    with pytest.raises(RunError, match="is finished"):
        run(recipe, resume=True)
    other = recipe_for(tiny_model, tmp_path / "run", training__max_steps=3)
    with pytest.raises(RunError, match=r"is finished.* differ from the run's: training.max_steps"):
        run(other, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        run(recipe_for(tiny_model, tmp_path / "file"))


def test_a_checkpoint_of_another_version_is_refused(tiny_model, tmp_path):
    recipe = recipe_for(tiny_model, tmp_path / "run", training__max_steps=4)
    run(recipe)
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["format"]  # the first version had none, and this file
    manifest["files"]["qdense.json"] = {}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"checkpoint-2: another version of qdense wrote it \(format 1, not 2\)"):
        run(recipe, resume=True)


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(tiny_model, tmp_path, monkeypatch):
    change_losses(monkeypatch, lambda loop, loss, number: loss * math.nan if (loop.step, number) == (2, 1) else loss)
    with pytest.raises(RunError, match=r"step 3: the loss is not finite; data rows \[\d+, \d+\]"):
        run(recipe_for(tiny_model, tmp_path / "run"))


def test_dead_parameters_stop_the_run(tiny_model, tmp_path, monkeypatch):
    from qdense.tuners.denselora.layer import DenseLoraLinear

    # An adapter whose output is thrown away has no gradients at all.
    monkeypatch.setattr(
        DenseLoraLinear,
        "forward",
        lambda self, x, *args, **kwargs: (
            self.base_layer(x)
            + 0 * sum(p.sum() for p in (self.denselora_m["default"], *self.shared["default"].parameters()))
        ),
    )
    with pytest.raises(RunError, match=r"step 1: 5 of 20 trainable tensors have no gradient.*decoder"):
        run(recipe_for(tiny_model, tmp_path / "run"))


def test_tensors_that_stay_dead_stop_at_step_3(tiny_model, tmp_path, monkeypatch):
    def without_m(self, adapter, x):
        x, encoding = self.shared_input.encode(self, adapter, x)
        mixed = F.linear(encoding, self.denselora_m[adapter].detach())
        return x, decode(mixed, self.shared[adapter].decoder, scaling=self.scaling[adapter])

    monkeypatch.setattr(DenseLoraLinear, "read", without_m)
    with pytest.raises(RunError, match=r"step 3: 10 of 20 trainable tensors have no gradient.*denselora_m"):
        run(recipe_for(tiny_model, tmp_path / "run"))


def test_a_base_without_the_modules_is_named(tiny_model, tmp_path):
    with pytest.raises(QDenseError, match=r"has no linear module w_proj"):
        run(recipe_for(tiny_model, tmp_path / "run", adapter__target_modules=["q_proj", "w_proj"]))
    assert not (tmp_path / "run").exists()


def test_cuda_that_is_not_there_is_named(tiny_model, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(QDenseError, match=r'model.device = "cuda"'):
        run(recipe_for(tiny_model, tmp_path / "run", model__device="cuda"))


def test_a_full_disk_is_reported_before_the_start(tiny_model, tmp_path, monkeypatch):
    recipe = recipe_for(tiny_model, tmp_path / "run")
    load_base(recipe.model)  # its cache is there
    # Four checkpoints of a little more than 1 MiB, and 64 MiB for all else.
    for free_bytes in (1000, 67 * 2**20):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free_bytes: type("Usage", (), {"free": free})())
        with pytest.raises(QDenseError, match=r"not enough disk space for the run's checkpoints: 6\d MiB needed"):
            run(recipe)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 72 * 2**20})())
    run(recipe)


def test_truncated_rows_are_reported(tiny_model, tmp_path):
    events = run(recipe_for(tiny_model, tmp_path / "run", data__max_length=200, training__max_steps=1))
    warning = next(event for event in events if isinstance(event, Notice) and event.level == "warning")
    assert "59 of 59 training rows are longer than data.max_length = 200" in warning.text


def test_a_disk_that_is_full_at_the_end_is_reported_and_a_resume_writes_the_adapter(tiny_model, tmp_path, monkeypatch):
    recipe = recipe_for(tiny_model, tmp_path / "run", training__max_steps=2)

    def full(*arguments, **named):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("peft.PeftModel.save_pretrained", full)
        with pytest.raises(
            RunError, match=r"adapter: the trained adapter cannot be written: .*No space left.*--resume"
        ):
            run(recipe)
    assert not (tmp_path / "run" / "adapter").exists()
    run(recipe, resume=True)
    assert adapter_bytes(tmp_path / "run")


def test_kernels_that_cannot_run_here_are_refused_before_anything_is_done(tiny_model, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        RunError, match=r'training.kernels = "triton": .*(needs a CUDA device|not installed).*Use "auto"'
    ):
        run(recipe_for(tiny_model, tmp_path / "run", training__kernels="triton", data__path="none.json"))
    assert not (tmp_path / "run").exists()


# --- patience and noise ---------------------------------------------------------------------------------------------------


def test_patience_ends_a_run_that_no_longer_improves_and_a_resume_agrees(tiny_model, tmp_path):
    settings = {
        "training__max_steps": 40,
        "training__learning_rate": 0.3,
        "training__eval_steps": 1,
        "training__patience": 2,
    }
    events = run(recipe_for(tiny_model, tmp_path / "run", **settings))
    validated = [event for event in events if isinstance(event, Validated)]
    best = max(event.step for event in validated if event.is_best)
    done = events[-1]
    assert validated[-1].step == best + 2 == done.num_steps < 40
    assert done.kept_step == best
    assert any("(training.patience): the run ends" in event.text for event in events if isinstance(event, Notice))
    shutil.rmtree(tmp_path / "run" / "adapter")  # killed before the adapter was saved
    again = run(recipe_for(tiny_model, tmp_path / "run", **settings), resume=True)
    assert not [event for event in again if isinstance(event, StepDone)]
    assert (again[-1].num_steps, again[-1].kept_step) == (done.num_steps, best)


def test_patience_lasts_while_the_loss_falls(tiny_model, tmp_path):
    events = run(recipe_for(tiny_model, tmp_path / "run", training__patience=1))
    assert all(event.is_best for event in events if isinstance(event, Validated))
    assert events[-1].num_steps == BASICS["max_steps"]


@pytest.mark.parametrize("packing", [True, False])
def test_neftune_adds_noise_to_training_alone_and_resumes_exactly(tiny_model, tmp_path, packing):
    settings = {"training__packing": packing, "training__neftune": 5.0}
    plain = run(recipe_for(tiny_model, tmp_path / "plain", training__packing=packing, training__learning_rate=1e-12))
    noisy = run(recipe_for(tiny_model, tmp_path / "noisy", training__learning_rate=1e-12, **settings))
    losses = [[event.loss for event in events if isinstance(event, StepDone)] for events in (plain, noisy)]
    assert all(a != b for a, b in zip(*losses, strict=True))
    validation = [[event.loss for event in events if isinstance(event, Validated)] for events in (plain, noisy)]
    assert validation[0] == pytest.approx(validation[1], abs=1e-4)
    whole = recipe_for(tiny_model, tmp_path / "whole", **settings)
    run(whole)
    killed_run(recipe_for(tiny_model, tmp_path / "killed", **settings), 5)
    run(recipe_for(tiny_model, tmp_path / "killed", **settings), resume=True)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")


def test_sample_prompts_are_answered_at_each_validation_and_change_nothing(tiny_model, tmp_path):
    run(recipe_for(tiny_model, tmp_path / "plain", training__learning_rate=1e-12))
    prompts = ["What is 1 + 1?", "Hello"]
    recipe = recipe_for(tiny_model, tmp_path / "run", training__learning_rate=1e-12, training__sample_prompts=prompts)
    events = run(recipe)
    samples = [event for event in events if isinstance(event, Sampled)]
    assert [(event.step, event.prompt) for event in samples] == [
        (step, prompt) for step in (2, 4, 6) for prompt in sorted(recipe.training.sample_prompts, key=len, reverse=True)
    ]
    assert any(event.completion for event in samples)
    assert adapter_bytes(tmp_path / "plain") == adapter_bytes(tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["event"] == "sample"]
    assert [line["completion"] for line in lines] == [event.completion for event in samples]


def test_a_sample_that_finds_no_memory_is_a_warning(tiny_model, tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise EvaluationError("out of memory with one sequence at a time")
        yield

    monkeypatch.setattr("qdense.training.loop.generate", refuse)
    events = run(recipe_for(tiny_model, tmp_path / "run", training__sample_prompts=["Hello"]))
    warnings = [event.text for event in events if isinstance(event, Notice) and event.level == "warning"]
    assert sum("training.sample_prompts: out of memory" in text for text in warnings) == 3
    assert isinstance(events[-1], TrainingDone)
