"""Runs pieces and questions through some of the layers, attending to the caches of these layers."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightkv.engine.layerkv import LayerKV
from lightkv.engine.layers import Layers
from lightkv.engine.piece import LayerQK, Piece
from lightkv.ops.attend import attend
from lightkv.ops.attend_packed import attend_packed
from lightkv.ops.ragged import Keys, Sequences

# With more keys than this, attention runs sequence by sequence on the caches in place instead of concatenating them for
# one kernel launch.
KEYS_AT_ONCE = 65_536

Caches = Sequence[Sequence[LayerKV]]
"""Per sequence: the cache of every layer, or of the first layers."""


def run_piece(
    layers: Layers, which: range, piece: Piece, caches: Caches, log_size: Tensor, needs_qk: bool
) -> tuple[Piece, list[LayerQK]]:
    """A piece after the layers `which`; with needs_qk also each sequence's queries and keys in the last of them.

    Appends keys, values and log_size fp32 [n] to the caches.
    """
    last: list[LayerQK] = []

    def attend_to(index: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        held = [cache[index] for cache in caches]
        for layer, part in zip(held, piece.parts, strict=True):
            layer.push(k[0][:, part], v[0][:, part], log_size[part])
            if needs_qk and index == which[-1]:
                last.append(LayerQK(q[0][:, part], k[0][:, part], scale))
        return _attend(held, q, piece, scale)

    hidden = layers.run(piece.hidden[None], piece.angles, which, attend_to)[0]
    return replace(piece, hidden=hidden), last


def run_questions(
    layers: Layers,
    which: range,
    questions: Piece,
    caches: Caches,
    tails: Sequence[list[tuple[Tensor, Tensor]]] | None = None,
) -> tuple[Piece, list[LayerQK]]:
    """Questions after the layers `which`, and each one's queries and keys in the last of them.

    The caches stay as they are. Each question's own k, v [Hkv, T, d] per layer are appended to `tails`.
    """
    last: list[LayerQK] = []

    def attend_to(index: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        outputs = []
        for number, (cache, part) in enumerate(zip(caches, questions.parts, strict=True)):
            q_own, k_own, v_own = q[:, :, part], k[0][:, part], v[0][:, part]
            if index == which[-1]:
                last.append(LayerQK(q_own[0], k_own, scale))
            if tails is not None:
                tails[number].append((k_own, v_own))
            layer, mark = cache[index], len(cache[index])  # questions may share the layer: one after another
            layer.push(k_own, v_own, torch.zeros_like(questions.size[part]))
            outputs.append(_attend_one(layer, q_own, scale))
            layer.truncate(mark)
        return torch.cat(outputs, dim=1)

    hidden = layers.run(questions.hidden[None], questions.angles, which, attend_to)[0]
    return replace(questions, hidden=hidden), last


def _attend(layers: Sequence[LayerKV], q: Tensor, piece: Piece, scale: float) -> Tensor:
    """Causal attention of each sequence's tokens, the last in its cache, over its cache.

    q [1, Hq, n, d] → [1, n, Hq, d].
    """
    if len(layers) > 1 and sum(len(layer) for layer in layers) <= KEYS_AT_ONCE:
        return _attend_in_one_launch([layer.view() for layer in layers], q, piece.lengths, scale)
    outputs = [_attend_one(layer, q[:, :, part], scale) for layer, part in zip(layers, piece.parts, strict=True)]
    return torch.cat(outputs, dim=1)


def _attend_one(layer: LayerKV, q: Tensor, scale: float) -> Tensor:
    k, v, log_size = layer.view()
    return attend(q, k[None], v[None], log_size[None], None, scale)


def _attend_in_one_launch(
    views: list[tuple[Tensor, Tensor, Tensor]], q: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    k, v = (torch.cat([view[side] for view in views], dim=1).transpose(0, 1) for side in (0, 1))
    keys = Keys(k, v, torch.cat([view[2] for view in views]))
    sequences = (Sequences.of(lengths, q.device), Sequences.of([len(view[2]) for view in views], q.device))
    return attend_packed(q[0].transpose(0, 1), keys, *sequences, scale)[None]
