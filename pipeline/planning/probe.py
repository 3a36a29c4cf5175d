"""Probes videos and images for length, frame size and codec. A broken file gives a probe with an error text.

Probes run in worker processes (`python -m pipeline.planning.probe`, one JSON line in, one out), because a file may
crash or hang the library that opens it. If a worker dies or times out, only its current file fails.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, cast

from PIL import Image

from pipeline.config import Storage
from pipeline.decoding.media import Media, decoding
from pipeline.decoding.video import decoded_shape, missing_bytes, open_video, video_stream
from pipeline.errors import SourceError, UnitError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_PER_WORKER = 4  # files per worker process, at least
_MAX_DURATION_S = 1e6  # 11 days; a longer video has a damaged header
_SHAPE_PACKETS = 64
_FAILED_STARTS = 3  # in a row, of worker processes, before probing fails


@dataclass(frozen=True)
class Probe:
    """Result for one file. `width` and `height` are as displayed; `error` explains missing values or a fault."""

    uri: str
    duration_s: float | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    codec: str | None = None
    size_bytes: int | None = None
    etag: str | None = None
    error: str | None = None


def is_image(uri: str) -> bool:
    return os.path.splitext(uri)[1].lower() in IMAGE_EXTENSIONS


def probe(uri: str, storage: Storage) -> Probe:
    """Probe one file: an image if its extension is one of IMAGE_EXTENSIONS, else a video."""
    found: dict[str, Any] = {"uri": uri}
    try:
        with contextlib.closing(Media(uri, storage)) as media, decoding(uri):
            found.update(size_bytes=media.entry.size_bytes, etag=media.entry.etag)
            found.update(_image(media) if is_image(uri) else _video(media))
    except UnitError as error:
        found["error"] = str(error)
    except Exception as error:  # libraries raise any type for a broken file
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Probe(**found)


def probe_all(
    uris: Sequence[str], storage: Storage, *, workers: int, timeout_s: float | None = None
) -> dict[str, Probe]:
    """Probe every distinct URI, `workers` at a time, each within `timeout_s` (None: all attempts of one request)."""
    with _Pool(storage, timeout_s or (storage.max_attempts + 1) * storage.timeout_s) as pool:
        return pool.run(list(dict.fromkeys(uris)), workers)


def _image(media: Media) -> dict[str, Any]:
    try:
        with Image.open(cast(IO[bytes], media.ranged())) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # EXIF orientation: rotated by 90°
                width, height = height, width
            return {"width": width, "height": height, "codec": (image.format or "").lower()}
    except (OSError, ValueError, SyntaxError) as error:
        media.check()
        raise UnitError("decode", "NotAnImage", f"cannot be read as an image: {media.uri}") from error


def _video(media: Media) -> dict[str, Any]:
    try:
        container = open_video(media.ranged() if media.remote else media.local_path(0), media.uri)
    except UnitError:
        media.check()
        raise
    with container:
        stream = video_stream(container)
        duration = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1e6
        found: dict[str, Any] = {
            "duration_s": float(duration) if 0 < duration < _MAX_DURATION_S else None,
            "fps": float(stream.average_rate) if stream.average_rate else None,
            "codec": stream.codec_context.codec.canonical_name,
        }
        for number, packet in enumerate(container.demux(stream)):
            shape = decoded_shape(packet, stream)
            if shape is not None:
                found.update(width=shape.width, height=shape.height)
            if shape is not None or number == _SHAPE_PACKETS:
                break
        media.check()
        if missing := missing_bytes(container, media.head(), media.entry.size_bytes):
            found["error"] = f"decode: Truncated: {missing} bytes declared by its header are missing: {media.uri}"
        elif "width" not in found:
            found["error"] = f"decode: Corrupt: no frame could be decoded: {media.uri}"
        return found


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    ready: bool = False  # it has written its first line
    uri: str | None = None
    deadline: float = 0.0
    answer: bytes = b""


class _Pool:
    """Worker processes with at most one file each; killed at the timeout, replaced when they die."""

    def __init__(self, storage: Storage, timeout_s: float) -> None:
        self._storage, self._timeout_s = storage, timeout_s
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self._end(worker)
        self._selector.close()

    def run(self, uris: list[str], workers: int) -> dict[str, Probe]:
        found: dict[str, Probe] = {}
        queue = deque(uris)
        wanted = min(workers, -(-len(uris) // _PER_WORKER))
        while len(found) < len(uris):
            while queue and len(self._workers) < wanted:
                self._start()
            for worker in [w for w in self._workers if w.ready and w.uri is None]:
                if queue:
                    self._give(worker, queue.popleft())
            self._wait()
            for worker in list(self._workers):
                if (done := self._outcome(worker)) is not None:
                    found[done.uri] = done
        return {uri: found[uri] for uri in uris}

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.planning.probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # FFmpeg's messages about broken files
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        worker = _Worker(process)
        self._workers.append(worker)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)

    def _give(self, worker: _Worker, uri: str) -> None:
        worker.uri, worker.answer, worker.deadline = uri, b"", time.monotonic() + self._timeout_s
        assert worker.process.stdin is not None
        line = json.dumps({"uri": uri, "storage": self._storage.model_dump(mode="json")})
        with contextlib.suppress(OSError):  # a dead worker is detected in `_wait`
            worker.process.stdin.write(line.encode() + b"\n")
            worker.process.stdin.flush()

    def _wait(self) -> None:
        deadlines = [w.deadline for w in self._workers if w.uri is not None]
        seconds = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for key, _ in self._selector.select(seconds):
            worker, part = key.data, os.read(key.fd, 1 << 16)
            worker.answer += part
            if not part:
                self._gone(worker)
            elif not worker.ready and worker.answer.endswith(b"\n"):
                worker.ready, self._failed_starts = True, 0

    def _gone(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.wait()
        if worker.uri is None:
            self._end(worker)
            self._failed_starts += not worker.ready
        if self._failed_starts == _FAILED_STARTS:
            raise SourceError(
                f"cannot probe: `{sys.executable} -m pipeline.planning.probe` exits at once; run it to see the error, "
                "or set source.probe to false"
            )

    def _outcome(self, worker: _Worker) -> Probe | None:
        """The result of the worker's file; None while it runs or if it has no file."""
        uri = worker.uri
        if uri is None:
            return None
        if worker.answer.endswith(b"\n"):
            worker.uri = None
            return Probe(**json.loads(worker.answer))
        if worker.process.poll() is not None:
            self._end(worker)
            return Probe(uri, error=f"decode: DecoderCrashed: the process that opened the file died: {uri}")
        if time.monotonic() > worker.deadline:
            self._end(worker)
            return Probe(uri, error=f"decode: Timeout: not opened within {self._timeout_s:g} s: {uri}")
        return None

    def _end(self, worker: _Worker) -> None:
        assert worker.process.stdin is not None
        assert worker.process.stdout is not None
        self._selector.unregister(worker.process.stdout)
        worker.process.kill()
        worker.process.wait()
        with contextlib.suppress(OSError):
            worker.process.stdin.close()
        worker.process.stdout.close()
        self._workers.remove(worker)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # library output must not mix with the results
    print(file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(asdict(probe(task["uri"], Storage(**task["storage"])))), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
