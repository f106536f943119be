"""`encode`, `decode` and `add` of qdense/ops/denselora.py as fused Triton kernels, for CUDA.

The adapter does little arithmetic; its cost is moving tensors as wide as the model. In single operations, with masks and
activations, a pass of the equation reads or writes about ten of them. Here it is only these, (T, d_in) or (T,
d_out):

    encode    forward: x is read                              backward: x is read; the gradient of x is read and written
    add       forward: output is read and written in place    backward: the gradient of output is read

For the backward pass only x, which exists anyway, and tensors (T, r) are kept. Masks are not kept: they are a function of a
seed and of an element's row and column, and each kernel recomputes them. A large r ("wide" below) does not
fit the registers of the backward kernels; then cuBLAS multiplies, between small kernels, with a tensor as
wide as the model in memory.

Sums over tokens have a fixed order, without atomics, so the same inputs give the same gradients bit for bit.
"""

# ruff: noqa: N803 (compile-time constants are written in capitals, as everywhere in Triton)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdense.compat.torch import is_seen_by_others, is_view
from qdense.ops import denselora
from qdense.ops.interpreter import is_interpreted

# BLOCK SIZES

_MAX_NARROW_ENCODER = 256  # rank of all encoders of a group together, at which dE fills the registers
_MAX_NARROW_DECODER = 64  # above, the shares of `_decode_backward_blocks` move more bytes than cuBLAS needs
_NUM_SHARES = 2**15  # tokens are split until a backward kernel has this many programs, times the rank


def _blocks(rows: int, width: int, rank: int, *, num_warps: int, num_stages: int = 2) -> dict[str, int]:
    """The sizes below are the quickest of 331 on an H200, for LLaMA-3-8B's widths in bf16 and 2,048 and 8,192 tokens; or the next
    best, where a 4090 would hold half as many programs at once. tools/kernel_resources.py tells registers and shared memory.

    No size depends on T, which changes with every micro-batch; each new value would be compiled. Blocks of fp32 are narrower:
    they take twice the space, and tl.dot in fp32 many more registers.
    """
    blocks = {"BLOCK_ROWS": rows, "BLOCK_WIDTH": width, "BLOCK_RANK": rank}
    return blocks | {"num_warps": num_warps, "num_stages": num_stages}


def _rank_block(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))  # tl.dot needs at least 16


def _encode_blocks(rank: int, itemsize: int) -> dict[str, int]:
    """All ranks up to 128: x is read, and its mask computed, once for each block of ranks."""
    block_rank = min(_rank_block(rank), 128)
    is_small = block_rank <= 64
    return _blocks(16 if is_small else 32, 256 // itemsize, block_rank, num_warps=4 if is_small else 8)


def _encode_backward_blocks(rank: int, itemsize: int) -> dict[str, int]:
    """dE stays in registers, (rank, width) in fp32: at most 64 for each thread, beside du, x and dx."""
    block_rank = _rank_block(rank)
    if itemsize == 4:
        return _blocks(32, 32, block_rank, num_warps=8, num_stages=1)
    is_small = block_rank <= 64
    width = 64 if block_rank <= 128 else 32
    return _blocks(64, width, block_rank, num_warps=4 if is_small else 8, num_stages=2 if is_small else 1)


def _decode_blocks(rank: int, itemsize: int) -> dict[str, int]:
    block_rank = min(_rank_block(rank), 128 // itemsize)
    is_small = block_rank <= 32
    return _blocks(32 if is_small else 64, 128 if is_small else 64, block_rank, num_warps=4)


def _decode_backward_blocks(rank: int, itemsize: int) -> dict[str, int]:
    """As wide as fits: each block writes its share of the gradient of `mixed`, (T, r) in fp32, which is read again to be summed.

    For an element of output these are 8 r / width bytes; the wide way takes 6 (2 to write, 4 to read). Rows and warps are such
    that tl.dot splits its output among the warps: else each of them computes the mask and the slope of the same elements.
    """
    block_rank = _rank_block(rank)
    if itemsize == 4:
        return _blocks(32, 32, block_rank, num_warps=8, num_stages=1)
    return _blocks(64 if block_rank <= 32 else 32, 128, block_rank, num_warps=4, num_stages=1)


def _split_rows(num_rows: int, num_tiles: int, blocks: dict[str, int]) -> tuple[int, int]:
    """(number of chunks of tokens, rows of a chunk), given the number of programs without such a split."""
    num_blocks = triton.cdiv(num_rows, blocks["BLOCK_ROWS"])
    num_programs = _NUM_SHARES // blocks["BLOCK_RANK"]
    num_chunks = max(1, min(num_programs // num_tiles, num_blocks // 4))
    rows = triton.cdiv(num_blocks, num_chunks) * blocks["BLOCK_ROWS"]
    return triton.cdiv(num_rows, rows), rows


_ELEMENTWISE = {"BLOCK_ROWS": 16, "BLOCK_WIDTH": 128}


def _elementwise_grid(num_rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(num_rows, _ELEMENTWISE["BLOCK_ROWS"]), triton.cdiv(width, _ELEMENTWISE["BLOCK_WIDTH"])


# DROPOUT

# Element (row, column) of a mask is dropped if 16 bits of a hash of (seed, row, column // 2) are below p * 2**16: the low half
# for even columns, the high half for odd ones, since a thread holds neighbours and then hashes once for both. Nothing else
# matters, such as block sizes, so all kernels see the same mask. Rows are hashed before they are combined with columns, so that
# no row has another row's mask, shifted. The factors are odd: they scatter numbers over 32 bits and map no two onto one.


@triton.jit
def _mix(h: tl.tensor) -> tl.tensor:
    """lowbias32, a bijection of 32-bit integers (github.com/skeeto/hash-prospector)."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def keep_tile(seed: tl.tensor, rows: tl.tensor, columns: tl.tensor, THRESHOLD: tl.constexpr) -> tl.tensor:
    """The mask (rows, columns); without dropout all True, which the compiler removes."""
    if THRESHOLD == 0:
        keep = tl.full([rows.shape[0], columns.shape[0]], True, tl.int1)
    else:
        row_hash = _mix((rows.to(tl.uint32) * 0x9E3779B1) ^ seed.to(tl.uint32))
        bits = _mix(row_hash[:, None] ^ ((columns.to(tl.uint32) >> 1) * 0x85EBCA77)[None, :])
        keep = (bits << (16 - 16 * (columns & 1)).to(tl.uint32)[None, :]) >= (THRESHOLD << 16)
    return keep


def keep_mask(seed: int, num_rows: int, num_columns: int, dropout: float, device: torch.device | str = "cpu") -> Tensor:
    """The mask that the kernels compute, (num_rows, num_columns), bool, in plain PyTorch: for tests."""

    def mix(h: Tensor) -> Tensor:  # in int64, which wraps; the low 32 bits are correct
        h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return h ^ (h >> 16)

    columns = torch.arange(num_columns, device=device)
    row_hash = mix(((torch.arange(num_rows, device=device) * 0x9E3779B1) & 0xFFFFFFFF) ^ seed)
    bits = mix(row_hash[:, None] ^ (((columns >> 1) * 0x85EBCA77) & 0xFFFFFFFF))
    return ((bits >> (16 * (columns & 1))) & 0xFFFF) >= _threshold(dropout)


def _threshold(dropout: float) -> int:
    """Of 2**16, so a dropout above 0 is a multiple of 1.5e-5, and at least one of these."""
    return min(max(round(dropout * 2**16), 1), 2**16 - 1) if dropout else 0


def _draw_seeds(num_seeds: int, dropout: float) -> list[int]:
    """From the CPU's generator, which needs no wait for the GPU, and which checkpointing restores before it recomputes."""
    return torch.randint(2**31, (num_seeds,), device="cpu").tolist() if dropout else [0] * num_seeds


# PARTS OF THE KERNELS

_IS_INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def round_tile(tile: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    if _IS_INTERPRETED and dtype == tl.bfloat16:  # which truncates, as of Triton 3.9
        bits = tile.to(tl.uint32, bitcast=True)
        tile = (bits + ((bits >> 16) & 1) + 0x7FFF).to(tl.float32, bitcast=True)
    return tile.to(dtype)


@triton.jit
def _normal_cdf(u: tl.tensor) -> tl.tensor:
    """P(N(0, 1) <= u), with an error of at most 5e-8, as fp32 has anyway; GELU(u) is u times it.

    The upper tail is 2**-p(|u|), with p a polynomial fitted to that error: half of the instructions of an `erf` that is exact to
    the last bits of its own value, which GELU's 1 + erf loses.
    """
    a = tl.abs(u)
    p = (2.83491278e-06 * a - 3.9377691e-05) * a + 0.000186180241
    p = ((p * a + 0.000136936368) * a - 0.00706342012) * a + 0.0524961783
    p = ((p * a + 0.459208197) * a + 1.15110521) * a + 1.0
    tail = tl.exp2(-p)
    return tl.where(u < 0.0, tail, 1.0 - tail)


@triton.jit
def _activate(u: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """s(u), fp32."""
    if ACTIVATION == "gelu":
        s = u * _normal_cdf(u)
    elif ACTIVATION == "silu":
        s = u * tl.sigmoid(u)
    elif ACTIVATION == "tanh":
        # From the sigmoid, whose exponential may overflow; near 0, where it cancels, from the series.
        s = tl.where(tl.abs(u) < 0.1, u - u * u * u * (1 / 3 - u * u * (2 / 15)), 2.0 * tl.sigmoid(2.0 * u) - 1.0)
    elif ACTIVATION == "relu":
        s = tl.maximum(u, 0.0)
    else:
        tl.static_assert(ACTIVATION == "none")
        s = u
    return s


@triton.jit
def _slope(u: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """s'(u), fp32."""
    if ACTIVATION == "gelu":
        # The exponential to base 2 takes fewer instructions: it rounds numbers below 2**-126 to 0.
        slope = _normal_cdf(u) + 0.3989422804014327 * u * tl.exp2(-0.7213475204444817 * u * u)
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(u)
        slope = sigmoid * (1.0 + u * (1.0 - sigmoid))
    elif ACTIVATION == "tanh":
        s = _activate(u, "tanh")
        slope = 1.0 - s * s
    elif ACTIVATION == "relu":
        slope = tl.where(u > 0.0, 1.0, 0.0)
    else:
        slope = tl.full(u.shape, 1.0, tl.float32)
    return slope


@triton.jit
def _tile(
    matrix: tl.tensor, rows: tl.tensor, columns: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor
) -> tl.tensor:
    """Pointers to elements of a contiguous matrix (num_rows, num_columns), and which of them are inside it."""
    pointers = matrix + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    return pointers, (rows < num_rows)[:, None] & (columns < num_columns)[None, :]


@triton.jit
def _load(
    matrix: tl.tensor, rows: tl.tensor, columns: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor
) -> tl.tensor:
    pointers, is_inside = _tile(matrix, rows, columns, num_rows, num_columns)
    return tl.load(pointers, mask=is_inside, other=0.0)


@triton.jit
def _store(
    matrix: tl.tensor, rows: tl.tensor, columns: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor, tile: tl.tensor
) -> None:
    """Rounds to the dtype of the matrix."""
    pointers, is_inside = _tile(matrix, rows, columns, num_rows, num_columns)
    tl.store(pointers, round_tile(tile.to(tl.float32), matrix.dtype.element_ty), mask=is_inside)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total + a b, in fp32; factors in fp32 are not rounded to TF32 (for bf16 and fp16 that setting has no meaning)."""
    if _IS_INTERPRETED:  # its tl.dot reads the bits of bf16 as integers (Triton 3.6 to 3.9)
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _drop(tile: tl.tensor, keep: tl.tensor) -> tl.tensor:
    """Without the factor 1 / (1 - p), which is always applied elsewhere, in fp32."""
    return tl.where(keep, tile, tl.zeros_like(tile))


# KERNELS
# Seeds and sizes that change with each step are exempt from specialization, which would compile 1 and multiples of 16 separately.


@triton.jit(do_not_specialize=["x_seed", "encoded_seed", "num_rows"])
def _encode_kernel(
    x: tl.tensor,  # (num_rows, width)
    encoder: tl.tensor,  # (rank, width)
    u: tl.tensor,  # (num_rows, rank): E drop(x), written
    encoded: tl.tensor,  # (num_rows, rank): drop(s(u)), written
    x_seed: tl.tensor,
    encoded_seed: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    scale: tl.tensor,  # 1 / (1 - p)
    ACTIVATION: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
) -> None:
    """A program: a tile of u. Blocks of ranks are neighbours in the grid, so that the L2 cache serves all but one with x."""
    ranks = tl.program_id(0) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        x_tile = _drop(_load(x, rows, columns, num_rows, width), keep_tile(x_seed, rows, columns, THRESHOLD))
        encoder_tile = _load(encoder, ranks, columns, rank, width)
        total = _dot(x_tile, tl.trans(encoder_tile), total)
    u_tile = round_tile(total * scale, u.dtype.element_ty)
    _store(u, rows, ranks, num_rows, rank, u_tile)
    # s of the rounded u, since the backward pass has no other.
    activated = _activate(u_tile.to(tl.float32), ACTIVATION) * scale
    _store(encoded, rows, ranks, num_rows, rank, _drop(activated, keep_tile(encoded_seed, rows, ranks, THRESHOLD)))


@triton.jit(do_not_specialize=["encoded_seed", "num_rows"])
def _encode_slope_kernel(
    encoded_gradient: tl.tensor,  # (num_rows, rank)
    u: tl.tensor,  # (num_rows, rank)
    u_gradient: tl.tensor,  # (num_rows, rank), written: times the 1 / (1 - p) of drop(x) in the next kernel
    encoded_seed: tl.tensor,
    num_rows: tl.tensor,
    rank: tl.tensor,
    scale: tl.tensor,  # 1 / (1 - p)
    ACTIVATION: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ranks = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    gradient = _load(encoded_gradient, rows, ranks, num_rows, rank).to(tl.float32)
    slope = _slope(_load(u, rows, ranks, num_rows, rank).to(tl.float32), ACTIVATION)
    keep = keep_tile(encoded_seed, rows, ranks, THRESHOLD)
    _store(u_gradient, rows, ranks, num_rows, rank, _drop(gradient * slope * (scale * scale), keep))


@triton.jit(do_not_specialize=["x_seed", "num_rows", "chunk_rows"])
def _encode_backward_kernel(
    x: tl.tensor,  # (num_rows, width)
    encoder: tl.tensor,  # (rank, width)
    u_gradient: tl.tensor,  # (num_rows, rank)
    x_gradient: tl.tensor,  # (num_rows, width), added to; or None
    encoder_gradient: tl.tensor,  # (chunks, rank, width), fp32, written; or None
    x_seed: tl.tensor,
    num_rows: tl.tensor,
    chunk_rows: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    THRESHOLD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
) -> None:
    """A program: some columns of x, all ranks, a chunk of tokens.

    du = u_gradient;  dE = du^T drop(x);  dx += drop(du E)
    """
    columns = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    ranks = tl.arange(0, BLOCK_RANK)
    chunk = tl.program_id(1)
    end = tl.minimum((chunk + 1) * chunk_rows, num_rows)
    encoder_tile = _load(encoder, ranks, columns, rank, width)
    total = tl.zeros([BLOCK_RANK, BLOCK_WIDTH], tl.float32)
    for start in range(chunk * chunk_rows, end, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        du = _load(u_gradient, rows, ranks, end, rank)
        keep = keep_tile(x_seed, rows, columns, THRESHOLD)
        if encoder_gradient is not None:
            x_tile = _drop(_load(x, rows, columns, end, width), keep)
            total = _dot(tl.trans(du), x_tile, total)
        if x_gradient is not None:
            dx = _drop(_dot(du, encoder_tile, tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)), keep)
            dx += _load(x_gradient, rows, columns, end, width).to(tl.float32)
            _store(x_gradient, rows, columns, end, width, dx)
    if encoder_gradient is not None:
        _store(encoder_gradient + chunk.to(tl.int64) * rank * width, ranks, columns, rank, width, total)


@triton.jit(do_not_specialize=["seed", "num_rows"])
def drop_kernel(
    source: tl.tensor,  # (num_rows, width)
    target: tl.tensor,  # (num_rows, width)
    seed: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    IS_ADDED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """target = drop(source), or target += drop(source): around the matrix products of a wide encoder."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    tile = _load(source, rows, columns, num_rows, width).to(tl.float32)
    tile = _drop(tile, keep_tile(seed, rows, columns, THRESHOLD))
    if IS_ADDED:
        tile += _load(target, rows, columns, num_rows, width).to(tl.float32)
    _store(target, rows, columns, num_rows, width, tile)


@triton.jit(do_not_specialize=["seed", "num_rows"])
def _decode_kernel(
    source: tl.tensor,  # (num_rows, width): output, or its gradient
    target: tl.tensor,  # (num_rows, width), written; may be the source
    mixed: tl.tensor,  # (num_rows, rank)
    decoder: tl.tensor,  # (width, rank)
    seed: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    scale: tl.tensor,  # scaling / (1 - p)
    IS_BACKWARD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
) -> None:
    """A program: a tile of the target, which is, with p = D mixed,

    output + drop(scale s(p)), or backward, for a wide decoder, the gradient of p: drop(scale s'(p) gradient)
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    p = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        ranks = start + tl.arange(0, BLOCK_RANK)
        mixed_tile = _load(mixed, rows, ranks, num_rows, rank)
        decoder_tile = _load(decoder, columns, ranks, width, rank)
        p = _dot(mixed_tile, tl.trans(decoder_tile), p)
    tile = _load(source, rows, columns, num_rows, width).to(tl.float32)
    keep = keep_tile(seed, rows, columns, THRESHOLD)
    if IS_BACKWARD:
        tile = _drop(tile * scale * _slope(p, ACTIVATION), keep)
    else:
        tile += _drop(scale * _activate(p, ACTIVATION), keep)
    _store(target, rows, columns, num_rows, width, tile)


@triton.jit(do_not_specialize=["seed", "num_rows", "chunk_rows"])
def _decode_backward_kernel(
    gradient: tl.tensor,  # (num_rows, width), of output
    mixed: tl.tensor,  # (num_rows, rank)
    decoder: tl.tensor,  # (width, rank)
    mixed_gradient: tl.tensor,  # (tiles of the width, num_rows, rank), fp32, written
    decoder_gradient: tl.tensor,  # (chunks, width, rank), fp32, written; or None
    seed: tl.tensor,
    num_rows: tl.tensor,
    chunk_rows: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    scale: tl.tensor,  # scaling / (1 - p)
    ACTIVATION: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
) -> None:
    """A program: some columns of output, all ranks, a chunk of tokens.

    p = D mixed;  dp = drop(scale s'(p) gradient);  dD = dp^T mixed;  dmixed = dp D
    """
    columns = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    ranks = tl.arange(0, BLOCK_RANK)
    chunk = tl.program_id(1)
    end = tl.minimum((chunk + 1) * chunk_rows, num_rows)
    mixed_gradient += tl.program_id(0).to(tl.int64) * num_rows * rank
    decoder_tile = _load(decoder, columns, ranks, width, rank)
    total = tl.zeros([BLOCK_WIDTH, BLOCK_RANK], tl.float32)
    for start in range(chunk * chunk_rows, end, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mixed_tile = _load(mixed, rows, ranks, end, rank)
        p = _dot(mixed_tile, tl.trans(decoder_tile), tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32))
        dp = _load(gradient, rows, columns, end, width).to(tl.float32) * scale * _slope(p, ACTIVATION)
        dp = round_tile(_drop(dp, keep_tile(seed, rows, columns, THRESHOLD)), mixed.dtype.element_ty)
        if decoder_gradient is not None:
            total = _dot(tl.trans(dp), mixed_tile, total)
        _store(
            mixed_gradient,
            rows,
            ranks,
            end,
            rank,
            _dot(dp, decoder_tile, tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)),
        )
    if decoder_gradient is not None:
        _store(decoder_gradient + chunk.to(tl.int64) * width * rank, columns, ranks, width, rank, total)


# ENCODE


def encode(
    x: Tensor, encoders: Sequence[Tensor], *, activation: str = "gelu", dropout: float = 0.0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """drop(s(E drop(x))) for each of several modules that read the same x; they share one mask of it.

    Args:
        x: (..., d_in), bf16, fp16 or fp32: the projections' input.
        encoders: E of each module, (r, d_in), dtype of x.
        activation: s, a key of `ACTIVATIONS`.
        dropout: probability of dropping an element; pass 0 outside training.

    Returns:
        x again, for the frozen projections (the adapter's gradient is added to theirs, in place), and
        (..., r) for each encoder, dtype of x.
    """
    if not x.numel():
        return denselora.encode(x, encoders, activation=activation, dropout=dropout)
    x_again, encoded = _Encode.apply(x, activation, dropout, *encoders)
    # An x without a gradient must not be returned as one for which the projections compute it.
    return x_again if x.requires_grad else x, encoded.split([len(encoder) for encoder in encoders], dim=-1)


class _Encode(torch.autograd.Function):
    """Saved: x, the encoders, and u = E drop(x), (..., sum of r), rounded to the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, dropout: float, *encoders: Tensor) -> tuple[Tensor, Tensor]:
        dense, encoder = x.contiguous(), _stack(encoders)
        (rank, width), num_rows = encoder.shape, x.numel() // x.shape[-1]
        u, encoded = x.new_empty(*x.shape[:-1], rank), x.new_empty(*x.shape[:-1], rank)
        seeds = _draw_seeds(2, dropout)
        blocks = _encode_blocks(rank, x.itemsize)
        grid = (triton.cdiv(rank, blocks["BLOCK_RANK"]), triton.cdiv(num_rows, blocks["BLOCK_ROWS"]))
        constants = {"ACTIVATION": activation, "THRESHOLD": _threshold(dropout)} | blocks
        with torch.cuda.device_of(x):
            _encode_kernel[grid](
                dense, encoder, u, encoded, *seeds, num_rows, width, rank, 1 / (1 - dropout), **constants
            )
        ctx.save_for_backward(dense, u, *encoders)
        ctx.activation, ctx.dropout, ctx.seeds = activation, dropout, seeds
        ctx.set_materialize_grads(False)
        return x, encoded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x_gradient: Tensor | None, encoded_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_x, _, _, *needs_encoders = ctx.needs_input_grad
        if encoded_gradient is None:
            return x_gradient, None, None, *(None for _ in needs_encoders)
        x, u, *encoders = ctx.saved_tensors
        x_seed, encoded_seed = ctx.seeds
        threshold = _threshold(ctx.dropout)
        if needs_x:
            x_gradient = torch.zeros_like(x) if x_gradient is None else _to_be_added_to(x_gradient)
        with torch.cuda.device_of(x):
            num_rows, rank = u.numel() // u.shape[-1], u.shape[-1]
            u_gradient = u.new_empty(num_rows, rank)
            grid = _elementwise_grid(num_rows, rank)
            constants = {"ACTIVATION": ctx.activation, "THRESHOLD": threshold} | _ELEMENTWISE
            _encode_slope_kernel[grid](
                *(encoded_gradient.contiguous(), u, u_gradient, encoded_seed, num_rows, rank, 1 / (1 - ctx.dropout)),
                **constants,
            )
            backward = _encode_backward if rank <= _MAX_NARROW_ENCODER else _encode_backward_wide
            encoder_gradient = backward(
                *(x.view(num_rows, -1), _stack(encoders), u_gradient, x_gradient if needs_x else None),
                *(any(needs_encoders), x_seed, threshold),
            )
        encoder_gradients: Sequence[Tensor | None] = [None] * len(encoders)
        if encoder_gradient is not None:
            encoder_gradients = encoder_gradient.split([len(encoder) for encoder in encoders])
        return x_gradient, None, None, *encoder_gradients


def _stack(encoders: Sequence[Tensor]) -> Tensor:
    return encoders[0].contiguous() if len(encoders) == 1 else torch.cat(tuple(encoders))


def _to_be_added_to(gradient: Tensor) -> Tensor:
    """The incoming gradient itself if no other code can see it, else a copy.

    From frozen projections it is a new product, or autograd's new sum of such. Other readers of x may pass on a shared
    tensor: the gradient of a sum is that of each term, and a caller of autograd.grad keeps what it passes. Then
    the tensor, or the one of which it is a view, is referenced elsewhere. (A hook that stores the gradient is not seen.)
    """
    if is_seen_by_others(gradient):
        return gradient.clone(memory_format=torch.contiguous_format)
    return gradient.contiguous()


def _encode_backward(
    x: Tensor,
    encoder: Tensor,
    u_gradient: Tensor,
    x_gradient: Tensor | None,
    needs_encoder: bool,
    x_seed: int,
    threshold: int,
) -> Tensor | None:
    """Add to the gradient of x, if there is one; return the encoder's, if needed."""
    (num_rows, width), rank = x.shape, len(encoder)
    blocks = _encode_backward_blocks(rank, x.itemsize)
    num_tiles = triton.cdiv(width, blocks["BLOCK_WIDTH"])
    num_chunks, chunk_rows = _split_rows(num_rows, num_tiles, blocks)
    shares = x.new_empty(num_chunks, rank, width, dtype=torch.float32) if needs_encoder else None
    _encode_backward_kernel[num_tiles, num_chunks](
        *(x, encoder, u_gradient, x_gradient, shares, x_seed, num_rows, chunk_rows, width, rank),
        THRESHOLD=threshold,
        **blocks,
    )
    return None if shares is None else shares.sum(0).to(x.dtype)


def _encode_backward_wide(
    x: Tensor,
    encoder: Tensor,
    u_gradient: Tensor,
    x_gradient: Tensor | None,
    needs_encoder: bool,
    x_seed: int,
    threshold: int,
) -> Tensor | None:
    """The same, by cuBLAS between two passes over the elements."""
    grid, constants = _elementwise_grid(*x.shape), {"THRESHOLD": threshold} | _ELEMENTWISE
    encoder_gradient = None
    if needs_encoder:
        dropped = x
        if threshold:
            dropped = torch.empty_like(x)
            drop_kernel[grid](x, dropped, x_seed, *x.shape, IS_ADDED=False, **constants)
        encoder_gradient = u_gradient.T @ dropped
        del dropped  # before another of its size exists
    if x_gradient is not None:
        drop_kernel[grid](u_gradient @ encoder, x_gradient, x_seed, *x.shape, IS_ADDED=True, **constants)
    return encoder_gradient


# DECODE


class Delta(NamedTuple):
    """What `add` needs: `mixed` as handed on by `_Keep`, the decoder, and (seed, scaling / (1 - p), activation, threshold)."""

    mixed: Tensor
    decoder: Tensor
    settings: tuple[int, float, str, int]


def decode(
    mixed: Tensor, decoder: Tensor, *, scaling: float, activation: str = "gelu", dropout: float = 0.0
) -> Delta | Tensor:
    """scaling * drop(s(D mixed)), computed by `add`; here its dropout is drawn, and saved what its backward pass needs.

    Args:
        mixed: (..., r), bf16, fp16 or fp32: M times the encoding.
        decoder: D, (d_out, r), dtype of mixed.
        scaling: alpha / r.
        activation: s, a key of `ACTIVATIONS`.
        dropout: probability of dropping an element; pass 0 outside training.
    """
    if not mixed.numel():
        return denselora.decode(mixed, decoder, scaling=scaling, activation=activation, dropout=dropout)
    mixed, decoder = mixed.contiguous(), decoder.contiguous()
    (seed,) = _draw_seeds(1, dropout)
    settings = (seed, scaling / (1 - dropout), activation, _threshold(dropout))
    return Delta(_Keep.apply(mixed, decoder), decoder, settings)


def add(output: Tensor, delta: Delta | Tensor) -> Tensor:
    """output + delta.

    The result is written into `output`, unless autograd forbids that. If the producer of `output` has saved it for its
    backward pass, which no linear layer does, PyTorch raises its usual error.

    Args:
        output: (..., d_out): the frozen projection W0 x, bf16, fp16 or fp32.
        delta: of `decode`.

    Returns:
        (..., d_out), dtype of output.
    """
    if isinstance(delta, Tensor):  # there are no tokens
        return denselora.add(output, delta)
    result: Tensor = _Add.apply(output, delta.mixed, delta.decoder, delta.mixed.grad_fn, delta.settings)
    return result


class _Keep(torch.autograd.Function):
    """Hands `mixed` on, and saves it and the decoder for `_Add`.

    `_Add` itself does not: a checkpoint ends its recomputation where the last saved tensor is saved again. That is here,
    before the frozen projection. (So too in qdense/modeling/recompute.py.)
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, decoder: Tensor) -> Tensor:
        ctx.save_for_backward(mixed, decoder)
        return mixed.view_as(mixed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return gradients[0], None


class _Add(torch.autograd.Function):
    """Saves nothing."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, mixed: Tensor, decoder: Tensor, keeper: Any, settings: tuple[int, float, str, int]
    ) -> Tensor:
        # A view (nn.Linear with a bias returns one, of 3-D inputs) could be written too, but then autograd would copy gradients.
        if output.is_contiguous() and not is_view(output) and not (output.is_leaf and output.requires_grad):
            source = result = output
            ctx.mark_dirty(output)
        else:
            source = output.contiguous()
            result = torch.empty_like(source)
        ctx.keeper, ctx.settings = keeper, settings
        with torch.cuda.device_of(output):
            _decode_tiles(source, result, mixed, decoder, *settings, is_backward=False)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needs_output, needs_mixed, needs_decoder = ctx.needs_input_grad[:3]
        mixed_gradient = decoder_gradient = None
        if needs_mixed or needs_decoder:
            mixed, decoder = ctx.keeper.saved_tensors  # under a checkpoint, this recomputes the layer up to there
            backward = _decode_backward if decoder.shape[1] <= _MAX_NARROW_DECODER else _decode_backward_wide
            with torch.cuda.device_of(gradient):
                mixed_gradient, decoder_gradient = backward(
                    gradient.contiguous(), mixed, decoder, *ctx.settings, needs_decoder=needs_decoder
                )
        return gradient if needs_output else None, mixed_gradient, decoder_gradient, None, None


def _decode_tiles(
    source: Tensor,
    target: Tensor,
    mixed: Tensor,
    decoder: Tensor,
    seed: int,
    scale: float,
    activation: str,
    threshold: int,
    *,
    is_backward: bool,
) -> None:
    (width, rank), num_rows = decoder.shape, mixed.numel() // mixed.shape[-1]
    blocks = _decode_blocks(rank, mixed.itemsize)
    grid = (triton.cdiv(num_rows, blocks["BLOCK_ROWS"]), triton.cdiv(width, blocks["BLOCK_WIDTH"]))
    constants = {"IS_BACKWARD": is_backward, "ACTIVATION": activation, "THRESHOLD": threshold} | blocks
    _decode_kernel[grid](source, target, mixed, decoder, seed, num_rows, width, rank, scale, **constants)


def _decode_backward(
    gradient: Tensor,
    mixed: Tensor,
    decoder: Tensor,
    seed: int,
    scale: float,
    activation: str,
    threshold: int,
    *,
    needs_decoder: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of mixed, and of the decoder if needed."""
    (width, rank), num_rows = decoder.shape, mixed.numel() // mixed.shape[-1]
    blocks = _decode_backward_blocks(rank, mixed.itemsize)
    num_tiles = triton.cdiv(width, blocks["BLOCK_WIDTH"])
    num_chunks, chunk_rows = _split_rows(num_rows, num_tiles, blocks)
    mixed_shares = mixed.new_empty(num_tiles, *mixed.shape, dtype=torch.float32)
    shares = mixed.new_empty(num_chunks, width, rank, dtype=torch.float32) if needs_decoder else None
    _decode_backward_kernel[num_tiles, num_chunks](
        *(gradient, mixed, decoder, mixed_shares, shares, seed, num_rows, chunk_rows, width, rank, scale),
        ACTIVATION=activation,
        THRESHOLD=threshold,
        **blocks,
    )
    return mixed_shares.sum(0).to(mixed.dtype), None if shares is None else shares.sum(0).to(decoder.dtype)


def _decode_backward_wide(
    gradient: Tensor,
    mixed: Tensor,
    decoder: Tensor,
    seed: int,
    scale: float,
    activation: str,
    threshold: int,
    *,
    needs_decoder: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same, by cuBLAS, after a kernel that writes the gradient of p = D mixed, as large as `gradient`."""
    p_gradient = mixed.new_empty(gradient.shape)
    _decode_tiles(gradient, p_gradient, mixed, decoder, seed, scale, activation, threshold, is_backward=True)
    decoder_gradient = None
    if needs_decoder:
        decoder_gradient = p_gradient.view(-1, len(decoder)).T @ mixed.view(-1, mixed.shape[-1])
    return p_gradient @ decoder, decoder_gradient
