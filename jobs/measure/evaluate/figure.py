"""Draw the figure of `jobs.measure.evaluate` with Pillow: accuracy kept against KV kept, one panel per suite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

from jobs.measure.evaluate.config import PLAIN
from jobs.measure.evaluate.summary import Figures

PANEL_W, PANEL_H, LEFT, TOP, GAP, FOOT, COLUMNS = 460, 380, 66, 44, 34, 54, 3
WHITE, INK, GREY, GRID = (255, 255, 255), (25, 25, 30), (110, 110, 118), (225, 225, 230)
COLORS = (
    (213, 62, 20), (25, 105, 190), (20, 140, 90), (150, 70, 180), (200, 140, 10), (90, 90, 90), (15, 160, 190),
    (220, 90, 150), (120, 80, 40), (110, 150, 30),
)  # fmt: skip
MARKS = ("circle", "square", "diamond", "triangle")
Point = tuple[float, float]


def draw(figures: Sequence[Figures], title: str) -> Image.Image:
    """One PNG-ready picture. Error bars are the intervals of `Figures.kept_interval`; lines join the retentions."""
    suites = list(dict.fromkeys(line.suite for line in figures))
    methods = [name for name in dict.fromkeys(line.method for line in figures) if name != PLAIN]
    shown = [line for line in figures if line.method != PLAIN and not line.error and not math.isnan(line.kept)]
    floor = _floor([line.kept_interval[0] for line in shown] + [line.kept for line in shown])
    widest = max((math.ceil(10 * line.reached + 0.5) / 10 for line in shown), default=1.0)
    columns = min(COLUMNS, len(suites))
    rows = -(-len(suites) // columns)
    legend = 30 * -(-len(methods) // (2 * columns)) + 20
    size = (columns * (PANEL_W + GAP) + GAP, 56 + rows * (PANEL_H + GAP) + legend + GAP)
    canvas = Image.new("RGB", size, WHITE)
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, 16), title, INK, _font(20))
    for number, suite in enumerate(suites):
        corner = GAP + number % columns * (PANEL_W + GAP), 56 + number // columns * (PANEL_H + GAP)
        place = _axes(pen, corner, suite, floor, widest)
        for method in reversed(methods):  # so that the first ones are on top
            lines = [line for line in shown if (line.suite, line.method) == (suite, method)]
            _series(pen, place, sorted(lines, key=lambda line: line.reached), methods.index(method))
    for number, method in enumerate(methods):
        x = GAP + number % (2 * columns) * (PANEL_W + GAP) // 2
        y = 56 + rows * (PANEL_H + GAP) + 30 * (number // (2 * columns)) + 14
        pen.line((x, y, x + 36, y), COLORS[number % len(COLORS)], 3)
        _mark(pen, (x + 18, y), number)
        pen.text((x + 46, y), method, INK, _font(16), anchor="lm")
    return canvas


def _floor(values: Sequence[float]) -> float:
    """The lower end of the vertical axis: a multiple of 10 % below all values."""
    return max(0.0, math.floor(10 * min((value for value in values if not math.isnan(value)), default=0.0)) / 10)


def _axes(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, floor: float, widest: float
) -> Callable[[Point], Point]:
    """Draw grid and labels of a panel up to `widest` retention; return (retention, share kept) → position."""
    left, right = corner[0] + LEFT, corner[0] + PANEL_W
    top, bottom = corner[1] + TOP, corner[1] + PANEL_H - FOOT
    ceiling = 1.05

    def place(point: Point) -> Point:
        share = (point[1] - floor) / (ceiling - floor)
        return left + point[0] / widest * (right - left), bottom - min(max(share, 0), 1) * (bottom - top)

    pen.text((left, corner[1] + 12), title, INK, _font(17))
    step = 0.05 if ceiling - floor < 0.4 else 0.1
    for number in range(round((1 - floor) / step) + 1):
        value = floor + number * step
        y = place((0, value))[1]
        pen.line((left, y, right, y), GREY if abs(value - 1) < 1e-9 else GRID, 1)
        pen.text((left - 8, y), f"{value:.0%}", GREY, _font(13), anchor="rm")
    for number in range(round(10 * widest) + 1):
        x = place((number / 10, floor))[0]
        pen.line((x, top, x, bottom), GRID, 1)
        pen.text((x, bottom + 6), f"{number / 10:.0%}", GREY, _font(13), anchor="ma")
    pen.text(((left + right) / 2, bottom + 26), "vision KV kept", GREY, _font(14), anchor="ma")
    pen.text((corner[0], corner[1] + 15), "of plain", GREY, _font(13))
    return place


def _series(pen: ImageDraw.ImageDraw, place: Callable[[Point], Point], lines: list[Figures], number: int) -> None:
    color = COLORS[number % len(COLORS)]
    points = [place((line.reached, line.kept)) for line in lines]
    if len(points) > 1:
        pen.line(points, color, 2)
    for line, point in zip(lines, points, strict=True):
        if not math.isnan(line.kept_interval[0]):
            ends = [place((line.reached, bound)) for bound in line.kept_interval]
            pen.line(ends, color, 1)
            for x, y in ends:
                pen.line((x - 4, y, x + 4, y), color, 1)
        _mark(pen, point, number)


def _mark(pen: ImageDraw.ImageDraw, point: Point, number: int) -> None:
    (x, y), color, shape = point, COLORS[number % len(COLORS)], MARKS[number % len(MARKS)]
    corners: dict[str, list[Point]] = {
        "square": [(x - 4, y - 4), (x + 4, y - 4), (x + 4, y + 4), (x - 4, y + 4)],
        "diamond": [(x - 6, y), (x, y - 6), (x + 6, y), (x, y + 6)],
        "triangle": [(x - 5, y + 5), (x + 5, y + 5), (x, y - 6)],
    }
    if shape in corners:
        pen.polygon(corners[shape], color, WHITE)
    else:
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), color, WHITE)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
