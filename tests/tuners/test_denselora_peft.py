"""DenseLoRA through PEFT's own interface, on float, NF4 and 8-bit bases."""

import copy
import gc
import weakref

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_model_status, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, OPTConfig, Phi3Config, pipeline

from qdense import DenseLoraConfig
from qdense.ops.denselora import denselora_delta
from qdense.tuners.denselora import DenseLoraLinear
from tests.helpers.models import make_tiny_model, tiny_config
from tests.helpers.tuners import TOKENS, fresh_base, logits


def adapted(tiny_model, quantization="none", dtype="float32", **settings):
    torch.manual_seed(7)
    settings = {
        "r": 4,
        "init_weights": False,
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    } | settings
    return get_peft_model(fresh_base(tiny_model, quantization, dtype), DenseLoraConfig(**settings))


def test_layer_computes_the_equation(tiny_model):
    model = adapted(tiny_model, alpha=6.0).eval()
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    assert isinstance(layer, DenseLoraLinear)
    pair = model.base_model.denselora_shared["default"]["down_proj"]
    x = torch.randn(3, 128)
    expected = layer.base_layer(x) + denselora_delta(
        x, pair.encoder, layer.denselora_m["default"], pair.decoder, scaling=6.0 / 4
    )
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def delta_of(layer, x):
    pair = layer.shared["default"]
    return denselora_delta(
        x, pair.encoder, layer.denselora_m["default"], pair.decoder, scaling=layer.scaling["default"]
    )


def test_layers_given_another_input_than_their_siblings_encode_their_own(tiny_model):
    """q, k and v encode one input together; of two tensors, whatever their shapes, neither's encoding serves the other."""
    attention = adapted(tiny_model).eval().base_model.model.model.layers[0].self_attn
    x, y = torch.randn(2, 3, 64)
    assert torch.equal(attention.q_proj(x), attention.q_proj.base_layer(x) + delta_of(attention.q_proj, x))
    assert torch.equal(attention.k_proj(y), attention.k_proj.base_layer(y) + delta_of(attention.k_proj, y))
    assert torch.equal(attention.v_proj(x), attention.v_proj.base_layer(x) + delta_of(attention.v_proj, x))


@pytest.mark.parametrize(
    ("block", "kinds"), [("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))]
)
def test_layers_that_read_the_same_input_share_its_dropout_mask(tiny_model, block, kinds):
    model = adapted(tiny_model, target_modules=list(kinds), dropout=0.5).train()
    layers = [model.get_submodule(f"base_model.model.model.layers.0.{block}.{kind}") for kind in kinds]
    for layer in layers:  # of ones: each element of an encoding is the sum of what is kept of the input
        with torch.no_grad():
            layer.shared["default"].encoder.fill_(1.0)
    x = torch.arange(1.0, 65.0).expand(20, 64).contiguous()
    encodings = [layer.shared_input.encode(layer, "default", x)[1] for layer in layers]
    for encoding in encodings[1:]:
        # Each element of an encoding is dropped for itself: where both are there, they are of the same masked input.
        both = (encoding != 0) & (encodings[0] != 0)
        assert both.any()
        assert torch.equal(encoding[both], encodings[0][both])


def test_shared_tensors_are_one_object_and_saved_once(tiny_model, tmp_path):
    model = adapted(tiny_model)
    layers = model.base_model.model.model.layers
    assert layers[0].self_attn.q_proj.shared["default"] is layers[1].self_attn.q_proj.shared["default"]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "encoder" in name]
    assert len(names) == 5  # one for each module kind
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as saved:
        keys = set(saved.keys())
        num_saved = sum(saved.get_tensor(key).numel() for key in keys)
    assert len(keys) == 5 * 2 + 5 * 2  # pairs, and M for each kind and layer
    assert not any("default" in key for key in keys)
    assert num_saved == model.get_nb_trainable_parameters()[0]
    # (d_in + d_out + l r) r for each kind: q 64+64, k and v 64+32, up and down 64+128, l = 2, r = 4
    assert num_saved == (128 + 96 + 96 + 192 + 192 + 5 * 2 * 4) * 4


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_give_the_same_logits(tiny_model, tmp_path, quantization, low_cpu_mem_usage):
    dtype = "float32" if quantization == "none" else "bfloat16"
    model = adapted(tiny_model, quantization, dtype)
    base_logits = logits(fresh_base(tiny_model, quantization, dtype))
    expected = logits(model)
    assert not torch.equal(expected, base_logits)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        fresh_base(tiny_model, quantization, dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(loaded), expected)
    assert [name for name, parameter in loaded.named_parameters() if parameter.requires_grad] == []
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), base_logits)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_every_kind_learns(tiny_model, quantization):
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    dtype = "float32" if quantization == "none" else "bfloat16"
    model = adapted(tiny_model, quantization, dtype, target_modules=kinds)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 7 * 2 + 7 * 2
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_gradients_sum_over_the_layers_that_share(tiny_model):
    model = adapted(tiny_model, target_modules=["v_proj"])
    pair = model.base_model.denselora_shared["default"]["v_proj"]
    layers = model.base_model.model.model.layers
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    together = pair.encoder.grad.clone()
    parts = []
    for active in range(2):
        model.zero_grad()
        # the other layer gets a copy of the pair, so that its gradient goes elsewhere
        layers[1 - active].self_attn.v_proj.shared["default"] = copy.deepcopy(pair)
        layers[active].self_attn.v_proj.shared["default"] = pair
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        parts.append(pair.encoder.grad.clone())
    torch.testing.assert_close(parts[0] + parts[1], together)


def test_fresh_adapter_adds_nothing(tiny_model):
    model = adapted(tiny_model, init_weights=True)
    assert torch.equal(logits(model), logits(fresh_base(tiny_model)))


def test_several_adapters_switch_and_go(tiny_model, tmp_path):
    model = adapted(tiny_model)
    first = logits(model)
    model.add_adapter("second", DenseLoraConfig(r=2, init_weights=False, target_modules=["q_proj", "o_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("second" in name for name in trainable)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh_base(tiny_model), tmp_path / "second")
    assert torch.equal(logits(loaded), second)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any("default" in name for name, _ in model.named_parameters())
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), logits(fresh_base(tiny_model)))


def test_adding_an_adapter_leaves_a_frozen_one_frozen(tiny_model, tmp_path):
    adapted(tiny_model).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh_base(tiny_model), tmp_path)
    model.add_adapter("second", DenseLoraConfig(r=2, target_modules=["q_proj"]))
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "default" in name)


def test_disabling_restores_what_was_trainable(tiny_model):
    model = adapted(tiny_model)
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with model.disable_adapter():
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before


def test_autocast_makes_bf16_adapters_fp32_and_can_be_switched_off(tiny_model):
    base = fresh_base(tiny_model, dtype="bfloat16")
    config = DenseLoraConfig(r=4, target_modules=["q_proj"])
    kept = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    cast = get_peft_model(copy.deepcopy(base), config)
    assert {p.dtype for p in kept.parameters() if p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in cast.parameters() if p.requires_grad} == {torch.float32}
    assert logits(cast).dtype == torch.bfloat16


def test_deepcopy_shares_within_itself_only(tiny_model):
    model = adapted(tiny_model)
    twin = copy.deepcopy(model)
    layers = twin.base_model.model.model.layers
    pair = twin.base_model.denselora_shared["default"]["q_proj"]
    assert layers[0].self_attn.q_proj.shared["default"] is pair
    assert pair is not model.base_model.denselora_shared["default"]["q_proj"]
    assert torch.equal(logits(twin), logits(model))


def test_merging_is_refused_with_activations(tiny_model):
    with pytest.raises(ValueError, match=r"cannot be merged.*gelu.*not a matrix"):
        adapted(tiny_model).merge_and_unload()


@pytest.mark.parametrize("activation", ["gelu", "tanh", "silu"])
def test_a_layer_with_an_activation_has_no_matrix(tiny_model, activation):
    layer = adapted(tiny_model, activation=activation).get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with pytest.raises(ValueError, match=r"cannot be merged \(default\): it is not a matrix"):
        layer.get_delta_weight("default")


def test_an_input_is_let_go_once_all_that_read_it_have_run(tiny_model):
    """Also where one that would read it is off, or has its adapter in its weight."""
    config = DenseLoraConfig(r=4, activation="none", target_modules=["q_proj", "k_proj", "v_proj"])
    for switch_off in (lambda layer: None, lambda layer: layer.enable_adapters(False), lambda layer: layer.merge()):
        attention = get_peft_model(fresh_base(tiny_model), config).base_model.model.model.layers[0].self_attn
        switch_off(attention.q_proj)
        x = torch.randn(1, 3, 64)
        with torch.no_grad():
            for layer in (attention.k_proj, attention.q_proj, attention.v_proj):
                layer(x)
        reference = weakref.ref(x)
        del x
        assert reference() is None


@pytest.mark.parametrize("zero_init", ["decoder", "m", "none"])
def test_factors_are_drawn_by_kaimings_rule_but_for_the_one_that_is_zero(tiny_model, zero_init):
    torch.manual_seed(0)
    model = get_peft_model(
        fresh_base(tiny_model), DenseLoraConfig(r=32, zero_init=zero_init, target_modules=["up_proj"])
    )
    pair = model.base_model.denselora_shared["default"]["up_proj"]
    m = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").denselora_m["default"]
    for name, factor in (("encoder", pair.encoder), ("decoder", pair.decoder), ("m", m)):
        bound = 0.0 if name == zero_init else factor.shape[1] ** -0.5  # uniform up to 1 / sqrt(columns)
        assert 0.98 * bound <= factor.abs().max().item() <= bound, name
        assert factor.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.1), name


def test_only_matrix_merges_and_unmerges(tiny_model):
    model = adapted(tiny_model, activation="none")
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, DenseLoraLinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_only_what_is_merged_must_be_a_matrix(tiny_model):
    model = adapted(tiny_model, activation="none")
    model.add_adapter("bent", DenseLoraConfig(r=2, init_weights=False, target_modules=["q_proj"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (lambda: model.merge_and_unload(adapter_names=["bent"]), lambda: model.merge_adapter(["bent"])):
        with pytest.raises(ValueError, match=r'cannot be merged: "bent" \(gelu\)'):
            merge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.merge_adapter(["default"])


def test_disabling_a_merged_adapter_gives_the_base(tiny_model):
    model = adapted(tiny_model, activation="none")
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(fresh_base(tiny_model)), rtol=1e-4, atol=1e-5)


def test_deleting_another_adapter_leaves_a_frozen_one_frozen(tiny_model, tmp_path):
    adapted(tiny_model).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh_base(tiny_model), tmp_path)
    model.load_adapter(tmp_path, "second")
    model.delete_adapter("second")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == []


@pytest.mark.parametrize("freeze_shared", [False, True])
def test_the_adapter_that_succeeds_a_deleted_one_is_trainable(tiny_model, freeze_shared):
    """PEFT makes the next adapter active and its layers trainable; so are its encoders and decoders, unless they stay frozen."""
    model = adapted(tiny_model)
    config = DenseLoraConfig(r=2, zero_init="none", freeze_shared=freeze_shared, target_modules=["q_proj", "o_proj"])
    model.add_adapter("second", config)
    model.delete_adapter("default")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_second = {name for name, _ in model.named_parameters() if "second" in name}
    assert len(of_second) == 2 * 2 + 2 * 2
    assert trainable == {name for name in of_second if not (freeze_shared and "denselora_shared" in name)}


def test_merging_into_nf4_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"quantized base.*Load the base unquantized"):
        adapted(tiny_model, "nf4", "bfloat16", activation="none").merge_and_unload()


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3", "Gemma"])
def test_other_decoders_with_these_module_names(family):
    import transformers

    settings = {**tiny_config().to_dict(), "head_dim": 16}
    settings = {
        key: settings[key]
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
            "head_dim",
            "eos_token_id",
            "pad_token_id",
        )
    }
    base = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings))
    model = get_peft_model(base, DenseLoraConfig(r=4))  # target modules by the model's type
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    shared = model.base_model.denselora_shared["default"]
    assert set(shared) == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert all(pair.decoder.grad.abs().sum() > 0 for pair in shared.values())


@pytest.mark.parametrize(("d_in", "d_out"), [(64, 96), (64, 160), (48, 128), (96, 128)])
def test_layers_of_unlike_shape_cannot_share(tiny_model, d_in, d_out):
    base = fresh_base(tiny_model)
    base.model.layers[1].mlp.up_proj = torch.nn.Linear(d_in, d_out)
    told = rf"one shape: the first maps 64 -> 128, model.layers.1.mlp.up_proj maps {d_in} -> {d_out}"
    with pytest.raises(ValueError, match=told):
        get_peft_model(base, DenseLoraConfig(r=4, target_modules=["up_proj"]))


@pytest.mark.parametrize("freeze_shared", [False, True])
@pytest.mark.parametrize("names", ["default", ["default"], ["default", "other"]])
def test_adapters_are_frozen_and_thawed_by_name(tiny_model, freeze_shared, names):
    model = adapted(tiny_model, freeze_shared=freeze_shared, zero_init="none")
    model.add_adapter("second", DenseLoraConfig(r=2, init_weights=False, target_modules=["q_proj"]))

    def trainable():
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    before = trainable()
    assert any("denselora_shared" in name for name in before) is not freeze_shared
    model.base_model.set_requires_grad(names, requires_grad=False)
    assert trainable() == set()
    model.base_model.set_requires_grad(names, requires_grad=True)
    assert trainable() == before


def test_other_modules_than_linear_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"adapts linear layers; model.embed_tokens is a Embedding"):
        get_peft_model(fresh_base(tiny_model), DenseLoraConfig(r=4, target_modules=["embed_tokens"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r = 0: must be a positive integer"),
        ({"alpha": -1.0}, "alpha = -1.0: must be positive"),
        ({"dropout": 1.0}, "dropout = 1.0: must be at least 0 and below 1"),
        ({"activation": "relu"}, "relu.*zero slope at 0"),
        ({"activation": "swish"}, "must be one of gelu, silu, tanh, relu, none"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DenseLoraConfig(**settings)


def test_alpha_is_twice_r_by_default():
    assert DenseLoraConfig(r=12).alpha == 24


def test_registered_with_peft():
    assert "DENSELORA" in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_train_evaluate_train_gives_the_gradients_it_gave(tmp_path, quantization):
    """An eval forward must not repack 4-bit weights for a kernel without autograd (bitsandbytes on AVX512-BF16)."""
    model = adapted(make_tiny_model(tmp_path / "m"), quantization, "bfloat16")

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    logits(model)
    model.generate(
        input_ids=TOKENS, max_new_tokens=3, do_sample=False, use_cache=True, attention_mask=torch.ones_like(TOKENS)
    )
    after = gradients()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_balanced_start_gives_the_decoder_the_gradient_of_loras_b(smollm2):
    """On real weights and text, for each module kind: the median over layers, since a few layers have huge activations."""
    base = smollm2()
    text = "Tom has 23 apples and gives 8 of them to Anna. How many apples does Tom have now? He has 23 - 8 = 15 apples left."
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    kinds = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

    def gradient_norms(config, name):
        """Of each layer's matrix called `name`: (layers,) by module kind."""
        torch.manual_seed(3)
        model = get_peft_model(smollm2().model, config)
        model(input_ids=ids, labels=ids).loss.backward()
        named = list(model.named_parameters())
        return {kind: torch.stack([p.grad.norm() for key, p in named if kind in key and name in key]) for kind in kinds}

    lora = gradient_norms(peft.LoraConfig(r=32, lora_alpha=64, target_modules=kinds), "lora_B")
    cases = [("paper", "gelu", 3**-0.5 / 4), ("balanced", "gelu", 1), ("balanced", "tanh", 1), ("balanced", "none", 1)]
    for init, activation, expected in cases:
        # One pair for each layer: a shared decoder's gradient is a sum over layers, and that of LoRA's B is not.
        settings = {"init": init, "activation": activation, "sharing": "none", "target_modules": kinds}
        ours = gradient_norms(DenseLoraConfig(r=32, **settings), "decoder")
        for kind in kinds:
            ratio = (ours[kind] / lora[kind]).median().item()
            assert ratio == pytest.approx(expected, rel=0.1), (init, activation, kind)


def test_balanced_start_is_refused_where_the_decoder_does_not_start_at_zero():
    with pytest.raises(ValueError, match=r'init = "balanced": needs zero_init = "decoder"'):
        DenseLoraConfig(init="balanced", zero_init="m")


def test_each_group_of_layers_has_its_own_pair(tiny_model, tmp_path):
    model = adapted(tiny_model, layer_groups=2)
    first, second = (layer.self_attn.q_proj.shared["default"] for layer in model.base_model.model.model.layers)
    assert first is not second
    # (2 (d_in + d_out) + l r) r for each kind: q 64+64, k and v 64+32, up and down 64+128, l = 2, r = 4
    assert model.get_nb_trainable_parameters()[0] == (2 * (128 + 96 + 96 + 192 + 192) + 5 * 2 * 4) * 4
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh_base(tiny_model), tmp_path)), expected)


def test_groups_hold_neighbouring_layers(tmp_path):
    """Five layers in two groups: three and two."""
    folder = make_tiny_model(tmp_path / "five", num_hidden_layers=5)
    layers = adapted(folder, layer_groups=2).base_model.model.model.layers
    pairs = [layer.mlp.up_proj.shared["default"] for layer in layers]
    assert [pairs.index(pair) for pair in pairs] == [0, 0, 0, 3, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_groups": 3}, "layer_groups = 3: must be at most the number of layers, 2"),
        ({"layer_groups": 0}, "layer_groups = 0: must be a positive integer"),
        ({"layer_groups": 2, "sharing": "none"}, 'must be 1 with sharing = "none"'),
    ],
)
def test_groups_that_cannot_be_are_refused(tiny_model, settings, message):
    with pytest.raises(ValueError, match=message):
        adapted(tiny_model, **settings)


# --- PEFT's and torch's other features ------------------------------------------------------------------------------------


def test_a_copied_layer_works_as_in_data_parallel(tiny_model):
    """nn.DataParallel, which Trainer applies where one process sees several GPUs, runs shallow copies of the modules."""
    model = adapted(tiny_model)
    for name, parameter in model.named_parameters():
        if "decoder" in name:
            torch.nn.init.normal_(parameter)
    expected = model(input_ids=TOKENS).logits
    for name, module in list(model.named_modules()):
        if isinstance(module, DenseLoraLinear):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module._replicate_for_data_parallel())
    found = model(input_ids=TOKENS).logits
    assert torch.equal(found, expected)


def test_an_input_that_one_of_the_layers_never_reads_is_not_kept(tiny_model):
    model = adapted(tiny_model)
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(1, 3, 64)
    shared = attention.q_proj.shared_input
    output = attention.q_proj(x)  # k and v read something else, as in cross-attention
    assert shared._encoded
    output.sum().backward()
    assert not shared._encoded
    with torch.no_grad():
        attention.q_proj(x)
    assert shared._encoded
    del x, output
    gc.collect()
    assert not shared._encoded


def test_the_status_names_the_type(tiny_model):
    model = adapted(tiny_model)
    assert get_model_status(model).peft_types == {"default": "DENSELORA"}


def test_rank_stabilised_scale(tiny_model, tmp_path):
    model = adapted(tiny_model, r=16, alpha=6.0, use_rslora=True).eval()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 6.0 / 4}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh_base(tiny_model), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_a_weighted_sum_of_adapters_is_refused(tiny_model):
    with pytest.raises(ValueError, match="a weighted sum of DenseLoRA adapters is no DenseLoRA adapter"):
        adapted(tiny_model).add_weighted_adapter(["default"], [1.0], "sum")


def test_what_loads_a_saved_adapter_besides_peft(tiny_model, tmp_path):
    """AutoPeftModel and, with its model, a pipeline do; transformers' own from_pretrained says what does."""
    model = adapted(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded.eval()), logits(model))
    written = pipeline("text-generation", model=loaded, tokenizer=tokenizer)("2 + 2 =", max_new_tokens=4)
    assert written[0]["generated_text"].startswith("2 + 2 =")
    with pytest.raises(ValueError, match="Please use `get_peft_model` instead"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_batch_of_several_adapters_is_refused(tiny_model):
    model = adapted(tiny_model)
    model.eval()
    with pytest.raises(ValueError, match="adapter_names: DenseLoRA does not mix adapters in one batch"):
        model(input_ids=TOKENS, adapter_names=["default"] * len(TOKENS))


def test_safe_merge_leaves_every_layer_as_it_was_if_one_is_faulty(tiny_model):
    model = adapted(tiny_model, activation="none")
    model.eval()
    last = list(layer for layer in model.modules() if isinstance(layer, DenseLoraLinear))[-1]
    last.denselora_m["default"].data.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="no layer has been merged"):
            merge(safe_merge=True)
        assert all(
            torch.equal(tensor, before[name]) or name.endswith("_m.default")
            for name, tensor in model.named_parameters()
        )


@pytest.mark.parametrize(
    ("config", "adapted"),
    [
        (
            OPTConfig(
                hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=90, word_embed_proj_dim=32
            ),
            {"q_proj", "v_proj"},
        ),
        (
            Phi3Config(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                vocab_size=90, pad_token_id=0,
            ),
            {"qkv_proj", "gate_up_proj", "down_proj"},
        ),
    ],
    ids=["opt", "phi3"],
)  # fmt: skip
def test_other_architectures_have_default_targets(config, adapted):
    model = get_peft_model(AutoModelForCausalLM.from_config(config), DenseLoraConfig(r=2, init_weights=False))
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, DenseLoraLinear)}
    assert names == adapted
    ids = torch.arange(6)[None]
    with model.disable_adapter():
        before = model(input_ids=ids).logits
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert not torch.equal(model(input_ids=ids).logits, before)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_gpt2s_layers_are_refused_by_name():
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=90)
    with pytest.raises(ValueError, match=r"DenseLoRA adapts linear layers; .*c_attn is a Conv1D"):
        get_peft_model(AutoModelForCausalLM.from_config(config), DenseLoraConfig(r=2))
