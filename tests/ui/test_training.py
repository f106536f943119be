"""The display of `qdense train`, with an injected console and clock."""

import io

import pytest
from rich.console import Console

from qdense.events import (
    CheckpointSaved,
    Download,
    Notice,
    Sampled,
    StepDone,
    TrainingDone,
    TrainingStarted,
    Validated,
    ValidationProgress,
)
from qdense.ui.training import TrainingDisplay

STARTED = TrainingStarted(
    title="denselora on llama3-8b",
    facts=(("base", "llama3-8b (nf4, bfloat16) on NVIDIA GeForce RTX 3090"), ("adapter", "denselora r 32, alpha 64")),
    num_steps=100,
    first_step=0,
    memory_total_bytes=24 * 2**30,
    memory_name="GPU",
)


def step(number, loss=0.5):
    return StepDone(
        step=number,
        epoch=number / 50,
        loss=loss,
        learning_rate=3e-4,
        grad_norm=0.25,
        num_tokens=1000,
        tokens_per_second=500.0,
        memory_bytes=7 * 2**30,
        seconds=2.0 * number,
    )


def drawn(display, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(display.render())
    return console.file.getvalue()


def training(width, height=40):
    display = TrainingDisplay(Console(file=io.StringIO(), width=width, height=height, force_terminal=True))
    for event in (
        STARTED,
        step(1, 1.0),
        step(2, 0.8),
        ValidationProgress(1, 2),
        Validated(2, 0.75, True),
        step(3, 0.7),
    ):
        display.update(event)
    return display


@pytest.mark.parametrize("width", [120, 80, 60, 40, 20])
def test_training_display_survives_every_width(width):
    text = drawn(training(width), width)
    assert all(len(line) <= width for line in text.splitlines())
    flat = "".join(text.split())
    for part in ("3/100", "0.7000", "0.7500", "3.00e-04", "0.25", "500"):
        assert part in flat, part


def test_the_losses_are_a_chart_where_there_is_room_and_else_one_line():
    text = drawn(training(120), 120)
    assert text.count("●") == 1  # the validation
    assert "step 100" in text
    low = drawn(training(120, height=12), 120)
    assert "loss 0.7000 █▃▁" in low
    assert "●" not in low


def test_samples_are_one_line_each_and_cannot_control_the_terminal():
    display = training(60)
    for number in (2, 4):
        display.update(Sampled(number, "Say\nhi", f"hi \x1b[2J {number} " + "x" * 100))
    text = drawn(display, 60)
    assert text.count("Say hi → hi \\x1b[2J 4 ") == 1
    assert all(len(line) <= 60 for line in text.splitlines())


def test_training_display_says_all_that_matters():
    text = drawn(training(120), 120)
    for part in (
        "denselora on llama3-8b",
        "NVIDIA GeForce RTX 3090",
        "step 3/100, epoch 0.06",
        "loss 0.7000",
        "validation 0.7500 at step 2, best 0.7500 at step 2",
        "learning rate 3.00e-04",
        "gradient norm 0.25",
        "tokens/s 500",
        "memory GPU 7.0 GiB of 24.0 GiB",
        "0:06, 3:14 left",
    ):
        assert part in text, part


def test_pipe_gets_plain_lines_some_seconds_apart():
    now = [0.0]
    console = Console(file=io.StringIO(), width=80)
    with TrainingDisplay(console, clock=lambda: now[0]) as show:
        show(Notice("loading"))
        show(STARTED)
        for number in range(1, 101):
            now[0] += 2.0
            show(step(number))
        show(Validated(100, 0.4, True))
        show(CheckpointSaved(100, "runs/x/checkpoints/checkpoint-100"))
        show(TrainingDone("runs/x/adapter", 100, 100, 200.0, 2**30, 2**30))
    lines = console.file.getvalue().splitlines()
    assert "\x1b" not in console.file.getvalue()
    assert lines[0] == "loading"
    assert lines[2].startswith(
        "step 1/100 epoch 0.02 loss 0.5000 lr 3.00e-04 grad 0.25 500 tokens/s GPU 7.0 GiB of 24.0 GiB"
    )
    assert 20 <= sum(line.startswith("step ") for line in lines) <= 26
    assert "step 100 validation loss 0.4000 (best)" in lines
    assert lines[-1] == "100 steps in 3:20, peak memory 1.0 GiB (1.0 GiB predicted); adapter in runs/x/adapter"


def test_quiet_says_warnings_only():
    console = Console(file=io.StringIO(), width=80)
    with TrainingDisplay(console, quiet=True) as show:
        for event in (
            Notice("loading"),
            STARTED,
            step(1),
            Notice("beware", "warning"),
            TrainingDone("a", 1, 1, 1.0, 1, 1),
        ):
            show(event)
    assert console.file.getvalue() == "warning: beware\n"


def test_live_display_on_a_terminal_leaves_a_final_picture():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with TrainingDisplay(console) as show:
        for event in (
            Notice("loading"),
            STARTED,
            Download("math_10k.json", 2**20, 2**22),
            step(1),
            step(2),
            TrainingDone("runs/x/adapter", 2, 1, 4.0, 2**30, 2**30),
        ):
            show(event)
    text = console.file.getvalue()
    assert "adapter in runs/x/adapter (weights of step 1)" in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_control_characters_in_names_do_not_steer_the_terminal():
    display = TrainingDisplay(Console(file=io.StringIO(), width=80, force_terminal=True))
    display.update(TrainingStarted("x\x1b[2J", (("a", "\x1b]0;title\x07"),), 1, 0, 1, "GPU"))
    text = drawn(display, 80)
    assert "x\\x1b[2J" in text
    assert "\x1b[2J" not in text
    assert "\x1b]0" not in text
