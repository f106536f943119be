"""Recomputed, offloaded and tiled layers against plain ones: same losses and gradients, in less memory."""

from __future__ import annotations

import collections
import weakref
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from qdense.data.examples import Example, join
from qdense.modeling.load import load_base
from qdense.modeling.loss import without_logits
from qdense.modeling.packing import packed_attention
from qdense.modeling.recompute import HostMemory, Recompute, apply_recompute
from qdense.ops.kernels import use_kernels, why_not_triton
from qdense.recipe import ModelRecipe
from qdense.training.optimizer import build_optimizer
from qdense.tuners import DenseLoraConfig
from tests.helpers.memory import LateHostMemory, TensorMemory, UncountedHostMemory
from tests.helpers.models import tiny_config

LAYERS, TOKENS, TILE = 4, 21, 8  # tiles of 8, 8 and 5 tokens
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN = Recompute(0)
IDS = torch.randint(1, 250, (2, TOKENS), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS, "use_cache": False}


def denselora(dropout=0.1, **settings):
    return DenseLoraConfig(r=8, dropout=dropout, zero_init="none", target_modules=TARGETS, **settings)


def lora(dropout=0.1):
    return LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False, target_modules=TARGETS)


def adapted(config, base=None):
    torch.manual_seed(1)
    if base is None:
        base = LlamaForCausalLM(tiny_config(num_hidden_layers=LAYERS)).requires_grad_(False)
    return get_peft_model(base, config, autocast_adapter_dtype=False).train()


def nf4(tiny_model, config):
    return adapted(config, load_base(ModelRecipe(name=str(tiny_model), device="cpu")).model)


MAKERS = {
    "denselora": lambda folder: adapted(denselora()),
    "lora": lambda folder: adapted(lora()),
    "nf4": lambda folder: nf4(folder, denselora()),
}


@pytest.fixture(scope="module", params=MAKERS)
def model(request, tiny_model):
    return MAKERS[request.param](tiny_model)


@pytest.fixture(scope="module")
def dense(tiny_model):
    return MAKERS["denselora"](tiny_model)


def layers_of(model):
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    return core.model.layers


def packed_batch():
    rows = zip(IDS.flatten().split([17, 1, 24]), range(3), strict=True)
    batch = join([Example(row, ids.numpy(), ids.numpy()) for ids, row in rows])
    return {key: value for key, value in batch.items() if key not in ("rows", "num_tokens")} | {"use_cache": False}


def step(model, batch=BATCH, autocast=False, around=lambda: nullcontext()):
    """Loss and gradients (the generator's state after the step among them) of one step from a fixed seed."""
    model.zero_grad()
    is_packed = "cu_seq_lens_q" in batch
    with packed_attention(model.get_base_model()) if is_packed else nullcontext():
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), around():
            loss = model(**batch).loss
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    assert all(gradient.any() for gradient in gradients.values())
    return {"loss": loss.detach(), **gradients, "random": torch.get_rng_state()}


def stepped(model, recompute, *args, **kwargs):
    """`step` as `recompute` says; the model is plain again after it."""
    apply_recompute(model, recompute)
    try:
        return step(model, *args, **kwargs)
    finally:
        apply_recompute(model, PLAIN)


def tiled_with_autograd(model, num_layers, *args, **kwargs):
    """`step` with the MLPs of the first layers tiled, and autograd left to keep what it likes."""
    mlps = [layer.mlp for layer in layers_of(model)[:num_layers]]
    for mlp in mlps:

        def forward(hidden, whole=mlp.forward):
            return torch.cat([whole(tile) for tile in hidden.split(TILE, dim=1)], dim=1)

        mlp.forward = forward
    try:
        return step(model, *args, **kwargs)
    finally:
        for mlp in mlps:
            del mlp.forward


def assert_same_bits(result, expected):
    assert result.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(result[name], expected[name])] == []


def assert_close(result, expected, tolerance):
    """The loss and the generator's state exactly, each gradient within `tolerance` of its norm."""
    assert result.keys() == expected.keys()
    assert torch.equal(result["random"], expected["random"])
    for name in expected.keys() - {"random"}:
        difference = (result[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        assert difference <= tolerance, (name, difference)


# --- the same gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [BATCH, packed_batch()], ids=["padded", "packed"])
def test_recomputed_and_offloaded_layers_give_the_same_bits(model, batch):
    expected = step(model, batch)
    for num_layers in {0, 1, len(layers_of(model)) - 1, len(layers_of(model))}:
        for offload in (False, True):
            assert_same_bits(stepped(model, Recompute(num_layers, offload), batch), expected)


@pytest.mark.parametrize("batch", [BATCH, packed_batch()], ids=["padded", "packed"])
def test_tiles_are_dropped_in_backward_as_they_were_in_forward(model, batch):
    num_layers = len(layers_of(model)) - 1
    expected = tiled_with_autograd(model, num_layers, batch)
    tolerance = 0.02 if any(p.dtype == torch.bfloat16 for p in model.parameters()) else 1e-5
    for offload in (False, True):
        result = stepped(model, Recompute(num_layers, offload, TILE), batch)
        assert torch.equal(result["loss"], expected["loss"])
        assert_close(result, expected, tolerance)


@pytest.mark.parametrize("tile", [1, 7, TOKENS - 1, TOKENS, 1000])
def test_tiles_without_dropout_do_not_change_the_gradients(tile):
    for config in (denselora(dropout=0.0), lora(dropout=0.0)):
        model = adapted(config)
        expected = step(model)
        assert_close(stepped(model, Recompute(LAYERS, True, tile)), expected, 1e-5)
        apply_recompute(model, Recompute(LAYERS, True, tile))
        with torch.no_grad():
            assert torch.allclose(model(**BATCH).loss, expected["loss"], rtol=1e-6)
        model.eval()
        assert_close(step(model), expected, 1e-5)  # eval keeps activations, and tiles all the same


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_models(model_type):
    names = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "pad_token_id",
        "eos_token_id", "bos_token_id",
    )  # fmt: skip
    shape = {name: getattr(tiny_config(), name) for name in names}
    config = AutoConfig.for_model(model_type, **shape, num_hidden_layers=3, head_dim=16)
    model = adapted(lora(), AutoModelForCausalLM.from_config(config).requires_grad_(False))
    expected = step(model)
    assert_same_bits(stepped(model, Recompute(2, offload=True)), expected)
    assert_close(stepped(model, Recompute(2, True, TILE)), tiled_with_autograd(model, 2), 1e-5)


def test_the_loss_without_logits(dense):
    def around():
        return without_logits(dense)

    expected = tiled_with_autograd(dense, 2, packed_batch(), around=around)
    assert_close(stepped(dense, Recompute(2, True, TILE), packed_batch(), around=around), expected, 1e-5)


def test_bf16_parameters_with_fp32_gradients(tiny_model):
    model = nf4(tiny_model, denselora())
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    build_optimizer("adamw_torch", parameters, learning_rate=1e-3, weight_decay=0.0, master_weights=True)
    expected = tiled_with_autograd(model, 2)
    result = stepped(model, Recompute(2, True, TILE))
    assert {gradient.dtype for name, gradient in result.items() if "denselora" in name} == {torch.float32}
    assert_close(result, expected, 0.02)


def test_tiles_run_under_the_autocast_of_forward(dense):
    """And the layers after the tiled ones, which share encoders and decoders with them, have gradients too."""
    expected = tiled_with_autograd(dense, 2, autocast=True)
    dtypes = []
    modules = [layer.mlp.down_proj.base_layer for layer in layers_of(dense)]
    handles = [module.register_forward_hook(lambda _, arguments, y: dtypes.append(y.dtype)) for module in modules]
    result = stepped(dense, Recompute(2, True, TILE), autocast=True)
    for handle in handles:
        handle.remove()
    assert dtypes == [torch.bfloat16] * (
        2 * 3 + 2 + 2 * 3
    )  # in forward two tiled layers and two whole ones; in backward
    assert_close(result, expected, 0.02)


def test_adapters_in_the_mlp_alone_or_in_few_layers():
    """The first tiled MLP's input, or even its output, then requires no gradient."""
    mlp_only = DenseLoraConfig(r=8, dropout=0.1, zero_init="none", target_modules=["gate_proj", "down_proj"])
    for config in (mlp_only, denselora(layers_to_transform=[1, 3], layers_pattern="layers")):
        model = adapted(config)
        for num_layers in (2, LAYERS):
            expected = tiled_with_autograd(model, num_layers)
            assert_close(stepped(model, Recompute(num_layers, True, TILE)), expected, 1e-5)
        assert_same_bits(stepped(model, Recompute(LAYERS, True)), step(model))


def test_a_model_that_is_trained_in_full():
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=LAYERS)).train()
    expected = step(model)
    assert_same_bits(stepped(model, Recompute(3, True)), expected)
    assert_close(stepped(model, Recompute(LAYERS, True, TILE)), expected, 1e-5)


# --- what runs how often ----------------------------------------------------------------------------------------------


def counted_tokens(model):
    """Tokens that each layer's attention, and its MLP, have computed in a step."""
    counts = {kind: [0] * len(layers_of(model)) for kind in ("q_proj", "down_proj")}
    handles = []
    for index, layer in enumerate(layers_of(model)):
        for kind, module in (("q_proj", layer.self_attn.q_proj), ("down_proj", layer.mlp.down_proj)):

            def count(module, arguments, kind=kind, index=index):
                counts[kind][index] += arguments[0].shape[1]

            handles.append(module.register_forward_pre_hook(count))
    step(model)
    for handle in handles:
        handle.remove()
    return counts["q_proj"], counts["down_proj"]


def test_the_first_layers_are_recomputed_and_each_mlp_runs_twice_at_most(dense):
    for tile in (None, TILE):
        apply_recompute(dense, Recompute(3, True, tile))
        attention, mlp = counted_tokens(dense)
        assert attention == mlp == [2 * TOKENS] * 3 + [TOKENS]
    apply_recompute(dense, PLAIN)
    assert counted_tokens(dense) == ([TOKENS] * LAYERS, [TOKENS] * LAYERS)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_recomputed_layer_stops_before_its_last_product(tiny_model, kernels):
    """Everything that its backward pass needs is saved before. (PEFT's LoRA saves after: its down_proj runs twice.)"""
    if kernels == "triton" and why_not_triton("cpu"):
        pytest.skip(why_not_triton("cpu"))
    model = nf4(tiny_model, denselora())
    calls = collections.Counter()
    for kind in ("up_proj", "down_proj"):
        for layer in layers_of(model):
            frozen = layer.mlp.get_submodule(kind).base_layer
            frozen.register_forward_hook(lambda *_, kind=kind: calls.update([kind]))
    use_kernels(kernels)
    try:
        apply_recompute(model, Recompute(len(layers_of(model))))
        step(model)
    finally:
        use_kernels("auto")
    assert calls["up_proj"] == 2 * len(layers_of(model))
    assert calls["down_proj"] == len(layers_of(model))


def test_without_early_stop_tiles_run_once_more_and_are_right(dense):
    expected = tiled_with_autograd(dense, 3)
    with set_checkpoint_early_stop(False):
        assert_close(stepped(dense, Recompute(3, True, TILE)), expected, 1e-5)
        apply_recompute(dense, Recompute(3, True, TILE))
        assert counted_tokens(dense)[1] == [3 * TOKENS] * 3 + [TOKENS]
    apply_recompute(dense, PLAIN)


def mlp_calls(model):
    """How often each layer's MLP runs in a forward pass: once, or once for each tile."""
    calls = [0] * len(layers_of(model))
    handles = []
    for index, layer in enumerate(layers_of(model)):

        def count(*_, index=index):
            calls[index] += 1

        handles.append(layer.mlp.down_proj.register_forward_pre_hook(count))
    with torch.no_grad():
        model(**BATCH)
    for handle in handles:
        handle.remove()
    return calls


def test_settings_replace_each_other_and_leave_nothing(dense):
    expected, core, layers = step(dense), dense.get_base_model(), layers_of(dense)
    mlp, needs_gradient = layers[0].mlp, []
    handle = layers[0].register_forward_pre_hook(lambda _, inputs: needs_gradient.append(inputs[0].requires_grad))

    def own_forward(hidden):
        return type(mlp).forward(mlp, hidden)

    mlp.forward = own_forward
    for recompute in (Recompute(4, True, 5), Recompute(2, False, TILE), Recompute(3, True), Recompute(1), PLAIN):
        host = HostMemory()
        apply_recompute(dense, recompute, host)
        expected_calls = [1] * LAYERS
        if recompute.mlp_tile_tokens:
            expected_calls[: recompute.num_layers] = [-(-TOKENS // recompute.mlp_tile_tokens)] * recompute.num_layers
        assert mlp_calls(dense) == expected_calls
        is_recomputed = [index < recompute.num_layers for index in range(LAYERS)]
        assert [layer.gradient_checkpointing for layer in layers] == is_recomputed
        step(dense)
        assert len(host.free) == (recompute.num_layers if recompute.offload else 0)
    handle.remove()
    assert set(needs_gradient) == {False}  # the embeddings' output
    assert vars(mlp)["forward"] is own_forward
    del mlp.forward
    assert all("forward" not in vars(layer.mlp) for layer in layers)
    assert not core.is_gradient_checkpointing
    assert_same_bits(step(dense), expected)


@pytest.mark.parametrize("num_layers", [-1, LAYERS + 1])
def test_numbers_of_layers_that_the_model_does_not_have(dense, num_layers):
    with pytest.raises(
        ValueError, match=f"num_layers = {num_layers}: this model has {LAYERS} layers; give 0 to {LAYERS}"
    ):
        apply_recompute(dense, Recompute(num_layers))


def test_tiles_of_no_tokens_and_models_without_layers(dense):
    with pytest.raises(ValueError, match="mlp_tile_tokens = 0: must be a positive integer"):
        apply_recompute(dense, Recompute(1, mlp_tile_tokens=0))
    with pytest.raises(ValueError, match="Sequential has no list of decoder layers"):
        apply_recompute(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList()), PLAIN)
    model = LlamaForCausalLM(tiny_config())
    model.model.layers[1].mlp = None
    with pytest.raises(ValueError, match="mlp_tile_tokens = 8: LlamaDecoderLayer has no module `mlp`"):
        apply_recompute(model, Recompute(1, mlp_tile_tokens=8))
    apply_recompute(model, Recompute(2))


# --- host memory ------------------------------------------------------------------------------------------------------


@pytest.fixture
def offloading(dense):
    """The model, three of its four layers offloaded, and the host memory that they share."""
    host = HostMemory()
    apply_recompute(dense, Recompute(3, offload=True), host)
    yield dense, host
    apply_recompute(dense, PLAIN)


def inputs_alive(model, batch=BATCH):
    """For each layer, after a forward, whether the memory of its input still lives; and the loss."""
    inputs = []
    handles = [
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0].untyped_storage())))
        for layer in layers_of(model)
    ]
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    return [reference() is not None for reference in inputs], loss


def test_no_offloaded_input_stays_on_the_device(offloading):
    model, _ = offloading
    alive, loss = inputs_alive(model)
    assert alive == [False] * 3 + [True]
    loss.backward()
    apply_recompute(model, Recompute(3))
    assert inputs_alive(model)[0] == [True] * 4


def test_the_input_alone_waits_in_host_memory():
    """Not another tensor at the input's address: a layer's other arguments stay where they are."""

    class Layer(GradientCheckpointingLayer):
        def forward(self, hidden, other):
            return hidden.square() * other

    model, host = LlamaForCausalLM(tiny_config()), HostMemory()
    model.model.layers = nn.ModuleList([Layer()])
    apply_recompute(model.train(), Recompute(1, offload=True), host)
    hidden = torch.randn(2, 3, requires_grad=True)
    other = hidden.detach()
    assert other.data_ptr() == hidden.data_ptr()
    model.model.layers[0](hidden, other).sum().backward()
    torch.testing.assert_close(hidden.grad, 2 * other.square())
    assert [len(buffer) for buffer in host.free] == [32]  # 2 * 3 * 4 bytes, rounded up


def addresses(host):
    return sorted(buffer.data_ptr() for buffer in host.free)


def test_buffers_are_used_again_and_outgrown_ones_go(offloading):
    model, host = offloading
    step(model)
    first = addresses(host)
    assert len(first) == 3
    step(model)
    short = {**BATCH, "input_ids": IDS[:, :5], "labels": IDS[:, :5]}
    step(model, short)
    assert addresses(host) == first
    long = {**BATCH, "input_ids": IDS.repeat(1, 4), "labels": IDS.repeat(1, 4)}
    expected = step(model, long)
    assert len(host.free) == 3
    needed = 2 * 4 * TOKENS * 64 * 4
    assert all(needed <= len(buffer) < 2 * needed for buffer in host.free)
    assert_same_bits(stepped(model, PLAIN, long), expected)


def test_everything_is_let_go_when_no_backward_follows(offloading):
    model, host = offloading
    with torch.no_grad():
        model(**BATCH)
    assert host.free == []
    loss = model(**BATCH).loss
    assert host.free == []
    loss = model(**BATCH).loss  # the first one's graph goes
    assert len(host.free) == 3
    del loss
    assert len(host.free) == 6


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("tile", [None, TILE])
def test_everything_is_let_go_when_memory_runs_out(dense, where, tile):
    expected = tiled_with_autograd(dense, 3) if tile else step(dense)
    host = HostMemory()
    apply_recompute(dense, Recompute(3, True, tile), host)
    starts = 0

    def fail(module, arguments):
        nonlocal starts
        starts += 1
        if starts == (1 if where == "forward" else 2):  # the second time is the recomputation
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = layers_of(dense)[1].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        step(dense)
    handle.remove()
    # On a CPU torch keeps what is left of a backward that broke off until the next one begins.
    torch.ones((), requires_grad=True).backward()
    assert len(host.free) == (2 if where == "forward" else 3)
    assert_close(step(dense), expected, 1e-5)
    assert len(host.free) == 3
    apply_recompute(dense, PLAIN)


def test_two_forwards_before_their_backwards(offloading):
    model, host = offloading
    other = {**BATCH, "input_ids": IDS.flip(1)}

    def both():
        model.zero_grad()
        torch.manual_seed(3)
        first, second = model(**BATCH).loss, model(**other).loss
        second.backward()
        first.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    result = both()
    assert len(host.free) == 6
    apply_recompute(model, PLAIN)
    assert_same_bits(result, both())


def test_copies_overlap_and_are_waited_for():
    model = adapted(denselora())
    expected = step(model)
    copies = LateHostMemory()

    def note_waiting(*_):
        if copies.waiting:
            copies.events.append("copy during the layer")

    for index, layer in enumerate(layers_of(model)):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: copies.events.append(f"compute {index}"))
        layer.mlp.register_forward_hook(note_waiting)
    apply_recompute(model, Recompute(3, offload=True), copies)
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**BATCH).loss
    # Each copy to the host begins before its layer's computation, and has been waited for after it.
    out = [event for index in range(3) for event in ("copy", f"compute {index}", "copy during the layer")]
    assert copies.events == [*out, "compute 3"]
    assert copies.waiting == []
    copies.events.clear()
    loss.backward()
    # The last one's input comes back on demand, the others' a layer ahead.
    back = [event for event in copies.events if event != "copy during the layer"]
    assert back == ["copy", "copy", "compute 2", "copy", "compute 1", "compute 0"]
    assert copies.waiting == []
    assert_same_bits(step(model), expected)


def test_a_copy_under_way_is_waited_for_when_backward_breaks_off():
    model = adapted(denselora())
    copies = LateHostMemory()
    apply_recompute(model, Recompute(3, offload=True), copies)

    def fail(module, gradients):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = layers_of(model)[1].mlp.register_full_backward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(**BATCH).loss.backward()
    handle.remove()
    assert copies.waiting == []


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(model, recompute):
    """Bytes of tensors on the device at the end of forward, and at the peak of backward."""
    apply_recompute(model, recompute, UncountedHostMemory())
    ids = IDS[:1].repeat(1, 12)
    with TensorMemory() as tensors:
        loss = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.sum()
        after_forward = tensors.live_bytes
        tensors.peak_bytes = 0
        loss.backward()
    apply_recompute(model, PLAIN)
    return after_forward, tensors.peak_bytes


def test_each_means_saves_the_memory_it_is_there_for():
    config = tiny_config(num_hidden_layers=6, intermediate_size=512)
    model = adapted(denselora(), LlamaForCausalLM(config).requires_grad_(False))
    tokens = 12 * TOKENS
    hidden, wide = tokens * 64 * 4, tokens * 512 * 4
    step(model)  # gradients are there from now on
    plain, half, whole, offloaded, tiled, both = (
        memory(model, recompute)
        for recompute in (
            PLAIN, Recompute(3), Recompute(6), Recompute(6, True), Recompute(6, False, 32), Recompute(6, True, 32),
        )
    )  # fmt: skip
    # At the end of forward: activations of 6, 3 and no layers; 6 and no inputs.
    assert plain[0] - half[0] > 3 * 3 * wide
    assert half[0] - whole[0] > 3 * 3 * wide
    assert whole[0] - offloaded[0] == 6 * hidden
    assert (tiled[0], both[0]) == (whole[0], offloaded[0])
    # At the peak of backward: activations of 6, 3 and 1 layers; 6 and 2 inputs; a tile's share of the wide activations.
    assert plain[1] - half[1] > 2 * 3 * wide
    assert half[1] - whole[1] > 2 * 3 * wide
    assert 2 * hidden < whole[1] - offloaded[1] <= 4 * hidden
    assert whole[1] - tiled[1] > 3 * wide
    assert 2 * hidden < tiled[1] - both[1] <= 4 * hidden


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    """With inputs large enough that a copy that is not waited for would show, step after step in the same buffers."""
    config = tiny_config(num_hidden_layers=LAYERS, hidden_size=1024, attn_implementation="eager")
    model = adapted(denselora(), LlamaForCausalLM(config).requires_grad_(False)).to("cuda")
    ids = IDS.repeat(4, 40).cuda()
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    expected, tiled = step(model, batch), tiled_with_autograd(model, 3, batch)
    host = HostMemory()
    apply_recompute(model, Recompute(3, offload=True), host)
    for _ in range(3):
        assert_same_bits(step(model, batch), expected)
        assert len(host.free) == 3
        assert all(buffer.is_pinned() for buffer in host.free)
    assert inputs_alive(model, batch)[0] == [False] * 3 + [True]
    assert_close(stepped(model, Recompute(3, True, TILE), batch), tiled, 1e-4)
