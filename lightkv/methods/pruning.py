"""Methods that drop tokens instead of merging them: random, stride, fastv, evs, and the later stages of asked.

Each computes a value per vision token and keeps the M - floor(drop · M) largest of an item's M tokens; `asked` counts M
over the whole prompt. Survivors keep their hidden states and sizes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkv.errors import UnsupportedCallError
from lightkv.ops.nearest import FEATURES_AT_ONCE
from lightkv.vision.layout import VisionLayout
from lightkv.vision.tokens import Compressed, Tokens, removals


def random(tokens: Tokens, drop: float, seed: int) -> Compressed:
    """Keeps a uniform random draw of an item's tokens; the same draw for the same seed and layout."""
    lengths = tokens.lengths or (len(tokens.layout),)
    draws = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for count in lengths]
    return prune(tokens, torch.cat(draws).to(tokens.hidden.device), drop)


def stride(tokens: Tokens, drop: float) -> Compressed:
    """Keeps every k-th token of an item in raster order, k = M / kept; evenly spread if k is not a whole number."""
    layout = tokens.layout
    order = torch.argsort(_key(layout, layout.t), stable=True)
    order = order[layout.mergeable[order]]
    item = layout.item[order]
    sizes = torch.bincount(item, minlength=len(layout.grid))
    kept, size = (sizes - removals(sizes, drop))[item], sizes[item]
    rank = torch.arange(len(item), device=item.device) - (sizes.cumsum(0) - sizes)[item]
    value = torch.zeros(len(layout), device=item.device)
    value[order] = (((rank + 1) * kept + size // 2) // size - (rank * kept + size // 2) // size).float()
    return prune(tokens, value, drop)


def fastv(tokens: Tokens, drop: float) -> Compressed:
    """FastV: keeps the tokens that the last prompt token attends to most in the layer before the stage."""
    assert tokens.score is not None
    return prune(tokens, tokens.score, drop)


def asked(tokens: Tokens, drop: float) -> Compressed:
    """Keeps what the question attends to most, over all items of a prompt together.

    Every item keeps its best token, as far as the number of tokens to keep allows.
    """
    assert tokens.score is not None
    layout, value = tokens.layout, tokens.score
    order, stays = ranked(layout.item, value, 1.0 - 1e-9)
    value = value.index_fill(0, order[stays], torch.inf)
    return prune(tokens, value, drop, torch.where(layout.mergeable, tokens.row, layout.item))


def evs(tokens: Tokens, drop: float) -> Compressed:
    """Efficient video sampling: keeps the tokens that differ most (1 - cos) from the same place one frame earlier.

    Tokens without a predecessor, such as the first frame's, are dropped last. Raises UnsupportedCallError for an item
    of one frame: the method is not defined for it.
    """
    layout = tokens.layout
    index = torch.nonzero(layout.mergeable).flatten()
    still = layout.item[index[layout.grid[layout.item[index], 0] == 1]]
    if len(still):
        raise UnsupportedCallError(
            f"evs compares each frame with the one before, but item {int(still[0])} has one frame: "
            "use evs for videos only, and another method for images"
        )
    key, before = _key(layout, layout.t + 1)[index], _key(layout, layout.t)[index]
    known, order = torch.sort(key)  # key: the place one frame later
    at = torch.searchsorted(known, before).clamp(max=max(0, len(known) - 1))
    has = known[at] == before
    value = torch.full((len(layout),), torch.inf, device=index.device)
    for part in torch.nonzero(has).flatten().split(max(1, FEATURES_AT_ONCE // tokens.hidden.shape[1])):
        here, there = tokens.hidden[index[part]].float(), tokens.hidden[index[order[at[part]]]].float()
        value[index[part]] = 1 - F.cosine_similarity(here, there, dim=-1)
    return prune(tokens, value, drop)


def prune(tokens: Tokens, value: Tensor, drop: float, group: Tensor | None = None) -> Compressed:
    """Removes floor(drop · M) of every item's M tokens, those of smallest value [S]; ties keep the lower index.

    Text and row ends stay. group int64 [S] replaces the item number; tokens with a group below 0 stay.
    """
    order, stays = ranked(tokens.layout.item if group is None else group, value, drop)
    target = torch.arange(len(value), device=order.device).index_fill(0, order[~stays], -1)
    kept = torch.nonzero(target >= 0).flatten()
    return tokens.left(tokens.hidden, tokens.size, target[:0], target[:0], target, kept)


def ranked(group: Tensor, value: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """(order, stays): positions of grouped tokens by group and descending value, int64 [N]; which stay, bool [N]."""
    order = torch.nonzero(group >= 0).flatten()
    order = order[torch.argsort(value[order], descending=True, stable=True)]
    order = order[torch.argsort(group[order], stable=True)]
    group = group[order]
    sizes = torch.bincount(group)
    rank = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group]
    return order, rank < (sizes - removals(sizes, drop))[group]


def _key(layout: VisionLayout, t: Tensor) -> Tensor:
    """Int64 keys that sort like (item, t, y, x); comparable between different `t` up to the grids' extent."""
    if not len(layout.grid):
        return torch.zeros_like(t)
    frames, height, width = (int(extent) + 1 for extent in layout.grid.amax(dim=0))
    return (((layout.item + 2) * (frames + 1) + t) * height + layout.y) * width + layout.x
