"""A budget: keeps the cache of one prompt below a number of vision tokens, by merging cached tokens further.

Stages drop a fixed share of every piece, of a still lecture as of a football match. Under a budget, the cached tokens
of all pieces are ranked together by Ward's criterion, as in a stage (methods/spacetime.py), on their input embeddings.
Keys and values of merged tokens are averaged as in folding (fold.py). So the budget is spent where the video changes;
a scene that was cached an hour ago costs nothing when it repeats. If the method scores tokens by the question's
attention, the whole cache is scored, and tokens that matter to the question merge late.

The windows of a merge are blocks of a fixed number of tokens (methods/spacetime.py), formed anew at every merge. The
fewer tokens a minute of video has left, the more time and area a block spans: first neighbouring patches merge, then
regions, in the end whole frames.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.engine.fold import mean_by_size
from lightkv.engine.piece import History
from lightkv.errors import ConfigError
from lightkv.methods.config import LightKVConfig
from lightkv.methods.settings import Stage
from lightkv.methods.spacetime import spacetime
from lightkv.vision.layout import TEXT, VisionLayout
from lightkv.vision.tokens import Compressed, Tokens, removals

SLACK = 0.8  # share of the budget that a merge leaves before the last piece, so that not every piece needs a merge


@dataclass(frozen=True)
class Cached:
    """The n tokens cached in every layer of a branch, including text, in order.

    features [n, D] input embeddings, averaged over the tokens merged into each; arbitrary for text
    place    int64 [n, 4] (item, t, y, x) in the prompt; item TEXT for text
    size     fp32 [n] · positions int64 [axes, n]
    """

    features: Tensor
    place: Tensor
    size: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.size)

    @property
    def vision(self) -> int:
        return int((self.place[:, 0] != TEXT).sum())

    @classmethod
    def of_piece(cls, history: History, coordinates: Tensor) -> "Cached":
        """What the stages left of a piece; coordinates int64 [n, 4] of the piece before any stage."""
        first, final = history.states[0], history.states[-1]
        features = first.hidden
        if history.targets:
            into = history.into_final(first.place)
            features = mean_by_size(first.hidden[None].float(), first.size, into, len(final.place))[0].to(features)
        return cls(features, coordinates[final.place], final.size, final.positions)

    def after(self, more: "Cached") -> "Cached":
        """These tokens followed by `more`."""
        return Cached(
            torch.cat([self.features, more.features]),
            torch.cat([self.place, more.place]),
            torch.cat([self.size, more.size]),
            torch.cat([self.positions, more.positions], dim=1),
        )

    def _time_ranks(self) -> Tensor:
        """int64 [n]: a token's rank in time among the tokens at its place of the frame; 0 for text.

        Merging splits tokens by the parity of time (methods/spacetime.py), and all cached tokens may have even steps.
        """
        column = torch.unique(self.place[:, [0, 2, 3]], dim=0, return_inverse=True)[1]
        order = torch.argsort(self.place[:, 1], stable=True)
        order = order[torch.argsort(column[order], stable=True)]
        first = torch.bincount(column).cumsum(0) - torch.bincount(column)
        rank = torch.empty_like(column)
        rank[order] = torch.arange(len(column), device=column.device) - first[column[order]]
        return torch.where(self.place[:, 0] == TEXT, 0, rank)

    def merged(self, most: int, rest: bool, score: Tensor | None = None) -> tuple["Cached", Compressed]:
        """Merge to `most` vision tokens at the end (`rest`), to SLACK of that before; returns the tokens and the merge.

        `score` fp32 [n]: the question's attention. Raises ConfigError if there are more items than `most`: each item
        keeps at least one token.
        """
        item = self.place[:, 0]
        sizes = torch.bincount(item[item != TEXT]).cpu()
        if len(sizes) > most:
            raise ConfigError(f"a budget of {most} tokens cannot hold {len(sizes)} images and videos: raise it")
        stage = Stage(-1, drop=_drop(sizes, most if rest else max(len(sizes), int(SLACK * most))))
        _, _, y, x = self.place.unbind(1)
        layout = VisionLayout.from_coordinates(item, self._time_ranks(), y, x)
        columns = torch.cat([self.place.T, self.positions])  # place: the layout has ranks instead of times
        tokens = Tokens(self.features, layout, self.size, score, columns=columns)
        done = spacetime(tokens, stage, LightKVConfig((stage,), method="spacetime"))
        place, positions = done.columns[:4].T, done.columns[4:]
        return Cached(done.hidden, place, done.size, positions), done


def _drop(sizes: Tensor, most: int) -> float:
    """The least share to drop from items of these sizes to leave at most `most` tokens; rounded down per item."""
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if int((sizes - removals(sizes, middle)).sum()) > most else (low, middle)
    return high
