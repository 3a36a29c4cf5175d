"""Positions against the models' own, rotations against transformers'."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lightkv import ConfigError, Vision
from lightkv.engine.layers import Layers
from lightkv.engine.positions import Positions, turned, unturned
from tests.lightkv.tiny import IMAGE, VIDEO, tiny_model

TEXT = 5


def vision(t, h, w, **options):
    return Vision(torch.zeros(t * h * w, 1), (t, h, w), **options)


@st.composite
def prompts(draw):
    """Texts of n tokens, and images and videos (t, h, w) with seconds per step, each after a text."""
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        parts.append(draw(st.integers(1, 4)))
        t, seconds = draw(st.sampled_from([(1, None), (2, 1.0), (5, 0.3), (9, 2.5), (3, 0.04)]))
        parts.append(((t, draw(st.integers(1, 4)), draw(st.integers(1, 4))), seconds))
    return [*parts, draw(st.integers(1, 4))]


def by_the_model(model, prompt, timed):
    """Positions [3, S] from get_rope_index."""
    ids, images, videos = [], [], []
    for part in prompt:
        if isinstance(part, int):
            ids += [TEXT] * part
            continue
        (t, h, w), seconds = part
        ids += [IMAGE if seconds is None else VIDEO] * (t * h * w)
        (images if seconds is None else videos).append([t, 2 * h, 2 * w])
    ids = torch.tensor([ids])
    types = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    seconds = [part[1] for part in prompt if not isinstance(part, int) and part[1] is not None]
    options = {"second_per_grid_ts": torch.tensor(seconds)} if timed else {}
    grids = {"image_grid_thw": torch.tensor(images), "video_grid_thw": torch.tensor(videos)}
    grids = {name: grid for name, grid in grids.items() if len(grid)}
    return model.model.get_rope_index(ids, types, **grids, **options)[0][:, 0]


def streamed(config, prompt, timed, most):
    """The same from Positions, items in parts of at most `most` tokens."""
    positions, places = Positions(config), []
    for part in prompt:
        if isinstance(part, int):
            places.append(positions.text(part))
        else:
            interval = {"interval_s": part[1]} if timed else {}
            places += [positions.vision(one) for one in vision(*part[0], **interval).split(most)]
    return torch.cat(places, 1)


@given(prompt=prompts(), per_second=st.sampled_from([1, 2, 25]), most=st.sampled_from([1, 7, 20, 1000]))
def test_qwen2_5_vl_positions_follow_time_as_the_models_own_do(prompt, per_second, most):
    model = tiny_model("qwen2_5_vl")
    with patch.object(model.config.vision_config, "tokens_per_second", per_second):
        expected = by_the_model(model, prompt, timed=True)
        found = streamed(model.config, prompt, True, most)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@given(prompt=prompts(), most=st.sampled_from([1, 7, 1000]))
def test_without_time_every_step_is_one_position(family, prompt, most):
    model = tiny_model(family)  # one position per second; the model assumes one second per step
    found = streamed(model.config, prompt, False, most)
    assert torch.equal(found, by_the_model(model, prompt, timed=False))


@given(prompt=prompts(), most=st.sampled_from([1, 7, 1000]))
def test_ordinary_rope_counts_tokens(prompt, most):
    found = streamed(tiny_model("llava").config, prompt, True, most)
    assert torch.equal(found, torch.arange(found.shape[1])[None])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("most", [6, 1000])
def test_a_repeated_step_keeps_the_place_of_its_first_and_what_follows_keeps_its_own(family, most):
    """Steps 0 1 1 1 2 3 3, of which 0 1 2 3 were encoded."""
    whole, fewer = (Positions(tiny_model(family).config) for _ in range(2))
    for positions in (whole, fewer):
        positions.text(3)
    everywhere = whole.vision(vision(7, 2, 3)).unflatten(1, (7, 6))
    parts = vision(4, 2, 3, counts=(1, 3, 1, 2)).split(most)
    found = torch.cat([fewer.vision(part) for part in parts], 1).unflatten(1, (4, 6))
    assert torch.equal(found, everywhere[:, [0, 1, 4, 5]])
    assert torch.equal(fewer.text(2), whole.text(2))


def test_text_positions_with_taken_false_stay_free():
    positions = Positions(tiny_model("qwen2_5_vl").config)
    positions.text(4)
    looked_at = positions.text(3, taken=False)
    assert torch.equal(positions.text(3), looked_at)
    assert torch.equal(positions.text(1), torch.tensor([[7]] * 3))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_later_part_follows_one_of_its_item(family):
    config = tiny_model(family).config
    for before in ("nothing", "text", "another frame"):
        positions = Positions(config)
        if before != "nothing":
            positions.vision(vision(2, 2, 3) if before == "text" else vision(2, 3, 2))
        if before == "text":
            positions.text(1)
        with pytest.raises(ConfigError, match="right after one of the same item"):
            positions.vision(vision(1, 2, 3, first=2))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_turning_is_transformers_and_unturning_its_inverse(family):
    layers = Layers(tiny_model(family))
    draw = torch.Generator().manual_seed(0)
    axes = 1 if family == "llava" else 3
    cos, sin = layers.angles(torch.randint(0, 500, (axes, 9), generator=draw))
    q, k = torch.randn(2, 1, 4, 9, 8, generator=draw)
    for states, expected in zip((q, k), apply_rotary_pos_emb(q, k, cos[None], sin[None]), strict=True):
        assert torch.equal(turned(states, (cos, sin)), expected)
        torch.testing.assert_close(unturned(turned(states, (cos, sin)), (cos, sin)), states)
        torch.testing.assert_close(turned(unturned(states, (cos, sin)), (cos, sin)), states)


def test_scaled_angles_are_undone_too():
    angle = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    angles = 1.3 * angle.cos(), 1.3 * angle.sin()  # as in YaRN
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(unturned(turned(states, angles), angles), states)
