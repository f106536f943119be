"""metrics.jsonl, line by line."""

import json
import math
import os

from qdense.events import Notice, StepDone, Validated
from qdense.training.metrics import MetricsFile, read_metrics


def step(number, seconds=1.0, loss=0.5, **changes):
    return StepDone(number, number / 4, loss, 1e-3, 1.0, 10, 5.0, 100, seconds, **changes)


def test_steps_and_validations_are_on_file_as_soon_as_they_are_reported(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.seconds == 0
    for event in (step(1), Notice("no metric"), Validated(1, 0.25, True), step(2, loss=math.nan)):
        metrics(event)
    lines = read_metrics(tmp_path / "metrics.jsonl")  # while it is open
    assert [(line["event"], line["step"], line["loss"]) for line in lines] == [
        ("step", 1, 0.5), ("validation", 1, 0.25), ("step", 2, None),
    ]  # fmt: skip
    assert lines[1] == {"event": "validation", "step": 1, "loss": 0.25, "is_best": True}
    assert (lines[0]["learning_rate"], lines[0]["seconds"], lines[0]["num_tokens"]) == (1e-3, 1.0, 10)
    metrics.close()


def test_a_resumed_run_drops_what_is_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = MetricsFile(path)
    for event in (step(1, 1.5), step(2, 3.25), Validated(2, 0.25, True), step(3, 5.0), Validated(3, 0.2, True)):
        before(event)
    before.close()
    resumed = MetricsFile(path, resume_step=2)
    assert resumed.seconds == 3.25
    assert [(line["event"], line["step"]) for line in read_metrics(path)] == [
        ("step", 1), ("step", 2), ("validation", 2),
    ]  # fmt: skip
    resumed(step(3, 4.0))
    resumed.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 2, 3]
    assert MetricsFile(path).seconds == 0  # a fresh start keeps nothing
    assert read_metrics(path) == []


def test_lines_that_are_no_events_are_skipped_and_lose_none_after_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"event": "step", "step": number, "seconds": 1.0}) for number in (1, 2)]
    path.write_text("\n".join([lines[0], lines[1][:-5]]))
    assert [line["step"] for line in read_metrics(path)] == [1]
    odd = [
        lines[1][:-5],
        "[1]",
        "3",
        '{"event": "step", "step": "x", "seconds": 1}',
        '{"event": "x", "step": 9}',
        "[" * 9999,
    ]
    path.write_text("\n".join([lines[0], *odd, lines[1]]))
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert MetricsFile(path, resume_step=2).seconds == 1.0


def test_all_lines_reach_the_disk_before_a_checkpoint(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    synced.clear()
    metrics(step(1))
    metrics.sync()
    assert synced == [str(tmp_path / "metrics.jsonl")]
    metrics.close()
