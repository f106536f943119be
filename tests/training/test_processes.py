"""Several processes, gloo on a CPU: the batch is the recipe's, the run is that of one process, and a fault of one ends all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from qdense.cli import main
from qdense.errors import RecipeError, RunError
from qdense.planning.memory import NF4_BYTES, Kernels, StepLayout, memory_of
from qdense.planning.shapes import model_shape
from qdense.recipe import recipe_from_tables
from qdense.runs import RunFolder
from qdense.training.metrics import read_metrics
from tests.helpers import ROOT
from tests.helpers.runs import recipe_for, run

EXACT = {"quantization": "none", "model__dtype": "float32", "adapter__dtype": "float32", "adapter__dropout": 0.0}
NF4 = {"quantization": "nf4"}
# The last step of an epoch has three of the 59 rows: with batches of 4, one process of two has more than the other.
STEPS = {"training__max_steps": 16, "training__save_steps": 8, "training__eval_steps": 8}
ADAPTER = "adapter/adapter_model.safetensors"


def written(recipe, path):
    path.write_text(tomli_w.dumps(recipe.resolved()))
    return path


def torchrun(num_processes, *arguments, module="qdense", **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    return subprocess.run(
        [*command, "-m", module, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


def command(*arguments):
    return [sys.executable, "-m", "qdense", *map(str, arguments)]


def assert_same_adapter(one, several):
    expected, found = load_file(one / ADAPTER), load_file(several / ADAPTER)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6, msg=key)


@pytest.fixture(scope="module")
def one(tiny_model, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    run(recipe_for(tiny_model, folder, **EXACT, **STEPS))
    return folder


@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_train_as_one(tiny_model, one, tmp_path, num_processes):
    several = tmp_path / "several"
    recipe = written(recipe_for(tiny_model, several, **EXACT, **STEPS), tmp_path / "recipe.toml")
    outcome = torchrun(num_processes, "train", recipe)
    assert outcome.returncode == 0, outcome.stderr
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (one, several)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert [line["loss"] for line in lines[1]] == pytest.approx([line["loss"] for line in lines[0]], rel=1e-6)
    keys = ("num_tokens", "epoch")
    first, second = ([[line.get(key) for key in keys] for line in each] for each in lines)
    assert first == second
    assert_same_adapter(one, several)
    assert outcome.stdout.count("step 16 checkpoint") == 1


def started(recipe, *options):
    """A run of two processes by `--gpus`, in a process group of its own, that has made a step."""
    process = subprocess.Popen(
        command("train", recipe, "--gpus", 2, *options),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    return process


def wait_for_step(process, folder):
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("to_all", [False, True], ids=["SIGTERM to the launcher", "Ctrl-C to all"])
def test_a_stopped_run_of_two_resumes_with_three(tiny_model, tmp_path, to_all):
    # With a constant rate, steps do not depend on how many there are.
    settings = EXACT | {f"training__{name}": 400 for name in ("max_steps", "save_steps", "eval_steps")}
    settings |= {"training__schedule": "constant"}
    folder, alone = tmp_path / "run", tmp_path / "alone"
    recipe = written(recipe_for(tiny_model, folder, **settings), tmp_path / "recipe.toml")
    process = started(recipe)
    wait_for_step(process, folder)
    if to_all:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    _, errors = process.communicate(timeout=120)
    number = signal.SIGINT if to_all else signal.SIGTERM
    assert process.returncode == 128 + number, errors
    assert errors.count("The last good checkpoint is") == 1
    assert "Traceback" not in errors
    (checkpoint,) = RunFolder(folder).checkpoints.iterdir()
    step = int(checkpoint.name.rpartition("-")[2])
    assert 0 < step < 400
    if to_all:
        return
    changes = ["--set", f"training.max_steps={step + 4}", "--accept-changes", "--resume"]
    outcome = subprocess.run(
        command("train", recipe, "--gpus=3", *changes), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    metrics = read_metrics(folder / "metrics.jsonl")
    steps = [line["step"] for line in metrics if line["event"] == "step"]
    assert steps == list(range(1, step + 5))
    run(recipe_for(tiny_model, alone, **(settings | {"training__max_steps": step + 4})))
    losses = [line["loss"] for line in metrics if line["event"] == "step"]
    expected = [line["loss"] for line in read_metrics(alone / "metrics.jsonl") if line["event"] == "step"]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_adapter(alone, folder)


WATCHED = '''
"""qdense, which says what each process holds."""
import sys

from qdense.cli import main
from qdense.modeling.shard import held_bytes
from qdense.training.loop import TrainingLoop

whole = TrainingLoop.run


def run(self):
    print("held", held_bytes(self.job.model), flush=True)
    whole(self)


TrainingLoop.run = run
sys.exit(main())
'''


@pytest.fixture(scope="module")
def one_nf4(tiny_model, tmp_path_factory):
    """The run of one process on a 4-bit base."""
    folder = tmp_path_factory.mktemp("one-nf4") / "run"
    run(recipe_for(tiny_model, folder, **(EXACT | NF4), **STEPS))
    return folder


def with_module(folder, name, text):
    (folder / f"{name}.py").write_text(text)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.mark.parametrize("num_processes", [2, 4])
def test_a_divided_base_trains_as_a_whole_one_and_is_held_in_parts(tiny_model, one_nf4, tmp_path, num_processes):
    """With four, the last step of an epoch has no row for one of them."""
    recipe = recipe_for(tiny_model, tmp_path / "run", **(EXACT | NF4), **STEPS, training__shard=True)
    environment = with_module(tmp_path, "watched", WATCHED)
    outcome = torchrun(
        num_processes, "train", written(recipe, tmp_path / "recipe.toml"), module="watched", env=environment
    )
    assert outcome.returncode == 0, outcome.stderr
    assert_same_adapter(one_nf4, tmp_path / "run")
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (one_nf4, tmp_path / "run")]
    losses = [[line["loss"] for line in each] for each in lines]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    shape = model_shape(str(tiny_model))
    breakdown = memory_of(
        recipe, shape, Kernels(False, False, False), StepLayout(1, 0), num_shards=num_processes
    ).breakdown
    linears = shape.num_layers * sum(d_in * d_out for d_in, d_out in shape.linear_shapes().values())
    scales = linears * (NF4_BYTES - 0.5)  # no parameters, and not divided
    planned = sum(breakdown[part] for part in ("weights", "embeddings_and_head", "adapter")) - scales
    held = [int(line.split()[1]) for line in outcome.stdout.splitlines() if line.startswith("held")]
    assert len(held) == num_processes
    assert max(held) == pytest.approx(planned, rel=0.03)


def test_a_killed_process_of_a_divided_base_leaves_a_checkpoint_for_a_whole_one(tiny_model, one_nf4, tmp_path):
    folder = tmp_path / "run"
    settings = EXACT | NF4 | STEPS
    divided = written(recipe_for(tiny_model, folder, **settings, training__shard=True), tmp_path / "divided.toml")
    environment = with_module(tmp_path, "faulty", FAULTY)
    outcome = torchrun(2, "train", divided, "--killed", module="faulty", env=environment, timeout=120)
    assert outcome.returncode != 0
    assert [path.name for path in RunFolder(folder).checkpoints.iterdir()] == ["checkpoint-3"]
    run(recipe_for(tiny_model, folder, **settings), resume=True)
    assert_same_adapter(one_nf4, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"quantization": "int8"}}, 'needs model.quantization = "nf4" or "none"'),
        ({"adapter": {"method": "dora"}}, "cannot be used with dora"),
        ({"training": {"sample_prompts": ["a"]}}, "cannot be combined with training.sample_prompts"),
    ],
)
def test_what_cannot_be_divided(changes, message):
    tables = {"model": {"name": "smollm2-135m"}, "data": {"name": "wordproblems"}, "training": {}}
    for table, values in changes.items():
        tables[table] = tables.get(table, {}) | values
    tables["training"] = tables["training"] | {"shard": True}
    with pytest.raises(RecipeError, match=message):
        recipe_from_tables(tables, source="test")


def test_one_process_has_nothing_to_divide(tiny_model, tmp_path, capsys):
    with pytest.raises(RunError, match=r"there is one process\. Start several with --gpus N"):
        run(recipe_for(tiny_model, tmp_path / "run", training__shard=True))
    assert main(["plan", "math10k", "--memory", "24GiB", "--shard"]) == 2
    assert "say how many with --gpus" in capsys.readouterr().err


def test_a_plan_for_several_cards(tmp_path, capsys):
    recipe = tmp_path / "large.toml"
    recipe.write_text('[model]\nname = "llama3-70b"\n[data]\nname = "math10k"\n')
    plans = []
    for options in (["--gpus", "2"], ["--gpus", "2", "--shard"]):
        assert main(["plan", str(recipe), "--memory", "24GiB", *options, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    whole, divided = plans
    assert not whole["fits"]
    assert "training.shard = true would fit" in whole["remedies"]
    assert divided["fits"]
    # LLaMA-3-70B's layers have 68.5e9 weights: half of them, half a byte each, come from the other card.
    assert divided["gathered_bytes"] == pytest.approx(68.5e9 / 2 / 2, rel=0.01)
    assert whole["breakdown"]["weights"] - divided["breakdown"]["weights"] == divided["gathered_bytes"]
    assert whole["summed_bytes"] == divided["summed_bytes"] > 0


FAULTY = '''
"""qdense, with a fault in step 4 of its second process."""
import os
import sys

from qdense.cli import main
from qdense.training.loop import TrainingLoop

whole = TrainingLoop.forward_and_backward


def forward_and_backward(self, step, examples):
    if step == 4 and os.environ["RANK"] == "1":
        if "--killed" in sys.argv:
            os.kill(os.getpid(), 9)
        raise MemoryError("no memory left here")
    return whole(self, step, examples)


TrainingLoop.forward_and_backward = forward_and_backward
sys.exit(main([word for word in sys.argv[1:] if word != "--killed"]))
'''


@pytest.mark.parametrize("killed", [False, True], ids=["out of memory", "killed"])
def test_a_fault_of_one_process_ends_all_with_a_checkpoint(tiny_model, tmp_path, killed):
    folder = tmp_path / "run"
    recipe = written(recipe_for(tiny_model, folder, **EXACT, **STEPS), tmp_path / "recipe.toml")
    arguments = ["train", recipe, *(["--killed"] if killed else [])]
    outcome = torchrun(2, *arguments, module="faulty", env=with_module(tmp_path, "faulty", FAULTY), timeout=120)
    assert outcome.returncode != 0
    told = "another process of this run has ended" if killed else "process 2 of 2: MemoryError: no memory left here"
    assert outcome.stderr.count(told) == 1
    assert [path.name for path in RunFolder(folder).checkpoints.iterdir()] == ["checkpoint-3"]


def test_a_user_s_mistake_is_told_once(tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "one", "output": ""}\n')
    changes = {"data__name": None, "data__path": str(tmp_path / "rows.jsonl"), "data__fraction": 1.0}
    recipe = recipe_for(tiny_model, tmp_path / "run", **EXACT, **changes)
    outcome = subprocess.run(
        command("train", written(recipe, tmp_path / "recipe.toml"), "--gpus", 2),
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 2
    assert outcome.stderr.count("error: ") == 1
    assert "line 1" in outcome.stderr


def test_an_evaluation_by_two_processes_is_that_of_one(one, tmp_path):
    results = []
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes) / "run"
        shutil.copytree(one, folder)
        arguments = ["evaluate", "wordproblems", "--adapter", str(folder), "--limit", "9", "--decoding", "greedy"]
        arguments += ["--max-new-tokens", "8", "--quiet"]
        if num_processes == 1:
            assert main(arguments) == 0
        else:
            outcome = torchrun(num_processes, *arguments)
            assert outcome.returncode == 0, outcome.stderr
        (evaluation,) = RunFolder(folder).evaluations()
        assert evaluation.is_finished
        results.append({name.name: name.read_bytes() for name in Path(evaluation.path).iterdir()})
    for name in ("wordproblems.jsonl", "items.json", "settings.json"):
        assert results[0][name] == results[1][name]
    assert results[0].keys() == results[1].keys()  # no process has left a file of its own


def test_completions_of_a_killed_process_are_not_lost(one, tmp_path):
    """What another process had completed is in a file of its own."""
    shutil.copytree(one, tmp_path / "run")
    arguments = ["evaluate", "wordproblems", "--adapter", str(tmp_path / "run"), "--limit", "6", "--decoding", "greedy"]
    assert main([*arguments, "--max-new-tokens", "8", "--quiet"]) == 0
    (evaluation,) = RunFolder(tmp_path / "run").evaluations()
    whole = evaluation.completions("wordproblems")
    expected = whole.read_text()
    lines = expected.splitlines(keepends=True)
    whole.write_text("".join(lines[::2]))
    whole.with_name(f"{whole.name}.process-1").write_text(lines[1] + lines[3][:20])
    assert main([*arguments, "--max-new-tokens", "8", "--quiet"]) == 0
    assert whole.read_text() == expected
    assert not list(whole.parent.glob("*.process-*"))


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({}, ["--gpus", "2"], "--gpus 2: torch finds no GPU on this machine"),
        ({"GPUS": "3"}, ["--gpus", "4"], "--gpus 4: this machine has 3 GPUs. Give at most 3"),
        ({"RANK": "0"}, ["--gpus", "2"], "--gpus 2: this process was started by a launcher"),
        ({}, ["--gpus", "0"], "--gpus: "),
    ],
)
def test_numbers_of_gpus_that_cannot_be(environment, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(environment.get("GPUS", 0)))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        status = main(["train", "demo", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
