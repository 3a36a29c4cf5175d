"""Merging in space and time: tokens become one with their nearest in place and content, where there is most to spare.

A stage takes rounds. In a round the tokens of an item are split by a parity of their place: first of t + y + x, a
checkerboard in space and time, so that the nearest neighbours of every a in A are in B, then of other sums in turn
(PATTERNS), so that what one split keeps apart the next brings together. Each a looks for the b from which it differs
least in content and place,

    d(a, b) = ‖x_a − x_b‖² / 2s² + λ · dist(a, b),    dist = sqrt(Δt²/4 + Δy² + Δx²) in grid steps,

s² being the item's mean ‖x‖² before the stage (for vectors of length s the first term is 1 − cos). All a of the item
are ranked together by n_a n_b / (n_a + n_b) · d(a, b), n being sizes: what a merge adds to the variance within tokens
(Ward's criterion), so that the rate goes where the redundancy is and no token swallows the rest. The least merge by
size: x_b ← (n_b x_b + Σ n_a x_a) / (n_b + Σ n_a), n_b ← n_b + Σ n_a. A survivor keeps its place. Where the layer before
has shown what the question attends to, the rank of an a is multiplied by a price that grows with that, so that what
matters to the question merges late. Long items are searched in blocks of space and time, and ranked as a whole.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightkv.layout import VisionLayout
from lightkv.matching import FEATURES_AT_ONCE, SCORES_AT_ONCE
from lightkv.merging import merge
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
    hidden, size, layout = tokens.hidden, tokens.size, tokens.layout
    target = torch.arange(len(layout), device=hidden.device)
    alive = layout.mergeable
    wanted = removals(torch.bincount(layout.item[alive], minlength=len(layout.grid)), stage.drop)
    unit, price = _unit(hidden, layout), _price(tokens)
    done, turn = torch.zeros_like(wanted), 0
    while bool((done < wanted).any()):
        share = wanted * min(turn + 1, config.rounds) // config.rounds - done
        busy = torch.nonzero(alive & (share[layout.item] > 0)).flatten()
        source, into = pairs(hidden, unit, size, price, layout, busy, share, turn, config.distance)
        hidden, size = merge(hidden, size, source, into)
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

    FLOOR + score / the largest score of a vision token; 1 for all without scores, or where all of them are 0.
    """
    score, vision = tokens.score, tokens.layout.mergeable
    if score is None or not bool(vision.any()) or not bool(score[vision].max() > 0):
        return torch.ones(len(tokens.layout), device=tokens.hidden.device)
    return FLOOR + score.float() / score[vision].max().float()


def pairs(
    hidden: Tensor,
    unit: Tensor,
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
    tokens = layout.take(index)
    block = blocks(tokens)
    in_b = sides(tokens, block, turn)
    closest, apart = _closest(hidden[index], unit[index], tokens, block, in_b, distance)
    source = torch.nonzero(~in_b & (apart < torch.inf)).flatten()
    own, other = size[index[source]], size[index[closest[source]]]
    source = source[torch.argsort(price[index[source]] * own * other / (own + other) * apart[source], stable=True)]
    source = source[torch.argsort(tokens.item[source], stable=True)]
    item = tokens.item[source]
    source = source[_rank(item) < share[item]]
    return index[source], index[closest[source]]


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
    t, y, x = PATTERNS[turn % len(PATTERNS)]
    odd = (t * tokens.t + y * tokens.y + x * tokens.x + turn) % 2
    sizes = torch.bincount(block)
    odds = torch.bincount(block[odd == 1], minlength=len(sizes))
    order = torch.argsort(block, stable=True)
    rank = torch.empty_like(block)
    rank[order] = _rank(block[order])
    one_parity = (odds == 0) | (odds == sizes)
    return torch.where(one_parity[block], (rank + turn) % 2, odd) == 1


def _rank(group: Tensor) -> Tensor:
    """Place of each element within its run of equal values in a sorted tensor."""
    _, run, length = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    return torch.arange(len(group), device=group.device) - (length.cumsum(0) - length)[run]


def _closest(
    hidden: Tensor, unit: Tensor, tokens: VisionLayout, block: Tensor, in_b: Tensor, distance: float
) -> tuple[Tensor, Tensor]:
    """For each a: its nearest b and d(a, b), int64 and fp32 [N]; inf where a block has no b, and for b's."""
    closest = torch.zeros_like(block)
    apart = torch.full(block.shape, torch.inf, dtype=torch.float32, device=hidden.device)
    place = torch.stack([tokens.t / 2, tokens.y, tokens.x]).float()
    slots = torch.argsort(2 * block + in_b.long(), stable=True)  # by block, its A before its B
    sizes = torch.bincount(block)
    start, of_b = sizes.cumsum(0) - sizes, torch.bincount(block[in_b], minlength=len(sizes))
    of_a = sizes - of_b
    for chunk, most_a, most_b in _chunks(of_a, of_b, hidden.shape[1]):
        first, count_a, count_b = start[chunk, None], of_a[chunk, None], of_b[chunk, None]
        slot = torch.arange(most_b, device=hidden.device)
        missing = slot >= count_b
        token_b = slots[(first + count_a + slot).masked_fill(missing, 0)]
        features_b, half_b = _features(hidden, unit, token_b)
        step = max(1, SCORES_AT_ONCE // (len(chunk) * most_b))
        for slot in torch.arange(most_a, device=hidden.device).split(step):
            present = slot < count_a
            token_a = slots[(first + slot).masked_fill(~present, 0)]
            features_a, half_a = _features(hidden, unit, token_a)
            differ = (half_a[:, :, None] + half_b[:, None] - torch.bmm(features_a, features_b.transpose(1, 2))).clamp_(
                0
            )
            squares = sum((axis[token_a][:, :, None] - axis[token_b][:, None]).square() for axis in place)
            differ += distance * torch.sqrt(torch.as_tensor(squares))
            least, which = differ.masked_fill_(missing[:, None], torch.inf).min(dim=-1)
            closest[token_a[present]] = token_b.gather(1, which)[present]
            apart[token_a[present]] = least[present]
    return closest, apart


def _features(hidden: Tensor, unit: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """x / s in fp32 [..., D], and half of its squared length."""
    features = hidden[token].float() * unit[token][..., None]
    return features, features.square().sum(dim=-1) / 2


def _chunks(of_a: Tensor, of_b: Tensor, width: int) -> Iterator[tuple[Tensor, int, int]]:
    """Blocks of like size in bounded batches: (block numbers, largest set A, largest set B)."""
    by_size = torch.argsort(of_a + of_b, descending=True, stable=True)
    counts = list(zip(of_a[by_size].tolist(), of_b[by_size].tolist(), strict=True))
    first = 0
    while first < len(counts) and sum(counts[first]) > 1:
        most_a, most_b, last = *counts[first], first + 1
        while last < len(counts) and 2 * sum(counts[last]) > max(2, sum(counts[first])):
            next_a, next_b, many = max(most_a, counts[last][0]), max(most_b, counts[last][1]), last + 1 - first
            if many * next_a * next_b > SCORES_AT_ONCE or many * (next_a + next_b) * width > FEATURES_AT_ONCE:
                break
            most_a, most_b, last = next_a, next_b, last + 1
        yield by_size[first:last], most_a, most_b
        first = last


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
