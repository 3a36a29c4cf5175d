"""The model that is measured, videos for it, and the loop around `generate` that replaces the engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from jobs.measure.benchmark.decoder import Decoder
from jobs.measure.benchmark.prompt import NOISE, three_axes
from jobs.measure.evaluate.asking import Asker, Question
from lightkv import Generated, Request, Segment, Text, Vision, VisionLayout
from lightkv.hooks.report import cache_bytes
from pipeline.config import Model
from pipeline.mini.questions import QA
from pipeline.mini.render import render
from pipeline.mini.scene import Scene, sample_scene
from pipeline.mini.world import questions_of, scene_seed

SCENE_S = 30  # length of a scene, after which a video cuts to another
CAPTION = "describe the video."


@dataclass(frozen=True)
class Video:
    """`frames` square frames; `number` is the seed of their content."""

    number: int
    frames: int
    side_px: int
    fps: float = 1.0

    @property
    def batches(self) -> list[int]:
        """Frames per batch: one scene each."""
        most = round(SCENE_S * self.fps)
        return [min(most, self.frames - begin) for begin in range(0, self.frames, most)]


@dataclass(frozen=True)
class Said:
    """An answer, and the bytes of its cache at the end of prefill."""

    text: str
    kv_bytes: int


class Subject(Protocol):
    """A model with its inputs and questions. A batch is some frames of a video, as the vision tower takes them."""

    model: Any
    new_tokens: int

    def batches(self, video: Video) -> Iterator[Any]:
        """The video in batches, each generated on demand."""

    def vision(self, batches: Iterable[Any]) -> Iterator[Vision]:
        """The batches as vision tokens."""

    @property
    def caption(self) -> Tensor:
        """Token ids of the question for a caption."""

    def questions(self, video: Video) -> list[Tensor]:
        """Token ids of all questions about the video, the caption first."""

    def segments(self, vision: Iterable[Vision]) -> Iterator[Segment]:
        """The segments of a prompt, without its question."""

    def plain(self, batches: Iterable[Any]) -> Said:
        """A caption from one whole prompt, without engine or compression."""

    def said(self, answer: Generated) -> Said:
        """The engine's answer in the same form."""


def request(subject: Subject, key: int, vision: Iterable[Vision], questions: Sequence[Tensor] = ()) -> Request:
    """A request for a caption, or for answers to `questions`."""
    asked = list(questions) or [subject.caption]
    return Request(key, subject.segments(vision), asked, max_new_tokens=subject.new_tokens)


class Mini:
    """The embedded model in fp32 on the CPU, vision tower included."""

    def __init__(self, new_tokens: int) -> None:
        self.new_tokens = new_tokens
        self.asker = Asker(Model(name="mini", device="cpu", dtype="float32", max_new_tokens=new_tokens))
        self.model = self.asker.model
        self._frame = self.asker.resident.prompts.frame(CAPTION, "video")

    def batches(self, video: Video) -> Iterator[np.ndarray]:
        for (scene, _), count in zip(_scenes(video), video.batches, strict=True):
            yield render(scene, np.arange(count) / video.fps)

    def vision(self, batches: Iterable[np.ndarray]) -> Iterator[Vision]:
        for part in self.asker.resident.encoder.parts(self.model, "video", ((0, frames) for frames in batches)):
            assert part is not None
            yield part

    @property
    def caption(self) -> Tensor:
        return self._frame.after

    def questions(self, video: Video) -> list[Tensor]:
        _, asked = next(_scenes(video))
        others = [qa.question for qa in asked if qa.family != "caption"]
        return [self.caption, *(self.asker.resident.prompts.frame(prompt, "video").after for prompt in others)]

    def segments(self, vision: Iterable[Vision]) -> Iterator[Segment]:
        yield Text(self._frame.before)
        yield from vision

    def plain(self, batches: Iterable[np.ndarray]) -> Said:
        encoded = self.asker.encode("video", ((0, frames) for frames in batches))
        (answer,) = self.asker.answers([Question(encoded, CAPTION)], None)
        return Said(answer.text, answer.kv_bytes)

    def said(self, answer: Generated) -> Said:
        return Said(self.asker.resident.text(answer.tokens), answer.kv_bytes)


def _scenes(video: Video) -> Iterator[tuple[Scene, list[QA]]]:
    rng = np.random.default_rng(scene_seed("test", video.number))
    for count in video.batches:
        scene = sample_scene(rng, video.side_px, video.side_px, count / video.fps, 3)
        yield scene, questions_of(scene, rng)


class Drawn:
    """A decoder of a real shape with random weights and vision tokens; answers always have `new_tokens` tokens."""

    PIXELS, STEP = 28, 2  # of a token: pixels per side, frames

    def __init__(self, decoder: Decoder, device: torch.device, dtype: torch.dtype, new_tokens: int) -> None:
        self.model, self.new_tokens = decoder.build(device, dtype), new_tokens
        self._width, self._words = decoder.shape.hidden, decoder.shape.vocabulary
        self._device, self._dtype = device, dtype

    def batches(self, video: Video) -> Iterator[Tensor]:
        """[t, h, w, D]: the frames of a scene are equal except for noise."""
        draw = torch.Generator(self._device).manual_seed(video.number)
        side = video.side_px // self.PIXELS
        shape = side, side, self._width
        for count in video.batches:
            scene = torch.randn((1, *shape), generator=draw, device=self._device, dtype=self._dtype)
            noise = torch.randn(
                (-(-count // self.STEP), *shape), generator=draw, device=self._device, dtype=self._dtype
            )
            yield scene + NOISE * noise

    def vision(self, batches: Iterable[Tensor]) -> Iterator[Vision]:
        first = 0
        for batch in batches:
            t, h, w, _ = batch.shape
            yield Vision(batch.flatten(0, 2), (t, h, w), first=first)
            first += t

    @property
    def caption(self) -> Tensor:
        return self._text(1, 32)

    def questions(self, video: Video) -> list[Tensor]:
        return [self._text(number, 32) for number in range(1, 5)]

    def segments(self, vision: Iterable[Vision]) -> Iterator[Segment]:
        yield Text(self._text(0, 16))
        yield from vision

    def plain(self, batches: Iterable[Tensor]) -> Said:
        before, after = self._text(0, 16), self._text(1, 32)
        shown = torch.cat(list(batches))
        grid = (len(before), *shown.shape[:3])
        length = len(before) + shown[..., 0].numel() + len(after)
        positions = three_axes(VisionLayout.grids([grid], length))[:, None].to(self._device)
        embed = self.model.get_input_embeddings()
        states = torch.cat([embed(before.to(self._device)), shown.flatten(0, 2), embed(after.to(self._device))])[None]
        del shown
        output = self.model(inputs_embeds=states, position_ids=positions, use_cache=True, logits_to_keep=1)
        held, tokens = cache_bytes(output.past_key_values), []
        for step in range(self.new_tokens):
            tokens.append(int(output.logits[0, -1].argmax()))
            if step < self.new_tokens - 1:
                output = self.model(
                    input_ids=torch.tensor([tokens[-1:]], device=self._device),
                    position_ids=positions[:, :, -1:] + 1 + step,
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
        return Said(str(tokens), held)

    def said(self, answer: Generated) -> Said:
        return Said(str(answer.tokens), answer.kv_bytes)

    def _text(self, number: int, count: int) -> Tensor:
        return torch.randint(self._words, (count,), generator=torch.Generator().manual_seed(number))
