"""Merges an item's tokens that are close in place and content: the method "spacetime", and the merging of "lightkv".

A stage runs in rounds. Each round has four steps:

1. Split. The tokens of an item are split into A and B. A token's rank along an axis is its index among the tokens
   still left in its row. A holds the even sums of ranks over t, y and x, B the odd sums; every second round swaps
   them. This is a checkerboard, so that the nearest neighbours of every a in A are in B. Later rounds sum over other
   axes (PATTERNS), so that tokens that one split puts on the same side can merge in the next. (The parity of
   coordinates would not do: tokens left at even steps only would all be in A.)
2. Search. Each a takes the b with the smallest

       d(a, b) = ‖x_a − x_b‖² / 2s² + λ · dist(a, b),    dist = sqrt(Δt²/4 + Δy² + Δx²) in grid steps.

   s² is the item's mean ‖x‖² before the stage. For vectors of length s the first term is 1 − cos.
3. Order. All a of the item are ordered by cost: price(a) · n_a n_b / (n_a + n_b) · d(a, b), where n is the size.
   Without the price this is what a merge adds to the variance within tokens (Ward's criterion): redundant regions
   merge first, and no token absorbs all others. The price is 1, or grows with the attention that the question pays
   to a in the layer before the stage, so that tokens that matter to the question merge late.
4. Merge. The lowest costs merge: x_b ← (n_b x_b + Σ n_a x_a) / (n_b + Σ n_a), n_b ← n_b + Σ n_a. b keeps its place.

Long items are searched in blocks of space and time, but ordered as a whole.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.methods.windows import mixed_radix
from lightkv.ops.merge import merge
from lightkv.ops.nearest import FEATURES_AT_ONCE, nearest
from lightkv.ops.ragged import Groups
from lightkv.vision.layout import VisionLayout
from lightkv.vision.tokens import Compressed, Tokens, removal, removals

# Axes of (t, y, x) that a round's split sums over: all three, t, t and y, t and x. Every split sums over t, so that a
# still region can merge with itself in the next frame. Slices, because a list of axes would be copied to the GPU.
PATTERNS = slice(0, 3), slice(0, 1), slice(0, 2), slice(0, 3, 2)
ROUNDS = 10  # per stage by default
DISTANCE = 0.02  # λ by default
FLOOR = 0.1  # price of a token without the question's attention; the token with the most costs 1 + FLOOR
BLOCK_TOKENS = 1024  # the most tokens among which an a searches its b


def spacetime(tokens: Tokens, drop: float, rounds: int, distance: float) -> Compressed:
    """Merge floor(drop · M) of the M tokens of every item, in `rounds` rounds of equal share.

    If a round cannot merge its full share, later rounds take the rest; extra rounds run if needed. Ties go to the
    lower index. Raises FloatingPointError if too few tokens are finite: a NaN has no nearest neighbour.
    """
    hidden, size, layout = tokens.hidden, tokens.size, tokens.layout
    target = torch.arange(len(layout), device=hidden.device)
    source = into = target[:0]
    unit, price, place = _unit(hidden, layout), _price(tokens), places(layout)
    field = Field.of(layout)
    wanted = removals(field.sizes, drop)
    alive = torch.ones_like(field.item, dtype=torch.bool)
    done, left, number = torch.zeros_like(wanted), int(wanted.sum()), 0
    while left:
        share = wanted * min(number + 1, rounds) // rounds - done
        order, starts, middles = field.sets(alive, alive & (share[field.item] > 0), number)
        groups = Groups(field.index[order], starts, middles, min(BLOCK_TOKENS, len(order)))
        closest, apart = nearest(hidden, unit, place, groups, distance)
        chosen, into = field.cheapest(order, closest, apart, size, price, share)
        if not len(chosen) and number >= rounds:
            raise FloatingPointError(f"{left} more tokens must merge, but the others' hidden states are not finite")
        source = field.index[chosen]
        target = target.index_copy(0, source, into)[target]
        alive[chosen] = False
        done = done + _counted(field.item[chosen], len(done))
        left, number = left - len(chosen), number + 1
        if left:  # the last merges are done by `tokens.left`, together with the selection of the survivors
            if hidden is tokens.hidden:
                hidden, size = hidden.clone(), size.clone()
            merge(hidden, size, source, into)
    kept = torch.nonzero(target == torch.arange(len(layout), device=target.device)).flatten()
    return tokens.left(hidden, size, source, into, target, kept)


def _unit(hidden: Tensor, layout: VisionLayout) -> Tensor:
    """1 / s of each token's item, fp32 [S]; 1 for text and for an item whose hidden states are all zero."""
    index = torch.nonzero(layout.mergeable).flatten()
    item, squares = layout.item[index], hidden.new_zeros(len(layout.grid), dtype=torch.float64)
    for part in index.split(max(1, FEATURES_AT_ONCE // hidden.shape[1])):
        squares.index_add_(0, layout.item[part], hidden[part].float().square().sum(dim=-1).double())
    mean = squares / _counted(item, len(layout.grid))
    unit = torch.ones(len(layout), device=hidden.device)
    return unit.index_copy(0, index, torch.where(mean > 0, mean, 1.0).rsqrt()[item].float())


def _price(tokens: Tokens) -> Tensor:
    """Factor on the cost of merging each token, fp32 [S], which grows with the question's attention to it.

    It is FLOOR + score / the largest score of a vision token of the same prompt. It is 1 for all tokens if there are
    no scores, or if all scores of the prompt are 0.
    """
    vision, row = tokens.layout.mergeable, tokens.row
    if tokens.score is None:
        return torch.ones(len(row), device=row.device)
    score = torch.where(vision, tokens.score.float(), 0.0)
    most = score.new_zeros(len(tokens.lengths or (1,))).scatter_reduce(0, row, score, "amax")[row]
    return torch.where(most > 0, FLOOR + score / torch.where(most > 0, most, 1.0), 1.0)


def places(layout: VisionLayout) -> Tensor:
    """(t / 2, y, x) of every token, fp32 [S, 3]: the coordinates whose distance counts."""
    return torch.stack([layout.t / 2, layout.y, layout.x], dim=-1).float()


@dataclass(frozen=True)
class Field:
    """The N mergeable tokens sorted by item, with the indices that stay the same in every round.

    index   int64 [N] position in the sequence, ascending within an item
    layout  of these N tokens
    item    int64 [N] number of the token's item, 0 … I - 1, counting only items that have tokens
    sizes   int64 [I] tokens per item
    rows    int64 [3, N] for each axis, the tokens sorted by row; a row shares the item and the two other coordinates
    first   int64 [3, N] for each entry of `rows`, the index at which its row begins
    where   int64 [3, N] index of each token in `rows`
    long    whether an item has more than BLOCK_TOKENS tokens and is searched in blocks
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

    def sets(self, alive: Tensor, busy: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The sets A and B of round `number`, in the form that `nearest` takes: (order, starts, middles).

        order int64 [n] indexes the N tokens, sorted by block, A before B; starts and middles say where blocks and
        their B begin. alive bool [N] marks the tokens that are left, busy bool [N] those in items that still merge.
        """
        now = torch.nonzero(busy).flatten()
        if self.long:
            block, count = blocks(self.layout.take(now))
            by_block = torch.argsort(block, stable=True)
            now, block = now[by_block], block[by_block]
        else:  # one block per item; items that do not merge have empty blocks
            block, count = self.item[now], len(self.sizes)
        sizes = _counted(block, count)
        ends = sizes.cumsum(0)
        odd = self._ranks(alive, PATTERNS[number % len(PATTERNS)])[now] + number & 1
        odds = torch.zeros_like(sizes).index_add(0, block, odd)
        # If all tokens of a block have one parity (an image, split by t), every second token goes into B.
        alike = (odds == 0) | (odds == sizes)
        odds = torch.where(alike, (sizes + number % 2) // 2, odds)
        second = torch.arange(number, len(now) + number, device=now.device) - (ends - sizes)[block] & 1
        odd = torch.where(alike[block], second, odd)
        starts = torch.cat([ends.new_zeros(1), ends])
        return now[torch.argsort(2 * block + odd, stable=True)], starts, ends - odds

    def _ranks(self, alive: Tensor, axes: slice) -> Tensor:
        """int64 [N]: the sum over `axes` of a token's rank, its index among the tokens alive in its row."""
        here = alive[self.rows[axes]].long()
        before = here.cumsum(1) - here
        rank = before - before.gather(1, self.first[axes])
        return rank.gather(1, self.where[axes]).sum(0)

    def cheapest(
        self, order: Tensor, closest: Tensor, apart: Tensor, size: Tensor, price: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The merges of a round: (sources, targets), int64 [R] each, the lowest cost of an item first.

        Sources index the N tokens, at most `share` [I] per item; targets are positions in the sequence. `closest` and
        `apart` are the results of `nearest` for the tokens `order` [n].
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
    """Divides items into blocks of at most `limit` tokens: the block of each token, int64 [N], and the block count.

    A block that is too large is halved, by token count, along its longest axis (a frame counts as half a step). Every
    halving synchronises with the GPU once, to read how many blocks are still too large.
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
        before = large.cumsum(0) - large.long()  # number of earlier blocks that are halved too
        block, count = block + before[block] + later, count + more
    return block, count


def _counted(group: Tensor, count: int) -> Tensor:
    """Occurrences of each of 0 … count - 1 in `group`, int64; unlike torch.bincount, without a GPU synchronisation."""
    return group.new_zeros(count).index_add(0, group, torch.ones_like(group))


def spacetime_cost(vision: int, drop: float, rounds: int, width: int) -> tuple[int, int]:
    """(tokens left, FLOPs of the similarities) for one item of `vision` tokens, with A and B taken as equally large."""
    wanted = removal(vision, drop)
    done, number, flops = 0, 0, 0
    while done < wanted:
        now, share = vision - done, wanted * min(number + 1, rounds) // rounds - done
        halvings = 0
        while now > BLOCK_TOKENS << halvings:
            halvings += 1
        if share:
            flops += now * now // 2 * width >> halvings
        done, number = done + min(share, now // 2), number + 1
    return vision - wanted, flops
