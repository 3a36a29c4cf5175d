"""Tiny videos and images whose every frame says which one it is, in a form that survives compression and resizing.

The upper half of a frame holds its index as twelve black or white bars, the lower half red, green and blue patches.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

BITS = 12
PATCHES = ((200, 30, 30), (30, 180, 30), (30, 30, 200))
TICKS = 12_800  # per second; a multiple of the usual frame rates


def picture(index: int, height: int = 96, width: int = 144) -> np.ndarray:
    """Frame number `index`, uint8 `[height, width, 3]`."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    for bit in range(BITS):
        image[: height // 2, bit * width // BITS : (bit + 1) * width // BITS] = 235 if index >> bit & 1 else 20
    for patch, colour in enumerate(PATCHES):
        image[height // 2 :, patch * width // 3 : (patch + 1) * width // 3] = colour
    return image


def read_index(frame: np.ndarray) -> int:
    """The index that `frame` shows, at any size."""
    height, width = frame.shape[:2]
    row = frame[height // 8 : height * 3 // 8].mean(axis=(0, 2))
    return sum(
        int(row[round((bit + 0.3) * width / BITS) : round((bit + 0.7) * width / BITS) + 1].mean() > 128) << bit
        for bit in range(BITS)
    )


def read_colours(frame: np.ndarray) -> np.ndarray:
    """The mean colours of the patches, float `[3, 3]`."""
    height, width = frame.shape[:2]
    centres = [round((patch + 0.5) * width / 3) for patch in range(3)]
    return np.stack(
        [frame[height * 5 // 8 : height * 7 // 8, x - width // 16 : x + width // 16].mean((0, 1)) for x in centres]
    )


def render(
    path: Path | str,
    *,
    count: int = 24,
    fps: float = 12.0,
    times_s: Sequence[float] | None = None,
    codec: str = "libx264",
    height: int = 96,
    width: int = 144,
    quarters: int = 0,
    gop: int = 8,
    open_gop: bool = False,
    bframes: int = 2,
    audio_s: float = 0.0,
    colorspace: int | None = None,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A video of `count` frames at `fps`, or of one frame per entry of `times_s`.

    `height` and `width` are as displayed: the picture is stored turned and marked to be turned back by `quarters` ×
    90° counter-clockwise. `colorspace`: FFmpeg's number, written into the stream. `options`: of the
    container.
    """
    times = [i / fps for i in range(count)] if times_s is None else list(times_s)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stored = np.rot90(picture(0, height, width), -quarters)
        stream.height, stream.width = stored.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        stream.codec_context.gop_size = gop
        stream.options = _encoder_options(codec, bframes, open_gop)
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if quarters:
            stream.set_display_rotation(90 * quarters)
        sound = container.add_stream("aac", rate=16_000) if audio_s else None
        for index, time_s in enumerate(times):
            stored = np.ascontiguousarray(np.rot90(picture(index, height, width), -quarters))
            frame = av.VideoFrame.from_ndarray(stored, format="rgb24")
            if colorspace is not None:
                frame = frame.reformat(format="yuv420p", dst_colorspace=colorspace)
                frame.colorspace = colorspace
            frame.pts, frame.time_base = round(time_s * TICKS), Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _mux_silence(container, sound, audio_s)
    return Path(path)


def render_trimmed(path: Path | str, trim_s: float, **options: Any) -> Path:
    """An MP4 whose first `trim_s` seconds are in the file, but cut away by an edit list."""
    whole = render(Path(path).with_suffix(".whole.mp4"), **options)
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        shift = round(trim_s / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    return Path(path)


def render_audio(path: Path | str, duration_s: float = 1.0, *, cover: bool = False) -> Path:
    """A file with sound and no moving pictures, at most a cover."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16_000)
        if cover:
            stream = container.add_stream("mjpeg", options={"strict": "-1"})
            stream.height, stream.width, stream.pix_fmt = 96, 144, "yuvj420p"
            stream.disposition = Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(picture(0), format="rgb24").reformat(format="yuvj420p")
            frame.pts = 0
            container.mux([*stream.encode(frame), *stream.encode(None)])
        _mux_silence(container, sound, duration_s)
    return Path(path)


def encoders(*names: str) -> list[str]:
    """Those of `names` that this build of PyAV can encode with."""
    return [name for name in names if name in av.codecs_available]


def _encoder_options(codec: str, bframes: int, open_gop: bool) -> dict[str, str]:
    return {
        "libx264": {
            "preset": "ultrafast",
            "bf": str(bframes),
            "crf": "18",
            "x264-params": f"open-gop={open_gop:d}:scenecut=0",
        },
        "libx265": {
            "preset": "ultrafast",
            "x265-params": f"log-level=none:bframes={bframes}:open-gop={open_gop:d}",
            "crf": "18",
        },
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "1M"},
        "libvpx": {"deadline": "realtime", "cpu-used": "8", "b": "1M", "auto-alt-ref": "1", "lag-in-frames": "8"},
        "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
    }.get(codec, {"b": "4M"})


def _mux_silence(container: av.container.OutputContainer, stream: av.AudioStream, duration_s: float) -> None:
    for start in range(0, round(duration_s * 16_000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
