"""Faults that kill the model's process, end the job on request, or start it twice: no unit is lost or doubled."""

import json
import signal
import subprocess

import pyarrow.parquet as pq
import pytest

from jobs.measure.soak import processes
from pipeline.mini.world import render_demo
from tests.integration.jobs import committed, rows_by_name, run, started, wait_for

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    render_demo(folder, 3)
    return [path.read_bytes() for path in sorted(folder.glob("*.mp4"))]


@pytest.fixture(scope="module")
def expected(clips, tmp_path_factory):
    """The answers of an undisturbed run, by clip."""
    folder = tmp_path_factory.mktemp("undisturbed")
    videos = write(folder / "videos", clips, "a", "b", "c")
    run("caption", f"source.uri={videos}", f"sink.uri={folder / 'out'}", "ray.num_cpus=2")
    rows = rows_by_name(folder / "out")
    return [rows[f"{name}.mp4"]["text"] for name in "abc"]


def write(folder, clips, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / f"{name}.mp4").write_bytes(clips[number % len(clips)])
    return folder


def test_unit_that_kills_its_model_process_is_an_error_row_and_retry_heals_it(clips, expected, tmp_path):
    videos = write(tmp_path / "videos", clips, "a", "poison", "poison-once", "b")
    out = tmp_path / "out"
    overrides = [f"source.uri={videos}", f"sink.uri={out}", "ray.num_cpus=2", "ray.actors.batch_units=1"]
    run("caption", *overrides, "decode.backend=tests.integration.backends:dangerous")
    rows = rows_by_name(out)
    assert {name: (row["status"] == "error", row["error_type"]) for name, row in rows.items()} == {
        "a.mp4": (False, None),
        "b.mp4": (False, None),
        "poison.mp4": (True, "ModelCrashed"),
        "poison-once.mp4": (False, None),
    }
    attempts = {name: row["attempts"] for name, row in rows.items()}
    assert attempts["poison.mp4"] == 3  # run.max_attempts
    # A unit that was next when the process died has one more; one whose row was lost with it counts from 1 again.
    most = {"a.mp4": 2, "b.mp4": 2, "poison-once.mp4": 3}
    assert all(1 <= attempts[name] <= most[name] for name in most)
    assert [rows[n]["text"] for n in ("a.mp4", "poison-once.mp4", "b.mp4")] == [expected[0], expected[2], expected[0]]
    assert "ended 3 times" in rows["poison.mp4"]["error_message"]
    run("retry", *overrides)
    healed = rows_by_name(out)["poison.mp4"]
    assert (healed["text"], healed["attempts"]) == (expected[1], 4)


def test_model_that_dies_of_every_unit_ends_the_job_with_a_line_and_the_same_command_goes_on(clips, expected, tmp_path):
    videos = write(tmp_path / "videos", clips, *(f"poison-{n}" for n in range(6)))
    out = tmp_path / "out"
    overrides = [f"source.uri={videos}", f"sink.uri={out}", "ray.num_cpus=2", "ray.actors.batch_units=1"]
    ended = run(
        "caption",
        *overrides,
        "run.max_attempts=2",
        "run.max_given_up=1",
        "decode.backend=tests.integration.backends:dangerous",
        check=False,
    )
    assert ended.returncode == 2
    assert "error: 2 units in a row" in ended.stderr.splitlines()[-1]
    assert "run.max_given_up" in ended.stderr.splitlines()[-1]
    given_up = {name for name, row in rows_by_name(out).items() if row["error_type"] == "ModelCrashed"}
    assert len(given_up) == len(rows_by_name(out)) <= 2, "the others stay open"
    run("caption", *overrides)  # the fault that killed every unit is gone
    rows = rows_by_name(out)
    healed = [rows[f"poison-{n}.mp4"]["text"] for n in range(6)]
    assert healed == [None if f"poison-{n}.mp4" in given_up else (expected * 2)[n] for n in range(6)]


def test_units_given_up_here_and_there_do_not_end_the_job(clips, tmp_path):
    names = ("poison-1", "good-1", "poison-2", "good-2")
    videos = write(tmp_path / "videos", clips, *names)
    manifest = tmp_path / "units.jsonl"  # fixes the order
    manifest.write_text("\n".join(json.dumps({"uri": f"{videos}/{name}.mp4"}) for name in names))
    out = tmp_path / "out"
    run(
        "caption",
        f"source.uri={manifest}",
        f"sink.uri={out}",
        "ray.num_cpus=2",
        "ray.actors.batch_units=2",
        "frames.max_frames=16",  # all frames of a unit
        "run.max_attempts=2",  # once with another unit, once alone
        "run.max_given_up=1",
        "decode.backend=tests.integration.backends:dangerous",
    )
    kinds = {name: row["error_type"] for name, row in rows_by_name(out).items()}
    assert kinds == {f"{name}.mp4": "ModelCrashed" if name.startswith("poison") else None for name in names}


def test_model_that_is_silent_for_too_long_is_ended_and_its_unit_an_error_row(clips, expected, tmp_path):
    videos = write(tmp_path / "videos", clips, "a", "silent", "b")
    out = tmp_path / "out"
    run(
        "caption",
        f"source.uri={videos}",
        f"sink.uri={out}",
        "ray.num_cpus=2",
        "ray.actors.batch_units=1",
        "model.timeout_s=8",
        "run.max_attempts=2",
        "decode.backend=tests.integration.backends:dangerous",
    )
    rows = rows_by_name(out)
    assert [rows[f"{name}.mp4"]["text"] for name in ("a", "silent", "b")] == [expected[0], None, expected[2]]
    silent = rows["silent.mp4"]
    assert (silent["error_stage"], silent["error_type"], silent["attempts"]) == ("generate", "ModelCrashed", 2)
    assert "no progress for model.timeout_s = 8 s" in silent["error_message"]


def test_killed_model_process_costs_nothing_but_its_time(clips, expected, tmp_path):
    videos = write(tmp_path / "videos", clips, *(f"{n:02d}" for n in range(12)))
    out = tmp_path / "out"
    overrides = [f"source.uri={videos}", f"sink.uri={out}", "ray.num_cpus=2"]
    with started("caption", *overrides, "sink.rows_per_file=1", "ray.actors.batch_units=2") as process:
        wait_for(lambda: committed(out), process)
        (model,) = processes(process.pid, "CaptionActor")
        model.kill()
        output = process.communicate(timeout=240)
    assert process.returncode == 0, output
    rows = rows_by_name(out)
    assert [rows[f"{n:02d}.mp4"]["text"] for n in range(12)] == expected * 4
    assert {row["error_type"] for row in rows.values()} == {None}


def test_job_asked_to_end_finishes_what_is_in_the_model_and_the_same_command_goes_on(clips, expected, tmp_path):
    videos = write(tmp_path / "videos", clips, *(f"{n:02d}" for n in range(40)))
    out = tmp_path / "out"
    overrides = [f"source.uri={videos}", f"sink.uri={out}", "ray.num_cpus=2", "run.grace_s=60"]
    attempts = out / "_run" / "attempts.json"
    slowly = "decode.backend=tests.integration.backends:slow"  # not finished before the request to end
    with started("caption", *overrides, slowly) as process:
        wait_for((out / "_run" / "lock" / "000001.json").exists, process)
        second = run("caption", *overrides, check=False)
        wait_for(lambda: attempts.exists() and attempts.read_text() != "{}", process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "asked to end" in errors.splitlines()[-1]
    assert json.loads(attempts.read_text()) == {}, "an end on request is no unit's fault"
    done = pq.read_table(out).num_rows
    assert 0 < done < 40
    assert not (out / "_run" / "lock" / "000001.json").exists()

    # A second job on the same output was refused while the first one ran.
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert "locked by process" in second.stderr

    run("caption", *overrides)
    rows = rows_by_name(out)
    assert [rows[f"{n:02d}.mp4"]["text"] for n in range(40)] == (expected * 14)[:40]
    assert all(row["attempts"] == 1 for row in rows.values())


def test_full_disk_ends_the_job_with_a_line_and_room_lets_it_go_on(clips, tmp_path):
    videos = write(tmp_path / "videos", clips, "a", "b", "c")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], check=True)
    try:
        overrides = [f"source.uri={videos}", f"sink.uri={small / 'out'}", "ray.num_cpus=2"]
        filler = small / "filler"
        with started("caption", *overrides) as process:
            wait_for((small / "out" / "_run" / "open.parquet").exists, process)
            with pytest.raises(OSError, match="No space"):
                filler.write_bytes(bytes(16 << 20))
            _, errors = process.communicate(timeout=240)
        assert process.returncode == 2, errors
        assert "error: " in errors.splitlines()[-1]
        assert "No space left" in errors.splitlines()[-1]
        filler.unlink()
        run("caption", *overrides)
        assert len(rows_by_name(small / "out")) == 3
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_frames_beyond_the_object_store_slow_the_job_and_harm_no_unit(clips, tmp_path):
    videos = write(tmp_path / "videos", clips, *(f"{n:02d}" for n in range(10)))
    out = tmp_path / "out"
    # If all were decoded at once, 64 frames of 256 × 256 of ten units would take 126 MB; the store holds 84 MB.
    run(
        "caption",
        f"source.uri={videos}",
        f"sink.uri={out}",
        "ray.num_cpus=2",
        "ray.object_store_bytes=83886080",
        "ray.actors.batch_units=10",
        "decode.prefetch_units=9",
        "decode.num_cpus=0.1",
        "frames.fps=8",
        "frames.max_frames=64",
        "frames.min_px=65536",
        "frames.max_px=65536",
        "frames.batch_frames=64",
        "model.max_new_tokens=1",
    )
    rows = rows_by_name(out)
    assert {(row["error_type"], len(row["frame_times_s"])) for row in rows.values()} == {(None, 64)}
    assert len(rows) == 10
