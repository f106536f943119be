"""The loss without logits: against PyTorch's cross entropy and Transformers' own loss, gradients too."""

import pytest
import torch
import torch.nn.functional as F

from qdense.modeling.loss import without_logits
from qdense.ops import cross_entropy
from qdense.ops.cross_entropy import IGNORED, linear_cross_entropy
from qdense.ops.interpreter import is_interpreted
from qdense.ops.kernels import use_kernels
from tests.helpers.memory import TensorMemory
from tests.helpers.tuners import fresh_base


@pytest.fixture(params=["torch", "triton"])
def kernels(request):
    """Single operations, and the fused ones, here in Triton's interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if not is_interpreted():
            pytest.skip("TRITON_INTERPRET=1 is not set")
    use_kernels(request.param)
    yield
    use_kernels("auto")


def leaves(tokens, width, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[::3] = IGNORED
    return hidden, weight, targets


@pytest.mark.parametrize("slice_elements", [1, 37 * 4, 2**24])
@pytest.mark.parametrize("divisor", [None, 5.0, torch.tensor(11)])
def test_value_and_gradients_are_pytorchs(kernels, monkeypatch, slice_elements, divisor):
    monkeypatch.setattr(cross_entropy, "logits_slice_tokens", lambda width, is_cuda: max(1, slice_elements // width))
    hidden, weight, targets = leaves(23, 12, 37)
    loss = linear_cross_entropy(hidden, weight, targets, divisor)
    (2.5 * loss).backward()
    other_hidden, other_weight, _ = leaves(23, 12, 37)
    expected = F.cross_entropy(other_hidden @ other_weight.T, targets, reduction="mean" if divisor is None else "sum")
    expected = expected if divisor is None else expected / divisor
    (2.5 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, other_hidden.grad)
    torch.testing.assert_close(weight.grad, other_weight.grad)
    assert (hidden.grad[::3] == 0).all()


def test_without_gradients_all_slices_count(kernels, monkeypatch):
    asked = []

    def two_tokens(vocab_size, is_cuda):
        asked.append((vocab_size, is_cuda))
        return 2

    monkeypatch.setattr(cross_entropy, "logits_slice_tokens", two_tokens)
    hidden, weight, targets = leaves(23, 12, 37)
    hidden, weight = hidden.detach(), weight.detach()
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, targets), F.cross_entropy(hidden @ weight.T, targets)
    )
    assert asked == [(37, False)]


def test_a_second_derivative_is_refused():
    hidden, weight, targets = leaves(5, 4, 9)
    loss = linear_cross_entropy(hidden, weight, targets).square()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_bf16_is_as_near_to_fp32_as_pytorchs_own(kernels):
    hidden, weight, targets = leaves(64, 32, 211, torch.bfloat16)
    linear_cross_entropy(hidden, weight, targets).backward()
    exact_hidden, exact_weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    F.cross_entropy(exact_hidden @ exact_weight.T, targets).backward()
    own_hidden, own_weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    F.cross_entropy((own_hidden @ own_weight.T).float(), targets).backward()
    for ours, own, exact in (
        (hidden, own_hidden, exact_hidden),
        (weight, own_weight, exact_weight),
    ):
        assert (ours.grad - exact.grad).norm() <= 1.05 * (own.grad - exact.grad).norm()


def test_a_gradient_is_rounded_once_after_its_division(kernels):
    """An output layer of identity hands the logits' gradients through: they are the exact ones, rounded to bf16."""
    size = 128
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(4)).bfloat16().requires_grad_()
    targets = torch.arange(5)
    linear_cross_entropy(logits, torch.eye(size, dtype=torch.bfloat16), targets, divisor=3.0).backward()
    exact = (logits.detach().double().softmax(1) - F.one_hot(targets, size)) / 3
    assert (logits.grad != exact.bfloat16()).double().mean() < 0.01  # fp32 may fall on the other side of a tie


def test_fused_logits_beyond_one_block_and_of_any_size(kernels):
    """Wider than a block, with logits that overflow an exponential, and with infinite ones, as masked tokens have."""
    vocabulary = 4096 + 100
    logits = 50 * torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(4))
    logits[0] += 1e4
    logits[1, 7:] = -torch.inf
    logits[2] = -1e4
    targets = torch.tensor([0, 3, 4099, 4100, 4195, 11])
    losses, gradient = cross_entropy.losses_of(logits.clone(), targets, torch.tensor(2.0), needs_gradient=True)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    torch.testing.assert_close(losses.flatten().double(), expected, rtol=1e-6, atol=1e-3)
    (slope,) = torch.autograd.grad(expected.sum() / 2, exact)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-3, atol=1e-6)  # 1e4 has a last place of 1e-3


def test_a_frozen_weight_gets_no_gradient_and_no_target_gives_no_number():
    hidden, weight, targets = leaves(6, 4, 9)
    linear_cross_entropy(hidden, weight.requires_grad_(False), targets).backward()
    assert weight.grad is None
    assert linear_cross_entropy(hidden, weight, torch.full((6,), IGNORED)).isnan()


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_further_slice_takes_no_more_memory_than_the_first(monkeypatch, needs_gradient):
    monkeypatch.setattr(cross_entropy, "logits_slice_tokens", lambda width, is_cuda: 8)

    def peak(num_tokens):
        hidden, weight, _ = leaves(num_tokens, 4, 5000)
        with TensorMemory() as tensors:
            linear_cross_entropy(hidden.requires_grad_(needs_gradient), weight.detach(), torch.arange(num_tokens))
        return tensors.peak_bytes

    slice_bytes = 8 * 5000 * 4
    assert peak(8) >= slice_bytes
    assert peak(32) - peak(8) < slice_bytes / 10


def batch():
    tokens = torch.arange(24).reshape(2, 12) + 5
    labels = tokens.clone()
    labels[0, :7], labels[1, 9:] = IGNORED, IGNORED
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("num_items", [None, torch.tensor(40)])
def test_a_model_gives_its_own_loss_and_gradients(tiny_model, num_items):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(fresh_base(tiny_model), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    extra = {} if num_items is None else {"num_items_in_batch": num_items}

    def loss_and_gradients():
        model.zero_grad()
        loss = model(**batch(), **extra).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = loss_and_gradients()
    with without_logits(model):
        found = loss_and_gradients()
        assert model(**batch()).logits.shape[-1] == model.config.hidden_size, "the output layer was not passed over"
    torch.testing.assert_close(found, expected)
    assert len(found[1]) == 2 * model.config.num_hidden_layers
    # Afterwards all is as it was.
    assert model(**batch()).logits.shape[-1] == model.config.vocab_size
    torch.testing.assert_close(loss_and_gradients(), expected, rtol=0, atol=0)


def test_a_model_with_capped_logits_keeps_its_own_loss(tiny_model):
    model = fresh_base(tiny_model)
    model.config.final_logit_softcapping = 30.0
    with without_logits(model):
        assert model(**batch()).logits.shape[-1] == model.config.vocab_size
