"""Runs that are stopped, killed, started twice or changed: what happens, and what the user sees. tools/faults.py does more."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
import torch
from rich.console import Console
from safetensors.torch import load_file

from qdense.benchmarks.evaluate import EvaluationRequest, evaluate
from qdense.benchmarks.tasks import TASKS
from qdense.errors import EvaluationError, RunError, RunStopped
from qdense.events import CheckpointSaved, EvaluationProgress, Notice, StepDone, TrainingStarted, Validated
from qdense.inference.generation import DECODINGS
from qdense.modeling.load import load_base
from qdense.recipe import ModelRecipe, load_recipe
from qdense.runs import RunFolder
from qdense.training import resume as resume_module
from qdense.training.metrics import read_metrics
from qdense.training.run import train
from qdense.training.signals import named
from qdense.ui.training import TrainingDisplay
from tests.helpers import ROOT
from tests.helpers.runs import adapter_bytes, change_losses, killed_run, recipe_for, run


def notices(events, level="warning"):
    return [event.text for event in events if isinstance(event, Notice) and event.level == level]


@pytest.fixture(scope="module")
def uncut(tiny_model, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uncut") / "run"
    run(recipe_for(tiny_model, folder))
    return folder


@pytest.fixture(autouse=True)
def ordinary_signals():
    """Under nohup, or in a shell's background, some are ignored; qdense then leaves them so."""
    before = {
        number: signal.signal(number, handler)
        for number, handler in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, signal.SIG_DFL),
            (signal.SIGHUP, signal.SIG_DFL),
        )
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tiny_model, tmp_path, uncut, number):
    recipe = recipe_for(tiny_model, tmp_path / "run")
    events = []

    def emit(event):
        events.append(event)
        if isinstance(event, StepDone) and event.step == 3:  # no step that would have been saved
            os.kill(os.getpid(), number)

    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(
        RunStopped, match=rf"stopped by {named(number)} after step \d of 6.*checkpoint-\d; continue"
    ) as stop:
        train(recipe, resume=False, data_dir=None, emit=emit)
    assert stop.value.signal_number == number
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / ".running").exists()
    assert any("stopping after this step" in text for text in notices(events))
    run(recipe, resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(uncut)


def test_a_second_signal_leaves_at_once(tiny_model, tmp_path):
    steps = []

    def emit(event):
        if isinstance(event, StepDone):
            steps.append(event.step)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("not left")

    with pytest.raises(KeyboardInterrupt):
        train(recipe_for(tiny_model, tmp_path / "run"), resume=False, data_dir=None, emit=emit)
    assert steps == [1]


def test_a_signal_in_the_last_step_lets_the_run_finish(tiny_model, tmp_path, uncut):
    def emit(event):
        if isinstance(event, StepDone) and event.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    train(recipe_for(tiny_model, tmp_path / "run"), resume=False, data_dir=None, emit=emit)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(uncut)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_exit_status_of_a_command_that_a_signal_ends(name, status):
    script = (
        "import os, signal\nfrom qdense import cli\nfrom qdense.cli import params\n"
        f"params.run = lambda arguments: os.kill(os.getpid(), signal.{name})\n"
        "raise SystemExit(cli.main(['params', 'llama3-8b']))"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (outcome.returncode, "stopped; to continue" in outcome.stderr) == (status, True)
    assert "Traceback" not in outcome.stderr


# --- one process a folder ------------------------------------------------------------------------------------------------


def test_a_second_process_in_a_folder_is_refused_and_changes_nothing(tiny_model, tmp_path, uncut):
    recipe, refused = recipe_for(tiny_model, tmp_path / "run"), []

    def emit(event):
        if isinstance(event, StepDone) and event.step == 3:
            for resume in (True, False):
                with pytest.raises(
                    RunError, match=rf"another process is training in this folder \(process {os.getpid()}\)"
                ):
                    run(recipe, resume=resume)
                refused.append(resume)

    train(recipe, resume=False, data_dir=None, emit=emit)
    assert refused == [True, False]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(uncut)


def test_a_stale_lock_is_ignored(tmp_path):
    folder = tmp_path / "run"
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom qdense.runs import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).sole_writer():\n    Path(sys.argv[1], 'recipe.toml').touch()\n    os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=False)
    assert (folder / ".lock").exists()
    with RunFolder(folder).sole_writer():
        assert (folder / "recipe.toml").exists()


def test_a_run_that_came_to_nothing_leaves_no_folder(tiny_model, tmp_path):
    with pytest.raises(Exception, match=r"none\.json"):
        run(recipe_for(tiny_model, tmp_path / "run", data__path="none.json"))
    assert not (tmp_path / "run").exists()


# --- what changed between processes --------------------------------------------------------------------------------------


def test_changes_are_refused_with_a_list_or_accepted_by_a_flag(tiny_model, tmp_path):
    killed_run(recipe_for(tiny_model, tmp_path / "run"), step=3)
    other = recipe_for(tiny_model, tmp_path / "run", training__learning_rate=2e-2, training__max_steps=5)
    with pytest.raises(RunError) as refused:
        run(other, resume=True)
    assert "training.learning_rate: was 0.01, now 0.02" in str(refused.value)
    assert "training.max_steps: was 6, now 5" in str(refused.value)
    assert "--accept-changes" in str(refused.value)
    events = []
    train(other, resume=True, data_dir=None, emit=events.append, accept_changes=True)
    assert [event.step for event in events if isinstance(event, StepDone)] == [3, 4, 5]
    assert any("continuing although the recipe changed" in text and "now 0.02" in text for text in notices(events))
    assert load_recipe(tmp_path / "run" / "recipe.toml").training.learning_rate == 2e-2


def test_a_learning_rate_that_was_lowered_is_that_of_the_resumed_run(tiny_model, tmp_path):
    """The remedy for a loss that explodes."""
    killed_run(recipe_for(tiny_model, tmp_path / "run", training__schedule="constant"), step=3)
    lower = recipe_for(tiny_model, tmp_path / "run", training__schedule="constant", training__learning_rate=1e-4)
    events = []
    train(lower, resume=True, data_dir=None, emit=events.append, accept_changes=True)
    assert [event.learning_rate for event in events if isinstance(event, StepDone)] == [1e-4] * 4


def test_a_checkpoint_that_does_not_fit_the_changed_recipe_is_refused(tiny_model, tmp_path):
    killed_run(recipe_for(tiny_model, tmp_path / "run"), step=5)
    for changes, told in (
        ({"training__max_steps": 3}, r"checkpoint 4 of .* does not fit this run: the run now has 3 steps"),
        ({"adapter__r": 1}, r"does not fit this run: .* is \[8, 8\] there and \[1, 1\] here"),
        ({"adapter__method": "lora"}, r"does not fit this run: .*tensors are missing or unknown"),
    ):
        with pytest.raises(RunError, match=told):
            train(
                recipe_for(tiny_model, tmp_path / "run", **changes),
                resume=True, data_dir=None, emit=lambda event: None, accept_changes=True,
            )  # fmt: skip


def test_the_best_is_kept_by_a_recipe_that_wants_it_only_after_the_last_step(tiny_model, tmp_path):
    class Killed(BaseException):
        pass

    def emit(event):
        if isinstance(event, CheckpointSaved) and event.step == 6:
            raise Killed

    with pytest.raises(Killed):
        train(recipe_for(tiny_model, tmp_path / "run", training__keep="last"), resume=False, data_dir=None, emit=emit)
    events = []
    train(recipe_for(tiny_model, tmp_path / "run"), resume=True, data_dir=None, emit=events.append, accept_changes=True)
    assert [event.step for event in events if isinstance(event, Validated)] == [6]
    assert events[-1].kept_step == 6


def test_other_versions_are_refused(tiny_model, tmp_path, monkeypatch):
    recipe = recipe_for(tiny_model, tmp_path / "run")
    killed_run(recipe, step=3)
    versions = resume_module.package_versions()
    monkeypatch.setattr(resume_module, "package_versions", lambda: versions | {"torch": "9.9"})
    with pytest.raises(RunError, match=r"same versions(?s:.*)torch: was '2\..*now '9\.9'"):
        run(recipe, resume=True)
    events = []
    train(recipe, resume=True, data_dir=None, emit=events.append, accept_changes=True)
    assert any("although the versions changed" in text for text in notices(events))


def test_a_folder_that_disappears_in_mid_run_is_reported(tiny_model, tmp_path):
    recipe = recipe_for(tiny_model, tmp_path / "run")

    def emit(event):
        if isinstance(event, StepDone) and event.step == 3:
            (tmp_path / "run").rename(tmp_path / "elsewhere")

    with pytest.raises(RunError, match=r"step 4: the run's folder .* was moved or removed during the run"):
        train(recipe, resume=False, data_dir=None, emit=emit)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    run(recipe, resume=True)
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_ranks_that_are_no_numbers_are_refused(tiny_model, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "y")
    with pytest.raises(RunError, match=f'{name} = "y": must be a whole number'):
        run(recipe_for(tiny_model, tmp_path / "run"))


def test_a_smaller_micro_batch_is_taken_on_resume(tiny_model, tmp_path):
    """The remedy for memory that ran out: the checkpoint's own layout must not come back."""
    killed_run(recipe_for(tiny_model, tmp_path / "run", training__micro_batch_size=4), step=3)
    smaller = recipe_for(tiny_model, tmp_path / "run", training__micro_batch_size=1, training__recompute="none")
    train(smaller, resume=True, data_dir=None, emit=lambda event: None, accept_changes=True)
    layout = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["provenance"]["plan"]["layout"]
    assert (layout["micro_batch_size"], layout["recompute_layers"]) == (1, 0)
    saved = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-6" / "state.json").read_text())
    assert saved["layout"]["micro_batch_size"] == 1


def test_a_killed_process_is_reported_with_its_memory(tiny_model, tmp_path):
    recipe = recipe_for(tiny_model, tmp_path / "run")
    killed_run(recipe, step=3)
    facts = {
        "pid": 1,
        "planned_bytes": 3 * 2**30,
        "memory_total_bytes": 8 * 2**30,
        "micro_batch_size": 2,
        "recompute_layers": 2,
    }
    (tmp_path / "run" / ".running").write_text(json.dumps(facts))
    (told,) = [text for text in notices(run(recipe, resume=True)) if "was killed" in text]
    for part in ("3.0 GiB", "after step 3", "of 8.0 GiB", "training.micro_batch_size (2)", "--accept-changes"):
        assert part in told
    assert not (tmp_path / "run" / ".running").exists()


# --- numbers that go wrong -----------------------------------------------------------------------------------------------


def poisoned_at(monkeypatch, *steps, factor=float("nan")):
    change_losses(monkeypatch, lambda loop, loss, number: loss * factor if loop.step + 1 in steps else loss)


def test_a_stopped_run_names_its_last_good_checkpoint(tiny_model, tmp_path, monkeypatch):
    poisoned_at(monkeypatch, 5)
    with pytest.raises(RunError, match=r"step 5: the loss is not finite; data rows \[.*checkpoint-4; continue"):
        run(recipe_for(tiny_model, tmp_path / "run"))


@pytest.mark.parametrize("method", ["denselora", "adalora"])
def test_a_step_may_be_skipped(tiny_model, tmp_path, monkeypatch, method):
    poisoned_at(monkeypatch, 3)
    weights = {}
    recipe = recipe_for(
        tiny_model, tmp_path / "run", training__on_nonfinite="skip", adapter__method=method, training__save_steps=1
    )
    events = []

    def emit(event):
        events.append(event)
        if isinstance(event, CheckpointSaved):
            weights[event.step] = list(load_file(Path(event.path) / "weights.safetensors").values())

    train(recipe, resume=False, data_dir=None, emit=emit)
    (told,) = [text for text in notices(events) if "This step is skipped" in text]
    assert told.startswith("step 3: the loss is not finite; data rows [")
    assert all(torch.equal(a, b) for a, b in zip(weights[2], weights[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[3], weights[4], strict=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert [line["loss"] is None for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["event"] == "step"] == [
        False, False, True, False, False, False,
    ]  # fmt: skip


def test_a_step_that_is_skipped_in_the_warm_up_makes_nothing_look_dead(tiny_model, tmp_path, monkeypatch):
    """Warm-up's first rate is 0: with step 2 left out, the decoder is still zero at step 3, and all else without a gradient."""
    poisoned_at(monkeypatch, 2)
    events = run(recipe_for(tiny_model, tmp_path / "run", training__on_nonfinite="skip"))
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4, 5, 6]


def test_a_skipped_last_cut_of_adaloras_ranks_is_made_at_the_next_step(tiny_model, tmp_path, monkeypatch):
    settings = {"adapter__method": "adalora", "training__on_nonfinite": "skip", "training__max_steps": 10}
    own = {"adapter__adalora": {"warmup_share": 0.1, "final_share": 0.5, "cut_every": 1}}
    poisoned_at(monkeypatch, 5)
    events = run(recipe_for(tiny_model, tmp_path / "run", **settings, **own, training__eval_steps=1))
    settled = [event.step for event in events if isinstance(event, Validated) and event.is_best]
    assert min(settled) == 6  # not 5, whose ranks were not cut
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    ranks = [len(tensor) for name, tensor in weights.items() if name.endswith("lora_E")]
    assert sum(ranks) == 8 * len(ranks)  # the target: r on average


def test_a_gradient_whose_norm_overflows_stops_the_run(tiny_model, tmp_path, monkeypatch):
    change_losses(monkeypatch, lambda loop, loss, number: loss + 1e30 * (loss - loss.detach()))
    with pytest.raises(RunError, match="step 1: a gradient is not finite"):
        run(recipe_for(tiny_model, tmp_path / "run"))


def test_steps_are_not_skipped_for_ever(tiny_model, tmp_path, monkeypatch):
    poisoned_at(monkeypatch, *range(3, 99))
    with pytest.raises(RunError, match=r"step 13: .*11 skipped steps in a row"):
        run(recipe_for(tiny_model, tmp_path / "run", training__on_nonfinite="skip", training__max_steps=20))


def test_a_loss_that_explodes_is_reported_once(tiny_model, tmp_path, monkeypatch):
    assert not [text for text in notices(run(recipe_for(tiny_model, tmp_path / "calm"))) if "exploded" in text]
    poisoned_at(monkeypatch, *range(4, 13), factor=40.0)
    events = run(recipe_for(tiny_model, tmp_path / "run", training__max_steps=12, training__learning_rate=1e-5))
    (told,) = [text for text in notices(events) if "has exploded" in text]
    assert told.startswith("step ")


# --- a display without a reader ------------------------------------------------------------------------------------------


def test_a_run_outlives_the_reader_of_its_output(tiny_model, tmp_path):
    recipe = tmp_path / "r.toml"
    tables = recipe_for(tiny_model, tmp_path / "run", training__max_steps=3).resolved()
    recipe.write_text(tomli_w.dumps(tables))
    command = [sys.executable, "-m", "qdense", "train", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.read(1)
        process.stdout.close()
        error = process.stderr.read()
        assert (process.wait(), error) == (0, b"")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_display_whose_stream_fails_keeps_drawing(is_terminal):
    attempts = []

    class Gone(io.StringIO):
        def write(self, text):
            attempts.append(text)
            raise OSError(5, "Input/output error")

    with TrainingDisplay(Console(file=Gone(), force_terminal=is_terminal)) as show:
        show(Notice("hello", "warning"))
        show(TrainingStarted("a run", (("base", "tiny"),), 2, 0, 2**30, "process"))
        show(StepDone(1, 0.1, float("nan"), 1e-3, float("inf"), 10, 5.0, 2**20, 2.0))
        show(StepDone(2, 0.2, 1.5, 1e-3, 0.1, 10, 5.0, 2**20, 4.0))
        show.render()
    assert attempts  # it did draw, and the failure went no further
    assert (show.step.step, show.step.loss) == (2, 1.5)


# --- without a network ---------------------------------------------------------------------------------------------------


def test_what_is_cached_needs_no_network(tmp_path):
    """The built-in model, prepared once: training it and evaluating it open no connection."""
    load_base(ModelRecipe(name="smollm2-135m", device="cpu"))
    script = (
        "import socket, sys\n"
        "def refused(*arguments, **keywords): raise AssertionError(f'a connection: {arguments}')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused\n"
        "from qdense.cli import main\n"
        "status = main(['train', sys.argv[1], '--set', 'training.max_steps=1', '--set', 'data.validation_rows=1', "
        "'--set', 'training.batch_size=1', '--output', sys.argv[2]])\n"
        "raise SystemExit(status or main(['evaluate', 'wordproblems', '--adapter', sys.argv[2], '--limit', '1', "
        "'--max-new-tokens', '1', '--decoding', 'greedy']))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_HUB_OFFLINE")}
    command = [sys.executable, "-c", script, str(ROOT / "recipes" / "demo.toml"), str(tmp_path / "run")]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_two_evaluations_of_the_same_are_refused(uncut):
    request = EvaluationRequest(
        tasks=[TASKS["wordproblems"]], adapter=uncut, model={}, with_base=False, decoding=DECODINGS["greedy"], limit=4,
        max_new_tokens=3, batch_size=2,
    )  # fmt: skip
    refused = []

    def emit(event):
        if isinstance(event, EvaluationProgress) and not refused:
            with pytest.raises(EvaluationError, match="another process is running this evaluation") as error:
                evaluate(request, lambda event: None)
            refused.append(error)

    evaluate(request, emit)
    assert refused
    evaluate(request, lambda event: None)
