"""Tests the scope of compress: its changes, their removal, the calls that it refuses, and its report."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from lightkv import (
    ConfigError,
    LightKVConfig,
    LightKVError,
    Stage,
    UnsupportedCallError,
    UnsupportedModelError,
    VisionLayout,
    compress,
)
from lightkv.hooks.attention import HOOKS
from lightkv.methods.table import METHODS
from tests.lightkv.tiny import LAYERS, text_config, tiny_batch, tiny_model, tiny_sample

CONFIG = LightKVConfig((Stage(0, 2, 0.5), Stage(2, 1, 0.5)))
EARLY = LightKVConfig((Stage(-1, drop=0.5), Stage(1, drop=0.5)), method="lightkv")


def state(model):
    """Everything that a scope must restore: hooks, attributes, attention names, taps."""
    found = {}
    for name, module in model.named_modules():
        found[name, "attributes"] = sorted(vars(module))
        for kind in (
            "_forward_pre_hooks",
            "_forward_hooks",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks_with_kwargs",
        ):
            found[name, kind] = list(getattr(module, kind))
        found[name, "forward"] = module.forward
        if hasattr(module, "config"):
            found[name, "attention"] = module.config._attn_implementation
    found["generate"] = model.generate
    found["taps"] = len(HOOKS)
    found["config"] = model.config.to_dict()
    return found


@pytest.mark.parametrize("config", [CONFIG, EARLY], ids=["published", "lightkv"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_the_model_is_as_before_after_leaving(family, config):
    model = tiny_model(family)
    model.generate(**tiny_sample(family, 0), max_new_tokens=1)  # the first call of transformers installs its own hooks
    before = state(model)
    with compress(model, config):
        assert state(model) != before
        model.generate(**tiny_sample(family, 0), max_new_tokens=2, do_sample=False)
    assert state(model) == before


def test_the_model_is_as_before_after_an_exception():
    model = tiny_model("llava")
    model.generate(**tiny_sample("llava", 0), max_new_tokens=1)
    before = state(model)
    with contextlib.suppress(RuntimeError), compress(model, CONFIG):
        raise RuntimeError
    assert state(model) == before

    def fail(*_):
        raise RuntimeError("in the middle of a prefill")

    handle = model.get_decoder().layers[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), compress(model, CONFIG):
        model.generate(**tiny_sample("llava", 0), max_new_tokens=2)
    handle.remove()
    assert state(model) == before


def test_an_exception_inside_does_not_disturb_the_next_prompt():
    model, sample = tiny_model("llava"), tiny_sample("llava", 0)
    options = dict(max_new_tokens=4, do_sample=False)
    with compress(model, CONFIG):
        expected = model.generate(**sample, **options)
        with pytest.raises(UnsupportedCallError):
            model.generate(**{**sample, "pixel_values": None}, **options)
        assert torch.equal(model.generate(**sample, **options), expected)


def test_an_own_generate_of_the_model_comes_back(monkeypatch):
    model = tiny_model("llava")
    own = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: own(*args, **kwargs), raising=True)
    mine = model.generate
    with compress(model, CONFIG) as report:
        model.generate(**tiny_sample("llava", 0), max_new_tokens=1)
    assert model.generate is mine
    assert report.kept_tokens == 16


def test_one_scope_at_a_time():
    model = tiny_model("llava")
    with (
        compress(model, CONFIG),
        pytest.raises(LightKVError, match="already being compressed"),
        compress(model, CONFIG),
    ):
        pass


def test_the_report_counts_the_real_cache():
    model, sample = tiny_model("llava"), tiny_sample("llava", 0)
    with compress(model, CONFIG) as report, torch.no_grad():
        cache = model(**sample).past_key_values
    text = sample["input_ids"].shape[1] - 64
    lengths = [64 + text, 32 + text, 32 + text, 16 + text, 16 + text]
    assert [layer.keys.shape[-2] for layer in cache.layers] == lengths
    per_token = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, fp32
    assert report.kv_bytes == sum(lengths) * per_token
    assert report.kv_bytes_uncompressed == LAYERS * lengths[0] * per_token
    assert report.retention == pytest.approx((64 + 32 + 32 + 16 + 16) / (5 * 64))
    assert report.retention == CONFIG.retention(LAYERS)
    assert [(stage.layer, stage.tokens_before, stage.tokens_after) for stage in report.stages] == [
        (0, 64, 32),
        (2, 32, 16),
    ]
    assert (report.vision_tokens, report.kept_tokens, report.notes) == (64, 16, ())


def test_after_a_stage_on_the_embeddings_layer_0_is_short_and_counts_what_it_never_saw():
    model, sample = tiny_model("llava"), tiny_sample("llava", 0)
    length = sample["input_ids"].shape[1]
    text = length - 64
    with compress(model, EARLY) as report, torch.no_grad():
        cache = model(**sample).past_key_values
        assert cache.get_seq_length() == length
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert cache.get_seq_length() == length + 1
    lengths = [32 + text, 32 + text, 16 + text, 16 + text, 16 + text]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [held + 1 for held in lengths]
    per_token = 2 * 2 * 8 * 4
    assert report.kv_bytes == sum(lengths) * per_token
    assert report.kv_bytes_uncompressed == LAYERS * length * per_token
    assert report.retention == EARLY.retention(LAYERS) == pytest.approx((2 * 32 + 3 * 16) / (5 * 64))
    assert [(stage.layer, stage.tokens_before, stage.tokens_after) for stage in report.stages] == [
        (-1, 64, 32),
        (1, 32, 16),
    ]
    with torch.no_grad(), compress(model, EARLY):
        with pytest.raises(UnsupportedCallError, match="another scope"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        model(**sample, past_key_values=cache)
    assert cache.get_seq_length() == length


def test_the_report_follows_every_token_to_its_survivor():
    model, sample = tiny_model("llava"), tiny_sample("llava", 0)
    for method in ("lightkv", "asked", "random", "published"):
        stages = CONFIG.stages if method == "published" else EARLY.stages
        with compress(model, LightKVConfig(stages, method=method)) as report, torch.no_grad():
            model(**sample)
        (row,) = report.survivors
        everyone = torch.arange(sample["input_ids"].shape[1])
        for stage, vision in zip(row, (32, 16), strict=True):
            assert len(stage.kept) == len(everyone) - 64 + vision
            assert torch.equal(stage.kept, everyone[stage.target == everyone])
            gone = stage.target == -1
            if method == "random":
                assert int(gone.sum()) == 64 - vision
            elif method == "asked" and stage is row[1]:
                assert torch.equal(gone, ~torch.isin(row[0].target, stage.kept))  # with what merged into it
            else:
                assert not gone.any()
            assert torch.isin(stage.target[~gone], stage.kept).all()
        merged = row[0].target[row[0].target >= 0]
        assert torch.equal(row[1].target[row[0].target >= 0], row[1].target[merged])  # merged tokens stay together
    with compress(model, EARLY) as report, torch.no_grad():
        model(**sample)
        model(input_ids=sample["input_ids"][:, -3:])
    assert report.survivors == ()


@pytest.mark.parametrize("method", ["lightkv", "asked"])
@pytest.mark.parametrize("stages", [(-1, 1), (0, 2)])
def test_only_the_layers_before_later_stages_are_asked(stages, method, monkeypatch):
    model, sample, told = tiny_model("llava"), tiny_sample("llava", 0), []
    config = LightKVConfig(tuple(Stage(layer, drop=0.5) for layer in stages), method=method)
    does = METHODS[method].compress

    def compress_and_note(tokens, stage, config):
        told.append((stage.layer, tokens.score is not None))
        return does(tokens, stage, config)

    monkeypatch.setitem(METHODS, method, dataclasses.replace(METHODS[method], compress=compress_and_note))
    with compress(model, config), torch.no_grad():
        attention = [layer.self_attn for layer in model.get_decoder().layers]
        tapped = [index for index, part in enumerate(attention) if part in HOOKS and HOOKS[part].tap is not None]
        model(**sample)
    assert tapped == [stages[1]]
    assert told == [(stages[0], False), (stages[1], True)]


@pytest.mark.parametrize("guided", ["lightkv", "asked"])
def test_the_question_decides_what_survives_and_nothing_without_it(guided):
    model, questions = tiny_model("llava"), ([11, 12, 13], [60, 61, 62])
    survivors = {}
    for method in (guided, "spacetime"):
        for question in questions:
            with compress(model, LightKVConfig(EARLY.stages, method=method)) as report, torch.no_grad():
                model(**tiny_sample("llava", 0, question=question))
            survivors.setdefault(method, []).append(report.survivors[0])
    (one, other), (merged, merged_too) = survivors[guided], survivors["spacetime"]
    assert torch.equal(one[0].kept, other[0].kept)  # a stage on the embeddings does not depend on the question
    assert not torch.equal(one[1].kept, other[1].kept)
    assert all(torch.equal(a.target, b.target) for a, b in zip(merged, merged_too, strict=True))


def test_attention_that_does_not_hear_the_sizes_is_an_error(monkeypatch):
    model, sample = tiny_model("llava"), tiny_sample("llava", 0)
    attention = model.get_decoder().layers[2].self_attn
    monkeypatch.setattr(attention, "config", copy.copy(attention.config))
    with compress(model, EARLY), torch.no_grad():
        attention.config._attn_implementation = "sdpa"
        with pytest.raises(LightKVError, match=r"layers \[2\] did not run their attention through"):
            model(**sample)


def test_flash_kernels_without_room_for_the_sizes_are_refused(monkeypatch):
    model = tiny_model("llava")
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(model.config.text_config, "head_dim", 256)
    with pytest.raises(UnsupportedModelError, match=r"heads of 256 \+ 8 dimensions"), compress(model, EARLY):
        pass
    with compress(model, CONFIG):
        pass


def test_a_stage_on_the_embeddings_is_refused_where_vision_enters_later_too():
    with pytest.raises(ConfigError, match="on the embeddings is not possible"), compress(tiny_model("qwen3_vl"), EARLY):
        pass


def test_what_could_not_be_done_as_asked_is_noted():
    model = tiny_model("qwen2_5_vl")
    config = LightKVConfig((Stage(0, 5, 0.5), Stage(1, 5, 0.5)))
    with compress(model, config) as report:
        model.generate(**tiny_sample("qwen2_5_vl", 1), max_new_tokens=1)
    assert "stage after layer 0: 5 windows per side exceed the grids [(4, 6)]" in report.notes
    assert any("was reached instead of" in note for note in report.notes)


def refused(model, sample, match, **options):
    forwards = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(UnsupportedCallError, match=match), compress(model, CONFIG):
        model.generate(**sample, max_new_tokens=3, **options)
    handle.remove()
    assert not forwards  # before any work


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cache_implementation": "static"}, "DynamicCache"),
        ({"cache_implementation": "quantized"}, "DynamicCache"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ({"prefill_chunk_size": 16}, "the whole prompt"),
        ({"use_cache": False}, "KV cache"),
    ],
)
def test_generation_that_cannot_be_compressed_is_refused(options, match):
    refused(tiny_model("llava"), tiny_sample("llava", 0), match, **options)


def test_assisted_decoding_is_refused():
    refused(tiny_model("llava"), tiny_sample("llava", 0), "assisted", assistant_model=tiny_model("smolvlm"))


def test_static_caches_are_refused():
    model = tiny_model("llava")
    cache = StaticCache(config=model.config.text_config, max_cache_len=128)
    refused(model, tiny_sample("llava", 0), "DynamicCache", past_key_values=cache)
    with pytest.raises(UnsupportedCallError, match="DynamicCache"), compress(model, CONFIG):
        model(**tiny_sample("llava", 0), past_key_values=cache)


def test_labels_and_missing_caches_are_refused():
    model, sample = tiny_model("llava"), tiny_sample("llava", 0)
    with compress(model, CONFIG):
        with pytest.raises(UnsupportedCallError, match="labels"):
            model(**sample, labels=sample["input_ids"])
        with pytest.raises(UnsupportedCallError, match="use_cache=True"):
            model(**sample, use_cache=False)


def test_a_compressed_cache_takes_one_token_at_a_time():
    model, sample = tiny_model("llava"), tiny_sample("llava", 0)
    with torch.no_grad(), compress(model, CONFIG):
        cache = model(**sample).past_key_values
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match="2 tokens were fed to a compressed cache"):
            model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match="filled cache"):
            model.generate(**sample, past_key_values=cache)
    with torch.no_grad(), compress(model, CONFIG), pytest.raises(UnsupportedCallError, match="another scope"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_an_empty_cache_of_the_callers_is_filled():
    model = tiny_model("llava")
    for config in (CONFIG, EARLY):
        for cache in (DynamicCache(config=model.config.text_config), DynamicCache()):
            with compress(model, config) as report:
                model.generate(**tiny_sample("llava", 0), max_new_tokens=1, past_key_values=cache)
            assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == report.kv_bytes


def test_padding_on_the_right_is_refused():
    model = tiny_model("llava")
    batch = tiny_batch("llava", [tiny_sample("llava", 0), tiny_sample("llava", 1, question=[3, 4, 5, 6])])
    batch["input_ids"], batch["attention_mask"] = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)
    refused(model, batch, "padding must be on the left")


def test_text_prompts_may_be_padded_as_they_like():
    model, ids = tiny_model("llava"), torch.tensor([[3, 4, 5, 0], [3, 4, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    with compress(model, CONFIG):
        out = model.generate(**options)
    assert torch.equal(out, model.generate(**options))


def test_one_generation_at_a_time():
    model, sample = tiny_model("llava"), tiny_sample("llava", 0)

    class Nested:
        def put(self, _):
            model.generate(**sample, max_new_tokens=1)

        def end(self):
            pass

    with pytest.raises(UnsupportedCallError, match="already generating"), compress(model, CONFIG):
        model.generate(**sample, max_new_tokens=1, streamer=Nested())


def test_two_models_in_two_scopes_do_not_mix():
    samples = {family: tiny_sample(family, 0, 1) for family in ("llava", "qwen2_5_vl")}
    options = dict(max_new_tokens=4, do_sample=False)
    apart, together = {}, {}
    for family, sample in samples.items():
        with compress(tiny_model(family), CONFIG):
            apart[family] = tiny_model(family).generate(**sample, **options)
    with compress(tiny_model("llava"), CONFIG) as first, compress(tiny_model("qwen2_5_vl"), CONFIG) as second:
        for family, sample in samples.items():
            together[family] = tiny_model(family).generate(**sample, **options)
    assert all(torch.equal(apart[family], together[family]) for family in samples)
    assert (first.vision_tokens, second.vision_tokens) == (128, 72)


def test_embeddings_without_layouts_are_refused():
    refused(tiny_model("llava"), {"inputs_embeds": torch.zeros(1, 4, 32)}, "pass layouts=")


def test_layouts_must_fit_the_prompt():
    model = tiny_model("llava")
    layout = VisionLayout.grids([(0, 1, 2, 2)], 6)

    def run(batch, length, layouts):
        with compress(model, CONFIG, layouts=layouts):
            model.generate(inputs_embeds=torch.zeros(batch, length, 32), max_new_tokens=1)

    with pytest.raises(UnsupportedCallError, match="covers 6 tokens, the prompt has 9"):
        run(1, 9, [layout])
    with pytest.raises(UnsupportedCallError, match="2 layouts do not fit a batch of 3"):
        run(3, 6, [layout] * 2)


def test_models_that_cannot_be_driven_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel, MistralForCausalLM

    layouts = [VisionLayout.grids([(0, 1, 2, 2)], 6)]
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=16))
    with pytest.raises(UnsupportedModelError, match="no decoder layers"), compress(gpt2, CONFIG, layouts=layouts):
        pass
    sliding = MistralForCausalLM(text_config("MistralConfig", sliding_window=8))
    with pytest.raises(UnsupportedModelError, match="sliding"), compress(sliding, CONFIG, layouts=layouts):
        pass
    with pytest.raises(UnsupportedModelError, match="not in the table"), compress(gpt2, CONFIG):
        pass


def test_attention_without_a_mask_function_is_refused(monkeypatch):
    model = tiny_model("llava")
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "made_up")
    before = state(model)
    with pytest.raises(UnsupportedModelError, match="'made_up' has no mask function"), compress(model, CONFIG):
        pass
    assert state(model) == before


def test_no_stages_leave_the_model_alone():
    model, sample = tiny_model("llava"), tiny_sample("llava", 0)
    options = dict(max_new_tokens=4, do_sample=False)
    plain = model.generate(**sample, **options)
    with compress(model, LightKVConfig(())) as report:
        assert torch.equal(model.generate(**sample, **options), plain)
    assert (report.retention, report.vision_tokens, report.kept_tokens) == (1.0, 64, 64)


def test_a_configured_use_cache_false_is_refused(monkeypatch):
    model = tiny_model("llava")
    monkeypatch.setattr(model.config.text_config, "use_cache", False)
    with pytest.raises(UnsupportedCallError, match="use_cache=True"), compress(model, CONFIG):
        model(**tiny_sample("llava", 0))
