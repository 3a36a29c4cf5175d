"""Many prompts in one batch: each gets the same answer as alone, and its share of the cost."""

import numpy as np
import pytest

from jobs.measure.evaluate.asking import Asker, Question
from lightkv import LightKVConfig, estimate
from pipeline.config import Model, load_config
from tests.models import save_tiny_llava

PROMPTS = [
    "describe the video .",
    "how many objects are there ?",
    "is there a red circle ?",
    "what shape is the green object in the video ?",
    "what color is the star ?",
]


def _asker(batch_prompts=8, batch_tokens=16384, **settings):
    return Asker(Model(dtype="float32", max_new_tokens=12, **settings), batch_prompts, batch_tokens)


@pytest.fixture(scope="module")
def together():
    return _asker(batch_prompts=5)


@pytest.fixture(scope="module")
def alone():
    return _asker(batch_prompts=1)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return {"name": "tiny", "path": str(save_tiny_llava(tmp_path_factory.mktemp("llava")))}


def _video(asker, seed, *, frames=8, side=96, interval_s=None):
    noise = np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), np.uint8)
    encoded = asker.encode("video", [(0, noise)])
    encoded.frame_interval_s = interval_s
    return encoded


def _images(asker, seed, sides=(96, 128)):
    rng = np.random.default_rng(seed)
    return asker.encode("images", [(i, rng.integers(0, 256, (1, s, s, 3), np.uint8)) for i, s in enumerate(sides)])


def _config(asker, retention):
    return None if retention is None else LightKVConfig.for_model(asker.card.config, retention=retention)


def _texts(asker, questions, retention):
    return [(a.text, a.output_tokens, a.truncated) for a in asker.answers(questions, _config(asker, retention))]


@pytest.mark.parametrize("retention", [None, 0.4])
@pytest.mark.parametrize("encode", [_video, _images])
def test_prompts_of_a_batch_are_answered_as_alone(together, alone, encode, retention):
    encoded = encode(together, 0)
    questions = [Question(encoded, prompt) for prompt in PROMPTS]
    assert _texts(together, questions, retention) == _texts(alone, questions, retention)


@pytest.mark.parametrize("retention", [None, 0.4])
def test_a_batch_over_videos_of_other_sizes_paces_and_contents_does_not_mix_them(together, alone, retention):
    shapes = [{}, {"frames": 3}, {"side": 128}, {"interval_s": 0.5}, {"interval_s": 2.0}]
    questions = [
        Question(_video(together, seed, **shape), prompt)
        for seed, (shape, prompt) in enumerate(zip(shapes, PROMPTS, strict=True))
    ]
    assert _texts(together, questions, retention) == _texts(alone, questions, retention)


@pytest.mark.parametrize("retention", [None, 0.5])
def test_llava_prompts_of_a_batch_are_answered_as_alone(llava, retention):
    together, alone = _asker(batch_prompts=4, **llava), _asker(batch_prompts=1, **llava)
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    encoded = together.encode("video", [(0, frames)])
    prompts = ["describe the video .", "what is this ?", "blue square moving in a red circle .", "what ?"]
    questions = [Question(encoded, prompt) for prompt in prompts]
    assert _texts(together, questions, retention) == _texts(alone, questions, retention)


def test_neighbours_share_a_batch_up_to_prompts_tokens_and_modality(monkeypatch):
    asker = _asker(batch_prompts=3, batch_tokens=400)
    sizes = []
    batch = asker._batch
    monkeypatch.setattr(asker, "_batch", lambda rows, config: sizes.append(len(rows)) or batch(rows, config))
    small, large, image = _video(asker, 0, frames=2), _video(asker, 1, frames=24), _images(asker, 2, (96,))
    order = [small, small, small, small, large, large, small, image]
    answers = asker.answers([Question(encoded, "describe .") for encoded in order], None)
    assert sizes == [3, 1, 1, 1, 1, 1]
    assert [answer.vision_tokens for answer in answers] == [36, 36, 36, 36, 432, 432, 36, 36]


def test_kv_bytes_of_a_batch_are_shared_out_padding_included(together):
    encoded = _video(together, 0)
    answers = together.answers([Question(encoded, p) for p in PROMPTS], _config(together, 0.4))
    longest = max(answer.prompt_tokens for answer in answers)
    assert len({answer.prompt_tokens for answer in answers}) > 1
    padded = estimate(together.card.config, vision_tokens=0, text_tokens=longest, config=None, dtype_bytes=4).kv_bytes
    assert {answer.kv_bytes_uncompressed for answer in answers} == {padded}
    assert {answer.kv_bytes for answer in answers} < set(range(padded // 3, padded // 2 + 1))
    plain = together.answers([Question(encoded, p) for p in PROMPTS], None)
    assert {(answer.kv_bytes, answer.kv_bytes_uncompressed) for answer in plain} == {(padded, padded)}


def test_what_is_sampled_depends_on_the_seed_and_not_on_the_neighbours():
    sampler = _asker(batch_prompts=8, temperature=1.5)
    encoded = _video(sampler, 0)
    questions = [Question(encoded, "describe the video .", seed) for seed in range(4)]
    first = [answer.text for answer in sampler.answers(questions, None)]
    assert [answer.text for answer in sampler.answers(questions[::-1], None)][::-1] == first
    assert len(set(first)) > 1


def test_no_question_no_answer(together):
    assert together.answers([], None) == []


def test_how_prompts_are_batched_does_not_make_another_run():
    """A job continues with other batch sizes; another answer limit is another configuration."""
    job = ["source.uri=/videos", "sink.uri=/out"]
    hashes = [
        load_config(None, [*job, *more]).hash()
        for more in ([], ["engine.answers=1", "engine.cache_bytes=64"], ["model.max_new_tokens=3"])
    ]
    assert hashes[0] == hashes[1] != hashes[2]
