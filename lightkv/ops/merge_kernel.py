# mypy: allow-untyped-defs
# Triton would read annotations as argument types.
"""Triton kernels of `merge`. Pairs are sorted by target; the program of a run's first pair computes the whole run.

A source is never a target. Therefore a launch reads no row that it writes, except each receiver in its own program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_R = 128  # pairs per program of weigh_kernel, one per lane
BLOCK_D = 512  # columns per program of mean_kernel: 16 bytes of bf16 per thread with two warps


@triton.jit(do_not_specialize=["pairs"])
def weigh_kernel(weight, source, target, stop, stride, pairs, BLOCK_R: tl.constexpr):
    """weight[b] ← w_b + Σ w_a, one lane per run."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = pair < pairs
    receiver = tl.load(target + pair, mask=inside, other=-1)
    before = tl.load(target + pair - 1, mask=inside & (pair > 0), other=-1)
    leads = inside & (receiver != before)
    length = tl.load(stop + pair, mask=leads, other=0) - pair
    total = tl.load(weight + receiver * stride, mask=leads, other=0.0)
    for k in range(0, tl.max(tl.where(leads, length, 0), axis=0)):
        more = leads & (k < length)
        sender = tl.load(source + pair + k, mask=more, other=0)
        total += tl.load(weight + sender * stride, mask=more, other=0.0)
    tl.store(weight + receiver * stride, total, mask=leads)


@triton.jit
def mean_of_run(value, inside, own, total, base, weight, source, first, last, stride_s, stride_w):
    """(w_b x_b + Σ w_a x_a) / w in fp32: x_b is `value`, w_b `own`, w `total`; the run is pairs first … last - 1.

    `base` points to the tile's columns in row 0.
    """
    silent = total == 0
    share = tl.where(silent, (last - first + 1).to(tl.float32), total)
    mean = value.to(tl.float32) * (tl.where(silent, 1.0, own) / share)
    for at in range(first, last):
        sender = tl.load(source + at)
        factor = tl.where(silent, 1.0, tl.load(weight + sender * stride_w)) / share
        mean += tl.load(base + sender * stride_s, mask=inside, other=0.0).to(tl.float32) * factor
    return mean


@triton.jit
def mean_kernel(
    hidden,
    weight,
    own,
    source,
    target,
    stop,
    stride_s,
    stride_d,
    stride_w,
    width,
    BLOCK_D: tl.constexpr,
):
    """x_b ← (w_b x_b + Σ w_a x_a) / w for a tile of columns; `own` holds w_b, `weight` already w = w_b + Σ w_a."""
    pair = tl.program_id(0).to(tl.int64)
    receiver = tl.load(target + pair)
    before = tl.load(target + pair - 1, mask=pair > 0, other=-1)
    if receiver == before:
        return
    last = tl.load(stop + pair)
    total = tl.load(weight + receiver * stride_w)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    base = hidden + column * stride_d
    value = tl.load(base + receiver * stride_s, mask=inside, other=0.0)
    mean = mean_of_run(value, inside, tl.load(own + pair), total, base, weight, source, pair, last, stride_s, stride_w)
    tl.store(base + receiver * stride_s, mean.to(hidden.dtype.element_ty), mask=inside)


def merge_triton(hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor) -> None:
    """Launches the kernels: weights first, so that the tiles of a row need not each add them."""
    if not len(source):
        return
    target, by_target = torch.sort(target, stable=True)
    source, stop, own = source[by_target], torch.searchsorted(target, target, right=True), weight[target]
    strides, width = (hidden.stride(0), hidden.stride(1), weight.stride(0)), hidden.shape[1]
    programs, tiles = triton.cdiv(len(source), BLOCK_R), triton.cdiv(width, BLOCK_D)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        weigh_kernel[(programs,)](
            weight, source, target, stop, weight.stride(0), len(source), BLOCK_R=BLOCK_R, num_warps=4
        )
        mean_kernel[(len(source), tiles)](
            hidden, weight, own, source, target, stop, *strides, width, BLOCK_D=BLOCK_D, num_warps=2
        )
