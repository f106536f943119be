"""Dropout's mask: its rate, its scale, and where its numbers come from."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qdense.ops.dropout import dropout


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_the_rate_and_the_scale_are_those_asked_for(p):
    torch.manual_seed(0)
    out = dropout(torch.ones(1001, 1003), p)
    assert (out == 0).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / out.numel()) ** 0.5 + 2**-16)
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (1 - p)))
    assert out.double().mean().item() == pytest.approx(1, rel=0.02)


def test_neighbours_in_rows_and_columns_are_independent():
    torch.manual_seed(1)
    kept = (dropout(torch.ones(1000, 999), 0.5) != 0).double() - 0.5
    for shift in ((0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (5, 0)):
        assert (kept * kept.roll(shift, dims=(0, 1))).mean().item() == pytest.approx(0, abs=0.25 * 5e-3)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 7), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_keeps_its_dtype(shape, dtype):
    out = dropout(torch.ones(shape, dtype=dtype), 0.5)
    assert (out.shape, out.dtype) == (torch.Size(shape), dtype)


def test_the_mask_follows_torchs_seed_and_goes_on_from_it():
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    first, second = dropout(x, 0.3), dropout(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.3))
    assert not torch.equal(first, second)
    assert dropout(x, 0.0) is x


def test_gradients_pass_the_same_mask_also_when_recomputed():
    x = torch.randn(50, 20, requires_grad=True)
    torch.manual_seed(4)
    out = dropout(x, 0.4)
    out.sum().backward()
    expected, x.grad = x.grad, None
    torch.testing.assert_close(expected, (out != 0).float() / 0.6)
    torch.manual_seed(4)
    checkpoint(lambda value: dropout(value, 0.4).square(), x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() * expected.square())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("scale", [2.5, 0.5])
def test_the_scale_multiplies(p, scale):
    x = torch.randn(40, 30)
    torch.manual_seed(5)
    expected = scale * dropout(x, p)
    torch.manual_seed(5)
    torch.testing.assert_close(dropout(x, p, scale), expected)


def test_a_seed_s_mask_is_that_of_every_release():
    """So that a run which another release resumes repeats its steps."""
    torch.manual_seed(8)
    out = dropout(torch.ones(3, 7), 0.25)
    torch.manual_seed(8)
    bits = np.random.SFC64(int(torch.randint(2**63 - 1, ()))).random_raw(6).view(np.int16)[:21].reshape(3, 7)
    assert torch.equal(out != 0, torch.from_numpy(bits >= -(2**14)))  # of 2**16 values, a quarter is below


def test_masks_do_not_come_back():
    torch.manual_seed(6)
    masks = {tuple(dropout(torch.ones(64), 0.5).tolist()) for _ in range(500)}
    assert len(masks) == 500


def test_other_devices_take_pytorchs_own():
    out = dropout(torch.ones(4, 5, device="meta"), 0.5, 2.0)
    assert (out.shape, out.device.type) == (torch.Size((4, 5)), "meta")
    x = torch.ones(4, 5, device="meta")
    assert dropout(x, 0.5) is not x


def test_a_rate_next_to_one_drops_almost_all():
    torch.manual_seed(7)
    out = dropout(torch.ones(2**21), 1 - 2**-20)
    assert set(out.tolist()) == {0.0, 2.0**20}
    assert int((out != 0).sum()) == pytest.approx(32, abs=17)  # one of 2**16, three standard deviations
