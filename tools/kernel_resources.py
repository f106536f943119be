"""Registers, shared memory and occupancy of the fused kernels, compiled here for cards that are not here.

    .venv/bin/python tools/kernel_resources.py
    .venv/bin/python tools/kernel_resources.py --check

Compiles each kernel for LLaMA-3-8B's widths with Triton and its ptxas; no GPU is needed. Occupancy is the share of a
multiprocessor's warps that can run at once; instructions are those of the program text, for an element of its tile. `--check`
fails if a kernel in bf16 keeps more than a few registers in memory.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qdense.ops import denselora_triton as ops

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_CARDS = {  # capability: warps and KiB of shared memory of a multiprocessor
    80: ("A100", 64, 164),
    86: ("RTX 3090", 48, 100),
    89: ("RTX 4090", 48, 100),
    90: ("H100, H200", 64, 228),
}
_DTYPES = {2: "bf16", 4: "fp32"}
_FEW = 8
_RANKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Kernel:
    """A kernel, its sizes, and its arguments that are neither pointers to the adapter's dtype nor integers."""

    name: str
    function: Any
    blocks: dict[str, int]
    constants: dict[str, Any]
    in_fp32: tuple[str, ...] = ()  # pointers


def kernels(rank: int, itemsize: int) -> Iterator[Kernel]:
    """Those that a step with an adapter of this rank runs."""
    dropped = {"THRESHOLD": round(0.05 * 2**16)}
    activated = dropped | {"ACTIVATION": "gelu"}
    yield Kernel("encode", ops._encode_kernel, ops._encode_blocks(rank, itemsize), activated)
    yield Kernel(
        *("encode backward", ops._encode_backward_kernel, ops._encode_backward_blocks(rank, itemsize)),
        *(dropped, ("encoder_gradient",)),
    )
    yield Kernel("add", ops._decode_kernel, ops._decode_blocks(rank, itemsize), activated | {"IS_BACKWARD": False})
    if rank <= ops._MAX_NARROW_DECODER:
        yield Kernel(
            *("add backward", ops._decode_backward_kernel, ops._decode_backward_blocks(rank, itemsize)),
            *(activated, ("mixed_gradient", "decoder_gradient")),
        )


def compiled(kernel: Kernel, itemsize: int, capability: int) -> dict[str, Any]:
    """What the compiler made of it."""
    sizes = dict(kernel.blocks)
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    constants = kernel.constants | sizes
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "scale":
            signature[name] = "fp32"
        elif name.endswith("seed") or name in ("num_rows", "chunk_rows", "width", "rank"):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if name in kernel.in_fp32 else f"*{_DTYPES[itemsize]}"
        if signature[name].startswith("*") or name in ("width", "rank"):
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.function, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        lines = [
            line for line in _output("nvdisasm", "-c", file.name).splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", line)
        ]
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    registers = int(found[1])
    _, most_warps, shared_kib = _CARDS[capability]
    programs = min(65536 // (-(-registers // 8) * 8 * 32 * warps), most_warps // warps)
    programs = min(programs, shared_kib * 1024 // (binary.metadata.shared + 1024))
    elements = sizes["BLOCK_ROWS"] * sizes["BLOCK_WIDTH"] / (32 * warps)
    return {
        "registers": registers,
        "shared": binary.metadata.shared,
        "spilled": sum(" STL" in line or " LDL" in line for line in lines),
        "occupancy": programs * warps / most_warps,
        "instructions": len(lines) / elements,
        "sizes": "x".join(map(str, sizes.values())) + f", {warps} warps",
    }


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="*", choices=_CARDS, default=[86, 89, 90])
    parser.add_argument("--ranks", type=int, nargs="*", default=list(_RANKS))
    parser.add_argument("--check", action="store_true", help="exit with 1 if a kernel in bf16 spills")
    arguments = parser.parse_args()
    print(
        "| card | kernel | rank | dtype | rows x width x rank | registers | shared, KiB | spilled | occupancy | instructions |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    is_spilled = False
    for capability in arguments.capabilities:
        for itemsize in (2,) if arguments.check else _DTYPES:
            for rank in arguments.ranks:
                for kernel in kernels(rank, itemsize):
                    found = compiled(kernel, itemsize, capability)
                    is_spilled |= found["spilled"] > _FEW and itemsize == 2
                    print(
                        f"| {_CARDS[capability][0]} | {kernel.name} | {rank} | {_DTYPES[itemsize]} | {found['sizes']} | "
                        f"{found['registers']} | {found['shared'] / 1024:.0f} | {found['spilled']} | {found['occupancy']:.0%} | "
                        f"{found['instructions']:.0f} |",
                        flush=True,
                    )
    if arguments.check and is_spilled:
        sys.exit("a kernel keeps registers in memory: see the column spilled")


if __name__ == "__main__":
    main()
