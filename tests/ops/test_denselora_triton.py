"""The fused kernels against the plain equation, with the masks that they say they use. On a CPU in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qdense.ops import denselora
from qdense.ops.denselora import ACTIVATIONS, DropoutMasks, denselora_delta
from qdense.ops.interpreter import is_interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not is_interpreted():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from qdense.ops import denselora_triton as fused  # noqa: E402

SCALING = 0.7
EXACT = 4e-6 if DEVICE == "cpu" else 1e-5  # in fp32: a GPU sums in another order


@dataclass
class Group:
    """Modules that read the same x: their parameters, and the gradients that arrive at their outputs."""

    x: Tensor
    weights: list[Tensor]  # W0, frozen
    encoders: list[Tensor]
    ms: list[Tensor]
    decoders: list[Tensor]
    upstream: list[Tensor]

    def to(self, dtype: torch.dtype) -> Group:
        """The same numbers in another dtype, on their own in the graph."""

        def copy(value: Tensor) -> Tensor:
            return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)

        lists = (self.weights, self.encoders, self.ms, self.decoders, self.upstream)
        return Group(copy(self.x), *([copy(value) for value in values] for values in lists))

    @property
    def trained(self) -> list[Tensor]:
        return [value for value in (self.x, *self.encoders, *self.ms, *self.decoders) if value.requires_grad]


def make_group(shape, d_in, ranks, d_out=37, dtype=torch.float32) -> Group:
    torch.manual_seed(1)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape)).to(DEVICE, dtype).requires_grad_()

    return Group(
        draw(*shape, d_in),
        [draw(d_out + i, d_in, scale=d_in**-0.5).requires_grad_(False) for i, _ in enumerate(ranks)],
        [draw(r, d_in, scale=d_in**-0.5) for r in ranks],
        [draw(r, r, scale=2 * r**-0.5) for r in ranks],
        [draw(d_out + i, r, scale=r**-0.5) for i, r in enumerate(ranks)],
        [draw(*shape, d_out + i).requires_grad_(False) for i, _ in enumerate(ranks)],
    )


def adapt(ops, output: Tensor, mixed: Tensor, decoder: Tensor, **settings) -> Tensor:
    """The output with its delta: what `decode` and `add` do together."""
    return ops.add(output, ops.decode(mixed, decoder, **settings))


def run_ops(ops, group: Group, activation="gelu", dropout=0.0) -> list[Tensor]:
    """Outputs, then gradients of all that is trained, as a model computes them with `ops`."""
    torch.manual_seed(2)
    x, encoded = ops.encode(group.x, group.encoders, activation=activation, dropout=dropout)
    outputs = [
        adapt(ops, F.linear(x, w), F.linear(a, m), d, scaling=SCALING, activation=activation, dropout=dropout)
        for w, a, m, d in zip(group.weights, encoded, group.ms, group.decoders, strict=True)
    ]
    return [*outputs, *torch.autograd.grad(outputs, group.trained, group.upstream)]


def run_equation(group: Group, activation="gelu", dropout=0.0) -> list[Tensor]:
    """The same by the plain equation, with the masks of the seeds that the kernels draw."""
    torch.manual_seed(2)
    num_rows = group.x.numel() // group.x.shape[-1]
    ranks = [len(encoder) for encoder in group.encoders]

    def masks(num_seeds, *widths):
        if not dropout:
            return [torch.ones((), dtype=group.x.dtype, device=DEVICE)] * num_seeds
        seeds = torch.randint(2**31, (num_seeds,)).tolist()
        keeps = [
            fused.keep_mask(seed, num_rows, width, dropout, DEVICE) for seed, width in zip(seeds, widths, strict=True)
        ]
        return [keep.view(*group.x.shape[:-1], -1).to(group.x.dtype) / (1 - dropout) for keep in keeps]

    input_mask, encoded_mask = masks(2, group.x.shape[-1], sum(ranks))
    encoded_masks = encoded_mask.split(ranks, -1) if dropout else [encoded_mask] * len(ranks)
    outputs = []
    for w, e, m, d, encoded in zip(group.weights, group.encoders, group.ms, group.decoders, encoded_masks, strict=True):
        drawn = DropoutMasks(input_mask, encoded, *masks(1, len(d)))
        delta = denselora_delta(group.x, e, m, d, scaling=SCALING, activation=activation, masks=drawn)
        outputs.append(F.linear(group.x, w) + delta)
    return [*outputs, *torch.autograd.grad(outputs, group.trained, group.upstream)]


def assert_close(results, expected, tolerance):
    assert len(results) == len(expected)
    for i, (result, value) in enumerate(zip(results, expected, strict=True)):
        assert result.shape == value.shape, i
        error = (result.double() - value.double()).abs().max().item()
        assert error <= tolerance * value.double().abs().max().item(), f"result {i}, {tuple(value.shape)}: {error}"


CASES = {  # shape of tokens, d_in, ranks, d_out
    "a vector": ((), 5, (1, 300), 3),
    "one token, one rank": ((1,), 5, (1,), 3),
    "odd": ((7,), 70, (3, 16), 37),
    "three of a kind": ((2, 19), 130, (16, 33, 3), 130),
    "chunks of tokens": ((520,), 33, (4,), 34),
    "64 and 128": ((35,), 40, (64, 128), 70),
    "wide": ((2, 3, 11), 41, (200, 128), 67),
    "512": ((33,), 20, (512,), 130),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_the_equation(case, dropout):
    shape, d_in, ranks, d_out = CASES[case]
    group = make_group(shape, d_in, ranks, d_out)
    assert_close(run_ops(fused, group, "gelu", dropout), run_equation(group.to(torch.float64), "gelu", dropout), EXACT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("r", [8, 130])
def test_every_activation(activation, r):
    group = make_group((21,), 30, (r, 130))
    expected = run_equation(group.to(torch.float64), activation, 0.3)
    assert_close(run_ops(fused, group, activation, 0.3), expected, EXACT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_large_and_tiny_numbers(activation):
    mixed = torch.cat([s * torch.logspace(-12, 4, 65) for s in (1, -1)]).to(DEVICE)[:, None].requires_grad_()
    one = torch.ones(1, 1, device=DEVICE)
    result = adapt(fused, torch.zeros(130, 1, device=DEVICE), mixed, one, scaling=1.0, activation=activation)
    (slope,) = torch.autograd.grad(result.sum(), mixed)
    exact = mixed.detach().double().requires_grad_()
    expected = ACTIVATIONS[activation](exact)
    # GELU's 1 + erf, and the like, cancel in fp32: at large negative numbers, as in PyTorch.
    torch.testing.assert_close(result.double(), expected, rtol=3e-6, atol=3e-7)
    torch.testing.assert_close(slope.double(), *torch.autograd.grad(expected.sum(), exact), rtol=3e-6, atol=1e-6)
    small = (mixed.abs() < 1e-3) & (mixed != 0)
    torch.testing.assert_close(result.double()[small], expected[small], rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["odd", "three of a kind", "64 and 128", "wide"])
def test_half_precision_rounds_no_more_than_plain_pytorch(case, dtype):
    shape, d_in, ranks, d_out = CASES[case]
    group = make_group(shape, d_in, ranks, d_out, dtype)
    exact = run_equation(group.to(torch.float64), "gelu", 0.5)
    results, plain = run_ops(fused, group, "gelu", 0.5), run_equation(group, "gelu", 0.5)
    for i, (result, other, value) in enumerate(zip(results, plain, exact, strict=True)):
        assert result.dtype == dtype
        error, allowed = ((got.double() - value).square().mean().sqrt().item() for got in (result, other))
        assert error <= 1.5 * allowed, f"result {i}: {error / allowed}"


@pytest.mark.parametrize("ranks", [(5,), (300, 3)])
def test_equals_the_plain_operations(ranks):
    group = make_group((2, 13), 50, ranks)
    assert_close(run_ops(fused, group, "silu"), run_ops(denselora, group.to(torch.float64), "silu"), EXACT)


@pytest.mark.parametrize("ranks", [(5,), (300,)])
@pytest.mark.parametrize("frozen", ["x", "encoders", "decoders", "ms", "x and encoders"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(ranks, frozen):
    group = make_group((11,), 24, ranks)
    for name in frozen.split(" and "):
        for value in [group.x] if name == "x" else getattr(group, name):
            value.requires_grad_(False)
    expected = run_equation(group.to(torch.float64), "gelu", 0.3)
    assert_close(run_ops(fused, group, "gelu", 0.3), expected, EXACT)


def test_one_encoder_of_a_group_may_be_frozen():
    group = make_group((11,), 24, (4, 5))
    group.encoders[0].requires_grad_(False)
    assert_close(run_ops(fused, group, "gelu", 0.3), run_equation(group.to(torch.float64), "gelu", 0.3), EXACT)


def test_an_x_without_gradient_does_not_ask_the_projection_for_one():
    group = make_group((11,), 24, (4,))
    x = group.x.detach()
    again, _ = fused.encode(x, group.encoders)
    assert again is x
    again, _ = fused.encode(group.x, group.encoders)
    assert again.requires_grad
    assert again.data_ptr() == group.x.data_ptr()


@pytest.mark.parametrize("used", ["encoded", "x"])
def test_gradients_when_only_one_result_is_used(used):
    group = make_group((9,), 24, (4,))
    x, (encoded,) = fused.encode(group.x, group.encoders, activation="none")
    result = encoded if used == "encoded" else x.square()
    x_gradient, e_gradient = torch.autograd.grad(result.sum(), [group.x, *group.encoders], allow_unused=True)
    if used == "x":
        torch.testing.assert_close(x_gradient, 2 * group.x)
        assert e_gradient is None
    else:
        torch.testing.assert_close(x_gradient, group.encoders[0].sum(0).expand(9, -1))
        torch.testing.assert_close(e_gradient, group.x.sum(0).expand(4, -1))


@pytest.mark.parametrize("r", [6, 300])
def test_inputs_and_gradients_need_not_be_contiguous(r):
    group = make_group((6, 10), 24, (r,))
    expected = run_equation(group.to(torch.float64), "gelu", 0.3)

    def turned(value: Tensor) -> Tensor:
        return value.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(value.requires_grad)

    group.x, group.upstream = turned(group.x), [turned(value) for value in group.upstream]
    group.encoders, group.decoders = [turned(e) for e in group.encoders], [turned(d) for d in group.decoders]
    assert not group.x.is_contiguous()
    assert_close(run_ops(fused, group, "gelu", 0.3), expected, EXACT)
    # A sum's gradient is one number, expanded.
    x, (encoded,) = fused.encode(group.x, group.encoders, activation="tanh")
    summed = torch.autograd.grad(x.sum() + encoded.sum(), group.x)[0]
    plain, (encoded,) = denselora.encode(group.x, group.encoders, activation="tanh")
    assert_close([summed], torch.autograd.grad(plain.sum() + encoded.sum(), group.x), EXACT)


def test_no_tokens_and_no_launch(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("launched")

    monkeypatch.setattr(torch.autograd.Function, "apply", fail)
    group = make_group((2, 0), 24, (4, 3))
    results = run_ops(fused, group, "gelu", 0.3)
    assert [tuple(result.shape) for result in results[:3]] == [(2, 0, 37), (2, 0, 38), (2, 0, 24)]
    assert all(not gradient.any() for gradient in results)


# --- in place


def make_linear(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind == "Linear4bit":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        layer = bitsandbytes.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict({"weight": torch.randn(128, 64)})
    else:
        layer = nn.Linear(64, 128, bias=kind == "Linear with bias")
    return layer.to(DEVICE).requires_grad_(False)


@pytest.mark.parametrize("shape", [(10,), (2, 5)])
@pytest.mark.parametrize("kind", ["Linear", "Linear with bias", "Linear4bit"])
def test_writes_into_the_output_of_a_frozen_layer(kind, shape):
    layer = make_linear(kind)
    x = torch.randn(*shape, 64, device=DEVICE, requires_grad=True)
    mixed, decoder = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((*shape, 7), (128, 7)))
    upstream = torch.randn(*shape, 128, device=DEVICE)
    plain = adapt(denselora, layer(x), mixed, decoder, scaling=SCALING)
    expected = [plain, *torch.autograd.grad(plain, (x, mixed, decoder), upstream)]
    output, kept = layer(x), upstream.clone()
    address = output.data_ptr()
    result = adapt(fused, output, mixed, decoder, scaling=SCALING)
    is_view = kind == "Linear with bias" and len(shape) == 2
    assert (result.data_ptr() == address) == (not is_view)
    assert (result is output) == (not is_view)
    assert_close([result, *torch.autograd.grad(result, (x, mixed, decoder), upstream)], expected, EXACT)
    assert torch.equal(upstream, kept)


def test_what_autograd_forbids_to_write_is_left_alone():
    mixed, decoder = torch.randn(6, 4, device=DEVICE), torch.randn(8, 4, device=DEVICE, requires_grad=True)
    leaf = torch.randn(6, 8, device=DEVICE, requires_grad=True)
    outputs = [leaf, (2 * leaf).view(6, 8), (2 * leaf)[:1].expand(6, 8), (2 * leaf).T.contiguous().T]
    for output in outputs:
        before = output.detach().clone()
        result = adapt(fused, output, mixed, decoder, scaling=SCALING)
        assert torch.equal(output, before)
        assert_close([result], [adapt(denselora, output, mixed, decoder, scaling=SCALING)], EXACT)
        (gradient,) = torch.autograd.grad(result.sum(), output)
        assert torch.equal(gradient, torch.ones(6, 8, device=DEVICE))


def test_an_output_that_its_producer_has_saved_is_an_error_not_a_wrong_gradient():
    leaf = torch.randn(6, 8, device=DEVICE, requires_grad=True)
    output = leaf.exp()  # saves its result
    result = adapt(fused, output, torch.randn(6, 4, device=DEVICE), torch.randn(8, 4, device=DEVICE), scaling=SCALING)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize(("base", "adapter"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("r", [6, 300])
def test_the_output_may_have_another_dtype(base, adapter, r):
    torch.manual_seed(5)
    output = torch.randn(9, 40, device=DEVICE).to(base).requires_grad_()
    mixed, decoder = (torch.randn(*s, device=DEVICE).to(adapter).requires_grad_() for s in ((9, r), (40, r)))
    upstream = torch.randn(9, 40, device=DEVICE).to(base)
    exact = [value.detach().double().requires_grad_() for value in (output, mixed, decoder)]
    plain = adapt(denselora, *exact, scaling=SCALING, activation="tanh")
    result = adapt(fused, output, mixed, decoder, scaling=SCALING, activation="tanh")
    gradients = torch.autograd.grad(result, (output, mixed, decoder), upstream)
    assert [value.dtype for value in (result, *gradients)] == [base, base, adapter, adapter]
    expected = torch.autograd.grad(plain, exact, upstream.double())
    assert_close([result], [plain], EXACT if base == torch.float32 else 2**-8)
    assert_close(gradients, expected, EXACT if adapter == torch.float32 else 2**-7)
    assert torch.equal(gradients[0], upstream)


@pytest.mark.parametrize("r", [4, 300])
@pytest.mark.parametrize("shape", [(10,), (2, 5)])
def test_adds_to_the_projections_gradient_in_place(shape, r):
    group = make_group(shape, 24, (r, 3))
    x = 1 * group.x  # not a leaf: its gradient flows on
    addresses = []
    again, encoded = fused.encode(x, group.encoders)
    again.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    x.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    total = sum(F.linear(again, w).square().sum() for w in group.weights) + sum(a.square().sum() for a in encoded)
    result = torch.autograd.grad(total, group.x)
    assert len(addresses) == 2
    assert addresses[0] == addresses[1]
    again, encoded = denselora.encode(group.x, group.encoders)
    total = sum(F.linear(again, w).square().sum() for w in group.weights) + sum(a.square().sum() for a in encoded)
    assert_close(result, torch.autograd.grad(total, group.x), EXACT)


def test_a_gradient_that_others_hold_is_not_written():
    group = make_group((6,), 24, (4,))
    # The caller's own.
    again, (encoded,) = fused.encode(group.x, group.encoders)
    mine = torch.ones_like(again)
    torch.autograd.grad((again, encoded), group.x, (mine, torch.ones_like(encoded)))
    assert torch.equal(mine, torch.ones_like(mine))
    # That of a sum, which its other term gets later; as such, as a view, and as both.
    for views in ((False, False), (True, True), (True, False), (False, True)):
        leaf = torch.randn(6, 24, device=DEVICE, requires_grad=True)
        earlier = (2 * leaf).flatten() if views[0] else 2 * leaf.flatten()
        again, (encoded,) = fused.encode(group.x, group.encoders)
        summed = earlier + again.view(-1) if views[1] else (earlier.view(6, 24) + again).view(-1)
        (summed.sum() + summed.square().sum() / 2 + encoded.sum()).backward()
        torch.testing.assert_close(leaf.grad, 2 * (1 + summed.view(6, 24)))
    # One that is requested itself.
    again, (encoded,) = fused.encode(group.x, group.encoders)
    total = F.linear(again, group.weights[0]).sum() + encoded.sum()
    own, _ = torch.autograd.grad(total, (again, group.x))
    torch.testing.assert_close(own, group.weights[0].sum(0).expand(6, -1))


# --- dropout


@pytest.mark.parametrize("dropout", [0.01, 0.05, 0.5, 0.9])
def test_mask_has_its_rate_and_no_pattern(dropout):
    num_rows, num_columns = 1024, 1536
    masks = [fused.keep_mask(seed, num_rows, num_columns, dropout).double() for seed in (0, 1, 2**31 - 1)]
    variance = dropout * (1 - dropout)
    bound = 4.5 / (num_rows * num_columns) ** 0.5
    for mask in masks:
        assert abs(mask.mean().item() - (1 - dropout)) < bound * variance**0.5
        for dim, size in ((0, num_columns), (1, num_rows)):  # no row or column is dropped more often than others
            share = mask.mean(dim) - (1 - dropout)
            assert share.std().item() == pytest.approx((variance / mask.shape[dim]) ** 0.5, rel=4 / (2 * size) ** 0.5)
    centred = [(mask - (1 - dropout)) / variance**0.5 for mask in masks]
    shifts = [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 16), (16, 0), (0, 128), (128, 0), (256, 512)]
    for shift in shifts:
        assert abs((centred[0] * centred[0].roll(shift, (0, 1))).mean().item()) < bound
    for first, second in pairwise(centred):
        assert abs((first * second).mean().item()) < bound
    square = centred[0][:, :num_rows]
    assert abs((square * square.T).mean().item()) < 1.5 * 4.5 / num_rows


@pytest.mark.parametrize("blocks", [(16, 128), (32, 16), (8, 64)])
@pytest.mark.parametrize("dropout", [0.05, 0.7])
def test_kernels_see_this_mask_in_blocks_of_any_size(blocks, dropout):
    num_rows, num_columns, seed = 37, 203, 123_456_789
    ones = torch.ones(num_rows, num_columns, device=DEVICE)
    result = torch.empty_like(ones)
    grid = tuple(-(-size // block) for size, block in zip(ones.shape, blocks, strict=True))
    sizes = {"BLOCK_ROWS": blocks[0], "BLOCK_WIDTH": blocks[1]}
    fused.drop_kernel[grid](
        ones, result, seed, num_rows, num_columns, IS_ADDED=False, THRESHOLD=round(dropout * 2**16), **sizes
    )
    assert torch.equal(result.bool(), fused.keep_mask(seed, num_rows, num_columns, dropout, DEVICE))


@triton.jit
def _mask_kernel(target, seed, first_row, first_column, THRESHOLD: tl.constexpr):  # noqa: N803
    rows, columns = first_row + tl.arange(0, 16), first_column + tl.arange(0, 16)
    keep = fused.keep_tile(seed, rows, columns, THRESHOLD)
    tl.store(target + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], keep)


def test_mask_of_many_rows_and_columns():
    for num_rows, num_columns in ((2**20, 16), (16, 28672)):
        result = torch.empty(16, 16, dtype=torch.int8, device=DEVICE)
        _mask_kernel[1,](result, 2**31 - 1, num_rows - 16, num_columns - 16, THRESHOLD=2**15)
        expected = fused.keep_mask(2**31 - 1, num_rows, num_columns, 0.5, DEVICE)
        assert torch.equal(result.bool(), expected[-16:, -16:])
    rows = fused.keep_mask(5, 2**17, 50, 0.5).to(torch.int64)
    assert len((rows << torch.arange(50)).sum(1).unique()) == 2**17  # none repeats


def test_draws_from_torchs_generator_only_with_dropout():
    group = make_group((9,), 24, (4,))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    run_ops(fused, group)
    after = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(after, torch.get_rng_state())
    torch.set_rng_state(state)

    def output(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return fused.encode(group.x, group.encoders, dropout=0.5)[1][0]

    assert torch.equal(output(4), output(4))
    assert not torch.equal(output(4), output(5))


@pytest.mark.parametrize("ranks", [(6, 40), (260,)])
def test_the_same_seed_gives_the_same_bits(ranks):
    group = make_group((260 if len(ranks) > 1 else 40,), 20, ranks, d_out=20, dtype=torch.bfloat16)
    for first, second in zip(run_ops(fused, group, "gelu", 0.3), run_ops(fused, group, "gelu", 0.3), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("ranks", [(6, 5), (260,)])
def test_checkpointing_recomputes_the_same_bits(ranks):
    group = make_group((2, 17), 40, ranks)

    def forward(x: Tensor) -> Tensor:
        x, encoded = fused.encode(x, group.encoders, dropout=0.3)
        return sum(
            adapt(fused, F.linear(x, w), F.linear(a, m), d, scaling=SCALING, dropout=0.3).square().sum()
            for w, a, m, d in zip(group.weights, encoded, group.ms, group.decoders, strict=True)
        )

    def gradients(function):
        torch.manual_seed(7)
        total = function(group.x)
        torch.rand(())  # other layers draw in between
        return torch.autograd.grad(total, group.trained)

    for got, expected in zip(
        gradients(partial(checkpoint, forward, use_reentrant=False)), gradients(forward), strict=True
    ):
        assert torch.equal(got, expected)


# --- memory


@pytest.mark.parametrize("ranks", [(3, 4), (300,)])
def test_saves_nothing_as_wide_as_the_model(ranks):
    num_tokens, d_in = 50, 400
    group = make_group((num_tokens,), d_in, ranks, d_out=420)
    own = {v.data_ptr() for v in (group.x, *group.weights, *group.encoders, *group.ms, *group.decoders)}
    saved = []

    def pack(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        x, encoded = fused.encode(group.x, group.encoders, dropout=0.3)
        for w, a, m, d in zip(group.weights, encoded, group.ms, group.decoders, strict=True):
            adapt(fused, F.linear(x, w), F.linear(a, m), d, scaling=SCALING, dropout=0.3)
    others = [value for value in saved if value.data_ptr() not in own]
    assert any(value.data_ptr() == group.x.data_ptr() for value in saved)
    # Per module: u and a (here saved for M), and `mixed`.
    assert {value.shape[0] for value in others} == {num_tokens}
    assert sum(value.numel() for value in others) == 3 * num_tokens * sum(ranks)
    assert all(value.dtype == torch.float32 for value in others)


def test_a_second_derivative_is_refused():
    group = make_group((5,), 8, (3,))
    _, (encoded,) = fused.encode(group.x, group.encoders)
    (gradient,) = torch.autograd.grad(encoded.square().sum(), group.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")
def test_another_length_or_seed_compiles_nothing():
    compiled = []
    group = make_group((40,), 64, (16, 8), dtype=torch.bfloat16)
    run_ops(fused, group, "gelu", 0.3)
    hook = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = lambda *args, **kwargs: compiled.append(kwargs["repr"])
    try:
        for num_tokens in (1, 2, 16, 17, 64, 333, 1024, 5000):
            run_ops(fused, make_group((num_tokens,), 64, (16, 8), dtype=torch.bfloat16), "gelu", 0.3)
    finally:
        triton.knobs.runtime.jit_cache_hook = hook
    assert compiled == []
