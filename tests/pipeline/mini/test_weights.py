import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from pipeline.mini import weights_path
from pipeline.mini.answer import answer, image_inputs, video_inputs
from pipeline.mini.coded import coded_exact_match, sampled_frames
from pipeline.mini.model import build_config, tokenizer
from pipeline.mini.render import picture
from pipeline.mini.world import DemoStyle, demo_scene, render_demo


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(weights_path(), dtype=torch.float32, use_safetensors=True).eval()


@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(weights_path())


def test_the_folder_holds_safetensors_in_bf16_and_no_pickles(model):
    names = {path.name for path in weights_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "README.md"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl", ".py")) for name in names)
    stored = load_file(weights_path() / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(torch.isfinite(tensor.float()).all() for tensor in stored.values())
    assert sum(tensor.numel() for tensor in stored.values()) == sum(param.numel() for param in model.parameters())


def test_tokenizer_and_architecture_are_those_of_the_code(model, words):
    assert words.get_vocab() == tokenizer().get_vocab()
    expected = build_config(tokenizer())
    assert model.config.text_config.hidden_size == expected.text_config.hidden_size
    assert model.config.vision_config.hidden_size == expected.vision_config.hidden_size
    assert model.generation_config.eos_token_id == words.eos_token_id
    preprocessing = json.loads((weights_path() / "preprocessor_config.json").read_text())
    assert preprocessing["patch_size"] == model.config.vision_config.patch_size
    assert preprocessing["merge_size"] == model.config.vision_config.spatial_merge_size


def test_it_sees_what_h264_demo_videos_show(model, words):
    scores = coded_exact_match(model, words, 8, 3, DemoStyle(), ("shape", "count"))
    right, asked = (sum(column) for column in zip(*scores.values(), strict=True))
    assert right / asked >= 0.6  # chance is near 0.2


def test_the_same_video_and_question_give_the_same_text(model, words, tmp_path):
    render_demo(tmp_path, 1)
    inputs = video_inputs(sampled_frames(tmp_path / "clip-000.mp4"))
    first, second = (answer(model, words, inputs, "Describe the video.") for _ in range(2))
    assert first == second
    assert first.endswith(".")


def test_images_of_a_set_each_have_their_place(model, words):
    images = [picture(demo_scene(index, 0)[0]) for index in range(3)]
    inputs = image_inputs(images)
    assert inputs["image_grid_thw"].tolist() == [[1, 12, 12]] * 3
    assert answer(model, words, inputs, "how many images are there?") != ""


def test_frames_that_do_not_fit_the_grid_are_refused():
    good = picture(demo_scene(0, 0)[0])
    with pytest.raises(ValueError, match="multiples of 16"):
        image_inputs([good[:90]])
    with pytest.raises(ValueError, match="uint8 frames"):
        video_inputs(good[None].astype("float32"))


def test_an_odd_last_frame_is_repeated():
    frame = picture(demo_scene(0, 0)[0])
    inputs = video_inputs(frame[None])
    assert inputs["video_grid_thw"].tolist() == [[1, 12, 12]]
    assert torch.equal(inputs["pixel_values_videos"], image_inputs([frame])["pixel_values"])
