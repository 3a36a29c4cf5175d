import pytest
import torch

from lightkv import LightKVConfig, LightKVError, Stage, UnsupportedCallError, VisionLayout
from lightkv.hooks.prefill import Prefill, rows_for_batch
from lightkv.methods.guidance import QuestionAttention
from tests.lightkv.tiny import scored


def run(positions, layout, drop=0.5):
    """The group after one stage, on hidden states that make every a merge into the next b."""
    length = len(layout)
    prefill = Prefill(LightKVConfig((Stage(0, 1, drop),)), [layout], length, positions)
    prefill.scores = torch.ones(length)
    hidden = torch.eye(length)[torch.arange(length) // 2][None]
    prefill.compress(hidden, prefill.config.stages[0])
    return prefill.groups[-1]


def test_compacted_positions_count_from_zero_without_gaps():
    layout = VisionLayout.grids([(2, 1, 2, 4)], 12)
    group = run(torch.arange(12)[None], layout)
    assert group.origin.tolist() == [[0, 1, 3, 5, 7, 9, 10, 11]]
    assert group.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert group.closed.tolist() == [4]


def test_gaps_that_were_there_before_stay():
    layout = VisionLayout.grids([(0, 1, 1, 4)], 6)
    group = run(torch.tensor([[0, 10, 20, 30, 41, 42]]), layout)
    assert group.origin.tolist() == [[1, 3, 4, 5]]
    assert group.positions.tolist() == [[9, 28, 39, 40]]  # no survivor has the values 0 and 20


def test_axes_of_mrope_share_one_numbering():
    layout = VisionLayout.grids([(1, 2, 1, 2)], 6)
    positions = torch.tensor([[0, 1, 1, 2, 2, 3], [0, 1, 1, 1, 1, 3], [0, 1, 2, 1, 2, 3]])[:, None]
    group = run(positions, layout)
    assert group.origin.tolist() == [[0, 2, 4, 5]]
    assert group.positions[:, 0].T.tolist() == [[0, 0, 0], [1, 1, 2], [2, 1, 2], [3, 3, 3]]  # no value has vanished
    assert group.closed.tolist() == [0]


def test_rows_of_a_batch_close_up_by_themselves():
    """M-RoPE, two rows of different length: each gives the same result as alone, after its padding."""
    layouts = [VisionLayout.grids([(1, 2, 2, 2)], 11), VisionLayout.grids([(0, 1, 2, 2)], 6)]
    positions = torch.randint(0, 60, (3, 2, 11), generator=torch.Generator().manual_seed(0))
    prefill = Prefill(LightKVConfig((Stage(0, 1, 0.5),)), layouts, 11, positions)
    prefill.scores, hidden = torch.ones(17), torch.zeros(2, 11, 6)
    hidden[0], hidden[1, 5:] = torch.eye(6)[torch.arange(11) // 2], torch.eye(6)[torch.arange(6) // 2]
    prefill.compress(hidden, prefill.config.stages[0])
    group = prefill.groups[-1]
    assert group.positions.shape == (3, 2, group.packing.width)
    for row, layout in enumerate(layouts):
        alone = run(positions[:, row : row + 1, 11 - len(layout) :], layout)
        count = group.packing.lengths[row]
        assert torch.equal(group.positions[:, row, -count:], alone.positions[:, 0])
        assert int(group.closed[row]) == int(alone.closed[0]) > 0


def test_one_layout_serves_all_beams_of_its_prompt():
    layouts = [VisionLayout.grids([(0, 1, 1, 2)], 4), VisionLayout.grids([(1, 1, 1, 3)], 4)]
    rows = rows_for_batch(layouts, None, 6, 4)
    assert [row.item.tolist() for row in rows] == [layouts[0].item.tolist()] * 3 + [layouts[1].item.tolist()] * 3


@pytest.mark.parametrize("padded", [True, False])
def test_layouts_may_cover_the_padding_or_not(padded):
    layout = VisionLayout.grids([(3, 1, 1, 2)], 6) if padded else VisionLayout.grids([(1, 1, 1, 2)], 4)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert rows_for_batch([layout], mask, 1, 6)[0].item.tolist() == [-1, 0, 0, -1]


@pytest.mark.parametrize("mask", [[[1, 1, 1, 0]], [[1, 0, 1, 1]], [[0, 0, 0, 0]]])
def test_padding_elsewhere_is_refused(mask):
    with pytest.raises(UnsupportedCallError, match="padding must be on the left"):
        rows_for_batch([VisionLayout.grids([], 4)], torch.tensor(mask), 1, 4)


def test_prepared_masks_are_refused():
    with pytest.raises(UnsupportedCallError, match=r"must be \[batch, length\] = \[1, 4\]"):
        rows_for_batch([VisionLayout.grids([], 4)], torch.ones(1, 1, 4, 4), 1, 4)


def test_a_row_is_scored_without_the_padding_of_its_batch():
    """NaN in the padded queries and keys would appear in every score if padding were read."""
    layouts = [VisionLayout.grids([(1, 1, 2, 2)], 7), VisionLayout.grids([(0, 1, 1, 3)], 4)]
    config = LightKVConfig((Stage(-1, drop=0.0), Stage(0, drop=0.5)), method="lightkv")
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 7, 8, generator=random), torch.randn(2, 2, 7, 8, generator=random)
    q[1, :, :3] = k[1, :, :3] = torch.nan
    prefill = Prefill(config, layouts, 7, None)
    prefill.compress(torch.zeros(2, 7, 2), config.stages[0])
    prefill.score(q, k, 0.35)
    alone = scored(QuestionAttention(), q[1, :, 3:], k[1, :, 3:], layouts[1], 0.35)
    assert torch.equal(prefill.scores[7:], alone)
    assert alone[:3].gt(0).all()
    assert prefill.scores[:7].isfinite().all()


def test_attention_that_bypasses_the_interface_is_an_error():
    prefill = Prefill(LightKVConfig((Stage(0, 1, 0.5),)), [VisionLayout.grids([(0, 1, 2, 2)], 4)], 4, None)
    with pytest.raises(
        LightKVError, match="layer 0 did not run its attention through transformers' AttentionInterface"
    ):
        prefill.compress(torch.zeros(1, 4, 2), prefill.config.stages[0])
