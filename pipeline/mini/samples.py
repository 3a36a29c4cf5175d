"""Seeded samples with exact answers, one function per kind of input: frames as arrays, and all questions they allow.

    sample = video_sample("test", 7, frames=16, look=Look(max_things=4))
    sample.frames      uint8 [16, 96, 96, 3]
    sample.questions   one QA of every family that the scene offers, the caption first

The same arguments give the same sample. Sides are multiples of 16 px. Samples range from 64 vision tokens (an image of
128×128 px) to several thousand (64 frames of 448×448 px: 25,088).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from pipeline.mini.model import TEMPORAL_PATCH, TOKEN_PX
from pipeline.mini.questions import QA, SET_FAMILIES, ask_set
from pipeline.mini.render import picture, render
from pipeline.mini.scene import Scene, appearance_gap_s, sample_pair, sample_scene, sample_set
from pipeline.mini.world import questions_of, scene_seed

MIN_WATCHED_S = 0.25  # shortest time from the first frame to the last: less shows no motion


@dataclass(frozen=True)
class Look:
    """How difficult the frames of a sample are."""

    width_px: int = 96
    height_px: int = 96
    max_things: int = 3
    max_clutter: int = 4
    sign_share: float = 0.4
    sign_words: bool = False


@dataclass(frozen=True)
class Sample:
    """Input for a model, with questions and right answers.

    frames uint8 [T, H, W, 3]: of a video, or the images of a set, or one image; `times_s` [T] of a video's frames, else
    zero; `scenes` holds one scene, or one per image.
    """

    kind: str  # image | set | video
    frames: np.ndarray
    times_s: np.ndarray
    scenes: tuple[Scene, ...]
    questions: list[QA]

    @property
    def vision_tokens(self) -> int:
        """Vision tokens of the sample in the mini model."""
        return vision_tokens(self.kind, *self.frames.shape[:3])


def vision_tokens(kind: str, frames: int, height_px: int, width_px: int) -> int:
    """Vision tokens of a sample; an odd last frame of a video counts as a pair."""
    times = -(-frames // TEMPORAL_PATCH) if kind == "video" else frames
    return times * (height_px // TOKEN_PX) * (width_px // TOKEN_PX)


def image_sample(split: str, index: int, look: Look | None = None) -> Sample:
    """One still picture."""
    rng, knobs = _begin(split, index, look)
    scene = sample_scene(rng, duration_s=0.0, **knobs)
    return Sample("image", picture(scene)[None], np.zeros(1), (scene,), questions_of(scene, rng))


def set_sample(split: str, index: int, images: int = 3, look: Look | None = None) -> Sample:
    """Two to six pictures of unrelated scenes."""
    rng, knobs = _begin(split, index, look)
    return _of_images(sample_set(rng, images, **knobs), rng)


def pair_sample(split: str, index: int, look: Look | None = None) -> Sample:
    """Two pictures that differ in one thing; `difference` asks which."""
    rng, knobs = _begin(split, index, look)
    return _of_images(sample_pair(rng, **knobs), rng)


def video_sample(split: str, index: int, frames: int = 16, fps: float = 2.0, look: Look | None = None) -> Sample:
    """`frames` frames at `fps` frames per second, starting at a random time within the first 1 / `fps`.

    Raises ValueError for settings that would make answers a guess: too short to show motion, or so few frames per
    second that a thing that appears late is in one frame only.
    """
    if frames < 2 or (frames - 1) / fps < MIN_WATCHED_S:
        raise ValueError(
            f"expected frames that span {MIN_WATCHED_S:g} s, got {frames} at {fps:g} fps; take more or lower fps"
        )
    duration_s = frames / fps
    gap_s = appearance_gap_s(duration_s)
    if duration_s >= 2 * gap_s and 2 / fps > 0.85 * gap_s:
        raise ValueError(f"expected at least {2 / (0.85 * gap_s):.2f} fps over {duration_s:g} s, got {fps:g}")
    rng, knobs = _begin(split, index, look)
    scene = sample_scene(rng, duration_s=duration_s, **knobs)
    times_s = (np.arange(frames) + 0.9 * rng.random()) / fps
    return Sample("video", render(scene, times_s), times_s, (scene,), questions_of(scene, rng))


def _begin(split: str, index: int, look: Look | None) -> tuple[np.random.Generator, dict]:
    look = look or Look()
    if look.width_px % TOKEN_PX or look.height_px % TOKEN_PX:
        raise ValueError(f"expected sides in multiples of {TOKEN_PX} px, got {look.width_px}×{look.height_px}")
    return np.random.default_rng(scene_seed(split, index)), {**asdict(look), "held_out": split == "held_out"}


def _of_images(scenes: tuple[Scene, ...], rng: np.random.Generator) -> Sample:
    asked = (ask_set(scenes, family, rng) for family in SET_FAMILIES)
    questions = [qa for qa in asked if qa is not None]
    return Sample("set", np.stack([picture(scene) for scene in scenes]), np.zeros(len(scenes)), scenes, questions)
