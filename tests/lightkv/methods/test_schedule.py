"""Tests the two-stage plan of lightkv and spacetime; test_config.py tests the derived published schedules."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightkv import ConfigError
from lightkv.methods.schedule import derive_early, kept_share


@settings(max_examples=200)
@given(depth=st.integers(2, 80), target=st.floats(0.05, 1.0), stages=st.sampled_from([None, 1, 2]))
def test_any_target_is_met_at_any_depth(depth, target, stages):
    plan = derive_early(depth, -1, stages, target)
    assert kept_share(plan, depth) == pytest.approx(target, abs=1e-9)
    assert [layer for layer, _ in plan] == [-1, max(0, round(depth / 3) - 1)][: stages or 2]
    assert all(0 <= drop < 1 for _, drop in plan)
    if len(plan) == 2:
        assert plan[1][1] == pytest.approx(0.2 * (1 - target))


def test_the_plans_of_usual_models():
    first = 1 - 0.25 * 28 / (9 + 19 * 0.85)  # nine of 28 layers precede the second stage, which keeps 0.85
    assert derive_early(28, -1, None, 0.25) == [(-1, pytest.approx(first)), (8, pytest.approx(0.15))]
    first = 1 - 0.55 * 32 / (11 + 21 * 0.91)
    assert derive_early(32, -1, None, 0.55) == [(-1, pytest.approx(first)), (10, pytest.approx(0.09))]
    assert derive_early(6, -1, None, 1.0) == [(-1, 0.0), (1, 0.0)]


@pytest.mark.parametrize("depth", [5, 8, 18])
def test_a_model_that_needs_its_first_layers_whole_starts_after_them(depth):
    plan = derive_early(depth, 2, None, 0.7)
    assert [layer for layer, _ in plan] == [2, max(3, round(depth / 3) - 1)]
    assert kept_share(plan, depth) == pytest.approx(0.7, abs=1e-9)
    with pytest.raises(ConfigError, match=rf"retention 0.05 cannot be met: .* keep at least {3 / depth:.3f}"):
        derive_early(depth, 2, None, 0.05)


def test_one_stage_is_left_where_two_do_not_fit():
    assert derive_early(4, 2, None, 0.9) == [(2, pytest.approx(0.4))]
    with pytest.raises(ConfigError, match="2 stages do not fit a decoder of 4 layers after layer 2"):
        derive_early(4, 2, 2, 0.9)
    with pytest.raises(ConfigError, match="1 stages do not fit a decoder of 3 layers after layer 2"):
        derive_early(3, 2, None, 0.9)


@pytest.mark.parametrize("stages", [0, 3, 16])
def test_other_numbers_of_stages_are_refused(stages):
    with pytest.raises(ConfigError, match=f"this method has one or two stages, got stages={stages}"):
        derive_early(32, -1, stages, 0.5)
