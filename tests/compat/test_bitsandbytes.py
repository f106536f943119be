"""bitsandbytes still does what qdense relies on beyond its documentation: see qdense/compat/bitsandbytes.py."""

import contextlib
from pathlib import Path

import pytest
import torch

from qdense.compat.bitsandbytes import native_library, never_repack, unpacked_weight


@pytest.fixture
def layer():
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    made = Linear4bit(64, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    assert made.weight.quant_state is not None, "moving a 4-bit layer to a device no longer quantizes it"
    return made


def eval_forward(layer, x):
    with torch.no_grad():
        layer.eval()(x)


def test_the_switch_is_there_and_still_needed(layer):
    assert hasattr(layer, "support_avx512bf16_for_cpu"), (
        "bitsandbytes has renamed or dropped the switch: see whether training after an eval forward on a CPU with "
        "AVX512-BF16 still has wrong gradients; if not, never_repack can go"
    )
    layer.support_avx512bf16_for_cpu = (
        True  # whatever this CPU has: the weights are repacked before any kernel is asked
    )
    packed = layer.weight.data.clone()
    with contextlib.suppress(RuntimeError, NotImplementedError):
        eval_forward(layer, torch.zeros(4, 64, dtype=torch.bfloat16))
    assert not torch.equal(layer.weight.data, packed), "an eval forward repacks nothing now: never_repack can go"


def test_an_eval_forward_leaves_weights_and_gradients_as_they_were(layer):
    layer.support_avx512bf16_for_cpu = True
    never_repack(torch.nn.Sequential(layer))
    packed, weight = layer.weight.data.clone(), unpacked_weight(layer).float()
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    eval_forward(layer, x.detach())
    assert torch.equal(layer.weight.data, packed)
    output = layer.train()(x)
    output.sum().backward()
    torch.testing.assert_close(x.grad.float(), weight.sum(0).expand(4, -1), rtol=0.02, atol=0.02)


def test_a_weight_is_unpacked(layer):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(128, 64)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    layer.weight.data, layer.weight.quant_state = packed, state
    torch.testing.assert_close(unpacked_weight(layer), dequantize_4bit(packed, state))
    assert (unpacked_weight(layer).float() - weight).norm() < 0.15 * weight.norm()


def test_the_native_library_is_a_file_or_none(monkeypatch):
    from bitsandbytes import cextension

    assert Path(native_library()).is_file()
    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("no library"))
    assert native_library() is None
