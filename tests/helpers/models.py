"""Tiny and weightless LLaMAs, and a byte tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch


def make_tokenizer():
    """A byte-level tokenizer without merges: 256 bytes, then special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def tiny_config(**changes):
    from transformers import LlamaConfig

    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # grouped queries: k and v are narrower than q
        "vocab_size": 258,
        "tie_word_embeddings": True,
        "eos_token_id": 256,
        "bos_token_id": None,
        "pad_token_id": 257,
    }
    return LlamaConfig(**(settings | changes))


def meta_model(name: str):
    """A LLaMA of the catalog in its full shape, without memory for its weights."""
    from transformers import LlamaForCausalLM

    from qdense.catalogs.models import CATALOG

    model = CATALOG[name]
    shape = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
    }
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_config(**shape))


def make_tiny_model(folder: Path, seed: int = 0, **config) -> Path:
    """Save a random LLaMA of 100,000 parameters that qdense can load by its folder; `config` changes its `tiny_config`."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(**config)).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
