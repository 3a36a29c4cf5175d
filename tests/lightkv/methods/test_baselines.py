"""Tests the defining property of each baseline on hand-made inputs, and the schedules of the baselines."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from lightkv import ConfigError, LightKVConfig, Stage, Tokens, UnsupportedCallError, VisionLayout, baseline
from lightkv.methods.baselines import BASELINES
from lightkv.methods.guidance import LastQuery
from lightkv.methods.table import METHODS
from tests.lightkv.strategies import generator, layouts
from tests.lightkv.tiny import TINY, scored


def run(method, hidden, layout, drop, score=None, **options):
    stage = Stage(0, drop=drop)
    tokens = Tokens(hidden, layout, torch.ones(len(layout)), score)
    return METHODS[method].compress(tokens, stage, LightKVConfig((stage,), method=method, **options))


@settings(max_examples=40)
@given(layout=layouts(), drop=st.sampled_from([0.0, 0.29, 0.5, 0.8, 1 - 1e-12]), name=st.sampled_from(BASELINES))
def test_every_item_loses_the_floor_of_its_share_and_nothing_else_goes(layout, drop, name):
    if name == "evs" and bool((layout.grid[:, 0] == 1).any()):
        return
    hidden = torch.randn(len(layout), 6, generator=generator(0))
    result = run(name, hidden, layout, drop, torch.rand(len(layout), generator=generator(1)))
    for item in layout.item[layout.mergeable].unique().tolist():
        tokens = int((layout.item == item).sum())
        left = int((layout.item[result.kept] == item).sum())
        assert left == tokens - min(int(tokens * drop + 1e-9), tokens - 1)
    assert not set(torch.nonzero(~layout.mergeable).flatten().tolist()) - set(result.kept.tolist())
    assert len(result.size) == len(result.hidden) == len(result.kept)
    gone = torch.ones(len(layout), dtype=torch.bool).index_fill(0, result.kept, False)
    if name == "tome":
        assert result.size.sum() == len(layout)
    else:
        assert torch.equal(result.hidden, hidden[result.kept])
        assert result.target[gone].eq(-1).all()
        assert result.size.eq(1).all()


def test_random_is_a_uniform_draw_that_its_seed_repeats():
    layout, hidden = VisionLayout.grids([(1, 1, 2, 5)], 12), torch.zeros(12, 2)
    draws = torch.zeros(12)
    for seed in range(300):
        draws[run("random", hidden, layout, 0.5, seed=seed).kept] += 1
    assert draws[0] == draws[11] == 300
    assert (draws[1:11] - 150).abs().max() < 44  # five standard deviations
    assert torch.equal(run("random", hidden, layout, 0.5, seed=7).kept, run("random", hidden, layout, 0.5, seed=7).kept)


def test_stride_keeps_every_kth_token_in_raster_order():
    layout = VisionLayout.grids([(1, 2, 2, 4)], 18)
    assert run("stride", torch.zeros(18, 2), layout, 0.75).kept.tolist() == [0, 2, 6, 10, 14, 17]
    kept = run("stride", torch.zeros(18, 2), layout, 0.4).kept[1:-1]
    assert set(kept.diff().tolist()) == {1, 2}  # 10 of 16, evenly spread


def test_tome_merges_alternate_tokens_by_content_and_weighs_by_size():
    layout = VisionLayout.grids([(0, 1, 2, 3)], 6)
    axis = torch.eye(4)
    hidden = torch.stack([axis[0], axis[1], axis[2], axis[0], axis[3], axis[1] * 3])
    result = run("tome", hidden, layout, 1 / 6)
    assert result.target.tolist() == [3, 1, 2, 3, 4, 5]  # token 0 equals token 3, which is not a neighbour
    sizes = torch.tensor([3.0, 1, 1, 1, 1, 1])
    stage = Stage(0, drop=1 / 6)
    hidden[0] = 2 * axis[0]
    again = METHODS["tome"].compress(Tokens(hidden, layout, sizes), stage, LightKVConfig((stage,), method="tome"))
    assert again.size.tolist() == [1, 1, 4, 1, 1]
    assert again.hidden[2].tolist() == [(3 * 2 + 1) / 4, 0, 0, 0]


def test_fastv_keeps_what_the_last_token_attends_to():
    """Scores are the last row of the causal attention, averaged over heads; query heads share keys."""
    layout = VisionLayout.grids([(1, 1, 2, 3)], 9)
    q, k = torch.randn(4, 9, 8, generator=generator(0)), torch.randn(2, 9, 8, generator=generator(1))
    score = scored(LastQuery(), q, k, layout, 0.35)
    attention = (q @ k.repeat_interleave(2, 0).transpose(1, 2) * 0.35).masked_fill(
        ~torch.ones(9, 9).tril().bool(), -1e9
    )
    torch.testing.assert_close(score, attention.softmax(-1)[:, -1].mean(0))
    kept = run("fastv", torch.zeros(9, 2), layout, 0.5, score).kept.tolist()
    best = torch.topk(score[1:7], 3).indices + 1
    assert kept == [0, *sorted(best.tolist()), 7, 8]


def test_evs_drops_what_repeats_the_frame_before():
    layout = VisionLayout.grids([(0, 3, 1, 4)], 12)
    frames = torch.eye(8)[:4].repeat(3, 1, 1)
    frames[1, 2] = torch.eye(8)[6]  # appears in frame 1 …
    frames[2, 0] = torch.eye(8)[7]  # … and is replaced by another in frame 2
    kept = run("evs", frames.flatten(0, 1), layout, 5 / 12).kept.tolist()
    assert kept == [0, 1, 2, 3, 6, 8, 10]
    kept = run("evs", frames.flatten(0, 1), layout, 9 / 12).kept.tolist()
    assert kept == [0, 1, 2]  # the first frame is dropped last


def test_evs_refuses_images():
    layout = VisionLayout.grids([(0, 3, 1, 4), (12, 1, 2, 2)], 16)
    with pytest.raises(UnsupportedCallError, match="item 1 has one frame"):
        run("evs", torch.ones(16, 2), layout, 0.5)


@pytest.mark.parametrize("depth", [6, 28, 32])
@pytest.mark.parametrize("name", [name for name in BASELINES if name != "fastv"])
def test_most_baselines_run_once_on_the_embeddings(name, depth):
    config = baseline(name, LlamaConfig(num_hidden_layers=depth), 0.1)
    assert [(stage.layer, stage.drop) for stage in config.stages] == [(-1, pytest.approx(0.9))]
    assert config.retention(depth) == pytest.approx(0.1)
    assert LightKVConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("depth", "layer"), [(6, 1), (32, 2)])
def test_fastv_runs_after_an_early_layer_and_says_what_it_can_reach(depth, layer):
    model_config = LlamaConfig(num_hidden_layers=depth)
    config = baseline("fastv", model_config, 0.5)
    assert [stage.layer for stage in config.stages] == [layer]
    assert config.retention(depth) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match=f"keep at least {(layer + 1) / depth:.3f}"):
        baseline("fastv", model_config, 0.05)


def test_models_that_need_every_token_first_get_their_stage_later():
    config = baseline("random", TINY["qwen3_vl"].config(), 0.6, seed=4)
    assert ([stage.layer for stage in config.stages], config.seed) == ([1], 4)


def test_unknown_names_and_several_stages_are_refused():
    with pytest.raises(ConfigError, match="baseline must be one of"):
        baseline("published", LlamaConfig(), 0.5)
    with pytest.raises(ConfigError, match="published with 1 stage, got stages=3"):
        baseline("stride", LlamaConfig(), 0.5, stages=3)
