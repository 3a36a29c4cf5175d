import pytest
import torch

from lightkv import ConfigError, Text, Vision
from tests.lightkv.tiny import random


def video(t=5, h=2, w=3, **options):
    return Vision(random(t * h * w, 4, seed=0), (t, h, w), **options)


@pytest.mark.parametrize("options", [{}, {"counts": (1, 3, 2, 1, 4)}, {"first": 7}, {"first": 2, "interval_s": 0.5}])
@pytest.mark.parametrize("most", [1, 6, 13, 18, 1000])
def test_parts_hold_the_same_tokens_steps_and_sizes_in_as_few_pieces_as_fit(most, options):
    whole = video(**options)
    parts = whole.split(most)
    for name in ("features", "steps", "sizes", "repeats"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert sum(part.stands_for for part in parts) == whole.stands_for
    assert {(part.grid[1:], part.interval_s) for part in parts} == {((2, 3), whole.interval_s)}
    steps = max(1, most // 6)
    assert [part.grid[0] for part in parts] == [min(steps, 5 - begin) for begin in range(0, 5, steps)]
    assert [part.first for part in parts] == whole.steps[::steps].tolist()


def test_counts_give_each_steps_number_and_its_tokens_sizes():
    whole = video(3, 1, 2, first=4, counts=(2, 1, 3))
    assert whole.steps.tolist() == [4, 6, 7]
    assert whole.sizes.tolist() == [2, 2, 1, 1, 3, 3]
    assert (len(whole), whole.stands_for) == (6, 12)
    plain = video(3, 1, 2, first=4)
    assert plain.steps.tolist() == [4, 5, 6]
    assert plain.sizes.tolist() == [1] * 6
    assert plain.stands_for == 6


def test_an_image_is_never_cut():
    (image,) = video(1, 4, 4).split(3)
    assert len(image) == 16


@pytest.mark.parametrize(("length", "most", "expected"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 9, [2]), (0, 3, [])])
def test_text_is_cut_anywhere(length, most, expected):
    parts = Text(torch.arange(length)).split(most)
    assert [len(part) for part in parts] == expected
    assert [token for part in parts for token in part.ids.tolist()] == list(range(length))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(grid=(2, 2, 3)), "features for the t·h·w tokens"),
        (dict(grid=(0, 2, 3)), "features for the t·h·w tokens"),
        (dict(grid=(1, 2, 3), first=-1), "first ≥ 0"),
        (dict(grid=(1, 2, 3), counts=(1, 1)), "for each of 1 steps"),
        (dict(grid=(1, 2, 3), counts=(0,)), "a count of at least 1"),
    ],
)
def test_what_does_not_fit_its_grid_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Vision(torch.zeros(6, 4), **options)
