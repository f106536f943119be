"""Answers read from real completions, wrong ones included; published figures; Wilson intervals."""

import json
import math

import pytest

from qdense.benchmarks.evaluate import score_task
from qdense.benchmarks.scoring import LETTERS, NUMBER
from qdense.benchmarks.statistics import wilson_interval
from qdense.benchmarks.tasks import TASKS, tasks_named
from qdense.errors import EvaluationError


@pytest.mark.parametrize(
    ("completion", "paper", "strict"),
    [
        ("The answer is 576.", 576, 576),
        ("She has 1,234.5 left.", 1234.5, 1234.5),
        ("10-3=7", 7, 7),
        ("7=10-3", -3, 3),  # the authors take the minus for a sign
        ("so 3/4 of it", 4, 0.75),
        ("3/4 = 0.75", 0.75, 0.75),
        ("about .5 litres", 5, 0.5),
        ("1e-3", -3, 0.001),
        ("2.5e3 metres", 3, 2500),
        ("it fell by -7 degrees", -7, -7),
        ("The answer is -$110.", 110, -110),
        ("$ 5.00", 5, 5),
        ("5 apples, 6 pears, 7 plums", 7, 7),
        ("no number at all", None, None),
        ("", None, None),
        ("9/0", 0, None),
        ("The answer is 12.\n\n### Response:\n13", 12, 12),  # ran on into the next response
        ("The answer is 12.\n\n### Instruction:\nAdd 7.", 7, 12),  # the authors split at "### Response:" only
        ("Therefore, Martha ends up with 79 cards.", 79, 79),
    ],
)
def test_numbers(completion, paper, strict):
    scores = NUMBER.score(completion, "576.0")
    assert scores["paper"]["answer"] == paper
    assert scores["strict"]["answer"] == (None if strict is None else pytest.approx(strict))


@pytest.mark.parametrize(
    ("completion", "paper", "strict"),
    [
        ("The answer is (B).", "B", "B"),
        ("Assume x = 4. The answer is (B).", "A", "B"),
        ("Therefore, the answer is option E) 8800.", "E", "E"),
        ("B", "B", "B"),
        ("A", "A", "A"),
        ("A train leaves.", "A", None),
        ("Choices: A) 1 B) 2. The correct option is C", "C", "C"),
        ("The answer is a bit unclear", None, None),
        ("Cost is 5, so D.", "C", "D"),
        ("so the answer is A) 367 and not B", "A", "A"),
        ("The answer in arabic numerals is 770. Distance", "D", None),
        ("nothing here", None, None),
    ],
)
def test_letters(completion, paper, strict):
    scores = LETTERS.score(completion, "B")
    assert (scores["paper"]["answer"], scores["strict"]["answer"]) == (paper, strict)
    assert scores["paper"]["is_correct"] == (paper == "B")


@pytest.mark.parametrize(
    ("label", "answer", "right"),
    [("8.0", "8", True), ("8.0", "8.001", True), ("8.0", "8.0011", False), ("1.8333333333333335", "1.833", True)],
)
def test_tolerance_is_the_authors(label, answer, right):
    assert NUMBER.score(answer, label)["paper"]["is_correct"] is right


@pytest.mark.parametrize(
    ("folder", "task", "paper", "strict"),
    # The `output` column of the test files: completions of an old model, scored by the authors' rule and by ours.
    [
        ("gsm8k", "gsm8k", 771, 771),
        ("AddSub", "addsub", 370, 370),
        ("SVAMP", "svamp", 803, 803),
        ("AQuA", "aqua", 109, 123),
    ],
)
def test_stored_completions_of_the_real_files(shared_data, folder, task, paper, strict):
    rows = json.loads((shared_data / "dataset" / folder / "test.json").read_text())
    result = score_task(TASKS[task], [row["answer"] for row in rows], {i: row["output"] for i, row in enumerate(rows)})
    assert (result["paper"]["num_correct"], result["strict"]["num_correct"]) == (paper, strict)
    assert result["num_items"] == result["num_scored"] == len(rows)
    assert result["paper"]["accuracy"] == paper / len(rows)


def test_constant_a_beats_the_papers_aqua(shared_data):
    rows = json.loads((shared_data / "dataset" / "AQuA" / "test.json").read_text())
    result = score_task(TASKS["aqua"], [row["answer"] for row in rows], dict.fromkeys(range(len(rows)), "A"))
    assert round(100 * result["paper"]["accuracy"], 1) == 24.8


def test_tasks_by_name_group_and_case():
    assert [task.name for task in tasks_named("math")] == ["gsm8k", "aqua", "addsub", "svamp"]
    assert [task.name for task in tasks_named("SVAMP, math")] == ["svamp", "gsm8k", "aqua", "addsub"]
    with pytest.raises(EvaluationError) as caught:
        tasks_named("gsmk,addsub,x")
    assert 'did you mean "gsm8k"' in str(caught.value)
    assert '"x"' in str(caught.value)
    with pytest.raises(EvaluationError, match="no task named"):
        tasks_named(" , ")


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # Published examples: Newcombe 1998, Table I, method 3 (score, no continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_of_newcombe(k, n, low, high):
    found = wilson_interval(k, n)
    assert found == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_at_the_ends():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0
    assert not math.isnan(wilson_interval(10, 10)[0])
