# mypy: allow-untyped-defs
# Triton would read annotations as argument types.
"""Triton kernel of `nearest`: one program per tile of a group's A, over all of the group's B."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightkv.ops.ragged import Groups

# Triton's interpreter multiplies the bit patterns of bf16 as integers. Products of 16-bit floats are exact in fp32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["tiles"])
def nearest_kernel(
    hidden,
    scale,
    place,  # None: λ is 0
    order,
    starts,
    middles,
    closest,
    apart,
    stride_s,
    stride_d,
    width,
    tiles,
    distance,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes closest and apart for the tokens of A in one tile; other slots are not written."""
    group = (tl.program_id(0) // tiles).to(tl.int64)
    first, middle, last = tl.load(starts + group), tl.load(middles + group), tl.load(starts + group + 1)
    first += (tl.program_id(0) % tiles) * BLOCK_A
    if first >= middle or middle >= last:
        return
    slot_a = first + tl.arange(0, BLOCK_A)
    in_a = slot_a < middle
    token_a = tl.load(order + slot_a, mask=in_a, other=0)
    scale_a = tl.load(scale + token_a, mask=in_a, other=0.0)
    row_a = hidden + token_a * stride_s
    least = tl.full([BLOCK_A], float("inf"), tl.float32)
    which = tl.full([BLOCK_A], -1, tl.int64)
    for start in range(0, (last - middle).to(tl.int32), BLOCK_B):
        slot_b = middle + start + tl.arange(0, BLOCK_B)
        in_b = slot_b < last
        token_b = tl.load(order + slot_b, mask=in_b, other=0)
        scale_b = tl.load(scale + token_b, mask=in_b, other=0.0)
        row_b = hidden + token_b * stride_s
        dot, square_a, square_b = _products(row_a, in_a, row_b, in_b, stride_d, width, BLOCK_A, BLOCK_B, BLOCK_D)
        half_a, half_b = square_a * scale_a * scale_a / 2, square_b * scale_b * scale_b / 2
        differ = half_a[:, None] + half_b[None, :] - dot * scale_a[:, None] * scale_b[None, :]
        differ = tl.where(differ < 0, 0.0, differ)  # tl.maximum would drop NaN
        if place is not None:
            differ += distance * _far(place, token_a, in_a, token_b, in_b)
        differ = tl.where(in_b[None, :] & (differ < float("inf")), differ, float("inf"))
        near, at = tl.min(differ, axis=1, return_indices=True)
        better = near < least  # strict, so that ties keep the earlier b
        which = tl.where(better, middle + start + at, which)
        least = tl.where(better, near, least)
    tl.store(closest + slot_a, tl.load(order + which, mask=in_a & (which >= 0), other=-1), mask=in_a)
    tl.store(apart + slot_a, least, mask=in_a)


@triton.jit
def _products(
    row_a,
    in_a,
    row_b,
    in_b,
    stride_d,
    width,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """⟨x_a, x_b⟩ [BLOCK_A, BLOCK_B], ‖x_a‖² [BLOCK_A] and ‖x_b‖² [BLOCK_B], fp32, in one pass over the rows."""
    dot = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    square_a, square_b = tl.zeros([BLOCK_A], tl.float32), tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside, step = (column < width)[None, :], column.to(tl.int64)[None, :] * stride_d
        a = tl.load(row_a[:, None] + step, mask=in_a[:, None] & inside, other=0.0)
        b = tl.load(row_b[:, None] + step, mask=in_b[:, None] & inside, other=0.0)
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        if INTERPRETED:
            a, b = wide_a, wide_b
        dot = tl.dot(a, tl.trans(b), dot, input_precision="ieee")
        square_a += tl.sum(wide_a * wide_a, axis=1)
        square_b += tl.sum(wide_b * wide_b, axis=1)
    return dot, square_a, square_b


@triton.jit
def _far(place, token_a, in_a, token_b, in_b):
    """‖p_a − p_b‖₂ [BLOCK_A, BLOCK_B]."""
    squares = 0.0
    for axis in tl.static_range(3):
        a = tl.load(place + token_a * 3 + axis, mask=in_a, other=0.0)
        b = tl.load(place + token_b * 3 + axis, mask=in_b, other=0.0)
        step = a[:, None] - b[None, :]
        squares += step * step
    return tl.sqrt_rn(squares)


def blocks(most: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options for sets A of up to `most` tokens."""
    if most <= 16:  # minimum for tl.dot; wide chunks keep more loads in flight for small windows
        return {"BLOCK_A": 16, "BLOCK_B": 16, "BLOCK_D": 128, "num_warps": 2, "num_stages": 3}
    if dtype == torch.float32:  # exact fp32 products use no tensor cores and hold both tiles in registers
        return {"BLOCK_A": 32, "BLOCK_B": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3}
    # One Hopper matrix instruction takes 64 rows; taller tiles would be too few for its processors at 16,000 tokens.
    # Squares need the rows in registers in addition to the sums: 64 × 128 in four warps does not fit.
    wide = most > 64
    return {
        "BLOCK_A": 64,
        "BLOCK_B": 128 if wide else 64,
        "BLOCK_D": 64,
        "num_warps": 8 if wide else 4,
        "num_stages": 4,
    }


def nearest_triton(
    hidden: Tensor, scale: Tensor, place: Tensor | None, groups: Groups, distance: float
) -> tuple[Tensor, Tensor]:
    """Launches one program per group and BLOCK_A slots of its set A; programs beyond the set return at once."""
    order, starts, middles = groups.order, groups.starts, groups.middles
    closest = torch.full_like(order, -1, memory_format=torch.contiguous_format)
    apart = torch.full(order.shape, torch.inf, dtype=torch.float32, device=order.device)
    options = blocks(groups.largest, hidden.dtype)
    tiles = triton.cdiv(groups.largest, options["BLOCK_A"])
    if not tiles * len(middles):
        return closest, apart
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        nearest_kernel[(tiles * len(middles),)](
            hidden,
            scale.contiguous(),
            place.contiguous() if distance and place is not None else None,
            order.contiguous(),
            starts.contiguous(),
            middles.contiguous(),
            closest,
            apart,
            hidden.stride(0),
            hidden.stride(1),
            hidden.shape[1],
            tiles,
            float(distance),
            **options,
        )
    return closest, apart
