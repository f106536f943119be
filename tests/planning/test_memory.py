"""Predicted memory of a training step, against the tensors of real steps; that of generation, against real completions."""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from qdense.catalogs.families import FAMILIES
from qdense.data.examples import Example, collate, join
from qdense.methods import METHODS
from qdense.modeling.attach import attach_adapter, trainable_parameters
from qdense.modeling.liger import use_liger
from qdense.modeling.load import load_base
from qdense.modeling.loss import without_logits
from qdense.modeling.packing import packed_attention
from qdense.modeling.recompute import Recompute, apply_recompute
from qdense.ops.kernels import use_kernels
from qdense.planning.memory import Kernels, StepLayout, memory_of
from qdense.planning.shapes import model_shape
from qdense.training.optimizer import build_optimizer
from tests.helpers.memory import TensorMemory, UncountedHostMemory
from tests.helpers.models import make_family_model, make_tokenizer, tiny_config
from tests.helpers.recipes import recipe_of

ON_CPU = Kernels(is_cuda=False, is_fused=False, has_liger=False)
FUSED = Kernels(is_cuda=False, is_fused=True, has_liger=True)


# --- memory, against the tensors of real steps ---------------------------------------------------------------------------

SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
LENGTH = 64
BEFORE = ("weights", "embeddings_and_head", "adapter", "optimizer")  # what is there before the tracker starts


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    """Folders with random LLaMAs, each made and quantized once for this file."""
    from transformers import LlamaForCausalLM

    root, made = tmp_path_factory.mktemp("llamas"), {}

    def folder(**changes):
        shape = SMALL | changes
        key = json.dumps(shape, sort_keys=True)
        if key not in made:
            made[key] = root / str(len(made))
            torch.manual_seed(0)
            LlamaForCausalLM(tiny_config(**shape)).bfloat16().save_pretrained(made[key])
            make_tokenizer().save_pretrained(made[key])
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDENSE_CACHE", str(root / "cache"))
        yield folder


@pytest.fixture(autouse=True)
def chosen_kernels():
    """Whatever a test chooses applies to it alone."""
    yield
    use_kernels("auto")


class NoLaunch:
    """Stands in for a Triton kernel: of memory, only what is allocated around it counts."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


@pytest.fixture
def fused(monkeypatch):
    """Liger's kernels and ours on a CPU, none of which computes anything."""
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # what Liger replaces, to be put back
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    use_kernels("triton")
    replaced = 0
    liger = ("liger_kernel.ops.rms_norm", "liger_kernel.ops.swiglu", "liger_kernel.ops.rope")
    for module in map(importlib.import_module, (*liger, "qdense.ops.denselora_triton")):
        for name in [name for name in vars(module) if name.endswith("_kernel") or name == "_triton_rope"]:
            monkeypatch.setattr(module, name, NoLaunch())
            replaced += 1
    assert replaced >= 12
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # only now, so that no kernel of other tests is made with it


def measured_peak(recipe, layout, *, has_liger=False):
    """Bytes of tensors at the highest moment of a step of two micro-batches, but for those that are there before it."""
    base, settings = load_base(recipe.model), recipe.training
    if has_liger:
        use_liger(base.model)
    model = attach_adapter(base, recipe.adapter, num_steps=10)
    optimizer = build_optimizer(
        settings.optimizer,
        [parameter for _, parameter in trainable_parameters(model)],
        learning_rate=1e-3,
        weight_decay=0.0,
        master_weights=True,
    )
    recompute = Recompute(layout.recompute_layers, layout.offload, layout.mlp_tile_tokens)
    apply_recompute(model, recompute, UncountedHostMemory())
    model.train()

    def passes(num_rows, length):
        ids = np.random.default_rng(0).integers(1, 200, (num_rows, length), dtype=np.int32)
        examples = [Example(number, row, row) for number, row in enumerate(ids)]
        batch = join(examples) if settings.packing else collate(examples, base.pad_token_id)
        batch = {key: value for key, value in batch.items() if key not in ("rows", "num_tokens")}
        with without_logits(model), packed_attention(model) if settings.packing else nullcontext():
            model(**batch, use_cache=False, num_items_in_batch=torch.tensor(100.0)).loss.backward()

    passes(1, 8)  # makes the optimizer's state, and what is cached at first use
    optimizer.step()
    optimizer.zero_grad()
    with TensorMemory() as tensors:
        for _ in range(2):
            passes(layout.micro_batch_size, recipe.data.max_length)
        optimizer.step()
        optimizer.zero_grad()
    return tensors.peak_bytes


def check_peak(folder, kernels, layout, changes, moment=None, length=LENGTH):
    """Prediction and measurement differ by 10% at most (most by less than 5%)."""
    recipe = recipe_of(folder, model__device="cpu", data__max_length=length, **changes)
    memory = memory_of(recipe, model_shape(str(folder)), kernels, layout)
    predicted = memory.peak_bytes - sum(memory.breakdown[part] for part in BEFORE)
    measured = measured_peak(recipe, layout, has_liger=kernels.has_liger)
    print(f"measured {measured:,}, predicted {predicted:,}: {100 * (predicted / measured - 1):+.1f}%, {memory}")
    assert moment in (None, memory.moment)
    assert predicted == pytest.approx(measured, rel=0.1)


LORA, WIDE = {"adapter__method": "lora"}, {"intermediate_size": 1024}
FULL = {"adapter__method": "full", "model__quantization": "none"}
QKV = {"adapter__target_modules": "QKV"}
STEPS = {
    # name: (layers recomputed, moment of the peak, recipe, model)
    "nothing recomputed": (0, "loss", {}, {}),
    "one layer recomputed": (1, "loss", {}, {}),
    "all recomputed": (3, "recompute", {}, {}),
    "no dropout": (0, "loss", {"adapter__dropout": 0.0}, {}),
    "no dropout, all recomputed": (3, "recompute", {"adapter__dropout": 0.0}, {}),
    "padded": (0, "loss", {"training__packing": False}, {}),
    "padded, all recomputed": (3, "recompute", {"training__packing": False}, {}),
    "q, k, v of a wide MLP": (0, "backward", QKV, WIDE),
    "all modules": (0, "loss", {"adapter__target_modules": "QKVOGUD"}, {}),
    "a large rank": (0, "loss", {"adapter__r": 64}, {}),
    "as many heads of k and v": (3, "recompute", {}, {"num_key_value_heads": 4}),
    "fp32, not quantized": (0, "loss", {"model__quantization": "none", "model__dtype": "float32"}, {}),
    "one matrix a layer": (0, "loss", {"adapter__method": "denselora-only-matrix"}, {}),
    "LoRA": (0, "loss", LORA, {}),
    "LoRA, all recomputed": (3, "recompute", LORA, {}),
    "full": (0, "loss", FULL, {}),
    "full, all recomputed": (3, "recompute", FULL, {}),
}


@pytest.mark.parametrize("name", STEPS)
def test_peak_of_a_real_step(name, small_llama):
    use_kernels("torch")
    num_layers, moment, changes, shape = STEPS[name]
    changes = {"adapter__r": 16, **changes}
    check_peak(small_llama(**shape), ON_CPU, StepLayout(2, num_layers), changes, moment)


EVERY_BASE = [
    (name, quantization) for name, method in METHODS.items() if name != "none" for quantization in method.quantizations
]


@pytest.mark.parametrize("num_layers", [0, 4])
@pytest.mark.parametrize(("method", "quantization"), EVERY_BASE)
def test_peak_of_a_real_step_of_every_method(method, quantization, num_layers, small_llama):
    use_kernels("torch")
    changes = {"adapter__method": method, "model__quantization": quantization, "adapter__r": 16}
    check_peak(small_llama(num_hidden_layers=4), ON_CPU, StepLayout(2, num_layers), changes)


PLANNED = [name for name, family in FAMILIES.items() if family.is_planned and name != "llama"]


@pytest.mark.parametrize("num_layers", [0, 3])
@pytest.mark.parametrize("model_type", PLANNED)
def test_peak_of_a_real_step_of_every_family(model_type, num_layers, tmp_path):
    use_kernels("torch")
    folder = make_family_model(model_type, tmp_path / "model", **SMALL, head_dim=32)
    changes = {"adapter__r": 16, "training__packing": not FAMILIES[model_type].why_not_packed}
    check_peak(folder, ON_CPU, StepLayout(2, num_layers), changes)


@pytest.mark.parametrize("model_type", ["gemma2", "cohere2"])
def test_logits_of_all_tokens_are_counted_where_the_loss_needs_them(model_type, tmp_path):
    """A family whose logits are soft-capped, and one that is unknown: its loss may take a sixth less than is planned."""
    folder = make_family_model(model_type, tmp_path / "model", **SMALL, head_dim=32, vocab_size=20_000)
    recipe = recipe_of(folder, model__device="cpu", data__max_length=LENGTH, training__packing=False)
    memory = memory_of(recipe, model_shape(str(folder)), ON_CPU, StepLayout(2, 3))
    predicted = memory.peak_bytes - sum(memory.breakdown[part] for part in BEFORE)
    assert memory.moment == "loss"
    assert 1.0 <= predicted / measured_peak(recipe, StepLayout(2, 3)) <= 1.2


MAKES_MATRICES = ["dora", "hira", "lokr"]  # as large as a weight, which count most where tokens are few


@pytest.mark.parametrize("num_layers", [0, 3])
@pytest.mark.parametrize("method", MAKES_MATRICES)
def test_peak_of_a_few_tokens(method, num_layers, small_llama):
    use_kernels("torch")
    changes = {"adapter__method": method, "adapter__r": 16}
    check_peak(small_llama(), ON_CPU, StepLayout(1, num_layers), changes, length=32)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].is_adapter])
def test_bytes_of_every_adapter(method, small_llama):
    """Frozen parts too."""
    folder = small_llama()
    recipe = recipe_of(folder, model__device="cpu", model__quantization="none", adapter__method=method, adapter__r=16)
    base = load_base(recipe.model)
    before = bytes_of(tensors_of_base(base.model))
    model = attach_adapter(base, recipe.adapter, num_steps=10)
    breakdown = memory_of(recipe, model_shape(str(folder)), ON_CPU, StepLayout(1, 0)).breakdown
    # AdaLoRA's layers have a number more, their rank.
    assert breakdown["adapter"] == pytest.approx(bytes_of(tensors_of_base(model)) - before, rel=1e-3)


HALF_AS_WIDE = {"hidden_size": 256, "num_key_value_heads": 4}
FUSED_STEPS = {
    "nothing recomputed": (StepLayout(2, 0), "backward", {}, {}),
    "one layer recomputed": (StepLayout(2, 1), "backward", {}, {}),
    "all recomputed": (StepLayout(2, 3), "recompute", {}, {}),
    "no dropout": (StepLayout(2, 0), "backward", {"adapter__dropout": 0.0}, {}),
    "a narrow MLP": (StepLayout(2, 0), "backward", {}, HALF_AS_WIDE),
    "a narrow MLP, all recomputed": (StepLayout(2, 3), "recompute", {}, HALF_AS_WIDE),
    "a wide MLP, all recomputed": (StepLayout(2, 3), "recompute", {}, WIDE),
    "LoRA": (StepLayout(2, 0), "loss", LORA, {}),
    "LoRA, all recomputed": (StepLayout(2, 3), "recompute", LORA, {}),
    "tiles": (StepLayout(16, 3, mlp_tile_tokens=128), "recompute", {}, WIDE | {"num_key_value_heads": 4}),
    "inputs in host memory": (StepLayout(4, 3, offload=True), "recompute", {}, {}),
}


@pytest.mark.parametrize("name", FUSED_STEPS)
def test_peak_of_a_real_step_with_fused_kernels(name, small_llama, fused):
    layout, moment, changes, shape = FUSED_STEPS[name]
    check_peak(small_llama(**shape), FUSED, layout, {"adapter__r": 16, **changes}, moment)


def bytes_of(tensors):
    """Each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tensors_of_base(model):
    """Parameters, buffers, and what unpacks 4-bit weights."""
    yield from model.parameters()
    yield from model.buffers()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
            state = state.state2


@pytest.mark.parametrize(("quantization", "tied"), [("nf4", True), ("nf4", False), ("none", True)])
def test_bytes_of_a_loaded_base(quantization, tied, small_llama):
    folder = small_llama(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=2, vocab_size=1000, tie_word_embeddings=tied
    )
    recipe = recipe_of(folder, model__device="cpu", model__quantization=quantization)
    breakdown = memory_of(recipe, model_shape(str(folder)), ON_CPU, StepLayout(1, 0)).breakdown
    model = load_base(recipe.model).model
    tables = bytes_of([model.get_input_embeddings().weight, model.get_output_embeddings().weight])
    assert breakdown["embeddings_and_head"] == tables
    assert breakdown["weights"] + tables == pytest.approx(bytes_of(tensors_of_base(model)), rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "has_masters"),
    [
        ("paged_adamw_8bit", "bfloat16", True),
        ("adamw_8bit", "bfloat16", True),
        ("paged_adamw_32bit", "bfloat16", True),
        ("adamw_torch", "bfloat16", True),
        ("paged_adamw_8bit", "bfloat16", False),
        ("adamw_torch", "float32", False),
    ],
)
def test_bytes_of_adapter_and_optimizer(optimizer, dtype, has_masters, small_llama):
    folder = small_llama()
    recipe = recipe_of(
        folder,
        model__device="cpu",
        adapter__r=64,  # bitsandbytes keeps 32-bit state of what is smaller than 4096 elements
        adapter__dtype=dtype,
        adapter__master_weights=has_masters,
        training__optimizer=optimizer,
    )
    breakdown = memory_of(recipe, model_shape(str(folder)), ON_CPU, StepLayout(1, 0)).breakdown
    model = attach_adapter(load_base(recipe.model), recipe.adapter, num_steps=10)
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    built = build_optimizer(optimizer, parameters, learning_rate=1e-3, weight_decay=0.0, master_weights=has_masters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter, dtype=parameter.grad_dtype)
    assert breakdown["adapter"] == bytes_of(parameters)
    assert breakdown["gradients"] == bytes_of(parameter.grad for parameter in parameters)
    built.step()
    state = [value for values in built.state.values() for value in values.values() if isinstance(value, torch.Tensor)]
    state += built.state_dict().get("masters", [])
    assert breakdown["optimizer"] == pytest.approx(bytes_of(state), rel=0.1)
