"""Liger has a public function for each model type that we give its kernels; no private name is used, so it has no module."""

import inspect

import pytest

from qdense.catalogs.families import FAMILIES
from qdense.modeling.liger import use_liger
from tests.helpers.models import tiny_config

liger = pytest.importorskip("liger_kernel.transformers")


@pytest.mark.parametrize("model_type", [family.model_type for family in FAMILIES.values() if family.has_liger])
def test_a_public_function_takes_what_we_say(model_type):
    apply = getattr(liger, f"apply_liger_kernel_to_{model_type}", None)
    assert apply is not None, f"Liger no longer offers apply_liger_kernel_to_{model_type}"
    wanted = {"rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm", "swiglu", "model"}
    assert wanted <= set(inspect.signature(apply).parameters)


def test_norms_mlps_and_rotary_embeddings_are_replaced_and_the_loss_is_not(monkeypatch):
    from transformers.models.llama import modeling_llama

    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")  # what Liger replaces in the process
    before = {name: getattr(modeling_llama, name) for name in names}
    for name, value in before.items():
        monkeypatch.setattr(modeling_llama, name, value)  # and put back
    model = modeling_llama.LlamaForCausalLM(tiny_config())
    use_liger(model)
    for module in (model.model.norm, model.model.layers[1].input_layernorm, model.model.layers[0].mlp):
        assert "liger_kernel" in module.forward.__func__.__module__
    assert all(getattr(modeling_llama, name) is not value for name, value in before.items())
    assert model.forward.__func__ is modeling_llama.LlamaForCausalLM.forward
    assert "liger_kernel" not in modeling_llama.LlamaForCausalLM.forward.__module__
