"""Folding: the cache of early layers after the stages of later ones, so that all layers end at the same size.

The paper leaves layers before a stage at their full length. Once a piece of the prompt is through, nothing but later
tokens will look at them, and these can do with the merged ones: keys and values of tokens that became one are averaged
by size, keys without their rotation, which the survivor's own place then gives back. What a stage dropped is left out.
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
    """k, v [Hkv, m, d] of the m survivors from those of n tokens, k, v [Hkv, n, d].

    angles (cos, sin) [n, d] of the n tokens · size fp32 [n] · into int64 [n] the survivor that each is
    part of, -1: dropped · survivors int64 [m] and place int64 [n], ascending: which tokens of the piece they are
    """
    own = torch.searchsorted(place, survivors)  # a survivor's own entry among the n
    raw = unturned(k.float(), (angles[0].float(), angles[1].float()))
    k_mean, v_mean = (mean_by_size(states, size, into, len(survivors)) for states in (raw, v.float()))
    angles_own = angles[0][own].float(), angles[1][own].float()
    return turned(k_mean, angles_own).to(k.dtype), v_mean.to(v.dtype)


def mean_by_size(states: Tensor, size: Tensor, into: Tensor, count: int) -> Tensor:
    """Means by size, fp32 [H, count, d]."""
    alive = torch.nonzero(into >= 0).flatten()
    weight = size[alive]
    total = states.new_zeros(count).index_add(0, into[alive], weight)
    weighted = states[:, alive] * weight[:, None]
    return (
        states.new_zeros(states.shape[0], count, states.shape[2]).index_add(1, into[alive], weighted) / total[:, None]
    )
