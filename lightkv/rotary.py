"""RoPE positions of a prompt that arrives piece by piece, and keys taken out of their rotation."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightkv.segments import Vision


class Positions:
    """Hands out the positions that `generate` would give the same prompt in one piece.

    Ordinary RoPE counts tokens. M-RoPE (Qwen2-VL, Qwen2.5-VL) gives a vision token its step in time, row and column
    from where its item begins; text goes on after the larger side of the item's frames, whatever its length in time.
    """

    def __init__(self, model_config: Any) -> None:
        rope = getattr(model_config.get_text_config(), "rope_parameters", None) or {}
        self.axes = 3 if "mrope_section" in rope else 1
        self._per_second = getattr(getattr(model_config, "vision_config", None), "tokens_per_second", None)
        self._next = 0  # of text, and of a new item
        self._begin = 0  # of the item in progress
        self._highest = -1

    def text(self, count: int, *, taken: bool = True) -> Tensor:
        """int64 [axes, count] of the next text tokens; with taken=False only looked at."""
        place = (torch.arange(count) + self._next).expand(self.axes, -1)
        if taken:
            self._next += count
            self._saw(place)
        return place

    def vision(self, vision: "Vision") -> Tensor:
        """int64 [axes, t·h·w] of the next part of an item."""
        t, h, w = vision.grid
        if self.axes == 1:
            return self.text(t * h * w)
        if vision.first == 0:
            self._begin = self._next
        interval = 1.0
        if vision.interval_s is not None and self._per_second is not None:
            interval = self._per_second * torch.tensor(vision.interval_s)
        time = (vision.steps * interval).long()
        grid = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
        place = torch.stack([axis.flatten() for axis in grid]) + self._begin
        self._next = self._begin + max(h, w)
        self._saw(place)
        return place

    @property
    def generated(self) -> int:
        """Of the first generated token: after the highest of all, as `generate` counts."""
        return self._highest + 1

    def _saw(self, place: Tensor) -> None:
        if place.numel():
            self._highest = max(self._highest, int(place.max()))


def turned(states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """states [..., S, d] rotated to the angles (cos, sin) [S, d], as the attention of Llama and Qwen does it."""
    cos, sin = angles
    return states * cos + _half(states) * sin


def unturned(states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """The inverse of `turned`, also where the angles are scaled (YaRN)."""
    cos, sin = angles
    return (states * cos - _half(states) * sin) / (cos.square() + sin.square())


def _half(states: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
