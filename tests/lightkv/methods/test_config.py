import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from lightkv import ConfigError, LightKVConfig, Stage
from lightkv.methods.config import PUBLISHED
from tests.lightkv.tiny import TINY

TARGETS = (0.7, 0.55, 0.4, 0.25, 0.15, 0.1, 0.05)


def schedule(*layers, drop=0.5, **options):
    return LightKVConfig(tuple(Stage(layer, 1, drop) for layer in layers), **options)


@pytest.mark.parametrize(
    ("depth", "layers", "percent"), [(32, (12, 18, 24), 57.4), (28, (12, 17, 22), 62.1), (40, (15, 23, 31), 57.5)]
)
def test_retention_of_the_published_schedules(depth, layers, percent):
    assert round(100 * schedule(*layers).retention(depth), 1) == percent


def test_retention_counts_the_layers_before_between_and_after():
    config = LightKVConfig((Stage(0, 1, 0.5), Stage(2, 1, 0.2)))
    assert config.retention(5) == pytest.approx((1 + 2 * 0.5 + 2 * 0.5 * 0.8) / 5)
    assert LightKVConfig(()).retention(7) == 1.0


@settings(max_examples=200)
@given(depth=st.integers(24, 100), retention=st.floats(0.05, 1.0), stages=st.integers(1, 5))
def test_a_published_schedule_for_any_depth_meets_its_target(depth, retention, stages):
    config = LightKVConfig.for_model(LlamaConfig(num_hidden_layers=depth), retention, stages, "published")
    assert config.retention(depth) == pytest.approx(retention, abs=1e-6)
    assert len(config.stages) == stages
    assert [stage.windows for stage in config.stages] == [2**n for n in reversed(range(stages))]


@pytest.mark.parametrize("retention", [0.25, 0.35, 0.55, 0.7])
@pytest.mark.parametrize("depth", [24, 28, 32, 40, 80])
def test_stages_about_halve_at_usual_targets(depth, retention):
    """A drop of one half loses least to rounding in small windows."""
    stages = LightKVConfig.for_model(LlamaConfig(num_hidden_layers=depth), retention, method="published").stages
    assert all(0.48 <= stage.drop <= 0.5 for stage in stages[:-1])
    assert 0.25 <= stages[-1].drop <= 0.5


def test_less_retention_means_earlier_stages_and_then_larger_drops():
    plans = [LightKVConfig.for_model(LlamaConfig(), r, method="published").stages for r in TARGETS]
    firsts = [stages[0].layer for stages in plans]
    assert firsts == sorted(firsts, reverse=True)
    assert firsts[-1] == 0
    assert plans[-1][0].drop > 0.7


@pytest.mark.parametrize(("depth", "name"), [(32, "llava-1.5-7b"), (40, "llava-1.5-13b")])
def test_the_papers_retention_gives_the_papers_schedule(depth, name):
    published = LightKVConfig.published(name)
    derived = LightKVConfig.for_model(
        LlamaConfig(num_hidden_layers=depth), published.retention(depth), method="published"
    )
    assert derived.stages == published.stages
    assert (derived.budget, published.budget) == ("item", "window")


def test_a_budget_that_cannot_be_met_is_an_error():
    with pytest.raises(ConfigError, match=r"retention 0.05 cannot be met: 3 stages in 5 layers.*at least 0.200"):
        LightKVConfig.for_model(LlamaConfig(num_hidden_layers=5), 0.05, method="published")
    with pytest.raises(ConfigError, match="takes at most 2, after layers 0 to 1"):
        LightKVConfig.for_model(LlamaConfig(num_hidden_layers=3), 0.5, method="published")
    with pytest.raises(ConfigError, match=r"between 0\.05 and 1\.0"):
        LightKVConfig.for_model(LlamaConfig(), 0.01)


def test_stages_come_after_layers_that_need_every_token():
    stages = LightKVConfig.for_model(TINY["qwen3_vl"].config(), 0.5, stages=2, method="published").stages
    assert stages[0].layer >= 1  # vision features are added after layers 0 and 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules_halve_three_times(name):
    config = LightKVConfig.published(name, positions="compact")
    assert [stage.drop for stage in config.stages] == [0.5] * 3
    assert [stage.windows for stage in config.stages] == ([6, 4, 2] if name.startswith("qwen") else [4, 2, 1])
    assert config.positions == "compact"


@settings(max_examples=60)
@given(depth=st.integers(2, 80), retention=st.floats(0.05, 1.0), method=st.sampled_from(["lightkv", "spacetime"]))
def test_lightkv_meets_any_target_at_any_depth(depth, retention, method):
    config = LightKVConfig.for_model(LlamaConfig(num_hidden_layers=depth), retention, method=method)
    assert config.retention(depth) == pytest.approx(retention, abs=1e-6)
    assert [stage.layer for stage in config.stages] == [-1, max(0, round(depth / 3) - 1)]
    assert {stage.windows for stage in config.stages} == {1}


def test_a_model_is_compressed_by_lightkv_unless_the_caller_says_more():
    assert LightKVConfig.for_model(LlamaConfig()) == LightKVConfig.for_model(LlamaConfig(), 0.55, method="lightkv")
    assert LightKVConfig.for_model(LlamaConfig(), method="published").budget == "item"
    assert LightKVConfig.published("llava-1.5-7b").method == LightKVConfig(()).method == "published"


def test_lightkv_starts_later_where_the_embeddings_are_not_all():
    config = LightKVConfig.for_model(TINY["qwen3_vl"].config(), 0.6)
    assert [stage.layer for stage in config.stages] == [1, 2]  # vision features are added after layers 0 and 1
    assert config.retention(5) == pytest.approx(0.6)
    with pytest.raises(ConfigError, match="cannot be met"):
        LightKVConfig.for_model(TINY["qwen3_vl"].config(), 0.1)


def test_lightkv_has_one_stage_or_two():
    with pytest.raises(ConfigError, match="this method has one or two stages, got stages=3"):
        LightKVConfig.for_model(LlamaConfig(), stages=3)
    assert [stage.layer for stage in LightKVConfig.for_model(LlamaConfig(), stages=1).stages] == [-1]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lightkv", {"windows": "spatiotemporal"}, "method='lightkv' does not read windows: omit it"),
        ("lightkv", {"guidance": "uniform"}, "does not read guidance"),
        ("tome", {"rounds": 2}, "method='tome' does not read rounds"),
        ("published", {"seed": 1}, "method='published' does not read seed"),
        ("random", {"budget": "item"}, "does not read budget"),
        ("pitome", {}, "method must be one of"),
        ("lightkv", {"rounds": 0}, "rounds must be a whole number from 1"),
        ("lightkv", {"distance": -0.1}, "distance must be a number of at least 0"),
        ("lightkv", {"distance": float("nan")}, "distance must be a number of at least 0"),
        ("random", {"seed": 0.5}, "seed must be a whole number"),
    ],
)
def test_a_method_takes_its_own_fields_alone(method, options, message):
    with pytest.raises(ConfigError, match=message):
        LightKVConfig((Stage(1),), method=method, **options)


def test_windows_belong_to_the_method_that_has_them():
    with pytest.raises(ConfigError, match=r"method='lightkv' has no windows: leave Stage\.windows at 1"):
        LightKVConfig((Stage(1, 2, 0.5),), method="lightkv")


def test_what_asks_the_layer_before_cannot_run_on_the_embeddings():
    stages = (Stage(-1, 2, 0.5),)
    with pytest.raises(ConfigError, match="guidance='prompt' needs a layer before it"):
        LightKVConfig(stages)
    with pytest.raises(ConfigError, match="method='fastv' needs a layer before it"):
        LightKVConfig((Stage(-1),), method="fastv")
    assert LightKVConfig(stages, guidance="uniform").retention(4) == 0.5
    assert LightKVConfig((Stage(-1), Stage(0)), method="lightkv").retention(4) == 0.3125  # only stage 1 needs scores


def test_a_stage_on_the_embeddings_counts_for_every_layer():
    config = LightKVConfig((Stage(-1, drop=0.5), Stage(1, drop=0.5)), method="lightkv")
    assert config.retention(4) == pytest.approx((2 * 0.5 + 2 * 0.25) / 4)
    with pytest.raises(ConfigError, match=r"on the embeddings is not possible: .*vision features still enter"):
        config.check_depth(4, first_layer=1)


def test_dictionaries_round_trip():
    config = schedule(1, 4, positions="compact", windows="spatiotemporal", window_frames=8, guidance="question")
    assert LightKVConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["stages"][1] == {"layer": 4, "windows": 1, "drop": 0.5}
    ours = LightKVConfig((Stage(-1, drop=0.9),), method="lightkv", rounds=2, distance=0.05)
    assert LightKVConfig.from_dict(ours.to_dict()) == ours


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": [], "retention": 0.5}, r"unknown keys \['retention'\]"),
        ({}, r"missing keys \['stages'\]"),
        ({"stages": [{"layer": 1, "window": 2, "drop": 0.5}]}, r"Stage: unknown keys \['window'\]"),
        ({"stages": [], "positions": "shift"}, r"positions must be one of \['compact', 'keep'\], got 'shift'"),
        ({"stages": [], "guidance": "attention"}, "guidance must be one of"),
        ({"stages": [], "windows": "image"}, "windows must be one of"),
        ({"stages": [], "window_frames": 2}, "needs windows="),
        ({"stages": [[1, 2, 0.5]]}, r"Stage must be a mapping of its fields, got \[1, 2, 0.5\]"),
        ({"stages": [{"layer": "1", "windows": 2, "drop": 0.5}]}, "Stage.layer must be a whole number, got '1'"),
        ({"stages": [{"layer": 1, "windows": 2.0, "drop": 0.5}]}, "Stage.windows must be a whole number"),
        ({"stages": [{"layer": 1, "windows": 2, "drop": "half"}]}, "Stage.drop must be a number"),
    ],
)
def test_unknown_keys_and_values_fail(values, message):
    with pytest.raises(ConfigError, match=message):
        LightKVConfig.from_dict(values)


@pytest.mark.parametrize("stage", [(-2, 1, 0.5), (0, 0, 0.5), (0, 1, 1.0), (0, 1, -0.1)])
def test_a_stage_out_of_range_fails(stage):
    with pytest.raises(ConfigError):
        Stage(*stage)


def test_stages_are_ordered_and_lie_inside_the_decoder():
    with pytest.raises(ConfigError, match="ascending"):
        schedule(3, 1)
    with pytest.raises(ConfigError, match="ascending"):
        schedule(3, 3)
    with pytest.raises(ConfigError, match=r"after layer 7 is not possible: this decoder of 8 layers takes .* -1 to 6"):
        schedule(7).retention(8)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule(1).positions = "compact"


def test_published_names_are_listed():
    with pytest.raises(ConfigError, match=r"llava-1\.5-7b"):
        LightKVConfig.published("gpt-2")
