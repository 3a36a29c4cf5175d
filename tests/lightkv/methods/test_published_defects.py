"""Tests that our code does not have the faults of the published code; the order is that of method.md section 2."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightkv import LightKVConfig, Stage, VisionLayout, compress, compress_tokens, prompt_guidance
from tests.lightkv.tiny import tiny_batch, tiny_model, tiny_sample

CONFIG = LightKVConfig((Stage(1, 2, 0.5), Stage(2, 1, 0.5)))
GREEDY = dict(do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)


def logits(model, sample, config=CONFIG):
    with compress(model, config):
        return torch.cat(model.generate(**sample, **GREEDY).logits)


def test_1_guidance_is_the_prompts_and_not_random():
    model, sample = tiny_model("llava"), tiny_sample("llava", 0)
    assert torch.equal(logits(model, sample), logits(model, sample))
    uniform = dataclasses.replace(CONFIG, guidance="uniform")
    assert not torch.allclose(logits(model, sample), logits(model, sample, uniform), atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_2_attention_of_the_first_stage_layer_is_causal(attention, monkeypatch):
    model = tiny_model("llava")
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", attention)
    caches = []
    for last in (13, 57):
        with compress(model, CONFIG), torch.no_grad():
            caches.append(model(**tiny_sample("llava", 0, question=[11, 12, last])).past_key_values)
    for layer in range(3):  # from layer 2 on tokens are merged, which depends on the whole prompt
        keys = [cache.layers[layer].keys[..., :-1, :] for cache in caches]
        if layer < 2:
            torch.testing.assert_close(keys[0], keys[1])
    outputs = []
    handle = model.get_decoder().layers[1].register_forward_hook(lambda _, args, output: outputs.append(output))
    for last in (13, 57):
        with compress(model, CONFIG), torch.no_grad():
            model(**tiny_sample("llava", 0, question=[11, 12, last]))
    handle.remove()
    torch.testing.assert_close(outputs[0][:, :-1], outputs[1][:, :-1])
    assert not torch.allclose(outputs[0][:, -1], outputs[1][:, -1])


def cosines_per_layer(model, sample, config):
    """The RoPE cosines [1, S', d] that each layer uses, for every forward."""
    seen, handles = [], []
    with compress(model, config):
        for layer in model.get_decoder().layers:  # after the hooks of compress: what the layers get
            note = lambda _, args, kwargs: seen.append(kwargs["position_embeddings"][0].clone())  # noqa: E731
            handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
        model.generate(**sample, **GREEDY)
    for handle in handles:
        handle.remove()
    return seen


def test_3_mrope_keeps_three_axes_and_new_tokens_come_after_all_keys():
    model, sample = tiny_model("qwen2_5_vl"), tiny_sample("qwen2_5_vl", video=0)
    decoder = model.get_decoder()
    positions, _ = model.model.get_rope_index(
        sample["input_ids"], sample["mm_token_type_ids"], video_grid_thw=sample["video_grid_thw"]
    )
    coordinates = torch.cartesian_prod(*[torch.arange(int(positions.max()) + 3)] * 3)  # [P, 3]
    cosines = decoder.rotary_emb(torch.zeros(1, 1, 1), coordinates.T[:, None])[0][0]
    place_of = dict(zip(map(tuple, cosines.tolist()), map(tuple, coordinates.tolist()), strict=True))
    for config in (CONFIG, dataclasses.replace(CONFIG, positions="compact")):
        seen = cosines_per_layer(model, sample, config)
        for layer in range(len(decoder.layers)):
            prefill, step = seen[layer][0].tolist(), seen[len(decoder.layers) + layer][0].tolist()
            places = [place_of[tuple(cosine)] for cosine in prefill]
            assert len(places) == len(set(places))  # no two tokens share a place
            assert any(len(set(place)) > 1 for place in places)  # vision tokens keep three dimensions
            assert place_of[tuple(step[0])] == (max(max(place) for place in places) + 1,) * 3


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_4_nothing_of_size_s_by_s_is_made():
    frames, side, text = 64, 16, 20
    length = frames * side * side + text
    layout = VisionLayout.grids([(4, frames, side, side)], length)
    hidden, q, k = torch.randn(length, 8), torch.randn(2, length, 4), torch.randn(1, length, 4)
    with Largest() as largest:
        guidance = prompt_guidance(q, k, layout.is_text, 0.5)
        result = compress_tokens(hidden, guidance, layout, windows=2, drop=0.5)
    assert len(result.kept) == length - frames * side * side // 2
    assert largest.elements <= 128 * length < length**2 / 100


def test_4_a_whole_prefill_makes_nothing_of_size_s_by_s():
    model, length = tiny_model("llava"), 64 * 64 + 8
    layout = VisionLayout.grids([(3, 16, 16, 16)], length)
    with compress(model, CONFIG, layouts=[layout]) as report, Largest() as largest:
        model.generate(inputs_embeds=torch.randn(1, length, 32), max_new_tokens=2, do_sample=False)
    assert report.kept_tokens == 1024
    assert largest.elements < length**2 / 10


def test_5_batches_unequal_images_and_text_prompts_all_work():
    model = tiny_model("qwen2_5_vl")
    samples = [
        tiny_sample("qwen2_5_vl", 0, 1, 2),
        tiny_sample("qwen2_5_vl", question=[9]),
        tiny_sample("qwen2_5_vl", 1),
    ]
    together = logits(model, tiny_batch("qwen2_5_vl", samples)).reshape(4, 3, -1)
    for row, sample in enumerate(samples):
        torch.testing.assert_close(together[:, row], logits(model, sample), atol=2e-4, rtol=2e-4)


def test_6_windows_lie_on_the_true_grid():
    """A 2 × 8 image cut in two: the released square grid of side 4 would pair columns 0 and 4."""
    layout = VisionLayout.grids([(0, 1, 2, 8)], 16)
    hidden = torch.eye(8)[layout.x % 4]  # columns c and c + 4 are equal
    ours = compress_tokens(hidden, torch.ones(16), layout, windows=2, drop=0.5)
    assert ((layout.x < 4) == (layout.x[ours.target] < 4)).all()
    released = layout.squared()
    theirs = compress_tokens(hidden, torch.ones(16), released, windows=2, drop=0.5)
    assert not ((layout.x < 4) == (layout.x[theirs.target] < 4)).all()


def test_6_frames_of_a_video_are_not_one_image():
    layout = VisionLayout.grids([(0, 4, 4, 4)], 64)
    result = compress_tokens(torch.ones(64, 2), torch.ones(64), layout, windows=1, drop=0.5)
    assert layout.t[result.kept].bincount().tolist() == [8] * 4


def test_7_small_images_are_compressed_and_ratios_are_not_clipped():
    layout = VisionLayout.grids([(0, 1, 4, 4)], 16)  # fewer than 8 · 2² tokens
    kept = compress_tokens(torch.randn(16, 4), torch.ones(16), layout, windows=2, drop=0.5).kept
    assert len(kept) == 8
    assert len(compress_tokens(torch.randn(16, 4), torch.ones(16), layout, windows=1, drop=0.75).kept) == 4


def test_8_large_fp16_norms_do_not_overflow():
    layout = VisionLayout.grids([(0, 1, 2, 2)], 4)
    hidden = torch.tensor([[300.0, 0.0], [0.0, 300.0], [300.0, 1.0], [0.0, 290.0]], dtype=torch.float16)
    result = compress_tokens(hidden, torch.ones(4), layout, windows=1, drop=0.25)
    assert torch.isfinite(result.hidden).all()
    assert len(result.kept) == 3
