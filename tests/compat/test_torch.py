"""torch still does what qdense relies on beyond its documentation: see qdense/compat/torch.py."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qdense.compat.torch import checkpointed_inputs, is_seen_by_others, is_view, watched_operations


class Asked(torch.autograd.Function):
    """The identity, whose backward notes whether somebody else sees its gradient."""

    answers: list[bool] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        Asked.answers.append(is_seen_by_others(gradient))
        return gradient.clone()


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4)])
def test_a_gradient_that_others_hold_is_told_from_a_fresh_one(shape):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(4, 5)
    held = torch.ones(shape)
    Asked.answers.clear()
    (Asked.apply(x) @ weight).sum().backward()  # a fresh product, in 3 dimensions a view of it
    y = Asked.apply(x)
    (y @ weight + y @ weight).sum().backward()  # autograd's own sum of two
    assert Asked.answers == [False, False], "a gradient that nobody else sees would now always be copied"
    torch.autograd.backward(Asked.apply(x), held)
    torch.autograd.backward(Asked.apply(x).flatten(), held.view(-1))  # a view of what is held
    y = Asked.apply(x)
    (y + Asked.apply(x)).backward(held + 0)  # one gradient for both terms
    assert Asked.answers[2:4] == [True, True], "a gradient that somebody else holds would now be written over"
    assert True in Asked.answers[4:]


def test_a_view_is_told_from_a_tensor_of_its_own():
    tensor = torch.zeros(4)
    assert is_view(tensor[1:])
    assert not is_view(tensor)
    assert is_view(nn.Linear(3, 4)(torch.zeros(2, 5, 3))), "the case that qdense/ops/denselora_triton.py looks for"


def test_a_checkpoint_saves_its_positional_inputs_through_the_hooks_around_it():
    x, other = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    packed = []

    def pack(saved):
        packed.append(saved.clone())
        return saved.clone() * 2  # told apart from the original

    with checkpointed_inputs(pack, lambda waiting: waiting):
        output = checkpoint(lambda x: (x * other).sin(), x, use_reentrant=False)
    assert len(packed) == 1, "more, or less, than the one input is saved: inputs could not wait in host memory"
    assert torch.equal(packed[0], x)
    output.sum().backward()
    torch.testing.assert_close(x.grad, (2 * x * other).cos().detach() * other, msg="the packed input was not used")


class Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Reading(torch.autograd.Function):
    """x squared, from what another function has saved."""

    @staticmethod
    def forward(ctx, x, node):
        ctx.node = node
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.node.saved_tensors
        return 2 * x * gradient, None


def test_a_checkpoint_recomputes_as_far_as_the_last_saved_tensor_and_others_can_read_it():
    ran = []

    def run(x):
        ran.append("before")
        kept = Saving.apply(x * 3)
        output = Reading.apply(kept, kept.grad_fn)
        ran.append("after")
        return output

    x = torch.tensor([2.0], requires_grad=True)
    checkpoint(run, x, use_reentrant=False).backward()
    assert x.grad.item() == pytest.approx(2 * 9 * 2.0)
    assert ran == ["before", "after", "before"], "a tiled MLP would run once more than it must"


def test_operations_of_the_backward_pass_are_watched_too():
    x, weight = torch.randn(5, 3), torch.randn(2, 3, requires_grad=True)
    given, made = [], []

    def watch(operation, taken, returned):
        given.extend(taken)
        made.extend(returned)

    with watched_operations(watch):
        loss = (x @ weight.T).square().sum()
        num_forward = len(made)
        loss.backward()
    assert any(tensor is x for tensor in given)
    assert (5, 2) in [tensor.shape for tensor in made[:num_forward]]
    assert (2, 3) in [tensor.shape for tensor in made[num_forward:]] or (3, 2) in [t.shape for t in made[num_forward:]]
    x + 1
    num_watched = len(made)
    x + 1
    assert len(made) == num_watched, "it goes on watching afterwards"


def test_the_object_of_a_storage_lives_as_long_as_its_memory():
    """tests/helpers/memory.py identifies memory by it."""
    tensor = torch.zeros(4)
    freed = []
    weakref.finalize(tensor.untyped_storage(), freed.append, 1)
    gc.collect()
    assert tensor[1:].untyped_storage() is tensor.untyped_storage()
    assert not freed
    del tensor
    assert freed
