"""A float16 base: its loss is scaled, steps that overflow are repeated, and a resumed run is the same one."""

from __future__ import annotations

import pytest
import torch

from qdense.cli import main
from qdense.errors import RecipeError
from qdense.events import StepDone
from qdense.recipe import load_recipe, recipe_from_tables
from qdense.runs import RunFolder
from qdense.training import loss_scale
from qdense.training import run as run_module
from qdense.training.checkpoint import Checkpoint
from qdense.training.loop import TrainingLoop
from qdense.training.loss_scale import LossScale
from tests.helpers.recipes import recipe_of
from tests.helpers.runs import adapter_bytes, killed_run, recipe_for, run

HALF = {"model__dtype": "float16"}


def losses(events):
    return [event.loss for event in events if isinstance(event, StepDone)]


def checkpoint_of(folder):
    newest = max(RunFolder(folder).checkpoints.iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    return Checkpoint.load(newest)


def test_the_scale_halves_on_overflow_and_doubles_after_good_steps(monkeypatch):
    monkeypatch.setattr(loss_scale, "_GOOD_STEPS", 3)
    scale = LossScale(is_used=True)
    first = scale.value
    overflown = [torch.ones(2), None, torch.tensor([1.0, torch.inf])]
    assert scale.halves_for(overflown)
    assert scale.value == first / 2
    assert overflown[0].tolist() == [1, 1]  # the step is repeated
    for _ in range(3):
        gradient = torch.full((3,), scale.value)
        assert not scale.halves_for([gradient, None])
        assert gradient.tolist() == [1, 1, 1]
        scale.grow()
    assert scale.value == first
    again = LossScale(is_used=True)
    again.restore(scale.state())
    assert (again.value, again.num_good) == (scale.value, scale.num_good)


def test_gradients_that_no_scale_mends_are_left_to_the_watch():
    scale, nan = LossScale(is_used=True), [torch.tensor([torch.nan])]
    halved = 0
    while scale.halves_for(nan):
        halved += 1
    assert scale.value == 1
    assert halved == 16


def test_it_is_not_used_elsewhere():
    scale, gradient = LossScale(is_used=False), torch.tensor([torch.inf, 2.0])
    assert not scale.halves_for([gradient])
    scale.grow()
    assert (scale.value, gradient[1], scale.state()) == (1, 2, None)


def test_a_float16_run_learns_as_a_float32_run_does(tiny_model, tmp_path):
    settings = {"adapter__dropout": 0.0, "adapter__dtype": "float32", "training__max_steps": 8}
    found = losses(run(recipe_for(tiny_model, tmp_path / "half", **HALF, **settings)))
    expected = losses(run(recipe_for(tiny_model, tmp_path / "whole", model__dtype="float32", **settings)))
    assert found == pytest.approx(expected, rel=2e-3)
    assert found[-1] < found[0]


def test_small_gradients_survive(tiny_model, tmp_path, monkeypatch):
    """Without a scale, a loss of very many labels would have gradients below float16's smallest number."""
    norms = {}
    original = TrainingLoop.token_loss

    def as_if_of_many_labels(self, model, batch, num_labels):
        return original(self, model, batch, num_labels * 10**6)

    monkeypatch.setattr(TrainingLoop, "token_loss", as_if_of_many_labels)
    for dtype in ("float16", "float32"):
        settings = {
            "model__dtype": dtype,
            "adapter__dtype": "float32",
            "adapter__dropout": 0.0,
            "training__max_steps": 1,
        }
        (done,) = [e for e in run(recipe_for(tiny_model, tmp_path / dtype, **settings)) if isinstance(e, StepDone)]
        norms[dtype] = done.grad_norm
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.02)


def test_an_overflow_is_repeated_and_a_killed_run_resumes_exactly(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "_FIRST", 2.0**40)
    monkeypatch.setattr(loss_scale, "_GOOD_STEPS", 2)
    settings = {**HALF, "adapter__dropout": 0.1}
    events = run(recipe_for(tiny_model, tmp_path / "whole", **settings))
    assert len(losses(events)) == 6  # no step is left out
    scale = checkpoint_of(tmp_path / "whole").values["loss_scale"]
    assert scale["value"] < 2.0**40
    killed_run(recipe_for(tiny_model, tmp_path / "killed", **settings), step=5)
    run(recipe_for(tiny_model, tmp_path / "killed", **settings), resume=True)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")
    assert checkpoint_of(tmp_path / "killed").values["loss_scale"] == scale


def test_what_auto_stands_for():
    recipe = recipe_of()
    assert (recipe.model.dtype, recipe.adapter.dtype) == ("auto", "auto")
    for has_bfloat16, expected in ((True, ("bfloat16", "bfloat16")), (False, ("float16", "float32"))):
        settled = recipe.settled(has_bfloat16=has_bfloat16)
        assert (settled.model.dtype, settled.adapter.dtype) == expected
        assert settled.has_masters == has_bfloat16
        assert settled.settled(has_bfloat16=not has_bfloat16) == settled
    assert recipe_of(model__dtype="float16").settled(has_bfloat16=True).adapter.dtype == "float32"
    assert recipe.choices() == recipe.settled(has_bfloat16=True).choices()  # results of before have the same key


def test_a_run_goes_on_in_the_dtype_that_it_began_in(tiny_model, tmp_path, monkeypatch):
    """Also on a card where "auto" stands for another."""
    killed_run(recipe_for(tiny_model, tmp_path / "run"), step=3)
    monkeypatch.setattr(run_module, "has_bfloat16", lambda device: False)
    run(recipe_for(tiny_model, tmp_path / "run"), resume=True)
    assert load_recipe(RunFolder(tmp_path / "run").recipe).model.dtype == "bfloat16"
    run(recipe_for(tiny_model, tmp_path / "new"))
    recipe = load_recipe(RunFolder(tmp_path / "new").recipe)
    assert (recipe.model.dtype, recipe.adapter.dtype) == ("float16", "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"dtype": "bfloat16"}}, r'adapter.dtype = "bfloat16" .*a float16 base has float32 adapters'),
        ({"adapter": {"method": "full"}}, r"cannot be trained by full, whose weights would be float16"),
    ],
)
def test_combinations_that_cannot_train(changes, message):
    tables = {"model": {"name": "smollm2-135m", "dtype": "float16"}, "data": {"name": "wordproblems"}}
    with pytest.raises(RecipeError, match=message):
        recipe_from_tables(tables | changes, source="test")


def test_it_evaluates_in_float16(tiny_model, tmp_path, capsys):
    run(recipe_for(tiny_model, tmp_path / "run", **HALF, training__max_steps=2))
    arguments = ["evaluate", "wordproblems", "--adapter", str(tmp_path / "run"), "--limit", "2", "--decoding", "greedy"]
    assert main([*arguments, "--max-new-tokens", "4", "--json", "--quiet"]) == 0
    assert '"dtype": "float16"' in capsys.readouterr().out
