"""How many sequences a model can complete at a time: the plan of an evaluation."""

from __future__ import annotations

from qdense.catalogs.models import CatalogModel
from qdense.planning.memory import base_bytes
from qdense.planning.plan import CUDA_CONTEXT_BYTES
from qdense.recipe import ModelRecipe

_PROMPT_TOKENS = 512  # the benchmarks' are shorter; where one is not, memory that runs out halves the batch
_SHARE = 0.9  # of the memory


def generation_bytes(
    model: ModelRecipe, shape: CatalogModel, *, num_sequences: int, new_tokens: int, is_cuda: bool
) -> dict[str, int]:
    """What completing so many sequences at a time needs, by what it is for. On a CPU, NF4 weights may be unpacked."""
    width = model.dtype_bytes
    weights, tables = base_bytes(model, shape, unpacked=not is_cuda)
    tokens = _PROMPT_TOKENS + new_tokens
    cache = num_sequences * tokens * 2 * shape.num_layers * shape.kv_size * width
    # Reading prompts: the MLP's three wide tensors, and some as wide as the model.
    reading = num_sequences * _PROMPT_TOKENS * width * (3 * shape.intermediate_size + 6 * shape.hidden_size)
    return {
        "weights": weights,
        "embeddings_and_head": tables,
        "cache": 2 * cache,  # sequences that end leave it, others join: it is copied
        "activations": reading,
        "logits": num_sequences * shape.vocab_size * (width + 8),
        "context": CUDA_CONTEXT_BYTES if is_cuda else 2**30,
    }


def sequences_that_fit(
    model: ModelRecipe, shape: CatalogModel, *, new_tokens: int, is_cuda: bool, memory_bytes: int, most: int
) -> int:
    """`most`, halved until it fits, and at least 1.

    Args:
        memory_bytes: of the card or the machine, not what is free now: a batch's size can decide a completion in bf16.
    """
    num_sequences = most
    while num_sequences > 1:
        needed = generation_bytes(model, shape, num_sequences=num_sequences, new_tokens=new_tokens, is_cuda=is_cuda)
        if sum(needed.values()) <= _SHARE * memory_bytes:
            break
        num_sequences //= 2
    return num_sequences
