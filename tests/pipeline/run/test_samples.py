"""Tests of samples: which units are recorded, the content of a record, and that recording never fails a unit."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.captioning.captioner import Captioner
from pipeline.config import load_config
from pipeline.decoding.decode import FrameBatch
from pipeline.errors import UnitError
from pipeline.run.directory import RunDirectory
from pipeline.run.samples import Sampling, folder_of, read_samples
from tests.models import save_tiny_llava
from tests.pipeline.rows import units

PROMPTS = [
    {"prompt_id": "caption", "prompt": "describe the video ."},
    {"prompt_id": "count", "prompt": "how many objects are there ?"},
]


def _job(folder, *overrides):
    return load_config(None, ["source.uri=/videos", f"sink.uri={folder}", "model.max_new_tokens=4", *overrides])


def _unit(id_="u", kind="video"):
    whole = {"etag": None, "size_bytes": 1, "start_s": None, "end_s": None, "attempts": 0}
    return whole | {"id": id_, "kind": kind, "uris": ["a.mp4"], "prompts": PROMPTS}


def _batches(count=12, side=96, batch=5, width=None):
    frames = np.random.default_rng(0).integers(0, 256, (count, side, width or side, 3), np.uint8)
    for start in range(0, count, batch):
        part = frames[start : start + batch]
        yield FrameBatch("u", 0, part, (start + np.arange(len(part))) * 0.5, 0.1)


def _sampling(job, frames=4, share=1.0):
    return Sampling(folder_of(job.sink.uri), share, frames, job.storage)


def _only(folder):
    (path,) = (folder / "_run" / "samples").glob("*.json")
    return json.loads(path.read_text())


def _values(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype).astype(int)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    job = _job(folder)
    row = Captioner(job, "run", _sampling(job)).row(_unit(), _batches())
    return row, _only(folder)


def test_a_unit_is_taken_by_its_id_alone_and_in_its_share():
    job = _job("/out")
    taken = [id_ for id_ in map(str, range(4000)) if _sampling(job, share=0.1).sample(id_)]
    assert taken == [id_ for id_ in map(str, range(4000)) if _sampling(job, share=0.1).sample(id_)]
    assert 330 < len(taken) < 470
    assert set(taken) <= {id_ for id_ in map(str, range(4000)) if _sampling(job, share=0.2).sample(id_)}


def test_the_share_follows_from_the_manifest(tmp_path):
    work = RunDirectory(_job(tmp_path)).open()
    work.write_manifest(units(*map(str, range(48))))
    assert Sampling.of(_job(tmp_path), work).share == 0.5
    assert Sampling.of(_job(tmp_path, "report.samples=1000"), work).share == 1.0
    assert Sampling.of(_job(tmp_path, "report.samples=0"), work) is None
    assert Sampling.of(_job(tmp_path, "report.enabled=false"), work) is None


def test_units_that_are_not_taken_leave_nothing(tmp_path):
    job = _job(tmp_path)
    Captioner(job, "run", _sampling(job, share=0.0)).row(_unit(), _batches())
    assert not (tmp_path / "_run").exists()


def test_recording_changes_no_answer(mini, tmp_path):
    row, _ = mini
    plain = Captioner(_job(tmp_path), "run").row(_unit(), _batches())
    assert row["answers"] == plain["answers"]
    assert row["kept_tokens"] == plain["kept_tokens"]


def test_frames_are_spread_over_the_video_and_start_steps_in_time(mini):
    _, sample = mini
    assert [frame["index"] for frame in sample["frames"]] == [0, 4, 6, 10]
    assert [frame["time_s"] for frame in sample["frames"]] == [0.0, 2.0, 3.0, 5.0]
    assert [frame["place"] for frame in sample["frames"]] == [[n * 36, 6, 6] for n in (0, 2, 3, 5)]


def test_long_videos_keep_few_frames_from_end_to_end():
    sample = _sampling(_job("/out"), frames=3).sample("u", 2)
    for batch in _batches(500, side=8):
        sample.see(batch)
        assert len(sample._frames._kept) <= 6
    first, middle, last = [frame.index for frame in sample._frames.chosen()]
    assert first == 0
    assert 1 / 3 <= middle / last <= 2 / 3
    assert last >= 300


def test_frames_are_small_jpegs_of_what_was_seen(tmp_path):
    sample = _sampling(_job(tmp_path)).sample("u")
    wide = np.full((1, 400, 800, 3), (200, 40, 40), np.uint8)
    sample.see(FrameBatch("u", 0, wide, np.zeros(1), 0.0))
    sample.write("error")
    (frame,) = _only(tmp_path)["frames"]
    image = Image.open(io.BytesIO(base64.b64decode(frame["jpeg"])))
    assert (image.format, image.size) == ("JPEG", (320, 160))
    assert (frame["width"], frame["height"]) == (320, 160)
    assert np.abs(np.asarray(image).mean((0, 1)) - (200, 40, 40)).max() < 3


def test_survivors_agree_with_the_row(mini):
    row, sample = mini
    assert sample["status"] == row["status"]
    assert [stage["layer"] for stage in sample["stages"]] == [s["layer"] for s in json.loads(row["lightkv"])["stages"]]
    assert [prompt["prompt_id"] for prompt in sample["prompts"]] == ["caption", "count"]
    left = [[stage["left"] for stage in prompt["stages"]] for prompt in sample["prompts"]]
    assert {stages[-1] for stages in left} == {row["kept_tokens"]}
    assert all(first > last for first, last in left)


def test_merged_patches_point_at_survivors_that_count_them(tmp_path):
    job = _job(tmp_path)
    row = Captioner(job, "run", _sampling(job, frames=6)).row(_unit(), _batches())  # every time step is shown
    for prompt in _only(tmp_path)["prompts"]:
        for stage in prompt["stages"]:
            target = np.concatenate([_values(frame, "<i4") for frame in stage["target"]])
            size = np.concatenate([_values(frame, "<u2") for frame in stage["size"]])
            assert len(target) == row["vision_tokens"]
            kept = target >= 0
            assert (target[target[kept]] == target[kept]).all()
            assert (size[kept] == np.bincount(target[kept])[target[kept]]).all()
            assert (size[~kept] == 0).all()
            assert (target == np.arange(len(target))).sum() == stage["left"]


def test_patches_that_are_dropped_have_no_survivor(tmp_path):
    job = _job(tmp_path, "lightkv.retention=0.15")
    Captioner(job, "run", _sampling(job)).row(_unit(), _batches())
    stage = _only(tmp_path)["prompts"][0]["stages"][-1]
    sizes = np.concatenate([_values(frame, "<u2") for frame in stage["size"]])
    targets = np.concatenate([_values(frame, "<i4") for frame in stage["target"]])
    assert ((sizes == 0) == (targets == -1)).all()
    assert sizes.max() > 1


def test_without_compression_there_are_frames_and_no_survivors(tmp_path):
    job = _job(tmp_path, "lightkv.enabled=false")
    Captioner(job, "run", _sampling(job)).row(_unit(), _batches())
    sample = _only(tmp_path)
    assert (len(sample["frames"]), sample["stages"], sample["prompts"]) == (4, [], [])


def test_every_image_of_a_set_has_its_own_patches(tmp_path):
    job = _job(tmp_path)
    images = [
        FrameBatch("u", i, np.zeros((1, 96, side, 3), np.uint8), np.zeros(1), 0.0) for i, side in enumerate((96, 128))
    ]
    Captioner(job, "run", _sampling(job)).row(_unit(kind="images"), images)
    assert [frame["place"] for frame in _only(tmp_path)["frames"]] == [[0, 6, 6], [36, 6, 8]]


def test_frames_of_a_model_without_time_are_items_of_their_own(tmp_path):
    job = _job(
        tmp_path / "run", "model.name=tiny", f"model.path={save_tiny_llava(tmp_path / 'model', context_tokens=256)}"
    )
    row = Captioner(job, "run", _sampling(job)).row(_unit(), _batches(4, side=32))
    sample = _only(tmp_path / "run")
    assert [frame["place"] for frame in sample["frames"]] == [[n * 16, 4, 4] for n in range(4)]
    assert sample["prompts"][0]["stages"][-1]["left"] == row["kept_tokens"]


def test_a_failed_unit_shows_the_frames_that_came(tmp_path):
    def broken():
        yield next(_batches())
        raise UnitError("decode", "Broken", "expected a frame, got noise")

    job = _job(tmp_path)
    Captioner(job, "run", _sampling(job)).row(_unit(), broken())
    sample = _only(tmp_path)
    assert sample["status"] == "error"
    assert [(frame["index"], frame["place"]) for frame in sample["frames"]] == [(0, None), (2, None), (4, None)]


@pytest.mark.parametrize("broken", ["see", "answered", "write"])
def test_a_record_that_fails_costs_the_record_alone(broken, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    names = {"see": "_Spread.add", "answered": "_stage", "write": "storage.write_bytes_atomic"}
    monkeypatch.setattr(f"pipeline.run.samples.{names[broken]}", fail)
    job = _job(tmp_path)
    row = Captioner(job, "run", _sampling(job)).row(_unit(), _batches())
    assert row["status"] in ("ok", "truncated")
    (record,) = caplog.records
    assert (record.message, record.fields["unit"]) == ("sample not recorded", "u")
    assert "No space left" in record.fields["error"]
    assert not (tmp_path / "_run").exists()


def test_a_repeated_unit_replaces_its_record(tmp_path):
    job = _job(tmp_path)
    for status in ("error", "ok"):
        _sampling(job).sample("u").write(status)
    assert _only(tmp_path)["status"] == "ok"


def test_records_are_read_by_id_and_up_to_a_size(tmp_path):
    job = _job(tmp_path)
    for id_ in ("a", "b", "c"):
        _sampling(job).sample(id_).write("ok")
    found, left_out = read_samples(str(tmp_path), job.storage, 1 << 20)
    assert (set(found), left_out) == ({"a", "b", "c"}, 0)
    found, left_out = read_samples(str(tmp_path), job.storage, 100)
    assert len(found) + left_out == 3
    assert left_out > 0
    assert read_samples(f"{tmp_path}/none", job.storage, 1 << 20) == ({}, 0)


@pytest.mark.parametrize("content", ["{", "[1]", '{"version": 0, "id": "a"}', ""])
def test_what_is_no_record_is_left_out(content, tmp_path):
    job = _job(tmp_path)
    _sampling(job).sample("b").write("ok")
    (tmp_path / "_run" / "samples" / "x.json").write_text(content)
    found, left_out = read_samples(str(tmp_path), job.storage, 1 << 20)
    assert (set(found), left_out) == ({"b"}, 1)
