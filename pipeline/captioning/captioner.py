"""The captioner: a resident model that turns units' frames into output rows, one per unit. Knows nothing of ray.

A unit that fails gives an error row with stage, type and message; only what makes the process useless (a lost
GPU context) is raised.
"""

import hashlib
import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightkv import LightKVConfig, LightKVError
from lightkv.errors import out_of_memory
from pipeline.captioning.answerer import Answerer, Ask, Reply
from pipeline.captioning.memory import bound_device, memory_of
from pipeline.captioning.models import describe
from pipeline.config import JobConfig
from pipeline.decoding.decode import FrameBatch
from pipeline.decoding.frames import Sizing
from pipeline.errors import ConfigError, SkippedError, UnitError
from pipeline.run.samples import Sample, Sampling
from pipeline.schema import ROW_SCHEMA
from pipeline.version import code_version


def lightkv_config(job: JobConfig, model_config: Any) -> LightKVConfig | None:
    """The compression this job asks of this model; None when switched off."""
    if not job.lightkv.enabled:
        return None
    try:
        return LightKVConfig.for_model(model_config, **job.lightkv.model_dump(exclude={"enabled"}))
    except LightKVError as error:
        raise ConfigError(f"lightkv: {error}") from None


@dataclass(frozen=True)
class Given:
    """A unit and its frame batches, None where the next one is not ready yet.

    alone     with no other unit in the model
    waited_s  for its first batch, while no unit was in the model
    """

    unit: dict[str, Any]
    batches: Iterable[FrameBatch | None]
    alone: bool = False
    waited_s: float = 0.0


@dataclass
class _Open:
    """A unit in the model."""

    unit: dict[str, Any]
    meter: "_Meter"
    sample: Sample | None


class Captioner:
    """Holds one model; `rows` captions units, several at a time."""

    def __init__(self, job: JobConfig, run_id: str, sampling: Sampling | None = None) -> None:
        self.job = job
        self.run_id = run_id
        self._sampling = sampling
        self.lightkv = lightkv_config(job, describe(job.model).config)  # refused before the weights are loaded
        self.answerer = Answerer(job.model)
        self._device: torch.device = self.answerer.model.device
        self.answerer.encoder.repeat_tolerance = job.frames.repeat_tolerance
        self.answerer.encoder.images_together = job.frames.batch_frames
        room = bound_device(job.limits, self._device)
        self.memory = memory_of(job, self.answerer.card.config, self.answerer.model.dtype, room)
        self._config_hash = job.hash()

    @property
    def sizing(self) -> Sizing:
        """The sizes decoders must give frames."""
        return self.answerer.encoder.sizing(self.job.frames)

    def row(self, unit: dict[str, Any], batches: Iterable[FrameBatch | None]) -> dict[str, Any]:
        """The output row of a single unit."""
        (row,) = self.rows([Given(unit, batches)])
        return row

    def refusal(self, unit: dict[str, Any]) -> UnitError | None:
        """Why a unit cannot be answered, as far as its plan shows; such a unit need not be decoded."""
        return self.answerer.context.refusal(unit, self.job.frames)

    def rows(
        self,
        units: Iterable[Given | None],
        beat: Callable[[], None] | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> Iterator[dict[str, Any]]:
        """Output rows (`ROW_SCHEMA`) as they are complete, in any order; failures of a unit are in its row.

        A unit is taken when there is room for it; None says that there is none yet. `beat` and `wait` as in
        `Engine.run`.
        """
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        in_model: dict[str, _Open] = {}
        asks = (None if given is None else self._ask(given, in_model) for given in units)
        for reply in self.answerer.serve(asks, self.lightkv, self.memory, beat, wait, self.job.engine.compiled):
            yield self._finished(in_model.pop(reply.key), reply)

    def _ask(self, given: Given, in_model: dict[str, _Open]) -> Ask:
        unit = given.unit
        step = self.answerer.encoder.temporal_patch if unit["kind"] == "video" else 1
        sample = self._sampling.sample(unit["id"], step) if self._sampling is not None else None
        meter = _Meter(unit["id"], given.batches, sample, given.waited_s)
        in_model[unit["id"]] = _Open(unit, meter, sample)
        seeds = [_seed(self.job.model.seed, unit["id"], prompt["prompt_id"]) for prompt in unit["prompts"]]
        return Ask(
            unit["id"],
            unit["kind"],
            meter,
            [prompt["prompt"] for prompt in unit["prompts"]],
            seeds,
            interval_s=meter.interval_s,
            traced=sample is not None and self.job.frames.repeat_tolerance is None,  # else patches have no place
            alone=given.alone,
        )

    def _finished(self, open_: _Open, reply: Reply) -> dict[str, Any]:
        unit, meter, sample = open_.unit, open_.meter, open_.sample
        row = self._empty_row(unit)
        if reply.error is None:
            row |= self._answered(unit, reply)
            if sample is not None:
                merges = [answer.merges for answer in reply.answers]
                sample.answered(reply.modality, reply.grids, unit["prompts"], merges, self.lightkv)
        else:
            row |= error_fields(self._told(reply.error))
        row |= {
            "frame_times_s": meter.times_s,
            "decode_s": meter.decode_s,
            "wait_s": meter.wait_s + meter.read_s + reply.waited_s,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }
        if reply.error is None:
            row["encode_s"] = max(0.0, reply.encode_s - meter.read_s)
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

    def _answered(self, unit: dict[str, Any], reply: Reply) -> dict[str, Any]:
        answers = reply.answers
        first = answers[0]
        return {
            "status": "truncated" if any(a.truncated for a in answers) else "ok",
            "text": first.text,
            "answers": [
                {
                    **prompt,
                    "text": answer.text,
                    "status": "truncated" if answer.truncated else "ok",
                    "prompt_tokens": answer.prompt_tokens,
                    "output_tokens": answer.output_tokens,
                }
                for prompt, answer in zip(unit["prompts"], answers, strict=True)
            ],
            "vision_tokens": first.vision_tokens,
            "kept_tokens": first.kept_tokens,
            "retention": first.retention,
            "kv_bytes": first.kv_bytes,
            "kv_bytes_uncompressed": first.kv_bytes_uncompressed,
            "prefill_s": sum(a.prefill_s for a in answers),
            "generate_s": sum(a.generate_s for a in answers),
        }

    def _empty_row(self, unit: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(ROW_SCHEMA.names) | {
            "run_id": self.run_id,
            "uri": unit["uris"][0],
            "attempts": unit["attempts"] + 1,
            "model": self.answerer.card.name,
            "model_revision": self.answerer.card.revision or getattr(self.answerer.card.config, "_commit_hash", None),
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
    """The columns of a row that tell a failure."""
    return {
        "status": "skipped" if isinstance(error, SkippedError) else "error",
        "error_stage": error.stage,
        "error_type": error.error_type,
        "error_message": error.message[:2000],
    }


class _Meter:
    """Frame batches as the encoder takes them: checked to be the unit's own, their times and waiting noted."""

    def __init__(
        self, unit_id: str, batches: Iterable[FrameBatch | None], sample: Sample | None, waited_s: float
    ) -> None:
        self._unit_id = unit_id
        self._batches = batches
        self._sample = sample
        self._interval_s: float | None = None
        self.times_s: list[float] = []
        self.decode_s = 0.0
        self.wait_s = waited_s  # before the first batch
        self.read_s = 0.0

    def interval_s(self) -> float | None:
        """Between the unit's frames, as the decoder says; before the first batch None."""
        return self._interval_s

    def __iter__(self) -> Iterator[tuple[int, np.ndarray] | None]:
        batches = iter(self._batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches, ...)
            finally:
                self.read_s += time.perf_counter() - started
            if batch is ...:
                return
            if batch is None:
                yield None
                continue
            if batch.unit_id != self._unit_id:
                raise UnitError("decode", "ForeignFrames", f"expected frames of {self._unit_id}, got {batch.unit_id}")
            self.times_s.extend(batch.times_s.tolist())
            self.decode_s += batch.decode_s
            self._interval_s = batch.interval_s
            if self._sample is not None:
                self._sample.see(batch)
            yield batch.item, batch.frames


def _seed(seed: int, *names: str) -> int:
    """A seed per unit and prompt, so that sampling does not depend on the order of the units."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
