"""PEFT still does what qdense relies on beyond its documentation: see qdense/compat/peft.py."""

import inspect
import warnings
from types import FunctionType

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoKrConfig,
    LoraConfig,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from qdense.compat import peft as compat
from qdense.tuners import DenseLoraConfig, DenseLoraModel, NoraModel, RedModel
from qdense.tuners.denselora import DENSELORA
from tests.helpers.tuners import TOKENS, fresh_base

TUNERS = (DenseLoraModel, NoraModel, RedModel)


def denselora(**changes):
    return DenseLoraConfig(r=4, target_modules=["q_proj", "v_proj"], **changes)


# --- what is overridden -------------------------------------------------------------------------------------------------


def overrides_of(classes, base):
    """What our classes define that `base` has too, without what is Python's or torch's."""
    ours = {cls for given in classes for cls in given.__mro__ if cls.__module__.startswith("qdense.")}
    defined = {name for cls in ours for name in vars(cls)}
    pefts = [cls for cls in base.__mro__ if cls.__module__.startswith("peft.")]
    own = {name for cls in pefts for name in (*vars(cls), *inspect.get_annotations(cls))}
    return {name for name in defined & own if not name.startswith(("__", "_abc_")) and name != "forward"}


def test_every_override_is_listed_with_what_breaks_without_it():
    # PeftModel looks for the hooks on any tuner; BaseTuner has none.
    assert overrides_of(TUNERS, BaseTuner) | {"_enable_peft_forward_hooks"} == set(compat.TUNER_OVERRIDES)
    assert overrides_of([tuner.tuner_layer_cls for tuner in TUNERS], BaseTunerLayer) == set(compat.LAYER_OVERRIDES)


def is_method(cls, name):
    return isinstance(inspect.getattr_static(cls, name), FunctionType | classmethod)


def recording(cls, names, called):
    """A subclass that notes which of the methods `names` are called."""

    def noting(name, function):
        def method(*arguments, **keywords):
            called.add(name)
            return function(*arguments, **keywords)

        return method

    made = type(cls.__name__, (cls,), {})
    for name in names:
        method = inspect.getattr_static(cls, name)
        is_of_class = isinstance(method, classmethod)
        setattr(made, name, classmethod(noting(name, method.__func__)) if is_of_class else noting(name, method))
    return made


def test_peft_calls_every_method_that_is_overridden(tiny_model):
    called, layer_cls = set(), DenseLoraModel.tuner_layer_cls
    of_tuner = [name for name in compat.TUNER_OVERRIDES if is_method(DenseLoraModel, name)]
    of_layer = [name for name in compat.LAYER_OVERRIDES if is_method(layer_cls, name)]
    assert len(of_tuner) == 12
    assert len(of_layer) == 4
    tuner = recording(DenseLoraModel, of_tuner, called)
    tuner.tuner_layer_cls = recording(layer_cls, of_layer, called)
    compat.register(DENSELORA, DenseLoraConfig, tuner)
    try:
        model = get_peft_model(fresh_base(tiny_model), denselora(activation="none", init_weights=False))
        model.add_adapter("second", denselora(activation="none"))
        model.set_adapter("second")
        model.set_requires_grad("second", requires_grad=False)
        with model.disable_adapter():
            pass
        set_peft_model_state_dict(model, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
        model.delete_adapter("second")
        model.set_adapter("default")
        model(input_ids=TOKENS)
        convert_to_lora(model, 2)
        model.merge_adapter()
        model.unmerge_adapter()
        model.merge_and_unload()
    finally:
        compat.register(DENSELORA, DenseLoraConfig, DenseLoraModel)
    breaks = {**compat.TUNER_OVERRIDES, **compat.LAYER_OVERRIDES}
    uncalled = {name: breaks[name] for name in (*of_tuner, *of_layer) if name not in called}
    assert not uncalled, f"PEFT no longer calls these; what breaks: {uncalled}"


def test_peft_reads_the_attributes_that_are_set(tiny_model):
    base = fresh_base(tiny_model)
    model = get_peft_model(base, DenseLoraConfig(r=4))  # target_module_mapping
    adapted = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert adapted == set(DenseLoraModel.target_module_mapping["llama"])
    assert all("denselora_" in name for name in get_peft_model_state_dict(model))  # prefix
    with pytest.raises(ValueError, match="shared"):  # uses_shared_state
        fresh_base(tiny_model).add_adapter(denselora())
    model.delete_adapter("default")  # adapter_layer_names, other_param_names
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    assert not len(layer.denselora_m)
    assert not layer.scaling


# --- types --------------------------------------------------------------------------------------------------------------


def test_pefts_own_registration_still_refuses_new_names():
    from peft.utils import register_peft_method

    with pytest.raises(ValueError, match="Unknown PEFT type"):
        # If this passes, PEFT accepts others' names now: use it in place of compat.register.
        register_peft_method(name="densest", config_cls=DenseLoraConfig, model_cls=DenseLoraModel)


def test_a_registered_type_is_saved_and_loaded(tiny_model, tmp_path):
    from peft import PeftConfig, PeftModel

    model = get_peft_model(fresh_base(tiny_model), denselora(init_weights=False))
    model.save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), DenseLoraConfig)
    loaded = PeftModel.from_pretrained(fresh_base(tiny_model), tmp_path)
    saved = get_peft_model_state_dict(model)
    assert saved
    for name, tensor in get_peft_model_state_dict(loaded).items():
        assert torch.equal(tensor, saved[name])


# --- what a layer asks of PEFT ------------------------------------------------------------------------------------------


def test_buffers_are_kept_by_adapter_and_saved():
    layer = nn.Module()
    layer.factors = compat.buffers_by_adapter()
    layer.factors["default"] = torch.ones(2)
    assert set(layer.state_dict()) == {"factors.default"}
    assert not list(layer.parameters())
    assert layer.half().factors["default"].dtype == torch.float16, "a replaced or moved buffer is not the one it keeps"
    assert compat.holds_tensors_by_adapter(layer.factors)
    assert compat.holds_tensors_by_adapter(nn.ParameterDict())
    assert not compat.holds_tensors_by_adapter({"default": 1.0})


@pytest.mark.parametrize(("quantization", "name"), [("none", None), ("nf4", "bnb 4bit"), ("int8", "bnb 8bit")])
def test_a_quantized_layer_has_a_backend_that_unpacks_it(tiny_model, quantization, name):
    linear = fresh_base(tiny_model, quantization, "bfloat16").model.layers[0].mlp.down_proj
    backend = compat.quantization_backend(linear)
    assert (None if backend is None else backend.backend_name) == name
    if backend is not None:
        if quantization == "int8":
            linear(torch.zeros(1, 128, dtype=torch.bfloat16))  # bitsandbytes makes the statistics in the first forward
        assert backend.get_base_weight(linear).shape == (linear.out_features, linear.in_features)


def adapted_by_lora(tiny_model, **changes):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **changes)
    model = get_peft_model(fresh_base(tiny_model), config)
    return model, model.base_model.model.model.layers[0].self_attn.q_proj


def test_inputs_are_cast_unless_pefts_context_manager_forbids_it(tiny_model):
    model, layer = adapted_by_lora(tiny_model)
    x = torch.zeros(3)
    assert compat.cast_input(layer, x, torch.bfloat16).dtype == torch.bfloat16
    assert compat.cast_input(layer, x, torch.float32) is x
    with disable_input_dtype_casting(model):
        assert compat.cast_input(layer, x, torch.bfloat16) is x


def test_adapters_are_merged_once(tiny_model):
    _, layer = adapted_by_lora(tiny_model)
    assert compat.adapters_to_merge(layer, None) == ["default"]
    layer.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert compat.adapters_to_merge(layer, None) == []


def test_peft_says_which_modules_are_targeted():
    config = denselora(layers_to_transform=[1], exclude_modules=["v_proj"])
    names = [f"model.layers.{layer}.self_attn.{kind}" for layer in (0, 1) for kind in ("q_proj", "v_proj", "k_proj")]
    assert [name for name in names if compat.is_targeted(config, name)] == ["model.layers.1.self_attn.q_proj"]


def test_pefts_check_before_a_merge_is_asked(tiny_model):
    model, _ = adapted_by_lora(tiny_model)
    compat.refuse_unmergeable(model)
    model.base_model.model.quantization_method = "gptq"  # what LoRA's own merge refuses
    with pytest.raises(ValueError, match="gptq"):
        compat.refuse_unmergeable(model)
    with pytest.raises(ValueError, match="gptq"):
        model.merge_adapter()


# --- PEFT's own methods -------------------------------------------------------------------------------------------------


def test_adaloras_averages_are_these(tiny_model):
    config = AdaLoraConfig(
        target_r=2, init_r=4, tinit=1, tfinal=1, deltaT=1, total_step=6, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(fresh_base(tiny_model), config)
    model.train()
    for step in (1, 2):
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        model.base_model.update_and_allocate(step)
    averages = compat.rank_averages(model)
    assert set(averages) == {"ipt", "exp_avg_ipt", "exp_avg_unc"}
    names = {name for name, _ in model.base_model.model.named_parameters() if "lora_" in name}
    for values in averages.values():
        assert set(values) == names, (
            "AdaLoRA averages something else, or under other names: a resumed run would be cut differently"
        )
    state = vars(model.base_model.rankallocator)
    kept = {
        name for name, value in state.items() if isinstance(value, dict) and any(map(torch.is_tensor, value.values()))
    }
    assert kept == set(averages), "the allocator keeps other averages than are saved"
    assert all(state[name] is averages[name] for name in averages), "copies: what is read would not reach the allocator"


def test_adaloras_counters_of_ranks_still_become_trainable(tiny_model):
    """Where PEFT casts them to the dtype of the base. If this fails, qdense/methods/adalora.py need not freeze them."""
    config = AdaLoraConfig(target_r=2, init_r=4, tinit=1, tfinal=1, total_step=6, target_modules=["q_proj"])
    model = get_peft_model(fresh_base(tiny_model, dtype="bfloat16"), config)
    assert [parameter.requires_grad for name, parameter in model.named_parameters() if ".ranknum." in name] == [
        True
    ] * 2


def test_lokr_keeps_its_factors_where_we_look_and_still_fails_on_a_4_bit_base(tiny_model):
    model = get_peft_model(
        fresh_base(tiny_model), LoKrConfig(r=2, alpha=4, target_modules=["q_proj"], init_weights=False)
    )
    layer = model.base_model.model.model.layers[0].self_attn.q_proj

    def factor(which):
        whole = getattr(layer, f"lokr_{which}")
        if "default" in whole:
            return whole["default"]
        return getattr(layer, f"lokr_{which}_a")["default"] @ getattr(layer, f"lokr_{which}_b")["default"]

    expected = layer.scaling["default"] * torch.kron(factor("w1"), factor("w2"))
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    packed = (
        get_peft_model(fresh_base(tiny_model, "nf4", "bfloat16"), LoKrConfig(r=2, target_modules=["q_proj"]))
        .base_model.model.model.layers[0]
        .self_attn.q_proj
    )
    with pytest.raises(RuntimeError, match="shape"):
        # If this passes, PEFT's LoKr works on 4-bit bases: what qdense/methods/lokr.py puts in its place can go.
        packed.get_delta_weight("default")
