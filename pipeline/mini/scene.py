"""Scenes to render: flat shapes that stay or move and may appear later, perhaps a sign, and a background.

A scene is defined in seconds and pixels, so it can be sampled at any frame rate. A still picture is a scene with
`duration_s` 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.mini.vocabulary import COLORS, MOTIONS, SHAPES, SIGN_WORDS, SIZES

HEADING = {"still": (0.0, 0.0), "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
RADIUS_PX = {"small": (8.0, 10.0), "large": (13.5, 16.5)}  # in a frame of 96 px; scales with the root of the side
# Colour–shape combinations that scenes show only on request: they test combinations that were never trained. Every
# colour and every shape occurs in many other combinations.
HELD_OUT = frozenset(
    (
        ("red", "ring"),
        ("green", "star"),
        ("blue", "cross"),
        ("yellow", "square"),
        ("purple", "circle"),
        ("cyan", "triangle"),
    )
)
MIN_SIDE_PX = 64  # the widest sign and the longest path fit
MAX_THINGS = 10  # counts have words up to ten
MAX_SET = 6  # images of a set have ordinals up to the sixth
_PLACING_TRIES = 24
_PATH_POINTS = 9


@dataclass(frozen=True)
class Thing:
    """One shape. `x_px`, `y_px` is its centre when it appears; from then on it moves at `speed_px_s`."""

    color: str
    shape: str
    size: str
    x_px: float
    y_px: float
    radius_px: float
    motion: str = "still"
    speed_px_s: float = 0.0
    appear_s: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    def position(self, time_s: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Centre (x, y) in px at the given times; before it appears, where it will appear."""
        travelled = self.speed_px_s * np.maximum(np.asarray(time_s, np.float64) - self.appear_s, 0.0)
        dx, dy = HEADING[self.motion]
        return self.x_px + dx * travelled, self.y_px + dy * travelled


@dataclass(frozen=True)
class Sign:
    """A dark panel with light letters or digits; `x_px`, `y_px` is the centre, one character is `pitch_px` wide."""

    text: str
    x_px: float
    y_px: float
    pitch_px: float

    @property
    def half_size_px(self) -> tuple[float, float]:
        return self.pitch_px * (len(self.text) / 2 + 0.35), self.pitch_px * 0.95


@dataclass(frozen=True)
class Background:
    kind: str  # plain | gradient | textured
    rgb: tuple[int, int, int]
    other_rgb: tuple[int, int, int]
    seed: int
    clutter: int = 0  # faint strokes


@dataclass(frozen=True)
class Scene:
    width_px: int
    height_px: int
    duration_s: float
    things: tuple[Thing, ...]
    sign: Sign | None
    background: Background

    @property
    def is_video(self) -> bool:
        return self.duration_s > 0

    @property
    def shows_held_out(self) -> bool:
        """Whether one of the things is a combination of `HELD_OUT`."""
        return any((thing.color, thing.shape) in HELD_OUT for thing in self.things)

    def in_telling_order(self) -> list[Thing]:
        """Things present from the start, by colour and shape, then things that appear later, by time."""
        return sorted(self.things, key=lambda t: (t.appear_s, COLORS.index(t.color), SHAPES.index(t.shape)))


def sample_scene(
    rng: np.random.Generator,
    width_px: int = 128,
    height_px: int = 128,
    duration_s: float = 8.0,
    max_things: int = 4,
    max_clutter: int = 4,
    sign_share: float = 0.4,
    sign_words: bool = False,
    held_out: bool = False,
) -> Scene:
    """A random scene whose things never cover each other or the sign; it may have fewer than `max_things`.

    `sign_share` of the scenes have a sign with a number of one to three digits, or with `sign_words` sometimes a word.
    With `held_out` the first thing is a combination of `HELD_OUT`, else no thing is. Raises ValueError for sides under
    `MIN_SIDE_PX` and for more than `MAX_THINGS` things.
    """
    if min(width_px, height_px) < MIN_SIDE_PX or not 1 <= max_things <= MAX_THINGS or max_clutter < 0:
        raise ValueError(
            f"expected sides of at least {MIN_SIDE_PX} px, 1 to {MAX_THINGS} things and no negative clutter, "
            f"got {width_px}×{height_px} px, {max_things} things, clutter {max_clutter}"
        )
    while True:
        sign = _sample_sign(rng, width_px, height_px, sign_words) if rng.random() < sign_share else None
        wanted = int(rng.integers(0 if sign and not held_out else 1, max_things + 1))
        names = _sample_names(rng, wanted, held_out)
        appear = _sample_appearances(rng, wanted, duration_s)
        things: list[Thing] = []
        for (color, shape), appear_s in zip(names, appear, strict=True):
            thing = _place(rng, color, shape, appear_s, width_px, height_px, duration_s, things, sign)
            if thing is not None:
                things.append(thing)
        scene = Scene(width_px, height_px, duration_s, tuple(things), sign, _sample_background(rng, max_clutter))
        if not held_out or scene.shows_held_out:  # a sign may leave the first thing no room
            return scene


def sample_set(rng: np.random.Generator, count: int, **knobs: Any) -> tuple[Scene, ...]:
    """`count` still scenes of one size, drawn one by one with the arguments of `sample_scene`."""
    if not 2 <= count <= MAX_SET:
        raise ValueError(f"expected a set of 2 to {MAX_SET} images, got {count}")
    return tuple(sample_scene(rng, duration_s=0.0, **knobs) for _ in range(count))


def sample_pair(rng: np.random.Generator, **knobs: Any) -> tuple[Scene, Scene]:
    """Two still scenes that differ in one thing, which one of them lacks; takes the arguments of `sample_scene`.

    With `held_out` that thing is the held-out combination. A pair shares at least one thing if `max_things` allows it.
    """
    held_out = knobs.get("held_out", False)
    whole = sample_scene(rng, duration_s=0.0, **knobs)
    while len(whole.things) < min(2, knobs.get("max_things", 2)):
        whole = sample_scene(rng, duration_s=0.0, **knobs)
    lacking = 0 if held_out else int(rng.integers(len(whole.things)))
    less = replace(whole, things=whole.things[:lacking] + whole.things[lacking + 1 :])
    return (whole, less) if rng.random() < 0.5 else (less, whole)


def _sample_names(rng: np.random.Generator, count: int, held_out: bool) -> list[tuple[str, str]]:
    """Distinct colours and shapes of `count` things."""
    order = rng.permutation(len(COLORS) * len(SHAPES)).tolist()
    every = [(COLORS[name % len(COLORS)], SHAPES[name // len(COLORS)]) for name in order]
    names = [name for name in every if name not in HELD_OUT][:count]
    if held_out:
        names[:1] = [name for name in every if name in HELD_OUT][:1]
    return names


def appearance_gap_s(duration_s: float) -> float:
    """Seconds between the start, later appearances and the end. A scene shorter than two gaps has no later ones."""
    return max(1.2, duration_s / 6)


def _sample_appearances(rng: np.random.Generator, count: int, duration_s: float) -> list[float]:
    """Appearance times: mostly 0; up to two later ones, `appearance_gap_s` ± 30 % apart."""
    times = [0.0] * count
    gap_s = appearance_gap_s(duration_s)
    slots = np.arange(gap_s, duration_s - gap_s + 1e-6, gap_s)
    if count == 0 or len(slots) == 0 or rng.random() < 0.35:
        return times
    late = min(int(rng.integers(1, 3)), len(slots), count)
    for index, slot in enumerate(rng.permutation(len(slots))[:late].tolist()):
        times[index] = round(float(slots[slot] + rng.uniform(-0.15, 0.15) * gap_s), 3)
    return times


def _place(
    rng: np.random.Generator,
    color: str,
    shape: str,
    appear_s: float,
    width_px: int,
    height_px: int,
    duration_s: float,
    others: list[Thing],
    sign: Sign | None,
) -> Thing | None:
    """A thing with a free path through the frame, or None if none was found."""
    scale, times = _scale(width_px, height_px), np.linspace(appear_s, duration_s, _PATH_POINTS)
    visible_s = duration_s - appear_s
    for _ in range(_PLACING_TRIES):
        size = SIZES[int(rng.integers(2))]
        radius = scale * rng.uniform(*RADIUS_PX[size])
        motion = MOTIONS[int(rng.integers(len(MOTIONS)))] if duration_s > 0 else "still"
        dx, dy = HEADING[motion]
        length = (width_px if dx else height_px) if motion != "still" else 0
        travel = min(length * rng.uniform(0.25, 0.55), length * 0.3 * visible_s, length - 2 * radius - 3)
        low, room_x, room_y = radius + 1, width_px - 2 * radius - 2, height_px - 2 * radius - 2
        x = low + (max(-dx, 0) * travel) + rng.random() * (room_x - abs(dx) * travel)
        y = low + (max(-dy, 0) * travel) + rng.random() * (room_y - abs(dy) * travel)
        speed = travel / visible_s if motion != "still" else 0.0
        thing = Thing(color, shape, size, float(x), float(y), float(radius), motion, float(speed), appear_s)
        if _is_free(thing, times, others, sign):
            return thing
    return None


def _is_free(thing: Thing, times: np.ndarray, others: list[Thing], sign: Sign | None) -> bool:
    """Whether no other thing, nor the sign, comes within touching distance at any point of the path."""
    xs, ys = thing.position(times)
    for other in others:
        other_xs, other_ys = other.position(times)
        reach = thing.radius_px + other.radius_px + 2
        if np.any(np.maximum(abs(xs - other_xs), abs(ys - other_ys)) < reach):
            return False
    if sign is None:
        return True
    half_w, half_h = sign.half_size_px
    clear_x = abs(xs - sign.x_px) >= half_w + thing.radius_px + 1
    clear_y = abs(ys - sign.y_px) >= half_h + thing.radius_px + 1
    crosses = (min(xs) < sign.x_px < max(xs) and not clear_y.any()) or (
        min(ys) < sign.y_px < max(ys) and not clear_x.any()
    )
    return bool(np.all(clear_x | clear_y)) and not crosses


def _scale(width_px: int, height_px: int) -> float:
    return (min(width_px, height_px) / 96) ** 0.5


def _sample_sign(rng: np.random.Generator, width_px: int, height_px: int, words: bool) -> Sign:
    if words and rng.random() < 0.5:
        text = SIGN_WORDS[int(rng.integers(len(SIGN_WORDS)))]
    else:
        text = "".join(str(d) for d in rng.integers(0, 10, int(rng.integers(1, 4))).tolist())
    pitch = _scale(width_px, height_px) * rng.uniform(12.5, 14.5)
    half_w, half_h = Sign(text, 0, 0, pitch).half_size_px
    x = rng.uniform(half_w + 1, width_px - half_w - 1)
    y = rng.uniform(half_h + 1, height_px - half_h - 1)
    return Sign(text, float(x), float(y), pitch)


def _sample_background(rng: np.random.Generator, max_clutter: int) -> Background:
    """Dim and nearly grey, so that every colour of a thing stands out."""
    levels = rng.uniform(12, 95, 2)[:, None] + rng.uniform(-12, 12, (2, 3))
    first, second = (tuple(int(v) for v in np.clip(row, 0, 110)) for row in levels)
    kind = ("plain", "gradient", "textured")[int(rng.integers(3))]
    clutter = int(rng.integers(0, max_clutter + 1))
    return Background(kind, first, second, int(rng.integers(1 << 31)), clutter)  # type: ignore[arg-type]
