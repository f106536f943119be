"""For how many tokens logits exist at a time."""

# 64 MiB in fp32. On a GPU a slice reads the whole output layer, 1 GiB for LLaMA-3, so there it is larger.
_ELEMENTS, _ELEMENTS_CUDA = 2**24, 2**26


def logits_slice_tokens(vocab_size: int, is_cuda: bool) -> int:
    """Tokens in a slice of logits, at least 1."""
    return max(1, (_ELEMENTS_CUDA if is_cuda else _ELEMENTS) // vocab_size)
