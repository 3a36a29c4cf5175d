"""The budget of one prompt's cache: never exceeded, fully used, and spent where the video changes."""

import dataclasses

import pytest
import torch

from lightkv import ConfigError, LightKVConfig, LightKVError, Memory, Stage, Text, Vision, VisionLayout
from lightkv.engine.budget import Cached
from lightkv.engine.layerkv import Bits
from lightkv.engine.layers import Layers
from lightkv.engine.positions import Positions
from lightkv.engine.prefill import Stream
from lightkv.engine.stages import Stages
from lightkv.methods.spacetime import blocks
from lightkv.vision.layout import coordinates
from tests.lightkv.tiny import random, tiny_model

HALVED = LightKVConfig((Stage(-1, drop=0.5),), method="spacetime")
QUESTION = torch.tensor([11, 12, 13])
STEPS, SIDE = 12, 4


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2_5_vl")


def _video(still=0):
    """A video in parts of two steps; its first `still` steps are equal."""
    frames = random(STEPS, SIDE * SIDE, 32, seed=1)
    frames[:still] = frames[0]
    return [Vision(frames[t : t + 2].flatten(0, 1), (2, SIDE, SIDE), first=t) for t in range(0, STEPS, 2)]


def _stream(model, config=HALVED, questions=(QUESTION,), **options):
    options = {"fold": True, **options}
    return Stream(
        Layers(model), Positions(model.config), config, list(questions), Bits(options.pop("bits", 16)), **options
    )


def _prefilled(model, stream, parts):
    with stream._layers.attached():
        stream.take([Text(torch.tensor([1, 2, 3]))])
        for part in parts:
            stream.take([part])
        return stream.finish()


@pytest.mark.parametrize("budget", [7, 30, 60])
def test_every_layer_holds_at_most_the_budget_and_the_text(model, budget):
    (prompt,) = _prefilled(model, _stream(model, budget=budget), _video())
    assert {len(layer) for layer in prompt.kv} == {prompt.held[0] + 3}
    assert int(budget * 0.8) <= prompt.held[0] <= budget
    assert set(prompt.held) == {prompt.held[0]}


def test_sizes_stay_what_came_in(model):
    stream = _stream(model, budget=20)
    _prefilled(model, stream, _video())
    vision = stream._caches.trunk.cached.place[:, 0] >= 0
    assert stream._caches.trunk.cached.size[vision].sum() == STEPS * SIDE * SIDE
    assert torch.equal(stream._caches.trunk.cached.size[~vision], torch.ones(3))
    assert torch.allclose(stream._caches.trunk.kv[0].view()[2].exp(), stream._caches.trunk.cached.size)


def test_a_budget_is_spent_where_the_video_changes(model):
    stream = _stream(model, budget=40)
    _prefilled(model, stream, _video(still=8))
    t = stream._caches.trunk.cached.place[stream._caches.trunk.cached.place[:, 0] >= 0, 1]
    still, moving = int((t < 8).sum()), int((t >= 8).sum())
    assert still <= SIDE * SIDE  # 8 steps of the same 16 tokens
    assert moving / 4 >= 2 * still / 8


@pytest.mark.parametrize("config", [HALVED, None])
def test_a_budget_that_is_not_reached_changes_nothing(model, config):
    (free,) = _prefilled(model, _stream(model, config), _video())
    (bound,) = _prefilled(model, _stream(model, config, budget=STEPS * SIDE * SIDE), _video())
    assert torch.equal(free.first, bound.first)
    assert free.held == bound.held


def test_merged_caches_take_few_bits_at_the_end(model):
    (plain,) = _prefilled(model, _stream(model, budget=40), _video())
    (packed,) = _prefilled(model, _stream(model, budget=40, bits=8), _video())
    assert packed.held == plain.held
    assert packed.nbytes < plain.nbytes
    assert torch.allclose(packed.first, plain.first, atol=0.1 * float(plain.first.std()))


def test_questions_share_what_a_budget_leaves(model):
    stream = _stream(model, questions=[QUESTION, QUESTION[:2]], budget=30)
    first, second = _prefilled(model, stream, _video())
    (alone,) = _prefilled(model, _stream(model, budget=30), _video())
    # Linear layers round differently for the rows of two questions than for one.
    torch.testing.assert_close(first.first, alone.first, atol=1e-4, rtol=1e-4)
    assert first.held == second.held == alone.held


def test_cached_tokens_are_scored_as_a_stage_scores_them(model, monkeypatch):
    """One piece, nothing dropped: the cache after one stage and the next stage see the same keys."""
    asked, ask = [], Stages.score
    monkeypatch.setattr(Stages, "score", lambda *arguments: asked.append(ask(*arguments)) or asked[-1])
    for layer in (1, 2):
        config = LightKVConfig((Stage(-1, drop=0.0), Stage(layer, drop=0.0)), method="lightkv")
        stream, text = _stream(model, config, budget=STEPS * SIDE * SIDE), Text(torch.tensor([1, 2, 3]))
        with stream._layers.attached():
            stream.take([text, *_video()])
            if layer == 1:
                score = stream._score_cached(stream._caches.trunk)
                held = {len(kv) for kv in (*stream._caches.trunk.kv, *stream._caches.branches[0].kv)}
                assert held == {len(score)}  # the question left nothing in the cache
    torch.testing.assert_close(score, asked[-1])
    assert torch.equal(score[:3], torch.zeros(3))
    assert float(score.max()) > 2 * float(score[3:].min()) > 0


def test_what_the_question_attends_to_merges_late():
    count = STEPS * SIDE * SIDE
    place = torch.nn.functional.pad(coordinates(STEPS, SIDE, SIDE), (1, 0))
    cached = Cached(random(count, 32, seed=3), place, torch.ones(count), torch.arange(count)[None])
    looked_at = torch.arange(count) % 10 == 0
    after, done = cached.merged(60, True, torch.where(looked_at, 1.0, 0.01))
    assert after.vision == 60
    assert looked_at[done.kept].sum() == looked_at.sum()
    assert looked_at[cached.merged(60, True)[1].kept].sum() < 0.5 * looked_at.sum()


def test_the_fewer_tokens_are_left_the_more_time_a_block_spans():
    """Windows of patches, then of regions, then of frames: 64 frames of 64 tokens."""
    place = torch.nn.functional.pad(coordinates(64, 8, 8), (1, 0))
    spans = []
    for left in (4096, 2048, 1024):
        layout = VisionLayout.from_coordinates(*place[torch.randperm(4096)[:left].sort().values].unbind(1))
        block, _ = blocks(layout)
        spans.append(max(int(layout.t[block == number].max() - layout.t[block == number].min()) for number in block))
    assert spans[0] < 32 <= spans[1] < 63 == spans[2]


def test_every_question_guides_the_merging_of_its_own_layers(model):
    guided = LightKVConfig((Stage(-1, drop=0.4), Stage(1, drop=0.4)), method="lightkv")
    other, third = torch.tensor([40, 41, 42]), torch.tensor([70, 71])
    (alone,) = _prefilled(model, _stream(model, guided, budget=30), _video())
    assert set(alone.held) == {alone.held[0]}
    assert alone.held[0] <= 30
    pair = _prefilled(model, _stream(model, guided, [QUESTION, other], budget=30), _video())
    again = _prefilled(model, _stream(model, guided, [third, other], budget=30), _video())
    for prompt in (*pair, *again):
        assert max(prompt.held) <= 30
        assert [len(layer) - held for layer, held in zip(prompt.kv, prompt.held, strict=True)] == [3] * len(prompt.kv)
    assert torch.equal(pair[0].kv[0].view()[0], pair[1].kv[0].view()[0])  # shared
    own = [prompt.kv[-1].view()[0] for prompt in (*pair, again[1])]
    assert own[0].shape != own[1].shape or not torch.allclose(own[0], own[1], atol=1e-2)
    torch.testing.assert_close(own[1], own[2], atol=1e-4, rtol=1e-4)  # independent of the other question


@pytest.mark.parametrize("options", [{"budget": 30}, {"budget": 0, "fold": True}])
def test_a_budget_without_folding_or_without_a_token_is_refused(options):
    with pytest.raises(ConfigError, match=f"needs fold=True.* got budget={options['budget']}"):
        Memory(**options)


def test_more_items_than_the_budget_are_refused(model):
    images = [dataclasses.replace(part, first=0) for part in _video()]
    (prompt,) = _prefilled(model, _stream(model, budget=8), images)
    assert 6 <= prompt.held[0] <= 8
    with pytest.raises(ConfigError, match="a budget of 4 tokens cannot hold 5 images and videos"):
        _prefilled(model, _stream(model, budget=4), images)


def test_out_of_memory_while_merging_is_not_retried_with_smaller_pieces(model, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError

    stream = _stream(model, budget=10)
    parts = _video()
    with stream._layers.attached():
        stream.take([parts[0]])
        monkeypatch.setattr("lightkv.engine.branches.folded", full)
        with pytest.raises(LightKVError, match="while the cache was merged to its budget"):
            stream.take([parts[1]])
