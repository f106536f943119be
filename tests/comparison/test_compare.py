"""`qdense compare` on folders as evaluations leave them: grouping, hand-computed numbers, refusals, every format."""

import csv
import io
import json
import os
import re

import pytest
from rich.console import Console

from qdense.benchmarks.accuracy import wilson_interval
from qdense.benchmarks.tasks import GROUPS, TASKS
from qdense.cli import main
from qdense.comparison.compare import compare
from qdense.comparison.evaluations import load_evaluation
from qdense.comparison.published import (
    INDEPENDENT,
    KINDS,
    PUBLISHED,
    THIRD_PARTY,
    UNCERTAIN,
    WORKED_BACK,
    published_models,
    published_rows,
)
from qdense.comparison.statistics import bootstrap_interval
from qdense.errors import EvaluationError
from qdense.ui.comparison import show_comparison
from tests.helpers.evaluations import recipe_tables, write_evaluation

# A run that is right on 12 of 20 items, and one that is right on these and 7 more: McNemar 2 / 2^7.
HALF = [1] * 12 + [0] * 8
MORE = [1] * 19 + [0]


def comparison_of(*runs, **options):
    return compare([load_evaluation(run) for run in runs], **options)


@pytest.fixture
def runs(tmp_path):
    """lora (one seed), dense (three seeds of one recipe), on two tasks."""
    found = {"lora": write_evaluation(tmp_path / "lora", {"gsm8k": HALF, "aqua": [1, 0] * 5},
                                      recipe=recipe_tables(method="lora"))}  # fmt: skip
    for seed, aqua in ((1, [1] * 10), (2, [1] * 9 + [0]), (3, [1] * 8 + [0] * 2)):
        name = f"dense-{seed}"
        found[name] = write_evaluation(
            tmp_path / name, {"gsm8k": MORE, "aqua": aqua}, recipe=recipe_tables(seed, output=f"runs/{name}")
        )
    return found


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_two_runs_by_hand(runs):
    result = comparison_of(runs["lora"], runs["dense-1"])
    assert [group["label"] for group in result["groups"]] == ["A", "B"]
    lora, dense = result["groups"]
    assert result["num_items"] == {"gsm8k": 20, "aqua": 10}
    assert lora["tasks"]["gsm8k"]["accuracy"] == 0.6
    assert lora["tasks"]["gsm8k"]["interval"] == list(wilson_interval(12, 20))
    assert lora["average"]["accuracy"] == pytest.approx((0.6 + 0.5) / 2)
    assert lora["difference"] is None
    difference = dense["difference"]
    assert (difference["to"], difference["test"]) == ("A", "McNemar's exact test")
    assert difference["tasks"]["gsm8k"]["difference"] == pytest.approx(0.35)
    assert difference["tasks"]["gsm8k"]["p"] == 2 / 2**7
    assert difference["tasks"]["aqua"]["p"] == 2 / 2**5
    assert difference["tasks"]["gsm8k"]["p_holm"] == 2 * 2 / 2**7
    assert difference["tasks"]["aqua"]["p_holm"] == 2 / 2**5
    assert difference["average"]["difference"] == pytest.approx((0.35 + 0.5) / 2)
    low, high = difference["average"]["interval"]
    assert 0 < low < 0.425 < high < 0.7
    assert any("seed-to-seed variance is not in them" in note for note in result["notes"])


def test_seeds_of_one_recipe_are_pooled(runs):
    result = comparison_of(*runs.values())
    dense = result["groups"][1]
    assert [run["seed"] for run in dense["runs"]] == [1, 2, 3]
    assert dense["tasks"]["aqua"]["by_seed"] == pytest.approx([1.0, 0.9, 0.8])
    assert dense["tasks"]["aqua"]["accuracy"] == pytest.approx(0.9)
    assert dense["average"]["by_seed"] == pytest.approx([0.975, 0.925, 0.875])
    assert dense["difference"]["test"].startswith("exact sign-flip test")
    assert dense["difference"]["average"]["difference"] == pytest.approx(0.925 - 0.55)
    # lora's items 1, 3, 5, 7, 9 are wrong: item 9 gains 1/3 (seed 1), the others 1; item 8 loses 1/3. In thirds: 12 up and
    # two of one third, +1 and -1: 4 signs of 3 and 2 of 1, observed 12. At least 12 away: all four alike with the ones
    # cancelled (2 ways each side) or adding (1 way): 2 (2 + 1) / 2^6.
    assert dense["difference"]["tasks"]["aqua"]["p"] == pytest.approx(6 / 64)
    assert any(note.startswith("B (3 seeds): pooled") for note in result["notes"])
    assert any(note.startswith("A: one seed.") for note in result["notes"])


def test_the_first_run_s_group_is_the_reference(runs):
    result = comparison_of(runs["dense-2"], runs["lora"], runs["dense-1"])
    dense, lora = result["groups"]
    assert [run["seed"] for run in dense["runs"]] == [2, 1]
    assert lora["difference"]["tasks"]["gsm8k"]["difference"] == pytest.approx(-0.35)


def test_one_run_alone_has_no_difference(runs):
    (group,) = comparison_of(runs["lora"])["groups"]
    assert group["difference"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"decoding": {"name": "greedy", "num_beams": 1, "do_sample": False}}},
        {"settings": {"batch_size": 8}},
        {"settings": {"device": "NVIDIA GeForce RTX 3090"}},
        {"settings": {"base_fingerprint": {"weights": "0" * 64}}},
        {"settings": {"max_new_tokens": {"gsm8k": 99}}},
        {"recipe": {"r": 16}},
        {"learning_rate": 1e-4},
        {"trained_on": "0" * 64},
    ],
    ids=str,
)
def test_other_recipes_and_settings_are_not_pooled_and_the_difference_is_reported(tmp_path, change):
    first = write_evaluation(tmp_path / "a", {"gsm8k": HALF}, recipe=recipe_tables(1))
    tables = recipe_tables(2, **change.get("recipe", {}))
    tables["training"]["learning_rate"] = change.get("learning_rate", 3e-4)
    tables["provenance"]["data"]["sha256"] = change.get("trained_on", "d" * 64)
    other = write_evaluation(tmp_path / "b", {"gsm8k": HALF}, recipe=tables, **change.get("settings", {}))
    result = comparison_of(first, other)
    assert len(result["groups"]) == 2
    told = re.compile("evaluated differently|different recipes|different bases")
    assert any(told.match(note) and "(A)" in note and "(B)" in note for note in result["notes"])


def test_settings_that_do_not_say_how_it_was_scored_do_not_separate_seeds(tmp_path):
    first = write_evaluation(tmp_path / "a", {"gsm8k": HALF, "aqua": [1]}, recipe=recipe_tables(1))
    other = write_evaluation(
        tmp_path / "b", {"gsm8k": HALF}, recipe=recipe_tables(2), versions={"torch": "9"}, model="/elsewhere", limit=20
    )
    result = comparison_of(first, other)
    assert len(result["groups"]) == 1
    assert "evaluated by different versions, torch: 2.11.0 " in " ".join(result["notes"])


def test_adapters_without_a_recipe_and_bases_are_never_pooled(tmp_path):
    names = ("base-x", "base-y", "peft-1", "peft-2")
    found = [write_evaluation(tmp_path / n, {"gsm8k": HALF}, adapter=n.startswith("peft")) for n in names]
    result = comparison_of(*found)
    assert [group["name"] for group in result["groups"]] == ["base llama3-8b"] * 2 + ["adapter"] * 2
    assert not any("trainable_parameters" in group and group["trainable_parameters"] for group in result["groups"])
    assert any(note.startswith("C, D: one seed each") for note in result["notes"])  # a base has none


def test_trainable_parameters_are_counted_where_the_model_is_known(runs, tmp_path):
    # (4096 + 4096 + 32 * 32) * 32 of q, (4096 + 1024 + 32 * 32) * 32 of k
    assert comparison_of(runs["dense-1"])["groups"][0]["trainable_parameters"] == 491_520
    tables = recipe_tables()
    tables["model"]["name"] = "/models/mine"
    elsewhere = write_evaluation(tmp_path / "mine", {"gsm8k": HALF}, recipe=tables)
    assert comparison_of(elsewhere)["groups"][0]["trainable_parameters"] is None
    tables["adapter"]["method"] = "of the future"
    future = write_evaluation(tmp_path / "future", {"gsm8k": HALF}, recipe=tables)
    assert comparison_of(future)["groups"][0]["name"] == "of the future r32"


def test_only_common_items_and_tasks_are_compared(tmp_path):
    first = write_evaluation(tmp_path / "a", {"gsm8k": [0, 1, 1, 1], "aqua": [1]}, recipe=recipe_tables())
    second = write_evaluation(
        tmp_path / "b", {"gsm8k": {7: 1, 3: 0, 1: 1}, "boolq": [1]}, recipe=recipe_tables(method="lora"), limit=3
    )
    result = comparison_of(first, second)
    assert (result["tasks"], result["num_items"]) == (["gsm8k"], {"gsm8k": 2})
    assert result["groups"][0]["tasks"]["gsm8k"]["accuracy"] == 1.0  # items 1 and 3
    assert result["groups"][1]["tasks"]["gsm8k"]["accuracy"] == 0.5
    notes = "\n".join(result["notes"])
    assert "omitted: aqua, boolq" in notes
    assert "runs have different items of gsm8k" in notes
    assert "gsm8k 2 of 1,319" in notes


def test_the_strict_rule_has_its_own_outcomes(tmp_path):
    run = write_evaluation(tmp_path / "a", {"gsm8k": HALF}, strict={"gsm8k": MORE}, recipe=recipe_tables())
    assert comparison_of(run)["groups"][0]["tasks"]["gsm8k"]["accuracy"] == 0.6
    result = comparison_of(run, rule="strict", published="llama3-8b")
    assert result["groups"][0]["tasks"]["gsm8k"]["accuracy"] == 0.95
    assert any("ours are by the strict rule" in note for note in result["notes"])


def test_the_interval_of_the_average_is_the_bootstrap_s(runs):
    import numpy as np

    result = comparison_of(runs["lora"], runs["dense-1"])
    ours = [np.array([MORE]), np.array([[1] * 10])]
    theirs = [np.array([HALF]), np.array([[1, 0] * 5])]
    assert result["groups"][1]["difference"]["average"]["interval"] == list(bootstrap_interval(ours, theirs))


# --- what is found, and what is refused -------------------------------------------------------------------------------


def test_the_newest_finished_evaluation_of_a_run_is_taken(tmp_path):
    run = tmp_path / "run"
    for digest, outcomes, age in (
        ("old", HALF, 100),
        ("new", MORE, 50),
        ("newer-but-bare", HALF, 10),
        ("going", HALF, 0),
    ):
        write_evaluation(run, {"gsm8k": outcomes}, recipe=recipe_tables(), digest=digest)
        stamp = 2_000_000_000 - age
        os.utime(run / "eval" / digest / "summary.json", (stamp, stamp))
    (run / "eval" / "newer-but-bare" / "items.json").unlink()
    (run / "eval" / "going" / "summary.json").unlink()
    (run / "adapter").mkdir()
    for named in (run, run / "adapter", run / "eval", run / "eval" / "new"):
        assert load_evaluation(named).folder == run / "eval" / "new"
        assert load_evaluation(named).seed == 42
    assert load_evaluation(run / "eval" / "old").outcomes["gsm8k"]["paper"][12] == 0


def test_folders_that_hold_no_evaluation(tmp_path):
    with pytest.raises(EvaluationError, match="nowhere: no such folder"):
        load_evaluation(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    with pytest.raises(EvaluationError, match=r"run: not evaluated yet; run `qdense evaluate TASKS --adapter .*run`"):
        load_evaluation(tmp_path / "run")
    run = write_evaluation(tmp_path / "x", {"gsm8k": HALF}, recipe=recipe_tables())
    folder = run / "eval" / "0123456789ab"
    (folder / "items.json").unlink()
    with pytest.raises(
        EvaluationError, match=r"older version .*has no items.json\. Run `qdense .*--adapter .*x` again"
    ):
        load_evaluation(run)
    (folder / "summary.json").unlink()
    with pytest.raises(EvaluationError, match="0123456789ab: this evaluation was not finished"):
        load_evaluation(run)
    (folder / "settings.json").unlink()
    with pytest.raises(EvaluationError, match=r"no settings\.json"):
        load_evaluation(folder)


@pytest.mark.parametrize(
    ("settings", "command"),
    [
        ({"model": "../models/tiny"}, "--model ../models/tiny"),
        ({"model": "gpt", "endpoint": "http://host/v1"}, "--endpoint http://host/v1 --model gpt"),
    ],
)
def test_the_command_to_continue_is_the_right_one(tmp_path, settings, command):
    run = write_evaluation(tmp_path / "base", {"gsm8k": HALF}, adapter_sha256=None, **settings)
    next(run.glob("eval/*/summary.json")).unlink()
    with pytest.raises(EvaluationError, match=re.escape(f"Run `qdense evaluate TASKS {command}` again")):
        load_evaluation(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("items.json", "{"),
        ("items.json", "[]"),
        ("items.json", "{}"),
        ("items.json", '{"gsm8k": 1}'),
        ("items.json", '{"gsm8k": {"index": [0, 1], "paper": [1, 0]}}'),
        ("items.json", '{"gsm8k": {"index": [0, 1], "paper": [1], "strict": [1]}}'),
        ("items.json", '{"gsm8k": {"index": [0, 0], "paper": [1, 0], "strict": [1, 0]}}'),
        ("items.json", '{"gsm8k": {"index": ["0"], "paper": [1], "strict": [1]}}'),
        ("items.json", '{"gsm8k": {"index": [0], "paper": [0.5], "strict": [1]}}'),
        ("items.json", '{"boolq": {"index": [0], "paper": [1], "strict": [1]}}'),
        ("items.json", "[" * 100_000),
        ("settings.json", "{}"),
        ("settings.json", "null"),
        ("settings.json", "\x00"),
        ("settings.json", "[" * 100_000),
    ],
    ids=lambda text: text[:40],
)
def test_damaged_files_are_named(tmp_path, name, content):
    run = write_evaluation(tmp_path / "x", {"gsm8k": HALF}, recipe=recipe_tables())
    (run / "eval" / "0123456789ab" / name).write_text(content)
    with pytest.raises(EvaluationError, match=r"x/eval/0123456789ab.*Run `qdense evaluate"):
        load_evaluation(run)


@pytest.mark.parametrize("content", [b"[adapter", b"", b"\xff", b"adapter = 1", b"a = " + b"[" * 100_000])
def test_a_damaged_recipe_is_named(tmp_path, content):
    run = write_evaluation(tmp_path / "x", {"gsm8k": HALF}, recipe=recipe_tables())
    (run / "recipe.toml").write_bytes(content)
    with pytest.raises(EvaluationError, match=r"x/recipe\.toml: not a run's recipe"):
        load_evaluation(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_sha256": {"gsm8k": "0" * 64}}, "gsm8k: .*different tests: its test data differs"),
        ({"task_versions": {"gsm8k": 2}}, "gsm8k: .*: its version differs"),
    ],
)
def test_different_tests_are_not_compared(runs, tmp_path, settings, message):
    other = write_evaluation(tmp_path / "other", {"gsm8k": HALF}, recipe=recipe_tables(), **settings)
    with pytest.raises(EvaluationError, match=message):
        comparison_of(runs["lora"], other)


def test_nothing_in_common(runs, tmp_path):
    other = write_evaluation(tmp_path / "other", {"boolq": [1]}, recipe=recipe_tables())
    with pytest.raises(EvaluationError, match=r"no task in common:\n.*lora.*gsm8k, aqua\n.*other.*boolq\n"):
        comparison_of(runs["lora"], other)
    late = write_evaluation(tmp_path / "late", {"gsm8k": {500: 1}}, recipe=recipe_tables())
    with pytest.raises(EvaluationError, match=r"gsm8k: .* have no item in common"):
        comparison_of(runs["lora"], late)


def test_nothing_is_counted_twice(runs, tmp_path):
    lora = runs["lora"]
    with pytest.raises(EvaluationError, match="named twice"):
        comparison_of(lora, lora / "eval" / "0123456789ab")
    copy = write_evaluation(
        tmp_path / "copy", {"gsm8k": HALF}, recipe=recipe_tables(7, method="lora"), adapter_sha256=f"adapter of {lora}"
    )
    with pytest.raises(EvaluationError, match=r"copy: holds the same adapter as .*lora"):
        comparison_of(lora, copy)
    again = write_evaluation(tmp_path / "again", {"gsm8k": HALF}, recipe=recipe_tables(method="lora"))
    assert "A: some of its runs have the same training.seed (42, 42)" in comparison_of(lora, again)["notes"]


# --- published rows ---------------------------------------------------------------------------------------------------


def test_published_rows_add_up():
    whole = [row for row in PUBLISHED if row.percents]
    assert (len(PUBLISHED), len(whole)) == (25, 16)
    for row in whole:
        assert tuple(row.percents) == GROUPS[row.group], row
        mean = sum(row.percents.values()) / len(row.percents)
        # each average was rounded, from rounded figures; SIQA worked back is good to 0.5 / 8
        assert abs(mean - row.average) < 0.06 + 0.0625 * bool(row.doubts), row


def test_published_figures_that_are_not_certain_say_so():
    by_name = {(row.model, row.group, row.name): row for row in PUBLISHED}
    assert len(by_name) == len(PUBLISHED)  # no two rows have the same name
    vera = by_name["llama3-8b", "commonsense", "VeRA"]
    assert vera.doubts == {"siqa": WORKED_BACK, "winogrande": UNCERTAIN}
    assert vera.percents["winogrande"] == 61.8
    third_party = [row for row in PUBLISHED if row.kind == THIRD_PARTY]
    assert len(third_party) == 8
    assert all(row.doubts.get("siqa") == WORKED_BACK for row in third_party if row.group == "commonsense")
    assert not any(row.doubts for row in PUBLISHED if row.kind != THIRD_PARTY)
    assert [(row.name, row.average) for row in PUBLISHED if row.kind == INDEPENDENT] == [
        ("LoRA r32 (bscny)", 81.88),
        ("DenseLoRA r32 (bscny)", 87.51),
    ]
    dora = by_name["llama2-7b", "commonsense", "DoRA r32"]
    assert (dora.percents["siqa"], dora.percents["obqa"], dora.average) == (76.0, 82.4, 79.7)
    assert by_name["llama3-8b", "commonsense", "DenseLoRA r256"].average == 85.5
    assert by_name["llama3-8b", "math", "DenseLoRA r64"].percents["aqua"] == 19.7


def test_which_published_rows_are_shown():
    assert {row.model for row in published_rows("llama2-7b")} == {None, "llama2-7b"}
    names = [row.name for row in published_rows("llama3-8b", GROUPS["math"])]
    assert names == ["LoRA", "DenseLoRA r32", "DenseLoRA r64"]
    names = [row.name for row in published_rows("llama3-8b", ["gsm8k"])]
    assert names == ["LoRA", "DenseLoRA r64"]  # r32 has an average alone, of other tasks
    assert published_rows("llama2-7b", ["gsm8k"]) == []


def test_published_averages_are_shown_beside_the_same_tasks_only(tmp_path):
    tasks = {task: [1, 0] for task in GROUPS["math"]}
    run = write_evaluation(tmp_path / "x", tasks, recipe=recipe_tables(), model="elsewhere")
    result = comparison_of(run, published="llama3-8b")
    assert [row["average"] for row in result["published"]] == [56.9, 57.5, 58.5]
    assert any(note == "ours are on another base: elsewhere" for note in result["notes"])
    del tasks["svamp"]
    run = write_evaluation(tmp_path / "y", tasks, recipe=recipe_tables())
    result = comparison_of(run, published="llama3-8b")
    assert [row["average"] for row in result["published"]] == [None, None]
    assert "svamp" not in result["published"][0]["percents"]
    assert any("averages are over other tasks" in note for note in result["notes"])
    assert any("no published rows" in note for note in comparison_of(run, published="llama2-7b")["notes"])


# --- the command and its formats --------------------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout(runs, capsys):
    assert main(["compare", *map(str, runs.values()), "--format", "json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    result = json.loads(printed.out)
    assert result == json.loads(json.dumps(comparison_of(*runs.values())))
    assert set(result) == {
        "rule", "confidence", "num_draws", "tasks", "num_items", "groups", "published_model", "published", "notes",
    }  # fmt: skip


def test_csv_reads_back(runs, capsys):
    names = [str(run) for run in runs.values()]
    assert main(["compare", *names, "--format", "csv", "--published", "llama3-8b"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    result = comparison_of(*runs.values(), published="llama3-8b")
    for group in result["groups"]:
        for task in (*result["tasks"], "average"):
            (row,) = [r for r in rows if (r["label"], r["task"]) == (group["label"], task)]
            accuracy = group["average"] if task == "average" else group["tasks"][task]
            assert float(row["percent"]) == pytest.approx(100 * accuracy["accuracy"])
            assert [float(row["low"]), float(row["high"])] == pytest.approx([100 * e for e in accuracy["interval"]])
            assert json.loads(row["percent_by_seed"]) == pytest.approx([100 * s for s in accuracy["by_seed"]])
            assert json.loads(row["runs"]) == [run["run"] for run in group["runs"]]
            assert row["kind"] == "ours"
            if group["difference"] is None:
                assert row["difference"] == row["p"] == ""
            elif task != "average":
                difference = group["difference"]["tasks"][task]
                assert float(row["difference"]) == pytest.approx(100 * difference["difference"])
                assert (float(row["p"]), float(row["p_holm"])) == (difference["p"], difference["p_holm"])
    published = {(r["name"], r["task"]): r for r in rows if r["kind"].startswith("published")}
    assert published["DenseLoRA r64", "aqua"]["percent"] == "19.7"
    assert published["DenseLoRA r64", "aqua"]["kind"] == "published (third-party notes)"
    assert [r["note"] for r in rows if r["kind"] == "note"] == result["notes"]


def parse_markdown(text):
    """The tables of a Markdown text, each a list of rows; the first row is the header."""
    tables, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            assert set(rows[1]) <= {"---", "---:"}
            assert len({len(row) for row in rows}) == 1
            tables.append([rows[0], *rows[2:]])
            rows = []
    return tables


def test_markdown_reads_back(runs, tmp_path, capsys):
    for i, run in enumerate(runs.values()):
        run.rename(tmp_path / f"a|b*{i}")
    names = [str(tmp_path / f"a|b*{i}") for i in range(4)]
    assert main(["compare", *names, "--format", "markdown", "--published", "llama3-8b"]) == 0
    text = capsys.readouterr().out
    sheet, lora, dense = parse_markdown(text)
    assert sheet[0] == ["", "", "trainable %", "gsm8k", "aqua", "avg"]
    assert sheet[1:3] == [
        ["A lora r32", "ours", "0.17", "60.0", "50.0", "55.0"],
        ["B denselora r32", "ours", "0.0061", "95.0", "90.0", "92.5"],
    ]
    assert sheet[3] == ["LoRA", "published (third-party notes)", "", "47.1", "18.1", ""]
    assert lora[1] == ["gsm8k", "20", "60.0 [38.7, 78.1]", "60.0"]
    assert dense[2][:2] + dense[2][3:4] + dense[2][5:] == ["aqua", "10", "100.0, 90.0, 80.0", "0.0938", "0.0938"]
    assert dense[2][4].startswith("+40.0 [+")
    assert len(dense) == 4
    assert f"{tmp_path}/a\\|b\\*1" in text
    assert "seed-to-seed variance is not in them" in text


@pytest.fixture(scope="module")
def eight_tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    outcomes = {task: [1, 0, 1] * (TASKS[task].num_items // 9) for task in GROUPS["commonsense"]}
    found = [
        write_evaluation(folder / f"{method}-{seed}", outcomes, recipe=recipe_tables(seed, method=method))
        for method in ("lora", "denselora")
        for seed in (1, 2)
    ]
    return comparison_of(*found, published="llama3-8b")


@pytest.mark.parametrize("width", [120, 80])
def test_the_table_fits(eight_tasks, width):
    console = Console(file=io.StringIO(), width=width)
    show_comparison(console, eight_tasks)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert "…" not in console.file.getvalue()  # nothing is cut off
    # The paper's Table 1 stays one table, ours and published rows below each other, each kind under its name.
    (header,) = [line for line in lines if line.split()[-9:] == [*GROUPS["commonsense"], "avg"]]
    assert ("trainable %" in header) == (width == 120)
    kinds = [line.strip() for line in lines if line.strip() in ("published", "published (third-party notes)")]
    assert kinds == ["published", "published (third-party notes)"]
    rows = {line.split("  ")[0].strip(): line.split() for line in lines}
    assert rows["VeRA"][-9:] == ["62.2", "81.6", "(65)", "54.5", "61.8?", "84.4", "67.2", "64.6", "67.7"]
    assert rows["B denselora r32"][-1] == "66.7"
    assert any(line.split() == ["task", "B", "%", "seeds", "B", "-", "A", "p", "Holm"] for line in lines)
    assert sum(line.startswith("average") for line in lines) == 2


def test_a_narrow_terminal_gets_the_columns_in_turn(eight_tasks):
    console = Console(file=io.StringIO(), width=50)
    show_comparison(console, eight_tasks)
    headers = [line.split() for line in console.file.getvalue().splitlines() if "boolq" in line or "obqa" in line]
    assert headers[0][0] == "boolq"
    assert "obqa" not in headers[0]


def test_names_cannot_steer_the_terminal(tmp_path, capsys):
    run = write_evaluation(tmp_path / "a\x1b[2J[red]b", {"x\x1b[1mtask": [1, 0]}, recipe=recipe_tables())
    for form in ("table", "markdown", "csv", "json"):
        assert main(["compare", str(run), "--format", form]) == 0
        printed = capsys.readouterr().out
        assert "\x1b" not in printed
        assert "[red]b" in "".join(printed.replace("\\[", "[").split()), form


def test_the_format_follows_the_file_s_name(runs, tmp_path, capsys):
    for name, start in (("a.json", "{"), ("a.csv", "kind,label"), ("a.md", "|  |  | trainable"), ("a.txt", "A ")):
        assert main(["compare", str(runs["lora"]), "--output", str(tmp_path / "new" / name)]) == 0
        assert (tmp_path / "new" / name).read_text().startswith(start)
    assert main(["compare", str(runs["lora"]), "--format", "csv", "--output", str(tmp_path / "b.md")]) == 0
    assert (tmp_path / "b.md").read_text().startswith("kind,label")
    assert capsys.readouterr().out == ""


def test_published_rows_need_no_run(capsys):
    assert published_models() == ("llama3-8b", "llama2-7b")
    for model in published_models():  # the command line knows just these
        assert main(["compare", "--published", model, "--format", "markdown"]) == 0
        tables = parse_markdown(capsys.readouterr().out)
        assert [table[0][3] for table in tables] == (["boolq", "gsm8k"] if model == "llama3-8b" else ["boolq"])
        assert tables[0][1][0] == "ChatGPT"
        kinds = [row[1] for row in tables[0][1:]]  # independent runs last, whatever the order of the data
        assert kinds == sorted(kinds, key=KINDS.index)
    assert main(["compare", "--published", "llama3-8b"]) == 0
    assert "DenseLoRA r32" in capsys.readouterr().out


def test_mistakes_on_the_command_line(tmp_path, capsys):
    published = ["compare", "--published", "llama3-8b", "--output"]
    assert main([*published, str(tmp_path / "o.xlsx")]) == 2
    assert "its suffix must be one of .json, .csv, .md, .txt, or name a --format" in capsys.readouterr().err
    (tmp_path / "file").touch()
    long = tmp_path / ("n" * 300 + ".md")
    for place, named in ((tmp_path / "file" / "o.md", tmp_path / "file"), (long, long), (tmp_path, tmp_path)):
        assert main([*published, str(place), "--format", "csv"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {named}: ")
    assert main(["compare"]) == 2
    assert "--published" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'}: no such folder")
    with pytest.raises(SystemExit) as caught:
        main(["compare", "--published", "gpt2"])
    assert caught.value.code == 2
