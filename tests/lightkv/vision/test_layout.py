import pytest
import torch

from lightkv import ConfigError, VisionLayout
from lightkv.vision.layout import FIXED, TEXT


def test_spans_become_row_major_coordinates():
    layout = VisionLayout.grids([(1, 2, 1, 2), (6, 1, 2, 1)], 9)
    assert layout.item.tolist() == [TEXT, 0, 0, 0, 0, TEXT, 1, 1, TEXT]
    assert layout.t.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert layout.y.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert layout.x.tolist() == [0, 0, 1, 0, 1, 0, 0, 0, 0]
    assert layout.grid.tolist() == [[2, 1, 2], [1, 2, 1]]
    assert layout.is_text.tolist() == [True, False, False, False, False, True, False, False, True]


def test_a_taken_layout_keeps_the_extent_of_its_grids():
    layout = VisionLayout.grids([(0, 1, 3, 3)], 9).take(torch.tensor([0, 4]))
    assert layout.y.tolist() == [0, 1]
    assert layout.grid.tolist() == [[1, 3, 3]]


def test_released_grids_are_squares_of_side_ceil_sqrt():
    layout = VisionLayout.released([(1, 2, 2, 3), (14, 1, 3, 3)], 24)  # 12 tokens: side 4; 9 tokens: side 3
    assert layout.grid.tolist() == [[1, 4, 4], [1, 3, 3]]
    assert layout.y[1:13].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert layout.t.tolist() == [0] * 24


def test_re_gridding_counts_only_the_tokens_that_are_left():
    layout = VisionLayout.released([(0, 1, 4, 4)], 16).take(torch.arange(5, 12)).squared()  # 7 tokens: side 3
    assert layout.y.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert layout.x.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_coordinates_in_any_order_make_a_layout():
    item = torch.tensor([1, TEXT, 0, FIXED, 1])
    zero = torch.zeros(5, dtype=torch.int64)
    layout = VisionLayout.from_coordinates(item, zero, torch.tensor([2, 9, 0, 9, 0]), zero)
    assert layout.grid.tolist() == [[1, 1, 1], [1, 3, 1]]
    assert layout.is_vision.tolist() == [True, False, True, True, True]
    assert layout.mergeable.tolist() == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 1, 2, 2), (3, 1, 1, 2)], "overlaps"),
        ([(7, 1, 2, 2)], "does not fit a sequence of 10 tokens"),
        ([(0, 1, 0, 2)], "does not fit"),
    ],
)
def test_spans_that_cannot_be_are_errors(spans, message):
    with pytest.raises(ConfigError, match=message):
        VisionLayout.grids(spans, 10)


def test_columns_must_agree():
    zero = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ConfigError, match="int64"):
        VisionLayout(zero, zero, zero, zero.float(), torch.zeros(0, 3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="outside the grids"):
        VisionLayout.from_coordinates(zero, zero, zero + 4, zero, torch.tensor([[1, 2, 2]]))
