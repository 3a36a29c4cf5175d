"""The segments of a prompt: text, images, and parts of videos."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids int64 [n] of text."""

    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, most: int) -> list["Text"]:
        """Parts of at most `most` tokens; an empty list for empty text."""
        return [Text(ids) for ids in self.ids.split(most) if len(ids)]


@dataclass(frozen=True, eq=False)
class Vision:
    """An image, or some consecutive time steps of a video, as output by the vision encoder.

    features    [t·h·w, D], row-major: the input of the decoder's first layer
    grid        (t, h, w) of these tokens
    first       the item's step at which they begin: 0 starts an item, more continues the previous one
    counts      how many equal steps each of the t steps represents; None: one each. Repeated frames are not encoded
                but counted here
    interval_s  seconds between steps, for models whose positions follow time; None: one position per step
    """

    features: Tensor
    grid: tuple[int, int, int]
    first: int = 0
    counts: tuple[int, ...] | None = None
    interval_s: float | None = None

    def __post_init__(self) -> None:
        t, h, w = self.grid
        if min(self.grid) < 1 or len(self.features) != t * h * w or self.first < 0:
            raise ConfigError(
                f"expected features for the t·h·w tokens of the grid, first ≥ 0, got {list(self.features.shape)}, "
                f"grid {self.grid}, first {self.first}"
            )
        if self.counts is not None and (len(self.counts) != t or min(self.counts) < 1):
            raise ConfigError(f"expected a count of at least 1 for each of {t} steps, got {self.counts}")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def stands_for(self) -> int:
        """Vision tokens of the prompt that these represent, including repeated frames that were not encoded."""
        return self.grid[1] * self.grid[2] * int(self.repeats.sum())

    @property
    def repeats(self) -> Tensor:
        """int64 [t]: `counts`, or ones where it is None."""
        return torch.tensor(self.counts or (1,) * self.grid[0])

    @property
    def steps(self) -> Tensor:
        """int64 [t]: the number of each step within the item."""
        return self.first + self.repeats.cumsum(0) - self.repeats

    @property
    def sizes(self) -> Tensor:
        """fp32 [t·h·w]: each token's size, the number of prompt tokens it represents."""
        return self.repeats.float().repeat_interleave(self.grid[1] * self.grid[2])

    def split(self, most: int) -> list["Vision"]:
        """Parts of at most `most` tokens, or of one step where a step has more."""
        t, h, w = self.grid
        each = max(1, most // (h * w))
        steps, parts = self.steps.tolist(), []
        for begin in range(0, t, each):
            end = min(begin + each, t)
            counts = None if self.counts is None else self.counts[begin:end]
            features = self.features[begin * h * w : end * h * w]
            parts.append(Vision(features, (end - begin, h, w), steps[begin], counts, self.interval_s))
        return parts


Segment = Text | Vision
