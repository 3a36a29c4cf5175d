"""Opens videos with PyAV, seeks in them, and detects truncated files."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import av
import av.error
from av.stream import Disposition

from pipeline.errors import UnitError

# Without playlists and other formats that make FFmpeg open further files or addresses.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,live_flv,asf,ogg,mxf,nut,ivf,gif,apng,"
    "dv,rm,wtv,h264,hevc,obu,m4v,mjpeg,y4m,yuv4mpegpipe,swf,nsv,vob,gxf"
)
_STEPS_BACK_S = (
    0.0,
    2.0,
    10.0,
    None,
)  # how far to seek before the target until a key frame precedes it; None: the start


@dataclass(frozen=True)
class Shape:
    """Size of a frame as displayed: square pixels, after `quarters` rotations of 90° counter-clockwise."""

    height: int
    width: int
    quarters: int


def open_video(source: Any, uri: str) -> Any:
    """Open a PyAV container with a video stream. Raises `UnitError` (decode): NotAVideo, NoVideoStream, Unsupported."""
    try:
        container = av.open(source, options={"format_whitelist": _FORMATS}, metadata_errors="replace")
    except (av.error.InvalidDataError, av.error.ArgumentError, av.error.EOFError) as error:
        raise UnitError(
            "decode", "NotAVideo", f"not a video, or cut off before its index ({error.strerror}): {uri}"
        ) from error
    if (stream := _pictures(container)) is None:
        kinds = sorted({s.type for s in container.streams}) or ["no stream"]
        container.close()
        raise UnitError("decode", "NoVideoStream", f"expected a video stream, found {', '.join(kinds)}: {uri}")
    if stream.codec_context is None:
        container.close()
        raise UnitError("decode", "Unsupported", f"no decoder for the video stream of {uri}")
    stream.codec_context.thread_count = 1
    return container


def video_stream(container: Any) -> Any:
    """The video stream to decode, of a container from `open_video`."""
    return _pictures(container)


def _pictures(container: Any) -> Any:
    """The first video stream that is not a cover picture."""
    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def misstamped(stream: Any) -> bool:
    """Whether the stream's pts are wrong: AVI stores none, and FFmpeg's guess fails with reordered frames."""
    return bool(stream.container.format.name == "avi" and stream.codec_context.has_b_frames)


class CannotSeekError(Exception):
    """Seeking in this video does not find the needed key frame or timestamps."""


def rewind(container: Any) -> None:
    """Seek to the first packet. The target is before its time, as some formats skip a key frame at the exact time."""
    try:
        container.seek(min(container.start_time or 0, 0) - 10 * av.time_base)
    except av.error.FFmpegError:
        container.seek(0)


def packets_from(container: Any, stream: Any, pts: int) -> Iterator[Any]:
    """Packets from a key frame at or before `pts` to the end. Seeks further back if the format lands after `pts`."""
    for back_s in _STEPS_BACK_S:
        if back_s is None:
            rewind(container)
        else:
            with suppress(av.error.FFmpegError):
                container.seek(pts - round(back_s / stream.time_base), stream=stream, backward=True)
        found = itertools.dropwhile(lambda packet: not packet.is_keyframe, packets(container, stream))
        first = next(found, None)
        if first is not None and first.pts is not None and first.pts <= pts:
            yield first
            yield from found
            return
    raise CannotSeekError


def packets(container: Any, stream: Any) -> Iterator[Any]:
    return (packet for packet in container.demux(stream) if packet.size)


def decoded_shape(packet: Any, stream: Any) -> Shape | None:
    """The shape of the first frame that the decoder returns; None if it returns none yet."""
    try:
        decoded = stream.codec_context.decode(packet)
    except (av.error.InvalidDataError, av.error.EOFError):
        return None
    if not decoded:
        return None
    frame = decoded[0]
    aspect = float(stream.sample_aspect_ratio or 1)
    width = round(frame.width * aspect) if 0.25 <= aspect <= 4 else frame.width
    quarters = round(frame.rotation / 90) % 4
    height, width = (width, frame.height) if quarters % 2 else (frame.height, width)
    return Shape(height, width, quarters)


def missing_bytes(container: Any, head: bytes, size_bytes: int) -> int:
    """How many bytes declared by the header the file lacks; 0 if it is complete or declares no length."""
    if container.format.name.startswith("mov"):
        entries = video_stream(container).index_entries
        return max(0, max((entry.pos + entry.size for entry in entries), default=0) - size_bytes)
    return max(0, (declared_bytes(head) or 0) - size_bytes)


def declared_bytes(head: bytes) -> int | None:
    """The file length that a Matroska or AVI header declares; None for other formats and live recordings."""
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    at = head.find(b"\x18\x53\x80\x67") if head[:4] == b"\x1aE\xdf\xa3" else -1
    if at < 0 or at + 5 > len(head):
        return None
    length = 9 - head[at + 4].bit_length()
    if length > 8 or at + 4 + length > len(head):
        return None
    value = int.from_bytes(head[at + 4 : at + 4 + length], "big") & ((1 << 7 * length) - 1)
    return None if value == (1 << 7 * length) - 1 else at + 4 + length + value
