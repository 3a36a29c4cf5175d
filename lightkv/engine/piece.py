"""A piece of a prompt: its tokens on their way through the layers, for one sequence or for one per question."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkv.engine.layers import Layers
from lightkv.engine.positions import Positions
from lightkv.engine.segments import Segment, Vision
from lightkv.vision.layout import TEXT, Span, VisionLayout, coordinates


@dataclass(frozen=True)
class Piece:
    """The n tokens of R sequences, concatenated without padding.

    hidden [n, D] · layout of the n tokens, no item in two sequences · size fp32 [n] · positions int64 [axes, n] ·
    angles: cos and sin [n, d] of these · place int64 [n]: each token's index in the piece before any stage, ascending
    within a sequence · lengths: R counts
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
        """Each sequence's slice of the n tokens."""
        return [slice(*ends) for ends in pairwise(accumulate(self.lengths, initial=0))]

    @cached_property
    def vision_tokens(self) -> int:
        """How many of the n tokens are vision; synchronises with the device once."""
        return int(self.layout.is_vision.sum())

    @classmethod
    def packed(cls, pieces: Sequence["Piece"]) -> "Piece":
        """One piece with the sequences of all of these."""
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
        """One piece per sequence; items keep their numbers."""
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
class LayerQK:
    """Queries and keys of one layer, [H, n, d], after RoPE: the next stage scores tokens with them."""

    q: Tensor
    k: Tensor
    scale: float


@dataclass(frozen=True)
class History:
    """What the stages have done to one sequence of a piece so far.

    states   per group of layers: the sequence as it enters the group
    targets  per stage int64 [n]: for each token of the piece, the token that it is merged into by then; -1: dropped
    """

    states: list[Piece] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def copy(self) -> "History":
        return History(list(self.states), list(self.targets))

    def into_final(self, place: Tensor) -> Tensor:
        """int64 [m]: the index in the final state that each of the tokens `place` is merged into; -1: dropped.

        Needs at least one stage.
        """
        target = self.targets[-1][place]
        return torch.where(target < 0, -1, torch.searchsorted(self.states[-1].place, target.clamp(min=0)))

    def vision_targets(self, first: int) -> list[Tensor]:
        """Per stage int64 [vision tokens of the piece]: `targets` of vision alone, numbered from `first`."""
        vision = torch.nonzero(self.states[0].layout.is_vision).flatten()
        number = torch.full_like(self.states[0].place, -1)
        number[vision] = torch.arange(len(vision), device=vision.device) + first
        return [torch.where(target[vision] < 0, -1, number[target[vision]]) for target in self.targets]


class PromptInput:
    """Turns a prompt's segments into pieces: embeds text, assigns positions and sizes, counts tokens.

    vision_tokens   of the prompt so far, including repeated frames that were not encoded
    text_tokens     of the prompt so far, without the questions
    encoded_tokens  vision tokens that the segments brought
    """

    def __init__(self, layers: Layers, positions: Positions) -> None:
        self._layers, self._positions = layers, positions
        self._items = 0  # images and videos so far
        self.vision_tokens = self.text_tokens = self.encoded_tokens = 0

    def piece(self, segments: Sequence[Segment]) -> tuple[Piece, Tensor]:
        """The next segments as a piece of one sequence, and int64 [n, 4] (item, t, y, x) in the prompt; text: TEXT."""
        device, dtype = self._layers.device, self._layers.dtype
        hidden, positions, sizes, length = [], [], [], 0
        where: list[Tensor] = []
        spans: list[Span] = []
        for segment in segments:
            if isinstance(segment, Vision):
                hidden.append(segment.features.to(device, dtype))
                positions.append(self._positions.vision(segment))
                sizes.append(segment.sizes)
                if segment.first and spans and spans[-1][0] + math.prod(spans[-1][1:]) == length:
                    begin, t, h, w = spans[-1]  # continues the previous item: one item to the stages
                    spans[-1] = (begin, t + segment.grid[0], h, w)
                else:
                    spans.append((length, *segment.grid))
                self._items += segment.first == 0
                place = coordinates(*segment.grid)
                place[:, 0] = segment.steps[place[:, 0]]
                where.append(F.pad(place, (1, 0), value=self._items - 1))
                self.vision_tokens += segment.stands_for
                self.encoded_tokens += len(segment)
            else:
                hidden.append(self._layers.embed(segment.ids))
                positions.append(self._positions.text(len(segment)))
                sizes.append(torch.ones(len(segment)))
                where.append(torch.tensor([TEXT, 0, 0, 0]).expand(len(segment), -1))
                self.text_tokens += len(segment)
            length += len(segment)
        layout = VisionLayout.grids(spans, length).to(device)
        size, place = torch.cat(sizes).to(device), torch.arange(length, device=device)
        taken = torch.cat(positions, 1).to(device)
        piece = Piece(torch.cat(hidden), layout, size, taken, self._layers.angles(taken), place, (length,))
        return piece, torch.cat(where).to(device)

    def questions(self, questions: Sequence[Tensor]) -> Piece:
        """Questions (token ids) as one sequence each, all at the positions right after the prompt so far."""
        device = self._layers.device
        longest = max(len(question) for question in questions)
        positions = self._positions.text(longest, taken=False).to(device)
        cos, sin = self._layers.angles(positions)
        pieces = []
        for question in questions:
            length = len(question)
            place = torch.arange(length, device=device)
            layout = VisionLayout.grids([], length).to(device)
            hidden, size = self._layers.embed(question), torch.ones(length, device=device)
            angles = cos[:length], sin[:length]
            pieces.append(Piece(hidden, layout, size, positions[:, :length], angles, place, (length,)))
        return Piece.packed(pieces)

    def state(self) -> Any:
        """Counts and positions, for `restore`."""
        counts = self.vision_tokens, self.text_tokens, self.encoded_tokens, self._items
        return counts, dict(self._positions.__dict__)

    def restore(self, state: Any) -> None:
        """Undo everything since `state`."""
        (self.vision_tokens, self.text_tokens, self.encoded_tokens, self._items), positions = state
        self._positions.__dict__.update(positions)
