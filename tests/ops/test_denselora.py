"""The equation against hand-computed numbers, finite differences, and itself in other words."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from qdense.catalogs.choices import Activation
from qdense.ops.denselora import ACTIVATIONS, DropoutMasks, add, decode, denselora_delta, denselora_delta_weight, encode


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def test_hand_computed_case():
    # x = (1, 2); E = [[1, 0], [0.5, 0.5]]; M = [[0, 1], [2, 0]]; D = [[1, 1]]; scaling 3
    encoded = (gelu(1.0), gelu(1.5))
    mixed = (encoded[1], 2 * encoded[0])
    expected = 3 * gelu(mixed[0] + mixed[1])
    delta = denselora_delta(
        torch.tensor([[1.0, 2.0]], dtype=torch.float64),
        torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64),
        torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64),
        torch.tensor([[1.0, 1.0]], dtype=torch.float64),
        scaling=3.0,
    )
    assert delta.shape == (1, 1)
    assert delta.item() == pytest.approx(expected, abs=1e-14)
    # By a table of the normal distribution: 1 (.841345) + ..., so 3 * 3.082478 * .998974
    assert delta.item() == pytest.approx(9.23794, abs=1e-4)


def test_hand_computed_dropout_masks():
    # Masks 2 (kept, p = .5) and 0 (dropped): only x[1] enters, only the second encoding stays.
    masks = DropoutMasks(
        torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[2.0]]).double()
    )
    encoded = 2 * gelu(0.5 * 2 * 2.0)  # E[1] (0, 4) = 2
    expected = 3 * 2 * gelu(encoded * 1.0)  # M[0][1] = 1, D = (1, 1), M[1][1] = 0
    delta = denselora_delta(
        torch.tensor([[1.0, 2.0]]).double(),
        torch.tensor([[1.0, 0.0], [0.5, 0.5]]).double(),
        torch.tensor([[0.0, 1.0], [2.0, 0.0]]).double(),
        torch.tensor([[1.0, 1.0]]).double(),
        scaling=3.0,
        masks=masks,
    )
    assert delta.item() == pytest.approx(expected, abs=1e-14)


def test_every_activation_that_may_be_named_is_there():
    assert list(ACTIVATIONS) == list(get_args(Activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_masks", [False, True])
def test_gradcheck(activation, with_masks):
    torch.manual_seed(0)
    x, e, m, d = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (4, 4), (6, 4))
    )
    masks = DropoutMasks(*((torch.rand(2, 3, n) < 0.7).double() / 0.7 for n in (5, 4, 6))) if with_masks else None

    def function(x, e, m, d):
        return denselora_delta(x, e, m, d, scaling=0.7, activation=activation, masks=masks)

    assert torch.autograd.gradcheck(function, (x, e, m, d))


def test_zero_decoder_adds_nothing_and_still_learns():
    torch.manual_seed(0)
    x, e, m = torch.randn(7, 5), torch.randn(3, 5, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    d = torch.zeros(6, 3, requires_grad=True)
    delta = denselora_delta(x, e, m, d, scaling=2.0)
    assert torch.equal(delta, torch.zeros(7, 6))
    delta.square().sum().backward()  # its slope at 0 is 0, so ask for another
    d.grad = None
    denselora_delta(x, e, m, d, scaling=2.0).sum().backward()
    assert d.grad.abs().sum() > 0
    assert e.grad.abs().sum() == 0
    assert m.grad.abs().sum() == 0


def factors(num_tokens=64):
    torch.manual_seed(2)
    return (
        torch.randn(num_tokens, 5),
        torch.randn(4, 5),
        torch.randn(4, 4),
        0.1 * torch.randn(6, 4),
    )  # no GELU underflows


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encoding_and_decoding_are_the_equation(activation):
    x, e, m, d = factors()
    output = torch.randn(64, 6)
    again, (encoded,) = encode(x, [e], activation=activation)
    decoded = add(output, decode(F.linear(encoded, m), d, scaling=1.5, activation=activation))
    assert again is x
    torch.testing.assert_close(decoded - output, denselora_delta(x, e, m, d, scaling=1.5, activation=activation))


def test_modules_that_are_encoded_together_share_the_mask_of_the_input():
    x, e, _, _ = factors()
    separate = [encode(x, [e * i])[1][0] for i in (1, 2)]
    for one, other in zip(encode(x, [e, e * 2])[1], separate, strict=True):
        torch.testing.assert_close(one, other)
    first, second = encode(torch.ones(500, 1), [torch.ones(1, 1)] * 2, activation="none", dropout=0.3)[1]
    is_kept = first != 0, second != 0  # where the input was kept, the encodings' own masks differ
    assert 0.4 < (is_kept[0] & is_kept[1]).float().mean() / is_kept[0].float().mean() < 0.85
    dropped_by_both = (~is_kept[0] & ~is_kept[1]).float().mean().item()
    assert dropped_by_both == pytest.approx(0.3 + 0.7 * 0.09, abs=0.06)  # independent ones: 0.51 squared = 0.26


def test_dropout_drops_all_three_and_repeats_with_the_seed():
    x, e, m, d = factors()

    def run():
        torch.manual_seed(3)
        _, (encoded,) = encode(x, [e], dropout=0.5)
        return encoded, decode(F.linear(encoded, m), d, scaling=1.0, dropout=0.5)

    (encoded, dropped), again = run(), run()
    assert torch.equal(dropped, again[1])
    assert 0.35 < (encoded == 0).float().mean().item() < 0.65
    assert 0.35 < (dropped == 0).float().mean().item() < 0.65
    kept = encoded != 0
    assert not torch.isclose(encoded[kept], 2 * encode(x, [e])[1][0][kept]).all()  # the input was dropped from, too


def test_only_matrix_is_a_matrix():
    x, e, m, d = (torch.randn(*shape, dtype=torch.float64) for shape in ((9, 5), (4, 5), (4, 4), (6, 4)))
    weight = denselora_delta_weight(e, m, d, scaling=0.5)
    delta = denselora_delta(x, e, m, d, scaling=0.5, activation="none")
    torch.testing.assert_close(x.float() @ weight.T, delta.float(), rtol=1e-4, atol=1e-5)
