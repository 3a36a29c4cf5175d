"""What a stage gets and what it leaves: the two ends of every method."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.ops.compact import compact
from lightkv.vision.layout import VisionLayout
from lightkv.vision.packing import rows_of


@dataclass(frozen=True)
class Tokens:
    """S tokens before a stage: one sequence, or several one after another, without padding.

    hidden [S, D]  the hidden states
    layout         the place of each token; no item belongs to two sequences
    size [S]       fp32: how many tokens of the prompt each stands for
    score [S]      fp32, from the layer before; None for a method that does not ask for one
    lengths        tokens of each sequence; None for a single one
    columns [C, S] int64: what else goes along with each token, such as its positions; None for nothing
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
        """What is left at the end of a stage, its last merges included: hidden[source[r]] into hidden[into[r]].

        hidden [S, D] and weight fp32 [S] as the merges before these have left them: they stay as they are. The size of
        a survivor is what its weights add up to · target [S] and kept [S'] as in Compressed.
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
    """What a stage leaves of its S tokens.

    hidden [S', D]   the survivors in their original order
    kept [S']        original index of each survivor, ascending
    target [S]       original index of the token each position ended up in: itself if it survived, -1 if it was dropped
    size [S']        fp32: how many tokens each survivor stands for
    layout           their places
    columns [C, S']  what else went along with them
    """

    hidden: Tensor
    kept: Tensor
    target: Tensor
    size: Tensor
    layout: VisionLayout
    columns: Tensor


def removals(sizes: Tensor, drop: float) -> Tensor:
    """floor(drop · m) for each count m in `sizes`, int64; 0.29 · 100 counts as 29 although it is below in binary.

    At most m - 1: a drop just below 1 must not ask for the last token, which nothing can be merged into.
    """
    return torch.minimum((sizes.double() * drop + 1e-9).floor().long(), (sizes - 1).clamp(min=0))


def removal(count: int, drop: float) -> int:
    """`removals` of one count, for cost estimates."""
    return min(int(count * drop + 1e-9), max(0, count - 1))
