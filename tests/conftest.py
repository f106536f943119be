"""Shared by all tests: a tiny LLaMA with a byte tokenizer, the shared data, one cache for what must be prepared."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: spinning threads starve each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_ROOT = Path(__file__).parent.parent
os.environ.setdefault("QDENSE_CACHE", str(_ROOT / ".cache"))
os.environ.pop("QDENSE_DATA", None)

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything defines a kernel

from qdense.cli import _quiet_libraries  # noqa: E402

_quiet_libraries()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the checkout; a user's machine has none, CI always does."""
    folder = Path(os.environ.get("QDENSE_SHARED_DATA", _ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have the shared data at {folder}")
        pytest.skip(f"no shared data at {folder}")
    return folder


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Small files of our own in upstream's formats: the test sets that `shared_data` lacks."""
    return Path(__file__).parent / "fixtures"


def make_tokenizer():
    """A byte-level tokenizer without merges: 256 bytes, and special tokens behind them."""
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

    from qdense.catalog import CATALOG

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


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Save a random LLaMA of 100,000 parameters that qdense can load by its folder."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config()).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_tiny_model(tmp_path_factory) -> Path:
    """The same shapes with other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M in NF4, by its built-in name: real weights."""
    from qdense.modeling.base import load_base
    from qdense.recipe import ModelRecipe

    return lambda: load_base(ModelRecipe(name="smollm2-135m", device="cpu"))
