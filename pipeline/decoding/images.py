"""Loads one image of a set: decoded, rotated upright, transparency on white, resized."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from pipeline.decoding.frames import Sizing
from pipeline.decoding.media import Media
from pipeline.errors import UnitError

_MAX_BYTES = 256 << 20
_MAX_PX = 128 << 20  # 384 MB once decoded


def load_image(media: Media, sizing: Sizing) -> np.ndarray:
    """An image as uint8 `[crop_h, crop_w, 3]`. Raises `UnitError`: fetch; decode: TooLarge, NotAnImage, Corrupt."""
    if media.entry.size_bytes > _MAX_BYTES:
        raise UnitError(
            "decode",
            "TooLarge",
            f"expected an image of at most {_MAX_BYTES} bytes, got {media.entry.size_bytes}: {media.uri}",
        )
    data = media.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            image: Image.Image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise UnitError(
            "decode", "TooLarge", f"expected an image of at most {_MAX_PX} pixels, got more: {media.uri}"
        ) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UnitError("decode", "NotAnImage", f"cannot be read as an image: {media.uri}") from error
    width, height = image.size
    if width * height > _MAX_PX:
        raise UnitError("decode", "TooLarge", f"expected at most {_MAX_PX} pixels, got {width} × {height}: {media.uri}")
    try:
        image = _on_white(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        detail = " ".join(str(error).split())
        raise UnitError("decode", "Corrupt", f"the image is damaged ({detail}): {media.uri}") from error
    size = sizing.of(image.height, image.width)
    resized = np.asarray(image.resize((size.resize_w, size.resize_h), Image.Resampling.BICUBIC))
    top, left = (size.resize_h - size.crop_h) // 2, (size.resize_w - size.crop_w) // 2
    return resized[top : top + size.crop_h, left : left + size.crop_w]


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which a conversion to RGB would clip
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
