"""Shared by all tests: a tiny LLaMA with a byte tokenizer, the shared data, one cache for what must be prepared."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: spinning threads starve each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if num_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_workers)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_ROOT = Path(__file__).parent.parent
os.environ.setdefault("QDENSE_CACHE", str(_ROOT / ".cache"))
os.environ.pop("QDENSE_DATA", None)

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.helpers.models import make_tiny_model  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything defines a kernel

from qdense.libraries import quiet_libraries  # noqa: E402

quiet_libraries()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the checkout. A user's machine has none; .ci/run requires it, and says so by the variable."""
    folder = Path(os.environ.get("QDENSE_SHARED_DATA", _ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        if os.environ.get("QDENSE_REQUIRE_SHARED_DATA") == "1":
            pytest.fail(f"QDENSE_REQUIRE_SHARED_DATA is set, and there is no shared data at {folder}")
        pytest.skip(f"no shared data at {folder}")
    return folder


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Small files of our own in upstream's formats: the test sets that `shared_data` lacks."""
    return Path(__file__).parent / "fixtures"


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
    from qdense.modeling.load import load_base
    from qdense.recipe import ModelRecipe

    return lambda: load_base(ModelRecipe(name="smollm2-135m", device="cpu"))
