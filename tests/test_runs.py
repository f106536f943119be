"""A run's folder: its names, one writer at a time across processes, what is found in it."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from qdense.cli import main
from qdense.errors import AdapterError, EvaluationError, RunError
from qdense.runs import AnalysisFolder, EvaluationFolder, RunFolder, find_adapter, find_evaluation, newest_finished_run
from tests.helpers import ROOT


@contextmanager
def another_process(entering):
    """A process that has entered the context manager which this expression makes, and stays there."""
    script = f"from qdense.runs import *\nwith {entering}:\n    print('in', flush=True)\n    input()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout.readline() == "in\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(folder, *, age=0):
    """A run of which nothing but the adapter's card is left."""
    (folder / "adapter").mkdir(parents=True)
    card = folder / "adapter" / "qdense.json"
    card.write_text("{}")
    os.utime(card, (2_000_000_000 - age, 2_000_000_000 - age))
    return folder


# --- names ------------------------------------------------------------------------------------------------------------


def test_names():
    """What is on users' disks, and in the README."""
    run = RunFolder(Path("r"))
    evaluation = run.evaluation("0123")
    paths = (run.recipe, run.metrics, run.initial, run.adapter, run.card, run.checkpoints, run.logs, run.analysis.path)
    assert [str(path.relative_to("r")) for path in paths] == [
        "recipe.toml", "metrics.jsonl", "initial.safetensors", "adapter", "adapter/qdense.json", "checkpoints", "logs",
        "analysis",
    ]  # fmt: skip
    paths = (
        evaluation.settings,
        evaluation.sessions,
        evaluation.items,
        evaluation.summary,
        evaluation.completions("x"),
    )
    assert [str(path.relative_to("r/eval/0123")) for path in paths] == [
        "settings.json", "sessions.json", "items.json", "summary.json", "x.jsonl",
    ]  # fmt: skip
    analysis = AnalysisFolder(Path("a"))
    paths = (analysis.summary, analysis.heat_maps, analysis.layers, analysis.histograms)
    assert [path.name for path in paths] == ["summary.json", "heatmaps.png", "layers.png", "histograms.png"]


def test_which_run_an_adapter_and_an_evaluation_belong_to():
    assert RunFolder.of_adapter(Path("runs/x/adapter")) == RunFolder(Path("runs/x"))
    assert RunFolder.of_adapter(Path("downloads/lora")) == RunFolder(Path("downloads/lora"))
    assert RunFolder(Path("runs/x")).evaluation("0123").run == RunFolder(Path("runs/x"))
    assert EvaluationFolder(Path("moved/0123")).run is None


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (RunFolder.of_base("llama3-8b"), "base-llama3-8b"),
        (RunFolder.of_base("../models/tiny"), "base-tiny"),
        (RunFolder.of_endpoint("org/one:latest"), "endpoint-org-one-latest"),
        (RunFolder.of_endpoint("../.."), "endpoint--"),
        (RunFolder.of_endpoint(".."), "endpoint-model"),
    ],
)
def test_models_that_were_not_trained_here_lie_in_runs(run, name):
    assert run.path == Path("runs") / name


# --- who may write ----------------------------------------------------------------------------------------------------


def test_one_process_trains_in_a_folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    with another_process(f"RunFolder(Path({str(run.path)!r})).sole_writer()"):
        with pytest.raises(RunError, match=r"run: another process is training in this folder\. Wait until it ends"):
            run.sole_writer().__enter__()
        assert run.path.is_dir()  # though the other has written nothing yet
        run.recipe.touch()
        with pytest.raises(RunError), run.sole_writer():
            pass
        assert run.recipe.exists()


def test_the_process_at_work_is_named(tmp_path):
    run = RunFolder(tmp_path)
    held = f"RunFolder(Path({str(tmp_path)!r}))"
    with another_process(f"{held}.sole_writer(), {held}.running({{'rows': 2}})") as process:
        with pytest.raises(RunError, match=rf"in this folder \(process {process.pid}\)"):
            run.sole_writer().__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run.left_behind() == {"pid": process.pid, "rows": 2}


@pytest.mark.parametrize("folder", [RunFolder, EvaluationFolder])
def test_a_stale_lock_is_ignored(tmp_path, folder):
    held = folder(tmp_path / "x")
    with another_process(f"{folder.__name__}(Path({str(held.path)!r})).sole_writer()") as process:
        with pytest.raises((RunError, EvaluationError), match="another process is"):
            held.sole_writer().__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (held.path / ".lock").exists()
        with held.sole_writer():
            pass


def test_one_process_runs_an_evaluation(tmp_path):
    evaluation = RunFolder(tmp_path).evaluation("0123")
    held = f"RunFolder(Path({str(tmp_path)!r})).evaluation"
    with another_process(f"{held}('0123').sole_writer()"):
        with pytest.raises(EvaluationError, match=r"eval/0123: another process is running this evaluation"):
            evaluation.sole_writer().__enter__()
        with RunFolder(tmp_path).evaluation("4567").sole_writer(), RunFolder(tmp_path).sole_writer():
            pass  # neither the run nor its other evaluations are held


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    run = RunFolder(tmp_path / "deep" / "run")
    with run.sole_writer():
        assert run.is_empty
    assert not run.path.exists()
    with pytest.raises(KeyError), run.sole_writer():
        raise KeyError
    assert not run.path.exists()
    with run.sole_writer():
        run.metrics.touch()
        assert not run.is_empty
    assert run.metrics.exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match="run: is a file"), RunFolder(tmp_path / "run").sole_writer():
        pass


def test_processes_of_torchrun_share_the_first_one_s_folder(tmp_path, monkeypatch):
    with another_process(f"RunFolder(Path({str(tmp_path)!r})).sole_writer()"):
        monkeypatch.setenv("RANK", "1")
        with RunFolder(tmp_path).sole_writer():
            pass
        assert tmp_path.is_dir()


def test_facts_are_left_by_a_process_that_was_killed_only(tmp_path):
    run = RunFolder(tmp_path)
    with run.running({"rows": 2}):
        assert run.left_behind() == {"pid": os.getpid(), "rows": 2}
    assert run.left_behind() == {}
    with pytest.raises(KeyError), run.running({"rows": 2}):
        raise KeyError
    assert run.left_behind() == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000], ids=lambda text: text[:4])
def test_damaged_facts_are_ignored(tmp_path, content):
    (tmp_path / ".running").write_bytes(content)
    assert RunFolder(tmp_path).left_behind() == {}


# --- what is found ----------------------------------------------------------------------------------------------------


def test_a_run_is_finished_with_its_card(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert not run.is_finished
    assert RunFolder(finished(run.path)).is_finished


def test_provenance(tmp_path):
    run = RunFolder(tmp_path)
    run.recipe.write_text('[model]\nname = "x"\n[provenance]\nnum_steps = 3\n')
    assert run.provenance() == {"num_steps": 3}
    run.recipe.write_text('[model]\nname = "x"\n')
    assert run.provenance() == {}


def test_the_newest_finished_run(tmp_path):
    with pytest.raises(AdapterError, match=r"no finished run under .*name a run's folder"):
        newest_finished_run(tmp_path)
    for name, age in (("old", 100), ("deeper/new", 10), ("older", 200), ("far/too/deep", 0)):
        finished(tmp_path / name, age=age)
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    assert newest_finished_run(tmp_path) == RunFolder(tmp_path / "deeper" / "new")


def test_an_adapter_is_found_from_its_run_and_from_itself(tmp_path):
    run = finished(tmp_path / "run")
    assert find_adapter(run) == find_adapter(run / "adapter") == run / "adapter"
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")  # made by PEFT alone
    assert find_adapter(tmp_path / "lora") == tmp_path / "lora"


@pytest.mark.parametrize("folder", ["/proc/self", "linked"])
def test_a_place_where_no_lock_can_be_made_is_named(tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "linked" / ".lock").symlink_to(tmp_path / "precious")
    assert main(["train", "demo", "--output", folder]) == 2
    said = capsys.readouterr().err
    assert f"{folder}/.lock: " in said
    assert "no file can be created here" in said or "is a symbolic link, and is not followed" in said
    assert (tmp_path / "precious").read_text() == "precious"


def test_adapters_that_are_not_there(tmp_path):
    with pytest.raises(AdapterError, match="none: no such run or adapter"):
        find_adapter(tmp_path / "none")
    (tmp_path / "my-rows").mkdir()
    with pytest.raises(AdapterError, match=r'my-rowz: no such run or adapter; did you mean ".*/my-rows"\?'):
        find_adapter(tmp_path / "my-rowz")
    (tmp_path / "sweeps" / "one" / "adapter").mkdir(parents=True)
    (tmp_path / "sweeps" / "one" / "adapter" / "qdense.json").touch()
    with pytest.raises(AdapterError, match=r"sweeps: holds no adapter .* Name one of the runs in it: one$"):
        find_adapter(tmp_path / "sweeps")
    (tmp_path / "r.toml").touch()
    with pytest.raises(AdapterError, match=r"r\.toml: is a recipe; name its run"):
        find_adapter(tmp_path / "r.toml")
    with pytest.raises(AdapterError, match=r"holds no adapter \(adapter_config\.json or qdense\.json") as error:
        find_adapter(tmp_path)
    assert "--resume" not in str(error.value)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(AdapterError, match="is not finished: `qdense train RECIPE --resume` continues it"):
        find_adapter(tmp_path)


def test_the_evaluation_that_was_finished_last_is_found(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.adapter.mkdir(parents=True)
    with pytest.raises(EvaluationError, match=r"run: not evaluated yet; run `qdense evaluate TASKS --adapter .*run`"):
        find_evaluation(run.path)
    for digest, stamp, names in (
        ("old", 100, ("summary", "items")),
        ("new", 200, ("summary", "items")),
        ("bare", 300, ("summary",)),
        ("begun", 400, ("settings",)),
    ):
        evaluation = run.evaluation(digest)
        evaluation.path.mkdir(parents=True)
        for name in names:
            getattr(evaluation, name).write_text(json.dumps({}))
            os.utime(getattr(evaluation, name), (stamp, stamp))
    assert {one.path.name for one in run.evaluations() if one.is_finished} == {"old", "new"}
    for named in (run.path, run.adapter, run.path / "eval", run.evaluation("new").path):
        assert find_evaluation(named) == run.evaluation("new")
    assert find_evaluation(run.evaluation("begun").path) == run.evaluation("begun")
    moved = run.evaluation("begun").path.rename(tmp_path / "moved")
    assert find_evaluation(moved) == EvaluationFolder(moved)
    with pytest.raises(EvaluationError, match="none: no such folder"):
        find_evaluation(tmp_path / "none")
