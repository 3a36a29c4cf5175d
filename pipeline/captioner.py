"""The captioner: a resident model that turns one unit's frames into one output row. Knows nothing of ray.

A unit that fails gives an error row with stage, type and message; only what makes the process useless (a lost
GPU context) is raised.
"""

import hashlib
import json
import resource
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from lightkv import LightKVConfig, LightKVError
from pipeline.answerer import Answerer, Question
from pipeline.config import JobConfig
from pipeline.decode import FrameBatch
from pipeline.errors import ConfigError, SkippedError, UnitError
from pipeline.frames import Sizing
from pipeline.models import describe
from pipeline.samples import Sample, Sampling
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


class Captioner:
    """Holds one model; `row` captions units one after the other."""

    def __init__(self, job: JobConfig, run_id: str, sampling: Sampling | None = None) -> None:
        self.job = job
        self.run_id = run_id
        self._sampling = sampling
        self.lightkv = lightkv_config(job, describe(job.model).config)  # refused before the weights are loaded
        self.answerer = Answerer(job.model)
        self._device: torch.device = self.answerer.model.device
        self._config_hash = job.hash()

    @property
    def sizing(self) -> Sizing:
        """The sizes decoders must give frames."""
        return self.answerer.encoder.sizing(self.job.frames)

    @torch.no_grad()
    def row(self, unit: dict[str, Any], batches: Iterable[FrameBatch]) -> dict[str, Any]:
        """The output row of a unit (`ROW_SCHEMA`) from its frame batches; failures of the unit are in the row."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        row = self._empty_row(unit)
        step = self.answerer.encoder.temporal_patch if unit["kind"] == "video" else 1
        sample = self._sampling.sample(unit["id"], step) if self._sampling is not None else None
        meter = _Meter(unit["id"], batches, sample)
        try:
            row |= self._caption(unit, meter, sample)
        except UnitError as error:
            row |= error_fields(error)
        except torch.AcceleratorError:
            raise  # the device context is gone: only a new process helps
        except Exception as error:
            kind = "OutOfMemory" if _out_of_memory(error) else type(error).__name__
            row |= error_fields(UnitError("generate", kind, _first_line(error)))
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        row |= {
            "frame_times_s": meter.times_s,
            "decode_s": meter.decode_s,
            "wait_s": meter.wait_s,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }
        if sample is not None:
            sample.write(row["status"])
        return row

    def failed_row(self, unit: dict[str, Any], error: UnitError) -> dict[str, Any]:
        """The output row of a unit that is given up without being tried."""
        return self._empty_row(unit) | error_fields(error)

    def _caption(self, unit: dict[str, Any], meter: "_Meter", sample: Sample | None) -> dict[str, Any]:
        started = time.perf_counter()
        encoded = self.answerer.encode(unit["kind"], meter)
        encode_s = time.perf_counter() - started - meter.wait_s
        if not encoded.features:
            raise UnitError("decode", "NoFrames", "expected at least one frame, the decoder gave none")
        if len(meter.times_s) > 1:
            encoded.frame_interval_s = float(np.mean(np.diff(meter.times_s)))
        seed, traced = self.job.model.seed, sample is not None
        questions = [
            Question(encoded, p["prompt"], _seed(seed, unit["id"], p["prompt_id"]), traced) for p in unit["prompts"]
        ]
        answers = self.answerer.answers(questions, self.lightkv)
        if sample is not None:
            sample.answered(encoded, unit["prompts"], answers, self.lightkv)
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
            "encode_s": encode_s,
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

    def __init__(self, unit_id: str, batches: Iterable[FrameBatch], sample: Sample | None) -> None:
        self._unit_id = unit_id
        self._batches = batches
        self._sample = sample
        self.times_s: list[float] = []
        self.decode_s = 0.0
        self.wait_s = 0.0

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        batches = iter(self._batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches, None)
            finally:
                self.wait_s += time.perf_counter() - started
            if batch is None:
                return
            if batch.unit_id != self._unit_id:
                raise UnitError("decode", "ForeignFrames", f"expected frames of {self._unit_id}, got {batch.unit_id}")
            self.times_s.extend(batch.times_s.tolist())
            self.decode_s += batch.decode_s
            if self._sample is not None:
                self._sample.see(batch)
            yield batch.item, batch.frames


def _seed(seed: int, *names: str) -> int:
    """A seed per unit and prompt, so that sampling does not depend on the order of the units."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4])


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a device or on the CPU, whose allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
