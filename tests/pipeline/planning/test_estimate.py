"""Tests of estimates: the cost of a plan equals what decoding and the model's shape give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lightkv
from pipeline.captioning.captioner import lightkv_config
from pipeline.captioning.encode import encoder_for
from pipeline.captioning.models import describe
from pipeline.config import Frames, load_config
from pipeline.decoding.frames import choose_frames
from pipeline.planning.estimate import Totals, estimate_plan, expected_frames
from pipeline.schema import units_table
from tests.models import save_tiny_llava

QUESTION = [{"prompt_id": "q", "prompt": "what is this"}]


def unit(number, **changes):
    video = {
        "id": str(number),
        "kind": "video",
        "uris": [f"{number}.mp4"],
        "prompts": QUESTION,
        "attempts": 0,
        "duration_s": 10.0,
        "width": 640,
        "height": 360,
        "fps": 24.0,
        "size_bytes": 1000,
    }
    return video | changes


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    folder = save_tiny_llava(tmp_path_factory.mktemp("model"))
    job = load_config(None, ["source.uri=a", "sink.uri=b", f"model.path={folder}"])
    return describe(job.model)


def summary(units, card=None, *overrides):
    job = load_config(None, ["source.uri=a", "sink.uri=b", *overrides])
    if card is None:
        return estimate_plan(units_table(units), job)
    return estimate_plan(
        units_table(units),
        job,
        model_config=card.config,
        encoder=encoder_for(card.config, card.preprocessor),
        compression=lightkv_config(job, card.config),
    )


@settings(deadline=None)
@given(st.integers(1, 400), st.sampled_from([10, 24, 25, 30]), st.integers(1, 5), st.integers(1, 64), st.booleans())
def test_expected_frames_are_those_that_will_be_chosen(count, fps, per_second, cap, uniform):
    rule = Frames(
        strategy="uniform" if uniform else "fps", fps=per_second, count=cap, max_frames=cap, min_frames=min(2, cap)
    )
    chosen = choose_frames(np.arange(count) / fps, None, None, rule)
    assert expected_frames(count / fps, fps, rule) == len(chosen)


def test_units_files_and_hours_are_added_up_by_kind():
    clips = [unit(n, uris=["same.mp4"], start_s=n * 4.0, end_s=n * 4.0 + 4) for n in range(3)]
    images = unit(9, kind="images", uris=["a.png", "b.png"], duration_s=None, fps=None, size_bytes=50)
    broken = unit(10, duration_s=None, width=None, height=None, fps=None, probe_error="decode: NotAVideo: x")
    found = summary([*clips, images, broken])
    assert found.by_kind["video"].units == 4
    assert found.by_kind["images"] == Totals(units=1, videos=2, bytes=50, frames=2)
    total = found.total
    assert (total.units, total.unprobed, total.videos, total.bytes) == (5, 1, 4, 1000 + 50 + 1000)
    assert total.hours == pytest.approx(10 / 3600)  # the last clip ends with the video
    assert total.frames == 4 + 4 + 2 + 2
    assert (total.vision_tokens, total.kv_bytes, total.flops) == (0, 0, 0)
    assert found.probe_errors == {"10.mp4": "decode: NotAVideo: x"}


def test_tokens_and_costs_are_those_of_the_model(card):
    found = summary([unit(0)], card, "frames.fps=1", "lightkv.retention=0.6").total
    assert found.frames == 10
    assert found.vision_tokens == 10 * 16
    plain = lightkv.estimate(card.config, vision_tokens=160, text_tokens=found.text_tokens, config=None)
    assert (found.kv_bytes_uncompressed, found.flops_uncompressed) == (plain.kv_bytes, plain.flops)
    schedule = lightkv.LightKVConfig.for_model(card.config, retention=0.6)
    less = lightkv.estimate(card.config, vision_tokens=160, text_tokens=found.text_tokens, config=schedule)
    assert (found.kv_bytes, found.flops) == (less.kv_bytes, less.flops)
    assert found.flops < plain.flops


@pytest.mark.parametrize("method", ["lightkv", "spacetime", "published"])
def test_every_method_keeps_the_share_that_was_asked(card, method):
    found = summary([unit(0)], card, f"lightkv.method={method}", "lightkv.retention=0.6").total
    per_token = found.kv_bytes_uncompressed / (160 + found.text_tokens)
    vision = found.kv_bytes - per_token * found.text_tokens
    assert vision == pytest.approx(0.6 * 160 * per_token, rel=0.01)
    assert 0.6 * found.flops_uncompressed < found.flops < found.flops_uncompressed


def test_without_compression_both_figures_agree(card):
    found = summary([unit(0)], card, "lightkv.enabled=false").total
    assert found.kv_bytes == found.kv_bytes_uncompressed > 0
    assert found.flops == found.flops_uncompressed > 0


def test_every_prompt_is_prefilled_and_one_cache_is_held(card):
    one = summary([unit(0)], card).total
    both = summary([unit(0, prompts=[*QUESTION, {"prompt_id": "r", "prompt": "what is this"}])], card).total
    assert both.flops == 2 * one.flops
    assert both.kv_bytes == one.kv_bytes


def test_the_largest_unit_is_told_apart_from_the_sum(card):
    found = summary([unit(0), unit(1, duration_s=100.0)], card).total
    long = summary([unit(1, duration_s=100.0)], card).total
    assert found.largest_kv_bytes == long.kv_bytes
    assert found.kv_bytes > long.kv_bytes


def test_float32_takes_twice_the_bytes(card):
    narrow, wide = (summary([unit(0)], card, f"model.dtype={d}").total for d in ("bfloat16", "float32"))
    assert wide.kv_bytes == 2 * narrow.kv_bytes


def test_an_image_set_counts_every_image(card):
    images = unit(0, kind="images", uris=["a.png", "b.png", "c.png"], duration_s=None, fps=None)
    assert summary([images], card).total.vision_tokens == 3 * 16


def test_what_the_engine_does_to_its_cache_is_counted(card):
    def kv(*overrides):
        return summary([unit(0)], card, "lightkv.retention=0.5", "lightkv.method=spacetime", *overrides).total.kv_bytes

    usual = kv()
    whole = summary([unit(0)], card, "lightkv.enabled=false").total
    text = whole.kv_bytes_uncompressed * whole.text_tokens // (whole.vision_tokens + whole.text_tokens)
    assert kv("engine.fold=true") < usual
    packed = kv("engine.kv_bits=4", "engine.kv_group=32")
    assert text < packed < text + (usual - text) / 2
    layers = card.config.get_text_config().num_hidden_layers
    silent = kv("lightkv.enabled=false", "engine.silent_layers=[0]")
    assert silent - text == pytest.approx((whole.kv_bytes - text) * (layers - 1) / layers, rel=0.01)
    assert kv("budget.kv_bytes=3000") - text == pytest.approx(3000, rel=0.01)
