"""Builds items (tokens of an image or video) from grids, joined views and row ends; places them in a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.errors import UnsupportedCallError
from lightkv.vision.layout import FIXED, TEXT, VisionLayout, coordinates


@dataclass(frozen=True)
class Item:
    """The tokens of one image or video in sequence order.

    place int64 [N, 4]  (part, t, y, x) of each token; part numbers the item's grids from 0, FIXED marks row ends
    grid  int64 [P, 3]  extent (t, h, w) of each part
    """

    place: Tensor
    grid: Tensor

    def __len__(self) -> int:
        return self.place.shape[0]


def block(t: int, h: int, w: int) -> Item:
    """An item of one grid of t·h·w tokens, row-major."""
    place = coordinates(t, h, w)
    return Item(torch.cat([torch.zeros(len(place), 1, dtype=torch.int64), place], dim=1), torch.tensor([[t, h, w]]))


def fixed(count: int = 1) -> Item:
    """An item of `count` tokens without a place in a grid: class tokens, row ends, separators."""
    place = torch.zeros(count, 4, dtype=torch.int64)
    place[:, 0] = FIXED
    return Item(place, torch.zeros(0, 3, dtype=torch.int64))


def rows_with_ends(h: int, w: int) -> Item:
    """An item of h rows of w tokens, each row followed by one row-end token."""
    place = block(1, h, w + 1).place
    place[w :: w + 1] = torch.tensor([FIXED, 0, 0, 0])
    return Item(place, torch.tensor([[1, h, w]]))


def joined(parts: Sequence[Item]) -> Item:
    """The parts one after another as one item; windows never span two parts."""
    places, first = [], 0
    for part in parts:
        place = part.place.clone()
        place[place[:, 0] >= 0, 0] += first
        places.append(place)
        first += len(part.grid)
    return Item(torch.cat(places), torch.cat([part.grid for part in parts]))


def place_items(length: int, placeholders: Sequence[tuple[str, Tensor, list[Item]]]) -> VisionLayout:
    """The layout of one sequence; each kind is (name, positions of its tokens, items not yet placed).

    Items are removed from the front of each list until all positions of the kind are filled.
    Raises UnsupportedCallError if the numbers of tokens and items do not match.
    """
    columns = torch.zeros(length, 4, dtype=torch.int64)
    columns[:, 0] = TEXT
    grids: list[Tensor] = []
    for name, positions, items in placeholders:
        start = 0
        while start < len(positions):
            if not items or start + len(items[0]) > len(positions):
                raise UnsupportedCallError(
                    f"a sequence has {len(positions)} tokens of {name}, of which {len(positions) - start} belong to no "
                    f"given image or video (the next one has {len(items[0]) if items else 0}): check that the "
                    "prompt was expanded by this model's processor, or pass layouts="
                )
            item = items.pop(0)
            place = item.place.clone()
            place[place[:, 0] >= 0, 0] += sum(len(grid) for grid in grids)
            columns[positions[start : start + len(item)]] = place
            grids.append(item.grid)
            start += len(item)
    grid = torch.cat(grids) if grids else torch.zeros(0, 3, dtype=torch.int64)
    return VisionLayout(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3], grid)
