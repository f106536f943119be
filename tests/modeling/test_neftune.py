"""The size of NEFTune's noise, for each row by its own length."""

import math

import torch
from transformers import LlamaForCausalLM

from qdense.modeling.neftune import noisy_embeddings
from tests.helpers.models import tiny_config

ALPHA, SIZE = 5.0, 64


def noise(shape, lengths, *, is_packed):
    model = LlamaForCausalLM(tiny_config())
    embedding, ids = model.get_input_embeddings(), torch.randint(0, 256, shape)
    clean = embedding(ids)
    with noisy_embeddings(model, ALPHA, lengths, is_packed=is_packed):
        noisy = embedding(ids)
    assert torch.equal(embedding(ids), clean)  # it is off again
    return (noisy - clean).abs()


def assert_uniform(values, length):
    largest = ALPHA / math.sqrt(length * SIZE)
    assert 0.95 * largest < values.max() <= largest * 1.0001
    assert abs(values.mean() / largest - 0.5) < 0.05


def test_padded_rows():
    found = noise((2, 40), [40, 10], is_packed=False)
    assert_uniform(found[0], 40)
    assert_uniform(found[1, :10], 10)


def test_packed_rows():
    found = noise((1, 50), [40, 10], is_packed=True)
    assert_uniform(found[0, :40], 40)
    assert_uniform(found[0, 40:], 10)


def test_nothing_without_an_alpha():
    model = LlamaForCausalLM(tiny_config())
    with noisy_embeddings(model, None, [3], is_packed=False):
        assert not model.get_input_embeddings()._forward_hooks
