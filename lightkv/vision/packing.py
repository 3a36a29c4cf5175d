"""Packs a left-padded batch into one row of tokens without padding, the form that stages work on, and back."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Row r of a batch [B, width] ends with a sequence of lengths[r] tokens; packed they are N = Σ lengths tokens."""

    lengths: tuple[int, ...]
    width: int
    device: torch.device

    @property
    def pads(self) -> list[int]:
        return [self.width - length for length in self.lengths]

    @cached_property
    def first(self) -> Tensor | None:
        """int64 [B]: the column at which each sequence begins; None without padding."""
        return torch.tensor(self.pads, device=self.device) if any(self.pads) else None

    @cached_property
    def row(self) -> Tensor:
        """int64 [N]: the row of each token."""
        return rows_of(self.lengths, self.device)

    @cached_property
    def index(self) -> Tensor:
        """int64 [N]: the index of each token in the flattened batch."""
        ends = accumulate(self.lengths)
        before = [self.width * (row + 1) - end for row, end in enumerate(ends)]  # padding up to the row's sequence
        place = torch.arange(sum(self.lengths), device=self.device)
        return place + torch.tensor(before, device=self.device)[self.row]

    def pack(self, padded: Tensor) -> Tensor:
        """[B, width, …] → [N, …], on the device of `padded`."""
        flat = padded.flatten(0, 1)
        return flat if not any(self.pads) else flat[self.index.to(flat.device)]

    def pad(self, packed: Tensor, fill: float = 0) -> Tensor:
        """[N, …] → [B, width, …] with `fill` for the padding."""
        shape = (len(self.lengths), self.width, *packed.shape[1:])
        if not any(self.pads):
            return packed.reshape(shape)
        flat = packed.new_full((shape[0] * shape[1], *shape[2:]), fill)
        return flat.index_copy_(0, self.index.to(flat.device), packed).view(shape)

    def after(self, kept: Tensor) -> "Packing":
        """The packing if only the packed positions `kept` (int64 [N'], ascending) are left."""
        counts = torch.bincount(self.row.to(kept.device)[kept], minlength=len(self.lengths)).tolist()
        return Packing(tuple(counts), max(counts), kept.device)


def rows_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [Σ lengths]: 0 for the tokens of the first sequence, 1 for those of the second, …"""
    counts = torch.tensor(lengths, dtype=torch.int64, device=device)
    return torch.repeat_interleave(counts, output_size=sum(lengths))
