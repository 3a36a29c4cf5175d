# mypy: allow-untyped-defs
# Triton would read annotations as argument types.
"""Triton kernels of `softmax_votes`: two passes over the long side, each reading its rows once.

Pass 1 computes the peak and the total of each column's softmax, in chunks of the long side. A column is one short token
under one head. Pass 2 reads the long side again and reduces over the columns. Scores exist only in tiles.

The heads of short that share a head of long are stacked: column c of a head of long is short token c // GROUP under the
(c mod GROUP)-th of these heads. So a loaded tile of a head of long is used for all its columns.

A pass takes 2 · GROUP · M operations per element of the long side. With about 50 text tokens in a prompt and GROUP = 1,
that takes less time than reading the element. Temporary memory: fp32 [2, S / CHUNK, Hl, GROUP · M] of partial peaks and
totals, and fp32 [Hl, N] of votes per head of long. All reductions have a fixed order, so results are deterministic.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from lightkv.ops.heads import Reduce, short_heads
from lightkv.ops.ragged import Selection

CHUNK = 512  # long tokens per program of pass 1: fills a GPU at a few thousand tokens, with few partial results
TILE_BYTES = 32768  # tile of one side; three of them and a tile of the other side fit 163 KiB of shared memory
MOST_ROWS = {2: 128, 4: 32}  # rows of a tile by bytes per element; fp32 uses no tensor cores and is unrolled instead
# Triton's interpreter multiplies the bit patterns of bf16 as integers. Products of 16-bit floats are exact in fp32.
WIDEN = tl.constexpr(knobs.runtime.interpret)


def softmax_votes_triton(long: Selection, short: Selection, scale: float, reduce: Reduce) -> Tensor:
    """Runs `softmax_votes` on the kernels below, without waiting for the device."""
    x, y, length, columns = long.states, short.states, len(long.index), len(short.index)
    most_long, most_short = long.sequences.longest, short.sequences.longest
    heads, device = x.shape[1], x.device
    group, shared = short_heads(heads, y.shape[1])
    if not columns or not length:
        return torch.zeros(length, dtype=torch.float32, device=device)
    if x.dtype == torch.float64:
        x, y = x.float(), y.float()  # the kernels compute in fp32
    x, y = (states if states.stride(3) == 1 else states.contiguous() for states in (x, y))
    long_rows, long_stride = _rows(x, long.index)
    short_rows, short_stride = _rows(y, short.index)
    sides = (x, y, long_rows, long.sequences.starts, short_rows, short.sequences.starts)
    strides = (x.stride(1), long_stride, y.stride(1), short_stride)
    # Scores are in base 2, because exp2 is one instruction.
    numbers = (scale * math.log2(math.e), columns * group)
    tiles = _tiles(x, most_short * group)
    sequences, chunks = len(long.sequences.starts) - 1, triton.cdiv(most_long, CHUNK)
    parts = torch.empty(2, chunks, heads, columns * group, dtype=torch.float32, device=device)
    short_tiles = triton.cdiv(most_short * group, tiles["BLOCK_M"])
    # Programs that share a chunk are neighbours, so that all but the first read it from the cache.
    peaks_kernel[(sequences * chunks * short_tiles, heads)](
        *sides, parts[0], parts[1], *strides, *numbers, chunks, short_tiles,
        GROUP=group, SHARED=shared, CHUNK=CHUNK, **tiles, num_stages=3,
    )  # fmt: skip
    peak = parts[0].amax(dim=0)
    share = (parts[1] * (parts[0] - peak).exp2()).sum(dim=0).reciprocal()
    votes = torch.empty(heads, length, dtype=torch.float32, device=device)
    long_tiles = triton.cdiv(most_long, tiles["BLOCK_N"])
    votes_kernel[(sequences * long_tiles, heads)](
        *sides, peak, share, votes, *strides, *numbers, length, long_tiles,
        GROUP=group, SHARED=shared, MAXIMUM=reduce == "max", **tiles, num_stages=2,
    )  # fmt: skip
    return votes.sum(dim=0) if reduce == "sum" else votes.amax(dim=0)


def _rows(x: Tensor, index: Tensor) -> tuple[Tensor, int]:
    """Returns (rows, stride): within a head of x, token b·S + s begins at element rows · stride.

    The stride is a separate argument because the compiler infers the alignment of rows from it.
    """
    batch, token = x.stride(0), x.stride(2)
    if x.shape[0] == 1 or batch == x.shape[2] * token:
        return index, token
    stride = math.gcd(batch, token) or 1
    return index // x.shape[2] * (batch // stride) + index % x.shape[2] * (token // stride), stride


def _tiles(x: Tensor, columns: int) -> dict[str, int]:
    """Rows of the long side (BLOCK_N), columns (BLOCK_M) and d (BLOCK_D): powers of two, at least 16 for tl.dot."""
    d = max(16, triton.next_power_of_2(x.shape[3]))
    most = max(16, min(MOST_ROWS[x.element_size()], TILE_BYTES // (d * x.element_size())))
    block = min(most, max(16, triton.next_power_of_2(columns)))
    return {"D": x.shape[3], "BLOCK_M": block, "BLOCK_N": most, "BLOCK_D": d, "num_warps": 8 if block > 64 else 4}


@triton.jit
def _scores(a, b, scale):
    """a bᵀ · scale in fp32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), input_precision="ieee") * scale


@triton.jit
def _long_tile(
    long, rows, stride_head, stride, head, first, end, D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[N, BLOCK_D] of one head's packed tokens from `first` on, and whether each is before `end`; 0 from `end` on."""
    n, d = first + tl.arange(0, N), tl.arange(0, BLOCK_D)
    row = tl.load(rows + n, mask=n < end, other=0) * stride
    at = long + head * stride_head + row[:, None] + d[None, :]
    return tl.load(at, mask=(n < end)[:, None] & (d < D)[None, :], other=0.0), n < end


@triton.jit
def _short_tile(
    short, rows, stride_head, stride, head, column, end,
    GROUP: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[M, BLOCK_D] of the columns `column` (int64 [M]) of one head of long; 0 from `end` on."""
    d = tl.arange(0, BLOCK_D)
    row = tl.load(rows + column // GROUP, mask=column < end, other=0) * stride
    of = (head * GROUP + column % GROUP) // SHARED
    at = short + (of * stride_head + row)[:, None] + d[None, :]
    return tl.load(at, mask=(column < end)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["width", "chunks", "short_tiles"])
def peaks_kernel(
    long, short, long_rows, long_starts, short_rows, short_starts, peaks, totals,
    long_stride_head, long_stride, short_stride_head, short_stride, scale, width, chunks, short_tiles,
    D: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per chunk of a sequence and column: peak = max s and total = Σ 2^(s − peak); −inf and 0 without tokens.

    peaks and totals are [chunks, Hl, width].
    """
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, chunk = program // short_tiles // chunks, program // short_tiles % chunks
    begin = tl.load(short_starts + sequence) * GROUP
    end = tl.load(short_starts + sequence + 1) * GROUP
    column = begin + program % short_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    if begin + program % short_tiles * BLOCK_M < end:
        a = _short_tile(
            short, short_rows, short_stride_head, short_stride, head, column, end, GROUP, SHARED, D, BLOCK_D
        )
        first = tl.load(long_starts + sequence) + chunk.to(tl.int64) * CHUNK
        last = tl.minimum(tl.load(long_starts + sequence + 1), first + CHUNK)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for n in range(first, last, BLOCK_N):
            b, real = _long_tile(long, long_rows, long_stride_head, long_stride, head, n, last, D, BLOCK_N, BLOCK_D)
            s = tl.where(real[None, :], _scores(a, b, scale), float("-inf"))
            higher = tl.maximum(peak, tl.max(s, axis=1))
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(s - higher[:, None]), axis=1)
            peak = higher
        at = (chunk * tl.num_programs(1) + head) * width + column
        tl.store(peaks + at, peak, mask=column < end)
        tl.store(totals + at, total, mask=column < end)


@triton.jit(do_not_specialize=["width", "length", "long_tiles"])
def votes_kernel(
    long, short, long_rows, long_starts, short_rows, short_starts, peak, share, votes,
    long_stride_head, long_stride, short_stride_head, short_stride, scale, width, length, long_tiles,
    D: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, MAXIMUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per long token and head of long: Σ or max over its columns of 2^(s − peak) · share; 0 without columns.

    peak and share = 1 / total are [Hl, width], votes [Hl, length].
    """
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence = program // long_tiles
    first = tl.load(long_starts + sequence) + (program % long_tiles).to(tl.int64) * BLOCK_N
    last = tl.load(long_starts + sequence + 1)
    if first < last:
        a, real = _long_tile(long, long_rows, long_stride_head, long_stride, head, first, last, D, BLOCK_N, BLOCK_D)
        begin = tl.load(short_starts + sequence) * GROUP
        end = tl.load(short_starts + sequence + 1) * GROUP
        vote = tl.zeros([BLOCK_N], tl.float32)
        for m in range(begin, end, BLOCK_M):
            column = m + tl.arange(0, BLOCK_M)
            b = _short_tile(
                short, short_rows, short_stride_head, short_stride, head, column, end, GROUP, SHARED, D, BLOCK_D
            )
            at = head * width + column
            highest = tl.load(peak + at, mask=column < end, other=0.0)
            part = tl.load(share + at, mask=column < end, other=0.0)
            p = tl.exp2(_scores(a, b, scale) - highest[None, :]) * part[None, :]
            vote = tl.maximum(vote, tl.max(p, axis=1)) if MAXIMUM else vote + tl.sum(p, axis=1)
        tl.store(votes + head * length + first + tl.arange(0, BLOCK_N), vote, mask=real)
