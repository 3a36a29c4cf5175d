"""Measures exact match of the mini model per task: on seen and held-out scenes, and on H.264 files."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from pipeline.mini.accuracy import as_line, exact_match, standard_error
from pipeline.mini.coded import coded_exact_match
from pipeline.mini.data import Task
from pipeline.mini.world import DemoStyle
from pipeline.version import code_version


@dataclass(frozen=True)
class Plan:
    """What to measure: tasks with numbers of batches, on seen and on held-out scenes, and styles of H.264 files."""

    known: Sequence[tuple[Task, int]]
    held_out: Sequence[tuple[Task, int]]
    coded: Sequence[DemoStyle]
    videos: int = 30  # per style
    videos_seed: int = 1


_IMAGE, _VIDEO = Task("image", 1, 96, 96, 50, 3), Task("video", 8, 96, 96, 20, 3)
CARD = Plan(
    known=(
        (_IMAGE, 6),
        (Task("image", 1, 128, 128, 50, 4), 4),
        (Task("image", 1, 224, 224, 20, 4), 8),
        (Task("video", 4, 96, 96, 25, 3), 10),
        (_VIDEO, 10),
        (Task("video", 8, 128, 128, 10, 4), 15),
        (Task("video", 3, 224, 224, 10, 4), 10),
        (Task("video", 8, 224, 224, 4, 4), 15),
        (Task("video", 16, 96, 96, 10, 3), 10),
        *((Task("set", images, 96, 96, 20, 2), 8) for images in (2, 3, 4)),
    ),
    held_out=((_IMAGE, 6), (_VIDEO, 10), (Task("set", 3, 96, 96, 20, 2), 8)),
    coded=(DemoStyle(), DemoStyle(128, 128, max_things=4, sign_share=0.4)),
)


def measure(weights: Path, split: str, plan: Plan = CARD, told: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure the weights in float32 and return a JSON-ready result; `told` gets one line per kind of input."""
    tokenizer = AutoTokenizer.from_pretrained(weights)
    model = AutoModelForImageTextToText.from_pretrained(weights, dtype=torch.float32).eval()
    inputs = []
    for name, tasks in ((split, plan.known), ("held_out", plan.held_out)):
        for task, batches in tasks:
            scores = exact_match(model, tokenizer, name, [(task, batches)])
            inputs.append({"split": name, **_described(task, batches), "tasks": _told(scores)})
            told(f"{name} {task.kind} {task.height_px}×{task.width_px} ×{_frames(task)}: {as_line(scores)}")
    coded = []
    for style in plan.coded if plan.videos else ():
        scores = coded_exact_match(model, tokenizer, plan.videos, plan.videos_seed, style)
        coded.append({**asdict(style), "videos": plan.videos, "seed": plan.videos_seed, "tasks": _told(scores)})
        told(f"H.264 {style.height_px}×{style.width_px}: {as_line(scores)}")
    return {**_identity(weights, model), "split": split, "inputs": inputs, "coded": coded}


def weights_sha256(weights: Path) -> str:
    """SHA-256 of the weights file."""
    return hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()


def _identity(weights: Path, model: Qwen2_5_VLForConditionalGeneration) -> dict[str, Any]:
    return {
        "weights_sha256": weights_sha256(weights),
        "parameters": sum(param.numel() for param in model.parameters()),
        "dtype": "float32",
        "versions": {
            "code": code_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
    }


def _described(task: Task, batches: int) -> dict[str, Any]:
    return {
        "kind": task.kind,
        "frames": _frames(task),
        "height_px": task.height_px,
        "width_px": task.width_px,
        "max_things": task.max_things,
        "vision_tokens": task.grid.tokens,
        "first_scene": 0,
        "scenes": task.scenes * batches,
    }


def _frames(task: Task) -> int:
    """Frames of a video, images of a set, 1 for an image."""
    return 2 * task.times if task.kind == "video" else task.times


def _told(scores: dict[str, tuple[int, int]]) -> dict[str, dict[str, float]]:
    return {
        family: {
            "right": right,
            "asked": asked,
            "share": round(right / asked, 4),
            "standard_error": round(standard_error(right, asked), 4),
        }
        for family, (right, asked) in scores.items()
    }
