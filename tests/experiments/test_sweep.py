"""Sweeps as a user runs them: to the end, killed, by several workers, with failing cells, on a full disk."""

import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from qdense.cli import main
from qdense.comparison.compare import compare
from qdense.comparison.evaluations import load_evaluation
from qdense.errors import QDenseError, RunError
from qdense.experiments.cells import Outcome, SweepFolder
from qdense.experiments.experiment import load_experiment
from qdense.experiments.standing import jobs_of, standing
from qdense.experiments.studies import ArmStudy, open_storage
from qdense.experiments.sweep import Sweep
from qdense.runs import RunFolder
from qdense.training.metrics import read_metrics
from tests.helpers.experiments import start_sweep, write_experiment

RUNS = Path("runs/sweeps")


def state_of(file, folder=RUNS, overrides=()):
    experiment = load_experiment(file, overrides)
    sweeps = SweepFolder(folder)
    stands = standing(experiment, sweeps)
    return experiment, stands, list(jobs_of(experiment, sweeps, stands))


def trials_of(folder, arm=""):
    storage = f"sqlite:///{Path(folder, 'studies.db').resolve()}"
    names = [name for name in optuna.get_all_study_names(storage) if f": {arm}" in name]
    return [trial for name in names for trial in optuna.load_study(study_name=name, storage=storage).trials]


def run_steps(cell_folder):
    return [line["step"] for line in read_metrics(cell_folder / "run" / "metrics.jsonl") if line["event"] == "step"]


def wait_until(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        assert process is None or process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def test_a_sweep_to_its_end(swept):
    file, folder, printed = swept
    _, stands, left = state_of(file, folder / RUNS)
    assert left == []
    lora, dense = stands
    assert {3e-2, 1e-1, 3e-1} <= lora.losses.keys()
    assert lora.losses[lora.learning_rate] == min(lora.losses.values())
    assert min(lora.losses) < lora.learning_rate < max(lora.losses)
    assert (dense.losses, dense.learning_rate) == ({}, 1e-1)  # the file sets it
    for each in stands:
        assert {seed: outcome.state for seed, outcome in each.finals.items()} == {1: "trained", 2: "trained"}
        for seed, outcome in each.finals.items():
            cell = folder / RUNS / "cells" / each.final(seed).digest
            lines = read_metrics(cell / "run" / "metrics.jsonl")
            assert outcome.loss == [line["loss"] for line in lines if line["event"] == "validation"][-1]
            assert run_steps(cell) == [1, 2, 3, 4]
            assert not (cell / "run" / "checkpoints").exists()  # a finished run needs none
        group = compare([load_evaluation(path) for path in each.evaluations.values()])["groups"]
        assert len(group) == 1
        assert [run["seed"] for run in group[0]["runs"]] == [1, 2]
    assert "LoRA (final" in printed
    assert printed.rstrip().endswith("done")
    # Optuna's record agrees: for each search a study with the losses by rate.
    trials = trials_of(folder / RUNS)
    assert {trial.params["learning_rate"]: trial.value for trial in trials} == lora.losses
    assert all(trial.user_attrs["seed"] == 101 for trial in trials)
    assert all(set(trial.intermediate_values) == {1, 2} for trial in trials)  # its validations


def test_a_finished_sweep_has_nothing_to_do(copied, capsys):
    before = {path: path.stat().st_mtime_ns for path in RUNS.rglob("cell.json")}
    assert main(["sweep", str(copied)]) == 0
    assert {path: path.stat().st_mtime_ns for path in RUNS.rglob("cell.json")} == before
    assert "done" in capsys.readouterr().out


def test_what_another_experiment_trained_is_not_trained_again(copied, monkeypatch):
    """The same runs under another name, with another evaluation: only that is to be done."""
    shutil.copy(copied, "other.toml")
    (RUNS / "studies.db").unlink()
    overrides = ["evaluate.limit=2", "seeds=[1]"]
    _, stands, left = state_of("other.toml", overrides=overrides)
    assert [(job.arm.name, job.cell.stage if job.cell else "base") for job in left] == [
        ("LoRA", "final"),
        ("DenseLoRA", "final"),
        ("LoRA", "base"),
    ]
    assert main(["sweep", "other.toml", "--quiet", "--set", overrides[0], "--set", overrides[1]]) == 0
    _, stands, left = state_of("other.toml", overrides=overrides)
    assert left == []
    assert all(len(load_evaluation(each.evaluations[1]).outcomes["wordproblems"]["paper"]) == 2 for each in stands)
    # A lost study is written again from the runs.
    assert {trial.params["learning_rate"]: trial.value for trial in trials_of(RUNS)} == stands[0].losses


def test_killed_and_continued_by_two_workers(tmp_path, tiny_model):
    """The first worker is killed in the middle of a run, without a chance to clean up; two others finish, and nothing is lost or
    done twice: the run that it had started goes on and is waited for."""
    file = write_experiment(tmp_path, tiny_model, steps=8)
    options = ["--set", "seeds=[1]", "--set", "evaluate.base=false"]
    first = start_sweep(file, *options, cwd=tmp_path)
    cells = tmp_path / RUNS / "cells"
    wait_until(
        lambda: any(2 in run_steps(cell) for cell in cells.glob("*") if (cell / "run/metrics.jsonl").exists()), first
    )
    first.kill()
    first.communicate()
    assert not list(cells.glob("*/cell.json"))
    workers = [start_sweep(file, *options, cwd=tmp_path) for _ in range(2)]
    printed = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], printed
    _, stands, left = state_of(file, tmp_path / RUNS, ["seeds=[1]", "evaluate.base=false"])
    assert left == []
    assert all(outcome.state == "trained" for each in stands for outcome in each.outcomes)
    for cell in cells.iterdir():
        assert run_steps(cell) == list(range(1, 9))
        # Each cell was trained by one command, or one that was killed and one that resumed it.
        assert (cell / "log.txt").read_text().count("nothing to resume") == 1
    ended = Counter(cell for text in printed for cell in finished_in(text))
    assert set(ended.values()) == {1}, ended  # no cell was finished by both
    done = [trial for trial in trials_of(tmp_path / RUNS) if trial.state == TrialState.COMPLETE]
    assert len(done) == len({trial.user_attrs["cell"] for trial in done}) == len(stands[0].losses)
    assert not [
        trial for trial in trials_of(tmp_path / RUNS) if trial.state in (TrialState.RUNNING, TrialState.WAITING)
    ]


def finished_in(printed):
    return [line.partition(":")[0] for line in printed.splitlines() if "): trained" in line]


def test_stopped_by_a_signal_and_by_its_budget(tmp_path, tiny_model, monkeypatch):
    fewer = {"eval_steps = 2": "eval_steps = 60", "save_steps = 2": "save_steps = 60"}
    file = write_experiment(tmp_path, tiny_model, steps=60, **fewer)
    options = ["--set", "seeds=[1]", "--set", "evaluate.base=false"]
    worker = start_sweep(file, *options, cwd=tmp_path)
    cells = tmp_path / RUNS / "cells"
    wait_until(
        lambda: any(run_steps(cell) for cell in cells.glob("*") if (cell / "run/metrics.jsonl").exists()), worker
    )
    worker.send_signal(signal.SIGINT)
    printed, _ = worker.communicate(timeout=120)
    assert worker.returncode == 130
    assert "Traceback" not in printed
    (cell,) = cells.iterdir()
    steps = run_steps(cell)
    assert 0 < len(steps) < 60
    assert list((cell / "run" / "checkpoints").iterdir())  # saved when it was told to stop
    assert not RunFolder(cell / "run").is_in_use()

    worker = start_sweep(file, *options, "--budget", "9s", cwd=tmp_path)
    printed, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0, printed
    assert "the budget is spent" in printed
    after = run_steps(cell)
    assert after[: len(steps)] == steps
    assert after == list(range(1, len(after) + 1))  # continued from where it was
    _, _, left = state_of(file, tmp_path / RUNS, ["seeds=[1]", "evaluate.base=false"])
    assert left


def test_a_failing_cell_does_not_stop_the_rest(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    text = f'\n[variants.LoRA.training]\nlearning_rate = 1e-2\n[variants.LoRA.data]\npath = "{rows}"\n'
    file = write_experiment(tmp_path, tiny_model, text)
    overrides = ["seeds=[1]", "evaluate.base=false"]
    arguments = ["sweep", str(file), "--set", overrides[0], "--set", overrides[1]]
    assert main(arguments) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert f"failed LoRA: {rows}: no such file" in printed
    assert "To try these again: qdense sweep" in printed
    _, (lora, dense), left = state_of(file, overrides=overrides)
    assert [each.finals[1].state for each in (lora, dense)] == ["failed", "trained"]
    assert left == []
    rows.write_text("".join(json.dumps({"instruction": f"Say {i}.", "output": str(i)}) + "\n" for i in range(400)))
    assert main([*arguments, "--quiet"]) == 0  # other data, and so another cell
    _, stands, left = state_of(file, overrides=overrides)
    assert [each.finals[1].state for each in stands] == ["trained", "trained"]
    assert left == []


def test_failed_cells_are_tried_again_only_when_asked(copied, monkeypatch):
    experiment, (lora, _), _ = state_of(copied)
    folder = SweepFolder(RUNS)
    cell = lora.final(1)
    folder.of(cell).settle("failed", "the cat sat on the keyboard")
    sweep = Sweep(experiment, folder, f"sqlite:///{folder.studies.resolve()}")
    sweep.run()
    assert sweep.problems() == [("LoRA", "the cat sat on the keyboard")]
    sweep = Sweep(experiment, folder, f"sqlite:///{folder.studies.resolve()}", retries=True)
    sweep.run()  # its run is there and finished
    assert sweep.problems() == []
    assert folder.of(cell).outcome().state == "trained"


def test_a_full_disk_stops_the_sweep_and_loses_nothing(copied, capsys, monkeypatch):
    _, (lora, _), _ = state_of(copied)
    cell = SweepFolder(RUNS).of(lora.final(1))
    shutil.rmtree(cell.path)
    full = type("Usage", (), {"free": 2**20})()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: full)
        assert main(["sweep", str(copied), "--quiet"]) == 2
        assert "not enough disk space for the sweep's next run" in capsys.readouterr().err
        assert cell.outcome().state == "missing"
    # It fills up during a run: the run fails, and is not counted as failed.
    experiment = load_experiment(copied)
    sweep = Sweep(experiment, SweepFolder(RUNS), f"sqlite:///{Path(RUNS, 'studies.db').resolve()}")

    def fails(*arguments, **options):
        monkeypatch.setattr("shutil.disk_usage", lambda path: full)
        return 2, "no space left on the disk while writing it"

    with monkeypatch.context() as patched:
        patched.setattr(sweep, "_run", fails)
        with pytest.raises(RunError, match="no space left on the disk"):
            sweep.run()
    monkeypatch.undo()
    os.chdir(copied.parent)
    assert cell.outcome().state in ("missing", "started")


def test_a_database_that_cannot_be_opened_or_written(copied, capsys, tmp_path):
    assert main(["sweep", str(copied), "--storage", "nosuchdb://user:secret@host/x"]) == 2
    error = capsys.readouterr().err
    assert "--storage nosuchdb://***@host/x: cannot be opened" in error
    assert "secret" not in error
    journal = tmp_path / "journal.log"
    assert main(["sweep", str(copied), "--quiet", "--storage", str(journal)]) == 0
    storage = open_storage(str(journal))
    names = [study.study_name for study in storage.get_all_studies()]
    assert len(names) == 1


def test_runs_that_do_worse_are_stopped_by_halving(tmp_path, tiny_model):
    """Optuna's rule on our losses: the second of two runs stops at its first validation if it is behind there."""
    file = write_experiment(tmp_path, tiny_model, **{"seeds = [101]": "seeds = [101]\nhalving = true"})
    experiment = load_experiment(file)
    arm = experiment.arms[0]
    study = ArmStudy(open_storage(f"sqlite:///{tmp_path / 's.db'}"), experiment, arm)
    first = study.start(arm.cell("search", 101, 3e-2))
    first.report(5.0, 1)
    assert not first.should_prune()
    study.end(first, Outcome("trained", loss=4.0))
    second = study.start(arm.cell("search", 101, 1e-1))
    second.report(6.0, 1)
    assert second.should_prune()
    study.end(second, Outcome("stopped"))
    states = [trial.state for trial in trials_named(tmp_path / "s.db")]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED]


def trials_named(database):
    storage = f"sqlite:///{database}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def test_a_sweep_with_halving(tmp_path, tiny_model, monkeypatch):
    """In a real sweep, a run that is stopped is left where it is, and the rate is chosen among the others."""
    monkeypatch.chdir(tmp_path)
    file = write_experiment(tmp_path, tiny_model, steps=30, **{"seeds = [101]": "seeds = [101]\nhalving = true"})
    text = file.read_text()
    start, end = text.index("[variants.DenseLoRA"), text.index("[search]")
    file.write_text(text[:start] + text[end : text.index("[evaluate]")])
    overrides = ["search.learning_rate=[1e-2, 3e-2, 3e-1]", "seeds=[1]"]
    assert main(["sweep", str(file), "--quiet", "--set", overrides[0], "--set", overrides[1]]) == 0
    _, (lora,), left = state_of(file, overrides=overrides)
    assert left == []
    states = {rate: by_seed[101].state for rate, by_seed in lora.search.items()}
    assert states[1e-2] == states[lora.learning_rate] == "trained"
    assert states[3e-1] == "stopped"
    assert lora.search[3e-1][101].loss == math.inf
    cell = SweepFolder(RUNS).of(lora.arm.cell("search", 101, 3e-1))
    assert 0 < len(run_steps(cell.path)) < 30
    # Without halving, the same cell is not settled but goes on.
    _, (lora,), left = state_of(file, overrides=[*overrides, "search.halving=false"])
    assert lora.search[3e-1][101].state == "started"
    assert [job.cell.learning_rate for job in left] == [3e-1]


def test_a_default_that_has_changed_is_reported(copied):
    _, (lora, _), _ = state_of(copied)
    recipe = SweepFolder(RUNS).of(lora.final(1)).recipe
    recipe.write_text(recipe.read_text().replace("max_grad_norm = 1.0", "max_grad_norm = 2.0"))
    with pytest.raises(RunError, match=r"was trained with training\.max_grad_norm = 2\.0, .* now it is 1\.0"):
        state_of(copied)


def test_damaged_records_are_named(copied):
    cell = next(RUNS.glob("cells/*/cell.json"))
    cell.write_text("{")
    with pytest.raises(QDenseError, match=r"cell\.json: damaged"):
        state_of(copied)
