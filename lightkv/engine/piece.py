"""Tokens on their way through the layers: a piece of a prompt, once or for each of several questions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lightkv.vision.layout import VisionLayout


@dataclass(frozen=True)
class Piece:
    """The n tokens of R sequences, one after another without padding.

    hidden [n, D] · layout of the n tokens, no item in two sequences · size fp32 [n] · positions int64 [axes, n] ·
    angles: cos and sin [n, d] of these · place int64 [n]: which tokens of its whole piece they are, ascending within a
    sequence · lengths: R counts
    """

    hidden: Tensor
    layout: VisionLayout
    size: Tensor
    positions: Tensor
    angles: tuple[Tensor, Tensor]
    place: Tensor
    lengths: tuple[int, ...]

    @property
    def parts(self) -> list[slice]:
        """Of the n tokens, sequence by sequence."""
        return [slice(*ends) for ends in pairwise(accumulate(self.lengths, initial=0))]

    @cached_property
    def vision_tokens(self) -> int:
        """How many of the n tokens are vision; asked of the device once."""
        return int(self.layout.is_vision.sum())

    @classmethod
    def packed(cls, pieces: Sequence["Piece"]) -> "Piece":
        """The sequences of all pieces."""
        if len(pieces) == 1:
            return pieces[0]
        return cls(
            torch.cat([piece.hidden for piece in pieces]),
            VisionLayout.packed([piece.layout for piece in pieces]),
            torch.cat([piece.size for piece in pieces]),
            torch.cat([piece.positions for piece in pieces], dim=1),
            (torch.cat([piece.angles[0] for piece in pieces]), torch.cat([piece.angles[1] for piece in pieces])),
            torch.cat([piece.place for piece in pieces]),
            tuple(length for piece in pieces for length in piece.lengths),
        )

    def split(self) -> list["Piece"]:
        """Each sequence by itself, items numbered as they were."""
        if len(self.lengths) == 1:
            return [self]
        return [
            Piece(
                self.hidden[part],
                self.layout.take(torch.arange(part.start, part.stop, device=self.place.device)),
                self.size[part],
                self.positions[:, part],
                (self.angles[0][part], self.angles[1][part]),
                self.place[part],
                (part.stop - part.start,),
            )
            for part in self.parts
        ]


@dataclass(frozen=True)
class Heard:
    """Queries and keys of one layer, [H, n, d], for the scores of the stage after it."""

    q: Tensor
    k: Tensor
    scale: float


@dataclass(frozen=True)
class Passage:
    """One sequence's way so far: per group of layers what it was there, and per stage where its tokens went.

    targets int64 [n] per stage: the token of the whole piece that each of its tokens is part of by then; -1: dropped
    """

    states: list[Piece] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def branched(self) -> "Passage":
        return Passage(list(self.states), list(self.targets))
