"""Packing sequences into one piece and splitting it again."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightkv.engine.piece import Piece
from tests.lightkv.strategies import generator, layouts


def piece_of(layout, seed):
    count = len(layout)
    draw = generator(seed)
    states = torch.randn(count, 4, generator=draw), torch.rand(count, generator=draw)
    positions, angles = torch.arange(3 * count).view(3, count), (states[0].cos(), states[0].sin())
    return Piece(states[0], layout, states[1], positions, angles, torch.arange(count), (count,))


@settings(max_examples=30)
@given(several=st.lists(layouts(), min_size=1, max_size=4), seed=st.integers(0, 100))
def test_splitting_undoes_packing(several, seed):
    pieces = [piece_of(layout, seed + number) for number, layout in enumerate(several)]
    packed = Piece.packed(pieces)
    assert packed.lengths == tuple(len(layout) for layout in several)
    first = 0
    for one, other in zip(pieces, packed.split(), strict=True):
        for name in ("hidden", "size", "positions", "place", "lengths"):
            same = getattr(one, name), getattr(other, name)
            assert torch.equal(*same) if isinstance(same[0], torch.Tensor) else same[0] == same[1]
        assert all(torch.equal(*tables) for tables in zip(one.angles, other.angles, strict=True))
        item = torch.where(one.layout.mergeable, one.layout.item + first, one.layout.item)
        assert torch.equal(other.layout.item, item)  # numbered across the pieces
        assert torch.equal(packed.layout.grid[first : first + len(one.layout.grid)], one.layout.grid)
        assert torch.equal(torch.stack([one.layout.t, one.layout.y]), torch.stack([other.layout.t, other.layout.y]))
        first += len(one.layout.grid)
