"""The captioner: answers equal stock `generate`, every failure is a row, and units do not affect each other."""

import json
import weakref

import numpy as np
import pytest
import torch

from pipeline.captioning import captioner as module
from pipeline.captioning.captioner import Captioner, lightkv_config
from pipeline.captioning.models import describe
from pipeline.config import load_config
from pipeline.decoding.decode import FrameBatch
from pipeline.errors import ConfigError, SkippedError, UnitError
from pipeline.schema import ROW_SCHEMA, rows_table
from tests.models import save_tiny_llava

_PROMPTS = [
    {"prompt_id": "caption", "prompt": "describe the video ."},
    {"prompt_id": "count", "prompt": "how many objects are there ?"},
]


def _job(*overrides):
    return load_config(
        None, ["source.uri=/videos", "sink.uri=/out", "model.max_new_tokens=8", "run.lock_timeout_s=60", *overrides]
    )


@pytest.fixture(scope="module")
def mini():
    return Captioner(_job(), "run")


@pytest.fixture(scope="module")
def plain():
    return Captioner(_job("lightkv.enabled=false"), "run")


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    return save_tiny_llava(tmp_path_factory.mktemp("llava"), context_tokens=256)


def _unit(id_="u", **changes):
    return {
        "id": id_,
        "kind": "video",
        "uris": ["a.mp4"],
        "etag": None,
        "size_bytes": 1,
        "start_s": None,
        "end_s": None,
        "prompts": _PROMPTS,
        "attempts": 0,
    } | changes


def _batches(count=8, *, id_="u", seed=0, batch=4, side=96):
    frames = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)
    for start in range(0, count, batch):
        part = frames[start : start + batch]
        yield FrameBatch(id_, 0, part, (start + np.arange(len(part))) * 0.5, 0.25)


def _stock_text(captioner, batches, prompt):
    """The answer of transformers alone: pixels in, stock positions, stock generate."""
    frames = np.concatenate([b.frames for b in batches])
    captioner = captioner.resident
    patches, grid = captioner.encoder.patchify(captioner.encoder.pixels(frames, torch.device("cpu")))
    tokens = grid[0] * grid[1] * grid[2] // 4
    config = captioner.card.config
    text = f"<|im_start|> user <|vision_start|> {'<|video_pad|> ' * tokens}<|vision_end|> {prompt} <|im_end|> "
    ids = captioner.tokenizer(text + "<|im_start|> assistant", return_tensors="pt")["input_ids"]
    out = captioner.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([grid]),
        second_per_grid_ts=torch.tensor([1.0]),
        mm_token_type_ids=(ids == config.video_token_id).int() * 2,
        max_new_tokens=8,
        do_sample=False,
    )
    return captioner.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_answers_without_compression_are_those_of_stock_generate(plain):
    row = plain.row(_unit(), _batches())
    assert [a["text"] for a in row["answers"]] == [_stock_text(plain, list(_batches()), p["prompt"]) for p in _PROMPTS]
    assert row["kept_tokens"] == row["vision_tokens"] == 144
    assert row["kv_bytes"] == row["kv_bytes_uncompressed"] > 0


def test_row_says_what_compression_did(mini):
    row = mini.row(_unit(), _batches())
    assert row["status"] in ("ok", "truncated")
    assert row["vision_tokens"] == 144
    assert 0 < row["kept_tokens"] < 144
    assert 0.45 < row["retention"] < 0.65
    assert row["kv_bytes"] < row["kv_bytes_uncompressed"]
    assert row["frame_times_s"] == [i * 0.5 for i in range(8)]
    assert row["decode_s"] == 0.5
    assert row["attempts"] == 1
    assert rows_table([row]).schema == ROW_SCHEMA


def test_every_setting_of_the_job_reaches_the_compression():
    windows = "windows: spatiotemporal, window_frames: 2, guidance: question"
    job = _job(f"lightkv={{method: published, retention: 0.4, stages: 2, {windows}}}")
    config = lightkv_config(job, describe(job.model).config)
    assert (config.method, len(config.stages)) == ("published", 2)
    assert (config.windows, config.window_frames, config.guidance) == ("spatiotemporal", 2, "question")
    assert config.retention(6) == pytest.approx(0.4)


@pytest.mark.parametrize(("method", "stages"), [("lightkv", 2), ("spacetime", 2), ("published", 3)])
def test_a_method_has_its_own_number_of_stages_and_the_row_says_which_ran(method, stages):
    captioner = Captioner(_job(f"lightkv.method={method}", "model.max_new_tokens=1"), "run")
    ran = json.loads(captioner.row(_unit(), _batches())["lightkv"])
    assert (ran["method"], len(ran["stages"])) == (method, stages)
    assert _job().lightkv.method == "lightkv"


@pytest.mark.parametrize("compiled", [False, True])
def test_decoding_is_compiled_if_the_job_says_so(compiled, monkeypatch):
    asked, engine = [], module.Engine
    monkeypatch.setattr(module, "Engine", lambda *arguments: asked.append(arguments[3]) or engine(*arguments[:3]))
    captioner = Captioner(_job("model.max_new_tokens=1", f"engine.compiled={str(compiled).lower()}"), "run")
    assert captioner.row(_unit(), _batches())["status"] == "truncated"
    assert asked == [compiled]


def test_compression_a_model_cannot_have_is_refused_before_it_is_loaded():
    for method, message in (("lightkv", "one or two stages, got stages=16"), ("published", "16 stages do not fit")):
        job = _job(f"lightkv.method={method}", "lightkv.stages=16")
        with pytest.raises(ConfigError, match=f"lightkv: .*{message}"):
            lightkv_config(job, describe(job.model).config)


def test_retention_of_one_answers_as_without_compression(plain):
    whole = Captioner(_job("lightkv.retention=1.0"), "run")
    row, expected = whole.row(_unit(), _batches()), plain.row(_unit(), _batches())
    assert [a["text"] for a in row["answers"]] == [a["text"] for a in expected["answers"]]
    assert row["kv_bytes"] == row["kv_bytes_uncompressed"] == expected["kv_bytes"]


def test_gradients_are_off_while_captioning_and_as_before_after_it(mini):
    seen = []

    def watched():
        seen.append(torch.is_grad_enabled())
        yield from _batches()

    mini.row(_unit(), watched())
    assert seen == [False]
    assert torch.is_grad_enabled()


def test_how_frames_are_batched_does_not_change_the_answer(mini):
    texts = {mini.row(_unit(), _batches(batch=n))["text"] for n in (1, 3, 8)}
    assert len(texts) == 1


def test_units_one_after_the_other_do_not_touch_each_other(mini):
    alone = [mini.row(_unit(), _batches(seed=s))["answers"] for s in (1, 2)]
    mini.row(_unit(), _batches(seed=9, count=4))
    assert [mini.row(_unit(), _batches(seed=s))["answers"] for s in (1, 2)] == alone


def test_frames_of_another_unit_are_refused(mini):
    row = mini.row(_unit(), _batches(id_="other"))
    assert (row["status"], row["error_type"], row["text"]) == (
        "error",
        "ForeignFrames",
        None,
    )


def test_decoder_error_in_the_middle_becomes_the_row(mini):
    def broken():
        yield next(_batches())
        raise UnitError("decode", "Broken", "expected a frame, got noise")

    row = mini.row(_unit(), broken())
    assert (row["status"], row["error_stage"], row["error_type"]) == ("error", "decode", "Broken")
    assert row["frame_times_s"] == [0.0, 0.5, 1.0, 1.5]
    assert rows_table([row]).num_rows == 1


def test_skipped_unit_is_no_error(mini):
    def skipped():
        raise SkippedError("fetch", "TooLarge", "…")
        yield

    assert mini.row(_unit(), skipped())["status"] == "skipped"


def test_decoder_without_frames_is_an_error_row(mini):
    row = mini.row(_unit(), iter(()))
    assert (row["status"], row["error_type"]) == ("error", "NoFrames")


def test_unexpected_exception_becomes_a_row(mini):
    def odd():
        raise ZeroDivisionError("oops")
        yield

    row = mini.row(_unit(), odd())
    assert (row["status"], row["error_type"], row["error_message"]) == ("error", "ZeroDivisionError", "oops")


def _cpu_allocation():
    torch.empty(10**15)


def _device_allocation():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def _object_allocation():
    raise MemoryError


@pytest.mark.parametrize("allocate", [_cpu_allocation, _device_allocation, _object_allocation])
def test_memory_that_runs_out_is_one_error_type_and_the_next_unit_is_answered(mini, allocate):
    def frames():
        yield next(_batches())
        allocate()

    before = mini.row(_unit(), _batches())["answers"]
    row = mini.row(_unit(), frames())
    assert (row["status"], row["error_stage"], row["error_type"]) == ("error", "generate", "OutOfMemory")
    assert mini.row(_unit(), _batches())["answers"] == before


def test_lost_device_is_not_a_row(mini):
    def frames():
        yield next(_batches())
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        mini.row(_unit(), frames())


def test_answer_cut_at_the_limit_is_marked_truncated(mini):
    row = Captioner(_job("model.max_new_tokens=1"), "run").row(_unit(), _batches())
    assert row["status"] == "truncated"
    assert all(a["status"] == "truncated" and a["output_tokens"] == 1 for a in row["answers"])


def test_prompt_with_a_special_token_is_refused_by_name(mini):
    prompts = [{"prompt_id": "x", "prompt": "what is <|video_pad|> ?"}]
    row = mini.row(_unit(prompts=prompts), _batches())
    assert (row["error_stage"], row["error_type"]) == ("prepare", "PromptTemplate")


def test_image_set_is_answered(mini):
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 96, 96, 3), np.uint8)
    batches = [FrameBatch("u", i, image, np.zeros(1), 0.0) for i, image in enumerate(images)]
    row = mini.row(_unit(kind="images", uris=["a.png", "b.png", "c.png"]), batches)
    assert row["status"] in ("ok", "truncated")
    assert row["vision_tokens"] == 3 * 36


def test_sampling_depends_on_the_unit_and_not_on_the_order():
    sampler = Captioner(_job("model.temperature=1.5"), "run")
    first = {i: sampler.row(_unit(i), _batches(id_=i))["text"] for i in "abcd"}
    again = {i: sampler.row(_unit(i), _batches(id_=i))["text"] for i in "dcba"}
    assert first == again
    assert len(set(first.values())) > 1


def test_llava_frames_are_answered_compressed(llava_folder):
    captioner = Captioner(_job("model.name=tiny", f"model.path={llava_folder}"), "run")
    row = captioner.row(_unit(), _batches(4, side=32))
    assert row["status"] in ("ok", "truncated"), row
    assert row["vision_tokens"] == 64
    assert row["kept_tokens"] < 64


def test_unit_longer_than_the_context_is_an_error_row_that_says_what_to_lower(llava_folder):
    captioner = Captioner(_job("model.name=tiny", f"model.path={llava_folder}"), "run")
    row = captioner.row(_unit(), _batches(16, side=32))
    assert (row["error_stage"], row["error_type"]) == ("prepare", "ContextTooLong")
    assert "expected at most 256" in row["error_message"]
    assert "frames.max_frames" in row["error_message"]


def test_missing_model_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="expected a folder with a model") as error:
        Captioner(_job(f"model.path={tmp_path}/nothing"), "run")
    assert "\n" not in str(error.value)


def test_frames_are_let_go_as_soon_as_they_are_encoded(mini):
    alive, most = 0, 0

    def release():
        nonlocal alive
        alive -= 1

    frames = np.random.default_rng(0).integers(0, 256, (48, 96, 96, 3), np.uint8)

    def batches():
        nonlocal alive, most
        for start in range(0, 48, 4):
            part = frames[start : start + 4].copy()
            weakref.finalize(part, release)
            alive += 1
            most = max(most, alive)
            yield FrameBatch("u", 0, part, np.arange(4.0), 0.0)
            del part

    row = mini.row(_unit(), batches())
    assert row["status"] in ("ok", "truncated")
    assert most <= 2
