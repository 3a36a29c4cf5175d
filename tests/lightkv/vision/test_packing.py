import torch
from hypothesis import given
from hypothesis import strategies as st

from lightkv import LightKVConfig, Stage, Tokens, VisionLayout
from lightkv.methods.table import METHODS
from lightkv.vision.packing import Packing
from tests.lightkv.strategies import generator, layouts

CPU = torch.device("cpu")


def test_packed_tokens_lie_where_their_rows_end():
    packing = Packing((2, 3, 1), 4, CPU)
    batch = torch.arange(12).view(3, 4)
    assert packing.pads == [2, 1, 3]
    assert packing.row.tolist() == [0, 0, 1, 1, 1, 2]
    assert packing.pack(batch).tolist() == [2, 3, 5, 6, 7, 11]
    assert packing.pad(packing.pack(batch), -1).tolist() == [[-1, -1, 2, 3], [-1, 5, 6, 7], [-1, -1, -1, 11]]


def test_what_is_kept_is_packed_to_the_longest_row_that_is_left():
    packing = Packing((2, 3, 1), 4, CPU)
    left = packing.after(torch.tensor([0, 3, 4, 5]))
    assert (left.lengths, left.width) == ((1, 2, 1), 2)


def test_a_batch_without_padding_is_not_copied():
    batch = torch.zeros(2, 3, 5)
    packing = Packing((3, 3), 3, CPU)
    assert packing.pack(batch).data_ptr() == batch.data_ptr()
    assert packing.pad(packing.pack(batch)).data_ptr() == batch.data_ptr()


def test_items_of_packed_layouts_are_numbered_through():
    one = VisionLayout.grids([(1, 1, 1, 2), (4, 1, 2, 1)], 6)
    packed = VisionLayout.packed([one, VisionLayout.grids([], 2), one])
    assert packed.item.tolist() == [-1, 0, 0, -1, 1, 1, -1, -1, -1, 2, 2, -1, 3, 3]
    assert packed.grid.tolist() == [[1, 1, 2], [1, 2, 1]] * 2


@given(
    several=st.lists(layouts(), min_size=1, max_size=3),
    name=st.sampled_from([name for name in METHODS if name != "evs"]),
    drop=st.sampled_from([0.3, 0.75]),
    seed=st.integers(0, 10**6),
)
def test_sequences_do_not_see_each_other(several, name, drop, seed):
    """A sequence keeps and merges the same tokens whether it is packed with others or alone."""
    random = generator(seed)
    stage = Stage(0, drop=drop)
    config = LightKVConfig((stage,), method=name)
    lengths = tuple(len(layout) for layout in several)
    hidden = torch.randn(sum(lengths), 6, generator=random)
    size = torch.randint(1, 4, (sum(lengths),), generator=random).float()
    score = torch.rand(sum(lengths), generator=random)
    compress = METHODS[name].compress
    together = compress(Tokens(hidden, VisionLayout.packed(several), size, score, lengths), stage, config)
    start = 0
    for layout, length in zip(several, lengths, strict=True):
        span = slice(start, start + length)
        alone = compress(Tokens(hidden[span], layout, size[span], score[span]), stage, config)
        here = (together.kept >= start) & (together.kept < start + length)
        assert torch.equal(together.kept[here] - start, alone.kept)
        assert torch.equal(together.size[here], alone.size)
        target = together.target[span]
        assert torch.equal(torch.where(target < 0, -1, target - start), alone.target)
        torch.testing.assert_close(together.hidden[here], alone.hidden)
        start += length
