"""The last merges of a stage and the gathering of who is left, in one pass: a survivor is read and written once.

    merge(hidden, weight, source, target), then hidden[kept], weight[kept], columns[:, kept]

RoPE positions go along as `columns`; their tables of cos and sin are gathered beside it, by an index operation each:
nothing else in the pass is made of them, so that it would read and write the same. Gathered they are much cheaper than
computed anew, which takes ten operations ("angles" in jobs/measure/benchmark). Where every token went is of all tokens,
not of survivors alone, and is kept by the stage itself.
"""

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.dispatch import use_triton
from lightkv.ops.merge import check_pairs, merge_into


def compact(
    hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor, kept: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows `kept` of hidden and weight after `merge` (merge.py), bit for bit, and of columns; all stays as it is.

    hidden [S, D] · weight fp32 [S], ≥ 0 · source and target int64 [R]: targets may repeat and are kept, a source comes
    once and is neither a target nor kept · kept int64 [K], ascending · columns int64 [C, S]: what goes along with a
    token. → hidden [K, D], weight [K], columns [C, K]. Raises ConfigError for other shapes and types; contents are not
    looked at.
    """
    check_pairs(hidden, weight, source, target)
    if kept.dtype != torch.int64 or kept.ndim != 1:
        raise ConfigError(f"kept must be int64 in one dimension, got {kept.dtype} {list(kept.shape)}")
    if columns.dtype != torch.int64 or columns.ndim != 2 or columns.shape[1] != len(hidden):
        raise ConfigError(f"columns must be int64 [C, {len(hidden)}], got {columns.dtype} {list(columns.shape)}")
    if use_triton(hidden):
        from lightkv.ops.compact_kernel import compact_triton

        return compact_triton(hidden, weight, source, target, kept, columns)
    return compact_torch(hidden, weight, source, target, kept, columns)


def compact_torch(
    hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor, kept: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin: the survivors as they are, then what merges is merged into the copies."""
    rows, weights = hidden.index_select(0, kept), weight.index_select(0, kept)
    merge_into(rows, weights, torch.searchsorted(kept.contiguous(), target.contiguous()), hidden, weight, source)
    return rows, weights, columns.index_select(1, kept)
