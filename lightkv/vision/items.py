"""Computes the items of each architecture: (model config, inputs) → one Item per image or video.

The inputs are the outputs of the processor. Counting and unpadding follow the model code of transformers and call its
helpers if there are any, so that a token's place here is the place that its feature came from.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from lightkv.vision.geometry import Item, block, fixed, joined, rows_with_ends

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Inputs = Mapping[str, Any]
Items = Callable[["PreTrainedConfig", Inputs], list[Item]]

TOWERS_WITH_CLASS_TOKEN = {"clip_vision_model"}


def merged_grids(field: str) -> Items:
    """Qwen-VL: `field` holds (t, h, w) in patches; spatial_merge_size × spatial_merge_size patches make one token."""

    def items(config: "PreTrainedConfig", inputs: Inputs) -> list[Item]:
        merge = config.vision_config.spatial_merge_size
        return [block(t, h // merge, w // merge) for t, h, w in inputs[field].tolist()]

    return items


def llava_images(config: "PreTrainedConfig", inputs: Inputs) -> list[Item]:
    """LLaVA-1.5: one grid of patches per image; with Pixtral's tower each image has its own size."""
    sizes = inputs.get("image_sizes")
    if sizes is None:
        pixels = inputs["pixel_values"]
        sizes = [pixels.shape[-2:]] * len(pixels)
    patch = config.vision_config.patch_size
    return [joined([_class_token(config), block(1, int(h) // patch, int(w) // patch)]) for h, w in sizes]


def anyres_images(config: "PreTrainedConfig", inputs: Inputs) -> list[Item]:
    """LLaVA-NeXT: the whole image at base resolution, then the tiles as one unpadded grid with row ends."""
    return [
        joined([_base(config), rows_with_ends(*_unpadded(config, size))]) for size in inputs["image_sizes"].tolist()
    ]


def anyres_shrunk_images(config: "PreTrainedConfig", inputs: Inputs) -> list[Item]:
    """LLaVA-OneVision: as LLaVA-NeXT, but a tiled grid larger than N base images is resized to that many tokens.

    N comes from vision_aspect_ratio "anyres_max_N". In a sample of several images each has only its base view.
    """
    most = int((inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio).removeprefix("anyres_max_"))
    sizes = inputs["image_sizes"].tolist()
    alone = inputs.get("batch_num_images")
    tiled = [True] * len(sizes) if alone is None else [int(n) == 1 for n in alone for _ in range(int(n))]
    items = []
    for size, has_tiles in zip(sizes, tiled, strict=True):
        if not has_tiles:
            items.append(joined([_base(config), fixed()]))
            continue
        h, w = _unpadded(config, size)
        ratio = math.sqrt(h * w / (most * _side(config) ** 2))
        if ratio > 1.1:
            h, w = int(h // ratio), int(w // ratio)
        items.append(joined([_base(config), rows_with_ends(h, w)]))
    return items


def pooled_videos(config: "PreTrainedConfig", inputs: Inputs) -> list[Item]:
    """LLaVA-NeXT-Video: every frame's grid pooled by spatial_pool_stride."""
    videos, frames = inputs["pixel_values_videos"].shape[:2]
    side = _side(config) // config.spatial_pool_stride
    return [block(frames, side, side)] * videos


def halved_videos(config: "PreTrainedConfig", inputs: Inputs) -> list[Item]:
    """LLaVA-OneVision: every frame's grid halved per side, rounded up; one separator after the last frame."""
    videos, frames = inputs["pixel_values_videos"].shape[:2]
    side = math.ceil(_side(config) / 2)
    return [joined([block(frames, side, side), fixed()])] * videos


def shuffled_tiles(config: "PreTrainedConfig", inputs: Inputs) -> list[Item]:
    """InternVL: one grid per tile, each side times downsample_ratio. Video frames are tiles too."""
    pixels = inputs["pixel_values"]
    patch_h, patch_w = config.vision_config.patch_size
    h, w = pixels.shape[-2] // patch_h, pixels.shape[-1] // patch_w
    return [block(1, int(h * config.downsample_ratio), int(w * config.downsample_ratio))] * len(pixels)


def folded_tiles(config: "PreTrainedConfig", inputs: Inputs) -> list[Item]:
    """Idefics3, SmolVLM: one grid per tile, each side divided by scale_factor; all-zero tiles are padding."""
    pixels = inputs["pixel_values"]
    real = int((pixels != 0).flatten(2).any(dim=-1).sum())
    side = config.vision_config.patch_size * config.scale_factor
    return [block(1, pixels.shape[-2] // side, pixels.shape[-1] // side)] * max(real, 1)


def _side(config: "PreTrainedConfig") -> int:
    """Patches per side of one view."""
    return config.vision_config.image_size // config.vision_config.patch_size


def _class_token(config: "PreTrainedConfig") -> Item:
    """The tower's class token if the model keeps it, else an item without tokens."""
    kept = config.vision_feature_select_strategy == "full"
    return fixed(int(kept and config.vision_config.model_type in TOWERS_WITH_CLASS_TOKEN))


def _base(config: "PreTrainedConfig") -> Item:
    return block(1, _side(config), _side(config))


def _unpadded(config: "PreTrainedConfig", size: list[int]) -> tuple[int, int]:
    """Token grid (h, w) of an image of `size` (height, width) px cut into tiles, without its padding."""
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    canvas = torch.empty(1, rows * _side(config), columns * _side(config), device="meta")
    h, w = unpad_image(canvas, size).shape[1:]
    return h, w
