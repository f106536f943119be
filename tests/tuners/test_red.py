"""RED: its equation, and through PEFT's own interface on float, NF4 and 8-bit bases."""

import copy

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from qdense import RedConfig
from qdense.tuners.red import RedLinear, red_output
from tests.helpers.models import meta_model, tiny_config
from tests.helpers.tuners import BASES, fresh_base, logits, train, trainable


def adapted(tiny_model, quantization="none", dtype="float32", **settings):
    torch.manual_seed(7)
    return get_peft_model(fresh_base(tiny_model, quantization, dtype), RedConfig(**{"init_weights": False} | settings))


def test_the_equation_by_hand():
    # h = W x = (1*1 + 2*3, 3*1 + 4*3, 5*1 + 6*3) = (7, 15, 23), then 2, -1, 0.5 times, plus 1, 10, 100
    layer = RedLinear(nn.Linear(2, 3, bias=False))
    layer.base_layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    layer.update_layer("default", RedConfig())
    x = torch.tensor([[1.0, 3.0]])
    assert layer(x).tolist() == [[7.0, 15.0, 23.0]]
    layer.red_scale["default"].data = torch.tensor([2.0, -1.0, 0.5])
    layer.red_bias["default"].data = torch.tensor([1.0, 10.0, 100.0])
    assert layer(x).tolist() == [[15.0, -5.0, 111.5]]


def test_gradients():
    torch.manual_seed(0)
    arguments = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 3), (3,), (3,))]
    assert torch.autograd.gradcheck(red_output, arguments)


def test_a_fp32_adapter_is_rounded_once_on_a_bf16_base():
    torch.manual_seed(0)
    layer = RedLinear(nn.Linear(8, 64, bias=False, dtype=torch.bfloat16))
    layer.update_layer("default", RedConfig(init_weights=False))
    layer.red_scale["default"].data = 1 + 0.001 * torch.randn(64)  # below the step of bf16 next to 1
    layer.red_bias["default"].data = 0.3 * torch.randn(64)
    x = torch.randn(16, 8, dtype=torch.bfloat16)
    h = layer.base_layer(x)
    exact = h.double() * layer.red_scale["default"].double() + layer.red_bias["default"].double()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), exact.bfloat16())


@pytest.mark.parametrize("name", ["llama3-8b", "llama2-7b"])
def test_published_count(name):
    model = get_peft_model(meta_model(name), RedConfig())
    assert model.get_nb_trainable_parameters()[0] == 262_144


def test_only_the_outputs_of_down_proj_are_edited(tiny_model):
    model = adapted(tiny_model)
    layers = [name for name, module in model.named_modules() if isinstance(module, RedLinear)]
    assert layers == [f"base_model.model.model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert model.get_nb_trainable_parameters()[0] == 2 * 64 * 2
    assert all(".red_scale." in name or ".red_bias." in name for name in trainable(model))


@pytest.mark.parametrize(("quantization", "dtype"), BASES)
def test_starts_as_the_base_and_learns(tiny_model, quantization, dtype):
    model = adapted(tiny_model, quantization, dtype, init_weights=True)
    base = logits(fresh_base(tiny_model, quantization, dtype))
    assert torch.equal(logits(model), base)
    train(model, steps=1)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == parameter.requires_grad, name
    assert not torch.equal(logits(model), base)


@pytest.mark.parametrize(("quantization", "dtype"), BASES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_trained_saved_and_loaded_gives_the_same_logits(tiny_model, tmp_path, quantization, dtype, low_cpu_mem_usage):
    model = adapted(tiny_model, quantization, dtype, init_weights=True)
    train(model)
    expected = logits(model)
    base = logits(fresh_base(tiny_model, quantization, dtype))
    assert not torch.equal(expected, base)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(name.rpartition(".")[2] for name in saved) == ["red_bias", "red_bias", "red_scale", "red_scale"]
    loaded = PeftModel.from_pretrained(
        fresh_base(tiny_model, quantization, dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(loaded), expected)
    assert trainable(loaded) == set()
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), base)
    assert torch.equal(logits(loaded), expected)


def test_dtypes(tiny_model):
    base = fresh_base(tiny_model, dtype="bfloat16")
    kept = get_peft_model(copy.deepcopy(base), RedConfig(), autocast_adapter_dtype=False)
    cast = get_peft_model(copy.deepcopy(base), RedConfig())
    assert {p.dtype for p in kept.parameters() if p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in cast.parameters() if p.requires_grad} == {torch.float32}
    assert logits(cast).dtype == torch.bfloat16
    assert trainable(kept) == trainable(cast)


def test_several_adapters(tiny_model, tmp_path):
    model = adapted(tiny_model)
    first = logits(model)
    model.add_adapter("second", RedConfig(init_weights=False, target_modules=["down_proj", "o_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    assert len(trainable(model)) == 8
    assert all("second" in name for name in trainable(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(fresh_base(tiny_model)))
        assert trainable(model) == set()
    assert len(trainable(model)) == 8
    assert torch.equal(logits(copy.deepcopy(model)), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh_base(tiny_model), tmp_path / "second")), second)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any("default" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model.unload()), logits(fresh_base(tiny_model)))


def test_two_active_adapters_act_one_after_the_other():
    layer = RedLinear(nn.Linear(2, 2, bias=False))
    layer.base_layer.weight.data = torch.eye(2)
    for name, scale, bias in (("a", 2.0, 1.0), ("b", 3.0, 10.0)):
        layer.update_layer(name, RedConfig())
        layer.red_scale[name].data.fill_(scale)
        layer.red_bias[name].data.fill_(bias)
    layer.set_adapter(["a", "b"])
    assert layer(torch.tensor([[1.0, 5.0]])).tolist() == [[3 * (2 * 1 + 1) + 10, 3 * (2 * 5 + 1) + 10]]


def test_merging_is_refused(tiny_model):
    model = adapted(tiny_model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"A RED adapter is not merged.*bias"):
            merge()


def test_other_decoders(tiny_model):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = tiny_config().to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    base = Qwen2ForCausalLM(Qwen2Config(vocab_size=258, **{name: settings[name] for name in names}))
    model = get_peft_model(base, RedConfig())
    assert sum(isinstance(module, RedLinear) for module in model.modules()) == 2


def test_other_modules_than_linear_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"RED adapts linear layers; model.embed_tokens is a Embedding"):
        adapted(tiny_model, target_modules=["embed_tokens"])


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"RedConfig.layers_pattern needs layers_to_transform"):
        RedConfig(layers_pattern="layers")


def test_registered_with_peft():
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["RED"] is RedConfig
