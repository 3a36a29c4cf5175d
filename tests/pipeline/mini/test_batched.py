import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.mini import weights_path
from pipeline.mini.batched import Grid, forward, logits, patchify, prefix_layout
from pipeline.mini.model import build_model, tokenizer


def test_patches_equal_those_of_the_stock_image_processor():
    processor = Qwen2VLImageProcessorPil.from_pretrained(weights_path())
    rng = np.random.default_rng(0)
    for height, width in ((96, 128), (112, 160), (192, 192)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        stock = processor(images=[image], return_tensors="pt")
        frames = torch.from_numpy(image)[None, None].expand(1, 2, -1, -1, -1)
        ours = patchify(frames).flatten(0, 2)
        assert stock["image_grid_thw"].tolist() == [[1, height // 8, width // 8]]
        torch.testing.assert_close(ours, stock["pixel_values"], atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def model():
    """A model with weights large enough for attention to matter."""
    model = build_model(tokenizer(), 1).eval().requires_grad_(False)
    for param in model.parameters():
        param.mul_(3)
    return model


def stock_logits(model, frames, grid, slot):
    """transformers' own logits [len(slot), V] for one scene, frames [times, 2, H, W, 3], and one slot's token ids."""
    pad = model.config.video_token_id if grid.kind == "video" else model.config.image_token_id
    ids = torch.cat([prefix_layout(grid, pad)[0], slot])[None]
    vision = ("pixel_values_videos", "video_grid_thw") if grid.kind == "video" else ("pixel_values", "image_grid_thw")
    size = [2 * grid.rows, 2 * grid.columns]
    items = [[grid.times, *size]] if grid.kind == "video" else [[1, *size]] * grid.times
    out = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == pad).int() * (2 if grid.kind == "video" else 1),
        **dict(zip(vision, (patchify(frames).flatten(0, 2), torch.tensor(items)), strict=True)),
    )
    return out.logits[0, -len(slot) :]


@pytest.mark.parametrize(
    "grid", [Grid("image", 1, 6, 8), Grid("video", 3, 7, 6), Grid("video", 2, 9, 10), Grid("set", 3, 6, 7)], ids=str
)
def test_training_forward_equals_transformers_for_every_slot(model, grid):
    generator = torch.Generator().manual_seed(0)
    shape = (2, grid.times, 2, 16 * grid.rows, 16 * grid.columns, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if grid.kind != "video":
        frames[:, :, 1] = frames[:, :, 0]
    lengths = (7, 4)
    slots = [torch.randint(20, 400, (length,), generator=generator) for length in lengths]
    padding = 3
    ids = torch.cat([*slots, torch.zeros(padding, dtype=torch.long)]).repeat(2, 1)
    offset = torch.tensor([*range(lengths[0]), *range(lengths[1]), *[0] * padding]).repeat(2, 1)
    slot_of = torch.tensor([0] * lengths[0] + [1] * lengths[1] + [-1] * padding).repeat(2, 1)

    tail = logits(model, forward(model, frames, grid, ids, offset, slot_of).tail)

    for scene in range(2):
        start = 0
        for slot in slots:
            expected = stock_logits(model, frames[scene], grid, slot)
            torch.testing.assert_close(tail[scene, start : start + len(slot)], expected, atol=1e-3, rtol=1e-3)
            start += len(slot)
