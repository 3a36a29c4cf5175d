"""Records sample units for the report page: some of their frames, and the tokens that compression left.

A hash of the id decides whether a unit is sampled, so all actors agree without communication and a retried unit
overwrites its own record. Recording never raises: a failure is logged and the sample is dropped.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipeline import logs
from pipeline.config import JobConfig, Storage
from pipeline.run.directory import Work
from pipeline.storage import files as storage

if TYPE_CHECKING:  # torch takes seconds to import, and the page does not need it
    from lightkv import LightKVConfig
    from pipeline.decoding.decode import FrameBatch

VERSION = 1
_WIDTH_PX, _QUALITY = 320, 85
_LOG = logging.getLogger(__name__)
_P = ParamSpec("_P")


@dataclass(frozen=True)
class Sampling:
    """Which units are sampled (a `share` of all), the most `frames` per unit, and the `folder` of the records."""

    folder: str
    share: float
    frames: int
    storage: Storage

    @classmethod
    def of(cls, job: JobConfig, work: Work) -> Sampling | None:
        """Sampling of about `report.samples` units, the same at every start; None if the job samples none."""
        if not job.report.enabled or job.report.samples == 0:
            return None
        filesystem, path = work.arrow_path(work.manifest)
        with storage.faults(work.manifest):
            units = pq.read_metadata(path, filesystem=filesystem).num_rows
        share = min(1.0, job.report.samples / max(units, 1))
        return cls(folder_of(job.sink.uri), share, job.report.frames, job.storage)

    def sample(self, unit_id: str, step: int = 1) -> Sample | None:
        """The record of a unit, None if it is not sampled; `step`: frames per time step, which share their patches."""
        place = int.from_bytes(hashlib.sha256(unit_id.encode()).digest()[:8]) / 2**64
        return Sample(self, unit_id, step) if place < self.share else None


def _harmless(method: Callable[Concatenate[Sample, _P], None]) -> Callable[Concatenate[Sample, _P], None]:
    """Wrap a method of `Sample` so that it logs errors instead of raising them."""

    @functools.wraps(method)
    def guarded(sample: Sample, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if sample.failed:
            return
        try:
            method(sample, *args, **kwargs)
        except Exception as error:
            sample.failed = True
            told = f"{type(error).__name__}: {error}"
            logs.event(_LOG, "sample not recorded", level=logging.WARNING, unit=sample.unit_id, error=told)

    return guarded


class Sample:
    """One unit's record: gets its frames, then its answers, and is written at the end, also if the unit failed.

    After the first error nothing more is recorded, because an incomplete record would be wrong.
    """

    def __init__(self, sampling: Sampling, unit_id: str, step: int) -> None:
        self._sampling = sampling
        self.unit_id = unit_id
        self._frames = _Spread(sampling.frames, step)
        self._step = step
        self._answered: dict[str, Any] = {}
        self.failed = False

    @_harmless
    def see(self, batch: FrameBatch) -> None:
        """Keep some of the batch's frames, as small JPEGs."""
        self._frames.add(batch)

    @_harmless
    def answered(
        self,
        modality: str,
        grids: Sequence[tuple[int, int, int]],
        prompts: Sequence[dict[str, str]],
        merges: Sequence[Sequence[tuple[np.ndarray, np.ndarray]] | None],
        config: LightKVConfig | None,
    ) -> None:
        """Record per prompt and stage, for the kept frames, the surviving token of every patch and its size.

        merges   per prompt, (target, size) of every stage, int64 [V] each: the token that each vision token is part of
                 (-1: dropped), and the number of tokens in it; None: not compressed
        """
        places = {
            frame.index: _first_patch(modality, grids, frame.index, self._step) for frame in self._frames.chosen()
        }
        self._answered = {
            "step": self._step,
            "grids": grids,  # per item: time steps, rows, columns
            "places": places,
            "stages": [{"layer": stage.layer} for stage in config.stages] if config is not None else [],
            "prompts": [
                {"prompt_id": prompt["prompt_id"], "stages": [_stage(*pair, places) for pair in stages]}
                for prompt, stages in zip(prompts, merges, strict=True)
                if stages is not None
            ],
        }

    @_harmless
    def write(self, status: str) -> None:
        """Write the record into the run's samples folder."""
        places = self._answered.pop("places", {})
        document = {
            "version": VERSION,
            "id": self.unit_id,
            "status": status,
            "frames": [frame.document(places.get(frame.index)) for frame in self._frames.chosen()],
            **self._answered,
        }
        name = hashlib.sha256(self.unit_id.encode()).hexdigest()[:32]
        content = json.dumps(document, separators=(",", ":")).encode()
        storage.write_bytes_atomic(f"{self._sampling.folder}/{name}.json", content, self._sampling.storage)


@dataclass(frozen=True)
class _Frame:
    """A kept frame as a JPEG; `index`: its number in the unit, or the image's in an image set."""

    index: int
    time_s: float
    width: int
    height: int
    jpeg: bytes

    @classmethod
    def of(cls, index: int, time_s: float, pixels: np.ndarray) -> _Frame:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if image.width > _WIDTH_PX:
            image = image.resize((_WIDTH_PX, max(1, round(image.height * _WIDTH_PX / image.width))))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_QUALITY)
        return cls(index, time_s, image.width, image.height, buffer.getvalue())

    def document(self, place: tuple[int, int, int] | None) -> dict[str, Any]:
        """The frame's part of the record; `place`: from `_first_patch`, None if the unit has no answer."""
        return {
            "index": self.index,
            "time_s": self.time_s,
            "width": self.width,
            "height": self.height,
            "jpeg": base64.b64encode(self.jpeg).decode(),
            "place": place,
        }


class _Spread:
    """At most `limit` frames, evenly spread over a stream of unknown length, each the first of its time step."""

    def __init__(self, limit: int, step: int) -> None:
        self._limit, self._stride = limit, step
        self._seen = 0
        self._kept: list[_Frame] = []

    def add(self, batch: FrameBatch) -> None:
        for pixels, time_s in zip(batch.frames, batch.times_s.tolist(), strict=True):
            index, self._seen = self._seen, self._seen + 1
            if index % self._stride == 0 and len(self._kept) == 2 * self._limit:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
            if index % self._stride == 0:
                self._kept.append(_Frame.of(index, time_s, pixels))

    def chosen(self) -> list[_Frame]:
        picks = np.linspace(0, len(self._kept) - 1, min(self._limit, len(self._kept))).round().astype(int)
        return [self._kept[pick] for pick in picks]


def folder_of(run_uri: str) -> str:
    """The folder of a run's samples."""
    return f"{run_uri.rstrip('/')}/_run/samples"


def read_samples(run_uri: str, config: Storage, max_bytes: int) -> tuple[dict[str, dict[str, Any]], int]:
    """The records by unit id, at most `max_bytes` in total, and how many files were skipped."""
    found: dict[str, dict[str, Any]] = {}
    left_out = 0
    for entry in storage.list_files(folder_of(run_uri), config, missing_ok=True):
        max_bytes -= entry.size_bytes
        document = _document(storage.read_bytes(entry.uri, config)) if max_bytes >= 0 else None
        if document is None:
            left_out += 1
        else:
            found[document["id"]] = document
    return found, left_out


def _document(content: bytes) -> dict[str, Any] | None:
    """Parse a record; None if it is invalid or of another version."""
    try:
        document = json.loads(content)
    except ValueError:
        return None
    return document if isinstance(document, dict) and document.get("version") == VERSION else None


def _first_patch(modality: str, grids: Sequence[tuple[int, int, int]], frame: int, step: int) -> tuple[int, int, int]:
    """(index of the frame's first patch among the unit's patches, rows, columns)."""
    item, t = (0, frame // step) if modality == "video" else (frame, 0)
    before = sum(t * y * x for t, y, x in grids[:item])
    _, y, x = grids[item]
    return before + t * y * x, y, x


def _stage(target: np.ndarray, size: np.ndarray, places: dict[int, tuple[int, int, int]]) -> dict[str, int | list[str]]:
    """The record of one stage: tokens left in the unit, and target and size of the kept frames' patches.

    target, size [V]: as in `Sample.answered`. Stored per frame, row by row, as base64 of little-endian
    int32 (target) and uint16 (size; 65,535: that or more).
    """
    cuts = [slice(first, first + y * x) for first, y, x in places.values()]
    return {
        "left": int((target == np.arange(len(target))).sum()),
        "target": [_base64(target[cut], "<i4") for cut in cuts],
        "size": [_base64(size[cut].clip(max=65535), "<u2") for cut in cuts],
    }


def _base64(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()
