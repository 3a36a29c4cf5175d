"""A stage and the settings of a configuration, as methods read them; config.py checks them and derives them."""

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

    `windows` per side are for the published method, which works window by window.
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
            raise ConfigError(f"Stage.layer is the 0-based decoder layer it runs after, or -1, got {self.layer}")
        check_stage(self.windows, self.drop)


@dataclass(frozen=True)
class Settings:
    """What a stage is told, beside the stage itself. `LightKVConfig` is these fields, checked.

    stages        in ascending layer order; none leaves the model as it is
    positions     "keep": every survivor keeps its RoPE position and decoding continues from the original length;
                  "compact": vanished positions close up per stage and decoding continues from the compacted length
    method        a name in METHODS (table.py): "lightkv", ours: merging in space and time, guided by the question;
                  "spacetime", the same without the question; "asked", which drops what the question passes over
                  instead of merging it; "published", the paper's; or a baseline (baselines.py). The fields below
                  belong to the methods named; elsewhere they stay as they are

    windows       (published) "frame": windows lie on each frame; "spatiotemporal": they span consecutive frames of an
                  item; "released": the published code's fictional square grid, laid anew before each stage
    window_frames (published) frames a spatiotemporal window spans; None: the whole item
    budget        (published) "window": every window gives floor(drop · m) of its m tokens, as published; "item": an
                  image or video gives floor(drop · M) in all, spread over its windows, which small windows need
    guidance      (published) "prompt" (all text votes), "question" (text after the vision tokens), "uniform" (equal
                  weights, which alone need no layer before the stage)
    rounds        (lightkv, spacetime, asked) rounds of merging per stage
    distance      (lightkv, spacetime, asked) what a grid step between two tokens adds to their difference
    seed          (random) of the draw
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
