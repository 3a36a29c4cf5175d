# mypy: allow-untyped-defs
# Triton would read annotations as argument types.
"""Triton kernels of `attend` and `attend_packed`: online softmax over key tiles; decode is also split over keys.

Scores are in base 2, s = (q · k) · (scale log2 e) + bias log2 e, so that the softmax can use exp2. Key tiles begin at
`first`, so padding is never loaded. The number of key chunks in decode depends on K only, so a row's result does not
depend on the rest of its batch.

The kernels take two forms of input. In a batch, `starts` are None, and every sequence has `most_q` queries and `most_k`
keys. In packed sequences, starts are the bounds, and most_q and most_k are upper bounds: programs beyond the end of a
sequence return at once. The batch stride of the first form is the token stride in the second. A packed sequence's own
sizes decide between prefill and decode, and the tiles, so its result does not depend on the rest of the launch.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightkv.ops.ragged import Keys, Sequences

LOG2E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite initial maximum: subtracting it gives no NaN

# Triton's interpreter multiplies the bit patterns of bf16 as integers. Products of 16-bit floats are exact in fp32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Sizes follow the compiler's reports for 64 to 256 dims: no register spills in prefill on Hopper, few elsewhere, and
# half of the shared memory. Products in fp32 use no tensor cores and keep their operands in registers.
KEYS_BYTES = 16 * 1024  # keys of one tile; its values take as much again
KEYS_BYTES_FP32 = 8 * 1024
PREFILL_ROWS = 128
PREFILL_ROWS_FP32 = 32
DECODE_QUERIES = 16  # up to this many queries, keys are split too: queries alone give too few programs
DECODE_ROWS = 64  # maximum rows of a tile, heads of a group × queries
CHUNK_KEYS = 256  # per program: reads 128 KiB of bf16 keys and values of 128 dims, writes 4 KiB of partial results
MAX_CHUNKS = 128  # longer caches get longer chunks, to keep combining cheap
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
    """Adds keys begin … end - 1 to state = (max, sum, acc); CAUSAL masks keys after a query's position.

    Without CAUSAL, end - begin must be a multiple of BLOCK_N.
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
def _sequence(starts, b, most):
    """(place, tokens) of sequence b, which begins at place × batch stride."""
    if starts is None:
        return b, most
    else:
        place = tl.load(starts + b)
        return place, (tl.load(starts + b + 1) - place).to(tl.int32)


@triton.jit
def _padding(first, b, keys):
    """first[b], clamped to 0 … keys."""
    if first is None:
        return keys * 0
    else:
        return tl.minimum(tl.maximum(tl.load(first + b), 0), keys).to(tl.int32)


@triton.jit
def _split(starts_k, b, place, keys, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """(keys per chunk, chunks, slot of the first chunk's partial results) of sequence b.

    A packed sequence has at most ⌊keys / CHUNK⌋ + 1 chunks, so those before b have at most ⌊place / CHUNK⌋ + b.
    """
    chunk = CHUNK * tl.maximum(tl.cdiv(keys, CHUNK * CHUNKS), 1)
    chunks = tl.cdiv(keys, chunk)
    return chunk, chunks, b * chunks if starts_k is None else place // CHUNK + b


@triton.jit(do_not_specialize=["most_q", "most_k"])
def prefill_kernel(
    q, k, v, bias, first, starts_q, starts_k, out, scale, most_q, most_k, key_heads,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_key, out_batch,
    GROUP: tl.constexpr, D: tl.constexpr, FEW: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per tile of BLOCK_M queries of one head; skips packed sequences of up to FEW queries.

    Neighbouring programs share keys: the heads of a group, then the tiles of a key head, those with most keys first.
    """
    tiles = tl.cdiv(most_q, BLOCK_M)
    index = tl.program_id(0)
    member, index = index % GROUP, index // GROUP
    tile, index = tiles - 1 - index % tiles, index // tiles
    b, key_head = (index // key_heads).to(tl.int64), (index % key_heads).to(tl.int64)
    head = key_head * GROUP + member
    place_q, length = _sequence(starts_q, b, most_q)
    if starts_q is not None and ((tile * BLOCK_M >= length) | (length <= FEW)):
        return
    place_k, keys = _sequence(starts_k, b, most_k)

    query, column = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    real, inside = query < length, column < D
    q += place_q * q_batch + head * q_head
    q_tile = _rows(q + query[:, None].to(tl.int64) * q_row + column[None, :], real, inside, True)
    k += place_k * k_batch + key_head * k_head
    v += place_k * v_batch + key_head * v_head
    if bias is not None:
        bias += place_k * bias_batch

    position = keys - length + query
    lowest = keys - length + tile * BLOCK_M  # position of the tile's first query, which sees the fewest keys
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
    out += place_q * out_batch + head * D
    at = query[:, None].to(tl.int64) * (key_heads * GROUP * D) + column[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["most_q", "most_k", "chunks", "slots"])
def decode_kernel(
    q, k, v, bias, first, starts_q, starts_k, tops, totals, accs, scale, most_q, most_k, chunks, slots, key_heads,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_key,
    GROUP: tl.constexpr, D: tl.constexpr, FEW: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per chunk of keys of one key head and BLOCK_M of its rows, row = head of the group × length + query.

    Writes the chunk's maximum and sum, fp32 [Hq, most_q, slots], and unnormalised values, fp32 [Hq, most_q, slots, D].
    Skips packed sequences of more than FEW queries.
    """
    blocks = tl.cdiv(GROUP * most_q, BLOCK_M)
    index = tl.program_id(0)
    block, index = index % blocks, index // blocks
    part, index = index % chunks, index // chunks
    b, key_head = (index // key_heads).to(tl.int64), (index % key_heads).to(tl.int64)
    place_q, length = _sequence(starts_q, b, most_q)
    place_k, keys = _sequence(starts_k, b, most_k)
    chunk, parts, slot = _split(starts_k, b, place_k, keys, CHUNK, CHUNKS)
    if starts_q is not None and ((block * BLOCK_M >= GROUP * length) | (length > FEW) | (part >= parts)):
        return

    row, column = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    real, inside = row < GROUP * length, column < D
    member, query = (row // length).to(tl.int64), row % length
    q += place_q * q_batch + key_head * GROUP * q_head
    q_tile = _rows(
        q + member[:, None] * q_head + query[:, None].to(tl.int64) * q_row + column[None, :], real, inside, True
    )
    k += place_k * k_batch + key_head * k_head
    v += place_k * v_batch + key_head * v_head
    if bias is not None:
        bias += place_k * bias_batch

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
    at = ((key_head * GROUP + member) * most_q + query) * slots + slot + part
    tl.store(tops + at, top, mask=real)
    tl.store(totals + at, total, mask=real)
    tl.store(accs + at[:, None] * D + column[None, :], acc, mask=real[:, None] & inside[None, :])


@triton.jit
def combined(
    tops, totals, accs, chunks, out, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """out = Σ_c 2^(top_c - top) acc_c / Σ_c 2^(top_c - top) total_c, for one query and head."""
    lane, column = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    inside = column < D
    top = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, chunks, BLOCK_C):
        real, at = start + lane < chunks, (start + lane).to(tl.int64)
        tops_here = tl.load(tops + at, mask=real, other=LOWEST)
        totals_here = tl.load(totals + at, mask=real, other=0.0)
        accs_here = tl.load(accs + at[:, None] * D + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(tops_here, 0))
        weight, shrink = tl.exp2(tops_here - higher), tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight * totals_here, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * accs_here, 0)
        top = higher
    result = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["most_q", "most_k", "slots"])
def combine_kernel(
    tops, totals, accs, starts_q, starts_k, out, most_q, most_k, slots, heads, out_batch,
    D: tl.constexpr, FEW: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Combines the chunks of decode_kernel; one program per query and head."""
    row = tl.program_id(0).to(tl.int64)
    query, head, b = row % most_q, row // most_q % heads, row // most_q // heads
    place_q, length = _sequence(starts_q, b, most_q)
    if starts_q is not None and ((query >= length) | (length > FEW)):
        return
    place_k, keys = _sequence(starts_k, b, most_k)
    _, chunks, slot = _split(starts_k, b, place_k, keys, CHUNK, CHUNKS)
    slot += (head * most_q + query) * slots
    out += place_q * out_batch + (query * heads + head) * D
    combined(tops + slot, totals + slot, accs + slot * D, chunks, out, D, BLOCK_D, BLOCK_C)


def attend_triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: Tensor | None, scale: float) -> Tensor:
    """Runs `attend` on the kernels; for few queries, keys are split too."""
    (batch, heads, length, dims), keys = q.shape, k.shape[2]
    q, k, v = (states if states.stride(-1) == 1 else states.contiguous() for states in (q, k, v))
    first = None if first is None else first.contiguous()
    out = q.new_empty(batch, length, heads, dims)
    if out.numel():
        work = _Work(q, k, v, bias, first, None, None, out, scale * LOG2E.value, batch)
        if length > DECODE_QUERIES:
            work.prefill(length, keys)
        else:
            chunks = triton.cdiv(keys, CHUNK_KEYS * triton.cdiv(keys, CHUNK_KEYS * MAX_CHUNKS))
            rows = heads // k.shape[1] * length
            work.decode(length, keys, chunks, batch * chunks, decode_tiles(dims, q.dtype, rows))
    return out


def attend_packed_triton(q: Tensor, keys: Keys, q_sequences: Sequences, k_sequences: Sequences, scale: float) -> Tensor:
    """Runs `attend_packed` on the same kernels: each of the two launches skips the sequences of the other."""
    starts_q, starts_k = q_sequences.starts.contiguous(), k_sequences.starts.contiguous()
    most_q, most_k = q_sequences.longest, k_sequences.longest
    sequences, group, dims = len(starts_q) - 1, q.shape[1] // keys.k.shape[1], q.shape[2]
    out = q.new_empty(q.shape)
    if out.numel():
        q, k, v = (states if states.stride(-1) == 1 else states.contiguous() for states in (q, keys.k, keys.v))
        work = _Work(q, k, v, keys.bias, None, starts_q, starts_k, out, scale * LOG2E.value, sequences)
        if most_q > DECODE_QUERIES:
            work.prefill(most_q, most_k)
        if len(q) - (sequences - 1) * most_q <= DECODE_QUERIES:  # fewest queries of a sequence
            chunks = min(MAX_CHUNKS, triton.cdiv(most_k, CHUNK_KEYS))
            slots = len(k) // CHUNK_KEYS + sequences
            tiles = decode_tiles(dims, q.dtype, group)  # by group alone: tiles decide how sums are rounded
            work.decode(min(most_q, DECODE_QUERIES), most_k, chunks, slots, tiles)
    return out


@dataclass(frozen=True)
class _Work:
    """Launches the kernels on tensors [B, heads, tokens, d], or on packed ones [tokens, heads, d] with starts."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    first: Tensor | None
    starts_q: Tensor | None
    starts_k: Tensor | None
    out: Tensor
    scale: float
    sequences: int

    def prefill(self, most_q: int, most_k: int) -> None:
        heads, key_heads, dims = self.q.shape[1], self.k.shape[1], self.q.shape[-1]
        tiles = prefill_tiles(dims, self.q.dtype)
        grid = (triton.cdiv(most_q, tiles["BLOCK_M"]) * heads * self.sequences,)
        with torch.cuda.device_of(self.q):
            prefill_kernel[grid](
                *self._inputs, self.out, self.scale, most_q, most_k, key_heads, *self._strides, self.out.stride(0),
                GROUP=heads // key_heads, D=dims, FEW=DECODE_QUERIES, **tiles,
            )  # fmt: skip

    def decode(self, most_q: int, most_k: int, chunks: int, slots: int, tiles: dict[str, int]) -> None:
        """`chunks` is the maximum per sequence, `slots` the room for the chunks of all sequences."""
        heads, key_heads, dims = self.q.shape[1], self.k.shape[1], self.q.shape[-1]
        group = heads // key_heads
        tops, totals = self.q.new_empty(2, heads, most_q, slots, dtype=torch.float32)
        accs = self.q.new_empty(heads, most_q, slots, dims, dtype=torch.float32)
        grid = (triton.cdiv(group * most_q, tiles["BLOCK_M"]) * chunks * key_heads * self.sequences,)
        sizes = {"D": dims, "FEW": DECODE_QUERIES, "CHUNK": CHUNK_KEYS, "CHUNKS": MAX_CHUNKS}
        with torch.cuda.device_of(self.q):
            decode_kernel[grid](
                *self._inputs, tops, totals, accs, self.scale, most_q, most_k, chunks, slots, key_heads,
                *self._strides, GROUP=group, **sizes, **tiles,
            )  # fmt: skip
            combine_kernel[(self.sequences * heads * most_q,)](
                tops, totals, accs, self.starts_q, self.starts_k, self.out, most_q, most_k, slots, heads,
                self.out.stride(0), **sizes, BLOCK_D=tiles["BLOCK_D"], BLOCK_C=CHUNKS_AT_ONCE, num_warps=4,
            )  # fmt: skip

    @property
    def _inputs(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.bias, self.first, self.starts_q, self.starts_k

    @property
    def _strides(self) -> tuple[int, ...]:
        """Batch, head and token strides of q, k and v, then of bias (batch, token). Packed: batch means token."""
        of_states = [x.stride(axis) for x in (self.q, self.k, self.v) for axis in (0, 1, 0 if x.ndim == 3 else 2)]
        of_bias = (0, 0) if self.bias is None else (self.bias.stride(0), self.bias.stride(-1))
        return *of_states, *of_bias


def prefill_tiles(dims: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes, warps and stages of prefill_kernel."""
    rows = PREFILL_ROWS_FP32 if dtype == torch.float32 else PREFILL_ROWS
    return _tiles(dims, dtype, rows) | {"num_warps": 8, "num_stages": 3 if dims <= 128 else 2}


def decode_tiles(dims: int, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Tile sizes, warps and stages of decode_kernel for `rows` rows per key head."""
    rows = min(DECODE_ROWS, max(16, triton.next_power_of_2(rows)))
    return _tiles(dims, dtype, rows) | {"num_warps": 8 if dtype == torch.float32 else 4, "num_stages": 3}


def _tiles(dims: int, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Block sizes: powers of two, at least 16 as tl.dot requires."""
    dims = max(16, triton.next_power_of_2(dims))
    held = KEYS_BYTES_FP32 if dtype == torch.float32 else KEYS_BYTES
    keys = max(16, min(64, held // (dims * dtype.itemsize)))
    return {"BLOCK_D": dims, "BLOCK_M": rows, "BLOCK_N": keys}
