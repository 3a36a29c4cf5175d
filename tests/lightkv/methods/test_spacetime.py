"""Tests spacetime merging against the loops of reference.py, and its guaranteed properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightkv import Tokens, VisionLayout
from lightkv.methods import spacetime as module
from lightkv.methods.spacetime import Field, blocks, spacetime
from tests.lightkv import reference
from tests.lightkv.strategies import generator, layouts

DROPS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.75, 0.97])


def run(hidden, layout, drop, size=None, rounds=10, distance=0.02):
    return spacetime(Tokens(hidden, layout, torch.ones(len(layout)) if size is None else size), drop, rounds, distance)


@settings(max_examples=40)
@given(
    layout=layouts(),
    drop=DROPS,
    rounds=st.integers(1, 5),
    distance=st.sampled_from([0.0, 0.03, 0.5]),
    limit=st.sampled_from([4, 16, 1024]),
    seed=st.integers(0, 10**6),
)
def test_any_layout_is_merged_as_the_loops_say(layout, drop, rounds, distance, limit, seed):
    hidden = torch.randn(len(layout), 6, generator=generator(seed))
    size = torch.randint(1, 5, (len(layout),), generator=generator(seed + 1)).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_TOKENS", limit)
        patch.setattr(
            "lightkv.ops.nearest.SCORES_AT_ONCE", 40
        )  # so that blocks are searched in several batches, and batches in parts
        result = run(hidden, layout, drop, size, rounds, distance)
    wanted, kept, target, sizes = reference.spacetime(hidden, size, layout, drop, rounds, distance, limit)
    assert result.kept.tolist() == kept
    assert result.target.tolist() == target
    assert result.size.tolist() == sizes
    wanted = torch.tensor(wanted, dtype=torch.float64).reshape(result.hidden.shape)
    torch.testing.assert_close(result.hidden.double(), wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=20)
@given(layout=layouts(), seed=st.integers(0, 10**6))
def test_ties_go_to_the_lower_index(layout, seed):
    axis = torch.randint(0, 3, (len(layout),), generator=generator(seed))
    hidden = torch.eye(3)[axis] * 2.0  # in the first round cosines are exactly 0 or 1: nearly everything ties
    result = run(hidden, layout, 0.2, rounds=1, distance=0.0)
    assert (
        result.target.tolist()
        == reference.spacetime(hidden, torch.ones(len(layout)), layout, 0.2, 1, 0.0, module.BLOCK_TOKENS)[2]
    )


@settings(max_examples=30)
@given(layout=layouts(), drop=DROPS, seed=st.integers(0, 10**6))
def test_the_budget_is_met_to_the_token_and_nothing_is_lost(layout, drop, seed):
    hidden = torch.randn(len(layout), 5, generator=generator(seed)).double()
    result, vision = run(hidden, layout, drop), layout.mergeable
    for item in layout.item[vision].unique().tolist():
        here = layout.item == item
        tokens = int(here.sum())
        assert int(here[result.kept].sum()) == tokens - min(int(tokens * drop + 1e-9), tokens - 1)
        assert (layout.item[result.target[here]] == item).all()
    assert result.size.sum() == len(layout)
    torch.testing.assert_close((result.size[:, None] * result.hidden).sum(0), hidden.sum(0), atol=1e-5, rtol=1e-5)
    assert torch.equal(result.size, torch.bincount(result.target, minlength=len(layout))[result.kept].float())
    assert result.target[~vision].tolist() == torch.nonzero(~vision).flatten().tolist()


def test_dropping_nothing_changes_nothing():
    layout = VisionLayout.grids([(1, 2, 3, 3)], 20)
    hidden = torch.randn(20, 4, generator=generator(0))
    result = run(hidden, layout, 0.0)
    assert torch.equal(result.hidden, hidden)
    assert result.kept.tolist() == result.target.tolist() == list(range(20))


def test_what_stands_still_merges_along_time_and_what_moves_stays():
    """Four frames of a still background; one token per frame differs and survives a drop of half."""
    layout = VisionLayout.grids([(0, 4, 3, 3)], 36)
    background = torch.eye(16)[:9].repeat(4, 1)
    moving = torch.arange(4) * 9 + 4
    background[moving] = torch.eye(16)[9:13]
    result = run(background, layout, 18 / 36, distance=0.01)
    assert set(moving.tolist()) <= set(result.kept.tolist())
    assert torch.equal(result.hidden, background[result.kept])  # only equal tokens merged
    assert result.size[torch.isin(result.kept, moving)].tolist() == [1.0] * 4


def test_a_token_looks_nearby_first():
    """All tokens are equal: with a weight on distance, each merge joins direct neighbours in space or time."""
    layout = VisionLayout.grids([(0, 2, 4, 4)], 32)
    result = run(torch.ones(32, 3), layout, 0.5, rounds=1)
    place = torch.stack([layout.t / 2, layout.y, layout.x], dim=-1)
    gone = result.target != torch.arange(32)
    assert int(gone.sum()) == 16
    assert (place[gone] - place[result.target[gone]]).norm(dim=-1).eq(0.5).all()  # a frame is half a step


def test_the_rate_goes_where_the_redundancy_is():
    """Half of the image is one colour, half is noise: at a drop of half, hardly any noise merges."""
    layout = VisionLayout.grids([(0, 1, 8, 8)], 64)
    hidden = torch.randn(64, 16, generator=generator(1))
    hidden[:32] = torch.ones(16)
    result = run(hidden, layout, 0.45, distance=0.0)
    assert int((result.kept < 32).sum()) <= 5


@pytest.mark.parametrize("shape", [(40, 6, 7), (1, 40, 40), (3, 2, 300)])
def test_long_items_are_searched_in_blocks_of_one_item_each(shape):
    tokens = shape[0] * shape[1] * shape[2]
    layout = VisionLayout.grids([(0, *shape), (tokens, 1, 2, 2)], tokens + 4)
    block, count = blocks(layout, 100)
    sizes = torch.bincount(block)
    assert len(sizes) == count
    assert 1 <= sizes.min() <= sizes.max() <= 100
    assert sizes[block[:tokens].unique()].min() >= 50
    assert sizes[block[tokens]] == 4
    place = torch.stack([layout.t / 2, layout.y, layout.x])
    spans = [int((place[:, block == number].amax(1) - place[:, block == number].amin(1)).max()) for number in range(2)]
    assert max(spans) <= 60  # blocks are compact: the longest axis is always halved


class Waits(TorchDispatchMode):
    """Records the operations in its scope that would make the host wait for a GPU."""

    OPERATIONS = ("_local_scalar_dense", "_unique2", "unique_consecutive", "nonzero", "bincount", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masked = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if masked or name in self.OPERATIONS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_searching_a_long_item_in_blocks_waits_once_per_halving():
    layout = VisionLayout.grids([(0, 16, 16, 16)], 4096)
    with Waits() as waits:
        _, count = blocks(layout, 1000)
    assert count == 8
    assert waits.found == ["_unique2", *["_local_scalar_dense"] * 4]  # after each of three halvings, and before


def test_the_sets_of_a_round_wait_for_who_takes_part_alone():
    field = Field.of(VisionLayout.grids([(0, 4, 6, 6)], 144))
    alive = torch.ones(144, dtype=torch.bool)
    for number in range(4):
        with Waits() as waits:
            field.sets(alive, alive, number)
        assert waits.found == ["nonzero"]


def test_a_long_video_is_merged_to_its_budget_and_to_one_token_if_asked():
    layout = VisionLayout.grids([(0, 30, 10, 10)], 3000)
    hidden = torch.randn(3000, 8, generator=generator(2))
    assert len(run(hidden, layout, 0.9).kept) == 300
    last = run(hidden, layout, 1 - 1e-12)
    assert last.size.tolist() == [3000.0]
    torch.testing.assert_close(last.hidden[0], hidden.mean(0), atol=1e-4, rtol=1e-4)


def test_half_precision_similarities_are_taken_in_fp32():
    layout = VisionLayout.grids([(0, 1, 4, 4)], 16)
    large = torch.randn(16, 64, generator=generator(3)).half() * 200
    assert run(large, layout, 0.5).kept.tolist() == run(large.float(), layout, 0.5).kept.tolist()
    assert run(large, layout, 0.5).hidden.dtype == torch.float16


def test_what_is_left_of_even_steps_alone_still_merges_along_time():
    """A still video without its odd steps: half of the rest can merge, and only equal tokens merge."""
    layout = VisionLayout.grids([(0, 8, 3, 3)], 72)
    even = layout.take(layout.t % 2 == 0)
    still = torch.randn(9, 16, generator=generator(5)).repeat(4, 1)
    result = run(still, even, 18 / 36, rounds=1)
    torch.testing.assert_close(result.hidden, still[result.kept])
    assert len(result.kept) == 18
