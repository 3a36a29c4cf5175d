"""Defines VisionLayout: which positions of a sequence are vision tokens, and the place of each in its item."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.errors import ConfigError

TEXT = -1  # a text position, which may vote in the guidance; the caller excludes padding
FIXED = -2  # a vision position without a place in a grid (row end, separator): never merged, never votes

Span = tuple[int, int, int, int]


@dataclass(frozen=True)
class VisionLayout:
    """Item and coordinates of every position of a sequence, int64 tensors [S].

    item   0-based image or video that the token belongs to; TEXT (-1) for text, FIXED (-2) for row ends and the like
    t y x  frame (or temporal patch), row and column in the token grid; 0 if item < 0
    grid   [I, 3] extent (t, h, w) of each item's grid, so that windows keep their places while tokens become fewer
    """

    item: Tensor
    t: Tensor
    y: Tensor
    x: Tensor
    grid: Tensor

    def __post_init__(self) -> None:
        for name in ("item", "t", "y", "x"):
            column = getattr(self, name)
            if column.dtype != torch.int64 or column.shape != self.item.shape or column.ndim != 1:
                raise ConfigError(
                    f"VisionLayout.{name} must be int64 of shape {list(self.item.shape)[:1]}, "
                    f"got {column.dtype} {list(column.shape)}"
                )
        if self.grid.dtype != torch.int64 or self.grid.ndim != 2 or self.grid.shape[1] != 3:
            raise ConfigError(f"VisionLayout.grid must be int64 [items, 3], got {list(self.grid.shape)}")

    def __len__(self) -> int:
        return self.item.shape[0]

    @property
    def is_text(self) -> Tensor:
        return self.item == TEXT

    @property
    def is_vision(self) -> Tensor:
        """Every position of an image or video, row ends included."""
        return self.item != TEXT

    @property
    def mergeable(self) -> Tensor:
        return self.item >= 0

    @property
    def columns(self) -> Tensor:
        """int64 [4, S]: item, t, y and x. Together with `grid` they determine the layout."""
        return torch.stack([self.item, self.t, self.y, self.x])

    def take(self, index: Tensor) -> "VisionLayout":
        """The layout of the positions in `index` (int64 [S'] or bool [S]); grids keep their extent."""
        return VisionLayout(self.item[index], self.t[index], self.y[index], self.x[index], self.grid)

    def to(self, device: torch.device | str) -> "VisionLayout":
        item, t, y, x = (column.to(device) for column in (self.item, self.t, self.y, self.x))
        return VisionLayout(item, t, y, x, self.grid.to(device))

    @classmethod
    def packed(cls, layouts: Sequence["VisionLayout"]) -> "VisionLayout":
        """The layouts one after another as one layout, with items numbered consecutively."""
        items, first = [], 0
        for layout in layouts:
            items.append(torch.where(layout.mergeable, layout.item + first, layout.item))
            first += len(layout.grid)
        columns = (torch.cat([getattr(layout, name) for layout in layouts]) for name in ("t", "y", "x", "grid"))
        return cls(torch.cat(items), *columns)

    @classmethod
    def from_coordinates(
        cls, item: Tensor, t: Tensor, y: Tensor, x: Tensor, grid: Tensor | None = None
    ) -> "VisionLayout":
        """A layout from coordinates; each grid's extent is the largest coordinate + 1 unless `grid` is given.

        Raises ConfigError for coordinates outside the grid and for item numbers without a row in it.
        """
        vision = item >= 0
        place = torch.stack([t, y, x], dim=-1) * vision[:, None]
        if bool((item < FIXED).any()) or bool((place < 0).any()):
            raise ConfigError("VisionLayout: item must be >= -2 and t, y, x must be >= 0")
        count = int(item.max()) + 1 if len(item) else 0
        extent = torch.zeros(max(count, 0), 3, dtype=torch.int64, device=item.device)
        rows = item[vision, None].expand(-1, 3)
        extent.scatter_reduce_(0, rows, place[vision] + 1, "amax")
        if grid is not None:
            if len(grid) < len(extent) or bool((grid[: len(extent)] < extent).any()):
                raise ConfigError(
                    f"VisionLayout: tokens lie outside the grids {grid.tolist()}; they need {extent.tolist()}"
                )
            extent = grid
        return cls(item, place[:, 0], place[:, 1], place[:, 2], extent)

    @classmethod
    def grids(cls, spans: Sequence[Span], length: int) -> "VisionLayout":
        """A layout from spans (start, t, h, w) of t·h·w row-major tokens in a sequence of `length`; the rest is text.

        Raises ConfigError if a span is empty, overlaps another, or ends after the sequence.
        """
        item = torch.full((length,), TEXT, dtype=torch.int64)
        place = torch.zeros(length, 3, dtype=torch.int64)
        for number, (start, *extent) in enumerate(spans):
            tokens = math.prod(extent)
            if min(extent) < 1 or start < 0 or start + tokens > length:
                raise ConfigError(
                    f"span {number} = (start {start}, t·h·w {extent}) does not fit a sequence of {length} tokens"
                )
            if bool((item[start : start + tokens] != TEXT).any()):
                raise ConfigError(f"span {number} = (start {start}, t·h·w {extent}) overlaps an earlier span")
            item[start : start + tokens] = number
            place[start : start + tokens] = coordinates(*extent)
        grid = torch.tensor([span[1:] for span in spans], dtype=torch.int64).reshape(-1, 3)
        return cls(item, place[:, 0], place[:, 1], place[:, 2], grid)

    @classmethod
    def released(cls, spans: Sequence[Span], length: int) -> "VisionLayout":
        """The published release's layout: each span on a fictional square grid of side ceil(sqrt(t·h·w))."""
        return cls.grids(spans, length).squared()

    def squared(self) -> "VisionLayout":
        """The layout with each item's n tokens, in sequence order, on a square grid of side ceil(sqrt(n)).

        This is the release's rule. It applies it anew before every stage, to the n tokens that are then left.
        """
        vision = torch.nonzero(self.mergeable).flatten()
        item = self.item[vision]
        counts = torch.bincount(item, minlength=len(self.grid))
        side = counts.double().sqrt().ceil().long()
        by_item = torch.argsort(item, stable=True)
        rank = torch.empty_like(item)
        rank[by_item] = torch.arange(len(item), device=item.device) - (counts.cumsum(0) - counts)[item[by_item]]
        y, x = torch.zeros_like(self.y), torch.zeros_like(self.x)
        y[vision], x[vision] = rank // side[item], rank % side[item]
        grid = torch.stack([torch.ones_like(side), side, side], dim=-1)
        return VisionLayout(self.item, torch.zeros_like(self.t), y, x, grid)


def coordinates(t: int, h: int, w: int) -> Tensor:
    """(t, y, x) of the t·h·w tokens of a grid in row-major order, int64 [t·h·w, 3]."""
    return torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).reshape(-1, 3)
