"""The table of model families: which tokens are vision tokens and how they lie in their grids.

A family is one row of FAMILIES. Everything else (hooks, positions, masks) is the same for all families. A decoder-only
model, or a family that is not in the table, needs `layouts=` in the call of `compress`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightkv.errors import UnsupportedCallError, UnsupportedModelError
from lightkv.vision.geometry import Item, place_items
from lightkv.vision.items import (
    Inputs,
    Items,
    anyres_images,
    anyres_shrunk_images,
    folded_tiles,
    halved_videos,
    llava_images,
    merged_grids,
    pooled_videos,
    shuffled_tiles,
)
from lightkv.vision.layout import VisionLayout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EMBEDDINGS = -1  # `layer` of a stage on the embeddings


@dataclass(frozen=True)
class Placeholders:
    """Placeholder tokens of one kind and, in order, the images or videos of a batch that fill them.

    token  config field with the token's id
    items  (model config, inputs of generate or forward) → one Item per image or video
    needs  inputs that `items` reads; the error names those that are missing
    """

    token: str
    items: Items
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One architecture: `model_type` of its config, its placeholders, and the first layer that a stage may follow."""

    model_type: str
    placeholders: tuple[Placeholders, ...]
    first_layer: Callable[["PreTrainedConfig"], int] = lambda config: EMBEDDINGS

    def layouts(self, config: "PreTrainedConfig", input_ids: Tensor, inputs: Inputs) -> list[VisionLayout]:
        """One VisionLayout per row of input_ids [B, S], padding included as text.

        Raises UnsupportedCallError if the inputs do not determine the places of the vision tokens.
        """
        ids = input_ids.cpu()
        pending: list[tuple[str, int, list[Item]]] = []
        for kind in self.placeholders:
            token = getattr(config, kind.token)
            present = bool((ids == token).any())
            missing = [name for name in kind.needs if inputs.get(name) is None]
            if present and missing:
                raise UnsupportedCallError(
                    f"the prompt has tokens of {kind.token} but {missing} was not given; "
                    "pass all outputs of the processor, or pass the places of vision tokens as layouts="
                )
            pending.append((kind.token, token, list(kind.items(config, inputs)) if present else []))
        rows = []
        for row in ids:
            found = [(name, (row == token).nonzero().flatten(), items) for name, token, items in pending]
            rows.append(place_items(len(row), found))
        left = {name: len(items) for name, _, items in pending if items}
        if left:
            raise UnsupportedCallError(
                f"the inputs hold more images or videos than the prompts have tokens for: {left}"
            )
        return rows


def family_of(model_config: "PreTrainedConfig") -> Family:
    """The row of the table for this model. Raises UnsupportedModelError, which lists the families, if there is none."""
    family = FAMILIES.get(model_config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model_type {model_config.model_type!r} is not in the table of families {sorted(FAMILIES)}; "
            "pass layouts= (one VisionLayout per prompt) to compress another model"
        )
    return family


def first_stage_layer(model_config: "PreTrainedConfig") -> int:
    """The first decoder layer that a stage may follow; EMBEDDINGS (-1) if it may come before all layers.

    Models that are not in the table are assumed to take vision features through the embeddings only.
    """
    family = FAMILIES.get(model_config.model_type)
    return family.first_layer(model_config) if family else EMBEDDINGS


def check_attention(decoder: Any) -> None:
    """Raises UnsupportedModelError unless all layers have a `self_attn` with full attention."""
    layers = getattr(decoder, "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise UnsupportedModelError(f"{type(decoder).__name__} has no decoder layers with self_attn")
    kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedModelError(f"all layers must use full attention, this decoder has {sorted(kinds)}")
    if getattr(decoder.config, "sliding_window", None) and getattr(decoder.config, "use_sliding_window", True):
        raise UnsupportedModelError("sliding-window attention is not supported")


def _last_deepstack_layer(config: "PreTrainedConfig") -> int:
    """The last layer after which Qwen3-VL adds vision features at full length: no stage may come before that."""
    return len(config.vision_config.deepstack_visual_indexes) - 1


QWEN_VL = (
    Placeholders("image_token_id", merged_grids("image_grid_thw"), ("image_grid_thw",)),
    Placeholders("video_token_id", merged_grids("video_grid_thw"), ("video_grid_thw",)),
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llava", (Placeholders("image_token_id", llava_images, ("pixel_values",)),)),
        Family("llava_next", (Placeholders("image_token_id", anyres_images, ("image_sizes",)),)),
        Family(
            "llava_next_video",
            (
                Placeholders("image_token_id", anyres_images, ("image_sizes",)),
                Placeholders("video_token_id", pooled_videos, ("pixel_values_videos",)),
            ),
        ),
        Family(
            "llava_onevision",
            (
                Placeholders("image_token_id", anyres_shrunk_images, ("image_sizes",)),
                Placeholders("video_token_id", halved_videos, ("pixel_values_videos",)),
            ),
        ),
        Family("internvl", (Placeholders("image_token_id", shuffled_tiles, ("pixel_values",)),)),
        Family("idefics3", (Placeholders("image_token_id", folded_tiles, ("pixel_values",)),)),
        Family("smolvlm", (Placeholders("image_token_id", folded_tiles, ("pixel_values",)),)),
        Family("qwen2_vl", QWEN_VL),
        Family("qwen2_5_vl", QWEN_VL),
        Family("qwen3_vl", QWEN_VL, first_layer=_last_deepstack_layer),
    )
}
