"""Prompts as random embeddings: a video whose frames are equal except for noise, between text tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv import ConfigError, VisionLayout

TEXT_BEFORE, TEXT_AFTER = 16, 48
TEXT = TEXT_BEFORE + TEXT_AFTER
SIDE = 16  # of a frame, in tokens
NOISE = 0.3  # standard deviation of a frame's own part, relative to the part that all frames share


def grid_of(vision: int) -> tuple[int, int, int]:
    """(t, h, w): frames of 16 × 16 tokens if that divides, else one square; raises ConfigError for other numbers."""
    side = math.isqrt(vision)
    if vision > 0 and vision % SIDE**2 == 0:
        return vision // SIDE**2, SIDE, SIDE
    if vision > 0 and side * side == vision:
        return 1, side, side
    raise ConfigError(f"vision tokens must be a square or a multiple of {SIDE**2}, got {vision}")


def layout_of(vision: int, text: bool = True) -> VisionLayout:
    """One video (or image) of `vision` tokens, alone or between TEXT_BEFORE and TEXT_AFTER text tokens."""
    start, length = (TEXT_BEFORE, vision + TEXT) if text else (0, vision)
    return VisionLayout.grids([(start, *grid_of(vision))], length)


def states_of(layout: VisionLayout, batch: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random [B, S, D] of about unit variance; all frames share one scene, as in a still video."""
    states = torch.randn(batch, len(layout), width, device=device, dtype=dtype)
    vision = torch.nonzero(layout.is_vision).flatten().to(device)
    _, height, columns = layout.grid[0].tolist()
    scene = torch.randn(batch, height * columns, width, device=device, dtype=dtype)
    for frame in vision.split(height * columns):
        states[:, frame] = scene + NOISE * states[:, frame]
    return states


@dataclass(frozen=True)
class Prompt:
    """embeds [B, S, D] · one layout per row · positions [3, B, S] for models with three axes, else None."""

    embeds: Tensor
    layouts: list[VisionLayout]
    positions: Tensor | None

    @classmethod
    def of(cls, vision: int, batch: int, width: int, axes: int, device: torch.device, dtype: torch.dtype) -> "Prompt":
        layout = layout_of(vision)
        embeds = states_of(layout, batch, width, device, dtype)
        positions = None
        if axes == 3:
            positions = three_axes(layout)[:, None].expand(-1, batch, -1).to(device)
        return cls(embeds, [layout.to(device)] * batch, positions)

    def next_positions(self, step: int) -> Tensor | None:
        """Positions [3, B, 1] of the token decoded `step` steps after the first; None for one axis."""
        if self.positions is None:
            return None
        return self.positions[:, :, -1:] + 1 + step


def three_axes(layout: VisionLayout) -> Tensor:
    """Positions int64 [3, S]: text counts on all axes, vision is (t, y, x) from the end of the text before it."""
    length, vision = len(layout), layout.is_vision
    place = torch.stack([layout.t, layout.y, layout.x])
    before = int(vision.int().argmax())
    after = before + int(layout.grid.max())  # text continues after the largest coordinate
    count = torch.arange(length)
    words = torch.where(count < before, count, count - int(vision.sum()) - before + after)
    return torch.where(vision, before + place, words)
