"""The mini model: a Qwen2.5-VL of 1.6 million parameters, and its export as a Hugging Face folder.

One vision token covers 16×16 px of two frames (patch 8, merge 2, temporal patch 2). `tokens_per_second` is 1 and
`second_per_grid_ts` stays unset, so the time position grows by 1 per frame pair.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pipeline.mini.vocabulary import IM_END, IMAGE_PAD, PAD, VIDEO_PAD, VISION_END, VISION_START, build_tokenizer

PATCH_PX, MERGE, TEMPORAL_PATCH, TOKEN_PX = 8, 2, 2, 16
MIN_SIDE_PX, MAX_SIDE_PX, MAX_FRAMES = 96, 256, 16
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# Qwen2.5-VL's own layout without its default system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(CHAT_TEMPLATE)


def build_config(tok: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Text: width 128, 6 layers, 4 heads over 2 KV heads. Vision: width 64, 4 layers, windows of 64 px."""
    ids = {name: tok.convert_tokens_to_ids(name) for name in (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END)}
    vocab_size = -(-len(tok) // 64) * 64
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3, 2, 3, 3]},
        "pad_token_id": tok.convert_tokens_to_ids(PAD),
        "eos_token_id": tok.convert_tokens_to_ids(IM_END),
        "bos_token_id": None,
    }
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "patch_size": PATCH_PX,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL_PATCH,
        "window_size": 64,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 1,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )


def build_model(tok: PreTrainedTokenizerFast, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised model in float32; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(build_config(tok)).float()


def export(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write `model` in bf16 with tokenizer, chat template and preprocessing values; `model` itself stays float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tok = tokenizer()
    half = Qwen2_5_VLForConditionalGeneration(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config.eos_token_id = tok.eos_token_id
    half.generation_config.pad_token_id = tok.pad_token_id
    half.save_pretrained(folder)
    tok.save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH_PX,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL_PATCH,
        "min_pixels": MIN_SIDE_PX**2,
        "max_pixels": MAX_SIDE_PX**2,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1) + "\n")
