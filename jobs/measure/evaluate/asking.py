"""Answer prompts about frames that are already encoded, for the evaluation.

Uses lightkv's engine if the cell sets the engine's memory, else transformers' own `generate`.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lightkv import (
    Engine,
    Generated,
    LightKVConfig,
    Memory,
    Request,
    Segment,
    Text,
    Vision,
    VisionLayout,
    compress,
    estimate,
)
from pipeline.captioning.encode import FrameEncoder, QwenEncoder
from pipeline.captioning.prompts import Frame
from pipeline.captioning.resident import Resident
from pipeline.config import Model


@dataclass
class Encoded:
    """The vision tokens of one unit: per item its features [n, D] and its grid (t, y, x) in tokens."""

    modality: str  # image | video: which placeholder token an item has
    features: list[Tensor] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    frame_interval_s: float | None = None  # of a video; None: one position per step in time

    @property
    def vision_tokens(self) -> int:
        """Sum of the tokens of all items."""
        return sum(t * y * x for t, y, x in self.grids)


@dataclass(frozen=True)
class Question:
    """One prompt about encoded frames; `seed` is for sampling at a temperature above 0."""

    encoded: Encoded
    prompt: str
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt: text, token counts, and the cost of its prefill.

    With `generate`, prompts of a batch share a prefill. `kept_tokens`, `retention`, `kv_bytes`, `prefill_s` and
    `generate_s` are the batch's divided by its number of prompts. KV bytes include the padding to the longest prompt,
    with and without compression; `prompt_tokens` does not. With the engine, prompts about the same frames divide
    `prefill_s` and `generate_s` equally. KV bytes are a prompt's own; shared parts count in full.

    `kv_share` is the share of a plain model's cache that is kept, in bytes, as in a model of 16 bits.
    """

    text: str
    truncated: bool
    prompt_tokens: int
    output_tokens: int
    vision_tokens: int
    kept_tokens: int
    retention: float
    kv_bytes: int
    kv_bytes_uncompressed: int
    prefill_s: float
    generate_s: float
    kv_share: float


@dataclass(frozen=True)
class _Row:
    """A question as token ids int64 [S], with the spans (start, t, y, x) of its items."""

    question: Question
    ids: Tensor
    spans: list[tuple[int, int, int, int]]


class Asker:
    """Holds one model and answers questions with it."""

    def __init__(self, settings: Model, batch_prompts: int = 8, batch_tokens: int = 16384) -> None:
        """`answers` batches up to `batch_prompts` adjacent questions of at most `batch_tokens` tokens in all."""
        self.resident = Resident(settings)
        self.settings, self.card, self.model = settings, self.resident.card, self.resident.model
        self._batch_prompts, self._batch_tokens = batch_prompts, batch_tokens

    @torch.no_grad()
    def encode(self, kind: str, items: Iterable[tuple[int, np.ndarray]]) -> Encoded:
        """Vision tokens of a video or of images (kind video | images): (item, uint8 [T, H, W, 3]) in order."""
        encoded = Encoded(self.resident.encoder.modality(kind))
        for part in self.resident.encoder.parts(self.model, kind, items):
            assert part is not None
            if part.first == 0:
                encoded.features.append(part.features)
                encoded.grids.append(part.grid)
                continue
            t, y, x = encoded.grids[-1]
            encoded.features[-1] = torch.cat([encoded.features[-1], part.features])
            encoded.grids[-1] = (t + part.grid[0], y, x)
        return encoded

    @torch.no_grad()
    def answers(
        self, questions: Sequence[Question], lightkv: LightKVConfig | None, memory: Memory | None = None
    ) -> list[Answer]:
        """Answers in the order of the questions, compressed by `lightkv`; None: not compressed.

        Uses the engine if `memory` is given, else transformers' `generate`. Adjacent questions share a batch. Sampling
        answers them one by one, so that an answer depends on its seed alone. Raises `UnitError` (prepare) for a prompt
        that does not fit, before any is answered.
        """
        if memory is not None:
            return self._by_engine(questions, lightkv, memory)
        rows = [self._prepared(question) for question in questions]
        return [answer for batch in self._batches(rows) for answer in self._batch(batch, lightkv)]

    def _prepared(self, question: Question) -> _Row:
        """The question's token ids, one placeholder per vision token."""
        encoded, prompts = question.encoded, self.resident.prompts
        placeholder = prompts.placeholder(encoded.modality)
        ids: list[int] = []
        spans, grids = [], iter(encoded.grids)
        for token in prompts.ids(question.prompt, encoded.modality, len(encoded.grids)):
            if token == placeholder:
                t, y, x = next(grids)
                spans.append((len(ids), t, y, x))
                ids.extend([placeholder] * (t * y * x))
            else:
                ids.append(token)
        self.resident.context.check(len(ids) - encoded.vision_tokens, encoded.grids)
        return _Row(question, torch.tensor(ids), spans)

    def _by_engine(self, questions: Sequence[Question], lightkv: LightKVConfig | None, memory: Memory) -> list[Answer]:
        """Answer with the engine; adjacent questions about the same frames share their prefill."""
        groups = [list(group) for _, group in groupby(enumerate(questions), key=lambda pair: id(pair[1].encoded))]

        def requests() -> Iterator[Request]:
            for number, group in enumerate(groups):
                encoded = group[0][1].encoded
                frames = [self.resident.prompts.frame(question.prompt, encoded.modality) for _, question in group]
                yield Request(
                    number,
                    _segments(encoded, frames[0], self.resident.encoder.temporal_patch),
                    [frame.after for frame in frames],
                    max_new_tokens=self.settings.max_new_tokens,
                    temperature=self.settings.temperature,
                    seeds=[question.seed for _, question in group],
                )

        found: dict[int, Answer] = {}
        for result in Engine(self.model, lightkv, memory).run(requests()):
            if result.error is not None:
                raise result.error
            assert isinstance(result.key, int)
            for (place, _), one in zip(groups[result.key], result.answers, strict=True):
                count = len(result.answers)
                found[place] = self._answer(
                    one, result.vision_tokens, result.prefill_s / count, result.generate_s / count
                )
        return [found[place] for place in range(len(questions))]

    def _answer(self, one: Generated, vision_tokens: int, prefill_s: float, generate_s: float) -> Answer:
        return Answer(
            text=self.resident.text(one.tokens),
            truncated=not one.stopped,
            prompt_tokens=one.prompt_tokens,
            output_tokens=len(one.tokens),
            vision_tokens=vision_tokens,
            kept_tokens=one.kept_tokens,
            retention=one.retention,
            kv_bytes=one.kv_bytes,
            kv_bytes_uncompressed=one.kv_bytes_uncompressed,
            prefill_s=prefill_s,
            generate_s=generate_s,
            kv_share=one.kv_bits / one.kv_bits_uncompressed,
        )

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        most = self._batch_prompts if self.settings.temperature == 0 else 1
        batch: list[_Row] = []
        for row in rows:
            together = [*batch, row]
            tokens = len(together) * max(len(member.ids) for member in together)
            same = {member.question.encoded.modality for member in together}
            if batch and (len(together) > most or tokens > self._batch_tokens or len(same) > 1):
                yield batch
                together = [row]
            batch = together
        if batch:
            yield batch

    def _batch(self, rows: Sequence[_Row], lightkv: LightKVConfig | None) -> list[Answer]:
        settings, device = self.settings, self.model.device
        length = max(len(row.ids) for row in rows)
        pad_id = self._pad_id()
        ids = torch.full((len(rows), length), pad_id)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, length - len(row.ids) :] = row.ids
            mask[number, length - len(row.ids) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        encoded = [row.question.encoded for row in rows]
        is_vision = (ids == self.resident.prompts.placeholder(encoded[0].modality)) & mask.bool()
        layouts = [VisionLayout.grids(row.spans, len(row.ids)) for row in rows]
        torch.manual_seed(rows[0].question.seed)
        clock = _FirstToken()
        context = compress(self.model, lightkv, layouts=layouts) if lightkv is not None else nullcontext(None)
        started = time.perf_counter()
        with context as report:
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                **_inputs(self.resident.encoder, encoded, is_vision),
                max_new_tokens=settings.max_new_tokens,
                do_sample=settings.temperature > 0,
                **({"temperature": settings.temperature} if settings.temperature > 0 else {}),
                pad_token_id=pad_id,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        ended = time.perf_counter()
        count = len(rows)
        if report is not None:
            retention, kept = report.retention, report.kept_tokens
            kv_bytes, kv_bytes_uncompressed = report.kv_bytes // count, report.kv_bytes_uncompressed // count
        else:
            retention, kept = 1.0, sum(one.vision_tokens for one in encoded)
            plain = estimate(
                self.card.config,
                vision_tokens=0,
                text_tokens=length,
                config=None,
                dtype_bytes=self.model.dtype.itemsize,
            )
            kv_bytes = kv_bytes_uncompressed = plain.kv_bytes
        answers = []
        for row, new_ids in zip(rows, output[:, length:].tolist(), strict=True):
            said, stopped = self._until_stop(new_ids)
            answers.append(
                Answer(
                    text=self.resident.text(said),
                    truncated=not stopped,
                    prompt_tokens=len(row.ids),
                    output_tokens=len(said),
                    vision_tokens=row.question.encoded.vision_tokens,
                    kept_tokens=round(kept / count),
                    retention=retention,
                    kv_bytes=kv_bytes,
                    kv_bytes_uncompressed=kv_bytes_uncompressed,
                    prefill_s=(clock.at - started) / count,
                    generate_s=(ended - clock.at) / count,
                    kv_share=kv_bytes / kv_bytes_uncompressed,
                )
            )
        return answers

    def _until_stop(self, new_ids: list[int]) -> tuple[list[int], bool]:
        """A row's tokens up to and including its first stop token, and whether it has one; padding comes after it."""
        stop = self.model.generation_config.eos_token_id
        stops = set(stop) if isinstance(stop, list) else {stop}
        end = next((place for place, token in enumerate(new_ids) if token in stops), None)
        return (new_ids, False) if end is None else (new_ids[: end + 1], True)

    def _pad_id(self) -> int:
        pad = self.resident.tokenizer.pad_token_id
        return int(self.resident.tokenizer.eos_token_id if pad is None else pad)


def _segments(encoded: Encoded, frame: Frame, temporal_patch: int) -> Iterator[Segment]:
    yield Text(frame.before)
    interval_s = encoded.frame_interval_s
    for number, (features, grid) in enumerate(zip(encoded.features, encoded.grids, strict=True)):
        if number and len(frame.between):
            yield Text(frame.between)
        yield Vision(features, grid, interval_s=None if interval_s is None else interval_s * temporal_patch)


def _inputs(encoder: FrameEncoder, rows: Sequence[Encoded], is_vision: Tensor) -> dict[str, Any]:
    """Keyword arguments of `generate` that replace the pixels of a batch: one `Encoded` per row, all of one modality.

    `is_vision` bool [B, S] marks the placeholders. A unit with several prompts has several rows.
    """
    modality, device = rows[0].modality, is_vision.device
    pooled = BaseModelOutputWithPooling(pooler_output=tuple(item for row in rows for item in row.features))
    inputs: dict[str, Any] = {"mm_encoder_outputs": {modality: pooled}}
    if not isinstance(encoder, QwenEncoder):
        return inputs
    grids = [(t, y * encoder.merge, x * encoder.merge) for row in rows for t, y, x in row.grids]
    inputs[f"{modality}_grid_thw"] = torch.tensor(grids, device=device)
    inputs["mm_token_type_ids"] = is_vision.int() * (2 if modality == "video" else 1)
    intervals = [row.frame_interval_s for row in rows for _ in row.grids]
    if modality == "video" and any(interval is not None for interval in intervals):
        steps_s = [1.0 if interval is None else interval * encoder.temporal_patch for interval in intervals]
        inputs["second_per_grid_ts"] = torch.tensor(steps_s, device=device)
    return inputs


class _FirstToken(transformers.StoppingCriteria):
    """Record the time of the first token, which ends prefill; never stops generation."""

    at: float = float("nan")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.at != self.at:
            if input_ids.device.type == "cuda":
                torch.cuda.synchronize(input_ids.device)
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
