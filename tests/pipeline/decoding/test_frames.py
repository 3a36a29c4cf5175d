"""Tests of frame choice and sizes, with arbitrary timestamps and shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Frames
from pipeline.decoding.frames import Sizing, choose_frames, target_times

gaps_ms = st.lists(st.integers(1, 5_000), min_size=1, max_size=200)


@st.composite
def videos(draw):
    """Ascending timestamps of a video with a variable frame rate and any start."""
    return (draw(st.integers(0, 10_000)) + np.cumsum(draw(gaps_ms))) / 1000.0


@st.composite
def rules(draw):
    low = draw(st.integers(1, 20))
    return Frames(
        strategy=draw(st.sampled_from(["fps", "uniform"])),
        fps=draw(st.floats(0.05, 60)),
        count=draw(st.integers(1, 50)),
        min_frames=low,
        max_frames=draw(st.integers(low, 60)),
    )


window = st.tuples(st.none() | st.floats(0, 300), st.none() | st.floats(0, 300))


@settings(deadline=None)
@given(videos(), window, rules())
def test_frames_are_ascending_and_inside_the_window(times, bounds, frames):
    start, end = bounds
    picks = choose_frames(times, start, end, frames)
    inside = [t for t in times if (start is None or t >= start) and (end is None or t < end)]
    assert picks.dtype == np.int64
    assert np.all(np.diff(picks) > 0)
    assert set(times[picks]) <= set(inside)
    assert (len(picks) == 0) == (not inside)


@settings(deadline=None)
@given(videos(), rules())
def test_counts_keep_to_floor_and_cap(times, frames):
    picks = choose_frames(times, None, None, frames)
    if frames.strategy == "uniform":
        assert len(picks) == min(frames.count, len(times))
        return
    assert min(frames.min_frames, len(times)) <= len(picks) <= frames.max_frames
    if (times[-1] - times[0]) * frames.fps >= frames.max_frames:
        assert len(picks) == min(frames.max_frames, len(times))


@settings(deadline=None)
@given(videos(), rules())
def test_no_stretch_of_time_is_left_out(times, frames):
    """For every target the frame on display is chosen, or a neighbour where the count was filled up."""
    picks = choose_frames(times, None, None, frames)
    targets = target_times(times[0], times[-1], frames)
    shown = np.unique(np.searchsorted(times, targets + 1e-3, side="right") - 1)
    if len(shown) == len(targets):
        assert picks.tolist() == shown.tolist()
    else:
        assert set(shown) <= set(picks) or len(picks) in (len(targets), frames.min_frames, len(times))


def test_one_frame_per_second_of_a_steady_video():
    times = np.arange(240) / 24
    assert choose_frames(times, None, None, Frames(fps=1)).tolist() == list(range(0, 240, 24))
    assert choose_frames(times, 3.0, 6.0, Frames(fps=1)).tolist() == [72, 96, 120]


def test_timestamps_rounded_to_milliseconds_choose_the_same_frames():
    exact = np.arange(300) / 30
    rule = Frames(fps=3)
    assert (
        choose_frames(exact, None, None, rule).tolist() == choose_frames(np.round(exact, 3), None, None, rule).tolist()
    )


def test_the_cap_spreads_frames_over_the_whole_video():
    picks = choose_frames(np.arange(3600) / 1.0, None, None, Frames(fps=1, max_frames=5))
    assert picks.tolist() == [0, 899, 1799, 2699, 3599]


def test_the_floor_holds_for_a_short_video():
    assert len(choose_frames(np.arange(24) / 24, None, None, Frames(fps=1, min_frames=4))) == 4
    assert choose_frames(np.array([0.0]), None, None, Frames(min_frames=4)).tolist() == [0]


def test_a_still_of_ten_seconds_is_taken_once():
    times = np.concatenate([np.arange(10) / 10, 11 + np.arange(10) / 10])
    assert choose_frames(times, None, None, Frames(fps=1)).tolist() == [0, 9, 10]


def test_clips_share_no_frame():
    times = np.arange(100) / 7
    every = Frames(strategy="uniform", count=1000)
    parts = [choose_frames(times, a, a + 2.5, every) for a in np.arange(0, 15, 2.5)]
    assert np.concatenate(parts).tolist() == list(range(100))


def test_one_uniform_frame_is_the_middle_one():
    rule = Frames(strategy="uniform", count=1)
    assert choose_frames(np.arange(101) / 10, None, None, rule).tolist() == [50]


@pytest.mark.parametrize("times", [[0.0, 0.0], [1.0, 0.5], [[0.0], [1.0]]])
def test_unsorted_timestamps_are_refused(times):
    with pytest.raises(ValueError, match="strictly ascending"):
        choose_frames(np.array(times), None, None, Frames())


sides = st.integers(1, 5000)


@settings(deadline=None)
@given(sides, sides, st.sampled_from([1, 14, 16, 28, 32]), st.integers(1, 20), st.integers(1, 50))
def test_sizes_keep_multiples_and_limits(height, width, multiple, low, room):
    sizing = Sizing(multiple, low * multiple**2, (low + room) * multiple**2)
    size = sizing.of(height, width)
    assert size.resize_h % multiple == size.resize_w % multiple == 0
    assert 0 < size.resize_h * size.resize_w <= sizing.max_px
    assert (size.crop_h, size.crop_w) == (size.resize_h, size.resize_w)


@settings(deadline=None)
@given(st.integers(100, 4000), st.integers(100, 4000))
def test_shapes_are_kept_as_far_as_multiples_allow(height, width):
    size = Sizing(28, 56 * 56, 28 * 28 * 1280).of(height, width)
    assert size.resize_h * size.resize_w >= 56 * 56
    if max(height, width) <= 4 * min(height, width):
        assert abs(np.log((size.resize_h / size.resize_w) / (height / width))) < 28 / min(size[:2]) * 1.5


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((480, 854), (336, 644)),
        ((1080, 1920), (336, 644)),
        ((56, 56), (56, 56)),
        ((30, 40), (56, 84)),
        ((2160, 3840), (336, 644)),
        ((333, 777), (308, 728)),
    ],
)
def test_sizes_are_those_of_the_stock_rule_of_qwen(shape, expected):
    """Expected: transformers' `smart_resize(height, width, 28, 56 * 56, 28 * 28 * 300)`."""
    assert Sizing(28, 56 * 56, 28 * 28 * 300).of(*shape)[:2] == expected


@settings(deadline=None)
@given(sides, sides, st.integers(1, 500))
def test_a_square_crop_fits_into_the_resized_frame(height, width, side):
    size = Sizing.square(side).of(height, width)
    assert min(size.resize_h, size.resize_w) == side
    assert (size.crop_h, size.crop_w) == (side, side)


def test_limits_without_room_for_a_patch_are_refused():
    for bad in ((28, 1, 27 * 28), (16, 5000, 4000), (0, 1, 10)):
        with pytest.raises(ValueError, match=r"raise frames\.max_px"):
            Sizing(*bad)
