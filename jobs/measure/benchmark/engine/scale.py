"""Sizes of the engine's measurements: the embedded model on a CPU, a 7B model's shape on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from jobs.measure.benchmark.decoder import QWEN2_5_VL, Decoder
from jobs.measure.benchmark.engine.subject import Drawn, Mini, Subject, Video
from lightkv import Bits, LightKVConfig, Memory
from lightkv.paper import QWEN2_5_7B

PLAIN, STREAMED = "whole prompt, plain", "streamed, plain"
RETENTION = 0.25
BUDGET = 2048  # vision tokens
BUDGETED = f"folded, budget of {BUDGET:,} tokens"


@dataclass(frozen=True)
class EngineScale:
    """Sizes of all parts.

    subject         builds the model; also called in new processes
    minutes         lengths of the videos of `memory`, ascending, at 1 fps; `plain_minutes` at most without compression
    units, answers  of throughput: sets of equal videos, and how many answers share decode steps
    prompts         numbers of prompts on one video
    pieces          tokens of a piece, when many pieces are compared with one
    budget_s        time per part for further rounds, after the first `rounds`
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    subject: Callable[[], Subject]
    minutes: tuple[int, ...]
    plain_minutes: int
    side_px: int
    units: tuple[tuple[Video, ...], ...]
    answers: int
    prompts: tuple[int, ...]
    asked: Video
    compared: tuple[Video, ...]
    pieces: int
    chunk_tokens: int
    rounds: int
    budget_s: float

    def ours(self, model: Any, method: str = "lightkv") -> LightKVConfig:
        return LightKVConfig.for_model(model.config, RETENTION, method=method)

    def variants(self, model: Any) -> dict[str, tuple[LightKVConfig | None, Memory]]:
        """Variants of the engine's memory by name; each adds to the one before it."""
        ours, memory = self.ours(model), partial(Memory, chunk_tokens=self.chunk_tokens)
        return {
            STREAMED: (None, memory()),
            "lightkv 25%": (ours, memory()),
            "+ folded": (ours, memory(fold=True)),
            "+ 8 bits": (ours, memory(Bits(8), fold=True)),
            "+ 4 bits": (ours, memory(Bits(4), fold=True)),
            BUDGETED: (ours, memory(fold=True, budget=BUDGET)),
        }


VARIANTS = (STREAMED, "lightkv 25%", "+ folded", "+ 8 bits", "+ 4 bits", BUDGETED)


def on_cpu() -> EngineScale:
    """The embedded model. Two frames of 64 × 64 px, smaller than in training, have 16 tokens."""
    return EngineScale(
        name="mini",
        device=torch.device("cpu"),
        dtype=torch.float32,
        subject=partial(Mini, 32),
        minutes=(1, 10, 30, 120),
        plain_minutes=30,
        side_px=64,
        units=(
            tuple(Video(number, 16, 96, 2.0) for number in range(24)),
            tuple(Video(number, 64, 96, 2.0) for number in range(8)),
            tuple(Video(number, 600, 96) for number in range(2)),
        ),
        answers=16,
        prompts=(1, 2, 4, 8),
        asked=Video(0, 64, 224, 4.0),
        compared=tuple(Video(100 + number, 16, 96, 2.0) for number in range(12)),
        pieces=100,
        chunk_tokens=4096,
        rounds=3,
        budget_s=30.0,
    )


def on_gpu(device: torch.device) -> EngineScale:
    """Qwen2.5-VL-7B's shape in bf16, two frames of 448 × 448 px have 256 tokens; about four minutes, estimated."""
    decoder = Decoder("qwen2.5-vl-7b", QWEN2_5_7B, QWEN2_5_VL, LightKVConfig.published("qwen2.5-vl-7b"))
    return EngineScale(
        name="qwen2.5-vl-7b, random weights",
        device=device,
        dtype=torch.bfloat16,
        subject=partial(Drawn, decoder, device, torch.bfloat16, 32),
        minutes=(1, 10, 30),
        plain_minutes=10,
        side_px=448,
        units=(
            tuple(Video(number, 32, 448) for number in range(8)),
            tuple(Video(number, 256, 448) for number in range(2)),
        ),
        answers=16,
        prompts=(1, 2, 4, 8),
        asked=Video(0, 128, 448),
        compared=tuple(Video(100 + number, 32, 448) for number in range(4)),
        pieces=1024,
        chunk_tokens=4096,
        rounds=2,
        budget_s=0.0,
    )
