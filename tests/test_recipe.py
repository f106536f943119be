"""Recipes: everything wrong is reported at once, and every recipe in the tree is right."""

import tomllib

import pytest
import tomli_w

from qdense.errors import RecipeError
from qdense.recipe import flattened, load_recipe, recipe_from_tables
from tests.helpers import ROOT
from tests.helpers.recipes import recipe_of

RECIPES = ROOT / "recipes"
MINIMAL = {"model": {"name": "llama3-8b"}, "data": {"name": "math10k"}}


def problems_of(tables):
    with pytest.raises(RecipeError) as caught:
        recipe_from_tables(tables, source="x.toml")
    return str(caught.value)


def with_value(key, value):
    table, name = key.split(".")
    return MINIMAL | {table: MINIMAL.get(table, {}) | {name: value}}


def test_every_recipe_in_the_tree_is_valid():
    found = sorted(RECIPES.glob("*.toml"))
    assert {path.stem for path in found} >= {
        "demo",
        "math10k",
        "commonsense170k",
        "commonsense170k-llama2-7b",
    }
    for path in found:
        assert load_recipe(path).output.dir.startswith("runs/")


@pytest.mark.parametrize("name", ["math10k", "commonsense170k", "commonsense170k-llama2-7b"])
def test_paper_recipes_follow_the_authors(name):
    recipe = load_recipe(RECIPES / f"{name}.toml")
    adapter, data, training = recipe.adapter, recipe.data, recipe.training
    assert (adapter.r, adapter.scaling_alpha, adapter.dropout, adapter.activation) == (32, 64, 0.05, "gelu")
    assert adapter.target_modules == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert (data.template, data.train_on, data.max_length, data.validation_rows) == ("llm-adapters", "all", 256, 120)
    assert (training.batch_size, training.warmup_steps, training.schedule, training.learning_rate) == (
        16,
        100,
        "linear",
        3e-4,
    )
    assert (training.eval_steps, training.keep, recipe.model.device) == (80, "best", "auto")


def test_all_problems_are_reported_together_with_the_closest_names():
    text = problems_of(
        {
            "model": {"name": "llama3-8"},
            "adapter": {"r": 0, "methd": "lora"},
            "data": {"name": "math10"},
            "trainng": {},
        }
    )
    assert text.startswith("x.toml: 5 problems\n")
    assert 'model.name = "llama3-8"' in text
    assert 'did you mean "llama3-8b"?' in text
    assert "adapter.r = 0" in text
    assert "a whole number from 1 to 512" in text
    assert "adapter.methd" in text
    assert 'did you mean "method"?' in text
    assert 'did you mean "math10k"?' in text
    assert 'did you mean "training"?' in text


def test_without_validation_rows_the_last_weights_are_kept():
    for validation_rows, keep in ((0, "last"), (5, "best")):
        tables = MINIMAL | {"data": {"name": "math10k", "validation_rows": validation_rows}}
        assert recipe_from_tables(tables, "x").resolved()["training"]["keep"] == keep


def test_values_that_do_not_fit_together_are_reported_with_the_others():
    text = problems_of(
        MINIMAL
        | {"adapter": {"r": 0}, "training": {"micro_batch_size": 0, "keep": "best"}, "data": {"validation_rows": 0}}
    )
    assert text.startswith("x.toml: 4 problems")
    for part in ("adapter.r = 0", "micro_batch_size = 0", 'training.keep = "best"', "data.name"):
        assert part in text
    # a value that is wrong alone is not blamed twice
    assert problems_of(MINIMAL | {"training": {"micro_batch_size": 0}}).startswith("x.toml: 1 problem\n")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("adapter.r", 513, "from 1 to 512"),
        ("adapter.r", True, "from 1 to 512"),
        ("adapter.r", "32", "from 1 to 512"),
        ("adapter.alpha", 0, "a number above 0"),
        ("adapter.alpha", float("inf"), "a number above 0"),
        ("adapter.dropout", 1.0, "not including, 1"),
        ("adapter.method", "dense-lora", 'did you mean "denselora"?'),
        ("adapter.activation", "relu", "zero slope at 0"),
        ("adapter.alpha", 1e308, "at most a million"),
        ("training.seed", 2**32, "a whole number from 0 to 4294967295"),
        ("data.seed", 2**63, "a whole number from 0 to 4294967295"),
        ("training.epochs", 1e308, "at most a million"),
        ("training.batch_size", 2**63, "at most a million"),
        ("training.max_steps", 2**63, "at most a billion"),
        ("training.max_grad_norm", 5e-324, "a number from 1e-6 to a million"),
        ("training.learning_rate", 5e-324, "a number from 1e-12 to below 1"),
        ("training.weight_decay", 1e300, "a number from 0 to 1000"),
        ("data.max_length", 2**40, "a whole number of tokens from 8 to 4194304"),
        ("adapter.layer_groups", 0, "a whole number of groups"),
        ("adapter.init", "balance", "paper (M as the authors draw it) or balanced"),
        ("training.rates", {"encoder": 0}, "a table of factors on the learning rate"),
        ("adapter.target_modules", "QX", "the letters are Q (q_proj)"),
        ("adapter.target_modules", "QQ", "each once"),
        ("adapter.target_modules", [], "module names"),
        ("data.fraction", 0, "above 0, at most 1"),
        ("data.fraction", 1.5, "above 0, at most 1"),
        ("data.template", "alpacca", "auto: chat for conversations"),
        ("training.learning_rate", float("nan"), "from 1e-12 to below 1"),
        ("training.optimizer", "sgd", "paged_adamw_8bit"),
        ("training.keep", "first", "best (lowest validation loss) or last"),
        ("model.quantization", "gptq", "nf4, int8 or none"),
        ("model.name", "./nowhere", "no such folder"),
        ("output.dir", "", "a folder"),
    ],
)
def test_each_bad_value_is_named_with_what_is_accepted(key, value, message):
    heading, problem = problems_of(with_value(key, value)).split("\n")
    assert heading == "x.toml: 1 problem"
    assert problem.startswith(f"  {key} = ")
    assert message in problem.removeprefix(f"  {key} = ")


@pytest.mark.parametrize(
    ("adapter", "training", "problem"),
    [
        ({"init": "balanced", "zero_init": "m"}, {}, 'adapter.init = "balanced"   needs adapter.zero_init = "decoder"'),
        ({"layer_groups": 2, "sharing": "none"}, {}, "adapter.layer_groups = 2   must be 1 with adapter.sharing"),
        (
            {},
            {"rates": {"decoders": 4.0}},
            'training.rates.decoders   denselora trains no such tensors; did you mean "decoder"?',
        ),
    ],
)
def test_settings_of_denselora_that_do_not_fit_together(adapter, training, problem):
    tables = {"model": {"name": "llama3-8b"}, "data": {"name": "math10k"}, "adapter": adapter, "training": training}
    assert f"  {problem}" in problems_of(tables)


def test_missing_tables_and_data_are_named():
    heading, *problems = problems_of({}).split("\n")
    assert heading == "x.toml: 2 problems"
    assert [problem.split()[:3] for problem in problems] == [["model", "is", "missing:"], ["data", "is", "missing:"]]
    heading, problem = problems_of({"model": {"name": "llama3-8b"}, "data": {}}).split("\n")
    assert problem.startswith("  data.name   is missing")


def test_letters_and_names_mean_the_same():
    letters = recipe_from_tables(with_value("adapter.target_modules", "QVD"), "x")
    names = recipe_from_tables(with_value("adapter.target_modules", ["q_proj", "v_proj", "down_proj"]), "x")
    assert letters.adapter == names.adapter


def test_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(tomli_w.dumps(MINIMAL))
    recipe = load_recipe(
        path, ["adapter.r=64", "data.path=a b.json", "training.keep=last", "training.max_steps=20", "data.fraction=0.1"]
    )
    assert (recipe.adapter.r, recipe.adapter.scaling_alpha) == (64, 128)
    assert (recipe.data.path, recipe.data.fraction) == ("a b.json", 0.1)
    assert (recipe.training.keep, recipe.training.max_steps) == ("last", 20)


@pytest.mark.parametrize("override", ["adapter.r", "r=3", "adapter.=3", "=3", "model.name.x=1"])
def test_malformed_overrides_are_refused(tmp_path, override):
    path = tmp_path / "r.toml"
    path.write_text(tomli_w.dumps(MINIMAL))
    with pytest.raises(RecipeError, match="--set"):
        load_recipe(path, [override])


def test_resolved_recipe_is_a_recipe_and_stays_itself():
    recipe = recipe_from_tables(with_value("adapter.r", 16), "x")
    tables = tomllib.loads(tomli_w.dumps(recipe.resolved()))
    again = recipe_from_tables(tables, "y")
    assert again.resolved() == recipe.resolved()
    assert again.resolved()["adapter"]["alpha"] == 32


@pytest.mark.parametrize("content", [b"[model", b"\xff\xfe", b"model = 3"])
def test_unreadable_files_are_errors_not_tracebacks(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"bad\.toml"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="no such file, and no built-in recipe"):
        load_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize("value", ['"some"', "-1", "2.5", "true", "[1]"])
def test_alternatives_are_listed_in_one_line(value):
    import tomllib

    settings = tomllib.loads(f"micro_batch_size = {value}\nrecompute = {value}")
    text = problems_of(MINIMAL | {"training": settings})
    assert text.startswith("x.toml: 2 problems\n")
    assert 'or "auto": as many as the memory allows' in text
    assert 'or "auto": as few as the memory allows' in text


def test_the_name_of_others_for_recomputation_is_understood():
    text = problems_of(MINIMAL | {"training": {"gradient_checkpointing": True}})
    assert "training.gradient_checkpointing   is called training.recompute here" in text
    text = problems_of(MINIMAL | {"training": {"lr": 1e-3}, "adapter": {"lora_r": 8, "method": "qlora"}})
    assert "training.lr                is called training.learning_rate here" in text
    assert "adapter.lora_r             is called adapter.r here" in text
    assert 'QLoRA is a LoRA on a 4-bit base: adapter.method = "lora"' in text


def test_values_by_dotted_key():
    tables = {"adapter": {"r": 16, "adalora": {"cut_every": 1}}, "data": {}, "x": [{"y": 1}]}
    assert flattened(tables) == {"adapter.r": 16, "adapter.adalora.cut_every": 1, "x": [{"y": 1}]}


def test_choices_are_what_differs_from_the_defaults():
    recipe = recipe_of(adapter__r=16, adapter__alpha=32, training__seed=42, training__epochs=1)
    assert recipe.choices() == {
        "model": {"name": "llama3-8b"},
        "adapter": {"r": 16},
        "data": {"name": "wordproblems"},
        "training": {"epochs": 1.0},
    }


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".toml"])
def test_a_name_longer_than_a_file_can_have_is_an_unknown_recipe(name):
    with pytest.raises(RecipeError, match=r"no such file, and no built-in recipe; known: ") as caught:
        load_recipe(name)
    assert len(str(caught.value)) < 1000
