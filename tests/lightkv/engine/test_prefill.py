"""Streaming prefill: pieces against the whole prompt, several questions against one each, what every layer keeps."""

import dataclasses

import pytest
import torch

from lightkv import Bits, LightKVConfig, Memory, Stage, Text, Vision, compress
from lightkv.engine.fold import folded
from lightkv.engine.layers import Layers
from lightkv.engine.positions import Positions
from lightkv.engine.prefill import Stream
from lightkv.methods.table import METHODS as TABLE
from lightkv.ops.attend import attend
from lightkv.ops.codes import quantise
from tests.lightkv.engine.prompts import apart, ask, spoken
from tests.lightkv.hooks.test_generation import GREEDY, METHODS, VARIANTS
from tests.lightkv.tiny import LAYERS, random, tiny_model, tiny_sample

KEEPING = {
    "none": None,
    **{name: config for name, config in {**VARIANTS, **METHODS}.items() if config.positions == "keep"},
    "stride": LightKVConfig((Stage(-1, drop=0.6), Stage(1, drop=0.3)), method="stride"),
    "published, early": LightKVConfig((Stage(-1, 2, 0.5), Stage(1, 1, 0.5)), guidance="uniform"),
}
STAGED = {name: config for name, config in KEEPING.items() if config is not None}
QUESTIONS = [torch.tensor(ids) for ids in ([11, 12, 13], [40, 41, 42, 43, 44], [50])]
CLOSE = dict(atol=2e-4, rtol=2e-4)


def without_drop(config):
    return config and dataclasses.replace(
        config, stages=tuple(dataclasses.replace(stage, drop=0.0) for stage in config.stages)
    )


def fits(method, family):
    """A sample that the method accepts: `evs` takes only videos."""
    return tiny_sample(family, 0, 2, 1) if method != "evs" else tiny_sample(family, video=1)


def streamed(model, config, pieces, questions=QUESTIONS[:1], bits=None, **options):
    """A stream after its pieces, before its questions."""
    layers = Layers(model)
    stream = Stream(layers, Positions(model.config), config, questions, bits or Bits(), **options)
    with layers.attached():
        for piece in pieces:
            stream.take(piece)
    return stream, layers


def caches(stream):
    """Per layer of the first question: k, v, log sizes."""
    return [layer.view() for layer in (*stream._caches.trunk.kv, *stream._caches.branches[0].kv)]


def state(stream):
    return stream.input.state(), stream._caches.state()


def same_caches(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
    return True


# --- pieces ---


@pytest.mark.parametrize("method", ["none", "lightkv, later", "asked", "keep", "fastv"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_where_nothing_is_dropped_pieces_of_any_size_are_the_whole(family, method):
    """Images and text span several pieces, or share one."""
    model, config = tiny_model(family), without_drop(KEEPING[method])
    sample = tiny_sample(family, 0, 1, video=0 if family != "llava" else None)
    segments, question = apart(model, sample)
    out = model.generate(**sample, **GREEDY)
    for most in (7, 30, 70, 1000):
        tokens, logits = spoken(model, config, segments, question, Memory(chunk_tokens=most))
        assert tokens == out.sequences[0, sample["input_ids"].shape[1] :].tolist()
        torch.testing.assert_close(logits, torch.cat(out.logits), **CLOSE)


BY_ITEM = ["spacetime", "spacetime, later", "stride", "tome", "evs", "published, early", "uniform", "none"]


@pytest.mark.parametrize("method", BY_ITEM)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_an_item_that_is_ranked_by_itself_may_come_in_a_piece_of_its_own(family, method):
    """Exact for every method that depends neither on the question nor on the rest of the prompt."""
    model, config = tiny_model(family), KEEPING[method]
    first, word = apart(model, tiny_sample(family, video=1))[0][-2:]
    second = apart(model, tiny_sample(family, video=0) if method == "evs" else tiny_sample(family, 2))[0][-2]
    pieces = [[Text(torch.tensor([7, 8])), first, word], [second], [Text(torch.tensor([9]))]]
    apart_, _ = streamed(model, config, pieces, traced=True)
    together, _ = streamed(model, config, [[*pieces[0], *pieces[1], *pieces[2]]], traced=True)
    same_caches(caches(apart_), caches(together), **CLOSE)
    for found, expected in zip(merges(apart_), merges(together), strict=True):
        assert torch.equal(found, expected)


def merges(stream):
    """Per stage: the targets of the prompt's vision tokens."""
    return [torch.cat(parts) for parts in zip(*stream._caches.branches[0].merges, strict=True)]


@pytest.mark.parametrize("method", ["lightkv", "asked", "fastv", "random", "keep"])
def test_a_piece_is_never_merged_with_another(method):
    """For every method, a token's target is a surviving token of its own piece."""
    model, config = tiny_model("qwen2_5_vl"), STAGED[method]
    segments, _ = apart(model, tiny_sample("qwen2_5_vl", 0, 1, 2))
    pieces = [segments[:2], segments[2:4], segments[4:]]
    stream, _ = streamed(model, config, pieces, traced=True)
    begin = 0
    for piece, targets in zip(pieces, stream._caches.branches[0].merges, strict=True):
        count = sum(len(segment) for segment in piece if isinstance(segment, Vision))
        for target in targets:
            survivors = torch.nonzero(target == torch.arange(begin, begin + count)).flatten() + begin
            assert torch.equal(target[target >= 0].unique(), survivors)
        begin += count
    assert begin == stream.input.vision_tokens


def test_parts_of_a_video_in_one_piece_are_one_item():
    model, config = tiny_model("qwen2_5_vl"), STAGED["spacetime"]
    (_, video, word), _ = apart(model, tiny_sample("qwen2_5_vl", video=1))
    whole, _ = streamed(model, config, [[video, word]])
    parts, _ = streamed(model, config, [[*video.split(24), word]])
    assert same_caches(caches(parts), caches(whole), atol=0, rtol=0)


# --- questions ---


@pytest.mark.parametrize(
    ("method", "most"),
    [(method, 1000) for method in KEEPING]
    + [(method, 40) for method in ("none", "lightkv", "asked", "fastv", "keep", "spacetime", "random")],
)
def test_several_questions_equal_one_request_each(method, most):
    model, config = tiny_model("qwen2_5_vl"), KEEPING[method]
    sample = fits(method, "qwen2_5_vl")
    memory = Memory(chunk_tokens=most)
    segments, _ = apart(model, sample)
    together = ask(model, config, segments, *QUESTIONS, memory=memory, traced=True, max_new_tokens=3)
    for answer, question in zip(together, QUESTIONS, strict=True):
        (alone,) = ask(model, config, segments, question, memory=memory, traced=True, max_new_tokens=3)
        for name in ("tokens", "prompt_tokens", "kept_tokens", "retention", "kv_bytes", "kv_bytes_uncompressed"):
            assert getattr(answer, name) == getattr(alone, name)
        assert len(answer.merges) == len(alone.merges) == len(config.stages if config else ())
        assert all(torch.equal(a, b) for a, b in zip(answer.merges, alone.merges, strict=True))
    if method in ("lightkv", "asked", "fastv"):
        assert len({tuple(answer.merges[-1].tolist()) for answer in together}) == len(QUESTIONS)


@pytest.mark.parametrize("method", STAGED)
def test_merges_and_shares_are_those_that_compress_reports(method):
    model, config = tiny_model("qwen2_5_vl"), STAGED[method]
    sample = fits(method, "qwen2_5_vl")
    segments, question = apart(model, sample)
    (answer,) = ask(model, config, segments, question, traced=True)
    with compress(model, config) as report:
        model.generate(**sample, **GREEDY)
    vision = torch.nonzero(sample["mm_token_type_ids"][0]).flatten()
    number = torch.full_like(sample["input_ids"][0], -1).index_copy(0, vision, torch.arange(len(vision)))
    assert len(answer.merges) == len(report.survivors[0])
    for found, survivors in zip(answer.merges, report.survivors[0], strict=True):
        expected = survivors.target[vision]
        assert torch.equal(found, torch.where(expected < 0, -1, number[expected]))
    assert answer.retention == pytest.approx(report.retention)
    for name in ("kept_tokens", "kv_bytes", "kv_bytes_uncompressed"):
        assert getattr(answer, name) == getattr(report, name)
    assert answer.prompt_tokens == sample["input_ids"].shape[1]


def test_merges_are_not_kept_unless_asked_for():
    model = tiny_model("llava")
    segments, question = apart(model, tiny_sample("llava", 0))
    assert ask(model, STAGED["lightkv"], segments, question)[0].merges == ()


# --- failures ---


class EnoughError(Exception):
    pass


def failing(function, after):
    """`function` for the first `after` calls, then EnoughError."""
    calls = []

    def called(*args, **kwargs):
        calls.append(None)
        if len(calls) > after:
            raise EnoughError
        return function(*args, **kwargs)

    return called


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("where", "calls"), [("forward.attend", 6), ("fold.folded", 1)])
def test_a_piece_that_fails_anywhere_leaves_nothing_behind(where, calls, bits, monkeypatch):
    model, config, bits = tiny_model("qwen2_5_vl"), STAGED["lightkv"], Bits(bits, group=16)
    segments, _ = apart(model, tiny_sample("qwen2_5_vl", 0, 1, video=0))
    first, second = segments[:3], segments[3:]
    options = dict(questions=QUESTIONS[:1], bits=bits, fold=True, traced=True)
    expected, layers = streamed(model, config, [first, second], **options)
    stream, layers = streamed(model, config, [first], **options)
    stream._caches.seal()  # the first step of the next piece
    path, function = f"lightkv.engine.{where}", {"forward.attend": attend, "fold.folded": folded}[where]
    before = caches(stream), state(stream)
    for after in range(calls):
        with monkeypatch.context() as patch, layers.attached():
            patch.setattr(path, failing(function, after))
            with pytest.raises(EnoughError):
                stream.take(second)
        assert same_caches(caches(stream), before[0], atol=0, rtol=0)
        assert repr(state(stream)) == repr(before[1])
    with monkeypatch.context() as patch, layers.attached():
        patch.setattr(path, failing(function, calls))
        stream.take(second)
    assert same_caches(caches(stream), caches(expected), atol=0, rtol=0)
    assert repr(state(stream)) == repr(state(expected))


def test_a_seal_that_fails_leaves_the_piece_untaken(monkeypatch):
    model, bits = tiny_model("llava"), Bits(8, group=16)
    segments, _ = apart(model, tiny_sample("llava", 0, 1))
    expected, _ = streamed(model, None, [segments[:2], segments[2:]], bits=bits)
    stream, layers = streamed(model, None, [segments[:2]], bits=bits)
    with monkeypatch.context() as patch, layers.attached():
        patch.setattr("lightkv.engine.layerkv.quantise", failing(quantise, 2))
        with pytest.raises(EnoughError):
            stream.take(segments[2:])
    with layers.attached():
        stream.take(segments[2:])
    assert same_caches(caches(stream), caches(expected), atol=0, rtol=0)


def test_nan_before_a_stage_is_refused():
    model = tiny_model("llava")
    features = random(16, 32, seed=0)
    features[5, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="before the stage after layer -1 are not finite"):
        streamed(model, STAGED["spacetime"], [[Vision(features, (1, 4, 4))]])


# --- folding and silent layers ---


@pytest.mark.parametrize("method", [name for name in STAGED if name != "evs"])
def test_folded_layers_all_hold_what_the_last_stage_left(method):
    model, config = tiny_model("qwen2_5_vl"), STAGED[method]
    segments, _ = apart(model, tiny_sample("qwen2_5_vl", 0, 2))
    plain, _ = streamed(model, config, [segments[:2], segments[2:]])
    stream, _ = streamed(model, config, [segments[:2], segments[2:]], fold=True)
    held = [*stream._caches.trunk.held, *stream._caches.branches[0].held]
    assert held == [[*plain._caches.trunk.held, *plain._caches.branches[0].held][-1]] * LAYERS
    *early, (_, _, size) = caches(stream)
    for _, _, log_size in early:
        assert len(log_size) == len(size)
        if TABLE[config.method].proportional:
            torch.testing.assert_close(log_size, size)


@pytest.mark.parametrize("method", ["lightkv", "spacetime", "asked", "fastv", "keep"])
def test_folding_a_piece_changes_neither_its_text_nor_the_layers_after_the_last_stage(method):
    model, config = tiny_model("qwen2_5_vl"), STAGED[method]
    segments, _ = apart(model, tiny_sample("qwen2_5_vl", 0, 2))
    plain, folded = (streamed(model, config, [segments], fold=fold, traced=True)[0] for fold in (False, True))
    last = config.stages[-1].layer + 1
    same_caches(caches(folded)[last:], caches(plain)[last:], atol=0, rtol=0)
    for index in range(last):
        stage = sum(stage.layer < index for stage in config.stages)
        before, after = words([torch.arange(80), *merges(plain)][stage]), words(merges(plain)[-1])
        (k, v, _), (k_few, v_few, log_size) = caches(plain)[index], caches(folded)[index]
        torch.testing.assert_close((k_few[:, after], v_few[:, after]), (k[:, before], v[:, before]), **CLOSE)
        assert torch.equal(log_size[after], torch.zeros(4))


def words(target):
    """Places of the text before, between and after images of 48 and 32 tokens with these targets."""
    stays = target == torch.arange(80)
    first, second = int(stays[:48].sum()), int(stays[48:].sum())
    return torch.tensor([0, 1, 2 + first, 3 + first + second])


def test_folded_values_are_means_by_size():
    """If stages merge but drop nothing, folding keeps Σ size · v over a layer's vision."""
    model, config = tiny_model("qwen2_5_vl"), STAGED["spacetime, later"]
    segments, _ = apart(model, tiny_sample("qwen2_5_vl", 0, 2))
    plain, folded = (streamed(model, config, [segments], fold=fold)[0] for fold in (False, True))
    for (_, v, log_size), (_, v_few, log_few) in zip(caches(plain), caches(folded), strict=True):
        mass, mass_few = ((x * size.exp()[:, None]).sum(1) for x, size in ((v, log_size), (v_few, log_few)))
        torch.testing.assert_close(mass_few, mass, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["lightkv", "published, early"])
def test_folding_where_nothing_is_dropped_changes_nothing(method):
    model, config = tiny_model("qwen2_5_vl"), without_drop(STAGED[method])
    segments, _ = apart(model, tiny_sample("qwen2_5_vl", 0, 2))
    pieces = [segments[:2], segments[2:]]
    plain, folded = (streamed(model, config, pieces, fold=fold)[0] for fold in (False, True))
    same_caches(caches(folded), caches(plain), atol=1e-4, rtol=1e-4)


def test_layers_shared_by_several_questions_fold_to_what_the_shared_stages_left():
    model, config = tiny_model("qwen2_5_vl"), STAGED["lightkv"]
    segments, _ = apart(model, tiny_sample("qwen2_5_vl", 0, 2))
    alone, _ = streamed(model, config, [segments], fold=True)
    stream, _ = streamed(model, config, [segments], questions=QUESTIONS, fold=True)
    plain, _ = streamed(model, config, [segments], questions=QUESTIONS)
    assert stream._caches.trunk.held == plain._caches.trunk.held
    assert stream._caches.trunk.held[0] > alone._caches.trunk.held[0]
    assert {held for branch in stream._caches.branches for held in branch.held} == {alone._caches.branches[0].held[-1]}


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("method", ["none", "lightkv", "spacetime"])
def test_silent_layers_hold_all_text_and_no_vision(method, fold):
    model, config = tiny_model("qwen2_5_vl"), KEEPING[method]
    segments, _ = apart(model, tiny_sample("qwen2_5_vl", 0, 2))
    plain, _ = streamed(model, config, [segments])
    stream, _ = streamed(model, config, [segments], silent=frozenset({0, 3}), fold=fold)
    held = [*stream._caches.trunk.held, *stream._caches.branches[0].held]
    assert [number for number, count in enumerate(held) if not count] == [0, 3]
    there = words(torch.arange(80))
    for index in (0, 3):
        k, v, log_size = caches(stream)[index]
        assert torch.equal(log_size, torch.zeros(4))
        if method == "none":
            whole = caches(plain)[index]
            assert same_caches([(k, v)], [(whole[0][:, there], whole[1][:, there])], **CLOSE)


@pytest.mark.parametrize(
    ("limit", "most"), [("branches.TOKENS_AT_ONCE", 150), ("branches.TOKENS_AT_ONCE", 1), ("forward.KEYS_AT_ONCE", 0)]
)
@pytest.mark.parametrize("method", ["lightkv", "asked", "published, early"])
def test_results_do_not_depend_on_how_many_questions_run_together(method, limit, most, monkeypatch):
    model, config = tiny_model("qwen2_5_vl"), STAGED[method]
    segments, _ = apart(model, tiny_sample("qwen2_5_vl", 0, 2))
    together, layers = streamed(model, config, [segments[:2], segments[2:]], questions=QUESTIONS)
    monkeypatch.setattr(f"lightkv.engine.{limit}", most)
    apart_, _ = streamed(model, config, [segments[:2], segments[2:]], questions=QUESTIONS)
    with layers.attached():
        for one, other in zip(together.finish(), apart_.finish(), strict=True):
            torch.testing.assert_close(one.first, other.first, **CLOSE)
            assert one.held == other.held
            for a, b in zip(one.kv, other.kv, strict=True):
                same_caches([a.view()], [b.view()], **CLOSE)


# --- quantised caches ---


@pytest.mark.parametrize("method", ["none", "lightkv"])
@pytest.mark.parametrize("most", [40, 1000])
def test_quantised_caches_answer_about_the_same_and_eight_bits_better_than_four(method, most):
    model, config = tiny_model("qwen2_5_vl"), KEEPING[method]
    segments, question = apart(model, tiny_sample("qwen2_5_vl", 0, video=1))
    said = {
        bits: spoken(model, config, segments, question, Memory(bits=Bits(bits, group=16), chunk_tokens=most))[1][0]
        for bits in (16, 8, 4)
    }
    away = {bits: float((said[bits] - said[16]).norm() / said[16].norm()) for bits in (8, 4)}
    assert 0 < away[8] < 0.02
    assert 5 * away[8] < away[4]
    assert method != "none" or away[4] < 0.3  # with stages, a single different merge changes more


# --- steps that represent several ---


def test_a_step_with_count_three_is_three_equal_steps_merged():
    """On the embeddings, before any layer; all steps have the same time, so they share a position."""
    model = tiny_model("qwen2_5_vl")
    one, other = random(2, 1, 32, seed=3)
    config = LightKVConfig((Stage(-1, drop=0.51),), method="spacetime")  # 2 of 4
    thrice = Vision(torch.cat([one, one, one, other]), (4, 1, 1), interval_s=0.01)
    counted = Vision(torch.cat([one, other]), (2, 1, 1), counts=(3, 1), interval_s=0.01)
    before, after = [Text(torch.tensor([7, 8]))], [Text(torch.tensor([9, 10]))]
    joined, _ = streamed(model, config, [[*before, thrice, *after]])
    nothing, _ = streamed(model, without_drop(config), [[*before, counted, *after]])
    plain, _ = streamed(model, None, [[*before, counted, *after]])
    for stream in (nothing, plain):
        same_caches(caches(stream), caches(joined), atol=1e-5, rtol=1e-5)
        assert torch.equal(*(one.input._positions.text(1, taken=False) for one in (stream, joined)))
        assert (stream.input.vision_tokens, joined.input.vision_tokens) == (4, 4)
    assert caches(plain)[0][2].exp().tolist() == pytest.approx([1, 1, 3, 1, 1, 1])


def test_a_step_with_count_three_gets_the_attention_of_three_equal_steps():
    """At the start of a prompt, one token per step, all at one position: each attends only to equal keys."""
    model = tiny_model("qwen2_5_vl")
    one, question = random(1, 32, seed=3), torch.tensor([11, 12, 13])
    thrice = Vision(one.expand(3, -1), (3, 1, 1), interval_s=0.01)
    counted = Vision(one, (1, 1, 1), counts=(3,), interval_s=0.01)
    tokens, logits = spoken(model, None, [thrice], question)
    found, close = spoken(model, None, [counted], question)
    assert found == tokens
    torch.testing.assert_close(close, logits, **CLOSE)
    _, far = spoken(model, None, [Vision(one, (1, 1, 1))], question)
    assert float((far - logits).abs().max()) > 0.05
