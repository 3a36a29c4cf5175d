import pytest
import torch
from transformers import LlamaConfig

from lightkv import LightKVConfig, Stage, UnsupportedCallError, UnsupportedModelError, VisionLayout, compress, family_of
from lightkv.vision.families import FAMILIES, first_stage_layer
from lightkv.vision.layout import FIXED
from tests.lightkv.tiny import ANYRES_SIZES, IMAGE, TINY, VIDEO, anyres_image, tiny_batch, tiny_model, tiny_sample

GREEDY = dict(do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
WITH_VIDEO = [name for name in TINY if TINY[name].video]


def layout_of(family, sample):
    return FAMILIES[family].layouts(TINY[family].config(), sample["input_ids"], sample)


def samples_of(family):
    samples = [tiny_sample(family, 0), tiny_sample(family, 1, 2)]
    return samples + ([tiny_sample(family, 2, video=1)] if TINY[family].video else [])


def test_every_family_has_a_tiny_model_to_be_tested_with():
    assert set(FAMILIES) == set(TINY)


@pytest.mark.parametrize("method", ["published", "lightkv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_found_and_compressed_as_far_as_asked(family, method):
    model = tiny_model(family)
    first = max(0 if method == "published" else -1, first_stage_layer(model.config))
    config = LightKVConfig((Stage(first, drop=0.5), Stage(first + 1, drop=0.75)), method=method)
    for sample in samples_of(family):
        with compress(model, config) as report:
            model.generate(**sample, **GREEDY)
        ids = sample["input_ids"]
        assert report.vision_tokens == int(((ids == IMAGE) | (ids == VIDEO)).sum())
        layout = layout_of(family, sample)[0]
        assert report.kept_tokens < 0.3 * report.vision_tokens + int((layout.item == FIXED).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_nothing_is_the_plain_model_bit_for_bit(family):
    model = tiny_model(family)
    first = max(0, first_stage_layer(model.config))
    earliest = first_stage_layer(model.config)
    configs = [
        LightKVConfig((Stage(first, 2, 0.0), Stage(first + 1, 1, 0.0))),
        LightKVConfig((Stage(earliest, drop=0.0), Stage(first + 1, drop=0.0)), method="lightkv"),
    ]
    for sample, config in zip(samples_of(family), configs * 2, strict=False):
        plain = model.generate(**sample, **GREEDY)
        with compress(model, config) as report:
            out = model.generate(**sample, **GREEDY)
        assert torch.equal(torch.cat(out.logits), torch.cat(plain.logits))
        assert report.retention == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_only_prompt_is_untouched_bit_for_bit(family):
    model = tiny_model(family)
    first = max(0, first_stage_layer(model.config))
    sample = tiny_sample(family, question=[5, 6, 7, 8])
    plain = model.generate(**sample, **GREEDY)
    with compress(model, LightKVConfig((Stage(first, 1, 0.5),))) as report:
        out = model.generate(**sample, **GREEDY)
    assert torch.equal(torch.cat(out.logits), torch.cat(plain.logits))
    assert (report.vision_tokens, report.retention, report.prefills) == (0, 1.0, 1)
    assert report.kv_bytes == report.kv_bytes_uncompressed > 0


@pytest.mark.parametrize("family", ["llava_next", "llava_next_video"])
@pytest.mark.parametrize("n", range(3))
def test_anyres_tokens_lie_where_their_features_come_from(family, n):
    """Features hold their own coordinates; the packing of transformers moves them to the tokens."""
    model = tiny_model(family).model
    rows, columns = [(1, 2), (2, 1), (2, 2)][n]
    base = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), -1).reshape(1, 36, 2)
    places = torch.stack(
        torch.meshgrid(torch.arange(rows * 6), torch.arange(columns * 6), indexing="ij"), -1
    ).unflatten(0, (rows, 6)).unflatten(2, (columns, 6)).transpose(1, 2).reshape(rows * columns, 36, 2)  # fmt: skip
    newline = torch.tensor([-1.0, -1.0])
    size = torch.tensor([ANYRES_SIZES[n]])
    packed, _ = model.pack_image_features([torch.cat([base, places]).float()], size, "default", newline)
    sample = tiny_sample(family, n)
    layout = layout_of(family, sample)[0]
    layout = layout.take(layout.is_vision)
    ends = packed[0][:, 0] < 0
    assert torch.equal(layout.item == FIXED, ends)
    corner = torch.zeros(len(layout), 2)
    corner[36:] = packed[0][36:][~ends[36:]].amin(0)  # unpadding removes rows or columns of the tiled grid
    found = torch.stack([layout.y, layout.x], -1) + corner
    assert torch.equal(found[~ends], packed[0][~ends])
    assert layout.item[:36].tolist() == [0] * 36
    assert set(layout.item[36:].tolist()) == {1, FIXED}
    assert anyres_image(n)[0] == len(layout)


def test_onevision_shrinks_large_grids_and_tiles_single_images_only():
    sample = tiny_sample("llava_onevision", 2)
    layout = layout_of("llava_onevision", sample)[0]
    assert layout.grid.tolist() == [[1, 6, 6], [1, 8, 8]]
    config = TINY["llava_onevision"].config()
    items = FAMILIES["llava_onevision"].placeholders[0].items(config, {**sample, "batch_num_images": [1]})
    assert len(items[0]) == 36 + 8 * 9
    both = {"image_sizes": sample["image_sizes"].repeat(2, 1), "batch_num_images": [2]}
    assert [len(item) for item in FAMILIES["llava_onevision"].placeholders[0].items(config, both)] == [37, 37]


def test_onevision_videos_end_with_a_separator():
    layout = layout_of("llava_onevision", tiny_sample("llava_onevision", video=0))[0]
    assert layout.grid.tolist() == [[4, 3, 3]]
    assert layout.item[layout.is_vision].tolist() == [0] * 36 + [FIXED]
    odd = TINY["llava_onevision"].config()
    odd.vision_config.image_size = 28  # 7 patches per side are resized to 4
    items = (
        FAMILIES["llava_onevision"].placeholders[1].items(odd, {"pixel_values_videos": torch.zeros(2, 3, 3, 28, 28)})
    )
    assert [item.grid.tolist() for item in items] == [[[3, 4, 4]]] * 2


def test_qwen_grids_count_merged_patches_and_frames():
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        layout = layout_of(family, tiny_sample(family, 0, video=0))[0]
        assert layout.grid.tolist() == [[1, 6, 8], [3, 4, 6]]
        assert layout.t[layout.item == 1].tolist() == [0] * 24 + [1] * 24 + [2] * 24


def test_tiles_are_separate_grids():
    assert layout_of("internvl", tiny_sample("internvl", 2))[0].grid.tolist() == [[1, 4, 4]] * 3
    assert layout_of("smolvlm", tiny_sample("smolvlm", 0))[0].grid.tolist() == [[1, 4, 4]] * 2


def test_class_tokens_that_are_kept_stay_out_of_the_grid():
    config = TINY["llava"].config()
    config.vision_feature_select_strategy = "full"
    ids = torch.full((1, 65), IMAGE)
    layout = FAMILIES["llava"].layouts(config, ids, {"pixel_values": torch.zeros(1, 3, 32, 32)})[0]
    assert layout.item.tolist() == [FIXED] + [0] * 64


def test_images_of_a_batch_go_to_the_prompts_that_hold_their_tokens():
    samples = [tiny_sample("qwen2_vl", 0, 1), tiny_sample("qwen2_vl", question=[5]), tiny_sample("qwen2_vl", 2)]
    batch = tiny_batch("qwen2_vl", samples)
    rows = layout_of("qwen2_vl", batch)
    assert [row.grid.tolist() for row in rows] == [[[1, 6, 8], [1, 4, 6]], [], [[1, 8, 4]]]
    for row, sample in zip(rows, samples, strict=True):
        alone = layout_of("qwen2_vl", sample)[0]
        assert torch.equal(row.item[-len(alone) :], alone.item)
        assert torch.equal(row.y[-len(alone) :], alone.y)


def test_tokens_and_images_must_add_up():
    sample = tiny_sample("llava", 0)
    with pytest.raises(UnsupportedCallError, match="more images or videos than the prompts have tokens for"):
        layout_of("llava", {**sample, "pixel_values": torch.zeros(2, 3, 32, 32)})
    with pytest.raises(UnsupportedCallError, match="64 tokens of image_token_id, of which 64 belong to no"):
        layout_of("llava", {**sample, "pixel_values": torch.zeros(1, 3, 64, 64)})
    with pytest.raises(UnsupportedCallError, match=r"\['pixel_values'\] was not given"):
        layout_of("llava", {"input_ids": sample["input_ids"]})


def test_an_unknown_family_lists_what_there_is():
    with pytest.raises(UnsupportedModelError, match=r"'llama' is not in the table.*'qwen2_5_vl'.*pass layouts="):
        family_of(LlamaConfig())


def test_stages_before_the_last_deepstack_layer_are_refused():
    model = tiny_model("qwen3_vl")
    with (
        pytest.raises(ValueError, match="takes stages after layers 1 to 3"),
        compress(model, LightKVConfig((Stage(0, 1, 0.5),))),
    ):
        pass


def test_layouts_by_hand_and_by_family_are_the_same_kind():
    layout = layout_of("llava", tiny_sample("llava", 0))[0]
    by_hand = VisionLayout.grids([(2, 1, 8, 8)], len(layout))
    for name in ("item", "t", "y", "x", "grid"):
        assert torch.equal(getattr(layout, name), getattr(by_hand, name))
