"""How many tokens' logits exist at a time."""

import pytest

from qdense.ops.slices import logits_slice_tokens


@pytest.mark.parametrize(("is_cuda", "most_bytes"), [(False, 64 * 2**20), (True, 256 * 2**20)])
@pytest.mark.parametrize("vocab_size", [258, 32_000, 128_256])
def test_a_slice_of_fp32_logits_fills_its_share_of_the_memory(is_cuda, most_bytes, vocab_size):
    token_bytes = 4 * vocab_size
    found = logits_slice_tokens(vocab_size, is_cuda)
    assert found * token_bytes <= most_bytes < (found + 1) * token_bytes


def test_a_slice_has_a_token_at_least():
    assert logits_slice_tokens(2**30, False) == 1
