"""Training batches from the rendered world: frames, packed questions, and labels of every vision token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.mini.batched import Grid
from pipeline.mini.model import TOKEN_PX
from pipeline.mini.questions import QA, ask, ask_set
from pipeline.mini.render import render
from pipeline.mini.scene import Scene, sample_scene
from pipeline.mini.vocabulary import COLORS, IM_END, IM_START, MOTIONS, SHAPES, SIZES
from pipeline.mini.world import scene_seed

# How often a family is asked relative to the others; every scene also has its caption. Others are not trained.
IMAGE_FAMILIES = {
    "exist": 1.8, "count": 1.4, "color": 1.2, "shape": 0.8, "size": 0.6, "digits": 2.0, "unanswerable": 0.4,
    "position": 1.6,
}  # fmt: skip
VIDEO_FAMILIES = {**IMAGE_FAMILIES, "motion": 2.0, "first": 1.0, "last": 1.0, "order": 1.4, "when": 1.0, "later": 0.8}
SET_FAMILIES = {"which_image": 1.5, "image_count": 0.2, "set_exist": 2.0}
QUESTIONS_PER_SCENE = {"image": 3, "video": 7, "set": 4}  # besides the caption; more where rendering costs more
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
DENSE_CLASSES = {
    "shape": len(SHAPES) + 1,
    "color": len(COLORS) + 1,
    "size": len(SIZES) + 1,
    "char_left": len(CHARACTERS) + 1,
    "char_right": len(CHARACTERS) + 1,
    "motion": len(MOTIONS) + 1,
    "row": 12,
    "column": 12,
    "time": 8,
}  # class 0 of the first six: background
IGNORED = -100  # the index that cross_entropy ignores


@dataclass(frozen=True)
class Batch:
    """One training batch of scenes with one grid.

    frames uint8 [B, times, 2, H, W, 3]; tail tensors int64 [B, L]; `target[b, i]` is the token that position i has to
    predict, −1 for none; `dense[name]` int64 [B, tokens].
    """

    grid: Grid
    frames: Tensor
    tail_ids: Tensor
    tail_offset: Tensor
    tail_slot: Tensor
    target: Tensor
    dense: dict[str, Tensor]
    questions: list[list[QA]]  # [B][slot]

    def to(self, device: torch.device) -> Batch:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.type == "Tensor"}
        return replace(self, **moved, dense={name: labels.to(device) for name, labels in self.dense.items()})


@dataclass(frozen=True)
class Task:
    """What one batch holds: kind and size of the input, number of scenes, and whether questions are asked."""

    kind: str  # image | video | set
    times: int
    height_px: int
    width_px: int
    scenes: int
    max_things: int
    asks: bool = True

    @property
    def grid(self) -> Grid:
        return Grid(self.kind, self.times, self.height_px // TOKEN_PX, self.width_px // TOKEN_PX)


_SQUARE, _MEDIUM = ((96, 96),), ((96, 128), (128, 96), (112, 112), (128, 128))  # (height, width) in px
_LARGE = ((128, 160), (160, 128), (144, 144), (96, 192), (160, 160), (192, 192))
_HUGE = ((224, 224), (192, 256), (256, 192))


def curriculum(rng: np.random.Generator, progress: float, token_budget: int) -> Task:
    """The task of one step at `progress` 0..1.

    First the vision encoder alone learns from single frame pairs; then come questions about images, about short small
    videos, about longer and larger ones, and about sets of images. `token_budget` bounds scenes × (vision tokens + 60);
    60 is an estimate for the questions.
    """
    times: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    if progress < 0.08:
        return Task("video", 1, 96, 96, token_budget // 36, 4, asks=False)
    if progress < 0.17:
        kind, sizes, times, things = "image", _SQUARE, (1,), 3
    elif progress < 0.45:
        kind, sizes, times, things = _draw(rng, ("image", "video"), (0.3, 0.7)), _SQUARE, (2, 3, 4), 4
    elif progress < 0.60:
        kind = _draw(rng, ("image", "video", "set"), (0.2, 0.65, 0.15))
        sizes, times, things = _draw(rng, (_SQUARE, _MEDIUM), (0.75, 0.25)), (2, 4, 4, 6), 4
    else:
        kind = _draw(rng, ("image", "video", "set"), (0.25, 0.55, 0.20))
        sizes = _draw(rng, (_SQUARE, _MEDIUM, _LARGE, _HUGE), (0.40, 0.32, 0.15, 0.13))
        times, things = ((1, 2, 3) if sizes is _HUGE else (1, 2, 4, 6, 8, 8)), 4
    height, width = _draw(rng, sizes)
    pairs = 1 if kind == "image" else _draw(rng, times)
    if kind == "set":
        pairs, things = _draw(rng, (2, 3, 4)), 2
        height, width = min(height, 160), min(width, 160)
    tokens = pairs * (height // TOKEN_PX) * (width // TOKEN_PX) + 60
    return Task(kind, pairs, height, width, max(token_budget // tokens, 2), things)


Option = TypeVar("Option")


def _draw(rng: np.random.Generator, options: Sequence[Option], chances: Sequence[float] | None = None) -> Option:
    return options[int(rng.choice(len(options), p=chances))]


def build_batch(
    tokenizer: PreTrainedTokenizerFast, task: Task, split: str, first_index: int, *, degrade: bool = True
) -> Batch:
    """Render scenes `first_index` … of the split and ask about them. `degrade` imitates lossy coding."""
    pictures, slots, labels, asked = [], [], [], []
    for index in range(first_index, first_index + task.scenes):
        rng = np.random.default_rng(scene_seed(split, index))
        frames, scenes, times = _render(task, rng, split == "held_out")
        pictures.append(_degrade(frames, rng) if degrade else frames)
        labels.append(_dense_labels(task, scenes, times))
        asked.append(_questions(task, scenes, rng) if task.asks else [])
        slots.append([_encode(tokenizer, qa) for qa in asked[-1]])
    stacked = torch.from_numpy(np.stack(pictures))
    dense = {name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in DENSE_CLASSES}
    return Batch(task.grid, stacked, *_pack(slots), dense, asked)


def _render(task: Task, rng: np.random.Generator, held_out: bool) -> tuple[np.ndarray, list[Scene], np.ndarray]:
    """Frames [times, 2, H, W, 3], the scenes shown (one, or one per image of a set), the frames' times [times, 2]."""
    size = (task.width_px, task.height_px)
    if task.kind == "video":
        fps = float(rng.choice([1.0, 1.5, 2.0, 2.0, 2.0, 3.0, 4.0]))
        count = 2 * task.times
        scene = sample_scene(rng, *size, duration_s=count / fps, max_things=task.max_things, held_out=held_out)
        times = (np.arange(count) + rng.random() * 0.9) / fps
        return render(scene, times).reshape(task.times, 2, *size[::-1], 3), [scene], times.reshape(task.times, 2)
    scenes = [
        sample_scene(rng, *size, duration_s=0.0, max_things=task.max_things, held_out=held_out)
        for _ in range(task.times)
    ]
    frames = np.stack([render(scene, [0.0, 0.0]) for scene in scenes])
    return frames, scenes, np.zeros((task.times, 2))


def _degrade(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Imitate lossy coding: loss of fine detail, noise and a change of contrast, each in some of the samples."""
    choice = rng.random(3)
    if choice[0] > 0.6 and choice[1] > 0.5 and choice[2] > 0.5:
        return frames
    values = frames.astype(np.int16)
    if choice[0] < 0.6:  # blend with the half-resolution picture: colour bleed and softness
        *lead, height, width, channels = values.shape
        blocks = values.reshape(*lead, height // 2, 2, width // 2, 2, channels)
        coarse = (
            blocks[..., 0, :, 0, :] + blocks[..., 0, :, 1, :] + blocks[..., 1, :, 0, :] + blocks[..., 1, :, 1, :]
        ) // 4
        share = int(rng.integers(1, 4))
        values = (values * (4 - share) + coarse.repeat(2, -3).repeat(2, -2) * share) // 4
    if choice[1] < 0.5:
        start = int(rng.integers(_NOISE.size // 2))
        values = values + np.resize(_NOISE[start : start + 100_003], values.shape) // int(rng.integers(1, 5))
    if choice[2] < 0.5:
        values = (values * int(rng.integers(217, 282))) // 256 + int(rng.integers(-8, 9))
    return np.clip(values, 0, 255).astype(np.uint8)


_NOISE = np.random.default_rng(0).normal(0, 12, 300_000).astype(np.int16)


def _questions(task: Task, scenes: Sequence[Scene], rng: np.random.Generator) -> list[QA]:
    """The caption and up to `QUESTIONS_PER_SCENE` more, in random order."""
    wanted = QUESTIONS_PER_SCENE[task.kind]
    first: QA | None
    if task.kind == "set":
        weights, first = SET_FAMILIES, ask_set(scenes, "set_caption", rng)
    else:
        weights, first = VIDEO_FAMILIES if task.kind == "video" else IMAGE_FAMILIES, ask(scenes[0], "caption", rng)
    names, chances = list(weights), np.array(list(weights.values()))
    picked = rng.choice(len(names), 2 * wanted, p=chances / chances.sum())
    found = {first}
    for index in picked.tolist():
        family = names[index]
        found.add(ask_set(scenes, family, rng) if task.kind == "set" else ask(scenes[0], family, rng))
        if len(found - {None}) > wanted:
            break
    questions = sorted(qa for qa in found if qa is not None)
    return [questions[i] for i in rng.permutation(len(questions)).tolist()]


def _encode(tokenizer: PreTrainedTokenizerFast, qa: QA) -> tuple[list[int], int]:
    """Token ids of a slot and the index where its answer begins; the answer ends with `<|im_end|>`."""
    asked = tokenizer.encode(f"{qa.question}{IM_END}{IM_START}assistant")
    return [*asked, *tokenizer.encode(f"{qa.answer}{IM_END}")], len(asked)


def _pack(samples: list[list[tuple[list[int], int]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length = max(sum(len(ids) for ids, _ in slots) for slots in samples)
    tail_ids, offset = np.zeros((2, len(samples), length), np.int64)
    slot_of, target = np.full((2, len(samples), length), -1, np.int64)
    for b, slots in enumerate(samples):
        start = 0
        for slot, (ids, answer_start) in enumerate(slots):
            stop = start + len(ids)
            tail_ids[b, start:stop], offset[b, start:stop], slot_of[b, start:stop] = ids, range(len(ids)), slot
            target[b, start + answer_start - 1 : stop - 1] = ids[answer_start:]
            start = stop
    tensors = [torch.from_numpy(array) for array in (tail_ids, offset, slot_of, target)]
    return tensors[0], tensors[1], tensors[2], tensors[3]


def _dense_labels(task: Task, scenes: Sequence[Scene], times: np.ndarray) -> dict[str, np.ndarray]:
    """Labels per vision token: what covers its centre in the middle of its frame pair, its characters, its position."""
    grid = task.grid
    shape = (grid.times, grid.rows, grid.columns)
    labels = {name: np.zeros(shape, np.int64) for name in DENSE_CLASSES}
    for axis, name in enumerate(("time", "row", "column")):
        places = np.arange(shape[axis])
        places[places >= DENSE_CLASSES[name]] = IGNORED
        labels[name][...] = places.reshape([-1 if i == axis else 1 for i in range(3)])
    y = (np.arange(grid.rows) + 0.5)[:, None] * TOKEN_PX
    x = (np.arange(grid.columns) + 0.5) * TOKEN_PX
    for index, scene in enumerate(scenes):
        pairs = [index] if task.kind == "set" else range(grid.times)
        for thing in scene.things:
            reach = max(0.85 * thing.radius_px, TOKEN_PX / 2)
            values = (
                ("shape", SHAPES.index(thing.shape)), ("color", COLORS.index(thing.color)),
                ("size", SIZES.index(thing.size)), ("motion", MOTIONS.index(thing.motion)),
            )  # fmt: skip
            xs, ys = (axis.mean(1) for axis in thing.position(times))
            for pair in pairs:
                if times[pair, 1] < thing.appear_s:
                    continue
                here = np.maximum(abs(x - xs[pair]), abs(y - ys[pair])) < reach
                for name, value in values:
                    labels[name][pair][here] = value + 1
        if scene.sign is not None:
            _label_characters(labels, scene, list(pairs))
    return {name: values.reshape(-1) for name, values in labels.items()}


def _label_characters(labels: dict[str, np.ndarray], scene: Scene, pairs: list[int]) -> None:
    sign = scene.sign
    assert sign is not None
    row = int(sign.y_px // TOKEN_PX)
    for place, character in enumerate(sign.text):
        x = sign.x_px + (place - (len(sign.text) - 1) / 2) * sign.pitch_px
        half = int(x // (TOKEN_PX / 2))
        name = "char_right" if half % 2 else "char_left"
        labels[name][pairs, row, half // 2] = CHARACTERS.index(character) + 1
