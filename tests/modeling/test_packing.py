"""Packed rows against padded and single ones: same logits, losses and gradients, and no row sees another."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch

from qdense.data.examples import collate, join, pack
from qdense.errors import RunError
from qdense.events import Notice, StepDone, Validated
from qdense.modeling.load import load_base
from qdense.modeling.loss import without_logits
from qdense.modeling.packing import packed_attention, why_not_packed
from qdense.ops.cross_entropy import IGNORED
from qdense.recipe import ModelRecipe
from tests.helpers.memory import refuse_memory
from tests.helpers.packed import arguments, example, examples_of
from tests.helpers.runs import adapter_bytes, recipe_for, run

EXACT = {"quantization": "none", "model__dtype": "float32", "adapter__dtype": "float32", "adapter__dropout": 0.0}


@pytest.mark.parametrize("seed", range(50))
def test_packs_hold_every_example_once_within_the_budget(seed):
    generator = np.random.default_rng(seed)
    lengths, budget = generator.integers(1, 51, generator.integers(1, 41)), int(generator.integers(1, 121))
    packs = pack(examples_of(*lengths), budget)
    assert sorted(e.row for group in packs for e in group) == list(range(len(lengths)))
    sizes = [sum(len(e.input_ids) for e in group) for group in packs]
    assert all(size <= budget or len(group) == 1 for size, group in zip(sizes, packs, strict=True))
    # First fit never leaves two packs that would fit into one.
    assert all(a + b > budget for i, a in enumerate(sizes) for b in sizes[:i])


def test_join_marks_where_rows_begin():
    batch = join(examples_of(5, 1, 3))
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 6, 9]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2]]
    assert [batch["labels"][0, i].item() for i in (0, 5, 6)] == [IGNORED] * 3
    assert (batch["max_length_q"], batch["num_tokens"], batch["rows"]) == (5, 9, [0, 1, 2])


@pytest.fixture(scope="module")
def base(tiny_model):
    return load_base(ModelRecipe(name=str(tiny_model), device="cpu", quantization="none", dtype="float32"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_give_the_logits_and_gradients_of_single_ones(base, checkpointing):
    model = base.model
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    rows = examples_of(17, 40, 1, 9)
    try:
        singles = []
        for row in rows:
            output = model(**arguments(collate([row], 0)), use_cache=False, num_items_in_batch=torch.tensor(10.0))
            if len(row.input_ids) > 1:
                output.loss.backward()
            singles.append(output.logits[0])
        expected, weight.grad = weight.grad, None
        with packed_attention(model):
            batch = join(rows)
            logits = model(**arguments(batch), use_cache=False).logits[0]
            with without_logits(model):
                model(**arguments(batch), use_cache=False, num_items_in_batch=torch.tensor(10.0)).loss.backward()
        torch.testing.assert_close(logits, torch.cat(singles), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-6)
    finally:
        model.gradient_checkpointing_disable()
        weight.requires_grad_(False)
        weight.grad = None
        model.eval()


def test_no_row_sees_another(base):
    first, second, other = example(12, 0), example(20, 1), example(12, 2)
    with torch.no_grad(), packed_attention(base.model):
        one, two = (base.model(**arguments(join([e, second])), use_cache=False).logits[0, 12:] for e in (first, other))
    assert torch.equal(one, two)
    base.model(input_ids=torch.tensor([[1, 2]]))  # which the attention of packed rows would refuse


def test_a_mask_is_refused_and_so_are_models_with_more_than_causal_attention(base):
    mask = torch.zeros(1, 1, 5, 5)
    with packed_attention(base.model), pytest.raises(ValueError, match="no attention mask"):
        base.model(**arguments(join([example(5)])), attention_mask=mask, use_cache=False)
    assert why_not_packed(base.model) is None
    for reason, config in {
        "soft-caps": {"model_type": "gemma2"},
        "drops attention weights": {"model_type": "llama", "attention_dropout": 0.1},
        "not causal": {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "not tested for gpt_neox": {"model_type": "gpt_neox"},
    }.items():
        assert reason in why_not_packed(Namespace(config=Namespace(**config)))


def losses(events, kind):
    return [event.loss for event in events if isinstance(event, kind)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_does_not_change_training(tiny_model, tmp_path, checkpointing):
    runs = {}
    for packing in (False, True):
        settings = {"training__packing": packing, "training__recompute": "all" if checkpointing else "none"}
        recipe = recipe_for(tiny_model, tmp_path / str(packing), **EXACT, **settings)
        runs[packing] = run(recipe)
    for kind in (StepDone, Validated):
        assert losses(runs[True], kind) == pytest.approx(losses(runs[False], kind), rel=1e-5)
    norms = [[event.grad_norm for event in events if isinstance(event, StepDone)] for events in runs.values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    tokens = [[event.num_tokens for event in events if isinstance(event, StepDone)] for events in runs.values()]
    assert tokens[0] == tokens[1]


def test_models_that_cannot_be_packed_are_padded_and_say_so(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "dropping")
    config = json.loads((tmp_path / "dropping" / "config.json").read_text())
    (tmp_path / "dropping" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    events = run(recipe_for(tmp_path / "dropping", tmp_path / "run", training__max_steps=1))
    told = [event.text for event in events if isinstance(event, Notice) and "rows are padded" in event.text]
    assert len(told) == 1
    assert "it drops attention weights in training; rows are padded" in told[0]


def test_memory_that_runs_out_halves_the_micro_batches_and_nothing_else(tiny_model, tmp_path, monkeypatch):
    """The run ends as one that had the smaller micro-batches from the start; a resumed one keeps them."""
    settings = {"training__micro_batch_size": 4, "training__packing": False, "training__max_steps": 4}
    small = {**settings, "training__micro_batch_size": 2}
    expected = run(recipe_for(tiny_model, tmp_path / "small", **small))
    refused = refuse_memory(monkeypatch, lambda model, input_ids: model.training and len(input_ids) > 2)
    events = run(recipe_for(tiny_model, tmp_path / "starved", **settings))
    assert refused == [4]
    told = [event.text for event in events if isinstance(event, Notice) and "out of memory" in event.text]
    assert len(told) == 1
    assert "step 1: " in told[0]
    assert "training.micro_batch_size = 2" in told[0]
    assert losses(events, StepDone) == losses(expected, StepDone)
    assert adapter_bytes(tmp_path / "starved") == adapter_bytes(tmp_path / "small")

    shutil.rmtree(tmp_path / "starved" / "adapter")
    shutil.rmtree(tmp_path / "starved" / "checkpoints" / "checkpoint-4")
    run(recipe_for(tiny_model, tmp_path / "starved", **settings), resume=True)
    assert refused == [4]
    assert adapter_bytes(tmp_path / "starved") == adapter_bytes(tmp_path / "small")


def test_memory_that_runs_out_with_single_rows_has_all_layers_recomputed(tiny_model, tmp_path, monkeypatch):
    def keeps_a_layer(model, input_ids):
        return model.training and not all(layer.gradient_checkpointing for layer in model.model.layers)

    settings = {"training__micro_batch_size": 1, "training__max_steps": 2}
    expected = run(recipe_for(tiny_model, tmp_path / "expected", **settings))
    refused = refuse_memory(monkeypatch, keeps_a_layer)
    events = run(recipe_for(tiny_model, tmp_path / "starved", **settings, training__recompute="auto"))
    assert refused == [1]
    (told,) = [event.text for event in events if isinstance(event, Notice) and "out of memory" in event.text]
    assert 'training.recompute = "all"' in told
    assert losses(events, StepDone) == losses(expected, StepDone)
    assert adapter_bytes(tmp_path / "starved") == adapter_bytes(tmp_path / "expected")


def test_memory_that_runs_out_with_single_rows_stops_the_run(tiny_model, tmp_path, monkeypatch):
    refuse_memory(monkeypatch, lambda model, input_ids: True)
    told = r"step 1: out of memory, one row at a time.*Planned: .* GiB.*used at most: .* GiB of .* GiB.*data.max_length"
    with pytest.raises(RunError, match=told):
        run(recipe_for(tiny_model, tmp_path / "run"))
