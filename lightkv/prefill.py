"""The state of one compressed prefill and of the decoding after it: who is left, where, and under which mask."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkv.config import LightKVConfig, Stage
from lightkv.errors import LightKVError, UnsupportedCallError
from lightkv.guidance import Scorer
from lightkv.layout import VisionLayout
from lightkv.methods import METHODS
from lightkv.report import StageReport, Survivors
from lightkv.tokens import Compressed, Tokens


@dataclass(frozen=True)
class Group:
    """What the layers between two stages hold; all tensors cover the batch, left-padded to `length`.

    layouts    per row, without padding
    origin     int64 [B, length] position of each token in the prompt; 0 for padding
    size       fp32 [B, length] how many tokens of the prompt each stands for; 1 for padding
    positions  int64 [..., B, length] RoPE positions, or None where positions are kept
    closed     int64 [B] positions that have closed up before the next token
    """

    layouts: Sequence[VisionLayout]
    origin: Tensor
    size: Tensor
    positions: Tensor | None
    closed: Tensor

    @property
    def length(self) -> int:
        return self.origin.shape[1]

    @property
    def pads(self) -> list[int]:
        return [self.length - len(layout) for layout in self.layouts]

    def mask(self, length: int) -> Tensor | None:
        """Bool [B, length] of the real ones among the group's tokens and those decoded since; None if all are."""
        pads = self.pads
        if not any(pads):
            return None
        column = torch.arange(length, device=self.origin.device)
        return column >= torch.tensor(pads, device=self.origin.device)[:, None]

    @cached_property
    def log_size(self) -> Tensor | None:
        """fp32 [B, length] log of the sizes; None where every token stands for itself alone."""
        return self.size.log() if bool((self.size != 1).any()) else None

    def bias(self, length: int) -> Tensor | None:
        """fp32 [B, length] to add to the scores of the group's keys (log of their sizes) and of later ones (0)."""
        return None if self.log_size is None else F.pad(self.log_size, (0, length - self.length))

    def vision_tokens(self) -> int:
        return sum(int(layout.is_vision.sum()) for layout in self.layouts)


class Prefill:
    """Runs the stages of `config` over one batch and remembers, for each group of layers, what is left."""

    def __init__(
        self, config: LightKVConfig, layouts: Sequence[VisionLayout], length: int, positions: Tensor | None
    ) -> None:
        self.config = config
        self.running = True
        self.method = METHODS[config.method]
        self.scores: list[Tensor] = []
        self.notes: list[str] = []
        device = layouts[0].item.device
        origin = torch.arange(length, device=device).expand(len(layouts), -1)
        closed = torch.zeros(len(layouts), dtype=torch.int64, device=device)
        size = torch.ones(len(layouts), length, device=device)
        self.groups = [Group(layouts, origin, size, positions, closed)]
        self.survivors: list[list[Survivors]] = [[] for _ in layouts]
        self._after = [stage.layer for stage in config.stages]

    def group_of(self, layer: int) -> int:
        """Number of stages that come before this decoder layer."""
        return bisect_left(self._after, layer)

    def listen(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Take the scores of the coming stage from its layer's q [B, Hq, S, d] and k [B, Hkv, S, d]."""
        group, scorer = self.groups[-1], self._scorer()
        assert scorer is not None
        self.scores = [
            scorer(q[row, :, pad:], k[row, :, pad:], layout.to(q.device), scale)
            for row, (layout, pad) in enumerate(zip(group.layouts, group.pads, strict=True))
        ]

    def _scorer(self) -> Scorer | None:
        """Of the coming stage."""
        return self.method.scorer(self.config, len(self.groups) - 1)

    def compress(self, hidden: Tensor, stage: Stage) -> Tensor:
        """Run `stage` on every row of hidden [B, S, D] and open the next group; rows are padded left to the longest."""
        group = self.groups[-1]
        if self._scorer() is not None and len(self.scores) != len(group.layouts):
            raise LightKVError(
                f"layer {stage.layer} did not run its attention through transformers' AttentionInterface"
            )
        results: list[Compressed] = []
        layouts = []
        for row, (layout, pad) in enumerate(zip(group.layouts, group.pads, strict=True)):
            layout = layout.to(hidden.device)  # the layers may be spread over several
            layout = layout.squared() if self.config.windows == "released" else layout
            self._note_small_grids(layout, stage)
            score = self.scores[row].to(hidden.device) if self.scores else None
            tokens = Tokens(hidden[row, pad:], layout, group.size[row, pad:].to(hidden.device), score)
            results.append(self.method.compress(tokens, stage, self.config))
            layouts.append(layout.take(results[-1].kept))
        self.scores = []
        length = max(len(layout) for layout in layouts)
        origin = torch.zeros(len(layouts), length, dtype=torch.int64, device=hidden.device)
        size = torch.ones(len(layouts), length, device=hidden.device)
        packed = hidden.new_zeros(len(layouts), length, hidden.shape[-1])
        for row, (result, pad) in enumerate(zip(results, group.pads, strict=True)):
            before, after = group.origin[row, pad:].to(hidden.device), slice(length - len(result.kept), None)
            origin[row, after] = before[result.kept]
            size[row, after] = result.size
            packed[row, after] = result.hidden
            self._note_survivors(row, before, result)
        kept = [result.kept for result in results]
        positions, closed = _close_up(group, kept, length) if group.positions is not None else (None, group.closed)
        self.groups.append(Group(layouts, origin, size, positions, closed))
        return packed

    def _note_survivors(self, row: int, origin: Tensor, result: Compressed) -> None:
        """Follow the tokens of a row's prompt through one more stage; origin [S] of what was there before it."""
        origin = origin - self.groups[0].pads[row]
        target = torch.where(result.target < 0, -1, origin[result.target])  # by the tokens of this stage
        if self.survivors[row]:
            earlier = self.survivors[row][-1].target.to(origin.device)
            place = torch.zeros_like(earlier).index_copy(0, origin, torch.arange(len(origin), device=origin.device))
            target = torch.where(earlier < 0, -1, target[place[earlier]])
        self.survivors[row].append(Survivors(origin[result.kept], target))

    def retention(self, num_layers: int) -> float:
        """Layer-averaged share of vision KV entries kept, as reached over all rows."""
        counts = [group.vision_tokens() for group in self.groups]
        held = sum(counts[self.group_of(layer)] for layer in range(num_layers))
        return held / (num_layers * counts[0])

    def stage_reports(self) -> tuple[StageReport, ...]:
        counts = [group.vision_tokens() for group in self.groups]
        return tuple(
            StageReport(stage.layer, before, after)
            for stage, (before, after) in zip(self.config.stages, pairwise(counts), strict=True)
        )

    def _note_small_grids(self, layout: VisionLayout, stage: Stage) -> None:
        small = (layout.grid[:, 1:] < stage.windows).any(dim=-1) & (layout.grid[:, 0] > 0)
        if bool(small.any()):
            grids = [tuple(grid) for grid in layout.grid[small, 1:].unique(dim=0).tolist()]
            self.notes.append(
                f"stage after layer {stage.layer}: {stage.windows} windows per side shrunk to the grids {grids}"
            )


def _close_up(group: Group, kept: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Renumber positions: each value drops by the number of smaller values that no survivor holds any more.

    For ordinary RoPE this gives 0 … S'-1. For M-RoPE the three axes share one numbering, so order, equality of a
    text token's three coordinates, and gaps that were there before all stay.
    """
    assert group.positions is not None
    before = group.positions.to(kept[0].device)
    after = before.new_zeros(*before.shape[:-1], length)
    closed = group.closed.to(before.device, copy=True)
    for row, (index, pad) in enumerate(zip(kept, group.pads, strict=True)):
        old = before[..., row, pad:]
        new = old[..., index]
        values = old.unique()
        vanished = values[~torch.isin(values, new)]
        after[..., row, length - len(index) :] = new - torch.searchsorted(vanished, new)
        closed[row] += len(vanished)
    return after, closed


def rows_for_batch(layouts: Sequence[VisionLayout], mask: Tensor | None, batch: int, length: int) -> list[VisionLayout]:
    """Layouts of a padded batch without the padding, repeated for beams; one layout serves batch / len(layouts) rows.

    Raises UnsupportedCallError when they do not fit, or when padding is not on the left.
    """
    if not layouts or batch % len(layouts):
        raise UnsupportedCallError(f"{len(layouts)} layouts do not fit a batch of {batch}; pass one per prompt")
    pads = [0] * batch
    if mask is not None:
        if mask.ndim != 2 or mask.shape != (batch, length):
            raise UnsupportedCallError(
                f"attention_mask must be [batch, length] = {[batch, length]} in prefill, got {list(mask.shape)}"
            )
        real = mask.bool()
        if bool((real[:, :-1] & ~real[:, 1:]).any()) or not bool(real[:, -1].all()):
            raise UnsupportedCallError("padding must be on the left: set tokenizer.padding_side = 'left'")
        pads = (~real).sum(dim=-1).tolist()
    rows = []
    for row, pad in enumerate(pads):
        layout = layouts[row // (batch // len(layouts))]
        if len(layout) not in (length, length - pad):
            raise UnsupportedCallError(
                f"the layout of row {row} covers {len(layout)} tokens, the prompt has {length - pad} (+ {pad} padding)"
            )
        layout = layout.take(torch.arange(len(layout) - (length - pad), len(layout), device=layout.item.device))
        rows.append(layout)
    return rows
