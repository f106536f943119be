"""Checkpoints on disk: whole or not there, checked before they are trusted, the newest few kept."""

import json
import os

import pytest
import torch

from qdense.errors import RunError
from qdense.training.checkpoint import (
    Checkpoint,
    checkpoint_step,
    checkpoints,
    fault_of,
    last_good_checkpoint,
    remove_unfinished,
)


def checkpoint(step=4, **values):
    return Checkpoint(
        step,
        weights={"m": torch.arange(6.0).reshape(2, 3).T},  # not contiguous
        best={"m": torch.ones(2, dtype=torch.bfloat16)},
        optimizer={"0.exp_avg": torch.zeros(3)},
        schedule={"average": torch.full((1,), 2.0)},
        values={"best_step": 2, **values},
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = checkpoint(best_loss=None).save(tmp_path)
    assert path == tmp_path / "checkpoint-4"
    assert fault_of(path) is None
    found = Checkpoint.load(path)
    assert (found.step, found.values) == (4, {"best_step": 2, "best_loss": None})
    for name in ("weights", "best", "optimizer", "schedule"):
        tensors, saved = getattr(found, name), getattr(checkpoint(), name)
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensors[key], saved[key]) for key in saved)
    assert found.best["m"].dtype == torch.bfloat16
    assert names(path) == [
        "best.safetensors", "manifest.json", "optimizer.safetensors", "schedule.safetensors", "state.json",
        "weights.safetensors",
    ]  # fmt: skip


def test_tensors_in_one_memory_are_saved_as_their_own(tmp_path):
    shared = torch.arange(4.0)
    saved = Checkpoint(1, weights={"a": shared, "b": shared, "c": shared.detach()}).save(tmp_path)
    assert all(torch.equal(tensor, shared) for tensor in Checkpoint.load(saved).weights.values())


def test_the_three_newest_are_kept_in_the_order_of_their_numbers(tmp_path):
    for step in (8, 9, 10, 100):
        checkpoint(step).save(tmp_path)
    (tmp_path / "checkpoint-last").mkdir()  # not ours
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert checkpoint_step(tmp_path / "checkpoint-100") == 100
    assert f"{tmp_path / 'checkpoint-100'}; continue" in last_good_checkpoint(tmp_path)
    assert "must start over" in last_good_checkpoint(tmp_path / "none")


def test_a_step_that_is_saved_again_replaces_the_one_before(tmp_path):
    checkpoint(best_step=1).save(tmp_path)
    (tmp_path / "checkpoint-4" / "left").touch()
    path = checkpoint(best_step=3).save(tmp_path)
    assert Checkpoint.load(path).values["best_step"] == 3
    assert not (path / "left").exists()


def test_what_a_killed_run_left_is_removed(tmp_path):
    left = tmp_path / ".unfinished" / "weights.safetensors"
    left.parent.mkdir()
    left.touch()
    assert checkpoints(tmp_path) == []
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path)  # nothing there is no error
    assert names(tmp_path) == []
    left.parent.mkdir()
    left.touch()
    assert names(checkpoint().save(tmp_path).parent) == ["checkpoint-4"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(tmp_path):
    checkpoint(2).save(tmp_path)
    with pytest.raises(TypeError):
        checkpoint(3, best_loss=object()).save(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]


def test_every_file_and_folder_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaced(source, target):
        done.append(f"-> {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    path = checkpoint().save(tmp_path)
    renamed = done.index("-> checkpoint-4")
    assert {*names(path), ".unfinished"} - {"manifest.json"} <= set(done[:renamed])
    assert done[:renamed].index("-> manifest.json") < done[:renamed].index(".unfinished")
    assert done[renamed + 1 :] == [tmp_path.name]
    fault_of(path)
    assert len(done) == renamed + 2  # reading writes nothing


def test_the_manifest_has_size_and_checksum_of_every_other_file(tmp_path):
    import hashlib

    path = checkpoint(note="x" * (3 << 20)).save(tmp_path)  # longer than one read
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert sorted([*manifest["files"], "manifest.json"]) == names(path)
    for name, facts in manifest["files"].items():
        content = (path / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def change_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda manifest: manifest.pop("files"), r"cannot be read: KeyError"),
        (lambda manifest: manifest.pop("format"), r"does not say its format"),
        (lambda manifest: manifest.update(format="2"), r"does not say its format"),
        (lambda manifest: manifest.update(files=[]), r"cannot be read: (Attribute|Type)Error"),
        (lambda manifest: manifest["files"].update({"state.json": None}), r"cannot be read: TypeError"),
        (lambda manifest: manifest["files"]["state.json"].pop("sha256"), r"cannot be read: KeyError"),
        (lambda manifest: manifest["files"].pop("best.safetensors"), r"does not list best\.safetensors"),
        (lambda manifest: manifest["files"].clear(), r"does not list best\.safetensors"),  # the first of all
    ],
)
def test_a_manifest_that_no_run_wrote_is_a_fault(tmp_path, change, told):
    import re

    path = checkpoint().save(tmp_path)
    change_manifest(path, change)
    assert re.search(told, fault_of(path))


@pytest.mark.parametrize("text", ["[]", "1", "{", ""])
def test_a_manifest_that_is_no_table_is_a_fault(tmp_path, text):
    path = checkpoint().save(tmp_path)
    (path / "manifest.json").write_text(text)
    assert "manifest.json cannot be read" in fault_of(path)


@pytest.mark.parametrize(
    ("changes", "found"), [({"files": {"qdense.json": {}}}, 1), ({"format": 1}, 1), ({"format": 3}, 3)]
)
def test_another_format_is_another_version_s(tmp_path, changes, found):
    path = checkpoint().save(tmp_path)
    change_manifest(path, lambda manifest: (manifest.pop("format"), manifest.update(changes)))  # the first had none
    with pytest.raises(RunError, match=rf"another version of qdense wrote it \(format {found}, not 2\)"):
        fault_of(path)


def test_a_file_of_another_size_or_content_is_named_with_both(tmp_path):
    path = checkpoint().save(tmp_path)
    content = (path / "state.json").read_bytes()
    for other in (content + b" ", content[:-1]):
        (path / "state.json").write_bytes(other)
        assert fault_of(path) == f"state.json has {len(other)} bytes, not {len(content)}"
    for first in b" abcdefgh":  # some have a lower checksum, some a higher one
        (path / "state.json").write_bytes(bytes([first]) + content[1:])
        assert "state.json is not the file that was written (SHA-256 " in fault_of(path)
    (path / "state.json").unlink()
    assert fault_of(path) == "state.json is missing"
