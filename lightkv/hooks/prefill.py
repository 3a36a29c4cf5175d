"""The state of one compressed prefill and of the decoding after it: who is left, where, and under which mask."""

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
    """What the layers between two stages hold; tensors [B, length] cover the batch with its padding on the left.

    layout     of all rows, one after another
    packing    which tokens of the batch are real
    origin     int64 [B, length] position of each token in the prompt; 0 for padding
    size       fp32 [B, length] how many tokens of the prompt each stands for; 1 for padding
    positions  int64 [..., B, length] RoPE positions, or None where positions are kept
    closed     int64 [B] positions that have closed up before the next token
    """

    layout: VisionLayout
    packing: Packing
    origin: Tensor
    size: Tensor
    positions: Tensor | None
    closed: Tensor

    def mask(self, length: int) -> Tensor | None:
        """Bool [B, length] of the real ones among the group's tokens and those decoded since; None if all are."""
        first = self.packing.first
        if first is None:
            return None
        return torch.arange(length, device=first.device) >= first[:, None]

    @cached_property
    def log_size(self) -> Tensor | None:
        """fp32 [B, length] log of the sizes; None where every token stands for itself alone."""
        return self.size.log() if bool((self.size != 1).any()) else None

    def weights(self, length: int) -> KeyWeights | None:
        """Of the group's keys (log of their sizes) and of later ones (0), `length` in all; None if all count alike."""
        if self.log_size is None:
            return None
        return KeyWeights(F.pad(self.log_size, (0, length - self.packing.width)), self.packing.first)

    @cached_property
    def vision_tokens(self) -> int:
        """Of all rows together."""
        return int(self.layout.is_vision.sum())


class Prefill:
    """Runs the stages of `config` over one batch and remembers, for each group of layers, what is left."""

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
        """Number of stages that come before this decoder layer."""
        return bisect_left(self._after, layer)

    def listen(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Take the scores of the coming stage from its layer's q [B, Hq, S, d] and k [B, Hkv, S, d]."""
        group, scorer = self.groups[-1], self._scorer()
        assert scorer is not None
        self.scores = scorer(q, k, group.layout.to(q.device), group.packing, scale)

    def _scorer(self) -> Scorer | None:
        """Of the coming stage."""
        return self.method.scorer(self.config, len(self.groups) - 1)

    def compress(self, hidden: Tensor, stage: Stage) -> Tensor:
        """Run `stage` on hidden [B, S, D] and open the next group; rows are padded left to the longest."""
        group, packing, device = self.groups[-1], self.groups[-1].packing, hidden.device
        if self._scorer() is not None and self.scores is None:
            raise LightKVError(
                f"layer {stage.layer} did not run its attention through transformers' AttentionInterface"
            )
        layout = group.layout.to(device)  # the layers may be spread over several
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
        """Follow the tokens of every prompt through one more stage; origin [N] of what was there before it."""
        target = torch.where(result.target < 0, -1, origin[result.target])  # by the tokens of this stage
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
        """Layer-averaged share of vision KV entries kept, as reached over all rows."""
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
        """Put the figures of this prefill, which has just filled `cache`, into the report."""
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
                f"retention {report.retention:.3f} was reached, {asked:.3f} was asked: whole tokens cannot leave small "
                "windows, and row ends stay",
            )
        report.prefills += 1

    def _note_small_grids(self, layout: VisionLayout, stage: Stage) -> None:
        small = (layout.grid[:, 1:] < stage.windows).any(dim=-1) & (layout.grid[:, 0] > 0)
        if bool(small.any()):
            grids = [tuple(grid) for grid in layout.grid[small, 1:].unique(dim=0).tolist()]
            self.notes.append(
                f"stage after layer {stage.layer}: {stage.windows} windows per side shrunk to the grids {grids}"
            )


def _close_up(before: Tensor, after: Tensor, packing: Packing, left: Packing) -> tuple[Tensor, Tensor]:
    """Renumber positions: each value drops by the number of smaller values that no survivor holds any more.

    For ordinary RoPE this gives 0 … S'-1. For M-RoPE the three axes share one numbering, so order, equality of a
    text token's three coordinates, and gaps that were there before all stay.

    before int64 [axes, N] of the tokens, after [axes, N'] of the survivors → [axes, N'], and how many values of each
    sequence have vanished, [B].
    """
    closed_up, counts = [], []
    for old, new in zip(before.split(packing.lengths, dim=1), after.split(left.lengths, dim=1), strict=True):
        values, new = old.unique(), new.contiguous()  # torch.isin wants that
        vanished = values[~torch.isin(values, new)]
        closed_up.append(new - torch.searchsorted(vanished, new))
        counts.append(len(vanished))
    return torch.cat(closed_up, dim=1), torch.tensor(counts, device=before.device)


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
