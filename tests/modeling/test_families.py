"""Every family of models: it trains, packs exactly, has a right loss and is planned; what cannot be is refused with a reason."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from qdense.catalogs.families import FAMILIES, PAPER_TARGET_MODULES
from qdense.compat.transformers import is_recomputable
from qdense.data.examples import collate, join
from qdense.errors import ModelError
from qdense.events import Notice, StepDone
from qdense.inference.generation import DECODINGS, Prompt, generate
from qdense.modeling.load import load_base
from qdense.modeling.loss import without_logits
from qdense.modeling.packing import packed_attention, why_not_packed
from qdense.planning.memory import base_bytes
from qdense.planning.parameters import count_parameters
from qdense.planning.shapes import model_shape
from qdense.recipe import AdapterRecipe, ModelRecipe
from tests.helpers.models import family_config, make_family_model
from tests.helpers.packed import arguments, examples_of
from tests.helpers.runs import recipe_for, run

ALL = sorted(FAMILIES)
PACKED = [name for name in ALL if not FAMILIES[name].why_not_packed]
WITH_EXPERTS = [name for name in ALL if FAMILIES[name].has_experts]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folders with tiny models, each made once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(model_type, **changes):
        key = json.dumps([model_type, changes], sort_keys=True)
        if key not in made:
            made[key] = make_family_model(model_type, root / f"{model_type}-{len(made)}", **changes)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDENSE_CACHE", str(root / "cache"))
        yield folder


def exact_model(model_type):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(model_type)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # scores that differ, so that what a token sees is visible in its logits
    return model.eval()


@pytest.mark.parametrize("model_type", ALL)
def test_its_layers_have_the_modules_of_the_registry(model_type):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family_config(model_type))
    layers = [module for module in model.modules() if is_recomputable(module)]
    found = {name.rpartition(".")[2] for name, module in layers[0].named_modules() if isinstance(module, nn.Linear)}
    family = FAMILIES[model_type]
    assert set(family.modules) <= found
    assert family.has_experts or set(family.modules) == found


@pytest.mark.parametrize("model_type", PACKED)
def test_packed_rows_are_exact_within_their_window_too(model_type):
    model, rows = exact_model(model_type), examples_of(17, 40, 1, 30)
    assert why_not_packed(model) is None
    with torch.no_grad():
        singles = [model(**arguments(collate([row], 0)), use_cache=False).logits[0] for row in rows]
        with packed_attention(model):
            packed = model(**arguments(join(rows)), use_cache=False).logits[0]
    torch.testing.assert_close(packed, torch.cat(singles), rtol=1e-4, atol=1e-5)


def test_a_window_changes_what_a_long_row_sees():
    """Without it, the test above could not fail."""
    with_window, without = exact_model("mistral"), exact_model("mistral")
    without.config.sliding_window = None
    batch = arguments(collate(examples_of(40), 0))
    with torch.no_grad():
        first, second = (model(**batch, use_cache=False).logits[0] for model in (with_window, without))
    torch.testing.assert_close(first[:24], second[:24])
    assert (first[24:] - second[24:]).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ALL)
def test_the_loss_is_that_of_the_model_itself(model_type):
    model, batch = exact_model(model_type), arguments(collate(examples_of(17, 40), 0))
    embeddings = model.get_input_embeddings().weight
    results = []
    for is_ours in (False, True):
        embeddings.grad = None
        with without_logits(model) if is_ours else nullcontext():
            loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(10.0)).loss
            loss.backward()
        results.append((loss.detach(), embeddings.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("model_type", ALL)
def test_it_trains_on_nf4_and_is_counted(model_type, folder_of, tmp_path):
    folder, family = folder_of(model_type), FAMILIES[model_type]
    modules = {"adapter__target_modules": "QKVO"} if family.has_experts else {}
    recipe = recipe_for(folder, tmp_path / "run", training__max_steps=3, adapter__r=4, **modules)
    events = run(recipe)
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    notices = " ".join(event.text for event in events if isinstance(event, Notice))
    assert ("rows are padded" in notices) == bool(family.why_not_packed)
    assert ("as one module" in notices) == ("gate_up_proj" in family.modules)
    trained = sum(tensor.numel() for tensor in load_file(tmp_path / "run/adapter/adapter_model.safetensors").values())
    shape = model_shape(str(folder))
    assert count_parameters(shape, recipe.adapter).trainable_parameters == trained
    # The plan's weights are those in memory; norms of heads and biases are too small to be counted.
    model = load_base(recipe.model).model
    tables = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    held = sum(p.nbytes for p in model.parameters() if id(p) not in tables)
    assert base_bytes(recipe.model, shape)[0] == pytest.approx(held, rel=0.06)


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_experts_are_refused_with_the_reason(model_type, folder_of):
    with pytest.raises(ModelError, match=r'up_proj, down_proj .* belong to experts.*target_modules = "QKVO"'):
        count_parameters(str(folder_of(model_type)), AdapterRecipe())


def test_an_unknown_family_runs_padded_with_the_modules_that_one_names(folder_of, tmp_path):
    folder = folder_of("gpt_neox")
    with pytest.raises(ModelError, match=r"has no linear module q_proj.*query_key_value.*name those to adapt"):
        run(recipe_for(folder, tmp_path / "refused"))
    modules = ["query_key_value", "dense_h_to_4h"]
    events = run(recipe_for(folder, tmp_path / "run", training__max_steps=3, adapter__target_modules=modules))
    notices = " ".join(event.text for event in events if isinstance(event, Notice))
    assert '"gpt_neox" is not among the families' in notices
    assert "rows are padded" in notices


def test_a_model_without_linear_modules_is_refused(folder_of):
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no list of layers with linear modules"):
        model_shape(str(folder_of("gpt2", head_dim=None)))


def test_defaults_that_config_json_leaves_out_are_the_family_s(folder_of, tmp_path):
    folder = tmp_path / "gemma"
    shutil.copytree(folder_of("gemma3_text"), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["head_dim"], config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    shape = model_shape(str(folder))
    assert (shape.head_dim, shape.has_tied_embeddings) == (256, True)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_missing_weights_are_refused(folder_of, tmp_path, quantization):
    """Transformers would go on with random values."""
    folder = tmp_path / "model"
    shutil.copytree(folder_of("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 weight of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(ModelRecipe(name=str(folder), device="cpu", quantization=quantization))


def test_of_a_model_of_images_and_text_the_decoder_is_loaded(folder_of, tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = family_config("gemma3_text")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    )
    folder = tmp_path / "whole"
    shutil.copytree(folder_of("gemma3_text"), folder)
    whole.bfloat16().save_pretrained(folder)
    for quantization in ("none", "nf4", "nf4"):  # the third is the second's, cached
        recipe = ModelRecipe(name=str(folder), device="cpu", quantization=quantization)
        model = load_base(recipe, for_training=False).model
        assert model.config.model_type == "gemma3_text"
        found = model.get_input_embeddings().weight
        torch.testing.assert_close(found, whole.model.language_model.embed_tokens.weight, rtol=0, atol=0)
        if quantization == "none":
            expected = whole.model.language_model.layers[1].mlp.up_proj.weight
            torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight, expected, rtol=0, atol=0)
    assert model_shape(str(folder)).num_layers == text.num_hidden_layers


def test_paper_modules_are_renamed_where_a_family_holds_them_as_one():
    adapter = AdapterRecipe(target_modules=PAPER_TARGET_MODULES)
    assert adapter.on("phi3").target_modules == ("qkv_proj", "gate_up_proj", "down_proj")
    assert adapter.on("glm4").target_modules == ("q_proj", "k_proj", "v_proj", "gate_up_proj", "down_proj")
    assert adapter.on("llama") is adapter
    assert adapter.on("never_heard_of") is adapter


GENERATED = [(name, False) for name in ALL] + [(name, True) for name in PACKED]


@pytest.mark.parametrize(("model_type", "is_recorded"), GENERATED)
def test_completions_are_those_of_transformers_beyond_the_window_too(model_type, is_recorded, folder_of):
    recipe = ModelRecipe(name=str(folder_of(model_type)), device="cpu", quantization="none", dtype="float32")
    base = load_base(recipe, for_training=False)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.mul_(4)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 40, (10,), generator=generator).tolist()
    prompts = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in lengths]
    settings = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=256, pad_token_id=257, use_cache=True)
    expected = []
    for ids in prompts:
        given = torch.tensor([ids])
        output = base.model.generate(input_ids=given, attention_mask=torch.ones_like(given), generation_config=settings)
        expected.append(base.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    found = {
        completion.index: completion.completion
        for completion in generate(
            base,
            base.model,
            [Prompt(index, 0, ids) for index, ids in enumerate(prompts)],
            DECODINGS["greedy"],
            max_new_tokens=12,
            stop=(),
            batch_size=4,
            is_recorded=is_recorded,
        )
    }
    assert len(set("".join(expected))) > 5
    assert [found[index] for index in range(len(prompts))] == expected
