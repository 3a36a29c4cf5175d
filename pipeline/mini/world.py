"""The rendered world: seeded scenes with exactly known captions and answers, as arrays or as real H.264 files.

Training, validation and test scenes come from disjoint seed ranges (`scene_seed`). Scenes of the split "held_out" show
at least one colour–shape combination that scenes of the other splits never show (`scene.HELD_OUT`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipeline.mini.questions import FAMILIES, QA, ask, caption
from pipeline.mini.render import render
from pipeline.mini.scene import Scene, sample_scene

SPLITS = ("train", "validation", "test", "demo", "held_out")
SPLIT_SIZE = 1 << 48


def scene_seed(split: str, index: int) -> int:
    """The seed of scene `index` of a split; no two (split, index) pairs share one."""
    if split not in SPLITS:
        raise ValueError(f"expected a split of {SPLITS}, got {split!r}")
    if not 0 <= index < SPLIT_SIZE:
        raise ValueError(f"expected 0 <= index < {SPLIT_SIZE}, got {index}")
    return SPLITS.index(split) * SPLIT_SIZE + index


def questions_of(scene: Scene, rng: np.random.Generator, families: Sequence[str] = tuple(FAMILIES)) -> list[QA]:
    """One question of every family that the scene offers, in the families' order."""
    asked = (ask(scene, family, rng) for family in families)
    return [qa for qa in asked if qa is not None]


def frame_times(scene: Scene, fps: float) -> np.ndarray:
    """Times (s) of the frames in a file of this scene: frame i is shown at i / fps."""
    return np.arange(max(round(scene.duration_s * fps), 1)) / fps


def write_video(path: Path, scenes: Scene | Sequence[Scene], fps: int = 12, crf: int = 20) -> None:
    """Write an H.264 mp4 (yuv420p, no sound); several scenes of one size follow each other with hard cuts.

    Width and height must be even. The same arguments give the same bytes with the same encoder version.
    """
    scenes = [scenes] if isinstance(scenes, Scene) else list(scenes)
    sizes = {(scene.width_px, scene.height_px) for scene in scenes}
    if len(sizes) != 1:
        raise ValueError(f"expected one or more scenes of one frame size, got sizes {sorted(sizes)}")
    (width, height) = sizes.pop()
    if width % 2 or height % 2:
        raise ValueError(f"expected an even width and height (yuv420p), got {width}×{height}")
    with av.open(str(path), "w", format="mp4") as container:
        # x264's macroblock tree depends on the address of its buffers with AVX-512.
        options = {"crf": str(crf), "preset": "fast", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        index = 0
        for scene in scenes:
            for image in render(scene, frame_times(scene, fps)):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, fps)
                container.mux(stream.encode(frame))
                index += 1
        container.mux(stream.encode())


@dataclass(frozen=True)
class DemoStyle:
    """The style of demo videos; the defaults are what the shipped weights answer best."""

    width_px: int = 96
    height_px: int = 96
    duration_s: float = 8.0
    max_things: int = 3
    sign_share: float = 0.0


def demo_scene(index: int, seed: int, style: DemoStyle | None = None) -> tuple[Scene, np.random.Generator]:
    """The demo's scene `index`, from seeds that training never sees, and the random generator for its questions."""
    rng = np.random.default_rng([scene_seed("demo", index), seed])
    style = style or DemoStyle()
    size = (style.width_px, style.height_px)
    return sample_scene(rng, *size, style.duration_s, style.max_things, sign_share=style.sign_share), rng


def render_demo(folder: Path, count: int, seed: int = 0, style: DemoStyle | None = None) -> Path:
    """Write `count` videos `clip-000.mp4` … and `truth.jsonl`; return the path of the latter.

    One line per video: `file`, `duration_s`, `fps`, `caption`, `answers` (list of family, question, answer).
    """
    folder.mkdir(parents=True, exist_ok=True)
    truth = folder / "truth.jsonl"
    with truth.open("w", encoding="utf-8") as lines:
        for index in range(count):
            scene, rng = demo_scene(index, seed, style)
            fps = (8, 12, 24)[index % 3]
            name = f"clip-{index:03d}.mp4"
            write_video(folder / name, scene, fps)
            row = {
                "file": name,
                "duration_s": scene.duration_s,
                "fps": fps,
                "caption": caption(scene),
                "answers": [qa._asdict() for qa in questions_of(scene, rng)],
            }
            lines.write(json.dumps(row) + "\n")
    return truth
