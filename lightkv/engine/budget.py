"""A budget for the cache of one prompt, however long it gets: what is cached merges on where the least is lost.

Stages drop a fixed share of every piece, a still lecture's like a football match's. Under a budget, the tokens that
all pieces so far have left are ranked together by Ward's criterion, as a stage does it (methods/spacetime.py), on the
embeddings that they came in with; keys and values of what merges are averaged as in folding (fold.py). So a budget is
spent where the video changes, and what repeats what was cached an hour ago costs nothing. Where the method asks what
the question attends to, it is asked of the whole cache, and what matters to the question merges late.

Windows follow from that: they are blocks of so many tokens (methods/spacetime.py), cut anew whenever the cache is
merged. The fewer tokens are left of a minute, the longer the time and the larger the part of the frame that a block
spans: patches merge with patches first, what they became with regions, and in the end frames with frames.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.methods.spacetime import DISTANCE, ROUNDS, spacetime
from lightkv.vision.layout import TEXT, VisionLayout
from lightkv.vision.tokens import Compressed, Tokens, removals

SLACK = 0.8  # of the budget is what a merge leaves while more is to come, so that not every piece needs one


@dataclass(frozen=True)
class Cached:
    """The n tokens in the cache of every layer, text included, in order.

    features [n, D] embeddings as they came in, averaged over what each stands for; any for text
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

    def after(self, more: "Cached") -> "Cached":
        """These and then `more`."""
        return Cached(
            torch.cat([self.features, more.features]),
            torch.cat([self.place, more.place]),
            torch.cat([self.size, more.size]),
            torch.cat([self.positions, more.positions], dim=1),
        )

    def _turns(self) -> Tensor:
        """int64 [n]: a token's number among those at its place of the frame, in order of time; 0 for text.

        Merging halves its tokens by the parity of time (methods/spacetime.py), and what is cached may all be of even
        steps.
        """
        column = torch.unique(self.place[:, [0, 2, 3]], dim=0, return_inverse=True)[1]
        order = torch.argsort(self.place[:, 1], stable=True)
        order = order[torch.argsort(column[order], stable=True)]
        first = torch.bincount(column).cumsum(0) - torch.bincount(column)
        turn = torch.empty_like(column)
        turn[order] = torch.arange(len(column), device=column.device) - first[column[order]]
        return torch.where(self.place[:, 0] == TEXT, 0, turn)

    def merged(self, most: int, rest: bool, score: Tensor | None = None) -> tuple["Cached", Compressed]:
        """What is left when `most` vision tokens are at most, or SLACK of that unless this is the rest; and how.

        `score` fp32 [n]: what a question attends to. Raises ConfigError where there are more items than `most`: each
        keeps a token.
        """
        item = self.place[:, 0]
        sizes = torch.bincount(item[item != TEXT]).cpu()
        if len(sizes) > most:
            raise ConfigError(f"a budget of {most} tokens cannot hold {len(sizes)} images and videos: raise it")
        drop = _drop(sizes, most if rest else max(len(sizes), int(SLACK * most)))
        _, _, y, x = self.place.unbind(1)
        layout = VisionLayout.from_coordinates(item, self._turns(), y, x)
        columns = torch.cat([self.place.T, self.positions])  # the place: in the layout time counts turns
        tokens = Tokens(self.features, layout, self.size, score, columns=columns)
        done = spacetime(tokens, drop, ROUNDS, DISTANCE)
        place, positions = done.columns[:4].T, done.columns[4:]
        return Cached(done.hidden, place, done.size, positions), done


def _drop(sizes: Tensor, most: int) -> float:
    """The least share to drop of items of these sizes, rounded down in each, that leaves at most `most` tokens."""
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if int((sizes - removals(sizes, middle)).sum()) > most else (low, middle)
    return high
