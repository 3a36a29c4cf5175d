import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightkv import ConfigError, VisionLayout, compress_tokens
from lightkv.methods.windows import Windows
from tests.lightkv import oracle
from tests.lightkv.strategies import generator, layouts


def places(layout):
    return list(zip(*(getattr(layout, name).tolist() for name in ("item", "t", "y", "x")), strict=True))


def truth(hidden, guidance, layout, **options):
    grids = [tuple(grid) for grid in layout.grid.tolist()]
    return oracle.stage(hidden.double().tolist(), guidance.double().tolist(), places(layout), grids, **options)


def agrees(result, expected, tolerance=1e-5):
    hidden, kept, target = expected
    assert result.kept.tolist() == kept
    assert result.target.tolist() == target
    wanted = torch.tensor(hidden, dtype=torch.float64).reshape(result.hidden.shape)
    torch.testing.assert_close(result.hidden.double(), wanted, atol=tolerance, rtol=tolerance)


@settings(max_examples=150)
@given(
    layout=layouts(),
    windows=st.integers(1, 5),
    drop=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.6, 0.75, 0.9]),
    frames=st.sampled_from([1, 2, None]),
    budget=st.sampled_from(["window", "item"]),
    seed=st.integers(0, 10**6),
)
def test_any_layout_is_compressed_as_the_loops_say(layout, windows, drop, frames, budget, seed):
    hidden = torch.randn(len(layout), 6, generator=generator(seed))
    guidance = torch.rand(len(layout), generator=generator(seed + 1))
    options = {"windows": windows, "drop": drop, "frames": frames, "budget": budget}
    agrees(compress_tokens(hidden, guidance, layout, **options), truth(hidden, guidance, layout, **options))


@settings(max_examples=60)
@given(layout=layouts(), windows=st.integers(1, 5), drop=st.sampled_from([0.1, 0.3, 0.5, 0.7]))
def test_item_budget_is_met_to_the_token_unless_every_window_is_down_to_one(layout, windows, drop):
    hidden = torch.randn(len(layout), 6, generator=generator(0))
    result = compress_tokens(hidden, torch.ones(len(layout)), layout, windows=windows, drop=drop, budget="item")
    cut, left = Windows.cut(layout, windows), layout.take(result.kept)
    for item in layout.item[layout.mergeable].unique().tolist():
        tokens = int((layout.item == item)[layout.mergeable].sum())
        least = int((cut.item == item).sum())
        assert int((left.item == item)[left.mergeable].sum()) == max(tokens - int(tokens * drop + 1e-9), least)


@settings(max_examples=60)
@given(layout=layouts(), windows=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_ties_go_to_the_lower_index(layout, windows, seed):
    axis = torch.randint(0, 3, (len(layout),), generator=generator(seed))
    hidden = torch.eye(3)[axis] * 2.0  # cosines are exactly 0 or 1: nearly everything ties
    guidance = torch.ones(len(layout))
    result = compress_tokens(hidden, guidance, layout, windows=windows, drop=0.5)
    agrees(result, truth(hidden, guidance, layout, windows=windows, drop=0.5))


@settings(max_examples=40)
@given(layout=layouts(), seed=st.integers(0, 10**6), drop=st.sampled_from([0.2, 0.5, 0.8]))
def test_guidance_weighted_mass_is_conserved(layout, seed, drop):
    hidden = torch.randn(len(layout), 4, generator=generator(seed))
    weight = torch.rand(len(layout), generator=generator(seed + 1)) + 0.01
    result = compress_tokens(hidden, weight, layout, windows=2, drop=drop)
    gathered = torch.zeros(len(layout)).index_add(0, result.target, weight)[result.kept]
    torch.testing.assert_close(gathered @ result.hidden, weight @ hidden, atol=1e-4, rtol=1e-4)


def test_released_grids_go_576_288_145_73_as_the_loops_say():
    layout = VisionLayout.released([(5, 1, 24, 24)], 576 + 5 + 7)
    hidden, guidance = torch.randn(588, 8, generator=generator(0)), torch.rand(588, generator=generator(1))
    spots, counts = places(layout), [576]
    for windows in (4, 2, 1):
        layout = layout.squared()
        spots, grids = oracle.squared(spots)
        assert places(layout) == spots
        expected = oracle.stage(hidden.double().tolist(), guidance.double().tolist(), spots, grids, windows, 0.5)
        result = compress_tokens(hidden, guidance, layout, windows=windows, drop=0.5)
        agrees(result, expected)
        hidden, guidance = result.hidden, guidance[result.kept]
        layout, spots = layout.take(result.kept), [spots[index] for index in result.kept.tolist()]
        counts.append(int(layout.is_vision.sum()))
    assert counts == [576, 288, 145, 73]


def test_permuting_images_permutes_the_result():
    sizes = [(1, 5, 4), (2, 3, 6), (1, 7, 7)]
    blocks = [torch.randn(t * h * w, 6, generator=generator(n)) for n, (t, h, w) in enumerate(sizes)]
    weights = [torch.rand(len(block), generator=generator(9 + n)) for n, block in enumerate(blocks)]

    def run(order):
        spans, start = [], 0
        for n in order:
            spans.append((start, *sizes[n]))
            start += len(blocks[n])
        hidden, weight = torch.cat([blocks[n] for n in order]), torch.cat([weights[n] for n in order])
        layout = VisionLayout.grids(spans, start)
        result = compress_tokens(hidden, weight, layout, windows=2, drop=0.5)
        owner = layout.item[result.kept]
        assert (layout.item[result.target] == layout.item).all()  # no merge across images
        return {n: result.hidden[owner == place] for place, n in enumerate(order)}

    straight = run([0, 1, 2])
    for order in ([2, 0, 1], [1, 2, 0], [2, 1, 0]):
        for n, kept in run(order).items():
            torch.testing.assert_close(kept, straight[n], atol=1e-6, rtol=1e-6)


def test_windows_never_span_frames_unless_asked():
    layout = VisionLayout.grids([(0, 4, 2, 2)], 16)
    hidden = torch.ones(16, 3)
    per_frame = compress_tokens(hidden, torch.ones(16), layout, windows=1, drop=0.5)
    assert (layout.t[per_frame.target] == layout.t).all()
    pairs = Windows.cut(layout, 1, frames=2)
    assert pairs.sizes.tolist() == [8, 8]
    assert Windows.cut(layout, 2, frames=None).sizes.tolist() == [4] * 4


def test_first_bands_are_the_taller_ones():
    sizes = Windows.cut(VisionLayout.grids([(0, 1, 5, 7)], 35), 3).sizes
    assert sizes.tolist() == [6, 4, 4, 6, 4, 4, 3, 2, 2]


def test_windows_keep_their_place_when_tokens_have_left():
    layout = VisionLayout.grids([(0, 1, 4, 4)], 16).take(torch.arange(8))  # without the lower half
    assert Windows.cut(layout, 2).sizes.tolist() == [4, 4]


@pytest.mark.parametrize("drop", [0.55, 0.6, 0.75, 0.8, 0.95])
def test_a_drop_above_half_is_met(drop):
    layout = VisionLayout.grids([(0, 1, 10, 10)], 100)
    hidden = torch.randn(100, 5, generator=generator(3))
    result = compress_tokens(hidden, torch.ones(100), layout, windows=1, drop=drop)
    assert len(result.kept) == 100 - round(100 * drop)


@pytest.mark.parametrize("budget", ["window", "item"])
def test_a_drop_just_below_one_leaves_a_token_per_window(budget):
    layout = VisionLayout.grids([(0, 2, 3, 3)], 18)
    result = compress_tokens(torch.randn(18, 4), torch.ones(18), layout, windows=2, drop=1 - 1e-12, budget=budget)
    assert len(result.kept) == 2 * 4


def test_removals_do_not_suffer_from_binary_fractions():
    layout = VisionLayout.grids([(0, 1, 10, 10)], 100)
    result = compress_tokens(torch.randn(100, 5), torch.ones(100), layout, windows=1, drop=0.29)
    assert len(result.kept) == 71


def test_tokens_that_take_part_in_no_merge_keep_their_bits():
    layout = VisionLayout.grids([(2, 1, 6, 6)], 40)
    hidden = torch.randn(40, 8, generator=generator(5)).to(torch.bfloat16)
    result = compress_tokens(hidden, torch.ones(40), layout, windows=2, drop=0.3)
    alone = torch.bincount(result.target, minlength=40)[result.kept] == 1
    assert torch.equal(result.hidden[alone], hidden[result.kept][alone])
    assert result.hidden.dtype == torch.bfloat16


def test_fixed_and_text_positions_stay():
    layout = VisionLayout.from_coordinates(
        torch.tensor([-1, 0, 0, 0, -2, 0, 0, 0, -2]), *torch.zeros(3, 9, dtype=torch.int64)
    )
    result = compress_tokens(torch.ones(9, 2), torch.ones(9), layout, windows=1, drop=0.5)
    assert {0, 4, 8} <= set(result.kept.tolist())
    assert len(result.kept) == 6


def test_fp16_norms_beyond_65504_do_not_overflow():
    layout = VisionLayout.grids([(0, 1, 4, 4)], 16)
    direction = torch.randn(16, 64, generator=generator(7))
    large = (direction * 400).half()
    assert (large.half() ** 2).sum(-1).isinf().any()
    result = compress_tokens(large, torch.ones(16), layout, windows=1, drop=0.5)
    assert result.hidden.isfinite().all()
    assert result.kept.tolist() == compress_tokens(direction, torch.ones(16), layout, windows=1, drop=0.5).kept.tolist()


def test_silent_guidance_means_equal_weights():
    layout = VisionLayout.grids([(0, 1, 1, 2)], 2)
    result = compress_tokens(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2), layout, windows=1, drop=0.5)
    assert result.hidden.tolist() == [[2.0, 3.0]]


def test_scores_and_features_are_held_in_bounded_blocks(monkeypatch):
    layout = VisionLayout.grids([(0, 3, 9, 9), (243, 1, 2, 3), (249, 1, 20, 20)], 649)
    hidden, weight = torch.randn(649, 6, generator=generator(1)), torch.rand(649, generator=generator(2))
    whole = compress_tokens(hidden, weight, layout, windows=2, drop=0.5)
    monkeypatch.setattr("lightkv.ops.nearest.SCORES_AT_ONCE", 64)
    monkeypatch.setattr("lightkv.ops.nearest.FEATURES_AT_ONCE", 256)
    pieces = compress_tokens(hidden, weight, layout, windows=2, drop=0.5)
    assert torch.equal(whole.kept, pieces.kept)
    assert torch.equal(whole.target, pieces.target)


def test_what_cannot_be_compressed_is_an_error():
    layout = VisionLayout.grids([(0, 1, 2, 2)], 4)
    with pytest.raises(ConfigError, match="drop must be at least 0 and below 1, got 1"):
        compress_tokens(torch.ones(4, 2), torch.ones(4), layout, windows=1, drop=1.0)
    with pytest.raises(ConfigError, match="windows per side"):
        compress_tokens(torch.ones(4, 2), torch.ones(4), layout, windows=0, drop=0.5)
    with pytest.raises(ConfigError, match="4 tokens"):
        compress_tokens(torch.ones(5, 2), torch.ones(4), layout, windows=1, drop=0.5)
