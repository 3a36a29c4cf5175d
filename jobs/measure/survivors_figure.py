"""Draw the picture of `jobs.measure.survivors` with Pillow: an image, and the survivors of each question by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PANEL_PX, GAP_PX, TITLE_PX, LINE_PX = 336, 20, 52, 20
WHITE, INK, GREY, OUTLINE, DIFFERENT = (255, 255, 255), (25, 25, 30), (110, 110, 118), (255, 255, 255), (255, 120, 0)
SAMPLE = np.array([150, 170, 190], np.float32)  # the legend's patch
MERGED_LIGHT = 0.5  # brightness of patches that are part of a survivor


@dataclass(frozen=True)
class Seen:
    """One question about one image of N vision tokens (rows × columns).

    alive     bool [stages, N], the patches left after each stage; the others have merged
    weight    fp32 [N], each patch's share of the merge weights at the first stage; None if the question sets no weights
    retention share of vision KV entries kept, averaged over layers
    """

    question: str
    answer: str
    alive: Tensor
    weight: Tensor | None
    retention: float


def draw(image: np.ndarray, token_px: int, rows: Mapping[str, Sequence[Seen]], footer: Sequence[str]) -> Image.Image:
    """One PNG-ready picture: a row of panels per method, a panel per question; image and legend on the left.

    image uint8 [H, W, 3], a square whose patches of token_px are the vision tokens.
    """
    patches = image.shape[0] // token_px
    side = PANEL_PX // patches * patches
    columns = 1 + max(len(looks) for looks in rows.values())
    tall = TITLE_PX + side + GAP_PX
    canvas = Image.new(
        "RGB", (GAP_PX + (side + GAP_PX) * columns, 2 * GAP_PX + tall * len(rows) + LINE_PX * len(footer)), WHITE
    )
    pen = ImageDraw.Draw(canvas)
    _text(pen, GAP_PX, GAP_PX, "The image", f"{patches} by {patches} patches, one vision token each")
    canvas.paste(_enlarged(image, side), (GAP_PX, GAP_PX + TITLE_PX))
    _legend(pen, GAP_PX, GAP_PX + tall + (TITLE_PX if len(rows) > 1 else 0))
    for row, (method, looks) in enumerate(rows.items()):
        top, common = GAP_PX + row * tall, looks[0].alive[-1] & looks[-1].alive[-1]
        for column, look in enumerate(looks, start=1):
            left, alive = GAP_PX + column * (side + GAP_PX), look.alive[-1]
            kept = f"{int(alive.sum())} of {len(alive)} patches left, KV {look.retention:.0%}"
            _text(pen, left, top, look.question, f"{method}  ·  answer: {look.answer}  ·  {kept}")
            canvas.paste(_survivors(image, side, look, common), (left, top + TITLE_PX))
    for number, line in enumerate(footer):
        pen.text((GAP_PX, GAP_PX + len(rows) * tall + number * LINE_PX), line, INK, _font(14))
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text(pen: ImageDraw.ImageDraw, left: int, top: int, title: str, line: str) -> None:
    pen.text((left, top), title, INK, _font(19))
    pen.text((left, top + 28), line, GREY, _font(12))


def _enlarged(image: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)


def _survivors(image: np.ndarray, side: int, look: Seen, common: Tensor) -> Image.Image:
    """Outline the survivors and dim merged patches. common: bool [N], patches that survive all questions."""
    patches = int(len(common) ** 0.5)
    step, alive = side // patches, look.alive[-1].numpy()
    light = np.where(alive, 1.0, MERGED_LIGHT).astype(np.float32)
    light = light.reshape(patches, patches).repeat(step, 0).repeat(step, 1)[..., None]
    picture = Image.fromarray((np.asarray(_enlarged(image, side)) * light).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for patch in np.flatnonzero(alive).tolist():
        y, x = divmod(patch, patches)
        box = (x * step + 1, y * step + 1, (x + 1) * step - 2, (y + 1) * step - 2)
        pen.rectangle(box, outline=OUTLINE if common[patch] else DIFFERENT, width=2)
    return picture


def _legend(pen: ImageDraw.ImageDraw, left: int, top: int) -> None:
    box = 22
    entries = [
        (1.0, OUTLINE, "survives both questions"),
        (1.0, DIFFERENT, "survives this question only"),
        (MERGED_LIGHT, None, "merged into a survivor"),
    ]
    for light, outline, words in entries:
        fill = tuple((SAMPLE * light).astype(int).tolist())
        pen.rectangle((left, top, left + box, top + box), fill, GREY)
        pen.rectangle((left + 2, top + 2, left + box - 2, top + box - 2), fill, outline, 2)
        pen.text((left + box + 10, top + 3), words, INK, _font(14))
        top += box + 10
