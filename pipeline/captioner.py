"""The captioner: a resident model that turns one unit's frames into one output row. Knows nothing of ray.

A unit that fails gives an error row with stage, type and message; only what makes the process useless (a lost
GPU context) is raised.
"""

import hashlib
import json
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from lightkv import LightKVConfig, LightKVError, VisionLayout, compress, estimate
from pipeline.config import JobConfig
from pipeline.decode import FrameBatch
from pipeline.encode import Encoded, encoder_for
from pipeline.errors import ConfigError, SkippedError, UnitError
from pipeline.frames import Sizing
from pipeline.models import ModelCard, describe, load_model, load_tokenizer
from pipeline.prompts import ChatPrompts
from pipeline.schema import ROW_SCHEMA
from pipeline.version import code_version


@dataclass(frozen=True)
class Answer:
    """What one prompt gave: text, token counts, and what its prefill cost."""

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

    def __init__(self, job: JobConfig, run_id: str) -> None:
        self.job = job
        self.run_id = run_id
        self.card: ModelCard = describe(job.model)
        self.encoder = encoder_for(self.card.config, self.card.preprocessor)
        self.lightkv = lightkv_config(job, self.card.config)
        self.tokenizer = load_tokenizer(self.card)
        self.prompts = ChatPrompts(self.tokenizer, self.card)
        self.model = load_model(self.card, job.model)
        self._config_hash = job.hash()

    @property
    def sizing(self) -> Sizing:
        """The sizes decoders must give frames."""
        return self.encoder.sizing(self.job.frames)

    @torch.no_grad()
    def row(self, unit: dict[str, Any], batches: Iterable[FrameBatch]) -> dict[str, Any]:
        """The output row of a unit (`ROW_SCHEMA`) from its frame batches; failures of the unit are in the row."""
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        row = self._empty_row(unit)
        meter = _Meter(unit["id"], batches)
        try:
            row |= self._caption(unit, meter)
        except UnitError as error:
            row |= error_fields(error)
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            row |= error_fields(UnitError("generate", "OutOfMemory", _first_line(error)))
        except torch.AcceleratorError:
            raise  # the device context is gone: only a new process helps
        except Exception as error:
            row |= error_fields(UnitError("generate", type(error).__name__, _first_line(error)))
        row |= {
            "frame_times_s": meter.times_s,
            "decode_s": meter.decode_s,
            "wait_s": meter.wait_s,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }
        return row

    def _caption(self, unit: dict[str, Any], meter: "_Meter") -> dict[str, Any]:
        started = time.perf_counter()
        encoded = self.encoder.encode(self.model, unit["kind"], meter)
        encode_s = time.perf_counter() - started - meter.wait_s
        if not encoded.features:
            raise UnitError("decode", "NoFrames", "expected at least one frame, the decoder gave none")
        answers = [self._answer(unit, prompt, encoded, meter.times_s) for prompt in unit["prompts"]]
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

    def _answer(self, unit: dict[str, Any], prompt: dict[str, str], encoded: Encoded, times_s: list[float]) -> Answer:
        input_ids, spans = self.prompts.tokens(prompt["prompt"], encoded)
        self._check_context(input_ids.shape[1], encoded)
        input_ids = input_ids.to(self.model.device)
        interval_s = float(np.mean(np.diff(times_s))) if len(times_s) > 1 else None
        settings = self.job.model
        torch.manual_seed(_seed(settings.seed, unit["id"], prompt["prompt_id"]))
        clock = _FirstToken()
        layout = VisionLayout.grids(spans, input_ids.shape[1])
        context = (
            compress(self.model, self.lightkv, layouts=[layout]) if self.lightkv is not None else nullcontext(None)
        )
        started = time.perf_counter()
        with context as report:
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                **self.encoder.inputs(encoded, input_ids == self.prompts.placeholder(encoded.modality), interval_s),
                max_new_tokens=settings.max_new_tokens,
                do_sample=settings.temperature > 0,
                **({"temperature": settings.temperature} if settings.temperature > 0 else {}),
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        ended = time.perf_counter()
        new_ids = output[0, input_ids.shape[1] :]
        vision_tokens = encoded.vision_tokens
        if report is not None:
            kept, retention = report.kept_tokens, report.retention
            kv_bytes, kv_bytes_uncompressed = report.kv_bytes, report.kv_bytes_uncompressed
        else:
            plain = estimate(
                self.card.config,
                vision_tokens=vision_tokens,
                text_tokens=input_ids.shape[1] - vision_tokens,
                config=None,
                dtype_bytes=self.model.dtype.itemsize,
            )
            kept, retention = vision_tokens, 1.0
            kv_bytes = kv_bytes_uncompressed = plain.kv_bytes
        return Answer(
            text=self.tokenizer.decode(new_ids, skip_special_tokens=True).strip(),
            truncated=len(new_ids) >= settings.max_new_tokens and int(new_ids[-1]) not in self._stop_ids(),
            prompt_tokens=input_ids.shape[1],
            output_tokens=len(new_ids),
            vision_tokens=vision_tokens,
            kept_tokens=kept,
            retention=retention,
            kv_bytes=kv_bytes,
            kv_bytes_uncompressed=kv_bytes_uncompressed,
            prefill_s=clock.at - started,
            generate_s=ended - clock.at,
        )

    def _check_context(self, prompt_tokens: int, encoded: Encoded) -> None:
        limit = self.card.config.get_text_config().max_position_embeddings
        needed = (
            prompt_tokens
            - encoded.vision_tokens
            + self.encoder.positions(encoded.grids)
            + self.job.model.max_new_tokens
        )
        if needed > limit:
            raise UnitError(
                "prepare",
                "ContextTooLong",
                f"expected at most {limit} positions (the model's context), got {needed}; lower frames.max_frames, "
                "frames.max_px or model.max_new_tokens, or cut clips with clips.length_s",
            )

    def _stop_ids(self) -> set[int]:
        stop = self.model.generation_config.eos_token_id
        return set(stop) if isinstance(stop, list) else {stop}

    def _empty_row(self, unit: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(ROW_SCHEMA.names) | {
            "run_id": self.run_id,
            "uri": unit["uris"][0],
            "attempts": unit["attempts"] + 1,
            "model": self.card.name,
            "model_revision": self.card.revision or getattr(self.card.config, "_commit_hash", None),
            "lightkv": None if self.lightkv is None else json.dumps(self.lightkv.to_dict()),
            "code_version": code_version(),
            "config_hash": self._config_hash,
            **{key: unit[key] for key in ("id", "uris", "etag", "size_bytes", "start_s", "end_s")},
        }

    def _peak_memory_bytes(self) -> int:
        if self.model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.model.device)
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

    def __init__(self, unit_id: str, batches: Iterable[FrameBatch]) -> None:
        self._unit_id = unit_id
        self._batches = batches
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
            yield batch.item, batch.frames


class _FirstToken(transformers.StoppingCriteria):
    """Notes when the first token is there, which ends prefill; never stops anything."""

    at: float = float("nan")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.at != self.at:
            if input_ids.device.type == "cuda":
                torch.cuda.synchronize(input_ids.device)
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _seed(seed: int, *names: str) -> int:
    """A seed per unit and prompt, so that sampling does not depend on the order of the units."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
