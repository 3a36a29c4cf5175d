"""Methods: their configurations, the frames they keep, and errors for unreachable retentions."""

import json
import math

import numpy as np
import pytest

from jobs.measure.evaluate.config import EvaluateConfig, Suite
from jobs.measure.evaluate.methods import PRESETS, shrink, smaller_grid, thin, treatment
from lightkv import ConfigError as Unreachable
from lightkv.methods.baselines import BASELINES, baseline
from pipeline.captioning.models import describe
from pipeline.config import Model
from pipeline.errors import ConfigError

VIDEO = Suite(kind="video", frames=16, scenes=2, families=("caption",))
IMAGE = Suite(kind="image", scenes=2, families=("caption",))


@pytest.fixture(scope="module")
def model_config():
    return describe(Model()).config


def _config(**methods):
    suite = {"kind": "image", "scenes": 2, "families": ["caption"]}
    return EvaluateConfig.model_validate_json(
        json.dumps({"suites": {"s": suite}, "methods": methods, "retentions": [0.5, 0.1]})
    )


@pytest.mark.parametrize(
    ("rows", "columns", "retention", "grid"),
    [
        (6, 6, 0.55, (4, 5)),  # 20 of 36; as near as 5 × 4
        (6, 6, 0.4, (4, 4)),  # 16 for 14.4: 3 × 5 would change the shape by more than half
        (6, 6, 0.25, (3, 3)),
        (6, 6, 0.1, (2, 2)),
        (12, 12, 0.55, (8, 10)),  # 80 for 79.2
        (6, 12, 0.5, (4, 9)),  # 36, and nearer to the shape than 6 × 6
        (12, 6, 0.25, (6, 3)),
    ],
)
def test_smaller_grid_has_the_nearest_number_of_tokens(rows, columns, retention, grid):
    assert smaller_grid(rows, columns, retention) == grid


def test_smaller_grid_is_the_nearest_of_all_of_about_that_shape():
    for retention in np.linspace(0.05, 0.95, 19):
        rows, columns = smaller_grid(9, 11, retention)
        found = abs(rows * columns - retention * 99)
        others = [r * c for r in range(1, 10) for c in range(1, 12) if 2 / 3 <= (r / c) / (9 / 11) <= 1.5]
        assert found == min(abs(tokens - retention * 99) for tokens in others)


def test_frames_shrink_by_averaging_areas():
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
    small = shrink(frames, 16, 16)
    areas = frames.reshape(3, 16, 2, 16, 3, 3).mean((2, 4))
    assert small.shape == (3, 16, 16, 3)
    assert np.abs(small - areas).max() <= 1


def test_thinned_frames_are_spread_from_the_first_to_the_last():
    assert thin(np.arange(16), 4).tolist() == [0, 5, 10, 15]
    assert thin(np.arange(16), 16).tolist() == list(range(16))


def test_presets_are_the_methods_of_lightkv_with_their_options(model_config):
    config = _config(
        ours={"preset": "lightkv", "options": {"rounds": 2}, "at": {"0.1": {"rounds": 5}}},
        theirs={"preset": "published", "options": {"guidance": "uniform"}},
    )
    ours = [treatment(config, "ours", IMAGE, retention, model_config) for retention in (0.5, 0.1)]
    assert [(how.config.method, how.config.rounds, how.frames) for how in ours] == [
        ("lightkv", 2, None),
        ("lightkv", 5, None),
    ]
    theirs = treatment(config, "theirs", IMAGE, 0.5, model_config).config
    assert (theirs.method, theirs.guidance) == ("published", "uniform")
    assert set(BASELINES) < set(PRESETS)
    for name in BASELINES:
        how = treatment(_config(it={"preset": name}), "it", VIDEO, 0.5, model_config)
        assert how.config == baseline(name, model_config, 0.5)


def test_frames_give_the_share_of_tokens_that_is_asked(model_config):
    config = _config(small={"preset": "downsample"}, few={"preset": "fewer_frames"})
    frames = np.zeros((16, 96, 96, 3), np.uint8)
    small = treatment(config, "small", VIDEO, 0.5, model_config)
    assert small.config is None
    assert small.frames(frames).shape == (16, 64, 64, 3)
    assert treatment(config, "few", VIDEO, 0.5, model_config).frames(frames).shape == (8, 96, 96, 3)
    assert treatment(config, "few", VIDEO, 0.1, model_config).frames(frames).shape == (2, 96, 96, 3)


@pytest.mark.parametrize(
    ("preset", "suite", "retention", "why"),
    [
        ("published", IMAGE, 0.1, "keep at least"),
        ("fewer_frames", IMAGE, 0.5, "a video only"),
        ("fewer_frames", VIDEO.model_copy(update={"frames": 4}), 0.1, "2 frame pairs come no closer to 10% than 50%"),
    ],
)
def test_what_cannot_be_reached_says_why(model_config, preset, suite, retention, why):
    with pytest.raises(Unreachable, match=why):
        treatment(_config(it={"preset": preset}), "it", suite, retention, model_config)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"preset": "magic"}, "methods.it.preset: expected one of lightkv, spacetime, asked, published"),
        ({"preset": "lightkv", "options": {"speed": 3}}, "methods.it.options: .*'speed'"),
        ({"preset": "downsample", "options": {"speed": 3}}, "methods.it.options: .*'speed'"),
    ],
)
def test_a_method_configured_wrong_is_refused_by_name(model_config, method, message):
    with pytest.raises(ConfigError, match=message):
        treatment(_config(it=method), "it", IMAGE, 0.5, model_config)


def test_few_bits_buy_tokens_for_the_same_bytes(model_config):
    config, suite = _config(engine={"preset": "engine", "options": {"bits": 4}}), IMAGE
    few = treatment(config, "engine", suite, 0.10, model_config)
    assert few.bits == 5.0  # 4, and a scale and a zero of 16 bits each for 32 numbers
    assert few.memory.bits.bits == 4
    assert few.config.retention(6) == pytest.approx(0.32)
    whole = treatment(config, "engine", suite, 0.40, model_config)
    assert (whole.config, whole.memory.bits.bits) == (None, 4)  # all tokens take 31 %


def test_folded_layers_all_keep_what_was_asked_for(model_config):
    options = {"method": "spacetime", "fold": True}
    folded = treatment(_config(engine={"preset": "engine", "options": options}), "engine", IMAGE, 0.25, model_config)
    assert folded.memory.fold
    assert math.prod(1 - stage.drop for stage in folded.config.stages) == pytest.approx(0.25, abs=1e-6)
