"""bf16 parameters that learn: updates far below their resolution add up."""

import copy

import pytest
import torch
from torch import nn

from qdense.training.checkpoint import Checkpoint
from qdense.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state, take_over_changes

NAMES = ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch"]


def parameter(dtype=torch.bfloat16, value=1.0, n=8192):
    return nn.Parameter(torch.full((n,), value, dtype=dtype))


def optimizer_for(p, name="adamw_torch", lr=1e-4, master_weights=True):
    return build_optimizer(name, [p], learning_rate=lr, weight_decay=0.0, master_weights=master_weights)


@pytest.mark.parametrize("name", NAMES)
def test_updates_below_the_resolution_add_up(name):
    # Beside 1.0, bf16 steps by 0.0078 (upwards): an Adam update of 1e-4 vanishes, a hundred of them are more than one step.
    with_masters, without = parameter(), parameter()
    optimizers = [optimizer_for(with_masters, name), optimizer_for(without, name, master_weights=False)]
    for _ in range(100):
        for p, optimizer in zip((with_masters, without), optimizers, strict=True):
            p.grad = torch.full_like(p, -1.0, dtype=p.grad_dtype)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(without, torch.ones_like(without))  # nothing was learnt
    assert with_masters.dtype == torch.bfloat16
    assert with_masters.float().mean().item() == pytest.approx(1.01, abs=0.004)


def test_masters_follow_fp32_training_exactly():
    torch.manual_seed(0)
    start = torch.randn(64).bfloat16()
    half, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizers = [optimizer_for(half, lr=1e-3), torch.optim.AdamW([full], lr=1e-3, weight_decay=0.0)]
    for _ in range(50):
        gradient = torch.randn(64)
        half.grad, full.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(half, full.bfloat16())
    assert half.grad is None


def test_micro_batches_add_up_in_fp32():
    p = parameter(n=4)
    optimizer_for(p)
    for _ in range(3):
        (p * torch.tensor(1 / 3, dtype=torch.bfloat16)).sum().backward()
    third = torch.tensor(1 / 3, dtype=torch.bfloat16).float()
    assert p.grad.dtype == torch.float32
    assert torch.equal(p.grad, torch.full((4,), 3 * third.item()))  # in bf16 the sum would be 1


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_through_a_file_and_training_goes_on_exactly(name, tmp_path):
    torch.manual_seed(0)
    gradients = torch.randn(20, 8192)

    def run(p, optimizer, part):
        for gradient in part:
            p.grad = gradient.clone()
            optimizer.step()
            optimizer.zero_grad()

    whole = parameter()
    uncut = optimizer_for(whole, name, lr=1e-2)
    run(whole, uncut, gradients)
    first = parameter()
    optimizer = optimizer_for(first, name, lr=1e-2)
    run(first, optimizer, gradients[:10])
    tensors, numbers = optimizer_state(optimizer)
    Checkpoint(10, {}, optimizer=tensors, values={"optimizer": numbers}).save(tmp_path)
    second = parameter(value=5.0)  # the masters say what it is
    optimizer = optimizer_for(second, name, lr=1e-2)
    saved = Checkpoint.load(tmp_path / "checkpoint-10")
    load_optimizer_state(optimizer, saved.optimizer, saved.values["optimizer"])
    assert torch.equal(second, first)
    run(second, optimizer, gradients[10:])
    assert torch.equal(second, whole)
    expected, found = optimizer_state(uncut), optimizer_state(optimizer)
    assert expected[1] == found[1]
    assert expected[0].keys() == found[0].keys() > {"masters.0"}
    for key, tensor in expected[0].items():  # masters and moments, of which bf16 shows little
        assert torch.equal(found[0][key], tensor), key


def test_a_parameter_that_others_have_changed_is_taken_over_where_it_was_changed():
    p = parameter(n=4)
    optimizer = optimizer_for(p)
    p.grad = torch.full((4,), -1.0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        p[1], p[2] = 0.0, 2.0  # one lower, one higher
    take_over_changes(optimizer)
    masters = optimizer_state(optimizer)[0]["masters.0"]
    assert masters.tolist() == pytest.approx([1 + 1e-4, 0.0, 2.0, 1 + 1e-4], abs=1e-6)  # no rounding where unchanged
    assert masters[0] != 1


def test_without_masters_there_is_nothing_to_take_over():
    p = parameter(n=4)
    take_over_changes(optimizer_for(p, master_weights=False))
    assert torch.equal(p, torch.ones_like(p))


def test_gradients_are_dropped_or_set_to_zero():
    p = parameter(n=4)
    optimizer = optimizer_for(p)
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is None
    p.grad = torch.ones(4)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(p.grad, torch.zeros(4))
    optimizer.zero_grad()
    assert p.grad is None


def test_weight_decay_and_the_first_step_are_adamw_s():
    p, q = parameter(torch.float32, 2.0, n=1), parameter(torch.float32, 2.0, n=1)
    ours = build_optimizer("adamw_torch", [p], learning_rate=0.1, weight_decay=0.5, master_weights=False)
    theirs = torch.optim.AdamW([q], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.5)
    for gradient in (3.0, -1.0, 0.5):
        for each, optimizer in ((p, ours), (q, theirs)):
            each.grad = torch.tensor([gradient])
            optimizer.step()
    assert torch.equal(p, q)
    assert p.item() < 2.0 * 0.95**2


def test_each_name_is_its_optimizer():
    found = {}
    for name in NAMES:
        optimizer = optimizer_for(parameter(), name)
        arguments = getattr(optimizer, "args", None)
        found[name] = (
            type(optimizer).__name__,
            getattr(optimizer, "is_paged", None),
            arguments.optim_bits if arguments else None,
        )
    assert found == {
        "paged_adamw_8bit": ("MasterWeightsAdamW", True, 8),
        "paged_adamw_32bit": ("MasterWeightsAdamW", True, 32),
        "adamw_8bit": ("MasterWeightsAdamW", False, 8),
        "adamw_torch": ("MasterWeightsAdamW", None, None),
    }


def test_schedulers_see_the_learning_rate_they_set():
    p = parameter()
    optimizer = optimizer_for(p, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    p.grad = torch.ones_like(p, dtype=torch.float32)
    optimizer.step()
    scheduler.step()
    assert torch.equal(p, torch.ones_like(p))
    assert copy.copy(optimizer.param_groups[0]["lr"]) == 0.0
