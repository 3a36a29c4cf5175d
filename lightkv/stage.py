"""One compression stage on one sequence: windows, matching and merging put together."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.layout import VisionLayout
from lightkv.matching import Windows, match
from lightkv.merging import merge


@dataclass(frozen=True)
class Compressed:
    """What a stage leaves of a sequence of S tokens.

    hidden [S', D]  the survivors in their original order
    kept   [S']     original index of each survivor, ascending
    target [S]      original index of the token each position ended up in (itself if it survived)
    """

    hidden: Tensor
    kept: Tensor
    target: Tensor


def compress_tokens(
    hidden: Tensor,
    guidance: Tensor,
    layout: VisionLayout,
    *,
    windows: int,
    drop: float,
    frames: int | None = 1,
) -> Compressed:
    """Merge floor(drop · m) of the m vision tokens in each of `windows` × `windows` windows per frame.

    One matching removes at most half of a window; a drop above 0.5 is met by matching again what is left, each
    token then weighing what has merged into it. `frames` consecutive frames share a window (None: the whole video).

    hidden [S, D], guidance fp32 [S] of weights ≥ 0 (only vision entries count), layout of the same S positions.
    Raises ConfigError when shapes disagree or windows < 1 or drop is outside [0, 1).
    """
    length = len(layout)
    if hidden.shape[:1] != (length,) or guidance.shape != (length,):
        raise ConfigError(
            f"hidden {list(hidden.shape)} and guidance {list(guidance.shape)} must cover the layout's {length} tokens"
        )
    check_stage(windows, drop)
    layout = layout.to(hidden.device)
    target = torch.arange(length, device=hidden.device)
    removed = torch.zeros(length, dtype=torch.bool, device=hidden.device)
    cut = Windows.cut(layout, windows, frames)
    quota = removals(cut.sizes, drop)
    weight = guidance.float()
    for _ in range(_rounds(drop)):
        source, into = match(hidden, cut, quota)
        hidden, weight = merge(hidden, weight, source, into)
        target = target.index_copy(0, source, into)[target]
        removed = removed.index_fill(0, source, True)
        quota = quota - torch.minimum(quota, cut.sizes // 2)
        cut = cut.without(removed)
    kept = torch.nonzero(~removed).flatten()
    return Compressed(hidden[kept], kept, target)


def check_stage(windows: int, drop: float) -> None:
    """Raises ConfigError unless windows ≥ 1 and 0 ≤ drop < 1."""
    if windows < 1:
        raise ConfigError(f"windows per side must be at least 1, got {windows}")
    if not 0.0 <= drop < 1.0:
        raise ConfigError(f"drop must be at least 0 and below 1, got {drop}")


def removals(sizes: Tensor, drop: float) -> Tensor:
    """floor(drop · m) per window, int64; 0.29 · 100 counts as 29 although its product in binary is below."""
    return (sizes.double() * drop + 1e-9).floor().long()


def _rounds(drop: float) -> int:
    """Matchings a stage needs: k of them leave ceil(m / 2^k) of a window, whatever its size m."""
    return math.ceil(-math.log2(1.0 - drop) - 1e-9)
