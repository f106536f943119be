"""The plan of an evaluation: how many sequences a model can complete at a time."""

from __future__ import annotations

from qdense.catalogs.models import CatalogModel
from qdense.planning.memory import base_bytes
from qdense.planning.plan import CUDA_CONTEXT_BYTES
from qdense.recipe import ModelRecipe

_PROMPT_TOKENS = 512  # the benchmarks' prompts are shorter; for a longer one, running out of memory halves the batch
_SHARE = 0.9  # of the memory


def generation_bytes(
    model: ModelRecipe, shape: CatalogModel, *, num_sequences: int, new_tokens: int, is_cuda: bool
) -> dict[str, int]:
    """Bytes for completing this many sequences at a time, by purpose. On a CPU, NF4 weights may be unpacked."""
    width = model.dtype_bytes
    weights, tables = base_bytes(model, shape, unpacked=not is_cuda)
    tokens = _PROMPT_TOKENS + new_tokens
    cache = num_sequences * tokens * 2 * shape.num_layers * shape.kv_size * width
    # Reading prompts: the MLP's three wide tensors, and some as wide as the model.
    reading = num_sequences * _PROMPT_TOKENS * width * (3 * shape.intermediate_size + 6 * shape.hidden_size)
    return {
        "weights": weights,
        "embeddings_and_head": tables,
        "cache": 2 * cache,  # sequences leave and join it, so it is copied
        "activations": reading,
        "logits": num_sequences * shape.vocab_size * (width + 8),
        "context": CUDA_CONTEXT_BYTES if is_cuda else 2**30,
    }


def sequences_that_fit(
    model: ModelRecipe, shape: CatalogModel, *, new_tokens: int, is_cuda: bool, memory_bytes: int, most: int
) -> int:
    """`most`, halved until it fits, and at least 1.

    Args:
        memory_bytes: total memory, not what is free now, because in bf16 the batch size can change a completion.
    """
    num_sequences = most
    while num_sequences > 1:
        needed = generation_bytes(model, shape, num_sequences=num_sequences, new_tokens=new_tokens, is_cuda=is_cuda)
        if sum(needed.values()) <= _SHARE * memory_bytes:
            break
        num_sequences //= 2
    return num_sequences
