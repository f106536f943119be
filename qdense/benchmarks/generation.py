"""Completions for prompts: batched, sorted by length, padded on the left with an attention mask, deterministic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qdense.modeling.base import BaseModel


@dataclass(frozen=True)
class Decoding:
    """How the next tokens are chosen; neither way draws random numbers.

    The authors pass temperature, top_p and top_k too, but with do_sample unset these do nothing: theirs is a deterministic
    search with 4 beams.
    """

    name: str
    num_beams: int
    # Prompts at a time (each beam is a sequence of its own), on a CPU and on a GPU.
    batch_size_cpu: int
    batch_size_cuda: int


DECODINGS = {
    decoding.name: decoding
    for decoding in (
        Decoding("beam4", num_beams=4, batch_size_cpu=8, batch_size_cuda=16),
        Decoding("greedy", num_beams=1, batch_size_cpu=16, batch_size_cuda=64),
    )
}


@dataclass(frozen=True)
class Completion:
    """What the model wrote for one prompt.

    Attributes:
        index: the prompt's number in the test set.
        finish: "eos", or "length" where the token limit cut it off.
    """

    index: int
    completion: str
    num_prompt_tokens: int
    num_tokens: int
    finish: str

    def record(self) -> dict[str, Any]:
        return asdict(self)


def plan_batches(prompt_lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions of the prompts, in batches of nearly equal length; the longest first, so that memory runs short at once or
    never."""
    order = sorted(range(len(prompt_lengths)), key=lambda i: (-prompt_lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate(
    base: BaseModel, model: Any, prompts: Sequence[tuple[int, list[int]]], decoding: Decoding, max_new_tokens: int
) -> list[Completion]:
    """Complete one batch.

    Args:
        model: the base's own model, or the PeftModel on it.
        prompts: (index, token ids) pairs.
    """
    from transformers import GenerationConfig

    longest = max(len(ids) for _, ids in prompts)
    input_ids = torch.full((len(prompts), longest), base.pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for i, (_, ids) in enumerate(prompts):
        input_ids[i, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[i, longest - len(ids) :] = 1
    eos = _eos_token_ids(base)
    # Every field that decides is set: transformers fills unset ones from the checkpoint's own generation_config.
    settings = GenerationConfig(
        do_sample=False,
        num_beams=decoding.num_beams,
        num_return_sequences=1,
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        length_penalty=1.0,
        early_stopping=False,
        eos_token_id=eos,
        pad_token_id=base.pad_token_id,
        use_cache=True,
    )
    with torch.no_grad():
        sequences = model.generate(
            input_ids=input_ids.to(base.device),
            attention_mask=attention_mask.to(base.device),
            generation_config=settings,
        )
    completions = []
    for (index, ids), sequence in zip(prompts, sequences[:, longest:].tolist(), strict=True):
        end = next((position for position, token in enumerate(sequence) if token in eos), None)
        tokens = sequence[:end]
        completions.append(
            Completion(
                index=index,
                completion=base.tokenizer.decode(tokens, skip_special_tokens=True),
                num_prompt_tokens=len(ids),
                num_tokens=len(tokens) + (end is not None),
                finish="length" if end is None else "eos",
            )
        )
    return completions


def _eos_token_ids(base: BaseModel) -> list[int]:
    """The tokenizer's EOS and the checkpoint's own, which for chat models is a list."""
    own = base.model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({token for token in (base.tokenizer.eos_token_id, *listed) if token is not None})


def batches_left(batches: list[list[int]], done: set[int]) -> Iterator[list[int]]:
    """The batches that are not wholly done. A resumed evaluation repeats the very batches of an uninterrupted one: even
    with a mask, bf16 results depend a little on the shape of their batch."""
    return (batch for batch in batches if not done.issuperset(batch))
