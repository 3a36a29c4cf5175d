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

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.methods.settings import Settings, Stage
from lightkv.methods.windows import mixed_radix
from lightkv.ops.merge import merge
from lightkv.ops.nearest import FEATURES_AT_ONCE, nearest
from lightkv.ops.ragged import Groups
from lightkv.vision.layout import VisionLayout
from lightkv.vision.tokens import Compressed, Tokens, removal, removals

# Axes counted, of (t, y, x): all three, t, t and y, t and x. Each counts t, so that what stands still meets itself.
# Slices, because a list of axes would be uploaded.
PATTERNS = slice(0, 3), slice(0, 1), slice(0, 2), slice(0, 3, 2)
FLOOR = 0.1  # price of a token that the question does not attend to, beside 1 + FLOOR for the one it attends to most
BLOCK_TOKENS = 1024  # among which an a looks for its b


def spacetime(tokens: Tokens, stage: Stage, config: Settings) -> Compressed:
    """Merge floor(drop · M) of the M tokens of every item, in config.rounds rounds of equal share.

    What a round cannot give is left to the rounds after it, beyond the last if need be. Ties go to the lower index.
    Raises FloatingPointError where too few tokens are finite: what is no number has no nearest neighbour.
    """
    hidden, size, layout = tokens.hidden, tokens.size, tokens.layout
    target = torch.arange(len(layout), device=hidden.device)
    source = into = target[:0]
    unit, price, place = _unit(hidden, layout), _price(tokens), places(layout)
    field = Field.of(layout)
    wanted = removals(field.sizes, stage.drop)
    alive = torch.ones_like(field.item, dtype=torch.bool)
    done, left, turn = torch.zeros_like(wanted), int(wanted.sum()), 0
    while left:
        share = wanted * min(turn + 1, config.rounds) // config.rounds - done
        order, starts, middles = field.sets(alive, alive & (share[field.item] > 0), turn)
        groups = Groups(field.index[order], starts, middles, min(BLOCK_TOKENS, len(order)))
        closest, apart = nearest(hidden, unit, place, groups, config.distance)
        chosen, into = field.cheapest(order, closest, apart, size, price, share)
        if not len(chosen) and turn >= config.rounds:
            raise FloatingPointError(f"{left} more tokens should merge, but the others' hidden states are not finite")
        source = field.index[chosen]
        target = target.index_copy(0, source, into)[target]
        alive[chosen] = False
        done = done + _counted(field.item[chosen], len(done))
        left, turn = left - len(chosen), turn + 1
        if left:  # else these are the last merges, which go with the survivors
            if hidden is tokens.hidden:
                hidden, size = hidden.clone(), size.clone()
            merge(hidden, size, source, into)
    kept = torch.nonzero(target == torch.arange(len(layout), device=target.device)).flatten()
    return tokens.left(hidden, size, source, into, target, kept)


def _unit(hidden: Tensor, layout: VisionLayout) -> Tensor:
    """1 / s of the item of each token, fp32 [S]; 1 for text and for an item of zeros."""
    index = torch.nonzero(layout.mergeable).flatten()
    item, squares = layout.item[index], hidden.new_zeros(len(layout.grid), dtype=torch.float64)
    for part in index.split(max(1, FEATURES_AT_ONCE // hidden.shape[1])):
        squares.index_add_(0, layout.item[part], hidden[part].float().square().sum(dim=-1).double())
    mean = squares / _counted(item, len(layout.grid))
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


def places(layout: VisionLayout) -> Tensor:
    """(t / 2, y, x) of every token, fp32 [S, 3]: what distances are taken between."""
    return torch.stack([layout.t / 2, layout.y, layout.x], dim=-1).float()


@dataclass(frozen=True)
class Field:
    """The N mergeable tokens item after item, and what of their places is the same in every round.

    index   int64 [N] position in the sequence, ascending within an item · layout of these N
    item    int64 [N] of I items that are there, numbered through · sizes int64 [I]
    rows    int64 [3, N] for each axis the tokens row after row, a row having an item and two coordinates in common
    first   int64 [3, N] for each of those where its row begins
    where   int64 [3, N] where each token is in `rows`
    long    whether an item has more than BLOCK_TOKENS, and is searched in parts
    """

    index: Tensor
    layout: VisionLayout
    item: Tensor
    sizes: Tensor
    rows: Tensor
    first: Tensor
    where: Tensor
    long: bool

    @classmethod
    def of(cls, layout: VisionLayout) -> "Field":
        index = torch.nonzero(layout.mergeable).flatten()
        index = index[torch.argsort(layout.item[index], stable=True)]
        tokens = layout.take(index)
        item, sizes = torch.unique_consecutive(tokens.item, return_inverse=True, return_counts=True)[1:]
        t, y, x = tokens.t, tokens.y, tokens.x
        place = torch.stack([t, y, x])
        row = mixed_radix(item, torch.stack([y, t, t]), torch.stack([x, x, y]))
        rows = torch.argsort(mixed_radix(row, place), dim=1, stable=True)
        number = torch.arange(len(index), device=index.device)
        row = row.gather(1, rows)
        begins = torch.ones_like(row, dtype=torch.bool)
        begins[:, 1:] = row[:, 1:] != row[:, :-1]
        first = torch.where(begins, number, 0).cummax(1).values
        where = torch.empty_like(rows).scatter_(1, rows, number.expand(3, -1))
        return cls(index, tokens, item, sizes, rows, first, where, bool((sizes > BLOCK_TOKENS).any()))

    def sets(self, alive: Tensor, busy: Tensor, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        """The turn's sets as `nearest` wants them: order by block, its A before its B; where blocks and their B begin.

        alive bool [N] tokens that are left · busy bool [N] those of them that take part: whole items. order int64 [n]
        numbers them among the N.
        """
        now = torch.nonzero(busy).flatten()
        if self.long:
            block, count = blocks(self.layout.take(now))
            by_block = torch.argsort(block, stable=True)
            now, block = now[by_block], block[by_block]
        else:  # an item each, empty for those that take no part
            block, count = self.item[now], len(self.sizes)
        sizes = _counted(block, count)
        ends = sizes.cumsum(0)
        odd = self._turns(alive, PATTERNS[turn % len(PATTERNS)])[now] + turn & 1
        odds = torch.zeros_like(sizes).index_add(0, block, odd)
        # In a block of one parity, such as an image's when time is counted, every second token is in B.
        alike = (odds == 0) | (odds == sizes)
        odds = torch.where(alike, (sizes + turn % 2) // 2, odds)
        second = torch.arange(turn, len(now) + turn, device=now.device) - (ends - sizes)[block] & 1
        odd = torch.where(alike[block], second, odd)
        starts = torch.cat([ends.new_zeros(1), ends])
        return now[torch.argsort(2 * block + odd, stable=True)], starts, ends - odds

    def _turns(self, alive: Tensor, axes: slice) -> Tensor:
        """int64 [N]: the sum over the axes of a token's turn, its number in its row of those alive."""
        here = alive[self.rows[axes]].long()
        before = here.cumsum(1) - here
        turn = before - before.gather(1, self.first[axes])
        return turn.gather(1, self.where[axes]).sum(0)

    def cheapest(
        self, order: Tensor, closest: Tensor, apart: Tensor, size: Tensor, price: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The merges of a round: numbers among the N of those that merge, at most `share` [I] of an item, and into
        which positions; int64 [R] each, the least cost of an item first.

        order [n] numbers of the tokens that `closest` and `apart` are of, as `nearest` gives them.
        """
        into = torch.full_like(self.index, -1).index_copy(0, order, closest)
        own, other = size[self.index], size[into.clamp(min=0)]
        cost = torch.full_like(own, torch.inf).index_copy(0, order, apart)
        cost = price[self.index] * own * other / (own + other) * cost
        by_item = torch.argsort(cost, stable=True)
        if len(self.sizes) > 1:
            by_item = by_item[torch.argsort(self.item[by_item], stable=True)]
        place = torch.arange(len(by_item), device=order.device) - (self.sizes.cumsum(0) - self.sizes)[self.item]
        chosen = by_item[(place < share[self.item]) & (into[by_item] >= 0)]
        return chosen, into[chosen]


def blocks(tokens: VisionLayout, limit: int | None = None) -> tuple[Tensor, int]:
    """Number of the block of each token, int64 [N], and how many blocks there are: an item is one, or where it has more
    than `limit` tokens a part of it is.

    A block that is too large is halved, by count, along the axis on which it is longest (a frame is half a step). A
    halving waits for a GPU once: for the number of blocks that are still too large.
    """
    limit = BLOCK_TOKENS if limit is None else limit
    place = torch.stack([tokens.t, 2 * tokens.y, 2 * tokens.x], dim=-1)
    items, block = torch.unique(tokens.item, return_inverse=True)
    count = len(items)
    while more := int((large := (sizes := _counted(block, count)) > limit).sum()):
        rows = block[:, None].expand(-1, 3)
        low, high = (place.new_zeros(count, 3).scatter_reduce(0, rows, place, how, include_self=False)
                     for how in ("amin", "amax"))  # fmt: skip
        axis = (high - low).argmax(dim=-1)
        along = place.gather(1, axis[block, None]).flatten()
        order = torch.argsort(along, stable=True)
        order = order[torch.argsort(block[order], stable=True)]
        by_block = block[order]
        rank = torch.arange(len(block), device=block.device) - (sizes.cumsum(0) - sizes)[by_block]
        later = torch.empty_like(block)
        later[order] = (large[by_block] & (rank >= (sizes // 2)[by_block])).long()
        before = large.cumsum(0) - large.long()  # blocks ahead of each that are halved, too
        block, count = block + before[block] + later, count + more
    return block, count


def _counted(group: Tensor, count: int) -> Tensor:
    """How many of each of 0 … count - 1, int64; unlike torch.bincount, without waiting for a GPU."""
    return group.new_zeros(count).index_add(0, group, torch.ones_like(group))


def spacetime_cost(vision: int, stage: Stage, config: Settings, frames: int, width: int) -> tuple[int, int]:
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
