"""Tests what every method returns besides the hidden states: places and columns of the survivors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightkv import LightKVConfig, Stage, Tokens, UnsupportedCallError, VisionLayout, compress_tokens
from lightkv.methods.table import METHODS
from tests.lightkv.strategies import generator, layouts


def same_layout(one: VisionLayout, other: VisionLayout) -> None:
    assert torch.equal(one.columns, other.columns)
    assert torch.equal(one.grid, other.grid)


@given(
    several=st.lists(layouts(), min_size=1, max_size=3),
    name=st.sampled_from(list(METHODS)),
    drop=st.sampled_from([0.0, 0.3, 0.5, 0.75]),
    axes=st.sampled_from([None, 0, 1, 3]),
    seed=st.integers(0, 10**6),
)
def test_survivors_bring_their_places_and_what_goes_along(several, name, drop, axes, seed):
    random, lengths = generator(seed), tuple(len(layout) for layout in several)
    count, layout, stage = sum(lengths), VisionLayout.packed(several), Stage(0, drop=drop)
    states = torch.randn(count, 6, generator=random), layout, torch.ones(count), torch.rand(count, generator=random)
    columns = None if axes is None else torch.randint(0, 1 << 40, (axes, count), generator=random)
    before = [tensor.clone() for tensor in (states[0], *states[2:])]
    try:
        done = METHODS[name].compress(Tokens(*states, lengths, columns), stage, LightKVConfig((stage,), method=name))
    except UnsupportedCallError:
        assert name == "evs"  # evs refuses images
        return
    same_layout(done.layout, layout.take(done.kept))
    assert torch.equal(done.columns, torch.zeros(0, len(done.kept)) if columns is None else columns[:, done.kept])
    for tensor, was in zip((states[0], *states[2:]), before, strict=True):
        assert torch.equal(tensor, was)


def test_tokens_that_several_questions_rank_together_keep_their_items():
    layout = VisionLayout.grids([(1, 1, 2, 3), (8, 1, 2, 3)], 16)
    config = LightKVConfig((Stage(-1, drop=0.5), Stage(1, drop=0.5)), method="asked")
    tokens = Tokens(torch.zeros(16, 2), layout, torch.ones(16), torch.arange(16.0))
    done = METHODS["asked"].compress(tokens, config.stages[1], config)
    assert done.layout.item[done.layout.mergeable].tolist() == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("drop", [0.0, 0.4, 0.8])
def test_what_is_compressed_by_itself_has_a_layout_too(drop):
    layout = VisionLayout.grids([(2, 2, 4, 5)], 45)
    hidden = torch.randn(45, 4, generator=generator(0))
    done = compress_tokens(hidden, torch.ones(45), layout, windows=2, drop=drop)
    same_layout(done.layout, layout.take(done.kept))
    assert done.columns.shape == (0, len(done.kept))
    assert done.hidden.data_ptr() != hidden.data_ptr()
