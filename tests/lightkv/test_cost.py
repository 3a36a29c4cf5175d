import runpy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from lightkv import ConfigError, LightKVConfig, Stage, VisionLayout, compress, estimate
from lightkv import paper as published
from lightkv.paper import PUBLISHED_MODELS
from tests.lightkv.tiny import TINY, tiny_model, tiny_sample

SCHEDULES = {
    "plain": LightKVConfig(()),
    "halves": LightKVConfig((Stage(0, 4, 0.5), Stage(1, 2, 0.5), Stage(3, 1, 0.5))),
    "steep": LightKVConfig((Stage(1, 1, 0.75), Stage(2, 1, 0.8)), guidance="uniform"),
    "to the token": LightKVConfig((Stage(0, 4, 0.37), Stage(1, 2, 0.6), Stage(3, 1, 0.5)), budget="item"),
    "in space and time": LightKVConfig(
        (Stage(-1, drop=0.6), Stage(1, drop=0.5), Stage(3, drop=0.9)), method="spacetime"
    ),
    "by the question": LightKVConfig((Stage(-1, drop=0.4), Stage(0, drop=0.3)), method="lightkv"),
    "all by one matching": LightKVConfig((Stage(-1, drop=0.8),), method="tome"),
    "by the last query": LightKVConfig((Stage(1, drop=0.8),), method="fastv"),
    "by a draw": LightKVConfig((Stage(-1, drop=0.8),), method="random"),
    "spatiotemporal": LightKVConfig((Stage(0, 4, 0.5), Stage(2, 2, 0.5)), windows="spatiotemporal", window_frames=2),
}


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()  # all its products are counted


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flops_and_bytes_are_those_of_a_real_prefill(decoder, schedule):
    config, text, frames = SCHEDULES[schedule], 40, 4
    layout = VisionLayout.grids([(10, frames, 8, 8)], 256 + text)
    with (
        compress(decoder, config, layouts=[layout]) as report,
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        decoder(inputs_embeds=torch.randn(1, 256 + text, 64), logits_to_keep=1)
    cost = estimate(decoder.config, vision_tokens=256, text_tokens=text, config=config, dtype_bytes=4, frames=frames)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert cost.kv_bytes == report.kv_bytes
    assert cost.retention == pytest.approx(report.retention)
    plain = estimate(decoder.config, vision_tokens=256, text_tokens=text, config=None, dtype_bytes=4)
    assert plain.kv_bytes == report.kv_bytes_uncompressed
    on_embeddings = [stage for stage in report.stages if stage.layer == -1]
    assert cost.per_layer[0].tokens == text + (on_embeddings[0].tokens_after if on_embeddings else 256)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_composite_configs_need_no_weights(family):
    model, config = tiny_model(family), LightKVConfig((Stage(1, 1, 0.5),))
    sample = tiny_sample(family, 0)
    with compress(model, config) as report:
        model.generate(**sample, max_new_tokens=1)
    text = sample["input_ids"].shape[1] - report.vision_tokens
    cost = estimate(
        TINY[family].config(), vision_tokens=report.vision_tokens, text_tokens=text, config=config, dtype_bytes=4
    )
    assert cost.kv_bytes == report.kv_bytes
    assert cost == estimate(
        TINY[family].config().get_text_config(),
        vision_tokens=report.vision_tokens,
        text_tokens=text,
        config=config,
        dtype_bytes=4,
    )


def test_grouped_queries_shrink_the_cache_and_not_the_attention():
    wide, narrow = (
        estimate(LlamaConfig(num_key_value_heads=heads), vision_tokens=1000, text_tokens=0, config=None)
        for heads in (32, 8)
    )
    assert wide.kv_bytes == 4 * narrow.kv_bytes == 2 * 32 * 32 * 128 * 1000 * 2
    assert wide.flops - narrow.flops == 32 * 2 * 1000 * 4096 * 2 * 24 * 128  # narrower K and V projections


@pytest.mark.parametrize("model", [model for model in PUBLISHED_MODELS if model.paper_kv_gib], ids=lambda m: m.name)
def test_the_papers_cache_sizes_and_savings_come_out(model):
    plain, small = model.costs()
    assert plain.kv_bytes / 2**30 == pytest.approx(model.paper_kv_gib[0], abs=0.005)
    assert small.kv_bytes / 2**30 == pytest.approx(model.paper_kv_gib[1], abs=0.0101)
    saved, published = small.flops / plain.flops, model.paper_tflops[1] / model.paper_tflops[0]
    assert saved == pytest.approx(published, abs=0.05)


def test_the_command_prints_every_model(capsys):
    runpy.run_path(published.__file__, run_name="__main__")
    out = capsys.readouterr().out
    assert all(model.name in out for model in PUBLISHED_MODELS)
    assert "0.35 → 0.23" in out


def test_a_drop_just_below_one_leaves_a_token_per_window():
    config = LightKVConfig((Stage(0, 2, 1 - 1e-12),))
    cost = estimate(LlamaConfig(), vision_tokens=9, text_tokens=1, config=config)
    assert cost.per_layer[-1].tokens == 1 + 4


def test_bad_counts_and_configs_are_errors():
    with pytest.raises(ConfigError, match="vision_tokens=-1"):
        estimate(LlamaConfig(), vision_tokens=-1, text_tokens=0, config=None)
    with pytest.raises(ConfigError, match="takes stages after layers -1 to 30"):
        estimate(LlamaConfig(), vision_tokens=1, text_tokens=0, config=LightKVConfig((Stage(31, 1, 0.5),)))
    with pytest.raises(ConfigError, match="lacks"):
        estimate(GPT2Config(), vision_tokens=1, text_tokens=1, config=None)
