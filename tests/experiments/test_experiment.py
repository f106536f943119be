"""Experiments as files: what they hold, what is refused, and that every one that comes with qdense is sound."""

import json

import pytest

from qdense.cli import main
from qdense.errors import RecipeError
from qdense.experiments.experiment import builtin_experiments, load_experiment
from tests.helpers.experiments import known_cells, write_experiment


@pytest.fixture
def experiment_file(tmp_path, tiny_model):
    return write_experiment(tmp_path, tiny_model)


def names_of(experiment):
    return [arm.name for arm in experiment.arms]


def test_a_list_makes_an_arm_of_each_value(tmp_path, tiny_model):
    file = write_experiment(
        tmp_path, tiny_model, **{"r = 4": "r = [2, 4]", "fraction = 0.05": "fraction = [0.05, 0.1]"}
    )
    experiment = load_experiment(file)
    lora = ["LoRA r2 5%", "LoRA r2 10%", "LoRA r4 5%", "LoRA r4 10%"]
    assert names_of(experiment) == [*lora, "DenseLoRA 5%", "DenseLoRA 10%"]
    arm = experiment.arms[3]
    assert (arm.recipe.adapter.method, arm.recipe.adapter.r, arm.recipe.data.fraction) == ("lora", 4, 0.1)
    assert arm.varied == {"adapter.r": 4, "data.fraction": 0.1}


def test_a_new_rank_has_its_own_alpha():
    by_name = {arm.name: arm.recipe for arm in load_experiment("paper/figure4").arms}
    assert {recipe.adapter.r: recipe.adapter.scaling_alpha for recipe in by_name.values()} == {
        r: 2 * r for r in (16, 32, 64, 128, 256, 512)
    }


def test_the_rate_is_searched_unless_it_is_set(tmp_path, tiny_model):
    file = write_experiment(tmp_path, tiny_model)
    lora, dense = load_experiment(file).arms
    assert (lora.is_searched, dense.is_searched) == (True, False)
    assert dense.recipe.training.learning_rate == 1e-1
    lora, dense = load_experiment(file, ["training.learning_rate=auto"]).arms
    assert lora.is_searched
    assert dense.is_searched


def test_set_reaches_recipes_and_the_file(experiment_file):
    overrides = ["training.max_steps=7", "seeds=[5]", "search.learning_rate=[1e-4, 1e-3]", "evaluate.limit=2"]
    experiment = load_experiment(experiment_file, overrides)
    assert {arm.recipe.training.max_steps for arm in experiment.arms} == {7}
    assert (experiment.seeds, experiment.evaluate.limit) == ((5,), 2)
    assert experiment.search.learning_rate == (1e-4, 1e-3)
    cells = list(known_cells(experiment))
    assert [(cell.stage, cell.learning_rate, cell.seed) for cell in cells] == [
        ("search", 1e-4, 101),
        ("search", 1e-3, 101),
        ("final", 1e-4, 5),
        ("final", 1e-1, 5),
    ]


def test_equal_cells_of_two_experiments_are_one():
    """DenseLoRA r 32 on QKVUD is in Tables 1, 3 and 4 and in Figures 3 and 4."""
    digests = {
        name: {cell.digest for cell in known_cells(load_experiment(f"paper/{name}"))}
        for name in ("table1-llama3-8b", "table3", "table4", "figure3", "figure4")
    }
    shared = set.intersection(*digests.values())
    assert len(shared) == 3  # its three seeds


def test_other_data_makes_another_cell(tmp_path, tiny_model):
    rows = tmp_path / "rows.json"
    file = write_experiment(tmp_path, tiny_model, **{'name = "wordproblems"': f'path = "{rows}"'})

    def digest():
        return next(known_cells(load_experiment(file))).digest

    digests = []
    for answer in "12":
        rows.write_text(json.dumps([{"instruction": f"Say {answer}.", "output": answer}] * 20))
        digests.append(digest())
    assert len({*digests, digest()}) == 2
    assert digest() == digests[1]


@pytest.mark.parametrize("name", sorted(builtin_experiments()))
def test_every_builtin_experiment_is_planned(name, capsys):
    """As it comes, with memory and hours on a 24 GB card for every arm."""
    assert main(["sweep", name, "--dry-run", "--json", "--memory", "24GiB"]) == 0
    arms = json.loads(capsys.readouterr().out)["arms"]
    assert arms
    for arm in arms:
        assert arm["fits"], arm
        assert arm["needed_bytes"] > 0
        assert arm["left"] >= 1
        assert arm["hours_of_a_run"].keys() >= {"RTX 3090", "RTX 4090"}
        assert all(hours > 0 for hours in arm["hours_of_a_run"].values())


def test_the_papers_experiments_are_all_there():
    names = {"table1-llama3-8b", "table1-llama2-7b", "table2", "figure3", "table3", "figure4", "table4", "figure1-5"}
    assert {f"paper/{name}" for name in names} <= builtin_experiments().keys()
    table1 = load_experiment("paper/table1-llama3-8b")
    by_method = {(arm.recipe.adapter.method, arm.recipe.adapter.r): arm.recipe for arm in table1.arms}
    dense, lora, dora = by_method["denselora", 32], by_method["lora", 32], by_method["dora", 16]
    assert (dense.training.epochs, dense.training.learning_rate, dense.adapter.scaling_alpha) == (2, 3e-4, 64)
    assert (lora.training.epochs, lora.training.learning_rate) == (3, 3e-4)
    assert (dora.training.epochs, dora.training.learning_rate) == (3, 1e-4)
    assert {recipe.model.name for recipe in by_method.values()} == {"llama3-8b"}
    figure3 = load_experiment("paper/figure3")
    assert {arm.recipe.data.fraction for arm in figure3.arms} == {0.1, 0.2, 0.4, 0.6, 0.8, 1.0}


def test_the_prediction_is_of_the_data_that_is_known(capsys):
    """Commonsense170K, two epochs: 170,300 rows of about 114 tokens."""
    assert main(["sweep", "paper/table4", "--dry-run", "--json", "--memory", "24GiB"]) == 0
    arm = json.loads(capsys.readouterr().out)["arms"][0]
    assert arm["steps"] == 2 * -(-(170_420 - 120) // 16)
    assert arm["tokens"] == pytest.approx(2 * 170_300 * 114, rel=1e-3)
    assert not arm["tokens_are_a_bound"]


def test_the_prediction_counts_the_rows_of_a_file(tmp_path, tiny_model, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}.", "completion": str(i)}) + "\n" for i in range(88)))
    changes = {
        'name = "wordproblems"': f'path = "{rows}"',
        "fraction = 0.05": "fraction = 1.0",
        "max_steps = 4": "epochs = 2",
    }
    file = write_experiment(tmp_path, tiny_model, **changes)
    assert main(["sweep", str(file), "--dry-run", "--json", "--memory", "24GiB"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"][0]["steps"] == 2 * (88 - 8) // 4


def test_the_table_of_a_dry_run(experiment_file, capsys):
    assert main(["sweep", str(experiment_file), "--dry-run", "--price", "rtx 4090=2", "--memory", "24GiB"]) == 0
    printed = capsys.readouterr().out
    for text in ("Tiny", "LoRA", "DenseLoRA", ">= 5", "search", "3090 h", "costs", "without evaluation"):
        assert text in " ".join(printed.split()), text
    assert not (experiment_file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [1, 2]", "seeds = [1, 1]", "must name each seed once"),
        (
            "seeds = [101]",
            "seeds = [2]",
            "must be other seeds than `seeds`: 2 would both choose the rate and test it",
        ),
        ("[3e-2, 1e-1, 3e-1]", "[1e-1, 3e-2]", "must rise, each rate once"),
        ("[3e-2, 1e-1, 3e-1]", "[3e-2]", "a list of at least two rates"),
        ("[3e-2, 1e-1, 3e-1]", "[3e-2, 2.0]", "to below 1"),
        ("updates = true", 'reference = "lora"', 'no such variant; did you mean "LoRA"?'),
        ("updates = true", 'published = "gpt2"', "llama3-8b or llama2-7b"),
        ("limit = 4", "limits = 4", 'evaluate.limits   unknown key; did you mean "limit"?'),
        ('tasks = ["wordproblems"]', 'tasks = ["gsm9k"]', 'unknown task "gsm9k"'),
        ("[set.data]", "[set.dat]", 'set.dat   unknown table; did you mean "data"?'),
        ("dropout = 0.0", "dropout = 2.0", "adapter.dropout = 2.0"),
        ('method = "lora"', 'method = "lorra"', 'did you mean "lora"?'),
        ("max_steps = 4", "max_steps = 4\nseed = 1", "is set by `seeds`"),
        ("[set.adapter]", '[set.output]\ndir = "x"\n[set.adapter]', "is chosen by the sweep"),
        ("title", "titel", 'unknown key; did you mean "title"?'),
        ("[set.model]", "[set.model", "not valid TOML"),
        ("r = 4", "r = []", "must name at least one value"),
        (
            "r = 4",
            f"r = {list(range(1, 500))}\ndropout = [0, 0.1, 0.2]",
            "make 1,498 arms, and at most 1,000 are accepted",
        ),
        ("r = 4", "r = [4, 4]", "an arm must differ in something"),
        ("r = 4", 'r = "four"', 'adapter.r = "four"'),
        (
            "[variants.LoRA.adapter]",
            "[variants.LoRA]\nadapter = 3\n[variants.x.adapter]",
            "must be a table, as in a recipe",
        ),
        ("[variants.LoRA.adapter]", "[[variants.LoRA]]\n[variants.x.adapter]", "variants"),
        ('question = "Does', 'recipe = "no-such"\nquestion = "Does', "no-such: no such file, and no built-in recipe"),
    ],
)
def test_a_mistake_in_the_file(tmp_path, tiny_model, capsys, old, new, message):
    file = write_experiment(tmp_path, tiny_model, **{old: new})
    assert main(["sweep", str(file), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert message in " ".join(error.split()) or message in error


def test_two_arms_that_are_the_same(experiment_file):
    with pytest.raises(RecipeError, match='arm "DenseLoRA": trains the same as "LoRA"'):
        load_experiment(experiment_file, ["adapter.method=lora", "adapter.r=4", "training.learning_rate=0.1"])


def test_a_recipe_is_no_experiment_and_a_name_may_be_misspelt(capsys):
    assert main(["sweep", "recipes/demo.toml"]) == 2
    assert "is a recipe, not an experiment. Train it: qdense train" in capsys.readouterr().err
    assert main(["sweep", "paper/table9"]) == 2
    assert 'did you mean "paper/table' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "soon"], "'soon' is not a time"),
        (["--price", "4090=1"], "is not CARD=PRICE"),
        (["--price", "RTX 4090=free"], "is not CARD=PRICE"),
        (["--jobs", "0"], "not a positive whole number"),
        (["--set", "nothing"], "write it as table.key=value"),
    ],
)
def test_a_mistake_on_the_command_line(experiment_file, capsys, options, message):
    try:
        status = main(["sweep", str(experiment_file), *options])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
