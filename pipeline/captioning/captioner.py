"""Turns units' frames into output rows with a loaded model, one row per unit. Independent of Ray.

A unit that fails gets an error row with stage, type and message. Only an error that makes the process unusable (a lost
GPU context) is raised.
"""

import hashlib
import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightkv import Engine, Generated, LightKVConfig, LightKVError, Request, Result, Segment, Text, Vision
from lightkv.errors import out_of_memory
from pipeline.captioning.memory import bound_device, memory_of
from pipeline.captioning.models import describe
from pipeline.captioning.prompts import Frame
from pipeline.captioning.resident import Resident
from pipeline.config import JobConfig
from pipeline.decoding.decode import FrameBatch
from pipeline.decoding.frames import Sizing
from pipeline.errors import ConfigError, SkippedError, UnitError
from pipeline.run.samples import Sample, Sampling
from pipeline.schema import ROW_SCHEMA
from pipeline.version import code_version


def lightkv_config(job: JobConfig, model_config: Any) -> LightKVConfig | None:
    """The compression settings of this job for this model; None if compression is switched off."""
    if not job.lightkv.enabled:
        return None
    try:
        return LightKVConfig.for_model(model_config, **job.lightkv.model_dump(exclude={"enabled"}))
    except LightKVError as error:
        raise ConfigError(f"lightkv: {error}") from None


@dataclass(frozen=True)
class Given:
    """A unit and its frame batches; `batches` yields None while the next batch is not ready.

    alone     the unit runs with no other unit in the model
    waited_s  seconds its first batch was waited for while no unit was in the model
    """

    unit: dict[str, Any]
    batches: Iterable[FrameBatch | None]
    alone: bool = False
    waited_s: float = 0.0


@dataclass
class _Open:
    """A unit in the model.

    grids      token grids (t, y, x) of its items so far
    times_s    times of its frames
    wait_s     seconds waited for frames before it entered the model, while the model was empty
    read_s     seconds spent reading its frame batches
    encode_s   seconds in the vision tower, read_s included
    """

    unit: dict[str, Any]
    modality: str
    sample: Sample | None
    wait_s: float
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    interval_s: float | None = None
    decode_s: float = 0.0
    read_s: float = 0.0
    encode_s: float = 0.0


class Captioner:
    """Holds one model; `rows` answers units, several at a time."""

    def __init__(self, job: JobConfig, run_id: str, sampling: Sampling | None = None) -> None:
        self.job = job
        self.run_id = run_id
        self._sampling = sampling
        self.lightkv = lightkv_config(job, describe(job.model).config)  # raises before the weights are loaded
        self.resident = Resident(job.model)
        self._encoder = self.resident.encoder
        self._encoder.repeat_tolerance = job.frames.repeat_tolerance
        self._encoder.images_together = job.frames.batch_frames
        self._device: torch.device = self.resident.model.device
        room = bound_device(job.limits, self._device)
        self.memory = memory_of(job, self.resident.card.config, self.resident.model.dtype, room)
        self._config_hash = job.hash()

    @property
    def sizing(self) -> Sizing:
        """The frame sizes that decoders must produce."""
        return self._encoder.sizing(self.job.frames)

    def row(self, unit: dict[str, Any], batches: Iterable[FrameBatch | None]) -> dict[str, Any]:
        """The output row of a single unit."""
        (row,) = self.rows([Given(unit, batches)])
        return row

    def refusal(self, unit: dict[str, Any]) -> UnitError | None:
        """Why a unit cannot be answered, as far as its plan shows. Such a unit need not be decoded."""
        return self.resident.context.refusal(unit, self.job.frames)

    def rows(
        self,
        units: Iterable[Given | None],
        beat: Callable[[], None] | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> Iterator[dict[str, Any]]:
        """Yield output rows (`ROW_SCHEMA`) as they are finished, in any order. A unit's failure is in its row.

        The next unit is taken when the engine has room for it; `units` yields None while none is ready. `beat` and
        `wait` are passed to `Engine.run`. A lost device context is raised.
        """
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        in_model: dict[str, _Open] = {}
        engine = Engine(self.resident.model, self.lightkv, self.memory, self.job.engine.compiled)
        requests = (None if given is None else self._request(given, in_model) for given in units)
        for result in engine.run(requests, beat, wait):
            yield self._row(in_model.pop(str(result.key)), result)

    def _request(self, given: Given, in_model: dict[str, _Open]) -> Request:
        unit, settings = given.unit, self.job.model
        step = self._encoder.temporal_patch if unit["kind"] == "video" else 1
        sample = self._sampling.sample(unit["id"], step) if self._sampling is not None else None
        open_ = _Open(unit, self._encoder.modality(unit["kind"]), sample, given.waited_s)
        in_model[unit["id"]] = open_
        try:
            frames = [self.resident.prompts.frame(prompt["prompt"], open_.modality) for prompt in unit["prompts"]]
        except UnitError as error:  # a request that fails, so that this unit ends like any other
            return Request(unit["id"], _raising(error), [torch.zeros(1, dtype=torch.int64)])
        longest = max(len(frame.after) for frame in frames)
        return Request(
            unit["id"],
            self._segments(open_, given.batches, frames[0], longest),
            [frame.after for frame in frames],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seeds=[_seed(settings.seed, unit["id"], prompt["prompt_id"]) for prompt in unit["prompts"]],
            traced=sample is not None and self.job.frames.repeat_tolerance is None,  # else patches have no position
            alone=given.alone,
        )

    def _segments(
        self, open_: _Open, batches: Iterable[FrameBatch | None], frame: Frame, longest: int
    ) -> Iterator[Segment | None]:
        """Yield the prompt except its questions, as the frames arrive. Raise `UnitError` if it exceeds the context."""
        yield Text(frame.before)
        text, kind = len(frame.before) + longest, open_.unit["kind"]
        parts = iter(self._encoder.parts(self.resident.model, kind, _read(open_, batches)))
        while True:
            began = time.perf_counter()
            part = next(parts, ...)
            open_.encode_s += time.perf_counter() - began
            if part is ...:
                break
            if part is None:
                yield None
                continue
            _, y, x = part.grid
            steps = part.stands_for // (y * x)
            if part.first == 0:
                if open_.grids and len(frame.between):
                    text += len(frame.between)
                    yield Text(frame.between)
                open_.grids.append((steps, y, x))
            else:
                open_.grids[-1] = (open_.grids[-1][0] + steps, y, x)
            self.resident.context.check(text, open_.grids)
            yield self._timed(part, open_)
        if not open_.grids:
            raise UnitError("decode", "NoFrames", "expected at least one frame, got none from the decoder")

    def _timed(self, part: Vision, open_: _Open) -> Vision:
        """The part with its seconds per time step, if the unit is a video with a known frame interval."""
        if open_.unit["kind"] != "video" or open_.interval_s is None:
            return part
        return replace(part, interval_s=open_.interval_s * self._encoder.temporal_patch)

    def _row(self, open_: _Open, result: Result) -> dict[str, Any]:
        unit, sample = open_.unit, open_.sample
        row = self._empty_row(unit)
        if result.error is None:
            row |= self._answered(unit, result)
            row["encode_s"] = max(0.0, open_.encode_s - open_.read_s)
            if sample is not None:
                merges = [_merges(answer.merges) for answer in result.answers]
                sample.answered(open_.modality, open_.grids, unit["prompts"], merges, self.lightkv)
        else:
            row |= error_fields(self._told(result.error))
        row |= {
            "frame_times_s": open_.times_s,
            "decode_s": open_.decode_s,
            "wait_s": open_.wait_s + open_.read_s + result.waited_s,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }
        if sample is not None:
            sample.write(row["status"])
        return row

    def _told(self, error: Exception) -> UnitError:
        if isinstance(error, UnitError):
            return error
        kind = "OutOfMemory" if out_of_memory(error) else type(error).__name__
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return UnitError("generate", kind, _first_line(error))

    def _answered(self, unit: dict[str, Any], result: Result) -> dict[str, Any]:
        first = result.answers[0]
        answers = [
            {
                **prompt,
                "text": self.resident.text(answer.tokens),
                "status": _status(answer),
                "prompt_tokens": answer.prompt_tokens,
                "output_tokens": len(answer.tokens),
            }
            for prompt, answer in zip(unit["prompts"], result.answers, strict=True)
        ]
        return {
            "status": "ok" if all(answer.stopped for answer in result.answers) else "truncated",
            "text": answers[0]["text"],
            "answers": answers,
            "vision_tokens": result.vision_tokens,
            "kept_tokens": first.kept_tokens,
            "retention": first.retention,
            "kv_bytes": first.kv_bytes,
            "kv_bytes_uncompressed": first.kv_bytes_uncompressed,
            "prefill_s": result.prefill_s,
            "generate_s": result.generate_s,
        }

    def _empty_row(self, unit: dict[str, Any]) -> dict[str, Any]:
        card = self.resident.card
        return dict.fromkeys(ROW_SCHEMA.names) | {
            "run_id": self.run_id,
            "uri": unit["uris"][0],
            "attempts": unit["attempts"] + 1,
            "model": card.name,
            "model_revision": card.revision or getattr(card.config, "_commit_hash", None),
            "lightkv": None if self.lightkv is None else json.dumps(self.lightkv.to_dict()),
            "code_version": code_version(),
            "config_hash": self._config_hash,
            **{key: unit[key] for key in ("id", "uris", "etag", "size_bytes", "start_s", "end_s")},
        }

    def _peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def error_fields(error: UnitError) -> dict[str, Any]:
    """The columns of a row that describe a failure."""
    return {
        "status": "skipped" if isinstance(error, SkippedError) else "error",
        "error_stage": error.stage,
        "error_type": error.error_type,
        "error_message": error.message[:2000],
    }


def _read(open_: _Open, batches: Iterable[FrameBatch | None]) -> Iterator[tuple[int, np.ndarray] | None]:
    """Yield (item, frames) for the encoder. Checks that a batch belongs to the unit; notes times in `open_`."""
    batches = iter(batches)
    while True:
        started = time.perf_counter()
        try:
            batch = next(batches, ...)
        finally:
            open_.read_s += time.perf_counter() - started
        if batch is ...:
            return
        if batch is None:
            yield None
            continue
        if batch.unit_id != open_.unit["id"]:
            expected = f"expected frames of {open_.unit['id']}, got {batch.unit_id}"
            raise UnitError("decode", "ForeignFrames", expected)
        open_.times_s.extend(batch.times_s.tolist())
        open_.decode_s += batch.decode_s
        open_.interval_s = batch.interval_s
        if open_.sample is not None:
            open_.sample.see(batch)
        yield batch.item, batch.frames


def _merges(stages: Sequence[Tensor]) -> tuple[tuple[np.ndarray, np.ndarray], ...] | None:
    """What happened to a unit's V vision tokens per stage: (target, size), int64 [V] each. None: nothing was traced.

    target: index of the token that this token is now part of (itself: kept; -1: dropped).
    size: number of tokens merged into that token (0: dropped).
    """
    found = []
    for stage in stages:
        target = stage.cpu().numpy()
        size = np.bincount(target[target >= 0], minlength=len(target))
        found.append((target, np.where(target >= 0, size[target], 0)))
    return tuple(found) or None


def _status(answer: Generated) -> str:
    return "ok" if answer.stopped else "truncated"


def _seed(seed: int, *names: str) -> int:
    """A seed per unit and prompt, so that sampling does not depend on the order of units."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4])


def _raising(error: Exception) -> Iterator[Segment]:
    raise error
    yield


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
