"""Tests of incremental plans: units with a row in an earlier run are skipped, new and changed ones are planned."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import load_config
from pipeline.errors import SourceError
from pipeline.planning import known as module
from pipeline.planning.plan import plan_units
from pipeline.schema import rows_table
from tests.pipeline.planning.test_sources import manifest
from tests.pipeline.rows import row
from tests.s3 import server
from tests.videos import render


def plan(source, base=None, *overrides):
    """The units planned from `source`, incrementally if `base` is given."""
    keys = [f"source.uri={json.dumps(str(source))}", "sink.uri=out", *overrides]
    return plan_units(load_config(None, keys if base is None else [*keys, f"source.known={json.dumps(str(base))}"]))


def names(table):
    return [uris[0].rsplit("/", 1)[1] for uris in table["uris"].to_pylist()]


def left_out(table):
    return int(table.schema.metadata[b"known_units"])


def record(run, units, statuses=None, attempts=1):
    """Write a run over `units` as a job does: row n has `statuses[n]`; None: no row."""
    (run / "_run" / "checkpoint").mkdir(parents=True)
    (run / "data").mkdir()
    pq.write_table(units, run / "_run" / "manifest.parquet")
    for n, unit in enumerate(units.to_pylist()):
        status = "ok" if statuses is None else statuses[n]
        if status is not None:
            rows = rows_table([row(unit["id"], status, etag=unit["etag"], attempts=attempts)])
            pq.write_table(rows, run / "data" / f"w_{n:06d}-0.parquet")
            pq.write_table(pa.table({"id": [unit["id"]]}), run / "_run" / "checkpoint" / f"w_{n:06d}.parquet")


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.mp4").write_text(name)
    return folder


NO_PROBE = "source.probe=false"


def test_nothing_is_known_before_the_first_run(files, tmp_path):
    table = plan(files, tmp_path / "absent", NO_PROBE)
    assert (len(table), left_out(table)) == (4, 0)
    assert table.equals(plan(files, None, NO_PROBE))


def test_only_new_and_changed_files_are_planned(files, tmp_path):
    record(tmp_path / "base" / "run=1", plan(files, None, NO_PROBE))
    (files / "b.mp4").write_text("changed")
    (files / "e.mp4").write_text("new")
    table = plan(files, tmp_path / "base", NO_PROBE)
    assert (names(table), left_out(table)) == (["b.mp4", "e.mp4"], 3)


def test_a_plan_of_known_units_alone_is_empty(files, tmp_path):
    record(tmp_path / "run", plan(files, None, NO_PROBE))
    table = plan(files, tmp_path / "run", NO_PROBE)  # the run itself instead of a folder of runs
    assert (len(table), left_out(table)) == (0, 4)
    assert table.schema.names == plan(files, None, NO_PROBE).schema.names


def test_every_run_below_the_folder_counts(files, tmp_path):
    record(tmp_path / "base" / "run=1", plan(files, None, NO_PROBE, "source.max_units=1"))
    record(tmp_path / "base" / "run=2", plan(files, None, NO_PROBE), [None, "truncated", "skipped", None])
    record(tmp_path / "base" / "deeper" / "run=3", plan(files, None, NO_PROBE).slice(3))
    assert left_out(plan(files, tmp_path / "base", NO_PROBE)) == 4
    assert left_out(plan(files, tmp_path / "base" / "run=2", NO_PROBE)) == 2


def test_units_without_a_row_are_planned_again(files, tmp_path):
    record(tmp_path / "base" / "run=1", plan(files, None, NO_PROBE), ["ok", None, "ok", None])
    assert names(plan(files, tmp_path / "base", NO_PROBE)) == ["b.mp4", "d.mp4"]


def test_rows_that_a_kill_left_half_committed_do_not_count(files, tmp_path):
    run = tmp_path / "base" / "run=1"
    record(run, plan(files, None, NO_PROBE))
    checkpoint = run / "_run" / "checkpoint"
    (checkpoint / "w_000002.parquet").rename(checkpoint / "w_000002.pending.parquet")
    (run / "data" / "w_000002-0.parquet").write_bytes(b"cut off")
    assert names(plan(files, tmp_path / "base", NO_PROBE)) == ["c.mp4"]


def test_error_rows_are_left_to_retry_unless_more_attempts_are_asked_for(files, tmp_path):
    units = plan(files, None, NO_PROBE)
    record(tmp_path / "base" / "run=1", units, ["ok", "error", "error", "ok"])
    assert len(plan(files, tmp_path / "base", NO_PROBE)) == 0
    again = plan(files, tmp_path / "base", NO_PROBE, "source.known_attempts=3")
    assert (names(again), again["attempts"].to_pylist()) == (["b.mp4", "c.mp4"], [1, 1])
    record(tmp_path / "base" / "run=2", again, ["ok", "error"], attempts=2)
    third = plan(files, tmp_path / "base", NO_PROBE, "source.known_attempts=3")
    assert (names(third), third["attempts"].to_pylist()) == (["c.mp4"], [2])
    record(tmp_path / "base" / "run=3", third, ["error"], attempts=3)
    assert len(plan(files, tmp_path / "base", NO_PROBE, "source.known_attempts=3")) == 0


def test_other_questions_and_other_windows_are_other_units_whatever_their_name(tmp_path):
    def rows(prompt="Who?", uri="a.mp4", end=4.0, images=("1.png", "2.png")):
        return [
            {"id": "clip", "uri": uri, "start_s": 1.0, "end_s": end, "prompt": prompt},
            {"id": "set", "uris": list(images), "prompt": "Which?"},
        ]

    source = manifest(tmp_path, rows())
    record(tmp_path / "base" / "run=1", plan(source, None, NO_PROBE))
    for change, expected in (
        ({}, []),
        ({"prompt": "What?"}, ["clip"]),
        ({"end": 5.0}, ["clip"]),
        ({"uri": "b.mp4"}, ["clip"]),
        ({"images": ("1.png",)}, ["set"]),
        ({"images": ("2.png", "1.png")}, ["set"]),
    ):
        manifest(tmp_path, rows(**change))
        assert plan(source, tmp_path / "base", NO_PROBE)["id"].to_pylist() == expected, change


def test_another_name_for_the_same_is_known(tmp_path):
    source = manifest(tmp_path, [{"id": "old", "uri": "a.mp4"}])
    record(tmp_path / "base" / "run=1", plan(source, None, NO_PROBE))
    manifest(tmp_path, [{"id": "new", "uri": "a.mp4"}])
    assert len(plan(source, tmp_path / "base", NO_PROBE)) == 0


def test_max_units_counts_what_is_left(files, tmp_path):
    record(tmp_path / "base" / "run=1", plan(files, None, NO_PROBE), ["ok", "ok", None, None])
    table = plan(files, tmp_path / "base", NO_PROBE, "source.max_units=1")
    assert names(table) == ["c.mp4"]


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    render(folder / "long.mp4", count=50, fps=10)
    render(folder / "short.mp4", count=20, fps=10)
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.fixture
def probed(monkeypatch):
    """The names of the files that planning probes."""
    opened = []
    original = plan_units.__globals__["probe_all"]

    def probe_all(uris, *options, **more):
        opened.extend(uri.rsplit("/", 1)[1] for uri in uris)
        return original(uris, *options, **more)

    monkeypatch.setitem(plan_units.__globals__, "probe_all", probe_all)
    return opened


@pytest.mark.parametrize("listed", [True, False])
def test_videos_of_earlier_runs_are_not_opened_again_but_cut_alike(videos, tmp_path, probed, listed):
    rows = [{"uri": f"videos/{name}.mp4"} for name in ("long", "short", "text")]
    source = manifest(tmp_path, rows) if listed else videos
    first = plan(source, None, "clips.length_s=2")
    record(tmp_path / "base" / "run=1", first, ["ok", None, "ok", "ok", "error"])
    assert sorted(probed) == ["long.mp4", "short.mp4", "text.mp4"]
    probed.clear()
    again = plan(source, tmp_path / "base", "clips.length_s=2")
    assert again.to_pylist() == first.slice(1, 1).to_pylist()
    assert left_out(again) == 4
    assert probed == ["text.mp4"]  # failed probes are repeated
    probed.clear()
    render(videos / "short.mp4", count=30, fps=10)
    assert names(plan(source, tmp_path / "base", "clips.length_s=2")) == ["long.mp4", "short.mp4", "short.mp4"]
    assert sorted(probed) == ["short.mp4", "text.mp4"]


def test_the_latest_look_at_a_video_counts(videos, tmp_path, probed):
    for number, frames in ((1, 20), (2, 40)):
        render(videos / "short.mp4", count=frames, fps=10)
        record(tmp_path / "base" / f"run={number}", plan(videos))
    probed.clear()
    assert len(plan(videos, tmp_path / "base")) == 0
    assert probed == ["text.mp4"]


def test_known_runs_are_read_from_s3(tmp_path):
    with server("known") as storage:
        from pipeline.storage import files as st

        reach = [f"storage.endpoint_url={storage.endpoint_url}", "storage.region=us-east-1", NO_PROBE]
        for name in ("a", "b"):
            st.write_bytes_atomic(f"s3://known/in/{name}.mp4", name.encode(), storage)
        record(tmp_path / "run=1", plan("s3://known/in", None, *reach))
        for path in (tmp_path / "run=1").rglob("*.parquet"):
            st.write_bytes_atomic(f"s3://known/out/{path.relative_to(tmp_path)}", path.read_bytes(), storage)
        st.write_bytes_atomic("s3://known/in/a.mp4", b"changed", storage)
        assert names(plan("s3://known/in", "s3://known/out", *reach)) == ["a.mp4"]


def test_a_run_that_cannot_be_read_is_named(files, tmp_path):
    run = tmp_path / "base" / "run=1"
    record(run, plan(files, None, NO_PROBE))
    (run / "_run" / "manifest.parquet").write_bytes(b"no parquet")
    with pytest.raises(SourceError, match=r"source\.known: cannot read run .*run=1"):
        plan(files, tmp_path / "base", NO_PROBE)


def test_many_rows_over_many_files_and_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ROWS", 1000)
    source = manifest(tmp_path, [{"uri": f"s3://b/{n // 2}.mp4", "start_s": n % 2} for n in range(10_000)])
    units = plan(source, None, NO_PROBE)
    run = tmp_path / "base" / "run=1"
    (run / "_run").mkdir(parents=True)
    (run / "data").mkdir()
    pq.write_table(units, run / "_run" / "manifest.parquet", row_group_size=700)
    ids = units["id"].to_pylist()
    for start in range(0, 9_000, 3_000):
        rows = [row(id_) for id_ in ids[start : start + 3_000][::-1]]
        pq.write_table(rows_table(rows), run / "data" / f"{start}-0.parquet")
    table = plan(source, tmp_path / "base", NO_PROBE)
    assert table["id"].to_pylist() == ids[9_000:]
    assert left_out(table) == 9_000
