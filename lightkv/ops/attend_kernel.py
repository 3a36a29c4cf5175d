# mypy: allow-untyped-defs
# Triton would read annotations as argument types.
"""Attention with a bias per key on GPUs: one online softmax over key tiles, for prefill and, split over keys, decode.

Scores are held in units of log 2, s = (q · k) · (scale log2 e) + bias log2 e, so that exp2 serves. Key tiles are
counted from `first`, so padding is never loaded. The number of key chunks in decode depends on K alone, so that a row's
result does not depend on the rest of its batch.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a maximum over nothing that can be subtracted without NaN

# Triton's interpreter multiplies bf16 as the integers that hold it. Products of halves are exact in fp32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Sizes were chosen by what the compiler reports for 64 to 256 dims: no spills on Hopper in prefill, few elsewhere, and
# half the shared memory there is. Products in fp32 take no tensor cores and keep their operands in registers.
KEYS_BYTES = 16 * 1024  # of keys, and of values, in a tile
KEYS_BYTES_FP32 = 8 * 1024
PREFILL_ROWS = 128
PREFILL_ROWS_FP32 = 32
DECODE_QUERIES = 16  # up to here the queries alone give too few programs, and keys are split
DECODE_ROWS = 64  # heads of a group × queries in one tile, at most
CHUNK_KEYS = 256  # per program: 128 KiB of bf16 keys and values of 128 dims against 4 KiB of partial results
MAX_CHUNKS = 128  # longer caches get longer chunks, so that combining stays a few loads
CHUNKS_AT_ONCE = 32


@triton.jit
def _rows(pointers, rows, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=rows[:, None] & inside[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _dot(x, y, acc):
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _sweep(
    state, q, position, k, v, bias, k_row, v_row, bias_key, begin, end, scale, D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Take keys begin … end - 1 into state = (max, sum, acc); CAUSAL: those after a query's position are unseen.

    Without CAUSAL, end - begin must be whole tiles.
    """
    top, total, acc = state
    BLOCK_D: tl.constexpr = acc.shape[1]
    MASKED: tl.constexpr = CAUSAL or D != BLOCK_D
    key, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_tile = key[:, None].to(tl.int64) * k_row + column[None, :]
    v_tile = key[:, None].to(tl.int64) * v_row + column[None, :]
    for start in tl.range(begin, end, BLOCK_N):
        here, at = tl.cast(start, tl.int64), start + key
        keys = _rows(k + here * k_row + k_tile, at < end, column < D, MASKED)
        score = _dot(q, tl.trans(keys), None) * scale
        if bias is not None:
            score += tl.load(bias + (here + key) * bias_key, mask=at < end, other=0.0)[None, :] * LOG2E
        if CAUSAL:
            score = tl.where((at[None, :] <= position[:, None]) & (at < end)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        values = _rows(v + here * v_row + v_tile, at < end, column < D, MASKED)
        acc = _dot(weight.to(values.dtype), values, acc * shrink[:, None])
        top = higher
    return top, total, acc


@triton.jit
def _padding(first, b, keys):
    """first[b], within 0 … keys."""
    if first is None:
        return keys * 0
    else:
        return tl.minimum(tl.maximum(tl.load(first + b), 0), keys).to(tl.int32)


@triton.jit(do_not_specialize=["length", "keys"])
def prefill_kernel(
    q, k, v, bias, first, out, scale, length, keys, key_heads,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_key,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per tile of BLOCK_M queries of one head.

    Neighbours share keys: the heads of a group, then the tiles of a key head, those with most keys first.
    """
    tiles = tl.cdiv(length, BLOCK_M)
    index = tl.program_id(0)
    member, index = index % GROUP, index // GROUP
    tile, index = tiles - 1 - index % tiles, index // tiles
    b, key_head = (index // key_heads).to(tl.int64), (index % key_heads).to(tl.int64)
    head = key_head * GROUP + member

    query, column = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    real, inside = query < length, column < D
    q += b * q_batch + head * q_head
    q_tile = _rows(q + query[:, None].to(tl.int64) * q_row + column[None, :], real, inside, True)
    k += b * k_batch + key_head * k_head
    v += b * v_batch + key_head * v_head
    if bias is not None:
        bias += b * bias_batch

    position = keys - length + query
    lowest = keys - length + tile * BLOCK_M  # position of the tile's first query: it sees least
    begin, end = _padding(first, b, keys), tl.minimum(lowest + BLOCK_M, keys)
    whole = begin + tl.maximum(lowest + 1 - begin, 0) // BLOCK_N * BLOCK_N  # tiles up to here are seen by all queries
    state = (
        tl.full([BLOCK_M], LOWEST, tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
    )
    state = _sweep(
        state, q_tile, position, k, v, bias, k_row, v_row, bias_key, begin, whole, scale, D, BLOCK_N, CAUSAL=False
    )
    _, total, acc = _sweep(
        state, q_tile, position, k, v, bias, k_row, v_row, bias_key, whole, end, scale, D, BLOCK_N, CAUSAL=True
    )
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = (b * length + query) * (key_heads * GROUP) + head
    tl.store(
        out + at[:, None] * D + column[None, :], result.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :]
    )


@triton.jit(do_not_specialize=["length", "keys", "chunk", "chunks"])
def decode_kernel(
    q, k, v, bias, first, tops, totals, accs, scale, length, keys, chunk, chunks, key_heads,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_key,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per chunk of keys of one key head and BLOCK_M of its rows, row = head of the group × length + query.

    Writes the chunk's maximum and sum, fp32 [B, Hq, L, chunks], and unnormalised values, fp32 [B, Hq, L, chunks, D].
    """
    blocks = tl.cdiv(GROUP * length, BLOCK_M)
    index = tl.program_id(0)
    block, index = index % blocks, index // blocks
    part, index = index % chunks, index // chunks
    b, key_head = (index // key_heads).to(tl.int64), (index % key_heads).to(tl.int64)

    row, column = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    real, inside = row < GROUP * length, column < D
    member, query = (row // length).to(tl.int64), row % length
    q += b * q_batch + key_head * GROUP * q_head
    q_tile = _rows(
        q + member[:, None] * q_head + query[:, None].to(tl.int64) * q_row + column[None, :], real, inside, True
    )
    k += b * k_batch + key_head * k_head
    v += b * v_batch + key_head * v_head
    if bias is not None:
        bias += b * bias_batch

    begin = _padding(first, b, keys) + part * chunk
    end = tl.minimum(begin + chunk, keys)
    state = (
        tl.full([BLOCK_M], LOWEST, tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
    )
    top, total, acc = _sweep(
        state, q_tile, keys - length + query, k, v, bias, k_row, v_row, bias_key, begin, end, scale, D, BLOCK_N,
        CAUSAL=True,
    )  # fmt: skip
    at = ((b * key_heads + key_head) * GROUP * length + row) * chunks + part
    tl.store(tops + at, top, mask=real)
    tl.store(totals + at, total, mask=real)
    tl.store(accs + at[:, None] * D + column[None, :], acc, mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["length", "chunks"])
def combine_kernel(
    tops, totals, accs, out, length, chunks, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per query and head: out = Σ_c 2^(top_c - top) acc_c / Σ_c 2^(top_c - top) total_c."""
    row = tl.program_id(0).to(tl.int64)
    query, head, b = row % length, row // length % heads, row // length // heads
    lane, column = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    inside = column < D
    top = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, chunks, BLOCK_C):
        real, at = start + lane < chunks, row * chunks + start + lane
        tops_here = tl.load(tops + at, mask=real, other=LOWEST)
        totals_here = tl.load(totals + at, mask=real, other=0.0)
        accs_here = tl.load(accs + at[:, None] * D + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(tops_here, 0))
        weight, shrink = tl.exp2(tops_here - higher), tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight * totals_here, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * accs_here, 0)
        top = higher
    result = acc / tl.where(total == 0.0, 1.0, total)
    at = (b * length + query) * heads + head
    tl.store(out + at * D + column, result.to(out.dtype.element_ty), mask=inside)


def attend_triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: Tensor | None, scale: float) -> Tensor:
    """`attend` by kernels: split over keys where queries are few."""
    q, k, v = (states if states.stride(-1) == 1 else states.contiguous() for states in (q, k, v))
    first = None if first is None else first.contiguous()
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    if out.numel():
        with torch.cuda.device_of(q):
            launch = _decode if q.shape[2] <= DECODE_QUERIES else _prefill
            launch(q, k, v, bias, first, out, scale * LOG2E.value)
    return out


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: Tensor | None, out: Tensor, scale: float
) -> None:
    (batch, heads, length, dims), (key_heads, keys) = q.shape, k.shape[1:3]
    tiles = prefill_tiles(dims, q.dtype)
    grid = (triton.cdiv(length, tiles["BLOCK_M"]) * heads * batch,)
    strides = _strides(q, k, v, bias)
    group = heads // key_heads
    prefill_kernel[grid](
        q, k, v, bias, first, out, scale, length, keys, key_heads, *strides, GROUP=group, D=dims, **tiles
    )


def _decode(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: Tensor | None, out: Tensor, scale: float
) -> None:
    (batch, heads, length, dims), (key_heads, keys) = q.shape, k.shape[1:3]
    group = heads // key_heads
    tiles = decode_tiles(dims, q.dtype, group * length)
    chunk = CHUNK_KEYS * triton.cdiv(keys, CHUNK_KEYS * MAX_CHUNKS)
    chunks = triton.cdiv(keys, chunk)
    tops, totals = q.new_empty(2, batch, heads, length, chunks, dtype=torch.float32)
    accs = q.new_empty(batch, heads, length, chunks, dims, dtype=torch.float32)
    grid = (triton.cdiv(group * length, tiles["BLOCK_M"]) * chunks * key_heads * batch,)
    strides = _strides(q, k, v, bias)
    decode_kernel[grid](
        q, k, v, bias, first, tops, totals, accs, scale, length, keys, chunk, chunks, key_heads, *strides,
        GROUP=group, D=dims, **tiles,
    )  # fmt: skip
    combine_kernel[(batch * heads * length,)](
        tops, totals, accs, out, length, chunks, heads,
        D=dims, BLOCK_D=tiles["BLOCK_D"], BLOCK_C=CHUNKS_AT_ONCE, num_warps=4,
    )  # fmt: skip


def prefill_tiles(dims: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes, warps and stages of prefill_kernel."""
    rows = PREFILL_ROWS_FP32 if dtype == torch.float32 else PREFILL_ROWS
    return _tiles(dims, dtype, rows) | {"num_warps": 8, "num_stages": 3 if dims <= 128 else 2}


def decode_tiles(dims: int, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Tile sizes, warps and stages of decode_kernel for so many rows per key head."""
    rows = min(DECODE_ROWS, max(16, triton.next_power_of_2(rows)))
    return _tiles(dims, dtype, rows) | {"num_warps": 8 if dtype == torch.float32 else 4, "num_stages": 3}


def _tiles(dims: int, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Powers of two, at least 16: less a product of tiles does not take."""
    dims = max(16, triton.next_power_of_2(dims))
    held = KEYS_BYTES_FP32 if dtype == torch.float32 else KEYS_BYTES
    keys = max(16, min(64, held // (dims * dtype.itemsize)))
    return {"BLOCK_D": dims, "BLOCK_M": rows, "BLOCK_N": keys}


def _strides(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    of_bias = (0, 0) if bias is None else bias.stride()
    return (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *of_bias)
