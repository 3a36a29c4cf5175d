"""The picture of `jobs.survivors`, drawn with Pillow: the image, who survived each question, and the merge weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from jobs.survivors import Seen

PANEL_PX, GAP_PX, TITLE_PX, LINE_PX = 336, 20, 52, 20
WHITE, INK, GREY, OUTLINE, DIFFERENT = (255, 255, 255), (25, 25, 30), (110, 110, 118), (255, 255, 255), (255, 120, 0)
MERGED_LIGHT = (0.3, 0.48, 0.68)  # brightness of patches merged in the first, second, third stage
LESS, EQUAL, MORE = (np.array(rgb, np.float32) for rgb in ([40, 90, 200], [246, 246, 246], [225, 85, 10]))
OCTAVES = 2  # the colour scale of weights ends at 2 ** ±OCTAVES times the equal weight


def draw(
    image: np.ndarray, token_px: int, looks: Sequence[Seen], layers: Sequence[int], footer: Sequence[str]
) -> Image.Image:
    """One PNG-ready picture: per look a panel of survivors and one of guidance, the image and a legend on the left.

    image uint8 [H, W, 3], whose patches of token_px are the vision tokens; layers are those the stages follow.
    """
    rows = image.shape[0] // token_px
    scale = PANEL_PX // rows
    side = scale * rows
    width = GAP_PX + (side + GAP_PX) * (len(looks) + 1)
    top, second = GAP_PX + TITLE_PX, GAP_PX + 2 * TITLE_PX + side + GAP_PX
    height = second + side + GAP_PX + len(footer) * LINE_PX + GAP_PX
    canvas = Image.new("RGB", (width, height), WHITE)
    pen = ImageDraw.Draw(canvas)
    _text(pen, GAP_PX, GAP_PX, "The image", f"{rows} by {rows} patches, one vision token each")
    canvas.paste(_enlarged(image, side), (GAP_PX, top))
    common = looks[0].alive[-1] & looks[-1].alive[-1]
    for number, look in enumerate(looks, start=1):
        left = GAP_PX + number * (side + GAP_PX)
        alive = look.alive[-1]
        share = f"{int(alive.sum())} of {len(alive)} patches left ({alive.float().mean():.0%})"
        kept = f"{share}, KV kept {look.retention:.0%}"
        _text(pen, left, GAP_PX, look.question, f"answer: {look.answer}  ·  {kept}")
        canvas.paste(_survivors(image, side, look.alive, common), (left, top))
        _text(pen, left, second - TITLE_PX, "Weight in merging", f"guidance after layer {layers[0]}, 1 = equal weights")
        canvas.paste(_heat(image, side, look.guidance), (left, second))
    _legend(pen, GAP_PX, second, side, layers)
    for number, line in enumerate(footer):
        pen.text((GAP_PX, second + side + GAP_PX + number * LINE_PX), line, INK, _font(14))
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text(pen: ImageDraw.ImageDraw, left: int, top: int, title: str, line: str) -> None:
    pen.text((left, top), title, INK, _font(19))
    pen.text((left, top + 28), line, GREY, _font(12))


def _enlarged(image: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)


def _per_patch(values: np.ndarray, side: int) -> np.ndarray:
    """[N] values of a square of patches → [side, side, 1]."""
    rows = int(len(values) ** 0.5)
    return values.reshape(rows, rows).repeat(side // rows, 0).repeat(side // rows, 1)[..., None]


def _survivors(image: np.ndarray, side: int, alive: Tensor, common: Tensor) -> Image.Image:
    """Merged patches darkened by the stage that took them; survivors as they are, outlined."""
    stages = alive.sum(0).numpy()  # how many stages each patch survived
    steps = np.array([*MERGED_LIGHT[: len(alive)], *[1.0] * (len(alive) + 1 - len(MERGED_LIGHT[: len(alive)]))])
    light = _per_patch(steps[stages].astype(np.float32), side)
    picture = Image.fromarray((np.asarray(_enlarged(image, side)) * light).astype(np.uint8))
    pen, rows = ImageDraw.Draw(picture), int(len(common) ** 0.5)
    step = side // rows
    for patch in alive[-1].nonzero().flatten().tolist():
        y, x = divmod(patch, rows)
        box = (x * step + 1, y * step + 1, (x + 1) * step - 2, (y + 1) * step - 2)
        pen.rectangle(box, outline=OUTLINE if common[patch] else DIFFERENT, width=2)
    return picture


def _heat(image: np.ndarray, side: int, guidance: Tensor) -> Image.Image:
    """Guidance over the equal weight, on a logarithmic scale, laid over the grey image."""
    grey = np.asarray(_enlarged(image, side).convert("L"), np.float32)[..., None] / 255
    ratio = np.log2(np.maximum(guidance.numpy() * len(guidance), 1e-6)) / OCTAVES
    return Image.fromarray((_shade(_per_patch(ratio, side)) * (0.7 + 0.3 * grey)).astype(np.uint8))


def _shade(ratio: np.ndarray) -> np.ndarray:
    """Colours [..., 3] of ratios [..., 1] from -1 (least) over 0 (equal) to 1 (most)."""
    ratio = np.clip(ratio, -1, 1)
    return EQUAL + np.where(ratio < 0, LESS - EQUAL, MORE - EQUAL) * np.abs(ratio)


def _legend(pen: ImageDraw.ImageDraw, left: int, top: int, side: int, layers: Sequence[int]) -> None:
    y, box = top, 22
    entries: list[tuple[tuple[int, int, int], tuple[int, int, int], str]] = [
        ((150, 170, 190), OUTLINE, "survives all stages, for both questions"),
        ((150, 170, 190), DIFFERENT, "survives for this question only"),
    ]
    for layer, light in reversed(list(zip(layers, MERGED_LIGHT, strict=False))):
        shade = (int(150 * light), int(170 * light), int(190 * light))
        entries.append((shade, shade, f"merged into another after layer {layer}"))
    for fill, outline, words in entries:
        pen.rectangle((left, y, left + box, y + box), fill, GREY)
        pen.rectangle((left + 2, y + 2, left + box - 2, y + box - 2), fill, outline, 2)
        pen.text((left + box + 10, y + 3), words, INK, _font(14))
        y += box + 10
    y += 14
    pen.text((left, y), "weight in merging, times the equal weight", INK, _font(14))
    shades = _shade(np.linspace(-1, 1, side)[:, None]).astype(int).tolist()
    for x, shade in enumerate(shades):
        pen.line((left + x, y + 24, left + x, y + 44), tuple(shade))
    for at, words, anchor in ((0, "1/4 or less", "la"), (side // 2, "1", "ma"), (side - 1, "4 or more", "ra")):
        pen.text((left + at, y + 48), words, INK, _font(13), anchor=anchor)
