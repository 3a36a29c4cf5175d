"""The state of one compressed prefill and of the decoding after it: who is left, where, and under which mask."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightkv.config import LightKVConfig, Stage
from lightkv.errors import LightKVError, UnsupportedCallError
from lightkv.guidance import GUIDANCES, prompt_guidance
from lightkv.layout import VisionLayout
from lightkv.report import StageReport
from lightkv.stage import compress_tokens


@dataclass(frozen=True)
class Group:
    """What the layers between two stages hold; all tensors cover the batch, left-padded to `length`.

    layouts    per row, without padding
    origin     int64 [B, length] position of each token in the prompt; 0 for padding
    positions  int64 [..., B, length] RoPE positions, or None where positions are kept
    closed     int64 [B] positions that have closed up before the next token
    """

    layouts: Sequence[VisionLayout]
    origin: Tensor
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

    def vision_tokens(self) -> int:
        return sum(int(layout.is_vision.sum()) for layout in self.layouts)


class Prefill:
    """Runs the stages of `config` over one batch and remembers, for each group of layers, what is left."""

    def __init__(
        self, config: LightKVConfig, layouts: Sequence[VisionLayout], length: int, positions: Tensor | None
    ) -> None:
        self.config = config
        self.running = True
        self.guidance: list[Tensor] = []
        self.notes: list[str] = []
        device = layouts[0].item.device
        origin = torch.arange(length, device=device).expand(len(layouts), -1)
        closed = torch.zeros(len(layouts), dtype=torch.int64, device=device)
        self.groups = [Group(layouts, origin, positions, closed)]
        self._after = [stage.layer for stage in config.stages]

    def group_of(self, layer: int) -> int:
        """Number of stages that come before this decoder layer."""
        return bisect_left(self._after, layer)

    def listen(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Take the guidance of the coming stage from its layer's q [B, Hq, S, d] and k [B, Hkv, S, d]."""
        rule, group = GUIDANCES[self.config.guidance], self.groups[-1]
        self.guidance = []
        for row, (layout, pad) in enumerate(zip(group.layouts, group.pads, strict=True)):
            voters = rule.voters(layout.to(q.device))
            self.guidance.append(
                torch.ones(len(layout), device=q.device)
                if voters is None
                else prompt_guidance(q[row, :, pad:], k[row, :, pad:], voters, scale)
            )

    def compress(self, hidden: Tensor, stage: Stage) -> Tensor:
        """Run `stage` on every row of hidden [B, S, D] and open the next group; rows are padded left to the longest."""
        group = self.groups[-1]
        if len(self.guidance) != len(group.layouts):
            raise LightKVError(
                f"layer {stage.layer} did not run its attention through transformers' AttentionInterface"
            )
        results, layouts = [], []
        for row, (layout, pad) in enumerate(zip(group.layouts, group.pads, strict=True)):
            layout = layout.to(hidden.device)  # the layers may be spread over several
            layout = layout.squared() if self.config.windows == "released" else layout
            self._note_small_grids(layout, stage)
            result = compress_tokens(
                hidden[row, pad:],
                self.guidance[row].to(hidden.device),
                layout,
                windows=stage.windows,
                drop=stage.drop,
                frames=self.config.frames_per_window,
                budget=self.config.budget,
            )
            results.append(result)
            layouts.append(layout.take(result.kept))
        self.guidance = []
        length = max(len(layout) for layout in layouts)
        origin = torch.zeros(len(layouts), length, dtype=torch.int64, device=hidden.device)
        packed = hidden.new_zeros(len(layouts), length, hidden.shape[-1])
        for row, (result, pad) in enumerate(zip(results, group.pads, strict=True)):
            origin[row, length - len(result.kept) :] = group.origin[row, pad:].to(hidden.device)[result.kept]
            packed[row, length - len(result.kept) :] = result.hidden
        kept = [result.kept for result in results]
        positions, closed = _close_up(group, kept, length) if group.positions is not None else (None, group.closed)
        self.groups.append(Group(layouts, origin, positions, closed))
        return packed

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
