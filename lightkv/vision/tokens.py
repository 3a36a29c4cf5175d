"""Defines Tokens, the input of a stage, and Compressed, its result."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.ops.compact import compact
from lightkv.vision.layout import VisionLayout
from lightkv.vision.packing import rows_of


@dataclass(frozen=True)
class Tokens:
    """S tokens before a stage: one sequence, or several one after another, without padding.

    hidden [S, D]  hidden states
    layout         place of each token; no item belongs to two sequences
    size [S]       fp32, number of prompt tokens that each token represents
    score [S]      fp32, computed in the layer before the stage; None for a stage without a scorer
    lengths        tokens of each sequence; None for a single sequence
    columns [C, S] int64, further values per token, such as its positions, which survivors keep; None for none
    """

    hidden: Tensor
    layout: VisionLayout
    size: Tensor
    score: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    columns: Tensor | None = None

    @property
    def row(self) -> Tensor:
        """int64 [S]: the sequence of each token."""
        return rows_of(self.lengths or (len(self.layout),), self.hidden.device)

    def left(
        self, hidden: Tensor, weight: Tensor, source: Tensor, into: Tensor, target: Tensor, kept: Tensor
    ) -> "Compressed":
        """Does the last merges of a stage, hidden[source[r]] into hidden[into[r]], and selects the survivors.

        hidden [S, D] and weight fp32 [S] are the results of the earlier merges; they are not changed. The size of a
        survivor is the sum of its weights. target [S] and kept [S'] are as in Compressed.
        """
        columns = self.layout.columns
        if self.columns is not None:
            columns = torch.cat([columns, self.columns])
        hidden, size, columns = compact(hidden, weight, source, into, kept, columns)
        item, t, y, x, *_ = columns
        layout = VisionLayout(item, t, y, x, self.layout.grid)
        return Compressed(hidden, kept, target, size, layout, columns[4:])


@dataclass(frozen=True)
class Compressed:
    """The S' survivors of a stage's S tokens, in their original order.

    hidden [S', D]   hidden states
    kept [S']        original index of each survivor, ascending
    target [S]       original index of the survivor that each token merged into; itself if it survived, -1 if dropped
    size [S']        fp32, number of prompt tokens that each survivor represents
    layout           place of each survivor
    columns [C, S']  `Tokens.columns` of the survivors
    """

    hidden: Tensor
    kept: Tensor
    target: Tensor
    size: Tensor
    layout: VisionLayout
    columns: Tensor


def removals(sizes: Tensor, drop: float) -> Tensor:
    """floor(drop · m) for each count m in `sizes`, int64; 0.29 · 100 gives 29 although the binary product is less.

    At most m - 1: even with a drop just below 1, the last token must stay, because it has none to merge into.
    """
    return torch.minimum((sizes.double() * drop + 1e-9).floor().long(), (sizes - 1).clamp(min=0))


def removal(count: int, drop: float) -> int:
    """`removals` for one count, for cost estimates."""
    return min(int(count * drop + 1e-9), max(0, count - 1))
