"""One compression stage on one sequence: windows, matching and merging put together."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.layout import VisionLayout
from lightkv.matching import Windows, match
from lightkv.merging import merge

Budget = Literal["window", "item"]


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
    budget: Budget = "window",
) -> Compressed:
    """Merge floor(drop · m) of the m vision tokens in each of `windows` × `windows` windows per frame.

    One matching removes at most half of a window; what is beyond that is met by matching again what is left, each
    token then weighing what has merged into it. `frames` consecutive frames share a window (None: the whole video).
    With budget="item" it is floor(drop · M) of an item's M tokens, spread over its windows (`spread_removals`).

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
    quota = removals(cut.sizes, drop) if budget == "window" else spread_removals(cut, drop)
    weight = guidance.float()
    while bool(quota.any()):
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
    """floor(drop · m) per window, int64; 0.29 · 100 counts as 29 although its product in binary is below.

    At most m - 1: a drop just below 1 must not ask for the last token, which no matching can remove.
    """
    return torch.minimum((sizes.double() * drop + 1e-9).floor().long(), (sizes - 1).clamp(min=0))


def spread_removals(windows: Windows, drop: float) -> Tensor:
    """floor(drop · M) removals per item, spread over its windows like the tokens these can give, m - 1 each; int64.

    Rounding down in each window instead would miss the budget where windows are small: a quarter of 2 tokens is 0.
    """
    count = int(windows.item.max()) + 1 if len(windows.item) else 0
    spare = windows.sizes - 1
    tokens, room = (spare.new_zeros(count).index_add(0, windows.item, part) for part in (windows.sizes, spare))
    wanted = torch.minimum(removals(tokens, drop), room)
    until = spare.cumsum(0) - (room.cumsum(0) - room)[windows.item]  # spare tokens of the item up to this window
    share, room = wanted[windows.item], room[windows.item].clamp(min=1)
    return share * until // room - share * (until - spare) // room
