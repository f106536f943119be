"""What only a GPU can tell: others' kernels that have no CPU form, and whole runs on CUDA. tools/gpu/measure.py runs these."""

import tomllib

import pytest
import torch

from qdense.data.examples import join
from qdense.events import Notice, StepDone, TrainingDone, TrainingStarted
from qdense.inference.generation import DECODINGS, Prompt, generate
from qdense.modeling.attach import attach_adapter, trainable_parameters
from qdense.modeling.liger import use_liger
from qdense.modeling.load import load_base
from qdense.modeling.loss import without_logits
from qdense.modeling.packing import packed_attention
from qdense.ops.kernels import use_kernels
from qdense.recipe import ModelRecipe
from tests.helpers.packed import arguments, examples_of
from tests.helpers.runs import recipe_for, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def chosen_kernels():
    yield
    use_kernels("auto")


def base_on(tiny_model, device, quantization="none", dtype="bfloat16"):
    return load_base(ModelRecipe(name=str(tiny_model), device=device, quantization=quantization, dtype=dtype))


def on(device, batch):
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in arguments(batch).items()
    }


def step(base, model, batch):
    """Loss and gradients by name, in fp64."""
    model.train()
    with without_logits(model), packed_attention(model):
        loss = model(
            **on(base.device, batch), use_cache=False, num_items_in_batch=torch.tensor(50.0, device=base.device)
        ).loss
        loss.backward()
    gradients = {name: p.grad.double().cpu() for name, p in trainable_parameters(model)}
    model.zero_grad()
    return float(loss), gradients


def difference(ours, theirs):
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-9)) for name in theirs)


def test_packed_attention_by_the_variable_length_kernel_is_the_cpu_s(tiny_model):
    batch = join(examples_of(17, 40, 1, 9, 130))
    logits = {}
    for device in ("cpu", "cuda"):
        base = base_on(tiny_model, device)
        with torch.no_grad(), packed_attention(base.model):
            logits[device] = base.model(**on(base.device, batch), use_cache=False).logits.double().cpu()
    assert (logits["cuda"] - logits["cpu"]).norm() < 0.02 * logits["cpu"].norm()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_fused_kernels_and_liger_give_the_gradients_of_plain_pytorch(tiny_model, quantization):
    batch = join(examples_of(33, 64, 5, 90))
    recipe = recipe_for(tiny_model, "unused", adapter__dropout=0.0, adapter__zero_init="none").adapter
    found = {}
    for kernels in ("torch", "triton"):
        use_kernels(kernels)
        base = base_on(tiny_model, "cuda", quantization)
        torch.manual_seed(5)
        model = attach_adapter(base, recipe, 1)
        if kernels == "triton":
            use_liger(base.model)
        found[kernels] = step(base, model, batch)
    assert found["triton"][0] == pytest.approx(found["torch"][0], rel=2e-3)
    assert difference(found["triton"][1], found["torch"][1]) < 0.05


def test_recomputation_repeats_the_fused_dropout(tiny_model):
    from qdense.modeling.recompute import Recompute, apply_recompute

    batch = join(examples_of(33, 64, 5, 90))
    recipe = recipe_for(tiny_model, "unused", adapter__dropout=0.3, adapter__zero_init="none").adapter
    base = base_on(tiny_model, "cuda", "nf4")
    torch.manual_seed(5)
    model = attach_adapter(base, recipe, 1)
    found = []
    for layout in (Recompute(0), Recompute(2), Recompute(2, offload=True), Recompute(1)):
        apply_recompute(model, layout)
        torch.manual_seed(6)
        found.append(step(base, model, batch))
    for loss, gradients in found[1:]:
        assert loss == found[0][0]
        assert difference(gradients, found[0][1]) < 1e-3  # flash attention's backward adds in no fixed order


@pytest.mark.parametrize("name", ["greedy", "beam4"])
def test_recorded_steps_give_the_same_tokens(tiny_model, name):
    recipe = recipe_for(tiny_model, "unused", adapter__zero_init="none").adapter
    base = base_on(tiny_model, "cuda", dtype="float32")
    model = attach_adapter(base, recipe, 1).eval()
    prompts = [Prompt(number, 0, list(range(3, 5 + 7 * number % 60))) for number in range(40)]

    def complete(is_recorded):
        settings = {"max_new_tokens": 30, "stop": (), "batch_size": 12, "is_recorded": is_recorded}
        found = generate(base, model, prompts, DECODINGS[name], **settings)
        return {completion.index: (completion.completion, completion.num_tokens) for completion in found}

    assert complete(True) == complete(False)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_whole_run_learns_as_planned(tiny_model, tmp_path, kernels):
    recipe = recipe_for(
        tiny_model, tmp_path / "run", model__device="cuda", training__kernels=kernels,
        training__recompute="auto", training__micro_batch_size="auto", training__optimizer="paged_adamw_8bit",
    )  # fmt: skip
    events = run(recipe)
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert losses[-1] < losses[0]
    assert next(event for event in events if isinstance(event, TrainingDone)).peak_memory_bytes > 0
    plan = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["provenance"]["plan"]
    is_fused = kernels == "triton"
    assert plan["kernels"] == {"is_cuda": True, "is_fused": is_fused, "has_liger": is_fused}
    assert plan["layout"] == {"micro_batch_size": 4, "recompute_layers": 0, "offload": False}
    facts = dict(next(event for event in events if isinstance(event, TrainingStarted)).facts)
    assert "4 rows (1,280 tokens) at a time, no layer recomputed" in facts["plan"]
    assert not [event.text for event in events if isinstance(event, Notice) and "predicted to need" in event.text]
