"""The engine against `generate`, with and without `compress`, and against itself with one request at a time."""

import copy
import shutil
from dataclasses import replace
from functools import cache
from itertools import count, pairwise
from random import Random

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

from lightkv import (
    Bits,
    ConfigError,
    Engine,
    LightKVConfig,
    Memory,
    Request,
    Stage,
    Text,
    UnsupportedModelError,
    Vision,
)
from lightkv.engine.prefill import Stream
from lightkv.engine.slots import PackedSlots, PlainSlots
from tests.lightkv.engine.prompts import apart, ask, run, spoken
from tests.lightkv.engine.test_prefill import KEEPING, QUESTIONS
from tests.lightkv.hooks.test_generation import GREEDY, generate, new_tokens
from tests.lightkv.tiny import text_config, tiny_model, tiny_sample

LIGHTKV = replace(KEEPING["lightkv"], rounds=2)
CLOSE = dict(atol=2e-4, rtol=2e-4)
PROMPTS = {
    "llava, images": ("llava", (0, 2, 1), None),
    "llava, image": ("llava", (0,), None),
    "qwen2_vl, images": ("qwen2_vl", (0, 2), None),
    "qwen2_vl, video": ("qwen2_vl", (), 1),
    "qwen2_5_vl, image": ("qwen2_5_vl", (1,), None),
    "qwen2_5_vl, images, video": ("qwen2_5_vl", (1, 0), 0),
    "qwen2_5_vl, video": ("qwen2_5_vl", (), 1),
}
EVERYWHERE = ["none", "lightkv", "keep", "fastv"]
AT_FEW = ["llava, images", "qwen2_5_vl, images, video", "qwen2_vl, video"]


# --- against generate ---


@pytest.mark.parametrize(
    ("prompt", "method"),
    [(prompt, method) for prompt in PROMPTS for method in EVERYWHERE]
    + [(prompt, method) for prompt in AT_FEW for method in KEEPING if method not in (*EVERYWHERE, "evs")]
    + [("qwen2_vl, video", "evs"), ("qwen2_5_vl, video", "evs")],
)
def test_answers_are_those_of_generate(prompt, method):
    family, images, video = PROMPTS[prompt]
    model, config, sample = tiny_model(family), KEEPING[method], tiny_sample(family, *images, video=video)
    out = generate(model, sample, config)[0] if config else model.generate(**sample, **GREEDY)
    tokens, logits = spoken(model, config, *apart(model, sample))
    assert tokens == new_tokens(out, sample)[0].tolist()
    torch.testing.assert_close(logits, torch.cat(out.logits), **CLOSE)


@pytest.mark.parametrize("prompt", ["llava, images", "qwen2_5_vl, video"])
def test_a_repetition_penalty_that_comes_with_a_model_holds(prompt):
    family, images, video = PROMPTS[prompt]
    model, sample = copy.deepcopy(tiny_model(family)), tiny_sample(family, *images, video=video)
    segments, question = apart(model, sample)
    free = ask(model, None, segments, question, max_new_tokens=12)[0].tokens
    model.generation_config.repetition_penalty = 3.0
    wanted = new_tokens(model.generate(**sample, **{**GREEDY, "max_new_tokens": 12}), sample)[0].tolist()
    assert ask(model, None, segments, question, max_new_tokens=12)[0].tokens == wanted != free


@pytest.mark.parametrize("config", [None, LIGHTKV], ids=["plain", "lightkv"])
def test_time_between_frames_counts_as_in_generate(config):
    """Two videos and an image, 2 positions per second: the last video's positions exceed the question's."""
    model = copy.deepcopy(tiny_model("qwen2_5_vl"))
    model.config.vision_config.tokens_per_second = 2
    one, two = tiny_sample("qwen2_5_vl", 0, video=1, question=()), tiny_sample("qwen2_5_vl", video=0)
    sample = {
        name: torch.cat([x[name] for x in (one, two) if name in x], dim=int("ids" in name))
        for name in one
        if name != "attention_mask"
    }
    sample["second_per_grid_ts"] = torch.tensor([0.7, 2.5])
    out = generate(model, sample, config)[0] if config else model.generate(**sample, **GREEDY)
    del sample["second_per_grid_ts"]
    segments, question = apart(model, sample)
    seconds = iter([None, 0.7, 2.5])
    segments = [
        Vision(one.features, one.grid, interval_s=next(seconds)) if isinstance(one, Vision) else one for one in segments
    ]
    tokens, logits = spoken(model, config, segments, question)
    assert tokens == new_tokens(out, sample)[0].tolist()
    torch.testing.assert_close(logits, torch.cat(out.logits), **CLOSE)


def test_a_decoder_alone_answers_text():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(text_config("LlamaConfig")).eval()
    ids = torch.randint(1, 90, (1, 20))
    out = model.generate(input_ids=ids, **GREEDY)
    for before in (0, 1, 17):
        for bits in (16, 8):
            memory = Memory(bits=Bits(bits, group=32))  # no prompt here fills a group
            tokens, logits = spoken(model, None, [Text(ids[0, :before])], ids[0, before:], memory)
            if bits == 16 or not before:
                assert tokens == out.sequences[0, 20:].tolist()
                torch.testing.assert_close(logits, torch.cat(out.logits), **CLOSE)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("silent", [frozenset(), frozenset({0, 3})])
@pytest.mark.parametrize("segments", [[], [Text(torch.empty(0, dtype=torch.int64))]], ids=["nothing", "no text"])
def test_a_question_may_be_all_there_is(segments, silent, bits):
    model = tiny_model("qwen2_5_vl")
    sample = tiny_sample("qwen2_5_vl", question=())
    out = model.generate(**sample, **GREEDY)
    memory = Memory(bits=Bits(bits, group=16), silent=silent)
    (answer,) = ask(model, LIGHTKV, segments, sample["input_ids"][0], memory=memory, traced=True)
    assert answer.tokens == new_tokens(out, sample)[0].tolist()
    assert (answer.retention, answer.kept_tokens, answer.prompt_tokens) == (1.0, 0, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_in_their_dtype(dtype):
    model = copy.deepcopy(tiny_model("qwen2_5_vl")).to(dtype)
    sample = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tiny_sample("qwen2_5_vl", 0, 1).items()}
    segments, question = apart(model, sample)
    for config in (None, LIGHTKV):
        for bits in (16, 8):
            memory = Memory(bits=Bits(bits, group=16), fold=True, chunk_tokens=60)
            tokens, logits = spoken(model, config, segments, question, memory)
            assert bool(logits.isfinite().all())
            assert len(tokens) == 6
    (answer,) = ask(model, None, segments, question)
    assert answer.kv_bytes == answer.kv_bytes_uncompressed == 5 * 2 * sample["input_ids"].numel() * 2 * 8 * 2


def test_an_answer_ends_with_its_stop_token():
    model = copy.copy(tiny_model("llava"))
    sample = tiny_sample("llava", 0)
    segments, question = apart(model, sample)
    free = ask(model, None, segments, question)[0].tokens
    first = free[3]
    for stop in (first, [first, 1]):
        model.generation_config = copy.copy(model.generation_config)
        model.generation_config.eos_token_id = stop
        (answer,) = ask(model, None, segments, question)
        assert (answer.tokens, answer.stopped) == (free[: free.index(first) + 1], True)
    (answer,) = ask(model, None, segments, question, max_new_tokens=1)
    assert (answer.tokens, answer.stopped) == (free[:1], free[0] == first)


# --- together and alone ---


@cache
def pool():
    """Prompts of very different lengths."""
    family = "qwen2_5_vl"
    samples = [
        tiny_sample(family, 0),
        tiny_sample(family, 1, 2, video=0, question=[40, 41, 42]),
        tiny_sample(family, question=[3, 4, 5]),
        tiny_sample(family, video=1, question=[50, 60, 70]),
        tiny_sample(family, 2, question=[1, 2, 3]),
    ]
    return [apart(tiny_model(family), sample) for sample in samples]


def requests_of_pool(temperature=0.0):
    seeds = [7] if temperature else None
    return [
        Request(number, segments, [question], (2, 7, 4, 9, 5)[number], temperature, seeds)
        for number, (segments, question) in enumerate(pool())
    ]


@cache
def alone(config, memory, temperature=0.0):
    """The answers to the pool, one by one."""
    model = tiny_model("qwen2_5_vl")
    return [run(Engine(model, config, memory), one)[one.key].answers[0].tokens for one in requests_of_pool(temperature)]


def answers_of(results):
    return [results[number].answers[0].tokens for number in range(5)]


def arriving(segments, draw):
    """The segments, with None before some of them."""
    for segment in segments:
        for _ in range(draw.randint(0, 3)):
            yield None
        yield segment
    for _ in range(draw.randint(0, 3)):
        yield None


@pytest.mark.parametrize("answers", [1, 3, 16])
@pytest.mark.parametrize(("temperature", "bits"), [(0.0, 16), (0.8, 8)])
def test_answers_do_not_depend_on_the_other_requests(temperature, bits, answers):
    memory = Memory(bits=Bits(bits, group=16), answers=answers, chunk_tokens=60)
    for seed in range(2):
        draw = Random(seed)
        requests = [
            replace(one, segments=arriving(one.segments, draw)) for one in draw.sample(requests_of_pool(temperature), 5)
        ]
        results = run(Engine(tiny_model("qwen2_5_vl"), LIGHTKV, memory), *requests)
        assert answers_of(results) == alone(LIGHTKV, memory, temperature)


def test_a_seed_is_a_draw_of_its_own():
    model = tiny_model("llava")
    segments, question = apart(model, tiny_sample("llava", 0))
    options = dict(temperature=1.0, max_new_tokens=12)
    several = ask(model, None, segments, *[question] * 4, seeds=[1, 2, 3, 1], **options)
    assert several[0].tokens == several[3].tokens
    assert len({tuple(answer.tokens) for answer in several}) == 3
    assert ask(model, None, segments, question, seeds=[2], **options)[0].tokens == several[1].tokens


def test_sampling_draws_from_the_models_distribution():
    model = tiny_model("llava")
    segments, question = apart(model, tiny_sample("llava", 0))
    _, logits = spoken(model, None, segments, question, max_new_tokens=1)
    drawn = ask(model, None, segments, *[question] * 200, seeds=range(200), temperature=1.0, max_new_tokens=1)
    counts = torch.bincount(torch.tensor([answer.tokens[0] for answer in drawn]), minlength=logits.shape[1])
    expected = logits[0].softmax(-1)
    top = expected.argmax()
    assert counts[top] / 200 == pytest.approx(float(expected[top]), abs=0.1)
    assert float((counts / 200 - expected).abs().sum()) < 0.6


class Watched:
    """Segments that append to `seen` when they are requested."""

    def __init__(self, seen, key, segments):
        self.seen, self.key, self.segments = seen, key, segments

    def __iter__(self):
        for segment in self.segments:
            self.seen.append(self.key)
            yield segment


def test_answers_continue_while_another_prompt_is_not_ready():
    model = tiny_model("llava")
    (first, question), (second, _) = (apart(model, tiny_sample("llava", n)) for n in (0, 1))
    seen = []
    waiting = [*second[:1], *[None] * 40, *second[1:]]
    requests = [
        Request("there", first, [question], max_new_tokens=20),
        Request("late", Watched(seen, "late", waiting), [question], max_new_tokens=3),
    ]
    order = []
    for result in Engine(model, None).run(requests):
        assert result.error is None
        order.append((result.key, len(seen)))
    assert [key for key, _ in order] == ["there", "late"]
    assert order[0][1] < len(waiting)


def test_with_nothing_to_compute_the_engine_waits_and_calls_beat():
    model = tiny_model("llava")
    segments, question = apart(model, tiny_sample("llava", 0))
    waits = Request("waits", [*segments[:1], *[None] * 5, *segments[1:]], [question], max_new_tokens=2)
    beats = count()
    (result,) = Engine(model, None).run([waits], beat=beats.__next__)
    assert result.error is None
    assert result.waited_s > 0
    assert next(beats) >= 5 + 2
    assert result.answers[0].tokens == ask(model, None, segments, question, max_new_tokens=2)[0].tokens


def test_answers_continue_while_no_further_request_is_ready():
    model = tiny_model("llava")
    segments, question = apart(model, tiny_sample("llava", 0))
    ended = []

    def requests():
        yield from [None, Request(0, segments, [question], max_new_tokens=3)]
        while not ended:
            yield None
        yield Request(1, segments, [question], max_new_tokens=3)

    for result in Engine(model, None).run(requests()):
        assert result.error is None
        ended.append(result.answers[0].tokens)
    assert ended == [ask(model, None, segments, question, max_new_tokens=3)[0].tokens] * 2


@pytest.mark.parametrize(("most", "pieces"), [(40, 12), (64, 12), (130, 6), (1000, 1)])
def test_every_piece_of_a_long_prompt_calls_beat(most, pieces):
    model = tiny_model("llava")
    (_, image, _), question = apart(model, tiny_sample("llava", 0))
    long = Vision(image.features.repeat(12, 1), (12, 8, 8))
    for segments in ([long], [image] * 12):
        beats, engine = count(), Engine(model, None, Memory(chunk_tokens=most))
        (result,) = engine.run([Request(0, segments, [question], 1)], beat=beats.__next__)
        assert result.error is None
        assert next(beats) >= pieces


def in_flight(model, requests, memory):
    """The most requests that the engine held at once."""
    begun, most, done = [], 0, 0

    def noted(request):
        begun.append(request.key)
        yield from request.segments

    requests = [Request(one.key, noted(one), one.questions, 6, alone=one.alone) for one in requests]
    for result in Engine(model, LIGHTKV, memory).run(iter(requests)):
        assert result.error is None
        most, done = max(most, len(begun) - done), done + 1
    assert done == len(requests)
    return most


def parts_of(image, number, seen, key, late=0):
    """A video of `number` pieces, each noted in `seen` when requested; the first `late` polls return None."""
    yield from [None] * late
    for step in range(number):
        seen.append(key)
        yield Vision(image.features, (1, 8, 8), first=step)


def requests_of_pieces(seen, *pieces, new=2, late=()):
    """The model and requests with these numbers of pieces, in this order."""
    model = tiny_model("llava")
    (_, image, _), question = apart(model, tiny_sample("llava", 0))
    requests = [
        Request(number, parts_of(image, count, seen, number, 20 * (number in late)), [question], new)
        for number, count in enumerate(pieces)
    ]
    return model, requests


def test_short_requests_overtake_a_long_one_that_continues():
    seen = []
    model, requests = requests_of_pieces(seen, 24, 1, 1, 1, 1)
    ended = []
    for result in Engine(model, None, Memory(chunk_tokens=64)).run(requests):
        assert result.error is None
        ended.append((result.key, seen.count(0)))
    assert [key for key, _ in ended] == [1, 2, 3, 4, 0]
    assert ended[0][1] <= 6, "the first short one is through after some pieces of the long one"
    assert ended[3][1] >= 2, "which are not put off meanwhile"


def test_requests_whose_pieces_are_ready_take_turns():
    seen = []
    model, requests = requests_of_pieces(seen, 6, 6, 6)
    assert not any(result.error for result in Engine(model, None, Memory(chunk_tokens=64)).run(requests))
    places = {key: [place for place, one in enumerate(seen) if one == key] for key in range(3)}
    assert all(later - earlier <= 4 for of in places.values() for earlier, later in pairwise(of))


def test_a_request_with_late_segments_blocks_no_other():
    seen = []
    model, requests = requests_of_pieces(seen, 2, 2, 2, late={0})
    ended = [result.key for result in Engine(model, None, Memory(chunk_tokens=64)).run(requests)]
    assert ended == [1, 2, 0]


def test_while_the_caches_are_full_only_the_oldest_request_continues():
    seen = []
    model, requests = requests_of_pieces(seen, 5, 5, 5)
    memory = Memory(chunk_tokens=64, cache_bytes=1)
    ended = [result.key for result in Engine(model, None, memory).run(requests)]
    assert ended == [0, 1, 2]
    assert seen == [0] * 5 + [1] * 5 + [2] * 5


def test_smaller_pieces_grow_again_once_memory_suffices(monkeypatch):
    monkeypatch.setattr(Stream, "take", full_above(100))
    monkeypatch.setattr("lightkv.engine.intake.REGROW_PIECES", 4)
    seen = []
    model, requests = requests_of_pieces(seen, 12, 4)
    engine = Engine(model, None, Memory(chunk_tokens=192))
    assert not any(result.error for result in engine.run(requests))
    monkeypatch.setattr(Stream, "take", full_above(10_000))
    model, requests = requests_of_pieces(seen, 24)
    assert not any(result.error for result in engine.run(requests))
    assert engine.chunk_tokens == 192


def test_memory_bounds_how_many_requests_are_in_the_engine():
    model = tiny_model("qwen2_5_vl")
    requests = requests_of_pool()
    assert in_flight(model, requests, Memory()) == 5
    assert in_flight(model, requests, Memory(cache_bytes=1)) == 1
    assert in_flight(model, requests, Memory(answers=2)) <= 3


def test_an_alone_request_runs_without_others():
    model = tiny_model("qwen2_5_vl")
    for lone in (0, 3):
        begun, live = [], set()

        def noted(key, segments, live=live, begun=begun):
            live.add(key)
            begun.append(set(live))
            yield from segments

        requests = [
            replace(one, segments=noted(one.key, one.segments), alone=one.key == lone) for one in requests_of_pool()
        ]
        for result in Engine(model, LIGHTKV).run(requests):
            assert result.answers[0].tokens == alone(LIGHTKV, Memory())[result.key]
            live.discard(result.key)
        assert all(beside == {lone} for beside in begun if lone in beside)
        assert max(len(beside) for beside in begun) > 1


def test_keys_need_not_differ():
    model = tiny_model("qwen2_5_vl")
    requests = [Request(None, one.segments, one.questions, 6) for one in requests_of_pool()]
    results = list(Engine(model, LIGHTKV).run(requests))
    assert [result.key for result in results] == [None] * 5
    assert all(result.error is None for result in results)


def test_two_runs_on_one_model_are_independent():
    model = tiny_model("qwen2_5_vl")
    runs = {config: Engine(model, config).run(requests_of_pool()) for config in (None, LIGHTKV)}
    for results in zip(*runs.values(), strict=True):
        for config, result in zip(runs, results, strict=True):
            assert result.answers[0].tokens == alone(config, Memory())[result.key]


# --- what fails ---


def broken(segments, error):
    yield from segments
    raise error


def others_are_answered(bad, config=LIGHTKV, memory=None):
    """The error of a bad request; checks that the other requests' answers are unchanged."""
    engine, requests = Engine(tiny_model("qwen2_5_vl"), config, memory), requests_of_pool()
    results = {one.key: one for one in engine.run([*requests[:2], bad, *requests[2:]])}
    failed = results.pop("bad")
    assert failed.answers == []
    assert answers_of(results) == alone(config, memory or Memory())
    return failed.error


@pytest.mark.parametrize("after", [0, 1, 3])
def test_segments_that_raise_end_their_own_request(after):
    segments, _ = pool()[1]
    gone = OSError("the video broke off")
    bad = Request("bad", broken(segments[:after], gone), QUESTIONS[:1])
    assert others_are_answered(bad, memory=Memory(chunk_tokens=20)) is gone


def features_of(dims, fill=0.0):
    return Vision(torch.full((6, dims), fill), (1, 2, 3))


@pytest.mark.parametrize(
    ("segments", "questions"),
    [
        ([features_of(31)], [[5, 6]]),  # wrong hidden size
        ([Text(torch.tensor([5000]))], [[5, 6]]),  # no such token
        ([features_of(32)], [[5, 6], [5000]]),
        (None, [[5]]),
        ([torch.tensor([1])], [[5]]),
        ([Vision(torch.ones(6, 32), (1, 2, 3), first=4)], [[5]]),  # an item without its beginning
    ],
)
def test_a_request_that_cannot_be_answered_is_its_own_failure(segments, questions):
    bad = Request("bad", segments, [torch.tensor(ids) for ids in questions])
    assert isinstance(others_are_answered(bad), Exception)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("config", [None, LIGHTKV], ids=["plain", "lightkv"])
def test_nan_logits_are_an_error_not_an_answer(config, temperature):
    bad = Request("bad", [features_of(32, torch.nan)], QUESTIONS, temperature=temperature, seeds=[1, 2, 3])
    assert isinstance(others_are_answered(bad, config), FloatingPointError)


def test_nan_logits_while_decoding_end_only_their_request():
    engine = Engine(tiny_model("qwen2_5_vl"), LIGHTKV)
    logits, poisoned = engine.layers.logits, []

    def poison_once(hidden):
        said = logits(hidden)
        if hidden.ndim == 2 and len(said) > 2 and not poisoned:  # the first step with the bad request
            poisoned.append(len(said))
            said[2] = torch.nan
        return said

    engine.layers.logits = poison_once
    requests = requests_of_pool()
    bad = Request("bad", pool()[0][0], QUESTIONS, max_new_tokens=30)
    results = {one.key: one for one in engine.run([requests[0], bad, *requests[1:]])}
    assert poisoned
    assert isinstance(results["bad"].error, FloatingPointError)
    assert results["bad"].answers == []
    assert answers_of(results) == alone(LIGHTKV, Memory())


def test_a_failed_decode_step_is_the_result_of_all_its_requests():
    model = tiny_model("qwen2_5_vl")
    requests, expected = requests_of_pool(), alone(LIGHTKV, Memory())
    engine = Engine(model, LIGHTKV, Memory(answers=2))
    run_layers, steps = engine.layers.run, []

    def fails_once(hidden, angles, which, attend):
        if hidden.shape[1] == 1 and len(which) == len(engine.layers) and hidden.shape[0] == 2:
            steps.append(None)
            if len(steps) == 2:
                run_layers(hidden, angles, range(3), attend)  # some layers have already run
                raise ValueError("a kernel failed")
        return run_layers(hidden, angles, which, attend)

    engine.layers.run = fails_once
    results = {one.key: one for one in engine.run(requests)}
    failed = [key for key, result in results.items() if result.error is not None]
    assert len(failed) == 2
    assert all(str(results[key].error) == "a kernel failed" for key in failed)
    assert all(results[key].answers[0].tokens == expected[key] for key in results if key not in failed)
    assert set(results) == set(range(5))


def full_above(most, take=Stream.take):
    def taking(self, segments):
        if sum(len(segment) for segment in segments) > most:
            raise torch.OutOfMemoryError("out of memory")
        take(self, segments)

    return taking


@pytest.mark.parametrize("most", [24, 40, 64, 100])
def test_where_memory_runs_out_pieces_become_smaller_and_the_answer_stays(most, monkeypatch):
    model = tiny_model("qwen2_5_vl")
    words = Text(torch.arange(1, 50))
    segments, question = apart(model, tiny_sample("qwen2_5_vl", video=1))
    segments = [words, *segments, words]
    expected, logits = spoken(model, None, segments, question)
    monkeypatch.setattr(Stream, "take", full_above(most))
    tokens, found = spoken(model, None, segments, question)
    assert tokens == expected
    torch.testing.assert_close(found, logits, **CLOSE)
    engine = Engine(model, None)
    run(engine, Request(0, segments, [question], 1))
    assert 1 <= engine.chunk_tokens <= most
    assert run(engine, Request(0, segments, [question], 6))[0].answers[0].tokens == expected


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_in_the_middle_of_a_piece_is_undone_and_retried(error):
    """Memory runs out inside a layer: entries already pushed are removed."""
    model = tiny_model("qwen2_5_vl")
    segments, question = apart(model, tiny_sample("qwen2_5_vl", 1, video=1))
    expected = ask(model, None, segments, question)[0].tokens
    engine = Engine(model, None)
    run_layers = engine.layers.run

    def full(hidden, angles, which, attend):
        if hidden.shape[1] > 40:
            run_layers(hidden, angles, which[:3], attend)
            raise error
        return run_layers(hidden, angles, which, attend)

    engine.layers.run = full
    assert run(engine, Request(0, segments, [question], 6))[0].answers[0].tokens == expected


def test_an_image_that_does_not_fit_by_itself_is_an_error(monkeypatch):
    monkeypatch.setattr(Stream, "take", full_above(50))
    model = tiny_model("llava")
    segments, question = apart(model, tiny_sample("llava", 0))
    (result,) = Engine(model, None).run([Request(0, segments, [question])])
    assert isinstance(result.error, torch.OutOfMemoryError)
    assert "one image or step of a video of 64 tokens" in str(result.error)
    text = [*segments[:1], Vision(segments[1].features[:16], (1, 4, 4))]
    assert run(Engine(model, None), Request(0, text, [question]))[0].error is None


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_where_memory_runs_out_on_rows_fewer_are_answered_together(most, bits, monkeypatch):
    model = tiny_model("qwen2_5_vl")
    kind = PlainSlots if bits == 16 else PackedSlots
    memory = Memory(bits=Bits(bits, group=16))
    requests, expected = requests_of_pool(), alone(LIGHTKV, memory)
    admit, rows = kind.admit, []

    def full(self, prompts, **options):
        admit(self, prompts, **options)
        if len(self) > most:
            raise torch.OutOfMemoryError("out of memory")
        rows.append(len(self))

    monkeypatch.setattr(kind, "admit", full)
    engine = Engine(model, LIGHTKV, memory)
    asked = (QUESTIONS * 3)[:8]
    several = Request("several", requests[0].segments, asked, 4)
    results = run(engine, several, *requests)
    assert answers_of(results) == expected
    assert most / 2 < max(rows) <= most
    once = ask(model, LIGHTKV, requests[0].segments, *QUESTIONS, memory=memory, max_new_tokens=4)
    assert [answer.tokens for answer in results["several"].answers] == ([answer.tokens for answer in once] * 3)[:8]


def test_a_row_that_does_not_fit_by_itself_is_an_error(monkeypatch):
    def full(self, prompts, **options):
        raise torch.OutOfMemoryError("out of memory")

    model = tiny_model("llava")
    segments, question = apart(model, tiny_sample("llava", 0))
    monkeypatch.setattr(PlainSlots, "admit", full)
    requests = [Request(number, segments, [question, question]) for number in range(3)]
    results = list(Engine(model, None).run(requests))
    assert sorted(result.key for result in results) == [0, 1, 2]
    assert all(isinstance(result.error, torch.OutOfMemoryError) for result in results)


def test_a_lost_device_is_raised(monkeypatch):
    def lost(self, segments):
        raise torch.AcceleratorError("device lost")

    model = tiny_model("llava")
    monkeypatch.setattr(Stream, "take", lost)
    with pytest.raises(torch.AcceleratorError):
        list(Engine(model, None).run([Request(0, [Text(torch.tensor([1]))], [torch.tensor([1])])]))


# --- the model is restored ---


def state(model):
    decoder = model.get_decoder()
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), module.__dict__.get("forward"))
        for name, module in model.named_modules()
    ]
    return decoder.config._attn_implementation, model.config._attn_implementation, hooks, torch.is_grad_enabled()


@pytest.mark.parametrize("ending", ["exhausted", "failed", "raised", "abandoned", "dropped"])
def test_the_model_is_as_it_was_before(ending, monkeypatch):
    model = tiny_model("qwen2_5_vl")
    sample = tiny_sample("qwen2_5_vl", 0, 1)
    before, out = state(model), model.generate(**sample, **GREEDY)
    requests = requests_of_pool()
    closed = []

    def segments(request):
        try:
            yield from request.segments
            if ending == "failed":
                raise OSError
            yield from [None] * 3
        finally:
            closed.append(request.key)

    requests = [Request(one.key, segments(one), one.questions, 6) for one in requests]
    engine = Engine(model, LIGHTKV, Memory(chunk_tokens=50))
    if ending == "raised":
        run_layers, calls = engine.layers.run, []

        def lost(*args):
            calls.append(None)
            if len(calls) > 20:
                raise torch.AcceleratorError("device lost")
            return run_layers(*args)

        engine.layers.run = lost
        with pytest.raises(torch.AcceleratorError):
            list(engine.run(requests))
    elif ending in ("abandoned", "dropped"):
        results = engine.run(requests)
        next(results)
        assert state(model) == before
        if ending == "abandoned":
            results.close()
        del results
        assert len(closed) < 5
        requests = None  # the generators close with their last reference
    else:
        results = list(engine.run(requests))
        assert all((result.error is None) == (ending == "exhausted") for result in results)
        assert len(closed) == 5
    assert state(model) == before
    again = model.generate(**sample, **GREEDY)
    assert torch.equal(torch.cat(again.logits), torch.cat(out.logits))


def test_gradients_are_off_only_inside():
    model = tiny_model("llava")
    segments, question = apart(model, tiny_sample("llava", 0))
    requests = [Request(number, segments, [question], 2) for number in range(3)]
    for result in Engine(model, None).run(requests):
        assert torch.is_grad_enabled()
        assert result.error is None


def test_compress_and_the_engine_take_turns():
    model = tiny_model("qwen2_5_vl")
    sample = tiny_sample("qwen2_5_vl", 0, 1)
    segments, question = apart(model, sample)
    expected = generate(model, sample, LIGHTKV)[0].sequences
    for _ in range(2):
        assert ask(model, LIGHTKV, segments, question)[0].tokens == expected[0, -6:].tolist()
        assert torch.equal(generate(model, sample, LIGHTKV)[0].sequences, expected)


# --- what is refused ---


def test_models_that_the_engine_cannot_run_are_refused():
    with pytest.raises(UnsupportedModelError, match="qwen3_vl takes vision inside its layers too"):
        Engine(tiny_model("qwen3_vl"), None)
    mistral = dict(num_hidden_layers=2, sliding_window=8)
    for kind, options, message in [
        ("Mistral", mistral, "sliding-window attention is not supported"),
        ("Gemma2", {}, "must use full attention, this decoder has .*sliding"),
        ("Llama", dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic RoPE"),
    ]:
        model = getattr(transformers, f"{kind}ForCausalLM")(text_config(f"{kind}Config", **options))
        with pytest.raises(UnsupportedModelError, match=message):
            Engine(model, None)


@pytest.mark.parametrize(
    ("config", "memory", "message"),
    [
        (LightKVConfig((Stage(1),), positions="compact"), None, 'positions="keep"'),
        (LightKVConfig((Stage(4),)), None, "a stage after layer 4 is not possible"),
        (None, Memory(silent=frozenset({5})), r"silent layers must be of 0 … 4, got \[5\]"),
        (None, Memory(silent=frozenset({-1})), r"got \[-1\]"),
        (None, Memory(bits=Bits(8, value_group=3)), "value_group must divide the head dimension, 8"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_at_once(config, memory, message):
    with pytest.raises(ConfigError, match=message):
        Engine(tiny_model("llava"), config, memory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(chunk_tokens=0), "chunk_tokens and answers must be at least 1, got 0 and 16"),
        (dict(answers=0), "got 4096 and 0"),
    ],
)
def test_memory_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Memory(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(questions=[]), "at least one question"),
        (dict(questions=[torch.tensor([1]), torch.empty(0, dtype=torch.int64)]), "every question at least one token"),
        (dict(questions=[torch.tensor([[1, 2]])]), r"int64 \[T\]"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (dict(temperature=-1.0), "temperature a number of at least 0"),
        (dict(seeds=[1, 2]), "expected a seed per question, 1, got 2"),
    ],
)
def test_requests_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Request(**{"key": 0, "segments": [], "questions": [torch.tensor([1])], **options})


def test_a_layer_that_attends_by_itself_is_refused(monkeypatch):
    model = copy.deepcopy(tiny_model("llava"))
    attention = model.get_decoder().layers[2].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    (result,) = Engine(model, None).run([Request(0, [Text(torch.tensor([1, 2]))], [torch.tensor([3])])])
    assert isinstance(result.error, UnsupportedModelError)
    assert "layer 2 did not run its attention through AttentionInterface" in str(result.error)


# --- compiled ---


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # from torch.compile itself
def test_compiled_steps_give_the_same_answers():
    """With several answers at once, and with one."""
    model = tiny_model("qwen2_5_vl")
    engine = Engine(model, LIGHTKV, compiled=True)
    counters.clear()
    assert answers_of(run(engine, *requests_of_pool())) == alone(LIGHTKV, Memory())
    assert counters["stats"]["calls_captured"] > 20  # operations in compiled graphs
    (longest,) = requests_of_pool()[1:2]
    assert run(engine, longest)[1].answers[0].tokens == alone(LIGHTKV, Memory())[1]
