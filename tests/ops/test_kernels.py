"""Which kernels an adapter computes with."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from qdense.ops import denselora
from qdense.ops.interpreter import is_interpreted
from qdense.ops.kernels import adapter_ops, has_triton, use_kernels

CPU = torch.ones(2)
CUDA = SimpleNamespace(device=torch.device("cuda"))  # no such tensor can be made here
XPU = SimpleNamespace(device=torch.device("xpu"))


@pytest.fixture(autouse=True)
def automatic():
    use_kernels("auto")
    yield
    use_kernels("auto")


@pytest.fixture
def without_triton(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))


def fused():
    return pytest.importorskip("qdense.ops.denselora_triton")


def test_auto_is_fused_on_cuda_alone():
    assert has_triton() == (importlib.util.find_spec("triton") is not None)
    assert adapter_ops(CPU) is denselora
    assert adapter_ops(XPU) is denselora
    assert adapter_ops(CUDA) is fused()


def test_auto_is_plain_without_triton(without_triton):
    assert not has_triton()
    assert adapter_ops(CUDA) is denselora


def test_torch_is_plain_everywhere():
    use_kernels("torch")
    assert adapter_ops(CPU) is adapter_ops(CUDA) is denselora


def test_triton_is_fused_on_cuda_and_in_the_interpreter(monkeypatch):
    fused()
    use_kernels("triton")
    for value, is_on in ((None, False), ("", False), ("0", False), ("1", True), ("2", False)):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if value is not None:
            monkeypatch.setenv("TRITON_INTERPRET", value)
        assert is_interpreted() is is_on
        assert adapter_ops(CUDA) is fused()
        for tensor in (CPU, XPU):
            if is_on:
                assert adapter_ops(tensor) is fused()
            else:
                with pytest.raises(ValueError, match="needs a CUDA device"):
                    adapter_ops(tensor)


def test_what_cannot_be_is_refused(without_triton):
    with pytest.raises(ValueError, match="kernels = 'cuda': must be one of auto, torch, triton"):
        use_kernels("cuda")
    with pytest.raises(ValueError, match="Triton is not installed"):
        use_kernels("triton")
    assert adapter_ops(CUDA) is denselora  # nothing was set
