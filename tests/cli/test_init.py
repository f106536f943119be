"""`qdense init`: a recipe for a user's own rows and card, which trains unchanged."""

import json
from types import SimpleNamespace

import pytest

from qdense.cli import main
from qdense.data.rows import Row
from qdense.recipe import load_recipe, recipe_from_tables

GIB = 2**30


def write_rows(path, num_rows, *, length=40, names=("prompt", "completion")):
    rows = [{names[0]: f"Question {i}: {'x' * length}?", names[1]: f"Answer {i}."} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("num_rows", "validation_rows", "batch_size"), [(5, 0, 4), (60, 6, 4), (500, 50, 8), (4000, 120, 16)]
)
def test_the_run_is_sized_to_the_rows(tmp_path, monkeypatch, capsys, num_rows, validation_rows, batch_size):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "own.jsonl", num_rows)
    assert main(["init", "own.jsonl", "--memory", "24GiB"]) == 0
    assert "Read it, then: qdense train own.toml" in capsys.readouterr().out
    recipe = load_recipe("own.toml")
    assert (recipe.model.name, recipe.adapter.method, recipe.data.path) == ("llama3-8b", "denselora", "own.jsonl")
    assert recipe.data.columns.model_dump(exclude_none=True) == {
        "instruction": "prompt",
        "input": "input",
        "output": "completion",
    }
    assert 'columns = { instruction = "prompt", output = "completion" }' in (tmp_path / "own.toml").read_text()
    assert (recipe.data.validation_rows, recipe.training.batch_size) == (validation_rows, batch_size)
    assert recipe.training.keep == ("best" if validation_rows else "last")
    assert (recipe.training.learning_rate, recipe.training.warmup_steps) == ("auto", "auto")
    assert recipe.output.dir == "runs/own"
    num_steps = 3 * -(-(num_rows - validation_rows) // batch_size)
    assert f"# {num_steps:,} steps, predicted from shapes alone: " in (tmp_path / "own.toml").read_text()
    assert main(["plan", "own.toml", "--memory", "24GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert main(["plan", "own.toml", "--memory", "24GiB"]) == 0
    assert f"this run: {num_steps:,} steps, predicted from shapes alone: " in " ".join(capsys.readouterr().out.split())


def test_the_time_follows_the_rows_and_the_length_of_the_run(tmp_path, monkeypatch):
    from qdense.cli.estimate import predicted_time

    monkeypatch.chdir(tmp_path)
    rows = [Row("a" * 100, "", "b" * 100)] * 100
    plan = SimpleNamespace(speeds={"RTX 3090": 100.0, "H100": 1000.0})
    data = {"path": "x.jsonl", "validation_rows": 10, "max_length": 50}

    def time_of(**training):
        tables = {"model": {"name": "llama3-8b"}, "data": data, "training": {"batch_size": 8, **training}}
        return predicted_time(plan, recipe_from_tables(tables, source="test"), rows)

    # 90 rows of 50 tokens at 100 tokens a second are 45 seconds an epoch
    assert time_of(epochs=4) == "48 steps, predicted from shapes alone: 3 min on an RTX 3090"
    assert time_of(epochs=400) == "4,800 steps, predicted from shapes alone: 5.0 h on an RTX 3090"
    assert time_of(max_steps=30) == "30 steps, predicted from shapes alone: 2 min on an RTX 3090"
    plan.speeds.clear()
    assert time_of(epochs=4) == "48 steps"


def test_the_model_is_the_largest_that_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "own.jsonl", 30)
    chosen = []
    for number, memory in enumerate(("24GiB", "5GiB", "2GiB")):
        assert main(["init", "own.jsonl", "--memory", memory, "--output", f"{number}.toml"]) == 0
        chosen.append(load_recipe(f"{number}.toml").model.name)
    assert chosen[0] == "llama3-8b"
    assert chosen == sorted(chosen, key=["llama3-8b", "llama3.2-3b", "llama3.2-1b", "smollm2-135m"].index)
    assert len(set(chosen)) == 3


def test_long_rows_and_broken_rows_are_noted_in_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "own.jsonl", 99, length=1500)
    with (tmp_path / "own.jsonl").open("a") as stream:
        stream.write("{oops\n")
    assert main(["init", "own.jsonl", "--memory", "24GiB"]) == 0
    text = (tmp_path / "own.toml").read_text()
    assert "# 1 of 100 rows: blank or broken" in text
    assert capsys.readouterr().err.startswith(
        'warning: 1 of 100 rows is blank or broken and will be skipped (data.bad_rows = "skip"); the first: own.jsonl, line 100'
    )
    recipe = load_recipe("own.toml")
    assert recipe.data.bad_rows == "skip"
    assert 512 < recipe.data.max_length < 768  # some 1,700 characters with the template, at 3 a token


def test_columns_can_be_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"date": f"{i} May", "place": "here", "weekday": "Monday"} for i in range(1, 11)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    named = "instruction=date,input=place,output=weekday"
    assert main(["init", "own.jsonl", "--memory", "24GiB", "--columns", named, "--output", "c.toml"]) == 0
    assert (
        capsys.readouterr().err
        == "warning: only 10 rows: none is kept for validation, and the result will say little\n"
    )
    recipe = load_recipe("c.toml")
    assert recipe.data.columns.model_dump(exclude_none=True) == {
        "instruction": "date",
        "input": "place",
        "output": "weekday",
    }
    assert recipe.output.dir == "runs/c"
    for text, message in (
        ("instruction=datum,output=weekday", 'did you mean "date"?'),
        ("instruction=date,output=weekday,input=plaice", 'did you mean "place"?'),
    ):
        assert main(["init", "own.jsonl", "--columns", text]) == 2
        assert message in capsys.readouterr().err


def test_mistakes_are_explained_and_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "own.jsonl", 30)
    (tmp_path / "own.toml").write_text("mine")
    write_rows(tmp_path / "odd.jsonl", 3, names=("text", "label"))
    for arguments, message in (
        (["own.jsonl"], "own.toml: exists, and is left as it is. Name another file with --output."),
        (["none.jsonl"], "none.jsonl: no such file"),
        (["odd.jsonl"], "`qdense init` takes --columns instruction=prompt,output=completion"),
        (
            ["odd.jsonl"],
            "cannot tell which column holds the instruction and which the output. Its columns: text, label.",
        ),
        (
            ["own.jsonl", "--output", "a.toml", "--model", "llama3-70b", "--memory", "12GiB"],
            "Name a smaller model with --model",
        ),
        (["own.jsonl", "--output", "a.toml", "--method", "dense"], 'did you mean "denselora"?'),
        (["own.jsonl", "--output", "no/a.toml"], "no/a.toml: No such file or directory"),
    ):
        assert main(["init", *arguments]) == 2, arguments
        assert message in capsys.readouterr().err
    assert (tmp_path / "own.toml").read_text() == "mine"
    assert not (tmp_path / "a.toml").exists()


def test_data_given_as_a_recipe_is_recognised(tmp_path, capsys):
    write_rows(tmp_path / "own.jsonl", 3)
    for name, message in (("own.jsonl", "is data, not a recipe"), ("none.jsonl", "no such file")):
        assert main(["train", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "qdense init" in error or name == "none.jsonl"
