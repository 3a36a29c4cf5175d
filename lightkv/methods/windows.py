"""Cuts windows, splits them into sets A and B, and chooses the pairs to merge (steps 2–4 of the published method).

All windows are processed together, without a loop per window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.ops.nearest import FEATURES_AT_ONCE, nearest
from lightkv.ops.ragged import Groups
from lightkv.vision.layout import VisionLayout


def bands(position: Tensor, extent: Tensor, count: int) -> Tensor:
    """Band of each position if `extent` rows are cut into `count` near-equal bands; the first ones are a row taller."""
    height, taller = extent // count, extent % count
    edge = taller * (height + 1)
    return torch.where(position < edge, position // (height + 1), taller + (position - edge) // height.clamp(min=1))


@dataclass(frozen=True)
class Windows:
    """The mergeable tokens sorted by window and, within a window, in raster order.

    order [N]  position in the sequence
    sizes [W]  tokens per window; no window is empty
    item  [W]  item of each window, ascending
    """

    order: Tensor
    sizes: Tensor
    item: Tensor

    @classmethod
    def cut(cls, layout: VisionLayout, count: int, frames: int | None = 1) -> "Windows":
        """Cuts every frame's grid into `count` × `count` windows, each over `frames` consecutive frames (None: all)."""
        index = torch.nonzero(layout.mergeable).flatten()
        tokens = layout.take(index)
        if not len(index):
            return cls(index, index, index)
        _, height, width = layout.grid[tokens.item].unbind(-1)
        time = tokens.t // frames if frames else torch.zeros_like(tokens.t)
        cell = (bands(tokens.y, height, count), bands(tokens.x, width, count))
        window = mixed_radix(tokens.item, time, *cell)
        by_place = torch.argsort(mixed_radix(tokens.t, tokens.y, tokens.x), stable=True)
        by_window = by_place[torch.argsort(window[by_place], stable=True)]
        sizes = torch.unique_consecutive(window[by_window], return_counts=True)[1]
        return cls(index[by_window], sizes, tokens.item[by_window][sizes.cumsum(0) - sizes])

    def without(self, removed: Tensor) -> "Windows":
        """The windows without the positions marked in `removed` (bool [S]), which must leave one token per window."""
        stays = ~removed[self.order]
        window = torch.repeat_interleave(self.sizes)
        return Windows(self.order[stays], torch.bincount(window[stays], minlength=len(self.sizes)), self.item)

    def sets(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The sets A and B in the form that `nearest` takes: (order, starts, middles, size of the largest A).

        order is sorted by window, tokens 0, 2, 4 … (A) before 1, 3, 5 … (B); starts and middles say where windows and
        their B begin.
        """
        window = torch.repeat_interleave(self.sizes)
        starts = torch.cat([self.sizes.new_zeros(1), self.sizes.cumsum(0)])
        odd = (torch.arange(len(window), device=window.device) - starts[window]) % 2
        set_a = (self.sizes + 1) // 2
        most = int(set_a.max()) if len(set_a) else 0
        return self.order[torch.argsort(2 * window + odd, stable=True)], starts, starts[:-1] + set_a, most


def mixed_radix(*digits: Tensor) -> Tensor:
    """Int64 keys that sort like the tuples of the non-negative `digits`, whose shapes broadcast."""
    value = torch.zeros_like(digits[0])
    for digit in digits:
        value = value * (digit.max() + 1 if digit.numel() else 1) + digit
    return value


def match(hidden: Tensor, windows: Windows, quota: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of one round: sources (set A) and the targets (set B) they merge into, positions int64 [R] each.

    In a window, tokens 0, 2, 4 … are A and 1, 3, 5 … are B. Every a is paired with the b of largest cosine. The
    `quota` [W] pairs of largest cosine are taken, at most half of the window. Ties go to the lower index.
    """
    order, starts, middles, most = windows.sets()
    groups = Groups(order, starts, middles, most)
    closest, apart = nearest(hidden, _unit(hidden, windows.order), None, groups, 0.0)
    window = torch.repeat_interleave(windows.sizes)
    source = torch.nonzero(closest >= 0).flatten()
    source = source[torch.argsort(apart[source], stable=True)]
    source = source[torch.argsort(window[source], stable=True)]
    of = window[source]
    first = torch.searchsorted(of, of)
    place = torch.arange(len(source), device=source.device) - first
    source = source[place < torch.minimum(quota, windows.sizes // 2)[of]]
    return order[source], closest[source]


def _unit(hidden: Tensor, index: Tensor) -> Tensor:
    """1 / ‖x‖ of the tokens in `index`, fp32 [S]; fp16 norms would overflow at |x|² > 65504."""
    unit = torch.zeros(len(hidden), device=hidden.device)
    for part in index.split(max(1, FEATURES_AT_ONCE // max(1, hidden.shape[1]))):
        unit[part] = hidden[part].float().norm(dim=-1).clamp(min=1e-12).reciprocal()
    return unit
