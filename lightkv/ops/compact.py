"""Applies the last merges of a stage and gathers the surviving tokens in one pass: each is read and written once.

    merge(hidden, weight, source, target), then hidden[kept], weight[kept], columns[:, kept]

RoPE positions are part of `columns`. The tables of cos and sin are gathered separately, by one index operation each:
inside the pass they would cause the same reads and writes. Gathering is much cheaper than computing them again, which
takes ten operations ("angles" in jobs/measure/benchmark). The stage itself records where every token was merged,
because that covers all tokens and not only the survivors.
"""

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.dispatch import use_triton
from lightkv.ops.merge import check_pairs, merge_into


def compact(
    hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor, kept: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows `kept` of hidden and weight after `merge`, bit for bit, and of columns. Arguments are not changed.

    hidden   [S, D]
    weight   fp32 [S], ≥ 0
    source   int64 [R], without repeats; a source is neither a target nor in kept
    target   int64 [R], may repeat; all targets are in kept
    kept     int64 [K], ascending
    columns  int64 [C, S]: integers of each token

    → hidden [K, D], weight [K], columns [C, K]. Raises ConfigError for other shapes and types. The values in tensors
    are not checked.
    """
    check_pairs(hidden, weight, source, target)
    if kept.dtype != torch.int64 or kept.ndim != 1:
        raise ConfigError(f"kept must be int64 with one dimension, got {kept.dtype} {list(kept.shape)}")
    if columns.dtype != torch.int64 or columns.ndim != 2 or columns.shape[1] != len(hidden):
        raise ConfigError(f"columns must be int64 [C, {len(hidden)}], got {columns.dtype} {list(columns.shape)}")
    if use_triton(hidden):
        from lightkv.ops.compact_kernel import compact_triton

        return compact_triton(hidden, weight, source, target, kept, columns)
    return compact_torch(hidden, weight, source, target, kept, columns)


def compact_torch(
    hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor, kept: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin: gathers the survivors, then merges the sources into the copies."""
    rows, weights = hidden.index_select(0, kept), weight.index_select(0, kept)
    merge_into(rows, weights, torch.searchsorted(kept.contiguous(), target.contiguous()), hidden, weight, source)
    return rows, weights, columns.index_select(1, kept)
