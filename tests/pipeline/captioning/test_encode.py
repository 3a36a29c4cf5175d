"""Encoded frames equal those of the families' own image processors and of one pass over the whole video."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from pipeline.captioning.encode import ENCODERS, _rechunk, encoder_for
from pipeline.captioning.models import describe, load_model
from pipeline.config import Frames, Model
from pipeline.errors import ConfigError
from tests.models import save_tiny_llava


@pytest.fixture(scope="module")
def qwen():
    settings = Model(name="mini")
    card = describe(settings)
    return encoder_for(card.config, card.preprocessor), load_model(card, settings), card


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    settings = Model(name="tiny", path=str(save_tiny_llava(tmp_path_factory.mktemp("llava"))))
    card = describe(settings)
    return encoder_for(card.config, card.preprocessor), load_model(card, settings), card


def _encoded(encoder, model, kind, items):
    """Grids and features per item of a unit; parts of a video are concatenated."""
    grids, features = [], []
    with torch.no_grad():
        for part in encoder.parts(model, kind, items):
            if part.first == 0:
                grids.append(part.grid)
                features.append(part.features)
            else:
                grids[-1] = (grids[-1][0] + part.grid[0], *part.grid[1:])
                features[-1] = torch.cat([features[-1], part.features])
    return SimpleNamespace(grids=grids, features=features)


def _frames(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def test_qwen_patches_equal_the_stock_image_processor(qwen):
    encoder, _, card = qwen
    frame = _frames(1, 96, 128)
    stock = transformers.AutoImageProcessor.from_pretrained(card.location, backend="pil")
    expected = stock(Image.fromarray(frame[0]), return_tensors="pt")
    patches, grid = encoder.patchify(encoder.pixels(np.repeat(frame, 2, axis=0), torch.device("cpu")))
    assert grid == tuple(expected["image_grid_thw"][0].tolist())
    torch.testing.assert_close(patches, expected["pixel_values"], atol=1e-5, rtol=0)


def test_llava_pixels_equal_the_stock_image_processor(llava):
    encoder, _, card = llava
    frame = _frames(1, 32, 32)
    stock = transformers.AutoImageProcessor.from_pretrained(card.location, backend="pil")
    expected = stock(Image.fromarray(frame[0]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder.pixels(frame, torch.device("cpu")), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 3, 4, 7])
def test_video_in_batches_gives_the_tokens_of_the_whole_video(qwen, batch):
    encoder, model, _ = qwen
    frames = _frames(7, 96, 96)
    with torch.no_grad():
        whole = _encoded(encoder, model, "video", [(0, frames)])
        parts = _encoded(encoder, model, "video", [(0, frames[i : i + batch]) for i in range(0, 7, batch)])
    assert whole.grids == parts.grids == [(4, 6, 6)]
    assert whole.grids[0] == encoder.grid(7, 96, 96)
    torch.testing.assert_close(parts.features[0], whole.features[0], atol=1e-4, rtol=1e-4)


def test_image_set_keeps_its_order_and_sizes(qwen):
    encoder, model, _ = qwen
    first, second = _frames(1, 96, 96, 1), _frames(1, 64, 160, 2)
    with torch.no_grad():
        both = _encoded(encoder, model, "images", [(0, first), (1, second)])
        swapped = _encoded(encoder, model, "images", [(0, second), (1, first)])
    assert both.grids == [(1, 6, 6), (1, 4, 10)]
    torch.testing.assert_close(both.features[0], swapped.features[1])
    torch.testing.assert_close(both.features[1], swapped.features[0])


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_images_of_a_set_go_through_the_tower_together(family, request, monkeypatch):
    encoder, model, _ = request.getfixturevalue(family)
    name = "get_video_features" if family == "qwen" else "get_image_features"
    tower, calls = getattr(model, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        return tower(*args, **kwargs)

    monkeypatch.setattr(model, name, counted)
    sides = (
        [(32, 32)] * 7 if family == "llava" else [(96, 96), (64, 160), (96, 96), (64, 64), (96, 64), (64, 64), (96, 96)]
    )
    images = [(number, _frames(1, *side, number)) for number, side in enumerate(sides)]
    late = [one for image in images for one in (None, image)]
    found = {}
    with torch.no_grad():
        for together in (1, 3, 16):
            monkeypatch.setattr(encoder, "images_together", together)
            calls.clear()
            found[together] = [part for part in encoder.parts(model, "images", late) if part is not None]
            assert len(calls) == -(-len(images) // together)
    for together in (3, 16):
        assert [part.grid for part in found[together]] == [part.grid for part in found[1]]
        for part, alone in zip(found[together], found[1], strict=True):
            torch.testing.assert_close(part.features, alone.features, atol=1e-4, rtol=1e-4)


def test_llava_takes_every_frame_as_an_image(llava):
    encoder, model, _ = llava
    with torch.no_grad():
        encoded = _encoded(encoder, model, "video", [(0, _frames(2, 32, 32)), (0, _frames(1, 32, 32, 5))])
    assert encoder.modality("video") == "image"
    assert encoded.grids == [(1, 4, 4)] * 3
    assert [f.shape for f in encoded.features] == [(16, 48)] * 3


def test_rechunked_frames_are_the_same_frames_with_the_last_repeated():
    batches = [(0, np.full((n, 1), n)) for n in (1, 1, 3, 2)]
    chunks = [frames for _, frames in _rechunk(iter(batches), 2)]
    assert all(len(chunk) % 2 == 0 for chunk in chunks)
    assert np.concatenate(chunks)[:, 0].tolist() == [1, 1, 3, 3, 3, 2, 2, 2]


def test_what_is_not_there_yet_is_passed_on_between_the_frames():
    batches = [None, (0, np.ones((1, 1))), None, None, (0, np.ones((1, 1))), None]
    assert [chunk is None for chunk in _rechunk(iter(batches), 2)] == [True, True, True, False, True]


def test_sizing_stays_within_what_model_and_configuration_allow(qwen):
    encoder, _, card = qwen
    sizing = encoder.sizing(Frames(max_px=128 * 128))
    assert (sizing.multiple, sizing.max_px) == (16, 128 * 128)
    assert sizing.min_px == card.preprocessor["min_pixels"]


def test_sizes_that_no_frame_can_have_are_refused(qwen):
    encoder, _, _ = qwen
    with pytest.raises(ConfigError, match="no size fits both"):
        encoder.sizing(Frames(min_px=100, max_px=200))


def test_family_without_an_encoder_is_refused_with_the_list():
    with pytest.raises(ConfigError, match=", ".join(ENCODERS)):
        encoder_for(transformers.Idefics3Config(), {})


def test_steps_that_repeat_the_one_before_are_counted_instead_of_encoded(qwen):
    encoder, model, _ = qwen
    rng = np.random.default_rng(0)
    first, other = (rng.integers(0, 256, (96, 96, 3), np.uint8) for _ in range(2))
    noisy = np.clip(first.astype(np.int16) + rng.integers(-2, 3, first.shape), 0, 255).astype(np.uint8)
    frames = np.stack([first, first, noisy, first, first, noisy, other, other, first, first])
    encoder.repeat_tolerance = 2.0
    try:
        (part,) = encoder.parts(model, "video", [(0, frames)])
    finally:
        encoder.repeat_tolerance = None
    (whole,) = encoder.parts(model, "video", [(0, frames)])
    assert (part.grid, part.counts, part.stands_for) == ((3, 6, 6), (3, 1, 1), 180)
    assert part.steps.tolist() == [0, 3, 4]
    assert torch.equal(
        part.features, whole.features[torch.tensor([0, 3, 4])[:, None] * 36 + torch.arange(36)].flatten(0, 1)
    )


def test_one_patch_that_changes_makes_another_step(qwen):
    encoder, model, _ = qwen
    frames = np.zeros((4, 96, 96, 3), np.uint8)
    frames[2:, 16:32, 80:96] = 40
    encoder.repeat_tolerance = 2.0
    try:
        (part,) = encoder.parts(model, "video", [(0, frames)])
    finally:
        encoder.repeat_tolerance = None
    assert part.counts == (1, 1)
