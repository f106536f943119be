"""What a process decides from the files in a run's folder, without a model."""

import json

import pytest
import tomli_w
import torch

from qdense.errors import RunError
from qdense.events import Notice
from qdense.planning.memory import StepLayout
from qdense.provenance import package_versions
from qdense.runs import RunFolder
from qdense.training.checkpoint import Checkpoint
from qdense.training.resume import Resumed, checkpoint_to_resume, refuse_other_inputs
from tests.helpers.recipes import recipe_of

LAYOUT = {"micro_batch_size": 4, "recompute_layers": 2, "offload": True}
FINGERPRINT = {"weights": "e" * 64}


class Begun:
    """A run that was begun, and left a checkpoint of step 4."""

    def __init__(self, folder, **provenance):
        self.run = RunFolder(folder)
        self.notices = []
        self.run.path.mkdir()
        known = {"versions": package_versions(), "plan": {"layout": LAYOUT}} | {
            "data": {"sha256": "a" * 64}, "base_fingerprint": FINGERPRINT,
        }  # fmt: skip
        self.run.recipe.write_text(tomli_w.dumps(self.recipe().resolved() | {"provenance": known | provenance}))
        self.checkpoint = Checkpoint(4, {"m": torch.ones(2)}).save(self.run.checkpoints)

    def recipe(self, **changes):
        return recipe_of(**{"output__dir": str(self.run.path)} | changes)

    def emit(self, event):
        assert isinstance(event, Notice)
        self.notices.append((event.level, event.text))

    def resume(self, *, resume=True, accept_changes=False, **changes):
        return checkpoint_to_resume(
            self.recipe(**changes), self.run, self.emit, resume=resume, accept_changes=accept_changes
        )


@pytest.fixture
def begun(tmp_path):
    return Begun(tmp_path / "run")


def test_a_run_is_resumed_from_its_checkpoint_and_divided_as_it_was(begun):
    assert begun.resume() == Resumed(begun.checkpoint, StepLayout(4, 2, offload=True), begun.recipe())
    assert begun.notices == [("info", f"resuming from {begun.checkpoint}")]


def test_what_the_recipe_leaves_open_is_taken_from_the_run(tmp_path):
    """The numbers that "auto" meant when the run began, and the columns that were recognised; another rate is a change."""
    begun = Begun(tmp_path / "run")
    settled = begun.recipe(training__learning_rate=0.004, training__warmup_steps=7, data__columns={"output": "reply"})
    begun.run.recipe.write_text(tomli_w.dumps(settled.resolved() | {"provenance": begun.run.provenance()}))
    assert begun.resume().recipe == settled
    with pytest.raises(RunError, match=r"training\.learning_rate: was 0\.004, now 0\.001"):
        begun.resume(training__learning_rate=0.001)


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    notices = []
    for resume in (False, True):
        found = checkpoint_to_resume(
            recipe_of(), RunFolder(tmp_path), notices.append, resume=resume, accept_changes=False
        )
        assert found is None
        assert len(notices) == resume
    assert "nothing to resume, starting afresh" in notices[0].text


def test_a_folder_in_use_needs_resume_and_a_foreign_one_is_refused(begun):
    with pytest.raises(RunError, match=r"is not empty\. Resume it with --resume"):
        begun.resume(resume=False)
    begun.run.recipe.unlink()
    with pytest.raises(RunError, match=r"holds files but no recipe\.toml"):
        begun.resume()


def test_a_finished_run_is_not_resumed(begun):
    begun.run.card.parent.mkdir()
    begun.run.card.touch()
    with pytest.raises(RunError, match=r"this run is finished .*another --output\.$"):
        begun.resume()
    with pytest.raises(RunError, match=r"differ from the run's: training.learning_rate, training.seed\.$"):
        begun.resume(training__learning_rate=0.5, training__seed=7)


@pytest.mark.parametrize(
    ("changes", "keeps_layout"),
    [
        ({"training__learning_rate": 0.5}, True),
        ({"training__micro_batch_size": 2}, False),
        ({"training__recompute": "all"}, False),
        ({"training__packing": False}, False),
        ({"data__max_length": 100}, False),
    ],
)
def test_changes_are_refused_with_old_and_new_or_accepted_and_reported(begun, changes, keeps_layout):
    (name, value), key = next(iter(changes.items())), next(iter(changes)).replace("__", ".")
    old = begun.recipe().flattened()[key]
    told = rf"with the same recipe; changed since the run began:\n  {key}: was {old!r}, now {value!r}\nRestore"
    with pytest.raises(RunError, match=told):
        begun.resume(**{name: value})
    assert begun.notices == []
    found = begun.resume(accept_changes=True, **changes)
    assert found == Resumed(begun.checkpoint, StepLayout(**LAYOUT) if keeps_layout else None, begun.recipe(**changes))
    (level, notice), _ = begun.notices
    assert (level, notice) == (
        "warning",
        f"{begun.run.path}: continuing although the recipe changed since the run began: {key}: was {old!r}, now {value!r}",
    )


def test_a_key_that_only_one_of_the_recipes_has_is_a_change(begun):
    for changes in ({"training__max_steps": 5}, {"data__path": "rows.json"}):
        with pytest.raises(RunError, match="was None, now"):
            begun.resume(**changes)
    begun.run.recipe.write_text(
        tomli_w.dumps(begun.recipe(training__max_steps=5).resolved() | {"provenance": begun.run.provenance()})
    )
    with pytest.raises(RunError, match=r"training.max_steps: was 5, now None"):
        begun.resume()


def test_where_results_go_and_who_draws_them_is_no_change(begun, tmp_path):
    assert begun.resume(training__trackers=["tensorboard"], output__dir=str(tmp_path / "moved"))


def test_other_versions_are_refused_or_reported(tmp_path):
    begun = Begun(tmp_path / "run", versions=package_versions() | {"torch": "1.0", "gone": "2"})
    with pytest.raises(
        RunError, match=r"with the same versions; .*\n  gone: was '2', now None\n  torch: was '1\.0', now"
    ):
        begun.resume()
    assert begun.resume(accept_changes=True)
    assert "continuing although the versions changed" in begun.notices[0][1]


def test_damaged_checkpoints_are_put_aside_until_a_whole_one_is_found(begun):
    for step in (10, 11):
        Checkpoint(step, {}).save(begun.run.checkpoints)
        (begun.run.checkpoints / f"checkpoint-{step}" / "state.json").unlink()
    (begun.run.checkpoints / "damaged-checkpoint-11").mkdir()  # from before
    (begun.run.checkpoints / ".unfinished").mkdir()
    assert begun.resume().checkpoint == begun.checkpoint
    assert sorted(path.name for path in begun.run.checkpoints.iterdir()) == [
        "checkpoint-4", "damaged-checkpoint-10", "damaged-checkpoint-11",
    ]  # fmt: skip
    told = [text for level, text in begun.notices if level == "warning"]
    assert [f"checkpoint-{step}: state.json is missing. It is skipped" in text for step, text in zip(
        (11, 10), told, strict=True)] == [True, True]  # fmt: skip


def test_without_a_whole_checkpoint_it_starts_afresh_if_nothing_has_changed(begun):
    (begun.checkpoint / "manifest.json").unlink()
    with pytest.raises(RunError, match="with the same recipe"):
        begun.resume(training__seed=7)
    assert begun.resume() is None
    assert begun.notices[-1] == ("warning", f"{begun.run.path}: has no checkpoint yet, starting afresh")
    assert begun.resume(training__seed=7, accept_changes=True) is None


def test_a_run_of_another_version_has_no_layout(tmp_path):
    for number, plan in enumerate(({}, {"layout": {"micro_batch_size": 4}}, {"layout": {**LAYOUT, "tiles": 3}})):
        begun = Begun(tmp_path / str(number), plan=plan)
        with pytest.raises(RunError, match=r"has no \[provenance.plan.layout\]: another version of qdense wrote it"):
            begun.resume()


KILLED = {"planned_bytes": 3 * 2**29, "memory_total_bytes": 17 * 2**29, "micro_batch_size": 3, "recompute_layers": 5}


def leave(begun, facts, steps=(1, 2)):
    (begun.run.path / ".running").write_text(json.dumps(facts))
    lines = [{"event": "step", "step": step, "memory_bytes": step * 5 * 2**28} for step in steps]
    lines.append({"event": "validation", "step": 9})
    begun.run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_killed_process_is_reported_with_what_it_planned_and_used(begun):
    leave(begun, KILLED)
    begun.resume(data__max_length=300, accept_changes=True)
    (told,) = [text for _, text in begun.notices if "was killed" in text]
    assert "Planned: 1.5 GiB; used after step 2: 2.5 GiB, of 8.5 GiB." in told
    assert 'micro_batch_size (3) or data.max_length (300), or set training.recompute = "all" (5 layers)' in told
    begun.notices.clear()
    leave(begun, KILLED, steps=())
    begun.resume()
    assert "Planned: 1.5 GiB, of 8.5 GiB." in begun.notices[0][1]


@pytest.mark.parametrize(
    "facts", [{}, [], 3, *({**KILLED, key: None} for key in KILLED), {**KILLED, "micro_batch_size": "many"}]
)
def test_a_killed_process_that_left_nonsense_is_not_reported(begun, facts):
    leave(begun, facts)
    begun.resume()
    assert not any("was killed" in text for _, text in begun.notices)
    leave(begun, KILLED)
    begun.run.metrics.unlink()
    begun.resume()
    assert not any("was killed" in text for _, text in begun.notices)


def test_other_rows_or_another_base_are_refused_or_reported(begun):
    same = {"data_checksum": "a" * 64, "data": "rows.json", "fingerprint": FINGERPRINT, "base": "tiny"}
    rest = {"accept_changes": False, "emit": begun.emit}
    refuse_other_inputs(begun.run, **same, **rest)
    other = {"data_checksum": "b" * 64, "fingerprint": {"weights": "f" * 64}}
    told = r"the same data and base; .*:\n  the rows of rows.json\nRestore"
    for checksum in (other["data_checksum"], "0" * 64):
        with pytest.raises(RunError, match=told):
            refuse_other_inputs(begun.run, **same | {"data_checksum": checksum}, **rest)
    told = r"the same data and base; .*:\n  the base tiny\nRestore"
    with pytest.raises(RunError, match=told):
        refuse_other_inputs(begun.run, **same | {"fingerprint": other["fingerprint"]}, **rest)
    refuse_other_inputs(begun.run, **same | other, accept_changes=True, emit=begun.emit)
    ((level, text),) = begun.notices
    assert level == "warning"
    assert text.endswith("although the data and base changed since the run began: the rows of rows.json; the base tiny")


@pytest.mark.parametrize(
    "provenance", [3, "x", [1], {"versions": 3}, {"data": "x"}, {"plan": [1]}, {"plan": {"layout": 3}}]
)
def test_a_recipe_that_someone_edited_is_refused_without_a_traceback(begun, provenance):
    begun.run.recipe.write_text(tomli_w.dumps(begun.recipe().resolved() | {"provenance": provenance}))
    with pytest.raises(RunError):
        begun.resume()
    with pytest.raises(RunError):
        refuse_other_inputs(
            begun.run,
            data_checksum="b",
            data="d",
            fingerprint=FINGERPRINT,
            base="tiny",
            accept_changes=False,
            emit=begun.emit,
        )
