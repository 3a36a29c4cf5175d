"""Measures accuracy on demo videos written as H.264, decoded, sampled, and answered by plain transformers."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import av
import numpy as np
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from pipeline.mini.accuracy import row_of
from pipeline.mini.answer import answer, video_inputs
from pipeline.mini.data import VIDEO_FAMILIES
from pipeline.mini.questions import QA
from pipeline.mini.world import DemoStyle, render_demo


def sampled_frames(path: Path, fps: float = 2.0) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of a file of constant frame rate, one every 1 / `fps` seconds from the start."""
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    picked = np.unique(np.round(np.arange(0, len(frames), rate / fps)).astype(int))
    return np.stack([frames[index] for index in picked if index < len(frames)])


def coded_exact_match(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    seed: int,
    style: DemoStyle,
    families: Collection[str] = ("caption", *VIDEO_FAMILIES),
) -> dict[str, tuple[int, int]]:
    """family → (right, asked) over `count` demo videos at 2 frames a second."""
    right, asked = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for line in render_demo(Path(folder), count, seed, style).read_text().splitlines():
            row = json.loads(line)
            inputs = video_inputs(sampled_frames(Path(folder) / row["file"]))
            for qa in (QA(**known) for known in row["answers"]):
                if qa.family in families:
                    asked[row_of(qa)] += 1
                    right[row_of(qa)] += answer(model, tokenizer, inputs, qa.question) == qa.answer
    return {family: (right[family], asked[family]) for family in sorted(asked)}
