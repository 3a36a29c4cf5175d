"""Keeps the state of one compressed prefill and its decode steps: survivors, their positions, and masks per layer."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from lightkv.errors import LightKVError, UnsupportedCallError
from lightkv.hooks.attention import KeyWeights
from lightkv.hooks.report import RETENTION_SLACK, Report, StageReport, Survivors, cache_bytes
from lightkv.methods.config import LightKVConfig
from lightkv.methods.guidance import Scorer
from lightkv.methods.settings import Stage
from lightkv.methods.table import METHODS
from lightkv.vision.layout import VisionLayout
from lightkv.vision.packing import Packing
from lightkv.vision.tokens import Compressed, Tokens


@dataclass(frozen=True)
class Group:
    """The tokens of the layers between two stages; tensors [B, length] are padded on the left.

    layout     layout of all rows, one after another
    packing    lengths and padding of the rows
    origin     int64 [B, length] position of each token in the prompt; 0 for padding
    size       fp32 [B, length] number of prompt tokens that each token represents; 1 for padding
    positions  int64 [..., B, length] RoPE positions; None if positions are kept
    closed     int64 [B] number of positions that have been closed before the next token
    """

    layout: VisionLayout
    packing: Packing
    origin: Tensor
    size: Tensor
    positions: Tensor | None
    closed: Tensor

    def mask(self, length: int) -> Tensor | None:
        """Bool [B, length], False at padding, over the group's tokens and those decoded since; None without padding."""
        first = self.packing.first
        if first is None:
            return None
        return torch.arange(length, device=first.device) >= first[:, None]

    @cached_property
    def log_size(self) -> Tensor | None:
        """fp32 [B, length] log of the sizes; None if all sizes are 1."""
        return self.size.log() if bool((self.size != 1).any()) else None

    def weights(self, length: int) -> KeyWeights | None:
        """Weights of `length` keys: log of the size for the group's, 0 for later ones; None if all sizes are 1."""
        if self.log_size is None:
            return None
        return KeyWeights(F.pad(self.log_size, (0, length - self.packing.width)), self.packing.first)

    @cached_property
    def vision_tokens(self) -> int:
        """Number of vision tokens in all rows together."""
        return int(self.layout.is_vision.sum())


class Prefill:
    """Runs the stages of `config` on one batch and keeps the resulting Group for each range of layers."""

    def __init__(
        self, config: LightKVConfig, layouts: Sequence[VisionLayout], length: int, positions: Tensor | None
    ) -> None:
        self.config = config
        self.running = True
        self.method = METHODS[config.method]
        self.scores: Tensor | None = None
        self.notes: list[str] = []
        device, batch = layouts[0].item.device, len(layouts)
        layout = VisionLayout.packed(layouts)
        packing = Packing(tuple(len(row) for row in layouts), length, device)
        origin = torch.arange(length, device=device).expand(batch, -1)
        closed = torch.zeros(batch, dtype=torch.int64, device=device)
        self.groups = [Group(layout, packing, origin, torch.ones(batch, length, device=device), positions, closed)]
        self.survivors: list[list[Survivors]] = [[] for _ in layouts]
        self._after = [stage.layer for stage in config.stages]

    def group_of(self, layer: int) -> int:
        """Number of stages before this decoder layer."""
        return bisect_left(self._after, layer)

    def score(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Computes the scores of the next stage from its layer's q [B, Hq, S, d] and k [B, Hkv, S, d]."""
        group, scorer = self.groups[-1], self._scorer()
        assert scorer is not None
        self.scores = scorer(q, k, group.layout.to(q.device), group.packing, scale)

    def _scorer(self) -> Scorer | None:
        """The scorer of the next stage."""
        return self.method.scorer(self.config, len(self.groups) - 1)

    def compress(self, hidden: Tensor, stage: Stage) -> Tensor:
        """Runs `stage` on hidden [B, S, D] and adds the next group; rows are padded on the left to the longest."""
        group, packing, device = self.groups[-1], self.groups[-1].packing, hidden.device
        if self._scorer() is not None and self.scores is None:
            raise LightKVError(
                f"layer {stage.layer} did not run its attention through transformers' AttentionInterface"
            )
        layout = group.layout.to(device)  # layers may be on several devices
        layout = layout.squared() if self.config.windows == "released" else layout
        self._note_small_grids(layout, stage)
        score = self.scores.to(device) if self.scores is not None else None
        size, columns = packing.pack(group.size).to(device), packing.pack(group.origin).to(device)[None]
        if group.positions is not None:
            by_token = packing.pack(group.positions.movedim((-2, -1), (0, 1))).to(device)  # [N] or [N, axes]
            columns = torch.cat([columns, by_token.reshape(len(by_token), -1).T])
        tokens = Tokens(packing.pack(hidden), layout, size, score, packing.lengths, columns)
        result = self.method.compress(tokens, stage, self.config)
        self.scores = None
        left = packing.after(result.kept)
        self._note_survivors(columns[0], packing, result, left)
        positions, closed = None, group.closed
        if group.positions is not None:
            closed_up, vanished = _close_up(columns[1:], result.columns[1:], packing, left)
            positions = left.pad(closed_up.T).movedim(-1, 0).reshape(*group.positions.shape[:-1], left.width)
            closed = closed.to(device) + vanished
        place, sizes = left.pad(result.columns[0]), left.pad(result.size, 1)
        self.groups.append(Group(result.layout, left, place, sizes, positions, closed))
        return left.pad(result.hidden)

    def _note_survivors(self, origin: Tensor, packing: Packing, result: Compressed, left: Packing) -> None:
        """Extends every prompt's Survivors by one stage; origin [N] belongs to the tokens before it."""
        target = torch.where(result.target < 0, -1, origin[result.target])  # as positions in the prompt
        kept = result.columns[0].split(left.lengths)
        before = zip(origin.split(packing.lengths), target.split(packing.lengths), strict=True)
        for row, (origin, target) in enumerate(before):
            pad = self.groups[0].packing.pads[row]
            origin, target = origin - pad, torch.where(target < 0, -1, target - pad)
            if self.survivors[row]:
                earlier = self.survivors[row][-1].target.to(origin.device)
                place = torch.zeros_like(earlier).index_copy(0, origin, torch.arange(len(origin), device=origin.device))
                target = torch.where(earlier < 0, -1, target[place[earlier]])
            self.survivors[row].append(Survivors(kept[row] - pad, target))

    def retention(self, num_layers: int) -> float:
        """Share of vision KV entries that all rows really kept, averaged over layers."""
        counts = [group.vision_tokens for group in self.groups]
        held = sum(counts[self.group_of(layer)] for layer in range(num_layers))
        return held / (num_layers * counts[0])

    def stage_reports(self) -> tuple[StageReport, ...]:
        counts = [group.vision_tokens for group in self.groups]
        return tuple(
            StageReport(stage.layer, before, after)
            for stage, (before, after) in zip(self.config.stages, pairwise(counts), strict=True)
        )

    def record(self, report: Report, cache: Cache, num_layers: int) -> None:
        """Writes the figures of this prefill, which has just filled `cache`, into the report."""
        counts = [group.vision_tokens for group in self.groups]
        asked = self.config.retention(num_layers)
        report.retention = self.retention(num_layers)
        report.vision_tokens, report.kept_tokens = counts[0], counts[-1]
        report.kv_bytes = cache_bytes(cache)
        report.kv_bytes_uncompressed = cache_bytes(cache, self.groups[0].packing.width)
        report.stages = self.stage_reports()
        report.notes = tuple(dict.fromkeys(self.notes))
        report.survivors = tuple(tuple(row) for row in self.survivors)
        if report.retention > asked + RETENTION_SLACK:
            report.notes += (
                f"retention {report.retention:.3f} was reached instead of {asked:.3f}: small windows round the "
                "number of removed tokens down, and row ends stay",
            )
        report.prefills += 1

    def _note_small_grids(self, layout: VisionLayout, stage: Stage) -> None:
        small = (layout.grid[:, 1:] < stage.windows).any(dim=-1) & (layout.grid[:, 0] > 0)
        if bool(small.any()):
            grids = [tuple(grid) for grid in layout.grid[small, 1:].unique(dim=0).tolist()]
            self.notes.append(
                f"stage after layer {stage.layer}: {stage.windows} windows per side exceed the grids {grids}"
            )


def _close_up(before: Tensor, after: Tensor, packing: Packing, left: Packing) -> tuple[Tensor, Tensor]:
    """Renumbers positions: each value decreases by the number of smaller values that no survivor has any more.

    For ordinary RoPE this gives 0 … S'-1. For M-RoPE the three axes share one numbering, so that order, earlier gaps,
    and the equality of a text token's three coordinates are preserved.

    before int64 [axes, N] of all tokens, after [axes, N'] of the survivors → new positions [axes, N'], and the number
    of vanished values per sequence, [B].
    """
    closed_up, counts = [], []
    for old, new in zip(before.split(packing.lengths, dim=1), after.split(left.lengths, dim=1), strict=True):
        values, new = old.unique(), new.contiguous()  # as torch.isin needs
        vanished = values[~torch.isin(values, new)]
        closed_up.append(new - torch.searchsorted(vanished, new))
        counts.append(len(vanished))
    return torch.cat(closed_up, dim=1), torch.tensor(counts, device=before.device)


def rows_for_batch(layouts: Sequence[VisionLayout], mask: Tensor | None, batch: int, length: int) -> list[VisionLayout]:
    """One layout per row of a padded batch, without padding; each is repeated for batch / len(layouts) beams.

    Raises UnsupportedCallError if the layouts do not fit the batch, or if padding is not on the left.
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
