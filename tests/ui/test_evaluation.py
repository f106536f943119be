"""The display of `qdense evaluate`, with an injected console and clock."""

import io

import pytest
from rich.console import Console

from qdense.events import EvaluationDone, EvaluationProgress, EvaluationStarted
from qdense.ui.evaluation import EvaluationDisplay


def drawn(display, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(display.render())
    return console.file.getvalue()


EVALUATION = (
    EvaluationStarted(
        "runs/x", (("base", "llama3-8b (nf4)"), ("decoding", "beam4")), ("gsm8k", "wordproblems"), ("base", "adapter")
    ),
    EvaluationProgress("gsm8k", "base", 1319, 1319, {"paper": 100, "strict": 101}),
    EvaluationProgress("gsm8k", "adapter", 640, 1319, {"paper": 300, "strict": 310}, 250.0),
)


@pytest.mark.parametrize("width", [120, 60])
def test_evaluation_table(width):
    display = EvaluationDisplay(Console(file=io.StringIO(), width=width, force_terminal=True))
    for event in EVALUATION:
        display.update(event)
    text = drawn(display, width)
    assert all(len(line) <= width for line in text.splitlines())
    for part in ("gsm8k", "wordproblems", "640/1319", "46.9", "7.6", "640 of 1319 items"):
        assert part in text, part
    assert ("[43.0, 50.7]" if width == 120 else "[43,51]") in text


def summary(num_correct, num_truncated=23):
    def scored(rule_correct):
        return {"accuracy": rule_correct / 1319, "interval": [0.4, 0.5], "num_without_answer": 17}

    result = {
        "num_scored": 1319,
        "num_samples": 8,
        "num_truncated": num_truncated,
        "paper": scored(num_correct) | {"pass_at": {"1": 0.3, "8": 0.612}},
        "strict": scored(num_correct + 1) | {"pass_at": {"1": 0.3, "8": 0.623}},
        "clean": {"num_items": 1201, "paper": scored(310), "strict": scored(311)},
    }
    return {"folder": "runs/x/eval/abc", "tasks": {"gsm8k": result, "wordproblems": result}}


DONE = EvaluationDone({**summary(300), "base": summary(100, num_truncated=46)})


def test_evaluation_in_a_pipe_ends_with_the_table():
    console = Console(file=io.StringIO(), width=100)
    with EvaluationDisplay(console, clock=lambda: 0.0) as show:
        for event in (*EVALUATION, DONE):
            show(event)
    text = console.file.getvalue()
    assert "gsm8k with base: 1319 of 1319 items" in text
    assert "strict %" in text
    assert text.rstrip().endswith("runs/x/eval/abc")
    for part in (
        "7.6 [40.0, 50.0]",
        "22.7 [",
        "cut off",
        " 23 ",
        "no answer",
        " 17",
        "pass@8",
        "61.2",
        "clean",
        "1,201",
    ):
        assert part in text, part


def test_the_final_table_fits_a_narrow_terminal():
    display = EvaluationDisplay(Console(file=io.StringIO(), width=60, force_terminal=True))
    for event in (*EVALUATION, DONE):
        display.update(event)
    text = drawn(display, 60)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert "22.7 [40,50]" in text
    assert (
        "answers cut off at the token limit: base 92, adapter 46; --max-new-tokens raises it; "
        "items without an answer (strict): base 34, adapter 34." in " ".join(text.split())
    )


def test_one_model_has_one_number_of_cut_completions():
    display = EvaluationDisplay(Console(file=io.StringIO(), width=60, force_terminal=True))
    display.update(EvaluationStarted("runs/x", (), ("gsm8k",), ("adapter",)))
    display.update(EvaluationDone(summary(300)))
    assert "23 answers cut off at the token limit; --max-new-tokens raises it, 17 items without an answer" in " ".join(
        drawn(display, 60).split()
    )
