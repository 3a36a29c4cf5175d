"""Windows, sets A and B, feature divergence and the choice of pairs (method steps 2–4), without a loop per window."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkv.layout import VisionLayout

SCORES_AT_ONCE = 1 << 24  # fp32 similarities held at a time: 64 MiB
FEATURES_AT_ONCE = 1 << 25  # fp32 features held at a time: 128 MiB


def bands(position: Tensor, extent: Tensor, count: int) -> Tensor:
    """Band of each position when `extent` rows are cut into `count` near-equal bands, the first ones one taller."""
    height, taller = extent // count, extent % count
    edge = taller * (height + 1)
    return torch.where(position < edge, position // (height + 1), taller + (position - edge) // height.clamp(min=1))


@dataclass(frozen=True)
class Windows:
    """The mergeable tokens sorted by window and, inside one, row by row.

    order [N] position in the sequence · sizes [W] tokens per window, none empty · item [W] whose windows they are,
    ascending
    """

    order: Tensor
    sizes: Tensor
    item: Tensor

    @classmethod
    def cut(cls, layout: VisionLayout, count: int, frames: int | None = 1) -> "Windows":
        """`count` × `count` windows on every frame's grid, spanning `frames` consecutive frames (None: all)."""
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
        """The windows after the positions marked in `removed` (bool [S]) have left; one token of each stays."""
        stays = ~removed[self.order]
        window = torch.repeat_interleave(self.sizes)
        return Windows(self.order[stays], torch.bincount(window[stays], minlength=len(self.sizes)), self.item)


def mixed_radix(*digits: Tensor) -> Tensor:
    """One int64 that sorts like the tuple of non-negative digits."""
    value = torch.zeros_like(digits[0])
    for digit in digits:
        value = value * (digit.max() + 1) + digit
    return value


def match(hidden: Tensor, windows: Windows, quota: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of one round: sources (set A) and the targets (set B) they merge into, positions int64 [R] each.

    In a window, tokens 0, 2, 4 … are A and 1, 3, 5 … are B. Every a looks at the b with the largest cosine; the
    `quota` [W] a's with the largest are taken, at most half of the window. Ties go to the lower index.
    """
    start = windows.sizes.cumsum(0) - windows.sizes
    closest, cosine = _closest(hidden, windows, start)
    window = torch.repeat_interleave(windows.sizes)
    rank = torch.arange(len(window), device=window.device) - start[window]
    source = torch.nonzero(rank % 2 == 0).flatten()
    source = source[torch.argsort(cosine[source], descending=True, stable=True)]
    source = source[torch.argsort(window[source], stable=True)]
    set_a = (windows.sizes + 1) // 2
    place = torch.arange(len(source), device=source.device) - (set_a.cumsum(0) - set_a)[window[source]]
    source = source[place < torch.minimum(quota, windows.sizes // 2)[window[source]]]
    return windows.order[source], windows.order[closest[source]]


def _closest(hidden: Tensor, windows: Windows, start: Tensor) -> tuple[Tensor, Tensor]:
    """For each sorted slot in A: the slot of its closest b and their cosine (fp32). Slots in B are not written."""
    closest = torch.zeros_like(windows.order)
    cosine = torch.zeros(len(windows.order), dtype=torch.float32, device=hidden.device)
    for chunk, set_a, set_b in _chunks(windows.sizes, hidden.shape[1]):
        begin, size = start[chunk, None], windows.sizes[chunk, None]
        slot_b = 2 * torch.arange(set_b, device=hidden.device) + 1
        missing_b = slot_b >= size
        features_b = _unit(hidden, windows.order, (begin + slot_b).masked_fill(missing_b, 0)).transpose(1, 2)
        step = max(1, SCORES_AT_ONCE // (len(chunk) * set_b))
        for slot_a in (2 * torch.arange(set_a, device=hidden.device)).split(step):
            present = slot_a < size
            at = begin + slot_a
            scores = torch.bmm(_unit(hidden, windows.order, at.masked_fill(~present, 0)), features_b)
            best, which = scores.masked_fill_(missing_b[:, None], -torch.inf).max(dim=-1)
            closest[at[present]] = (begin + 2 * which + 1)[present]
            cosine[at[present]] = best[present]
    return closest, cosine


def _unit(hidden: Tensor, order: Tensor, slot: Tensor) -> Tensor:
    """Features of sorted slots at length 1 in fp32; fp16 norms would overflow at |x|² > 65504."""
    return F.normalize(hidden[order[slot]].float(), dim=-1)


def _chunks(sizes: Tensor, width: int) -> Iterator[tuple[Tensor, int, int]]:
    """Windows of like size in bounded batches: (window numbers, largest set A, largest set B)."""
    by_size = torch.argsort(sizes, descending=True, stable=True)
    size = sizes[by_size].tolist()
    first = 0
    while first < len(size) and size[first] > 1:
        set_a, set_b = (size[first] + 1) // 2, size[first] // 2
        fit = max(1, min(SCORES_AT_ONCE // (set_a * set_b), FEATURES_AT_ONCE // (size[first] * width)))
        last = first + 1
        while last < min(first + fit, len(size)) and size[last] > max(1, size[first] // 2):
            last += 1
        yield by_size[first:last], set_a, set_b
        first = last
