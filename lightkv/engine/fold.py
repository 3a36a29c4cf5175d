"""Folding: reduces the cache of early layers to the tokens that the last stage left, so that all layers end equal.

The paper keeps layers before a stage at their full length. After a piece has passed all layers, only later tokens
attend to these layers, and for them the merged tokens suffice. Keys and values of merged tokens are averaged by size;
keys are averaged without their rotation and then rotated to the survivor's position. Dropped tokens are removed.
"""

import torch
from torch import Tensor

from lightkv.engine.layerkv import LayerKV
from lightkv.engine.piece import History, Piece
from lightkv.engine.positions import turned, unturned


def fold_layer(layer: LayerKV, mark: int, entered: Piece, history: History, log_size: Tensor) -> None:
    """Fold a layer's entries after `mark`, one per token of `entered`, to the final state of the piece.

    log_size fp32 [m] of the final state.
    """
    k, v, _ = layer.since(mark)
    into, survivors = history.into_final(entered.place), history.states[-1].place
    k, v = folded(k, v, entered.angles, entered.size, into, survivors, entered.place)
    layer.truncate(mark)
    layer.push(k, v, log_size)


def folded(
    k: Tensor,
    v: Tensor,
    angles: tuple[Tensor, Tensor],
    size: Tensor,
    into: Tensor,
    survivors: Tensor,
    place: Tensor,
) -> tuple[Tensor, Tensor]:
    """k, v [Hkv, m, d] of the m survivors, from k, v [Hkv, n, d] of all n tokens.

    angles (cos, sin) [n, d] of the n tokens · size fp32 [n] · into int64 [n]: the survivor that each is merged into,
    -1: dropped · survivors int64 [m] and place int64 [n], ascending: their indices in the piece
    """
    own = torch.searchsorted(place, survivors)  # each survivor's index among the n
    raw = unturned(k.float(), (angles[0].float(), angles[1].float()))
    k_mean, v_mean = (mean_by_size(states, size, into, len(survivors)) for states in (raw, v.float()))
    angles_own = angles[0][own].float(), angles[1][own].float()
    return turned(k_mean, angles_own).to(k.dtype), v_mean.to(v.dtype)


def mean_by_size(states: Tensor, size: Tensor, into: Tensor, count: int) -> Tensor:
    """Means of states [H, n, d] over the tokens merged `into` each of `count`, weighted by size: fp32 [H, count, d]."""
    alive = torch.nonzero(into >= 0).flatten()
    weight = size[alive]
    total = states.new_zeros(count).index_add(0, into[alive], weight)
    weighted = states[:, alive] * weight[:, None]
    return (
        states.new_zeros(states.shape[0], count, states.shape[2]).index_add(1, into[alive], weighted) / total[:, None]
    )
