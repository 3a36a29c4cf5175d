"""Merging in space and time: tokens become one with their nearest in place and content, where there is most to spare.

A stage takes rounds. In a round the tokens of an item are split by a parity of their turns, a token's turn along an
axis being its number in its row of what is left: first of the sum over t, y and x, a checkerboard in space and time, so
that the nearest neighbours of every a in A are in B, then of other sums (PATTERNS), so that what one split keeps apart
the next brings together. (By the parity of coordinates, what is left of even steps alone would never meet.) Each a
looks for the b from which it differs least in content and place,

    d(a, b) = ‖x_a − x_b‖² / 2s² + λ · dist(a, b),    dist = sqrt(Δt²/4 + Δy² + Δx²) in grid steps,

s² being the item's mean ‖x‖² before the stage (for vectors of length s the first term is 1 − cos). All a of the item
are ranked together by n_a n_b / (n_a + n_b) · d(a, b), n being sizes: what a merge adds to the variance within tokens
(Ward's criterion), so that the rate goes where the redundancy is and no token swallows the rest. The least merge by
size: x_b ← (n_b x_b + Σ n_a x_a) / (n_b + Σ n_a), n_b ← n_b + Σ n_a. A survivor keeps its place. Where the layer before
has shown what the question attends to, the rank of an a is multiplied by a price that grows with that, so that what
matters to the question merges late. Long items are searched in blocks of space and time, and ranked as a whole.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightkv.layout import VisionLayout
from lightkv.ops.merge import merge
from lightkv.ops.nearest import FEATURES_AT_ONCE, nearest
from lightkv.tokens import Compressed, Tokens, removal, removals

if TYPE_CHECKING:
    from lightkv.config import LightKVConfig, Stage

PATTERNS = (
    (1, 1, 1),
    (1, 0, 0),
    (1, 1, 0),
    (1, 0, 1),
)  # of (t, y, x); all count t, so that what stands still meets itself
FLOOR = 0.1  # price of a token that the question does not attend to, beside 1 + FLOOR for the one it attends to most
BLOCK_TOKENS = 1024  # among which an a looks for its b


def spacetime(tokens: Tokens, stage: "Stage", config: "LightKVConfig") -> Compressed:
    """Merge floor(drop · M) of the M tokens of every item, in config.rounds rounds of equal share.

    What a round cannot give is left to the rounds after it, beyond the last if need be. Ties go to the lower index.
    """
    hidden, size, layout = tokens.hidden.clone(), tokens.size.clone(), tokens.layout
    target = torch.arange(len(layout), device=hidden.device)
    alive = layout.mergeable
    wanted = removals(torch.bincount(layout.item[alive], minlength=len(layout.grid)), stage.drop)
    unit, price, place = _unit(hidden, layout), _price(tokens), places(layout)
    done, turn = torch.zeros_like(wanted), 0
    while bool((done < wanted).any()):
        share = wanted * min(turn + 1, config.rounds) // config.rounds - done
        busy = torch.nonzero(alive & (share[layout.item] > 0)).flatten()
        source, into = pairs(hidden, unit, place, size, price, layout, busy, share, turn, config.distance)
        merge(hidden, size, source, into)
        target = target.index_copy(0, source, into)[target]
        alive = alive.index_fill(0, source, False)
        done = done + torch.bincount(layout.item[source], minlength=len(done))
        turn += 1
    kept = torch.nonzero(alive | ~layout.mergeable).flatten()
    return Compressed(hidden[kept], kept, target, size[kept])


def _unit(hidden: Tensor, layout: VisionLayout) -> Tensor:
    """1 / s of the item of each token, fp32 [S]; 1 for text and for an item of zeros."""
    index = torch.nonzero(layout.mergeable).flatten()
    item, squares = layout.item[index], hidden.new_zeros(len(layout.grid), dtype=torch.float64)
    for part in index.split(max(1, FEATURES_AT_ONCE // hidden.shape[1])):
        squares.index_add_(0, layout.item[part], hidden[part].float().square().sum(dim=-1).double())
    mean = squares / torch.bincount(item, minlength=len(layout.grid))
    unit = torch.ones(len(layout), device=hidden.device)
    return unit.index_copy(0, index, torch.where(mean > 0, mean, 1.0).rsqrt()[item].float())


def _price(tokens: Tokens) -> Tensor:
    """What merging a token away costs beside its difference, fp32 [S]: more, the more the question attends to it.

    FLOOR + score / the largest score of a vision token of its prompt; 1 for all without scores, or where all are 0.
    """
    vision, row = tokens.layout.mergeable, tokens.row
    if tokens.score is None:
        return torch.ones(len(row), device=row.device)
    score = torch.where(vision, tokens.score.float(), 0.0)
    most = score.new_zeros(len(tokens.lengths or (1,))).scatter_reduce(0, row, score, "amax")[row]
    return torch.where(most > 0, FLOOR + score / torch.where(most > 0, most, 1.0), 1.0)


def pairs(
    hidden: Tensor,
    unit: Tensor,
    place: Tensor,
    size: Tensor,
    price: Tensor,
    layout: VisionLayout,
    index: Tensor,
    share: Tensor,
    turn: int,
    distance: float,
) -> tuple[Tensor, Tensor]:
    """The merges of one round: sources and the tokens they merge into, positions int64 [R] each.

    index int64 [N] ascending positions of the tokens that take part; share [items] how many may merge at most.
    """
    order, starts, middles = sets(layout.take(index), turn)
    order = index[order]
    closest, apart = nearest(hidden, unit, place, order, starts, middles, min(BLOCK_TOKENS, len(index)), distance)
    found = torch.nonzero(apart < torch.inf).flatten()
    found = found[torch.argsort(order[found])]
    source, into = order[found], closest[found]
    own, other = size[source], size[into]
    cheapest = torch.argsort(price[source] * own * other / (own + other) * apart[found], stable=True)
    by_item = cheapest[torch.argsort(layout.item[source[cheapest]], stable=True)]
    item = layout.item[source[by_item]]
    chosen = by_item[_rank(item) < share[item]]
    return source[chosen], into[chosen]


def places(layout: VisionLayout) -> Tensor:
    """(t / 2, y, x) of every token, fp32 [S, 3]: what distances are taken between."""
    return torch.stack([layout.t / 2, layout.y, layout.x], dim=-1).float()


def sets(tokens: VisionLayout, turn: int) -> tuple[Tensor, Tensor, Tensor]:
    """The turn's sets as `nearest` wants them: order by block, its A before its B; where blocks and their B begin."""
    block = blocks(tokens)
    in_b = sides(tokens, block, turn)
    ends = torch.bincount(block).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    middles = ends - torch.bincount(block[in_b], minlength=len(ends))
    return torch.argsort(2 * block + in_b.long(), stable=True), starts, middles


def blocks(tokens: VisionLayout, limit: int | None = None) -> Tensor:
    """Number of the block of each token, int64 [N]: an item, or where it has more than `limit` tokens a part of it.

    A block that is too large is halved, by count, along the axis on which it is longest (a frame is half a step).
    """
    limit = BLOCK_TOKENS if limit is None else limit
    place = torch.stack([tokens.t, 2 * tokens.y, 2 * tokens.x], dim=-1)
    block = torch.unique(tokens.item, return_inverse=True)[1]
    while bool(((sizes := torch.bincount(block)) > limit).any()):
        rows = block[:, None].expand(-1, 3)
        low, high = (place.new_zeros(len(sizes), 3).scatter_reduce(0, rows, place, how, include_self=False)
                     for how in ("amin", "amax"))  # fmt: skip
        axis = (high - low).argmax(dim=-1)
        along = place.gather(1, axis[block, None]).flatten()
        order = torch.argsort(along, stable=True)
        order = order[torch.argsort(block[order], stable=True)]
        later = torch.empty_like(block)
        later[order] = (_rank(block[order]) >= (sizes // 2)[block[order]]).long()
        later[sizes[block] <= limit] = 0
        block = torch.unique(2 * block + later, return_inverse=True)[1]
    return block


def sides(tokens: VisionLayout, block: Tensor, turn: int) -> Tensor:
    """Bool [N]: which tokens are in B, by the parity that this turn counts.

    In a block of one parity, such as an image's when time is counted, every second token is.
    """
    odd = torch.full_like(tokens.item, turn)
    place = [tokens.t, tokens.y, tokens.x]
    for axis, counted in enumerate(PATTERNS[turn % len(PATTERNS)]):
        if counted:
            odd += _turn(tokens.item, place[:axis] + place[axis + 1 :], place[axis])
    odd %= 2
    sizes = torch.bincount(block)
    odds = torch.bincount(block[odd == 1], minlength=len(sizes))
    order = torch.argsort(block, stable=True)
    rank = torch.empty_like(block)
    rank[order] = _rank(block[order])
    one_parity = (odds == 0) | (odds == sizes)
    return torch.where(one_parity[block], (rank + turn) % 2, odd) == 1


def _turn(item: Tensor, row: list[Tensor], along: Tensor) -> Tensor:
    """int64 [N]: the number of each token in its row, which has an item and two coordinates in common."""
    key = item
    for column in row:
        key = key * (int(column.max()) + 1 if len(column) else 1) + column
    order = torch.argsort(along, stable=True)
    order = order[torch.argsort(key[order], stable=True)]
    turn = torch.empty_like(key)
    turn[order] = _rank(key[order])
    return turn


def _rank(group: Tensor) -> Tensor:
    """Place of each element within its run of equal values in a sorted tensor."""
    _, run, length = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    return torch.arange(len(group), device=group.device) - (length.cumsum(0) - length)[run]


def spacetime_cost(vision: int, stage: "Stage", config: "LightKVConfig", frames: int, width: int) -> tuple[int, int]:
    """Of one item's `vision` tokens: how many are left, and FLOPs of the similarities, with sets of equal size."""
    wanted = removal(vision, stage.drop)
    done, turn, flops = 0, 0, 0
    while done < wanted:
        now, share = vision - done, wanted * min(turn + 1, config.rounds) // config.rounds - done
        halvings = 0
        while now > BLOCK_TOKENS << halvings:
            halvings += 1
        if share:
            flops += now * now // 2 * width >> halvings
        done, turn = done + min(share, now // 2), turn + 1
    return vision - wanted, flops
