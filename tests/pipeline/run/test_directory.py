"""Tests of the run directory: open and committed units, and the check of the configuration."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.config import Storage, load_config
from pipeline.errors import RunError
from pipeline.run.directory import RunDirectory, read_table
from pipeline.storage.errors import StorageError
from tests.pipeline.rows import row, rows, units


def _job(folder, *overrides):
    return load_config(None, ["source.uri=/videos", f"sink.uri={folder}", *overrides])


def _commit(work, folder, name, table):
    (folder / "data").mkdir(exist_ok=True)
    (folder / "_run" / "checkpoint").mkdir(exist_ok=True)
    pq.write_table(table, folder / "data" / f"{name}-0.parquet")
    pq.write_table(table.select(["id"]), folder / "_run" / "checkpoint" / f"{name}.parquet")


def test_same_configuration_takes_the_run_up_again(tmp_path):
    first = RunDirectory(_job(tmp_path)).open()
    assert RunDirectory(_job(tmp_path)).open().run_id == first.run_id


def test_how_fast_it_runs_may_change_between_starts(tmp_path):
    first = RunDirectory(_job(tmp_path)).open()
    again = RunDirectory(_job(tmp_path, "ray.actors.max=4", "decode.backend=pyav", "sink.rows_per_file=7")).open()
    assert again.run_id == first.run_id


def test_another_configuration_is_refused_and_the_run_named(tmp_path):
    first = RunDirectory(_job(tmp_path)).open()
    with pytest.raises(RunError, match=first.run_id):
        RunDirectory(_job(tmp_path, "frames.fps=3")).open()


def test_data_of_no_known_run_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "data" / "foreign.parquet")
    with pytest.raises(RunError, match="data of no run"):
        RunDirectory(_job(tmp_path)).open()


def test_retry_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        RunDirectory(_job(tmp_path)).resume_only()


def test_written_configuration_loads_as_an_equal_one(tmp_path):
    job = _job(tmp_path, "prompts=[{id: a, text: 'naïve?'}]")
    RunDirectory(job).open()
    assert load_config(tmp_path / "_run" / "config.yaml") == job


def test_units_with_a_committed_row_are_not_open(tmp_path):
    work = RunDirectory(_job(tmp_path)).open()
    work.write_manifest(units("a", "b", "c"))
    assert work.prepare() == (3, 0)
    _commit(work, tmp_path, "x_000000", rows(row("b")))
    assert work.prepare() == (3, 1)
    assert pq.read_table(tmp_path / "_run" / "open.parquet")["id"].to_pylist() == ["a", "c"]


def test_uncommitted_rows_stay_open(tmp_path):
    work = RunDirectory(_job(tmp_path)).open()
    work.write_manifest(units("a", "b"))
    (tmp_path / "_run" / "checkpoint").mkdir()
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "_run" / "checkpoint" / "x_000000.pending.parquet")
    assert work.prepare() == (2, 0)


def test_output_folder_reads_as_one_table_of_rows(tmp_path):
    work = RunDirectory(_job(tmp_path)).open()
    work.write_manifest(units("a", "b"))
    work.prepare()
    _commit(work, tmp_path, "x_000000", rows(row("a"), row("b", "error")))
    assert sorted(pq.read_table(tmp_path)["id"].to_pylist()) == ["a", "b"]
    assert work.rows(["id", "status"]).sort_by("id").to_pydict() == {"id": ["a", "b"], "status": ["ok", "error"]}


def test_files_are_read_some_at_a_time_and_none_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.run.directory._FILES_AT_ONCE", 2)
    work = RunDirectory(_job(tmp_path)).open()
    work.write_manifest(units(*"abcdef"))
    for number, name in enumerate("abcde"):
        _commit(work, tmp_path, f"x_{number:06d}", rows(row(name, frame_times_s=[0.0] * number)))
    assert work.prepare() == (6, 5)
    frames = {"id": pc.field("id"), "frames": pc.list_value_length(pc.field("frame_times_s"))}
    assert work.rows(frames).sort_by("id").to_pydict() == {"id": [*"abcde"], "frames": [0, 1, 2, 3, 4]}
    some = pa.array(["b", "e", "f"])
    assert work.rows(["id"], some).sort_by("id").to_pydict() == {"id": ["b", "e"]}
    assert [Path(uri).name for uri in sorted(work.files_of(some))] == ["x_000001-0.parquet", "x_000004-0.parquet"]


def test_run_without_rows_reads_as_an_empty_table(tmp_path):
    work = RunDirectory(_job(tmp_path)).open()
    assert work.rows().num_rows == 0
    assert work.rows(["id"]).column_names == ["id"]


def test_file_that_is_gone_is_told_by_its_name(tmp_path):
    with pytest.raises(StorageError, match=r"no such file: .*/gone\.parquet"):
        read_table(str(tmp_path / "gone.parquet"), Storage())
