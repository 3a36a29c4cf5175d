"""Message aggregation (method step 5): a merged token is the guidance-weighted mean of its members."""

import torch
from torch import Tensor


def merge(hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """x_b ← (w_b x_b + Σ w_a x_a) / (w_b + Σ w_a) for every b in `target`, and w_b ← w_b + Σ w_a.

    Σ w x over the tokens that remain is what it was over all. Tokens that nothing merges into keep their bits.
    Where all weights of a group are 0 (no prompt, or votes below fp32's reach) its members weigh the same.

    hidden [S, D], weight fp32 [S], source and target int64 [R] (targets may repeat) → new hidden, new weight.
    """
    receiver, slot = torch.unique(target, return_inverse=True)
    own, given = weight[receiver], weight[source]
    total = _add(own, slot, given)
    silent = total == 0
    own, given = own.masked_fill(silent, 1.0), given.masked_fill(silent[slot], 1.0)
    share = _add(own, slot, given)
    mean = hidden[receiver].float() * (own / share)[:, None]
    mean = _add(mean, slot, hidden[source].float() * (given / share[slot])[:, None])
    return hidden.index_copy(0, receiver, mean.to(hidden.dtype)), weight.index_copy(0, receiver, total)


def _add(base: Tensor, slot: Tensor, values: Tensor) -> Tensor:
    """base[slot] += values in a fixed order; index_add is not deterministic on CUDA, accumulating index_put is."""
    return base.index_put((slot,), values, accumulate=True)
