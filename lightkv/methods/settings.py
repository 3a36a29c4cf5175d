"""Defines Stage and the fields of LightKVConfig, which the table of methods reads; config.py checks them."""

from dataclasses import dataclass
from typing import Literal

from lightkv.errors import ConfigError
from lightkv.methods.schedule import USUAL_DROP
from lightkv.methods.spacetime import DISTANCE, ROUNDS
from lightkv.vision.families import EMBEDDINGS

Positions = Literal["keep", "compact"]
WindowScope = Literal["frame", "spatiotemporal", "released"]
Budget = Literal["window", "item"]


@dataclass(frozen=True)
class Stage:
    """Compression after decoder layer `layer` (0-based; -1: on the embeddings) that removes the share `drop`.

    `windows` is the number of windows per side of a frame, for the published method only.
    """

    layer: int
    windows: int = 1
    drop: float = USUAL_DROP

    def __post_init__(self) -> None:
        for name in ("layer", "windows"):
            if type(getattr(self, name)) is not int:
                raise ConfigError(f"Stage.{name} must be a whole number, got {getattr(self, name)!r}")
        if type(self.drop) not in (int, float):
            raise ConfigError(f"Stage.drop must be a number, got {self.drop!r}")
        if self.layer < EMBEDDINGS:
            raise ConfigError(f"Stage.layer must be the 0-based decoder layer that it follows, or -1, got {self.layer}")
        check_stage(self.windows, self.drop)


@dataclass(frozen=True)
class Settings:
    """The fields of `LightKVConfig`, unchecked.

    stages        in ascending layer order; an empty tuple leaves the model unchanged
    positions     "keep": every survivor keeps its RoPE position, and decoding continues from the original length;
                  "compact": each stage closes the gaps, and decoding continues from the compacted length
    method        a name in METHODS (table.py). "lightkv" (ours) merges in space and time, guided by the question;
                  "spacetime" does so without the question; "asked" drops what the question does not attend to,
                  instead of merging it; "published" is the paper's method; the others are baselines (baselines.py).
                  A field below applies to the methods in brackets; for other methods it must keep its default

    windows       (published) "frame": windows lie on each frame; "spatiotemporal": they span consecutive frames of an
                  item; "released": the published code's fictional square grid, laid out anew before each stage
    window_frames (published) frames that a spatiotemporal window spans; None: the whole item
    budget        (published) "window": each window removes floor(drop · m) of its m tokens, as published; "item": an
                  item removes floor(drop · M) of its M tokens, spread over its windows; small windows need this
    guidance      (published) "prompt": all text votes; "question": only text after the vision tokens votes;
                  "uniform": equal weights, the only choice that needs no layer before the stage
    rounds        (lightkv, spacetime, asked) merging rounds per stage
    distance      (lightkv, spacetime, asked) what one grid step between two tokens adds to their difference
    seed          (random) seed of the draw
    """

    stages: tuple[Stage, ...]
    positions: Positions = "keep"
    windows: WindowScope = "frame"
    window_frames: int | None = None
    guidance: str = "prompt"
    budget: Budget = "window"
    method: str = "published"
    rounds: int = ROUNDS
    distance: float = DISTANCE
    seed: int = 0

    @property
    def frames_per_window(self) -> int | None:
        """Consecutive frames that share a window; None: all frames of the item."""
        return self.window_frames if self.windows == "spatiotemporal" else 1


def check_stage(windows: int, drop: float) -> None:
    """Raises ConfigError unless windows ≥ 1 and 0 ≤ drop < 1."""
    if windows < 1:
        raise ConfigError(f"windows per side must be at least 1, got {windows}")
    if not 0.0 <= drop < 1.0:
        raise ConfigError(f"drop must be at least 0 and below 1, got {drop}")
