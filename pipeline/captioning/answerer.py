"""A resident vision-language model that answers prompts about frames, compressed or not.

`serve` answers through lightkv's engine, while the frames arrive: what the main job does. `answers` asks transformers'
own `generate` about frames that are encoded already: what the evaluation compares methods by. Neither knows of units,
rows or storage.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
import transformers

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
from lightkv.hooks.report import Survivors
from pipeline.captioning.context import ContextLimit
from pipeline.captioning.encode import Encoded, FrameEncoder, encoder_for
from pipeline.captioning.models import ModelCard, describe, load_model, load_tokenizer
from pipeline.captioning.prompts import ChatPrompts, Frame
from pipeline.config import Model
from pipeline.errors import UnitError


@dataclass(frozen=True)
class Question:
    """One prompt about encoded frames; `seed` decides what is drawn at a temperature above 0.

    `traced` asks for the answer's `merges`, which cost a copy of the survivors off the device.
    """

    encoded: Encoded
    prompt: str
    seed: int = 0
    traced: bool = False


@dataclass(frozen=True)
class Answer:
    """What one prompt gave: text, token counts, and what its prefill cost.

    From `serve`, the prompts of a unit share `prefill_s` and `generate_s` alike, and KV bytes are a prompt's own, parts
    that it shares counted in full. From `answers`, prompts of a batch share a prefill: `kept_tokens`, `retention`,
    `kv_bytes`, `prefill_s` and `generate_s` are the batch's divided by its prompts, and KV bytes count the padding to
    the longest, with and without compression; `prompt_tokens` does not.

    `kv_share` is what of the cache of a plain model is left, in bytes, as in a model of 16 bits.

    `merges` holds, of a traced question that was compressed, one (target, size) per stage: for each of the unit's V
    vision tokens, in order, int64 [V] the one that it is part of by now (itself: it survived; -1: dropped), and
    int64 [V] how many are together in that one (0: dropped).
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
    kv_share: float = 1.0
    merges: tuple[tuple[np.ndarray, np.ndarray], ...] | None = None


@dataclass(frozen=True)
class _Row:
    """A question as token ids int64 [S], with the spans (start, t, y, x) of its items."""

    question: Question
    ids: torch.Tensor
    spans: list[tuple[int, int, int, int]]

    def merges(self, stages: Sequence[Survivors]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """What became of its vision tokens, for `Answer.merges`, on the CPU."""
        vision = np.concatenate([np.arange(start, start + t * y * x) for start, t, y, x in self.spans])
        number = np.full(len(self.ids) + 1, -1)  # of each position among the vision tokens; the last stands for -1
        number[vision] = np.arange(len(vision))
        found = []
        for stage in stages:
            target = number[stage.target.cpu().numpy()[vision]]
            sizes = np.bincount(target[target >= 0], minlength=len(vision))
            found.append((target, np.where(target >= 0, sizes[target], 0)))
        return tuple(found)


@dataclass(frozen=True)
class Ask:
    """A unit on its way in, and what is asked about it.

    frames      (item, uint8 [T, H, W, 3]) in order; None where the next ones are not there yet
    interval_s  seconds between its frames, asked for once the first are there; None where time does not count
    alone       with no other unit in the model
    """

    key: str
    kind: str  # video | images
    frames: Iterable[tuple[int, np.ndarray] | None]
    prompts: Sequence[str]
    seeds: Sequence[int]
    interval_s: Callable[[], float | None] = lambda: None
    traced: bool = False
    alone: bool = False


@dataclass
class Reply:
    """What came of an `Ask`: one answer per prompt, or the exception that ended it.

    modality, grids  of its items, as far as they came in · encode_s in the vision tower · waited_s for frames, with
    nothing else to do
    """

    key: str
    modality: str
    grids: list[tuple[int, int, int]]
    answers: list[Answer]
    error: Exception | None = None
    encode_s: float = 0.0
    waited_s: float = 0.0


class Answerer:
    """Holds one model."""

    def __init__(self, settings: Model, batch_prompts: int = 8, batch_tokens: int = 16384) -> None:
        """`answers` takes up to `batch_prompts` neighbours of at most `batch_tokens` tokens together."""
        self.settings = settings
        self._batch_prompts, self._batch_tokens = batch_prompts, batch_tokens
        self.card: ModelCard = describe(settings)
        self.encoder: FrameEncoder = encoder_for(self.card.config, self.card.preprocessor)
        self.tokenizer = load_tokenizer(self.card)
        self.prompts = ChatPrompts(self.tokenizer, self.card)
        self.context = ContextLimit(self.card.config, self.encoder, settings.max_new_tokens)
        self.model = load_model(self.card, settings)

    @torch.no_grad()
    def encode(self, kind: str, items: Iterable[tuple[int, np.ndarray]]) -> Encoded:
        """Vision tokens of a video or of images (kind video | images): (item, uint8 [T, H, W, 3]) in order."""
        return self.encoder.encode(self.model, kind, items)

    def serve(
        self,
        asks: Iterable[Ask | None],
        lightkv: LightKVConfig | None,
        memory: Memory,
        beat: Callable[[], None] | None = None,
        wait: Callable[[float], None] = time.sleep,
        compiled: bool = False,
    ) -> Iterator[Reply]:
        """Replies as they are complete, in any order; asks are taken as there is room for them, None: none there yet.

        A lost device context is raised; everything else that happens to a unit is in its reply. `beat` and
        `wait` as in `Engine.run`, `compiled` as in `Engine`.
        """
        engine = Engine(self.model, lightkv, memory, compiled)
        replies: dict[str, Reply] = {}

        def requests() -> Iterator[Request | None]:
            for ask in asks:
                if ask is None:
                    yield None
                    continue
                replies[ask.key] = reply = Reply(ask.key, self.encoder.modality(ask.kind), [], [])
                yield self._request(ask, reply)

        for result in engine.run(requests(), beat, wait):
            reply = replies.pop(str(result.key))
            reply.error, reply.waited_s = result.error, result.waited_s
            count = len(result.answers)
            reply.answers = [
                self._answer(one, result.vision_tokens, result.prefill_s / count, result.generate_s / count)
                for one in result.answers
            ]
            yield reply

    def _request(self, ask: Ask, reply: Reply) -> Request:
        settings = self.settings
        try:
            frames = [self.prompts.frame(prompt, reply.modality) for prompt in ask.prompts]
        except UnitError as error:  # a request of its own, so that the unit's end is told as any other
            return Request(ask.key, _raising(error), [torch.zeros(1, dtype=torch.int64)])
        longest = max(len(frame.after) for frame in frames)
        return Request(
            ask.key,
            self._segments(ask, reply, frames[0], longest),
            [frame.after for frame in frames],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seeds=ask.seeds,
            traced=ask.traced,
            alone=ask.alone,
        )

    def _segments(self, ask: Ask, reply: Reply, frame: Frame, longest: int) -> Iterator[Segment | None]:
        """The prompt but its questions, as the frames arrive. Raises `UnitError` where it does not fit."""
        yield Text(frame.before)
        text = len(frame.before) + longest
        parts = iter(self.encoder.parts(self.model, ask.kind, ask.frames))
        while True:
            began = time.perf_counter()
            part = next(parts, ...)
            reply.encode_s += time.perf_counter() - began
            if part is ...:
                break
            if part is None:
                yield None
                continue
            _, y, x = part.grid
            steps = part.stands_for // (y * x)
            if part.first == 0:
                if reply.grids and len(frame.between):
                    text += len(frame.between)
                    yield Text(frame.between)
                reply.grids.append((steps, y, x))
            else:
                reply.grids[-1] = (reply.grids[-1][0] + steps, y, x)
            self.context.check(text, reply.grids)
            interval_s = ask.interval_s() if ask.kind == "video" else None
            yield part if interval_s is None else replace(part, interval_s=interval_s * self.encoder.temporal_patch)
        if not reply.grids:
            raise UnitError("decode", "NoFrames", "expected at least one frame, the decoder gave none")

    def _answer(self, one: Generated, vision_tokens: int, prefill_s: float, generate_s: float) -> Answer:
        merges = None
        if one.merges:
            targets = [target.cpu().numpy() for target in one.merges]
            sizes = [np.bincount(target[target >= 0], minlength=len(target)) for target in targets]
            merges = tuple(
                (target, np.where(target >= 0, size[target], 0)) for target, size in zip(targets, sizes, strict=True)
            )
        return Answer(
            text=self.tokenizer.decode(one.tokens, skip_special_tokens=True).strip(),
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
            merges=merges,
        )

    @torch.no_grad()
    def answers(
        self, questions: Sequence[Question], lightkv: LightKVConfig | None, memory: Memory | None = None
    ) -> list[Answer]:
        """Answers in the order of the questions, compressed as `lightkv` says; None: not compressed.

        By the engine where `memory` says what its caches are like, else by transformers' `generate`.

        Neighbours share a batch. Sampling takes them one by one, so that an answer depends on its seed alone. Raises
        `UnitError` (prepare) for a prompt that does not fit, before any is answered.
        """
        if memory is not None:
            return self._by_engine(questions, lightkv, memory)
        rows = []
        for question in questions:
            ids, spans = self.prompts.tokens(question.prompt, question.encoded)
            self.context.check(ids.shape[1] - question.encoded.vision_tokens, question.encoded.grids)
            rows.append(_Row(question, ids[0], spans))
        return [answer for batch in self._batches(rows) for answer in self._batch(batch, lightkv)]

    def _by_engine(self, questions: Sequence[Question], lightkv: LightKVConfig | None, memory: Memory) -> list[Answer]:
        """As `serve`, of frames that are encoded already; neighbours about the same ones share their prefill."""
        groups = [list(group) for _, group in groupby(enumerate(questions), key=lambda pair: id(pair[1].encoded))]

        def requests() -> Iterator[Request]:
            for number, group in enumerate(groups):
                encoded = group[0][1].encoded
                frames = [self.prompts.frame(question.prompt, encoded.modality) for _, question in group]
                yield Request(
                    number,
                    _encoded_segments(encoded, frames[0], self.encoder.temporal_patch),
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
        is_vision = (ids == self.prompts.placeholder(encoded[0].modality)) & mask.bool()
        layouts = [VisionLayout.grids(row.spans, len(row.ids)) for row in rows]
        torch.manual_seed(rows[0].question.seed)
        clock = _FirstToken()
        context = compress(self.model, lightkv, layouts=layouts) if lightkv is not None else nullcontext(None)
        started = time.perf_counter()
        with context as report:
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                **self.encoder.inputs(encoded, is_vision),
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
        for number, (row, new_ids) in enumerate(zip(rows, output[:, length:].tolist(), strict=True)):
            said, stopped = self._until_stop(new_ids)
            merges = row.merges(report.survivors[number]) if report is not None and row.question.traced else None
            answers.append(
                Answer(
                    text=self.tokenizer.decode(said, skip_special_tokens=True).strip(),
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
                    merges=merges,
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
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)


def _encoded_segments(encoded: Encoded, frame: Frame, temporal_patch: int) -> Iterator[Segment]:
    yield Text(frame.before)
    interval_s = encoded.frame_interval_s
    for number, (features, grid) in enumerate(zip(encoded.features, encoded.grids, strict=True)):
        if number and len(frame.between):
            yield Text(frame.between)
        yield Vision(features, grid, interval_s=None if interval_s is None else interval_s * temporal_patch)


def _raising(error: Exception) -> Iterator[Segment]:
    raise error
    yield


class _FirstToken(transformers.StoppingCriteria):
    """Notes when the first token is there, which ends prefill; never stops anything."""

    at: float = float("nan")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.at != self.at:
            if input_ids.device.type == "cuda":
                torch.cuda.synchronize(input_ids.device)
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
