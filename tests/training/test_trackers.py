"""Experiment trackers: TensorBoard and trackio for real, the others by accelerate's contract; missing packages; failures."""

import json
import math
import subprocess
import sys
from typing import get_args

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker, TrackioTracker

from qdense.errors import RecipeError, RunError
from qdense.events import Notice, StepDone, Validated
from qdense.recipe import Tracker
from qdense.runs import RunFolder
from qdense.training import trackers as trackers_module
from qdense.training.metrics import read_metrics
from tests.helpers.recipes import recipe_of
from tests.helpers.runs import adapter_bytes, killed_run, recipe_for, run


def of_run(events):
    """(step, loss) of training and validation, as a run reported them."""
    return [[(e.step, pytest.approx(e.loss)) for e in events if isinstance(e, kind)] for kind in (StepDone, Validated)]


def test_tensorboard_has_the_recipe_and_every_metric(tiny_model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_for(tiny_model, tmp_path / "run", training__trackers=["tensorboard"], training__max_steps=4)
    steps, validations = of_run(run(recipe))
    found = EventAccumulator(str(tmp_path / "run" / "logs" / "qdense")).Reload()
    assert {f"train/{key}" for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second")} <= set(
        found.Tags()["scalars"]
    )
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == steps
    assert [(event.step, event.value) for event in found.Scalars("validation/loss")] == validations
    (settings,) = (tmp_path / "run" / "logs" / "qdense").glob("*/hparams.yml")
    text = settings.read_text()
    for line in ("adapter.r: 8", "training.learning_rate: 0.01", "data.name: wordproblems", "training.packing: true"):
        assert line in text


def test_trackio_has_the_recipe_and_every_metric(tiny_model, tmp_path, monkeypatch):
    """In separate processes: trackio reads its folder's name when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def printed(*command):
        outcome = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout

    script = (
        "import sys\nfrom tests.helpers.runs import recipe_for, run\n"
        "run(recipe_for(sys.argv[1], sys.argv[2], training__trackers=['trackio'], training__max_steps=3))\n"
        "import json, trackio\n(found,) = trackio.Api().runs('qdense')\nprint(json.dumps(found.config))"
    )
    lines = printed("-c", script, str(tiny_model), str(tmp_path / "my-run")).splitlines()
    (config,) = (json.loads(line) for line in lines if line.startswith("{"))  # trackio prints more
    assert (config["adapter.r"], config["training.learning_rate"], config["data.name"]) == (8, 0.01, "wordproblems")
    kept = [(line["event"], line["step"], line["loss"]) for line in read_metrics(tmp_path / "my-run" / "metrics.jsonl")]
    for metric, event in (("train/loss", "step"), ("validation/loss", "validation")):
        query = ["get", "metric", "--project", "qdense", "--run", "my-run", "--metric", metric, "--json"]
        logged = json.loads(printed("-m", "trackio.cli", *query))["values"]
        assert [(event, value["step"], value["value"]) for value in logged] == [k for k in kept if k[0] == event]


@pytest.mark.parametrize("name", get_args(Tracker))
def test_accelerate_drives_every_tracker_that_a_recipe_may_name(name):
    tracker = LOGGER_TYPE_TO_CLASS[name]
    assert issubclass(tracker, GeneralTracker)
    for method in ("start", "store_init_configuration", "log", "finish"):
        assert callable(getattr(tracker, method))


def test_accelerate_has_no_tracker_that_a_recipe_may_not_name():
    assert set(get_args(Tracker)) == set(LOGGER_TYPE_TO_CLASS)


def test_a_missing_package_is_named_before_anything_is_done(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers_module, "get_available_trackers", lambda: [])
    with pytest.raises(RunError, match=r'training.trackers: "wandb" needs a package .*pip install wandb'):
        run(recipe_for(tiny_model, tmp_path / "run", training__trackers=["wandb"], data__path="none.json"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match=r"training.trackers .* a list of experiment trackers: aim, .*tensorboard"):
        recipe_for(tiny_model, tmp_path / "run", training__trackers=["tensorbord"])


def test_a_tracker_that_fails_ends_no_run_and_is_reported_once(tiny_model, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(TensorBoardTracker, "log", fails)
    events = run(recipe_for(tiny_model, tmp_path / "run", training__trackers=["tensorboard"]))
    told = [event.text for event in events if isinstance(event, Notice) and "no route to host" in event.text]
    assert len(told) == 1
    run(recipe_for(tiny_model, tmp_path / "plain"))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "plain")


def test_a_tracker_that_fails_takes_no_other_with_it(tiny_model, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def fails(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(TrackioTracker, "start", lambda self: None)
    monkeypatch.setattr(TrackioTracker, "store_init_configuration", lambda self, values: None)
    monkeypatch.setattr(TrackioTracker, "log", fails)
    events = run(recipe_for(tiny_model, tmp_path / "run", training__trackers=["trackio", "tensorboard"]))
    assert [event.text for event in events if isinstance(event, Notice) and "no route to host" in event.text] == [
        "training.trackers: trackio: no route to host; the run continues without it"
    ]
    found = EventAccumulator(str(tmp_path / "run" / "logs" / "qdense")).Reload()
    assert len(found.Scalars("train/loss")) == 6


def test_a_tracker_that_cannot_start_stops_the_run_and_says_so(tiny_model, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("not logged in")

    monkeypatch.setattr(TensorBoardTracker, "start", fails)
    with pytest.raises(RunError, match=r"training.trackers = \['tensorboard'\]: cannot be started: not logged in"):
        run(recipe_for(tiny_model, tmp_path / "run", training__trackers=["tensorboard"]))


def test_trackers_may_change_at_a_resume(tiny_model, tmp_path):
    killed_run(recipe_for(tiny_model, tmp_path / "run"), step=3)
    run(recipe_for(tiny_model, tmp_path / "run", training__trackers=["tensorboard"]), resume=True)
    assert (tmp_path / "run" / "logs").is_dir()


# --- what accelerate is asked for, without a run ------------------------------------------------------------------------


class Asked:
    """Stands in for the Accelerator and its one tracker: writes down what it is asked for, and fails at the calls given."""

    name = "one"

    def __init__(self, fails=()):
        self.calls, self.fails, self.trackers = [], fails, [self]

    def _note(self, name, *what):
        if name in self.fails:
            raise OSError(f"{name} is down")
        self.calls.append((name, *what))

    def init_trackers(self, project, config, options):
        self._note("init", project, config, options)

    def log(self, values, step):
        self._note("log", values, step)

    def finish(self):
        self._note("end")


STEP = StepDone(3, 0.5, 0.25, 1e-3, math.inf, 10, 5.0, 100, 2.0)
EVENTS = [STEP, Notice("hello"), Validated(3, math.nan, True)]


def trackers_of(tmp_path, names, accelerator, notices=None):
    recipe = recipe_of(training__trackers=names, training__learning_rate=0.5, adapter__target_modules=["q_proj"])
    emit = (lambda event: None) if notices is None else notices.append
    return trackers_module.Trackers(accelerator, recipe, RunFolder(tmp_path / "my-run"), emit)


def test_without_trackers_nothing_is_asked_for(tmp_path):
    accelerator = Asked()
    trackers = trackers_of(tmp_path, [], accelerator)
    for event in EVENTS:
        trackers(event)
    trackers.close()
    assert accelerator.calls == []


def test_steps_and_validations_are_passed_on_without_what_is_not_finite(tmp_path):
    accelerator = Asked()
    trackers = trackers_of(tmp_path, ["wandb", "mlflow", "tensorboard"], accelerator)
    for event in EVENTS:
        trackers(event)
    trackers.close()
    (_, project, config, options), *logged, end = accelerator.calls
    assert (project, end) == ("qdense", ("end",))
    assert options == {"wandb": {"name": "my-run"}, "mlflow": {"run_name": "my-run"}}
    plain = (config["training.learning_rate"], config["training.packing"], config["adapter.target_modules"])
    assert plain == (0.5, True, "['q_proj']")
    kept = {"epoch": 0.5, "loss": 0.25, "learning_rate": 1e-3, "num_tokens": 10, "tokens_per_second": 5.0}
    kept |= {"memory_bytes": 100, "seconds": 2.0}
    assert logged == [
        ("log", {f"train/{key}": value for key, value in kept.items()}, 3),
        ("log", {"validation/is_best": True}, 3),
    ]


def test_a_tracker_that_fails_is_reported_once_and_not_used_again(tmp_path):
    accelerator, notices = Asked(fails=("log", "end")), []
    trackers = trackers_of(tmp_path, ["wandb"], accelerator, notices)
    for event in EVENTS:
        trackers(event)
    trackers.close()
    assert [name for name, *_ in accelerator.calls] == ["init"]
    (notice,) = notices
    assert notice.level == "warning"
    assert "log is down" in notice.text
    ending = trackers_of(tmp_path, ["wandb"], Asked(fails=("end",)), notices)
    ending.close()
    assert "end is down" in notices[1].text
