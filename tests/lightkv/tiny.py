"""Makes tiny random models of every family, and inputs like their processors', without downloads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from lightkv.vision.packing import Packing

LAYERS = 5
IMAGE, VIDEO = 90, 91
Pixels = dict[str, Tensor]


def text_config(kind: str, **options: Any) -> Any:
    shape = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=4096,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return getattr(transformers, kind)(**{**shape, **options})


@dataclass(frozen=True)
class Tiny:
    """A family: its model, and its processor's output for image number `n`; images differ in content and size.

    typed         the processor adds mm_token_type_ids
    frames_apart  a word stands between the frames of a video
    """

    config: Callable[[], Any]
    model: str
    image: Callable[[int], tuple[int, Pixels]]
    video: Callable[[int], tuple[int, Pixels]] | None = None
    typed: bool = False
    frames_apart: bool = False


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CLIP = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
SIGLIP = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
ANYRES_SIZES = [(20, 40), (50, 24), (48, 48)]


def llava_config() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=4, **CLIP),
        text_config=text_config("LlamaConfig"),
        image_token_id=IMAGE,
    )


def llava_image(n: int) -> tuple[int, Pixels]:
    return 64, {"pixel_values": random(1, 3, 32, 32, seed=n)}


def anyres_config(kind: str, **options: Any) -> Any:
    return getattr(transformers, kind)(
        vision_config=transformers.CLIPVisionConfig(image_size=24, patch_size=4, **CLIP),
        text_config=text_config("LlamaConfig"),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        **options,
    )


def anyres_image(n: int) -> tuple[int, Pixels]:
    """Sizes 20×40, 50×24 and 48×48 px on views of 24 px, 6×6 patches each: unpadded grids 6×12, 12×6, 12×12."""
    tokens = [36 + 6 * 13, 36 + 12 * 7, 36 + 12 * 13][n % 3]
    tiles = [3, 3, 5][n % 3]
    size = torch.tensor([ANYRES_SIZES[n % 3]])
    return tokens, {"pixel_values": random(1, tiles, 3, 24, 24, seed=n), "image_sizes": size}


def onevision_config() -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(image_size=24, patch_size=4, **SIGLIP),
        text_config=text_config("Qwen2Config"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_2",
    )


def onevision_image(n: int) -> tuple[int, Pixels]:
    """As anyres_image; the 12×12 grid is more than two base views and shrinks to 8×8."""
    tokens, pixels = anyres_image(n)
    return [tokens, tokens, 36 + 8 * 9][n % 3], pixels


def internvl_config() -> Any:
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=[32, 32],
            patch_size=[4, 4],
        ),
        text_config=text_config("Qwen2Config"),
        image_token_id=IMAGE,
    )  # fmt: skip


def internvl_image(n: int) -> tuple[int, Pixels]:
    tiles = 1 + n % 3
    return 16 * tiles, {"pixel_values": random(tiles, 3, 32, 32, seed=n)}


def folded_config(kind: str, vision: str) -> Any:
    return getattr(transformers, kind)(
        vision_config=getattr(transformers, vision)(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
        ),
        text_config=text_config("LlamaConfig"),
        image_token_id=IMAGE,
        scale_factor=2,
    )


def folded_image(n: int) -> tuple[int, Pixels]:
    return 32, {"pixel_values": random(1, 2, 3, 32, 32, seed=n)}


def qwen_vision(kind: str, **options: Any) -> Any:
    return getattr(transformers, kind)(
        depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3, **options
    )


def qwen_text(kind: str, **options: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1], **options.pop("rope", {})}
    return text_config(kind, rope_parameters=rope, **options)


def qwen2_vl_config() -> Any:
    return transformers.Qwen2VLConfig(
        vision_config=qwen_vision("Qwen2VLVisionConfig", embed_dim=16, hidden_size=32),
        text_config=qwen_text("Qwen2VLTextConfig"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def qwen2_5_vl_config() -> Any:
    return transformers.Qwen2_5_VLConfig(
        vision_config=qwen_vision(
            "Qwen2_5_VLVisionConfig", hidden_size=16, intermediate_size=16, out_hidden_size=32, window_size=16,
            fullatt_block_indexes=[1], tokens_per_second=1,
        ),
        text_config=qwen_text("Qwen2_5_VLTextConfig"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )  # fmt: skip


def qwen3_vl_config() -> Any:
    return transformers.Qwen3VLConfig(
        vision_config=qwen_vision(
            "Qwen3VLVisionConfig", hidden_size=16, intermediate_size=16, out_hidden_size=32,
            deepstack_visual_indexes=[0, 1], num_position_embeddings=64,
        ),
        text_config=qwen_text("Qwen3VLTextConfig", head_dim=8, rope={"mrope_interleaved": True}),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )  # fmt: skip


def qwen_image(n: int) -> tuple[int, Pixels]:
    h, w = [(12, 16), (8, 12), (16, 8)][n % 3]
    return h * w // 4, {"pixel_values": random(h * w, 96, seed=n), "image_grid_thw": torch.tensor([[1, h, w]])}


def qwen_video(n: int) -> tuple[int, Pixels]:
    t, h, w = 3 + n % 2, 8, 12
    return t * h * w // 4, {
        "pixel_values_videos": random(t * h * w, 96, seed=n),
        "video_grid_thw": torch.tensor([[t, h, w]]),
    }


def pooled_video(n: int) -> tuple[int, Pixels]:
    return 4 * 9, {"pixel_values_videos": random(1, 4, 3, 24, 24, seed=n)}


def halved_video(n: int) -> tuple[int, Pixels]:
    return 4 * 9 + 1, {"pixel_values_videos": random(1, 4, 3, 24, 24, seed=n)}


TINY: dict[str, Tiny] = {
    "llava": Tiny(llava_config, "LlavaForConditionalGeneration", llava_image),
    "llava_next": Tiny(lambda: anyres_config("LlavaNextConfig"), "LlavaNextForConditionalGeneration", anyres_image),
    "llava_next_video": Tiny(
        lambda: anyres_config("LlavaNextVideoConfig", video_token_id=VIDEO),
        "LlavaNextVideoForConditionalGeneration",
        anyres_image,
        pooled_video,
    ),
    "llava_onevision": Tiny(onevision_config, "LlavaOnevisionForConditionalGeneration", onevision_image, halved_video),
    "internvl": Tiny(internvl_config, "InternVLForConditionalGeneration", internvl_image),
    "idefics3": Tiny(
        lambda: folded_config("Idefics3Config", "Idefics3VisionConfig"),
        "Idefics3ForConditionalGeneration",
        folded_image,
    ),
    "smolvlm": Tiny(
        lambda: folded_config("SmolVLMConfig", "SmolVLMVisionConfig"), "SmolVLMForConditionalGeneration", folded_image
    ),
    "qwen2_vl": Tiny(qwen2_vl_config, "Qwen2VLForConditionalGeneration", qwen_image, qwen_video, typed=True),
    "qwen2_5_vl": Tiny(qwen2_5_vl_config, "Qwen2_5_VLForConditionalGeneration", qwen_image, qwen_video, typed=True),
    "qwen3_vl": Tiny(
        qwen3_vl_config, "Qwen3VLForConditionalGeneration", qwen_image, qwen_video, typed=True, frames_apart=True
    ),
}


@cache
def tiny_model(family: str) -> Any:
    """The family's model in fp32 with fixed random weights; all tests share it and must not change it."""
    torch.manual_seed(0)
    model = getattr(transformers, TINY[family].model)(TINY[family].config()).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tiny_sample(family: str, *images: int, question: Sequence[int] = (11, 12, 13), video: int | None = None) -> Pixels:
    """One prompt: two words, each image followed by a word, the question. `video` adds video number `video`."""
    tiny = TINY[family]
    ids, pixels = [7, 8], []
    for n in images:
        tokens, found = tiny.image(n)
        ids += [IMAGE] * tokens + [20 + n]
        pixels.append(found)
    if video is not None:
        assert tiny.video is not None
        tokens, found = tiny.video(video)
        frames = int(found["video_grid_thw"][0, 0]) if tiny.frames_apart else 1
        ids += ([VIDEO] * (tokens // frames) + [30]) * frames
        pixels.append(found)
    sample = {"input_ids": torch.tensor([[*ids, *question]])}
    sample["attention_mask"] = torch.ones_like(sample["input_ids"])
    if family in ("idefics3", "smolvlm") and pixels:  # one row of tiles per prompt
        return {**sample, "pixel_values": torch.cat([found["pixel_values"] for found in pixels], dim=1)}
    return typed(family, {**sample, **merged(pixels)})


def tiny_batch(family: str, samples: Sequence[Pixels], pad: int = 0) -> Pixels:
    """Samples padded left to the longest (+ `pad`), their images one after the other."""
    length = max(sample["input_ids"].shape[1] for sample in samples) + pad
    batch: Pixels = {}
    for name in ("input_ids", "attention_mask"):
        rows = [torch.nn.functional.pad(sample[name], (length - sample[name].shape[1], 0)) for sample in samples]
        batch[name] = torch.cat(rows)
    rest = [{k: v for k, v in sample.items() if k not in batch and k != "mm_token_type_ids"} for sample in samples]
    return typed(family, {**batch, **merged(rest)})


def typed(family: str, inputs: Pixels) -> Pixels:
    if TINY[family].typed:
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    return inputs


def merged(parts: Sequence[Pixels]) -> Pixels:
    """Joins tensors of the same name along their first axis; tiles are padded with zeros to the largest number."""
    out: Pixels = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        tensors = [part[name] for part in parts if name in part]
        if tensors[0].ndim == 5 and name == "pixel_values":
            most = max(tensor.shape[1] for tensor in tensors)
            tensors = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, most - x.shape[1])) for x in tensors]
        out[name] = torch.cat(tensors)
    return out


def scored(scorer, q, k, layout, scale):
    """The scores of a scorer for one sequence: q [Hq, S, d], k [Hkv, S, d]."""
    return scorer(q[None], k[None], layout, Packing((len(layout),), len(layout), q.device), scale)
