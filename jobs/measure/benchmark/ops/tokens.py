"""Set up a stage's operations as methods call them: nearest, merge, compact, softmax_votes, and RoPE after them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from jobs.measure.benchmark.ops.bytes import (
    angles_bytes,
    compact_bytes,
    merge_bytes,
    nearest_bytes,
    pair_flops,
    votes_bytes,
)
from jobs.measure.benchmark.ops.op import OpWork
from jobs.measure.benchmark.prompt import TEXT, layout_of, states_of
from jobs.measure.benchmark.scale import Scale
from lightkv.methods.spacetime import BLOCK_TOKENS, Field, places
from lightkv.methods.windows import Windows
from lightkv.ops.compact import compact, compact_torch
from lightkv.ops.heads import Reduce
from lightkv.ops.merge import merge, merge_torch
from lightkv.ops.nearest import nearest, nearest_torch
from lightkv.ops.ragged import Groups, Selection, Sequences
from lightkv.ops.votes import softmax_votes, softmax_votes_torch

DISTANCE = 0.02  # the default of LightKVConfig
COLUMNS = 8  # integers per token: item, t, y, x, three positions, its place in the prompt
MERGE_GATHER, GATHERED = "merge, gather", "gathered"


def nearest_in_blocks(scale: Scale, tokens: int) -> OpWork:
    """nearest in spacetime's first round: blocks of BLOCK_TOKENS in space and time, every second token in A."""
    layout = layout_of(tokens, text=False).to(scale.device)
    everything = torch.ones(tokens, dtype=torch.bool, device=scale.device)
    order, starts, middles = Field.of(layout).sets(everything, everything, 0)
    return _nearest(scale, places(layout), Groups(order, starts, middles, min(BLOCK_TOKENS, tokens)), DISTANCE)


def nearest_in_windows(scale: Scale, tokens: int, stage: int) -> OpWork:
    """nearest in a stage of the published method: windows on every frame, tokens 0, 2, 4 … of each in A."""
    windows = Windows.cut(layout_of(tokens, text=False).to(scale.device), scale.op_schedule.stages[stage].windows)
    return _nearest(scale, None, Groups(*windows.sets()), 0.0)


def _nearest(scale: Scale, place: Tensor | None, groups: Groups, distance: float) -> OpWork:
    tokens, width = len(groups.order), scale.shape.hidden
    hidden = states_of(layout_of(tokens, text=False), 1, width, scale.device, scale.dtype)[0]
    unit = torch.full((tokens,), width**-0.5, device=scale.device)
    arguments = (hidden, unit, place, groups, distance)
    pairs = int(((groups.middles - groups.starts[:-1]) * (groups.starts[1:] - groups.middles)).sum())
    return OpWork(
        partial(nearest, *arguments),
        partial(nearest_torch, *arguments),
        nearest_bytes(tokens, len(groups.middles), width, scale.element, place is not None),
        pair_flops(pairs, width),
    )


def merging(scale: Scale, tokens: int, one_in: int) -> OpWork:
    """merge: one in `one_in` tokens merges into a random token that stays; several may share a target."""
    hidden, weight, source, target, _ = _pairs(scale, tokens, one_in)
    arguments = (hidden, weight, source, target)
    moved = merge_bytes(len(source), len(target.unique()), scale.shape.hidden, scale.element)
    return OpWork(partial(merge, *arguments), partial(merge_torch, *arguments), moved)


def compacting(scale: Scale, tokens: int, one_in: int) -> OpWork:
    """compact: the same merges, and gathering the rest; MERGE_GATHER merges on a copy, then gathers."""
    hidden, weight, source, target, kept = _pairs(scale, tokens, one_in)
    columns = torch.randint(tokens, (COLUMNS, tokens), device=scale.device)
    arguments = (hidden, weight, source, target, kept, columns)
    return OpWork(
        partial(compact, *arguments),
        partial(compact_torch, *arguments),
        compact_bytes(len(source), len(kept), scale.shape.hidden, scale.element, COLUMNS),
        beside={MERGE_GATHER: partial(_merge_and_gather, *arguments)},
    )


def _pairs(scale: Scale, tokens: int, one_in: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random hidden, weight, source, target and kept."""
    shuffled = torch.randperm(tokens, device=scale.device)
    source, stays = shuffled[: tokens // one_in].sort().values, shuffled[tokens // one_in :].sort().values
    target = stays[torch.randint(len(stays), source.shape, device=scale.device)]
    hidden = torch.randn(tokens, scale.shape.hidden, device=scale.device, dtype=scale.dtype)
    return hidden, torch.ones(tokens, device=scale.device), source, target, stays


def _merge_and_gather(
    hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor, kept: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    hidden, weight = hidden.clone(), weight.clone()
    merge(hidden, weight, source, target)
    return hidden[kept], weight[kept], [column[kept] for column in columns]


def angles(scale: Scale, tokens: int) -> OpWork:
    """cos and sin of the remaining half of the tokens, from positions; GATHERED selects rows of a full table."""
    decoder = next(decoder for decoder in scale.decoders if decoder.shape == scale.shape)
    narrow = replace(scale.shape, layers=1, hidden=scale.shape.head_dim, heads=1, kv_heads=1, vocabulary=128)
    rotary = replace(decoder, shape=narrow).build(scale.device, scale.dtype).get_decoder().rotary_emb
    like = torch.empty(0, device=scale.device, dtype=scale.dtype)
    shape = (3, 1, tokens) if decoder.kind.axes == 3 else (1, tokens)
    positions = torch.randint(tokens, shape, device=scale.device)
    kept = torch.randperm(tokens, device=scale.device)[: tokens // 2].sort().values
    left, tables = positions[..., kept].contiguous(), rotary(like, positions)
    rows = tables[0].numel() // (tokens * scale.shape.head_dim)
    moved = angles_bytes(len(kept), decoder.kind.axes, rows, scale.shape.head_dim, scale.element)
    return OpWork(None, partial(rotary, like, left), moved, beside={GATHERED: _rows(tables, kept)})


def _rows(tables: tuple[Tensor, Tensor], kept: Tensor) -> Callable[[], list[Tensor]]:
    return lambda: [table.index_select(-2, kept) for table in tables]


def votes(scale: Scale, tokens: int, reduce: Reduce) -> OpWork:
    """softmax_votes on a prompt of `tokens` vision tokens and TEXT text tokens.

    "sum" is the published guidance: the text's keys vote on all queries. "max" is the question's attention: vision keys
    and the text's queries.
    """
    shape, length = scale.shape, tokens + TEXT
    q = torch.randn(1, length, shape.heads, shape.head_dim, device=scale.device, dtype=scale.dtype).transpose(1, 2)
    k = torch.randn(1, shape.kv_heads, length, shape.head_dim, device=scale.device, dtype=scale.dtype)
    place = torch.arange(length, device=scale.device)
    long, short, long_index = (q, k, place) if reduce == "sum" else (k, q, place[:tokens])
    many = len(long_index)
    voted = Selection(long, long_index, Sequences.of([many], scale.device))
    voting = Selection(short, place[tokens:], Sequences.of([TEXT], scale.device))
    arguments = (voted, voting, shape.head_dim**-0.5, reduce)
    return OpWork(
        partial(softmax_votes, *arguments),
        partial(softmax_votes_torch, *arguments),
        votes_bytes(many, long.shape[1], TEXT, short.shape[1], shape.head_dim, scale.element),
        pair_flops(many * TEXT, shape.heads * shape.head_dim),
    )
