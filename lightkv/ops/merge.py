"""Merges tokens in place: a merged token is the weighted mean of its members (message aggregation, method step 5).

    x_b ← (w_b x_b + Σ w_a x_a) / (w_b + Σ w_a),    w_b ← w_b + Σ w_a

Σ w x over the remaining tokens equals Σ w x over all tokens before, up to rounding.
"""

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.dispatch import use_triton

FEATURES_AT_ONCE = 1 << 25  # fp32 features in memory at once in the twin: 128 MiB
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def merge(hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor) -> None:
    """Merges hidden[source[r]] into hidden[target[r]] for all r, IN PLACE on hidden and weight.

    Rows that are not a target, sources included, keep their bits. If all weights of a merged token's members are 0 (no
    prompt, or votes that underflow fp32), the members count equally. Sums are fp32 in ascending order of r, so every
    run gives the same result.

    hidden  [S, D]
    weight  fp32 [S], ≥ 0
    source  int64 [R], without repeats; a source is not a target
    target  int64 [R], may repeat

    Raises ConfigError for other shapes and types. The values in tensors are not checked.
    """
    check_pairs(hidden, weight, source, target)
    if use_triton(hidden):
        from lightkv.ops.merge_kernel import merge_triton

        merge_triton(hidden, weight, source, target)
    else:
        merge_torch(hidden, weight, source, target)


def merge_torch(hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor) -> None:
    """The twin. index_add adds in row order on CPUs, but in any order on GPUs, where the kernel should run."""
    merge_into(hidden, weight, target, hidden, weight, source)


def merge_into(rows: Tensor, weights: Tensor, target: Tensor, hidden: Tensor, weight: Tensor, source: Tensor) -> None:
    """Merges hidden[source[r]] into rows[target[r]], IN PLACE on rows and weights, which may be hidden and weight."""
    if not len(source):
        return
    receiver, group = torch.unique(target, return_inverse=True)
    own, given = weights[receiver], weight[source]
    total = own.index_add(0, group, given)
    silent = total == 0
    share = torch.where(silent, torch.bincount(group, minlength=len(receiver)) + 1.0, total)
    own = own.masked_fill_(silent, 1.0) / share
    given = given.masked_fill_(silent[group], 1.0) / share[group]
    step = max(1, FEATURES_AT_ONCE // max(1, len(receiver) + len(source)))
    for left, right in zip(rows.split(step, dim=1), hidden.split(step, dim=1), strict=True):
        mean = left.index_select(0, receiver).float().mul_(own[:, None])
        mean.index_add_(0, group, right.index_select(0, source).float().mul_(given[:, None]))
        left.index_copy_(0, receiver, mean.to(rows.dtype))
    weights.index_copy_(0, receiver, total)


def check_pairs(hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor) -> None:
    """Raises ConfigError for shapes and types that `merge` does not accept."""
    if hidden.ndim != 2 or hidden.dtype not in DTYPES:
        raise ConfigError(f"hidden must be floating-point [S, D], got {hidden.dtype} {list(hidden.shape)}")
    if weight.dtype != torch.float32 or weight.shape != hidden.shape[:1]:
        raise ConfigError(f"weight must be fp32 [{len(hidden)}], got {weight.dtype} {list(weight.shape)}")
    for name, tensor in (("source", source), ("target", target)):
        if tensor.dtype != torch.int64 or tensor.ndim != 1:
            raise ConfigError(f"{name} must be int64 with one dimension, got {tensor.dtype} {list(tensor.shape)}")
    if len(source) != len(target):
        raise ConfigError(f"source and target must have the same length, got {len(source)} and {len(target)}")
