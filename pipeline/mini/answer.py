"""Answers questions with plain transformers: greedy `generate` over frames that are patchified as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from pipeline.mini.batched import patchify
from pipeline.mini.model import TEMPORAL_PATCH, TOKEN_PX
from pipeline.mini.vocabulary import IMAGE_PAD, VIDEO_PAD


def video_inputs(frames: np.ndarray) -> dict[str, Tensor]:
    """Frames uint8 [T, H, W, 3] to `pixel_values_videos` and `video_grid_thw`; an odd last frame is repeated."""
    _check_frames(frames)
    if len(frames) % TEMPORAL_PATCH:
        frames = np.concatenate([frames, frames[-1:]])
    pairs = torch.from_numpy(frames).unflatten(0, (-1, TEMPORAL_PATCH))
    grid = [len(pairs), 2 * frames.shape[1] // TOKEN_PX, 2 * frames.shape[2] // TOKEN_PX]
    return {"pixel_values_videos": patchify(pairs).flatten(0, 2), "video_grid_thw": torch.tensor([grid])}


def image_inputs(images: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Images uint8 [H, W, 3] to `pixel_values` and `image_grid_thw`."""
    patches, grids = [], []
    for image in images:
        _check_frames(image[None])
        patches.append(
            patchify(torch.from_numpy(image)[None, None].expand(1, TEMPORAL_PATCH, -1, -1, -1)).flatten(0, 2)
        )
        grids.append([1, 2 * image.shape[0] // TOKEN_PX, 2 * image.shape[1] // TOKEN_PX])
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"expected uint8 frames [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if frames.shape[1] % TOKEN_PX or frames.shape[2] % TOKEN_PX:
        raise ValueError(
            f"expected height and width in multiples of {TOKEN_PX} px, got {frames.shape[1]}×{frames.shape[2]}; "
            "resize the frames first"
        )


def answer(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    inputs: dict[str, Tensor],
    question: str,
    max_new_tokens: int = 96,
) -> str:
    """The greedy answer to one question about the `inputs` of `video_inputs` or `image_inputs`."""
    kind, pad = ("video", VIDEO_PAD) if "video_grid_thw" in inputs else ("image", IMAGE_PAD)
    grids = inputs[f"{kind}_grid_thw"]
    content = [*({"type": kind} for _ in grids), {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pieces = text.split(pad)
    counts = (grids.prod(-1) // 4).tolist()
    text = pieces[0] + "".join(pad * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
    ids = torch.tensor([tokenizer.encode(text)])
    types = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=types,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **inputs,
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
