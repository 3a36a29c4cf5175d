"""Tests compress + generate against a generation by hand, and against itself in other batches."""

import copy
import dataclasses
import inspect

import pytest
import torch
from transformers import LlamaForCausalLM

from lightkv import LightKVConfig, Stage, UnsupportedCallError, VisionLayout, compress, family_of
from tests.lightkv import reference
from tests.lightkv.tiny import IMAGE, text_config, tiny_batch, tiny_model, tiny_sample

CONFIG = LightKVConfig((Stage(0, 3, 0.5), Stage(1, 2, 0.7), Stage(3, 1, 0.5)))
VARIANTS = {
    "keep": CONFIG,
    "compact": dataclasses.replace(CONFIG, positions="compact"),
    "spatiotemporal": dataclasses.replace(CONFIG, windows="spatiotemporal", window_frames=2),
    "released": dataclasses.replace(CONFIG, windows="released"),
    "uniform": dataclasses.replace(CONFIG, guidance="uniform"),
    "question, compact": dataclasses.replace(CONFIG, guidance="question", positions="compact"),
}
IN_SPACE_AND_TIME = LightKVConfig((Stage(-1, drop=0.5), Stage(0, drop=0.4), Stage(2, drop=0.5)), method="spacetime")
GUIDED = LightKVConfig((Stage(-1, drop=0.5), Stage(0, drop=0.6)), method="lightkv")
METHODS = {
    "lightkv": GUIDED,
    "lightkv, compact": dataclasses.replace(GUIDED, positions="compact"),
    "asked": dataclasses.replace(GUIDED, method="asked"),
    "lightkv, later": LightKVConfig((Stage(0, drop=0.5), Stage(1, drop=0.3), Stage(3, drop=0.8)), method="lightkv"),
    "spacetime": IN_SPACE_AND_TIME,
    "spacetime, compact": dataclasses.replace(IN_SPACE_AND_TIME, positions="compact"),
    "spacetime, later": LightKVConfig((Stage(1, drop=0.5), Stage(2, drop=0.8)), method="spacetime"),
    "random": LightKVConfig((Stage(-1, drop=0.6),), method="random", seed=3),
    "stride": LightKVConfig((Stage(-1, drop=0.6), Stage(1, drop=0.3)), method="stride", positions="compact"),
    "tome": LightKVConfig((Stage(-1, drop=0.7),), method="tome"),
    "fastv": LightKVConfig((Stage(1, drop=0.7),), method="fastv"),
    "evs": LightKVConfig((Stage(-1, drop=0.6),), method="evs"),
    "published": LightKVConfig((Stage(-1, 2, 0.5), Stage(1, 1, 0.5)), guidance="uniform", positions="compact"),
}
GREEDY = dict(do_sample=False, max_new_tokens=6, return_dict_in_generate=True, output_logits=True)


def generate(model, sample, config, **options):
    with compress(model, config) as report:
        out = model.generate(**sample, **{**GREEDY, **options})
    return out, report


def by_hand(model, sample, config, generated):
    embeds, positions = reference.prompt_of(model, sample)
    layout = family_of(model.config).layouts(model.config, sample["input_ids"], sample)[0]
    return reference.logits(model, reference.Prompt(embeds, positions, layout), config, generated)


def new_tokens(out, sample):
    return out.sequences[:, sample["input_ids"].shape[1] :]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen2_vl", "internvl"])
def test_prefill_and_decoding_are_what_they_are_by_hand(family, variant):
    model, config = tiny_model(family), VARIANTS[variant]
    sample = tiny_sample(family, 0, 2) if family != "qwen2_5_vl" else tiny_sample(family, 1, video=0)
    out, _ = generate(model, sample, config)
    tokens = new_tokens(out, sample)[0]
    expected = by_hand(model, sample, config, tokens)
    torch.testing.assert_close(torch.cat(out.logits), expected[:-1], atol=2e-4, rtol=2e-4)
    assert torch.equal(expected[:-1].argmax(-1), tokens)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_method_runs_as_it_does_by_hand(family, method):
    model, config = tiny_model(family), METHODS[method]
    sample = tiny_sample(family, 0, 2) if family == "llava" else tiny_sample(family, video=0)
    if (family, method) == ("llava", "evs"):
        with pytest.raises(UnsupportedCallError, match="item 0 has one frame"):
            generate(model, sample, config)
        return
    out, report = generate(model, sample, config)
    tokens = new_tokens(out, sample)[0]
    expected = by_hand(model, sample, config, tokens)
    torch.testing.assert_close(torch.cat(out.logits), expected[:-1], atol=2e-4, rtol=2e-4)
    assert torch.equal(expected[:-1].argmax(-1), tokens)
    assert report.retention == pytest.approx(config.retention(5), abs=0.02)
    assert report.notes == ()


@pytest.mark.parametrize("method", ["lightkv", "lightkv, compact", "asked", "tome", "random", "fastv", "evs"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_of_n_is_n_batches_of_one_by_every_method(method, attention, monkeypatch):
    model, config = tiny_model("qwen2_5_vl"), METHODS[method]
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", attention)
    images = [] if method == "evs" else [tiny_sample("qwen2_5_vl", 1, 2, question=[40, 41, 42, 43, 44])]
    samples = [
        tiny_sample("qwen2_5_vl", video=0),
        *images,
        tiny_sample("qwen2_5_vl", question=[3, 4, 5]),
        tiny_sample("qwen2_5_vl", video=1, question=[50]),
    ]
    together, report = generate(model, tiny_batch("qwen2_5_vl", samples, pad=2), config)
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    for row, sample in enumerate(samples):
        alone, own = generate(model, sample, config)
        torch.testing.assert_close(torch.stack(together.logits)[:, row], torch.cat(alone.logits), atol=2e-4, rtol=2e-4)
        for stage, mine in zip(report.survivors[row], own.survivors[0] if own.survivors else (), strict=False):
            assert torch.equal(stage.kept, mine.kept)
            assert torch.equal(stage.target, mine.target)
    assert [len(row[0].target) for row in report.survivors] == lengths


def test_eager_attention_does_the_same(monkeypatch):
    model = tiny_model("qwen2_5_vl")
    sample = tiny_sample("qwen2_5_vl", 0, 1)
    sdpa, _ = generate(model, sample, CONFIG)
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "eager")
    eager, _ = generate(model, sample, CONFIG)
    torch.testing.assert_close(torch.cat(sdpa.logits), torch.cat(eager.logits), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("variant", "attention"), [("keep", "sdpa"), ("keep", "eager"), ("compact", "sdpa"), ("spatiotemporal", "sdpa")]
)
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_a_batch_of_n_is_n_batches_of_one(family, variant, attention, monkeypatch):
    model, config = tiny_model(family), VARIANTS[variant]
    if family == "qwen3_vl":
        config = dataclasses.replace(config, stages=config.stages[1:])
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", attention)
    samples = [
        tiny_sample(family, 0),
        tiny_sample(family, 1, 2, question=[40, 41, 42, 43, 44]),
        tiny_sample(family, question=[3, 4, 5]),
        tiny_sample(family, 2, question=[50]),
    ]
    together, report = generate(model, tiny_batch(family, samples, pad=2), config)
    vision = kept = 0
    for row, sample in enumerate(samples):
        alone, own = generate(model, sample, config)
        torch.testing.assert_close(torch.stack(together.logits)[:, row], torch.cat(alone.logits), atol=2e-4, rtol=2e-4)
        assert torch.equal(together.sequences[row, -6:], alone.sequences[0, -6:])
        vision, kept = vision + own.vision_tokens, kept + own.kept_tokens
    assert (report.vision_tokens, report.kept_tokens) == (vision, kept)


def test_left_padding_changes_nothing():
    model = tiny_model("llava")
    sample = tiny_sample("llava", 0)
    bare, _ = generate(model, sample, CONFIG)
    padded, _ = generate(model, tiny_batch("llava", [sample], pad=5), CONFIG)
    torch.testing.assert_close(torch.cat(bare.logits), torch.cat(padded.logits), atol=2e-4, rtol=2e-4)


def beams_are_scored_by_hand(model, samples, out, config):
    """Whether each returned beam's score equals that of its tokens under `config`, computed by hand."""
    for row, sequence in enumerate(out.sequences[:, -4:]):
        scores = by_hand(model, samples[row // 2], config, sequence)[:-1].log_softmax(-1)
        if abs(out.sequences_scores[row].item() - scores.gather(1, sequence[:, None]).sum().item()) > 1e-3:
            return False
    return True


@pytest.mark.parametrize("images", [[(0,), (2,)], [(0, 1), (2, 0)]], ids=["one image", "several images"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_beams_score_what_their_sequences_score_by_hand(family, images):
    """Images of different sizes: the grids must stay with their prompts when rows are repeated for beams."""
    model = tiny_model(family)
    samples = [tiny_sample(family, *numbers) for numbers in images]
    batch = tiny_batch(family, samples)
    beams = dict(num_beams=3, num_return_sequences=2, max_new_tokens=4, length_penalty=0.0, output_scores=True)
    try:
        plain = model.generate(**batch, **{**GREEDY, **beams})
    except RuntimeError:
        pytest.skip("this transformers cannot repeat these images for beams")
    if not beams_are_scored_by_hand(model, samples, plain, LightKVConfig(())):
        pytest.skip("this transformers mixes up these images when it repeats them for beams")
    for config in (CONFIG, GUIDED):
        out, _ = generate(model, batch, config, **beams)
        assert beams_are_scored_by_hand(model, samples, out, config)


def test_sampling_draws_from_the_compressed_models_distribution():
    model = tiny_model("llava")
    sample = tiny_sample("llava", 0)
    torch.manual_seed(1)
    out, _ = generate(model, sample, CONFIG, do_sample=True, num_return_sequences=3)
    for row, tokens in enumerate(new_tokens(out, sample)):
        expected = by_hand(model, sample, CONFIG, tokens)[:-1]
        torch.testing.assert_close(torch.stack(out.logits)[:, row], expected, atol=2e-4, rtol=2e-4)
    assert len(set(map(tuple, new_tokens(out, sample).tolist()))) > 1


def test_tokens_stream_as_they_are_made():
    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value.flatten())

        def end(self):
            self.ended = True

    model, streamer = tiny_model("llava"), Streamer()
    sample = tiny_sample("llava", 0)
    out, _ = generate(model, sample, CONFIG, streamer=streamer)
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.seen), out.sequences[0])


def test_generating_again_in_the_same_scope_starts_afresh():
    model = tiny_model("qwen2_5_vl")
    first, second = tiny_sample("qwen2_5_vl", 0), tiny_sample("qwen2_5_vl", 1, 2, question=[60, 61])
    apart = [generate(model, sample, CONFIG)[0].sequences for sample in (first, second, first)]
    with compress(model, CONFIG) as report:
        together = [model.generate(**sample, **GREEDY).sequences for sample in (first, second, first)]
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    assert report.prefills == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_in_their_dtype(dtype):
    model = copy.deepcopy(tiny_model("qwen2_5_vl")).to(dtype)
    samples = [tiny_sample("qwen2_5_vl", 0, 1), tiny_sample("qwen2_5_vl", 2, question=[5])]
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tiny_batch("qwen2_5_vl", samples).items()}
    for config in (CONFIG, IN_SPACE_AND_TIME, GUIDED):
        out, report = generate(model, batch, config)
        assert torch.stack(out.logits).isfinite().all()
        assert {layer.keys.dtype for layer in out.past_key_values.layers} == {dtype}
        assert report.kv_bytes_uncompressed == 5 * 2 * batch["input_ids"].numel() * 2 * 8 * 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_forward_pass_by_itself_is_compressed_too(family):
    model, config = tiny_model(family), dataclasses.replace(CONFIG, stages=CONFIG.stages[1:])
    sample = tiny_sample(family, 0)
    out, _ = generate(model, sample, config)
    with compress(model, config) as report, torch.no_grad():
        forward = model(**sample)
    torch.testing.assert_close(forward.logits[:, -1], out.logits[0])
    assert forward.logits.shape[1] == sample["input_ids"].shape[1] - report.vision_tokens + report.kept_tokens


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_forward_passes_in_a_row_decode_like_generate(family, positions):
    """The model then derives positions from layer 0's cache, which is short."""
    model, config = tiny_model(family), dataclasses.replace(GUIDED, positions=positions)
    sample = tiny_sample(family, 0)
    out, _ = generate(model, sample, config, max_new_tokens=3)
    with compress(model, config), torch.no_grad():
        cache, logits = None, []
        for inputs in (sample, *({"input_ids": token[None, None]} for token in new_tokens(out, sample)[0, :2])):
            step = model(**inputs, past_key_values=cache)
            cache = step.past_key_values
            logits.append(step.logits[:, -1])
    torch.testing.assert_close(torch.cat(logits), torch.cat(out.logits), atol=2e-4, rtol=2e-4)


def test_a_forward_pass_after_generating_looks_at_its_own_prompt():
    model, first, second = tiny_model("llava"), tiny_sample("llava", 0), tiny_sample("llava", 1, 2)
    with torch.no_grad(), compress(model, CONFIG) as report:
        model.generate(**first, **GREEDY)
        model(**second)
    assert report.vision_tokens == 128


def embedded(model, sample):
    embeds, _ = reference.prompt_of(model, sample)
    return embeds


def test_embeddings_with_layouts_do_what_pixels_do():
    model = tiny_model("llava")
    sample = tiny_sample("llava", 0, 1)
    layout = VisionLayout.grids([(2, 1, 8, 8), (67, 1, 8, 8)], sample["input_ids"].shape[1])
    given = dict(inputs_embeds=embedded(model, sample), attention_mask=sample["attention_mask"])
    for config in (CONFIG, GUIDED):
        out, _ = generate(model, sample, config)
        with compress(model, config, layouts=[layout]):
            again = model.generate(**given, **GREEDY)
        assert torch.equal(torch.cat(out.logits), torch.cat(again.logits))
        assert torch.equal(again.sequences, new_tokens(out, sample))


def test_embedded_prompts_of_different_length_with_a_layout_each():
    model = tiny_model("llava")
    samples = [tiny_sample("llava", 0, 1), tiny_sample("llava", 2, question=[33, 34, 35, 36])]
    batch = tiny_batch("llava", samples, pad=1)
    spans = [[(2, 1, 8, 8), (67, 1, 8, 8)], [(2, 1, 8, 8)]]
    layouts = [VisionLayout.grids(span, s["input_ids"].shape[1]) for span, s in zip(spans, samples, strict=True)]
    embeds = embedded(model, batch)
    with compress(model, CONFIG, layouts=layouts):
        out = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GREEDY)
    for row, sample in enumerate(samples):
        alone, _ = generate(model, sample, CONFIG)
        assert torch.equal(out.sequences[row], alone.sequences[0, -6:])


@pytest.mark.parametrize("variant", ["keep", "compact", "lightkv", "lightkv, compact"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_qwen_embeddings_beside_placeholders_keep_three_axes(family, variant):
    model = tiny_model(family)
    config = {**VARIANTS, **METHODS}[variant]
    sample = tiny_sample(family, 1, video=0)
    out, report = generate(model, sample, config)
    given = {name: value for name, value in sample.items() if not name.startswith("pixel")}
    for _ in range(2):
        again, same = generate(model, {**given, "inputs_embeds": embedded(model, sample)}, config)
        assert torch.equal(torch.cat(out.logits), torch.cat(again.logits))
        assert same.kept_tokens == report.kept_tokens


def test_encoded_features_do_what_pixels_do():
    model, sample = tiny_model("qwen3_vl"), tiny_sample("qwen3_vl", 0, 1)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers encodes pixels in the forward pass only")
    config = dataclasses.replace(CONFIG, stages=CONFIG.stages[1:])
    out, _ = generate(model, sample, config)
    with torch.no_grad():
        features = model.get_image_features(sample.pop("pixel_values"), sample["image_grid_thw"], return_dict=True)
    again, _ = generate(model, {**sample, "mm_encoder_outputs": {"image": features}}, config)
    assert torch.equal(torch.cat(out.logits), torch.cat(again.logits))


def test_several_embedded_prompts_of_different_length():
    model = tiny_model("qwen2_5_vl")
    samples = [tiny_sample("qwen2_5_vl", 0), tiny_sample("qwen2_5_vl", 1, video=1, question=[33, 34])]
    batch = tiny_batch("qwen2_5_vl", samples)
    given = {name: value for name, value in batch.items() if not name.startswith("pixel")}
    out, _ = generate(model, {**given, "inputs_embeds": embedded(model, batch)}, CONFIG)
    for row, sample in enumerate(samples):
        alone, _ = generate(model, sample, CONFIG)
        assert torch.equal(out.sequences[row, -6:], alone.sequences[0, -6:])


def test_a_decoder_alone_is_compressed_where_the_caller_says():
    llava = tiny_model("llava")
    sample = tiny_sample("llava", 0)
    expected, _ = generate(llava, sample, CONFIG)
    decoder = LlamaForCausalLM(llava.config.text_config).eval()
    decoder.model.load_state_dict(llava.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(llava.lm_head.state_dict())
    layouts = family_of(llava.config).layouts(llava.config, sample["input_ids"], sample)
    embeds = embedded(llava, sample)
    with compress(decoder, CONFIG, layouts=layouts) as report:
        out = decoder.generate(inputs_embeds=embeds, attention_mask=sample["attention_mask"], **GREEDY)
    assert torch.equal(torch.cat(out.logits), torch.cat(expected.logits))
    assert report.vision_tokens == int((sample["input_ids"] == IMAGE).sum())
    assert len(report.stages) == 3


@pytest.mark.parametrize(("windows", "counts"), [("frame", [288, 144, 72]), ("released", [288, 145, 73])])
def test_the_published_schedule_on_576_tokens_and_32_layers(windows, counts):
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(text_config("LlamaConfig", num_hidden_layers=32)).eval()
    config = LightKVConfig.published("llava-1.5-7b", windows=windows)
    layout = VisionLayout.grids([(5, 1, 24, 24)], 576 + 40)
    with compress(decoder, config, layouts=[layout]) as report:
        decoder.generate(inputs_embeds=torch.randn(1, 616, 32), max_new_tokens=1)
    assert [stage.tokens_after for stage in report.stages] == counts
    assert report.retention == pytest.approx(0.5742, abs=1e-3)
