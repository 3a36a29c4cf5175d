"""RoPE positions of a prompt that arrives piece by piece; rotating keys and undoing the rotation."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkv.errors import ConfigError

if TYPE_CHECKING:
    from lightkv.engine.segments import Vision


class Positions:
    """Assigns the positions that `generate` gives the same prompt in one piece, counting repeated steps.

    Ordinary RoPE counts tokens. M-RoPE (Qwen2-VL, Qwen2.5-VL) numbers a vision token by its time step, row and column,
    from where its item begins. Text after an item continues after the larger side of its frames, whatever the item's
    duration, and so does the answer.
    Raises ConfigError for a later part of an item that does not follow an earlier part.
    """

    def __init__(self, model_config: Any) -> None:
        rope = getattr(model_config.get_text_config(), "rope_parameters", None) or {}
        self.axes = 3 if "mrope_section" in rope else 1
        self._per_second = getattr(getattr(model_config, "vision_config", None), "tokens_per_second", None)
        self._next = 0  # position of the next text token or item
        self._begin = 0  # first position of the item in progress
        self._frame: tuple[int, int] | None = None  # rows and columns of that item; None after text

    def text(self, count: int, *, taken: bool = True) -> Tensor:
        """int64 [axes, count]: positions of the next text tokens; with taken=False they stay free."""
        place = (torch.arange(count) + self._next).expand(self.axes, -1)
        if taken and count:
            self._next, self._frame = self._next + count, None
        return place

    def vision(self, vision: "Vision") -> Tensor:
        """int64 [axes, t·h·w]: positions of the next part of an item."""
        _, h, w = vision.grid
        if vision.first == 0:
            self._begin = self._next
        elif self._frame != (h, w):
            raise ConfigError(
                f"a part from step {vision.first} on, {h} × {w}, must come right after one of the same item, "
                f"got {'text or nothing' if self._frame is None else self._frame} before it"
            )
        self._frame = h, w
        steps = vision.steps
        if self.axes == 1:
            self._next = self._begin + (int(steps[-1]) + int(vision.repeats[-1])) * h * w
            return self._begin + (steps[:, None] * h * w + torch.arange(h * w)).flatten()[None]
        interval = 1.0
        if vision.interval_s is not None and self._per_second is not None:
            interval = self._per_second * torch.tensor(vision.interval_s)
        self._next = self._begin + max(h, w)
        grid = torch.meshgrid((steps * interval).long(), torch.arange(h), torch.arange(w), indexing="ij")
        return self._begin + torch.stack([axis.flatten() for axis in grid])


def turned(states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """states [..., S, d] rotated by the angles (cos, sin) [S, d], as in Llama and Qwen."""
    cos, sin = angles
    return states * cos + _half(states) * sin


def unturned(states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """The inverse of `turned`, also for scaled angles (YaRN)."""
    cos, sin = angles
    return (states * cos - _half(states) * sin) / (cos.square() + sin.square())


def _half(states: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
