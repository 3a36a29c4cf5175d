# mypy: allow-untyped-defs
# Triton would read annotations as argument types.
"""Triton kernels of `attend_quantised`: process chunks of the tail and of the packed keys, then combine them.

The codes are read in packed form. Each half of a head has its own operands and accumulators: a byte of 4-bit codes
holds a channel of each half, so no value moves between registers. Tile, group and chunk sizes are multiples of one
another and tiles begin at a sequence's start. So a tile of packed keys has one scale per channel, and no row is masked.
Keys and values are dequantised to q's dtype, as in an unquantised cache. Parts of the tail come before parts of packed
keys, so a row's result does not depend on the lengths of other rows in its batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightkv.ops import codes as packed_codes
from lightkv.ops.attend_kernel import (
    CHUNKS_AT_ONCE,
    DECODE_ROWS,
    KEYS_BYTES,
    KEYS_BYTES_FP32,
    LOG2E,
    LOWEST,
    MAX_CHUNKS,
    _dot,
    combined,
)
from lightkv.ops.codes import Quantised
from lightkv.ops.ragged import Keys, Sequences

ABSENT = tl.constexpr(packed_codes.ABSENT)
CHUNK_KEYS = 256  # per program, a multiple of any tile


@triton.jit
def _columns(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=inside[None, :], other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _codes(codes, row, column, D: tl.constexpr, BITS: tl.constexpr):
    """Codes of the tokens `row` (int64 [N]), [N, BLOCK_H] for each half of the head, padded with 0."""
    HALF: tl.constexpr = (D + 1) // 2
    MASKED: tl.constexpr = 2 * column.shape[0] != D
    at = codes + row[:, None] * (D * BITS // 8) + column[None, :]
    low = _columns(at, column < HALF, MASKED)
    if BITS == 4:
        return low & 15, low >> 4
    else:
        return low, _columns(at + HALF, column < D - HALF, MASKED)


@triton.jit
def _spread(codes, scale, zero, at, inside, MASKED: tl.constexpr, dtype: tl.constexpr):
    """codes · scale[at] + zero[at] for one half, padded with 0."""
    factor = _columns(scale + at, inside, MASKED).to(tl.float32)
    offset = _columns(zero + at, inside, MASKED).to(tl.float32)
    return (codes.to(tl.float32) * factor + offset).to(dtype)


@triton.jit
def _keys(
    codes, scale, zero, row, group, column, dtype: tl.constexpr,
    D: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The halves of the keys `row`, all of one group."""
    HALF: tl.constexpr = (D + 1) // 2
    MASKED: tl.constexpr = 2 * column.shape[0] != D
    low, high = _codes(codes, row, column, D, BITS)
    at = group * D + column[None, :]
    k_low = _spread(low, scale, zero, at, column < HALF, MASKED, dtype)
    k_high = _spread(high, scale, zero, at + HALF, column < D - HALF, MASKED, dtype)
    return k_low, k_high


@triton.jit
def _values(
    codes, scale, zero, row, column, dtype: tl.constexpr,
    D: tl.constexpr, BITS: tl.constexpr, VALUE_GROUP: tl.constexpr,
):  # fmt: skip
    """The halves of the values `row`, in groups of VALUE_GROUP channels."""
    HALF: tl.constexpr = (D + 1) // 2
    MASKED: tl.constexpr = 2 * column.shape[0] != D
    low, high = _codes(codes, row, column, D, BITS)
    at = row[:, None] * (D // VALUE_GROUP)
    v_low = _spread(low, scale, zero, at + column[None, :] // VALUE_GROUP, column < HALF, MASKED, dtype)
    v_high = _spread(high, scale, zero, at + (column[None, :] + HALF) // VALUE_GROUP, column < D - HALF, MASKED, dtype)
    return v_low, v_high


@triton.jit
def _hear(state, q, k, v, bias, scale):
    """Adds a tile to state = (max, sum, acc of the low half, of the high half); q, k, v are pairs of halves."""
    top, total, low, high = state
    score = _dot(q[0], tl.trans(k[0]), None)
    score = _dot(q[1], tl.trans(k[1]), score) * scale
    if bias is not None:
        score = tl.where((bias > ABSENT)[None, :], score + bias[None, :] * LOG2E, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weight, 1)
    weight = weight.to(v[0].dtype)
    low = _dot(weight, v[0], low * shrink[:, None])
    high = _dot(weight, v[1], high * shrink[:, None])
    return higher, total, low, high


@triton.jit
def _sweep_packed(
    state, q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, bias, first, count, scale,
    D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds `count` tokens from row `first` on (int64, over the rows of all heads); bias points to the first token's."""
    dtype: tl.constexpr = q[0].dtype
    key, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    for start in tl.range(0, count, BLOCK_N):
        row = first + start + key
        keys = _keys(k_codes, k_scale, k_zero, row, (first + start) // GROUP, column, dtype, D, BITS)
        values = _values(v_codes, v_scale, v_zero, row, column, dtype, D, BITS, VALUE_GROUP)
        biases = None if bias is None else tl.load(bias + start + key)
        state = _hear(state, q, keys, values, biases, scale)
    return state


@triton.jit
def _halves(pointers, column, real, D: tl.constexpr):
    """Both halves of rows of D elements; 0 in padding and in rows that are not real."""
    HALF: tl.constexpr = (D + 1) // 2
    low = tl.load(pointers + column[None, :], mask=real[:, None] & (column < HALF)[None, :], other=0.0)
    high = tl.load(pointers + HALF + column[None, :], mask=real[:, None] & (column < D - HALF)[None, :], other=0.0)
    return low, high


@triton.jit
def _sweep_tail(
    state, q, k, v, bias, k_row, v_row, begin, end, tail, scale,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds tokens begin … end - 1 of the tail; end is `tail` or a multiple of BLOCK_N after begin."""
    column = tl.arange(0, BLOCK_H)
    for start in tl.range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        if bias is None:
            biases = tl.where(at < tail, 0.0, float("-inf"))
        else:
            biases = tl.load(bias + at, mask=at < tail, other=float("-inf"))
        place, real = at[:, None].to(tl.int64), biases > ABSENT
        keys = _halves(k + place * k_row, column, real, D)
        values = _halves(v + place * v_row, column, real, D)
        state = _hear(state, q, keys, values, biases, scale)
    return state


@triton.jit(do_not_specialize=["tokens", "tail", "chunk", "parts", "tail_parts"])
def quantised_kernel(
    q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, starts, bias, tail_k, tail_v, tail_bias, tops, totals, accs,
    scale, tokens, tail, chunk, parts, tail_parts, key_heads,
    q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row,
    ROWS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per chunk of tail or packed keys of one key head and BLOCK_M of its ROWS query heads.

    Writes the chunk's maximum and sum, fp32 [B, Hq, parts], and unnormalised values, fp32 [B, Hq, parts, D].
    """
    blocks: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    index = tl.program_id(0)
    block, index = index % blocks, index // blocks
    part, index = index % parts, index // parts
    b, key_head = (index // key_heads).to(tl.int64), (index % key_heads).to(tl.int64)

    row, column = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    real = row < ROWS
    head = key_head * ROWS + row
    queries = _halves(q + b * q_batch + head[:, None] * q_head, column, real, D)
    state = (
        tl.full([BLOCK_M], LOWEST, tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_H], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_H], tl.float32),
    )

    begin = part * chunk  # ≥ tail in parts of packed keys
    end = tl.minimum(begin + chunk, tail)
    tail_k += b * k_batch + key_head * k_head
    tail_v += b * v_batch + key_head * v_head
    if tail_bias is not None:
        tail_bias += b * tail
    state = _sweep_tail(
        state, queries, tail_k, tail_v, tail_bias, k_row, v_row, begin, end, tail, scale, D, BLOCK_H, BLOCK_N
    )

    first = tl.load(starts + b) + (part - tail_parts) * chunk
    count = tl.minimum(tl.load(starts + b + 1) - first, chunk).to(tl.int32)
    count = tl.where(part < tail_parts, 0, count)
    if bias is not None:
        bias += first
    top, total, low, high = _sweep_packed(
        state, queries, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, bias,
        key_head * tokens + first, count, scale, D, BITS, GROUP, VALUE_GROUP, BLOCK_H, BLOCK_N,
    )  # fmt: skip

    HALF: tl.constexpr = (D + 1) // 2
    at = (b * key_heads * ROWS + head) * parts + part
    tl.store(tops + at, top, mask=real)
    tl.store(totals + at, total, mask=real)
    accs += at[:, None] * D + column[None, :]
    tl.store(accs, low, mask=real[:, None] & (column < HALF)[None, :])
    tl.store(accs + HALF, high, mask=real[:, None] & (column < D - HALF)[None, :])


@triton.jit(do_not_specialize=["parts"])
def combine_parts_kernel(
    tops, totals, accs, out, parts, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Combines the chunks of quantised_kernel; one program per row and head."""
    row = tl.program_id(0).to(tl.int64)
    at = row * parts
    combined(tops + at, totals + at, accs + at * D, parts, out + row * D, D, BLOCK_D, BLOCK_C)


def attend_quantised_triton(
    q: Tensor, packed: Quantised, sequences: Sequences, bias: Tensor | None, tail: Keys, scale: float
) -> Tensor:
    """Runs `attend_quantised` on the kernels. Tokens of a sequence beyond `longest` are ignored."""
    q, tail_k, tail_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, tail.k, tail.v))
    bias, tail_bias = (x if x is None else x.contiguous() for x in (bias, tail.bias))
    (batch, heads, dims), (key_heads, tail_length) = q.shape, tail_k.shape[1:3]
    out = q.new_empty(q.shape)
    if not out.numel():
        return out
    most = min(sequences.longest, len(packed))
    tiles = quantised_tiles(dims, q.dtype, heads // key_heads, packed.group)
    chunk = CHUNK_KEYS * max(1, triton.cdiv(max(most, tail_length), CHUNK_KEYS * MAX_CHUNKS))
    tail_parts = triton.cdiv(tail_length, chunk)
    parts = max(1, tail_parts + triton.cdiv(most, chunk))
    tops, totals = q.new_empty(2, batch, heads, parts, dtype=torch.float32)
    accs = q.new_empty(batch, heads, parts, dims, dtype=torch.float32)
    states = (x.contiguous() for x in packed.tensors.values())
    with torch.cuda.device_of(q):
        quantised_kernel[(triton.cdiv(heads // key_heads, tiles["BLOCK_M"]) * parts * key_heads * batch,)](
            q, *states, sequences.starts.contiguous(), bias, tail_k, tail_v, tail_bias, tops, totals, accs,
            scale * LOG2E.value, len(packed), tail_length, chunk, parts, tail_parts, key_heads,
            *q.stride()[:2], *tail_k.stride()[:3], *tail_v.stride()[:3],
            ROWS=heads // key_heads, D=dims, BITS=packed.bits, GROUP=packed.group, VALUE_GROUP=packed.value_group,
            **tiles,
        )  # fmt: skip
        combine_parts_kernel[(batch * heads,)](
            tops, totals, accs, out, parts,
            D=dims, BLOCK_D=2 * tiles["BLOCK_H"], BLOCK_C=CHUNKS_AT_ONCE, num_warps=4,
        )  # fmt: skip
    return out


def quantised_tiles(dims: int, dtype: torch.dtype, rows: int, group: int) -> dict[str, int]:
    """Tile sizes, warps and stages of quantised_kernel for `rows` query heads per key head and `group` tokens."""
    half = max(16, triton.next_power_of_2(triton.cdiv(dims, 2)))
    held = KEYS_BYTES_FP32 if dtype == torch.float32 else KEYS_BYTES
    keys = max(16, min(64, group, held // (2 * half * dtype.itemsize)))
    rows = min(DECODE_ROWS, max(16, triton.next_power_of_2(rows)))
    warps = 8 if dtype == torch.float32 else 4
    return {"BLOCK_H": half, "BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": 3}
