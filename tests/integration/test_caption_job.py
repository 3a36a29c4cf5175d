"""The caption job on a local Ray, as a user runs it: rows, failures, retries."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.captioning.captioner import Captioner
from pipeline.config import load_config
from pipeline.decoding.decode import decode_unit
from pipeline.mini.world import render_demo
from pipeline.schema import ROW_SCHEMA
from tests.integration.jobs import SMALL, rows_by_name, run
from tests.videos import render

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    render_demo(folder, 6)
    (folder / "text.mp4").write_text("no video\n")
    (folder / "empty.mp4").touch()
    whole = (folder / "clip-000.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="module")
def finished(videos, tmp_path_factory):
    """A finished run on one CPU: the model actor must not take the CPU from its own decoders."""
    out = tmp_path_factory.mktemp("out")
    overrides = [f"source.uri={videos}", f"sink.uri={out}", "ray.num_cpus=1", "ray.actors.batch_units=2"]
    return out, overrides, run("caption", *overrides)


def test_every_file_has_one_row_of_the_documented_schema(finished, videos):
    out, _, _ = finished
    assert set(rows_by_name(out)) == {p.name for p in videos.glob("*.mp4")}
    for file in (out / "data").glob("*.parquet"):
        assert pq.read_schema(file).names == ROW_SCHEMA.names


def test_bad_files_are_error_rows_with_stage_type_and_message(finished):
    rows = rows_by_name(finished[0])
    assert {n: (r["error_stage"], r["error_type"]) for n, r in rows.items() if r["status"] == "error"} == {
        "text.mp4": ("decode", "NotAVideo"),
        "empty.mp4": ("fetch", "Empty"),
        "cut.mp4": ("decode", "NotAVideo"),
    }
    assert all(r["error_message"] and r["text"] is None for r in rows.values() if r["status"] == "error")


def test_every_row_has_the_answer_of_its_own_video(finished, videos):
    out, overrides, _ = finished
    job = load_config(None, [*SMALL, *overrides])
    captioner = Captioner(job, "check")
    rows = {name: row for name, row in rows_by_name(out).items() if row["status"] != "error"}
    assert len({row["text"] for row in rows.values()}) > 1
    for name, row in rows.items():
        unit = {**row, "kind": "video", "prompts": [{"prompt_id": p.id, "prompt": p.text} for p in job.prompts]}
        batches = decode_unit(unit, frames=job.frames, decode=job.decode, storage=job.storage, sizing=captioner.sizing)
        assert captioner.row(unit, batches)["text"] == row["text"], name


def test_rows_tell_what_compression_saved(finished):
    for row in rows_by_name(finished[0]).values():
        if row["status"] != "error":
            assert row["kv_bytes"] < row["kv_bytes_uncompressed"]
            assert json.loads(row["lightkv"])["stages"]


def test_summary_counts_what_the_rows_say(finished):
    out, _, done = finished
    summary = json.loads((out / "_run" / "summary.json").read_text())
    assert summary["units"]["planned"] == summary["units"]["finished"] == 9
    assert summary["units"]["error"] == 3
    assert summary["kv_bytes_saved"] > 0
    assert "9 of 9 finished" in done.stdout
    assert "bottleneck" in done.stdout


def test_the_run_has_its_page_and_the_frames_on_it(finished):
    out, _, done = finished
    samples = [json.loads(path.read_text()) for path in (out / "_run" / "samples").iterdir()]
    rows = rows_by_name(out)
    assert {sample["id"]: sample["status"] for sample in samples} == {r["id"]: r["status"] for r in rows.values()}
    assert all(sample["prompts"] for sample in samples if sample["status"] != "error")
    assert f"page: {out}/_run/report.html" in done.stdout
    page = (out / "_run" / "report.html").read_text(encoding="utf-8")
    assert all(row["id"] in page for row in rows.values())


def test_progress_is_written_to_a_log_line_by_line(finished):
    assert "/9 units" in finished[2].stderr
    assert "\r" not in finished[2].stderr


def test_same_command_again_finds_nothing_to_do(finished):
    out, overrides, _ = finished
    before = {p.name: p.stat().st_mtime_ns for p in (out / "data").iterdir()}
    again = run("caption", *overrides)
    assert "9 before this start" in again.stdout
    assert {p.name: p.stat().st_mtime_ns for p in (out / "data").iterdir()} == before


def test_another_configuration_on_the_same_output_is_refused_in_one_line(finished):
    _, overrides, _ = finished
    refused = run("caption", *overrides, "frames.fps=1", check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("frames", ["frames.max_frames=16", "frames.max_frames=128"], ids=["whole", "stream"])
def test_decoders_that_die_or_hang_cost_their_own_row_only_and_retry_heals_it(videos, tmp_path, frames):
    source = tmp_path / "source"
    source.mkdir()
    for name, original in {"a": 0, "crash": 1, "b": 2, "hang": 3}.items():
        (source / f"{name}.mp4").write_bytes((videos / f"clip-00{original}.mp4").read_bytes())
    out = tmp_path / "out"
    overrides = [f"source.uri={source}", f"sink.uri={out}", "ray.num_cpus=2", frames]
    run(
        "caption",
        *overrides,
        "decode.backend=tests.integration.backends:dangerous",
        "decode.max_retries=1",
        "decode.timeout_s=6",
    )
    rows = rows_by_name(out)
    assert {n: (r["status"] == "error", r["error_type"]) for n, r in rows.items()} == {
        "a.mp4": (False, None),
        "b.mp4": (False, None),
        "crash.mp4": (True, "DecoderCrashed"),
        "hang.mp4": (True, "Timeout"),
    }
    healed = run("retry", *overrides)
    again = rows_by_name(out)
    assert all(row["status"] != "error" for row in again.values())
    assert {n: r["attempts"] for n, r in again.items()} == {"a.mp4": 1, "b.mp4": 1, "crash.mp4": 2, "hang.mp4": 2}
    assert {n: r["text"] for n, r in again.items() if n in "a.mp4 b.mp4"} == {
        n: r["text"] for n, r in rows.items() if n in "a.mp4 b.mp4"
    }
    assert "error 0" in healed.stdout
    assert Path(out / "_run" / "retry-1" / "merged").exists()


@pytest.mark.parametrize(("cpus", "batch", "compressed"), [(1, 4, "true"), (2, 16, "false")])
def test_units_of_many_batches_share_few_cpus(tmp_path, cpus, batch, compressed):
    """Decode tasks ahead of the model wait without a CPU; if they kept it, the unit that the model needs had none."""
    for number in range(12):
        render(tmp_path / f"{number}.mp4", count=64, fps=24)
    frames = ["frames.strategy=uniform", "frames.count=64", f"frames.batch_frames={batch}"]
    overrides = [f"ray.num_cpus={cpus}", f"lightkv.enabled={compressed}", *frames]
    run("caption", f"source.uri={tmp_path}", f"sink.uri={tmp_path / 'out'}", *overrides)
    rows = rows_by_name(tmp_path / "out")
    assert len(rows) == 12
    assert {len(row["frame_times_s"]) for row in rows.values()} == {64}
    assert all(row["error_type"] is None for row in rows.values())


def test_a_job_that_stands_still_ends_with_the_reason(videos, tmp_path):
    (tmp_path / "hang.mp4").write_bytes((videos / "clip-000.mp4").read_bytes())
    overrides = ["decode.backend=tests.integration.backends:dangerous", "run.stall_s=45", "decode.timeout_s=600"]
    done = run("caption", f"source.uri={tmp_path}", f"sink.uri={tmp_path / 'out'}", *overrides, check=False)
    assert done.returncode == 2
    assert "the job has stalled: waiting" in done.stderr
    assert "for frames" in done.stderr


def test_manifest_with_image_sets_and_own_prompts_gives_a_row_per_line(tmp_path, videos):
    from PIL import Image

    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        Image.new("RGB", (96, 96), colour).save(tmp_path / f"{name}.png")
    lines = [
        {"id": "one", "uri": str(videos / "clip-000.mp4"), "start_s": 1.0, "end_s": 3.0, "prompt": "how many ?"},
        {"id": "two", "uris": ["red.png", "blue.png"], "prompts": ["describe the image .", "what color is it ?"]},
        {"id": "gone", "uri": "missing.mp4"},
    ]
    manifest = tmp_path / "units.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    run("caption", f"source.uri={manifest}", f"sink.uri={out}", "ray.num_cpus=2")
    rows = {row["id"]: row for row in pq.read_table(out).to_pylist()}
    assert set(rows) == {"one", "two", "gone"}
    assert all(1.0 <= t < 3.0 for t in rows["one"]["frame_times_s"])
    assert [a["prompt"] for a in rows["one"]["answers"]] == ["how many ?"]
    assert [a["prompt"] for a in rows["two"]["answers"]] == ["describe the image .", "what color is it ?"]
    assert rows["two"]["vision_tokens"] == 72
    assert (rows["gone"]["error_stage"], rows["gone"]["error_type"]) == ("fetch", "NotFound")
