# mypy: allow-untyped-defs
# Triton would read annotations as argument types.
"""Triton kernel of `compact`. Pairs are sorted by target; each program adds one survivor's run of pairs in one tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightkv.ops.merge_kernel import BLOCK_D, mean_of_run


@triton.jit(do_not_specialize=["stride_c", "count", "survivors"])
def compact_kernel(
    hidden,
    weight,
    columns,
    source,
    kept,
    stop,
    rows,
    weights,
    places,
    stride_s,
    stride_d,
    stride_w,
    stride_c,
    stride_p,
    width,
    count,
    survivors,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per survivor and tile of features; the first tile's program also writes weight and columns."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(kept + place)
    first, last = tl.load(stop + place - 1, mask=place > 0, other=0), tl.load(stop + place)
    own = tl.load(weight + row * stride_w)
    total = own
    for at in range(first, last):
        total += tl.load(weight + tl.load(source + at) * stride_w)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    base = hidden + column * stride_d
    value = tl.load(base + row * stride_s, mask=inside, other=0.0)
    if first < last:  # without a merge the row keeps its bits
        mean = mean_of_run(value, inside, own, total, base, weight, source, first, last, stride_s, stride_w)
        value = mean.to(hidden.dtype.element_ty)
    tl.store(rows + place * width + column, value, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(weights + place, total)
        which = tl.arange(0, BLOCK_C).to(tl.int64)
        there = which < count
        tl.store(
            places + which * survivors + place,
            tl.load(columns + which * stride_c + row * stride_p, mask=there, other=0),
            mask=there,
        )


def compact_triton(
    hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor, kept: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernel. Every tile of a survivor adds the weights of its run again, because runs are short."""
    (survivors,), width, count = kept.shape, hidden.shape[1], len(columns)
    rows, weights, places = (
        hidden.new_empty(survivors, width),
        weight.new_empty(survivors),
        columns.new_empty(count, survivors),
    )
    if not survivors:
        return rows, weights, places
    target, by_target = torch.sort(target, stable=True)
    kept = kept.contiguous()
    stop = torch.searchsorted(target, kept, right=True)  # all targets are kept: runs follow one another
    strides = (hidden.stride(0), hidden.stride(1), weight.stride(0), columns.stride(0), columns.stride(1))
    tiles = max(1, triton.cdiv(width, BLOCK_D))
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        compact_kernel[(survivors, tiles)](
            hidden,
            weight,
            columns,
            source[by_target],
            kept,
            stop,
            rows,
            weights,
            places,
            *strides,
            width,
            count,
            survivors,
            BLOCK_D=BLOCK_D,
            BLOCK_C=triton.next_power_of_2(max(1, count)),
            num_warps=2,
        )
    return rows, weights, places
