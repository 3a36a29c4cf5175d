"""Make scenes, encode them once and ask about them under every method: one Parquet part of raw answers per cell.

A part is written completely or not at all. Its name contains a key of everything that it depends on, except the code:
an interrupted run continues, and a changed suite, method or model is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs.exact_match import words
from jobs.measure.evaluate.asking import Asker, Encoded, Question
from jobs.measure.evaluate.config import CAPTIONS, MOST_SCENES, PLAIN, Cell, EvaluateConfig
from jobs.measure.evaluate.methods import Treatment, treatment
from lightkv import LightKVError, estimate
from pipeline.captioning.models import ModelCard
from pipeline.mini.questions import QA
from pipeline.mini.samples import Look, Sample, image_sample, pair_sample, set_sample, video_sample
from pipeline.version import code_version

SCHEMA = pa.schema(
    [
        pa.field("suite", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("retention", pa.float64(), nullable=False),  # as configured; 1 for the plain model
        pa.field("error", pa.string(), nullable=False),  # why there are no answers; such a cell has one row
        pa.field("scene", pa.int32()),  # 0-based in the suite
        pa.field("family", pa.string()),
        pa.field("question", pa.string()),
        pa.field("truth", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("right", pa.bool_()),  # exact match of words, digits and punctuation
        pa.field("reached", pa.float64()),  # share of vision KV kept, mean over layers and batch; 4 bits: a quarter
        pa.field("vision_tokens", pa.int64()),  # that enter the decoder
        pa.field("text_tokens", pa.int64()),
        pa.field("kv_bytes", pa.int64()),  # after prefill; text and a batch's padding included
        pa.field("flops", pa.int64()),  # of the decoder's prefill by the cost model, without the vision tower
    ]
)


@dataclass
class Scene:
    """A sample's questions and vision tokens; frames are rendered again if a method needs them."""

    number: int
    questions: list[QA]
    encoded: Encoded


class Shard:
    """A share of every suite's scenes, and the model to ask. One per process."""

    def __init__(self, config: EvaluateConfig, number: int = 0, of: int = 1) -> None:
        self.config = config
        self.asker = Asker(config.model, config.batch_prompts, config.batch_tokens)
        self._number, self._of = number, of
        self._held: tuple[str, list[Scene]] | None = None

    def ask(self, cell: Cell) -> list[dict[str, Any]]:
        """Rows of `SCHEMA` for this shard's part of a cell. Raises `lightkv.ConfigError` if it cannot be reached."""
        suite, scenes = self.config.suites[cell.suite], self._scenes(cell.suite)
        how = Treatment()
        if cell.method != PLAIN:
            how = treatment(self.config, cell.method, suite, cell.retention, self.asker.card.config)
        tokens = {scene.number: scene.encoded.vision_tokens for scene in scenes}
        if how.frames is not None:
            scenes = [self._changed(cell.suite, scene, how) for scene in scenes]
        asked = [(scene, qa) for scene in scenes for qa in scene.questions]
        # A batch takes as long as its longest prompt and answer: sort similar ones together.
        asked.sort(key=lambda pair: (pair[1].family in CAPTIONS, len(pair[1].question.split()), pair[0].number))
        if how.memory is not None:  # the engine makes its own batches and shares a scene between its questions
            asked = [(scene, qa) for scene in scenes for qa in scene.questions]
        questions = [Question(scene.encoded, qa.question) for scene, qa in asked]
        answers = self.asker.answers(questions, how.config, how.memory)
        rows = []
        for (scene, qa), answer in zip(asked, answers, strict=True):
            text_tokens = answer.prompt_tokens - answer.vision_tokens
            rows.append(
                {
                    **{"suite": cell.suite, "method": cell.method, "retention": cell.retention, "error": ""},
                    **{"scene": scene.number, "family": qa.family, "question": qa.question, "truth": qa.answer},
                    "answer": answer.text,
                    "right": words(answer.text) == words(qa.answer),
                    "reached": answer.retention * answer.vision_tokens / tokens[scene.number] * how.bits / 16,
                    "vision_tokens": answer.vision_tokens,
                    "text_tokens": text_tokens,
                    "kv_bytes": round(answer.kv_share * answer.kv_bytes_uncompressed),
                    "flops": self._flops(how, scene.encoded, text_tokens),
                }
            )
        return sorted(rows, key=lambda row: (row["scene"], row["family"], row["question"]))

    def _scenes(self, suite: str) -> list[Scene]:
        if self._held is None or self._held[0] != suite:
            numbers = range(self._number, self.config.suites[suite].scenes, self._of)
            self._held = suite, [self._scene(suite, number) for number in numbers]
        return self._held[1]

    def _scene(self, suite: str, number: int) -> Scene:
        made = sample(self.config, suite, number)
        families = self.config.suites[suite].families
        questions = [qa for qa in made.questions if qa.family in families]
        return Scene(number, questions, encode(self.asker, made.kind, made.frames))

    def _changed(self, suite: str, scene: Scene, how: Treatment) -> Scene:
        made = sample(self.config, suite, scene.number)
        assert how.frames is not None
        return Scene(scene.number, scene.questions, encode(self.asker, made.kind, how.frames(made.frames)))

    def _flops(self, how: Treatment, encoded: Encoded, text_tokens: int) -> int:
        return estimate(
            self.asker.card.config,
            vision_tokens=encoded.vision_tokens,
            text_tokens=text_tokens,
            config=how.config,
            frames=sum(t for t, _, _ in encoded.grids),
        ).flops


def sample(config: EvaluateConfig, name: str, number: int) -> Sample:
    """Scene `number` of a suite, the same for every method; suites and seeds share no scenes."""
    suite = config.suites[name]
    index = zlib.crc32(f"{config.seed}/{name}".encode()) * MOST_SCENES + number
    look = Look(suite.width_px, suite.height_px, suite.max_things, suite.max_clutter, suite.sign_share)
    return _MAKERS[suite.kind](config.split, index, suite, look)


_MAKERS = {
    "image": lambda split, index, suite, look: image_sample(split, index, look),
    "pair": lambda split, index, suite, look: pair_sample(split, index, look),
    "set": lambda split, index, suite, look: set_sample(split, index, suite.frames, look),
    "video": lambda split, index, suite, look: video_sample(split, index, suite.frames, suite.fps, look),
}


def encode(asker: Asker, kind: str, frames: np.ndarray) -> Encoded:
    """Vision tokens of frames uint8 [T, H, W, 3]. Time positions count one per frame pair, as in training."""
    if kind == "video":
        return asker.encode("video", [(0, frames)])
    return asker.encode("images", [(number, frame[None]) for number, frame in enumerate(frames)])


def weights_id(card: ModelCard) -> str:
    """Identify a model's weights: by a digest of the files, or by the hub's commit."""
    files = sorted(Path(card.location).glob("*.safetensors")) if Path(card.location).is_dir() else []
    if not files:
        return f"{card.location}@{card.revision or getattr(card.config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Shards:
    """The shards of a run: one in this process, or one per process with one torch thread each."""

    def __init__(self, config: EvaluateConfig, procs: int) -> None:
        self._alone = Shard(config) if procs == 1 else None
        context = get_context("spawn")
        self._pools = [
            ProcessPoolExecutor(1, context, initializer=_start, initargs=(config, number, procs))
            for number in range(procs if procs > 1 else 0)
        ]

    def ask(self, cell: Cell) -> list[dict[str, Any]]:
        """Rows of the cell, sorted by scene; one row with the error if the cell cannot be reached."""
        try:
            if self._alone is not None:
                return self._alone.ask(cell)
            parts = [pool.submit(_ask, cell) for pool in self._pools]
            return sorted(chain.from_iterable(part.result() for part in parts), key=lambda row: row["scene"])
        except LightKVError as error:
            known = {"suite": cell.suite, "method": cell.method, "retention": cell.retention}
            return [dict.fromkeys(SCHEMA.names) | known | {"error": str(error)}]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


_shard: list[Shard] = []  # of this worker process


def _start(config: EvaluateConfig, number: int, of: int) -> None:
    torch.set_num_threads(1)
    _shard.append(Shard(config, number, of))


def _ask(cell: Cell) -> list[dict[str, Any]]:
    return _shard[0].ask(cell)


def part_path(folder: Path, cell: Cell, key: str) -> Path:
    """The file of a cell's answers."""
    return folder / "cells" / f"{cell.suite}.{cell.method}.{cell.retention:g}.{key}.parquet"


def write_part(path: Path, rows: Sequence[dict[str, Any]], seconds: float) -> None:
    """Write a cell's rows atomically, with their seconds, device and code version."""
    made = {"seconds": seconds, "code_version": code_version(), "device": device_name(), "torch": torch.__version__}
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA).replace_schema_metadata({"made": json.dumps(made)})
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(table, half, compression="zstd")
    half.replace(path)


@cache
def device_name() -> str:
    """The name of the GPU, or of the CPU with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"
