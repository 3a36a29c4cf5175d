"""Checks whether units fit the model's context: exactly as their frames arrive, and beforehand as far as a plan shows.

Compression does not change this: a merged token keeps its position, so all vision tokens before compression count.
"""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.captioning.encode import FrameEncoder
from pipeline.config import Frames
from pipeline.errors import UnitError
from pipeline.planning.estimate import expected_frames, window_s

_SURE = (
    0.9  # share of the expected frames: a header's length and rate are inexact, and no unit that fits may be refused
)


class ContextLimit:
    """The positions of the model's context, which a unit's text, vision tokens and answer must share."""

    def __init__(self, model_config: Any, encoder: FrameEncoder, max_new_tokens: int) -> None:
        self._limit: int = model_config.get_text_config().max_position_embeddings
        self._encoder, self._new = encoder, max_new_tokens

    def check(self, text_tokens: int, grids: Sequence[tuple[int, int, int]]) -> None:
        """Raise `UnitError` (prepare, ContextTooLong) if the text, items of these grids and the answer do not fit."""
        needed = text_tokens + self._encoder.positions(grids) + self._new
        if needed > self._limit:
            raise self._error(f"got {needed}")

    def refusal(self, unit: dict[str, Any], frames: Frames) -> UnitError | None:
        """The same error for a row of UNIT_SCHEMA that cannot fit whatever its prompts; None if it may fit."""
        sizing = self._encoder.sizing(frames)
        if unit["kind"] == "images":
            smallest = sizing.of(1, 1)
            grids = [self._encoder.grid(1, smallest.crop_h, smallest.crop_w)] * len(unit["uris"])
        elif unit["duration_s"] is None or unit["width"] is None:
            return None
        else:
            count = math.floor(_SURE * expected_frames(window_s(unit), unit["fps"] or 25.0, frames))
            size = sizing.of(unit["height"], unit["width"])
            grids = [self._encoder.grid(max(1, count), size.crop_h, size.crop_w)]
        needed = self._encoder.positions(grids) + self._new
        return self._error(f"it needs {needed} or more") if needed > self._limit else None

    def _error(self, got: str) -> UnitError:
        return UnitError(
            "prepare",
            "ContextTooLong",
            f"expected at most {self._limit} positions (the model's context), {got}; lower frames.max_frames, "
            "frames.max_px or model.max_new_tokens, or cut clips with clips.length_s",
        )
