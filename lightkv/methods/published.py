"""Runs one stage of the published method: cuts windows, matches tokens in each, and merges the pairs."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.methods.settings import Budget, check_stage
from lightkv.methods.windows import Windows, match
from lightkv.ops.merge import merge
from lightkv.vision.layout import VisionLayout
from lightkv.vision.tokens import Compressed, Tokens, removal, removals


def published(tokens: Tokens, windows: int, drop: float, frames: int | None, budget: Budget) -> Compressed:
    """The method "published": one stage of the paper, with the guidance as merge weight (equal weights without)."""
    weight = torch.ones_like(tokens.size) if tokens.score is None else tokens.score
    return in_windows(tokens, weight, windows, drop, frames, budget)


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

    One matching removes at most half of a window. If `drop` asks for more, the rest is matched again; a token then
    weighs the sum of what has merged into it. `frames` consecutive frames share a window (None: the whole video).
    With budget="item", floor(drop · M) of an item's M tokens are removed, spread over its windows (`spread_removals`).

    hidden [S, D], guidance fp32 [S] of weights ≥ 0 (only vision entries count), layout of the same S positions.
    Sizes in the result count the tokens of this call.
    Raises ConfigError if shapes disagree, windows < 1, or drop is outside [0, 1).
    """
    length = len(layout)
    if hidden.shape[:1] != (length,) or guidance.shape != (length,):
        raise ConfigError(
            f"hidden {list(hidden.shape)} and guidance {list(guidance.shape)} must cover the layout's {length} tokens"
        )
    check_stage(windows, drop)
    tokens = Tokens(hidden, layout.to(hidden.device), torch.ones(length, device=hidden.device))
    return in_windows(tokens, guidance, windows, drop, frames, budget)


def in_windows(
    tokens: Tokens, weight: Tensor, windows: int, drop: float, frames: int | None, budget: Budget
) -> Compressed:
    """`compress_tokens` for tokens that may already be merged: their sizes add up. weight [S] is the merge weight."""
    hidden, weight = tokens.hidden, weight.float()
    target = torch.arange(len(hidden), device=hidden.device)
    removed = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    source = into = target[:0]
    cut = Windows.cut(tokens.layout, windows, frames)
    quota = removals(cut.sizes, drop) if budget == "window" else spread_removals(cut, drop)
    more = bool(quota.any())
    while more:
        source, into = match(hidden, cut, quota)
        target = target.index_copy(0, source, into)[target]
        removed = removed.index_fill(0, source, True)
        quota = quota - torch.minimum(quota, cut.sizes // 2)
        more = bool(quota.any())
        if more:  # the last merges are done by `tokens.left`, together with the selection of the survivors
            if hidden is tokens.hidden:
                hidden, weight = hidden.clone(), weight.clone()
            merge(hidden, weight, source, into)
            cut = cut.without(removed)
    kept = torch.nonzero(~removed).flatten()
    size = torch.zeros_like(tokens.size).index_add(0, target, tokens.size)[kept]
    return replace(tokens.left(hidden, weight, source, into, target, kept), size=size)


def spread_removals(windows: Windows, drop: float) -> Tensor:
    """Removals per window, int64 [W]: floor(drop · M) per item, in proportion to the m - 1 tokens a window can lose.

    Rounding down per window would miss the budget if windows are small: a quarter of 2 tokens is 0.
    """
    count = int(windows.item.max()) + 1 if len(windows.item) else 0
    spare = windows.sizes - 1
    tokens, room = (spare.new_zeros(count).index_add(0, windows.item, part) for part in (windows.sizes, spare))
    wanted = torch.minimum(removals(tokens, drop), room)
    until = spare.cumsum(0) - (room.cumsum(0) - room)[windows.item]  # removable in the item up to this window
    share, room = wanted[windows.item], room[windows.item].clamp(min=1)
    return share * until // room - share * (until - spare) // room


def published_cost(
    vision: int, windows: int, drop: float, span: int | None, budget: Budget, frames: int, width: int
) -> tuple[int, int]:
    """(tokens left, FLOPs of the similarities) for `vision` tokens in `frames` equal grids.

    `span` frames share a window (None: all). Windows are taken as equal as the count allows.
    """
    count = (math.ceil(frames / span) if span else 1) * windows**2
    room = max(0, vision - count)  # every window keeps a token
    wanted = min(int(vision * drop + 1e-9), room)
    left, flops = 0, 0
    for size, number in ((vision // count + 1, vision % count), (vision // count, count - vision % count)):
        quota, now = removal(size, drop), size
        if budget == "item":
            quota = math.ceil(wanted * max(0, size - 1) / max(1, room))
        while quota > 0:
            flops += number * 2 * ((now + 1) // 2) * (now // 2) * width
            step = min(quota, now // 2)
            quota, now = quota - step, now - step
        left += number * now
    return (vision - wanted if budget == "item" else left), flops
