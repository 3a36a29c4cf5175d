"""Renders scenes: anti-aliased shapes by signed distance, characters from a 5×7 font of our own. NumPy only."""

from __future__ import annotations

from functools import cache

import numpy as np

from pipeline.mini.scene import Background, Scene, Sign, Thing

RGB = {
    "red": (220, 38, 38),
    "green": (45, 180, 60),
    "blue": (55, 85, 235),
    "yellow": (235, 218, 55),
    "purple": (152, 55, 195),
    "orange": (242, 138, 32),
    "cyan": (65, 212, 222),
    "white": (240, 240, 240),
}
# Column bytes of a 5×7 font, top row in the lowest bit.
_FONT = {
    "0": "3E5149453E", "1": "00427F4000", "2": "4261514946", "3": "2141454B31", "4": "1814127F10",
    "5": "2745454539", "6": "3C4A494930", "7": "0171090503", "8": "3649494936", "9": "064949291E",
    "a": "7E1111117E", "b": "7F49494936", "c": "3E41414122", "d": "7F4141221C", "e": "7F49494941",
    "f": "7F09090901", "g": "3E4149497A", "h": "7F0808087F", "i": "00417F4100", "j": "2040413F01",
    "k": "7F08142241", "l": "7F40404040", "m": "7F020C027F", "n": "7F0408107F", "o": "3E4141413E",
    "p": "7F09090906", "q": "3E4151215E", "r": "7F09192946", "s": "4649494931", "t": "01017F0101",
    "u": "3F4040403F", "v": "1F2040201F", "w": "3F4038403F", "x": "6314081463", "y": "0708700807",
    "z": "6151494543",
}  # fmt: skip


def render(scene: Scene, times_s: np.ndarray | list[float]) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of the scene at the given times (seconds from its start)."""
    times = np.asarray(times_s, np.float64)
    still = _background(scene.background, scene.width_px, scene.height_px)
    frames = np.repeat(still[None], len(times), axis=0)
    for thing in scene.things:
        _draw_thing(frames, thing, times)
    if scene.sign is not None:
        _draw_sign(frames, scene.sign)
    return frames


def picture(scene: Scene) -> np.ndarray:
    """A still picture, uint8 [H, W, 3]."""
    return render(scene, [0.0])[0]


def _background(background: Background, width: int, height: int) -> np.ndarray:
    rng = np.random.default_rng(background.seed)
    first, second = np.array(background.rgb, np.float32), np.array(background.other_rgb, np.float32)
    canvas = np.broadcast_to(first, (height, width, 3)).copy()
    if background.kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.cos(angle) * np.linspace(-1, 1, width)[None] + np.sin(angle) * np.linspace(-1, 1, height)[:, None]
        canvas += (np.clip(ramp, -1, 1)[..., None] * 0.5 + 0.5).astype(np.float32) * (second - first)
    elif background.kind == "textured":
        coarse = rng.uniform(-16, 16, (-(-height // 8), -(-width // 8))).astype(np.float32)
        canvas += coarse.repeat(8, 0).repeat(8, 1)[:height, :width, None]
    for _ in range(background.clutter):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        length, shade = int(rng.integers(6, 40)), rng.uniform(-25, 25)
        if rng.random() < 0.5:
            canvas[y : y + 1, x : x + length] += shade
        else:
            canvas[y : y + length, x : x + 1] += shade
    return np.clip(canvas, 0, 150).astype(np.uint8)


def _draw_thing(frames: np.ndarray, thing: Thing, times: np.ndarray) -> None:
    height, width = frames.shape[1:3]
    color = np.array(RGB[thing.color], np.float32)
    reach = int(np.ceil(thing.radius_px)) + 1
    shown = np.flatnonzero(times >= thing.appear_s)
    groups = [shown] if thing.speed_px_s == 0 else [shown[i : i + 1] for i in range(len(shown))]
    for group in groups:
        if len(group) == 0:
            continue
        x, y = (float(v) for v in thing.position(times[group[0]]))
        x0, x1 = max(int(x) - reach, 0), min(int(x) + reach + 1, width)
        y0, y1 = max(int(y) - reach, 0), min(int(y) + reach + 1, height)
        if x0 >= x1 or y0 >= y1:
            continue
        dx = np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - x)
        dy = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - y)
        cover = np.clip(_distance(thing.shape, dx, dy, np.float32(thing.radius_px)) + 0.5, 0, 1)[..., None]
        block = frames[group[0] : group[-1] + 1, y0:y1, x0:x1]
        block[...] = (block[:1] + cover * (color - block[:1]) + 0.5).astype(np.uint8)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: np.float32) -> np.ndarray:
    """Signed distance to the outline in px, positive inside; `r` is half the shape's extent."""
    if shape == "circle":
        return r - np.hypot(x, y)
    if shape == "square":
        return np.float32(0.88) * r - np.maximum(abs(x), abs(y))
    if shape == "triangle":  # upright: base at the bottom, apex at the top
        return np.minimum(np.float32(0.8) * r - y, (y + r) * np.float32(0.447) - abs(x) * np.float32(0.894))
    if shape == "cross":
        arm, thick = r, np.float32(0.34) * r
        return np.maximum(
            np.minimum(arm - abs(x), thick - abs(y)),
            np.minimum(thick - abs(x), arm - abs(y)),
        )
    if shape == "ring":
        return np.float32(0.24) * r - abs(np.hypot(x, y) - np.float32(0.76) * r)
    if shape == "star":  # five points; each of ten sectors is one straight edge after folding
        angle = np.arctan2(x, -y)
        sector = np.float32(2 * np.pi / 5)
        folded = abs(angle - sector * np.round(angle / sector))
        distance = np.hypot(x, y)
        along, across = distance * np.cos(folded), distance * np.sin(folded)
        inner = np.float32(0.45) * r
        edge_x, edge_y = inner * np.cos(sector / 2) - r, inner * np.sin(sector / 2)
        return ((r - along) * edge_y + across * edge_x) / np.hypot(edge_x, edge_y)
    raise ValueError(f"expected a shape of pipeline.mini.vocabulary.SHAPES, got {shape!r}")


def _draw_sign(frames: np.ndarray, sign: Sign) -> None:
    height, width = frames.shape[1:3]
    half_w, half_h = sign.half_size_px
    x0, y0 = max(int(sign.x_px - half_w), 0), max(int(sign.y_px - half_h), 0)
    x1, y1 = min(int(sign.x_px + half_w) + 1, width), min(int(sign.y_px + half_h) + 1, height)
    panel = np.full((y1 - y0, x1 - x0), 10.0, np.float32)
    panel[[0, -1]] = 110.0
    panel[:, [0, -1]] = 110.0
    ink = _text_cover(sign.text, x0 - sign.x_px, y0 - sign.y_px, panel.shape[1], panel.shape[0], sign.pitch_px)
    panel += ink * (235.0 - panel)
    frames[:, y0:y1, x0:x1] = panel[None, ..., None].astype(np.uint8)


def _text_cover(text: str, left: float, top: float, width: int, height: int, pitch: float) -> np.ndarray:
    """Coverage 0..1 [height, width] of centred text; (left, top) is the first pixel's offset from the text's centre."""
    dots = np.concatenate([_glyph(char) for char in text], axis=1)
    dot_px = pitch / 6
    columns = _sample_positions(left, width, dot_px, dots.shape[1])
    rows = _sample_positions(top, height, dot_px, dots.shape[0])
    return _linear(_linear(dots, rows, 0), columns, 1)


def _sample_positions(first: float, count: int, dot_px: float, dots: int) -> np.ndarray:
    return (np.arange(count) + 0.5 + first) / dot_px + dots / 2 - 0.5


def _linear(values: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation along an axis, zero outside."""
    size = values.shape[axis]
    weights = np.clip(1 - abs(positions[:, None] - np.arange(size)[None]), 0, 1).astype(np.float32)
    return weights @ values if axis == 0 else values @ weights.T


@cache
def _glyph(char: str) -> np.ndarray:
    """float32 [7, 6]: five columns of dots and an empty half column on either side, shifted to whole dots."""
    code = _FONT.get(char)
    if code is None:
        raise ValueError(f"expected a digit or a lower-case letter, got {char!r}")
    columns = [int(code[i : i + 2], 16) for i in range(0, 10, 2)]
    dots = np.zeros((7, 6), np.float32)
    for index, column in enumerate(columns):
        dots[:, index] = [(column >> row) & 1 for row in range(7)]
    return dots
