"""bf16 parameters that learn: updates far below their resolution add up."""

import copy

import pytest
import torch
from torch import nn

from qdense.training.checkpoint import Checkpoint
from qdense.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state

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
    run(whole, optimizer_for(whole, name), gradients)
    first = parameter()
    optimizer = optimizer_for(first, name)
    run(first, optimizer, gradients[:10])
    tensors, numbers = optimizer_state(optimizer)
    Checkpoint(10, {}, optimizer=tensors, values={"optimizer": numbers}).save(tmp_path)
    second = nn.Parameter(first.detach().clone())
    optimizer = optimizer_for(second, name)
    saved = Checkpoint.load(tmp_path / "checkpoint-10")
    load_optimizer_state(optimizer, saved.optimizer, saved.values["optimizer"])
    run(second, optimizer, gradients[10:])
    assert torch.equal(second, whole)


def test_schedulers_see_the_learning_rate_they_set():
    p = parameter()
    optimizer = optimizer_for(p, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    p.grad = torch.ones_like(p, dtype=torch.float32)
    optimizer.step()
    scheduler.step()
    assert torch.equal(p, torch.ones_like(p))
    assert copy.copy(optimizer.param_groups[0]["lr"]) == 0.0
