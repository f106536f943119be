"""NoRA: its equation, its outer pair, its calibration, and through PEFT's own interface on float, NF4 and 8-bit bases."""

import copy
import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from qdense import NoraConfig
from qdense.catalogs.families import PAPER_TARGET_MODULES
from qdense.tuners.nora import NoraLinear, calibrate, nora_delta, outer_pair
from tests.helpers.models import meta_model
from tests.helpers.tuners import BASES, TOKENS, fresh_base, logits, train, trainable


def config_of(**settings):
    return NoraConfig(**{"r": 8, "r_inner": 3, "target_modules": list(PAPER_TARGET_MODULES)} | settings)


def adapted(tiny_model, quantization="none", dtype="float32", **settings):
    torch.manual_seed(7)
    return get_peft_model(fresh_base(tiny_model, quantization, dtype), config_of(**{"init_weights": False} | settings))


def outer_tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items() if ".nora_outer_" in name}


# --- the equation and the outer pair ----------------------------------------------------------------------------------


def test_the_equation_by_hand():
    # x = (1, 2, 3); A_out x = (1 + 3, 2 - 1) = (4, 1); A_in: 1*4 + 2*1 = 6; B_in: (6, -6); B_out: (6, -6, 6 - 6 = 0),
    # times 0.5
    delta = nora_delta(
        torch.tensor([[1.0, 2.0, 3.0]]),
        torch.tensor([[1.0, 0.0, 1.0], [-1.0, 1.0, 0.0]]),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[1.0], [-1.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        scaling=0.5,
    )
    assert delta.tolist() == [[3.0, -3.0, 0.0]]


def test_gradients_of_input_and_inner_pair():
    torch.manual_seed(0)
    x, outer_a, inner_a, inner_b, outer_b = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 5), (4, 5), (2, 4), (4, 2), (3, 4))
    )
    for tensor in (x, inner_a, inner_b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b: nora_delta(x, outer_a, a, b, outer_b, scaling=1.5), (x, inner_a, inner_b)
    )


@pytest.mark.parametrize(
    ("split", "a_out", "b_out"),
    [
        # W = diag(4, 9) and r = 1: the second pair of singular vectors, Sigma = 9
        ("both", [0.0, 3.0], [0.0, 3.0]),
        ("left", [0.0, 1.0], [0.0, 9.0]),
        ("right", [0.0, 9.0], [0.0, 1.0]),
    ],
)
def test_outer_pair_by_hand(split, a_out, b_out):
    outer_a, outer_b = outer_pair(torch.diag(torch.tensor([4.0, 9.0])), 1, split=split)
    sign = outer_a[0, 1].sign()  # of a singular vector, arbitrary
    torch.testing.assert_close(sign * outer_a, torch.tensor([a_out]))
    torch.testing.assert_close(sign * outer_b, torch.tensor([b_out]).T)


@pytest.mark.parametrize("split", ["both", "left", "right"])
def test_activation_aware_outer_pair_by_hand(split):
    # W S = diag(4 * 5, 9 * 2) = diag(20, 18): now the first input counts, and S^-1 gives the weight's own 4 back
    outer_a, outer_b = outer_pair(
        torch.diag(torch.tensor([4.0, 9.0])), 1, split=split, activation_scale=torch.tensor([5.0, 2.0])
    )
    torch.testing.assert_close(outer_b @ outer_a, torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    expected_a = {"both": 20**0.5 / 5, "left": 1 / 5, "right": 20 / 5}[split]
    assert outer_a.abs().tolist() == [[pytest.approx(expected_a), pytest.approx(0.0)]]


def test_activation_aware_is_nearer_on_the_activations():
    torch.manual_seed(0)
    weight = torch.randn(12, 10)
    magnitude = torch.tensor([10.0, 8, 5, 3, 1, 1, 0.1, 0.1, 0.01, 0.01])
    x = magnitude * torch.randn(4000, 10).sign()  # |x| is constant, so S with exponent 1 is the inputs' own scale
    errors = {}
    for name, scale in (("plain", None), ("aware", x.abs().mean(0))):
        outer_a, outer_b = outer_pair(weight, 3, activation_scale=scale)
        errors[name] = ((x @ (weight - outer_b @ outer_a).T) ** 2).mean().item()
    assert errors["aware"] < 0.5 * errors["plain"]
    # the best there is: the tail of the singular values of W S
    tail = torch.linalg.svdvals(weight * magnitude)[3:]
    assert errors["aware"] == pytest.approx((tail**2).sum().item() / 12, rel=0.05)


def test_full_rank_gives_the_weight_back_with_a_dead_input():
    torch.manual_seed(0)
    weight = torch.randn(5, 4)
    outer_a, outer_b = outer_pair(weight, 4, activation_scale=torch.tensor([1e3, 0.0, 2e3, 500.0]))
    assert torch.isfinite(outer_a).all()
    torch.testing.assert_close((outer_b @ outer_a)[:, [0, 2, 3]], weight[:, [0, 2, 3]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("quantization", "dtype"), BASES)
@pytest.mark.parametrize("after_a_forward", [False, True])
def test_outer_pair_is_that_of_the_weight_the_base_computes_with(tiny_model, quantization, dtype, after_a_forward):
    base = fresh_base(tiny_model, quantization, dtype)
    if after_a_forward:  # bitsandbytes moves the statistics of 8-bit weights in the first one
        logits(base)
    linear = base.model.layers[1].mlp.down_proj
    identity = torch.eye(128, dtype=getattr(torch, dtype))
    with torch.no_grad():
        weight = linear(identity).T.float()  # for 8-bit layers within the rounding of the activations
    model = get_peft_model(base, config_of(r=64, target_modules=["down_proj"]))
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    product = layer.nora_outer_b["default"].float() @ layer.nora_outer_a["default"].float()  # r is full: W0 itself
    assert (product - weight).norm() < (1e-5 if dtype == "float32" else 0.01) * weight.norm()


# --- calibration --------------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    class Base(nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, input_ids, attention_mask=None):
            features = torch.tensor([[0.0, 0.0], [4.0, -9.0], [16.0, 25.0], [100.0, 400.0]])
            return self.q_proj(features[input_ids])

    batches = [
        {"input_ids": torch.tensor([[1, 3]]), "attention_mask": torch.tensor([[1, 0]])},  # 3 is padding
        {"input_ids": torch.tensor([[2, 0]])},
    ]
    config = NoraConfig(r=2, r_inner=1, exponent=0.5, target_modules=["q_proj"])
    statistics = calibrate(Base(), batches, config)
    # three tokens: (2 + 4 + 0) / 3 and (3 + 5 + 0) / 3
    assert list(statistics) == ["q_proj"]
    torch.testing.assert_close(statistics["q_proj"], torch.tensor([2.0, 8 / 3]))


def test_calibration_of_a_model(tiny_model, monkeypatch):
    base = fresh_base(tiny_model, "nf4", "bfloat16").train()
    calls, register = [], torch.nn.Module.register_forward_pre_hook
    monkeypatch.setattr(
        torch.nn.Module,
        "register_forward_pre_hook",
        lambda module, hook: register(module, lambda *given: (calls.append(1), hook(*given))[1]),
    )
    config = config_of(exponent=1.0)
    seen = []
    handle = base.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    statistics = calibrate(base, [{"input_ids": TOKENS, "attention_mask": mask}], config)
    handle.remove()
    assert len(statistics) == 2 * len(PAPER_TARGET_MODULES)
    expected = seen[0][mask.bool()].float().abs().mean(0)
    torch.testing.assert_close(statistics["model.layers.1.mlp.up_proj"], expected)
    assert base.training
    num_calls = len(calls)
    base(input_ids=TOKENS)
    assert len(calls) == num_calls > 0, "its hooks are still there"
    config.statistics = statistics
    aware = get_peft_model(copy.deepcopy(base), config)
    plain = get_peft_model(base, config_of())
    name = "base_model.model.model.layers.1.mlp.up_proj.nora_outer_a.default"
    assert not torch.allclose(outer_tensors(aware)[name].abs(), outer_tensors(plain)[name].abs(), rtol=0.01)
    layer = aware.get_submodule(name.partition(".nora_")[0])
    expected_a, _ = outer_pair(layer.get_base_weight(), 8, activation_scale=expected)
    torch.testing.assert_close(outer_tensors(aware)[name], expected_a.bfloat16())


def test_statistics_are_not_saved_and_must_fit(tiny_model, tmp_path):
    base = fresh_base(tiny_model)
    config = config_of()
    config.statistics = calibrate(base, [{"input_ids": TOKENS}], config)
    config.save_pretrained(tmp_path)
    assert "statistics" not in json.loads((tmp_path / "adapter_config.json").read_text())
    del config.statistics["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"does not include model.layers.1.mlp.up_proj"):
        get_peft_model(base, config)


def test_calibration_without_a_target_or_a_token(tiny_model):
    base = fresh_base(tiny_model)
    with pytest.raises(ValueError, match="no such linear layer"):
        calibrate(base, [{"input_ids": TOKENS}], config_of(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="no token"):
        calibrate(base, [], config_of())
    assert len(calibrate(base, [{"input_ids": TOKENS}], NoraConfig())) == 10  # targets by the model's type


# --- through PEFT -------------------------------------------------------------------------------------------------------


def test_layer_computes_the_equation(tiny_model):
    model = adapted(tiny_model, alpha=6.0).eval()
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    x = torch.randn(3, 128)
    pairs = (layer.nora_outer_a, layer.nora_inner_a, layer.nora_inner_b, layer.nora_outer_b)
    outer_a, inner_a, inner_b, outer_b = (pair["default"].double() for pair in pairs)
    expected = layer.base_layer(x).double() + 6.0 / 3 * x.double() @ (outer_b @ inner_b @ inner_a @ outer_a).T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_the_input_in_training_only(tiny_model):
    model = adapted(tiny_model, dropout=0.5, target_modules=["down_proj"])
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    x = torch.ones(1, 128)
    layer.eval()
    kept = layer(x)
    assert torch.equal(kept, layer(x))
    layer.train()
    mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
    assert not torch.equal(layer(x), layer(x))
    delta = (kept - layer.base_layer(x)).abs().mean()
    torch.testing.assert_close(mean, kept, rtol=0, atol=0.2 * delta.item())


def test_counts(tiny_model):
    assert adapted(tiny_model).get_nb_trainable_parameters()[0] == 2 * 8 * 3 * 5 * 2  # 2 r r_inner, 5 kinds, 2 layers
    model = get_peft_model(meta_model("llama3-8b"), NoraConfig(r=64, r_inner=32, init_outer=False))
    assert model.get_nb_trainable_parameters()[0] == 2 * 64 * 32 * 5 * 32


@pytest.mark.parametrize(("quantization", "dtype"), BASES)
def test_starts_as_the_base_and_learns(tiny_model, quantization, dtype):
    model = adapted(tiny_model, quantization, dtype, init_weights=True)
    base = logits(fresh_base(tiny_model, quantization, dtype))
    assert torch.equal(logits(model), base)
    train(model, steps=1)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        else:  # B_in is zero at first, so A_in has a gradient of zero
            assert (parameter.grad.abs().sum() > 0) == (".nora_inner_b." in name), name
    assert not torch.equal(logits(model), base)
    train(model, steps=1)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("quantization", "dtype"), BASES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_trained_saved_and_loaded_gives_the_same_logits_without_a_svd(
    tiny_model, tmp_path, monkeypatch, quantization, dtype, low_cpu_mem_usage
):
    model = adapted(tiny_model, quantization, dtype, init_weights=True)
    before = outer_tensors(model)
    train(model)
    expected = logits(model)
    base = logits(fresh_base(tiny_model, quantization, dtype))
    assert not torch.equal(expected, base)
    assert all(torch.equal(value, before[name]) for name, value in outer_tensors(model).items())
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].init_outer  # the model's own configuration is as it was
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 4 * 5 * 2

    def no_svd(*args, **kwargs):
        raise AssertionError("an SVD")

    monkeypatch.setattr(torch.linalg, "svd", no_svd)
    for is_trainable in (False, True):
        loaded = PeftModel.from_pretrained(
            fresh_base(tiny_model, quantization, dtype),
            tmp_path,
            is_trainable=is_trainable,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        assert torch.equal(logits(loaded), expected)
        assert len(trainable(loaded)) == (2 * 5 * 2 if is_trainable else 0)
        loaded.load_adapter(tmp_path, "again", is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.set_adapter("again")
        assert torch.equal(logits(loaded), expected)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), base)
    assert torch.equal(logits(loaded), expected)


def test_an_adapter_of_a_saved_configuration_alone_is_not_silently_wrong(tiny_model, tmp_path):
    config_of().save_pretrained(tmp_path)
    model = get_peft_model(fresh_base(tiny_model), NoraConfig.from_pretrained(tmp_path))
    assert logits(model).isnan().all()


def test_outer_pair_stays_frozen_through_everything(tiny_model, tmp_path):
    model = adapted(tiny_model)
    before = outer_tensors(model)
    assert len(before) == 2 * 5 * 2

    def check(candidate):
        assert not any("nora_outer" in name for name in trainable(candidate))
        assert not any(value.requires_grad for name, value in candidate.named_buffers() if "nora_outer" in name)
        after = outer_tensors(candidate)
        assert all(torch.equal(after[name], value) for name, value in before.items())

    model.add_adapter("second", config_of(r=4, init_weights=False))
    check(model)
    model.set_adapter("second")
    check(model)
    assert all("second" in name for name in trainable(model))
    with model.disable_adapter():
        check(model)
        assert trainable(model) == set()
    check(model)
    model.set_adapter("default")
    model.set_requires_grad("second")
    model.base_model.enable_adapter_layers()
    check(model)
    model.train()
    train(model)
    check(model)
    model.delete_adapter("second")
    check(model)
    check(copy.deepcopy(model))
    model.save_pretrained(tmp_path)
    for kwargs in ({"is_trainable": True}, {"is_trainable": True, "autocast_adapter_dtype": False}):
        loaded = PeftModel.from_pretrained(fresh_base(tiny_model), tmp_path, **kwargs)
        check(loaded)
        assert len(trainable(loaded)) == 2 * 5 * 2
        train(loaded)
        check(loaded)


def test_moving_keeps_dtype_and_trainability(tiny_model):
    """PEFT's own would cast to the base's dtype and make frozen parameters trainable."""
    model = adapted(tiny_model, dtype="bfloat16")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.nora_inner_a.requires_grad_(False)
    layer._move_adapter_to_device_of_base_layer("default")
    tensors = list(layer.adapter_tensors("default"))
    assert [tensor.dtype for tensor in tensors] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert [tensor.requires_grad for tensor in tensors] == [False, True, False, False]


def test_dtypes(tiny_model):
    base = fresh_base(tiny_model, dtype="bfloat16")
    kept = get_peft_model(copy.deepcopy(base), config_of(), autocast_adapter_dtype=False)
    cast = get_peft_model(copy.deepcopy(base), config_of())
    assert {p.dtype for p in kept.parameters() if p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in cast.parameters() if p.requires_grad} == {torch.float32}
    assert {value.dtype for value in outer_tensors(cast).values()} == {torch.bfloat16}
    assert logits(cast).dtype == torch.bfloat16
    assert trainable(kept) == trainable(cast)


def test_several_adapters(tiny_model, tmp_path):
    model = adapted(tiny_model)
    first = logits(model)
    model.add_adapter("second", config_of(r=4, r_inner=2, init_weights=False, target_modules=["q_proj", "o_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh_base(tiny_model), tmp_path / "second")), second)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any("default" in name for name in model.state_dict())
    assert torch.equal(logits(model.unload()), logits(fresh_base(tiny_model)))


def test_adding_an_adapter_leaves_a_frozen_one_frozen(tiny_model, tmp_path):
    adapted(tiny_model).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh_base(tiny_model), tmp_path)
    model.add_adapter("second", config_of())
    assert not any("default" in name for name in trainable(model))


def test_merges_and_unmerges(tiny_model):
    model = adapted(tiny_model)
    expected = logits(model)
    base = logits(fresh_base(tiny_model))
    assert (expected - base).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, NoraLinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_merging_into_bf16_rounds_once(tiny_model):
    model = adapted(tiny_model, dtype="bfloat16", target_modules=["down_proj"])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, exact.float().bfloat16())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_merging_into_a_quantized_base_is_refused(tiny_model, quantization):
    model = adapted(tiny_model, quantization, "bfloat16")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"quantized base.*Load the base unquantized"):
            merge()


def test_more_than_full_rank_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"r = 33: must be at most 32, the rank of a weight that maps 64 -> 32"):
        adapted(tiny_model, r=33, target_modules=["k_proj"])


def test_other_modules_than_linear_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"NoRA adapts linear layers; model.embed_tokens is a Embedding"):
        adapted(tiny_model, target_modules=["embed_tokens"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "NoraConfig.r = 0: must be a positive integer"),
        ({"r_inner": True}, "r_inner = True: must be a positive integer"),
        ({"r": 4, "r_inner": 5}, "r_inner = 5: must be at most r = 4"),
        ({"alpha": 0}, "alpha = 0: must be positive"),
        ({"dropout": 1.0}, "dropout = 1.0: must be at least 0 and below 1"),
        ({"split": "middle"}, "split = 'middle': must be one of both, left, right"),
        ({"exponent": -0.5}, "exponent = -0.5: must be positive"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        NoraConfig(**settings)


def test_alpha_is_twice_the_inner_rank_by_default():
    assert NoraConfig(r_inner=12).alpha == 24


def test_registered_with_peft():
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["NORA"] is NoraConfig
