"""Answers read from real completions, wrong ones included; published figures; Wilson intervals."""

import json
import math

import pytest

from qdense.benchmarks.accuracy import wilson_interval
from qdense.benchmarks.results import score_task
from qdense.benchmarks.scoring import LETTER, NUMBER, numbered
from qdense.benchmarks.tasks import TASKS, load_items, tasks_named
from qdense.cli import main
from qdense.errors import EvaluationError
from tests.helpers.completions import LETTERS, NUMBERS, OPTIONS, STORED, TRUTHS


@pytest.mark.parametrize(("completion", "paper", "strict"), NUMBERS)
def test_numbers(completion, paper, strict):
    assert NUMBER.answers(completion) == {"paper": paper, "strict": None if strict is None else pytest.approx(strict)}


@pytest.mark.parametrize(("completion", "paper", "strict"), LETTERS)
def test_letters(completion, paper, strict):
    assert LETTER.answers(completion) == {"paper": paper, "strict": strict}


@pytest.mark.parametrize(("completion", "paper", "strict"), OPTIONS)
def test_options(completion, paper, strict):
    assert TASKS["piqa"].answers.answers(completion) == {"paper": paper, "strict": strict}


@pytest.mark.parametrize(("completion", "paper", "strict"), TRUTHS)
def test_true_and_false(completion, paper, strict):
    assert TASKS["boolq"].answers.answers(completion) == {"paper": paper, "strict": strict}


def test_the_majority_of_samples():
    assert NUMBER.majority([1.0, 2.0, 2.0004, None, None, None]) == 2.0
    assert NUMBER.majority([3.0, 2.0]) == 3.0
    assert LETTER.majority([None, None]) is None
    assert LETTER.majority([None, "B"]) == "B"


@pytest.mark.parametrize(
    ("label", "answer", "right"),
    [("8.0", "8", True), ("8.0", "8.001", True), ("8.0", "8.0011", False), ("1.8333333333333335", "1.833", True)],
)
def test_tolerance_is_the_authors(label, answer, right):
    assert NUMBER.is_correct(label, NUMBER.answers(answer)["paper"]) is right


def test_what_can_be_a_label():
    for kind, labels, others in (
        (NUMBER, ("7", "-0.5", "1e3"), ("", "seven", "nan", "inf", "1,000")),
        (LETTER, ("A", "E"), ("F", "a", "AB", "")),
        (numbered("ending", 4), ("ending1", "ending4"), ("ending0", "ending5", "ending", "Ending1", "")),
    ):
        assert all(kind.is_label(label) for label in labels)
        assert not any(kind.is_label(other) for other in others)


def test_at_the_tolerance_itself_a_number_is_right():
    assert NUMBER.is_correct("0.001", 0.0)
    assert NUMBER.is_correct("0", -0.001)
    assert not NUMBER.is_correct("0", math.nextafter(0.001, 1))
    assert NUMBER.majority([2.0, 0.001, 0.0]) == 0.001  # two votes


@pytest.mark.parametrize("name", STORED)
def test_stored_completions_of_the_real_files(shared_data, name, tmp_path, capsys):
    paper, strict, num_items = STORED[name]
    rows = json.loads((shared_data / TASKS[name].file.path).read_text())
    lines = [json.dumps({"index": i, "completion": row["output"]}) for i, row in enumerate(rows)]
    (tmp_path / "completions.jsonl").write_text("\n".join(reversed(lines)))  # in any order
    command = ["score", TASKS[name].upstream_name, str(tmp_path / "completions.jsonl"), "--json"]
    assert main([*command, "--data-dir", str(shared_data)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["task"], result["num_items"], result["num_scored"]) == (name, num_items, num_items)
    assert (result["paper"]["num_correct"], result["strict"]["num_correct"]) == (paper, strict)
    assert result["paper"]["accuracy"] == paper / num_items
    assert result["paper"]["interval"] == list(wilson_interval(paper, num_items))


def test_an_instruction_is_no_answer(shared_data):
    """Every option is in the prompt: `paper` takes the first as the answer, `strict` takes none."""
    rows = json.loads((shared_data / "dataset" / "piqa" / "test.json").read_text())
    result, _ = score_task(
        TASKS["piqa"], [row["answer"] for row in rows], {i: [row["instruction"]] for i, row in enumerate(rows)}
    )
    assert (result["paper"]["num_correct"], result["strict"]["num_correct"]) == (910, 0)


def test_constant_a_beats_the_papers_aqua(shared_data):
    rows = json.loads((shared_data / "dataset" / "AQuA" / "test.json").read_text())
    result, _ = score_task(TASKS["aqua"], [row["answer"] for row in rows], {i: ["A"] for i in range(len(rows))})
    assert round(100 * result["paper"]["accuracy"], 1) == 24.8


# --- the tasks --------------------------------------------------------------------------------------------------------------


def test_the_test_sets_are_as_the_tasks_say(shared_data):
    found = {name: load_items(task, shared_data) for name, task in TASKS.items() if (
        task.file is None or (shared_data / task.file.path).is_file())}  # fmt: skip
    assert len(found) == 10
    for name, data in found.items():
        assert len(data.rows) == TASKS[name].num_items, name


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_sample_is_a_problem_with_its_label(task):
    problem, label = task.sample
    assert len(problem) > 20
    assert task.answers.is_label(label)
    answer = label if task.answers.name != "number" else f"{float(label):g}"
    for rule, read in task.answers.answers(f"the correct answer is {answer}").items():
        assert task.answers.is_correct(label, read), rule
        assert not task.answers.is_correct(label, None)


@pytest.mark.parametrize("name", ["multiarith", "singleeq", "mathqa", "siqa", "hellaswag", "arc-e", "obqa"])
def test_the_tasks_without_real_data_here_read_upstreams_format(name, fixtures, capsys, tmp_path):
    """Untested on real data: the fixtures are ours, written in upstream's format."""
    task = TASKS[name]
    rows = load_items(task, fixtures).rows
    assert len(rows) == 4
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"index": i, "completion": row.output}) + "\n" for i, row in enumerate(rows))
    )
    assert main(["score", name, str(tmp_path / "c.jsonl"), "--data-dir", str(fixtures), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    # the last item of each fixture is answered wrongly
    assert (result["paper"]["num_correct"], result["strict"]["num_correct"]) == (3, 3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"index": 0, "completion": "1"}'], "3 of 4 items have no completion: index 1, 2, 3"),
        (
            ['{"index": 0, "completion": "1"}', '{"index": 0, "completion": "2"}'],
            "line 2: index 0 is already in line 1",
        ),
        (['{"index": 4, "completion": "1"}'], "line 1: index 4 is out of range; the items are 0 to 3"),
        (['{"index": -1, "completion": "1"}'], "index -1 is out of range"),
        (['{"index": true, "completion": "1"}'], '"index" must be a whole number, not true'),
        (['{"index": 1.0, "completion": "1"}'], '"index" must be a whole number, not 1.0'),
        (['{"index": 0, "completion": null}'], '"completion" must be text, not null'),
        (['{"index": 0}'], 'has no "completion"'),
        (["[0]"], 'must be an object {"index": i'),
        (["{"], "line 1: not valid JSON"),
        (["[" * 100_000], "line 1: not valid JSON"),
        (
            [
                json.dumps({"index": i, "completion": "1", "sample": s})
                for i, s in [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]
            ],
            "fewer than 2 of index 1, 2, 3",
        ),
    ],
)
def test_completions_that_are_refused(fixtures, tmp_path, capsys, lines, message):
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    assert main(["score", "multiarith", str(tmp_path / "c.jsonl"), "--data-dir", str(fixtures)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_first_items_alone(fixtures, tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text('\ufeff{"index": 0, "completion": "45"}\r\n{"index": 1, "completion": "x"}\n')
    assert main(["score", "multiarith", str(tmp_path / "c.jsonl"), "--data-dir", str(fixtures), "--limit", "2"]) == 0
    printed = capsys.readouterr().out
    assert "50.0 [9.5, 90.5]" in printed
    assert main(["score", "multiarith", str(tmp_path / "none"), "--data-dir", str(fixtures)]) == 2
    assert "no such file of completions" in capsys.readouterr().err
    assert main(["score", "math", str(tmp_path / "c.jsonl"), "--data-dir", str(fixtures)]) == 2
    assert '"math" stands for 4 tasks' in capsys.readouterr().err


def test_several_samples(fixtures, tmp_path, capsys):
    rows = load_items(TASKS["multiarith"], fixtures).rows
    answers = {0: ["45", "45", "1"], 1: ["1", "x", "x"], 2: [rows[2].answer, "x", "x"], 3: ["x", "x", "x"]}
    (tmp_path / "c.jsonl").write_text("".join(
        json.dumps({"index": i, "sample": s, "completion": text}) + "\n"
        for i, texts in answers.items() for s, text in enumerate(texts)
    ))  # fmt: skip
    assert main(["score", "multiarith", str(tmp_path / "c.jsonl"), "--data-dir", str(fixtures), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_samples"] == 3
    assert result["paper"]["num_correct"] == 2  # of the majorities: an unreadable sample has no vote
    assert result["paper"]["num_without_answer"] == 1
    # by hand: item 0 has 2 of 3 right, item 2 has 1 of 3
    assert result["paper"]["pass_at"] == {
        "1": pytest.approx((2 / 3 + 1 / 3) / 4), "2": pytest.approx((1 + 2 / 3) / 4), "3": 0.5
    }  # fmt: skip


def test_tasks_are_listed(capsys):
    assert main(["tasks", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [task["name"] for task in listed["tasks"]] == list(TASKS)
    assert listed["groups"]["commonsense"][:3] == ["boolq", "piqa", "siqa"]
    assert main(["tasks"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in TASKS)


def test_tasks_by_name_group_and_case():
    assert [task.name for task in tasks_named("math")] == ["gsm8k", "aqua", "addsub", "svamp"]
    assert [task.name for task in tasks_named("SVAMP, math")] == ["svamp", "gsm8k", "aqua", "addsub"]
    assert [task.name for task in tasks_named("social_i_qa,ARC-Easy,openbookqa")] == ["siqa", "arc-e", "obqa"]
    assert len(tasks_named("all")) == 16
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
